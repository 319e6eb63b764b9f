"""Whole checkpoints of the original RepVGG, MobileOne and DBB networks: synthetic ones with their keys and shapes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from official_checkpoints import (
    MOBILEONES,
    ORIGINAL_REPVGGS,
    ORIGINALS,
    dbb_resnet_shapes,
    original_shapes,
    random_values,
    zeros_on_meta,
)
from torch import Tensor, nn

import orepa
from orepa.cli import main

timm = pytest.importorskip("timm", reason="timm is not installed (the [models] extra)")

# --- the same network, put together block by block ----------------------------------------------------------------------------


class Network:
    """Runs a state dict with their keys, in eval mode."""

    def __init__(self, state: dict[str, Tensor]) -> None:
        self.state = state

    def block(self, at: str, x: Tensor, **geometry: int) -> Tensor:
        names = ("rbr_", "dbb_")
        own = {key.removeprefix(f"{at}."): value for key, value in self.state.items() if key.startswith(f"{at}.")}
        own = {key: value for key, value in own.items() if key.startswith(names)}
        return orepa.block_from_official(own, **geometry).eval()(x)  # type: ignore[arg-type, no-any-return]

    def conv(self, at: str, x: Tensor, stride: int = 1) -> Tensor:
        """A convolution and its norm, or a Diverse Branch Block."""
        if f"{at}.dbb_origin.conv.weight" in self.state:
            return self.block(at, x, stride=stride, padding=1)
        weight = self.state[f"{at}.conv.weight"]
        kinds = ("running_mean", "running_var", "weight", "bias")
        statistics = [self.state[f"{at}.bn.{kind}"] for kind in kinds]
        return F.batch_norm(F.conv2d(x, weight, None, stride, weight.shape[-1] // 2), *statistics)

    def excite(self, at: str, x: Tensor, down: str, up: str) -> Tensor:
        if f"{at}.se.{down}.weight" not in self.state:
            return x
        low, high = ([self.state[f"{at}.se.{name}.{kind}"] for kind in ("weight", "bias")] for name in (down, up))
        y = F.conv2d(x.mean((2, 3), keepdim=True), *low).relu()
        return x * F.conv2d(y, *high).sigmoid()

    def classify(self, x: Tensor) -> Tensor:
        return F.linear(x.mean((2, 3)), self.state["linear.weight"], self.state["linear.bias"])


def run_repvgg(state: dict[str, Tensor], arch: str, x: Tensor) -> Tensor:
    network, index = Network(state), 0
    depths, _, groups = ORIGINAL_REPVGGS[arch]
    for stage, blocks in enumerate((1, *depths)):
        for j in range(blocks):
            at, g = "stage0" if stage == 0 else f"stage{stage}.{j}", groups if index and index % 2 == 0 else 1
            x = network.block(at, x, stride=1 if j else 2, padding=1, groups=g)
            x, index = network.excite(at, x, "down", "up").relu(), index + 1
    return network.classify(x)


def run_mobileone(state: dict[str, Tensor], arch: str, x: Tensor) -> Tensor:
    network = Network(state)
    x = network.block("stage0", x, stride=2, padding=1).relu()
    for stage, blocks in enumerate((2, 8, 10, 1), 1):
        for j in range(2 * blocks):
            at, depthwise = f"stage{stage}.{j}", j % 2 == 0
            stride, groups = 1 if j else 2, x.shape[1] if depthwise else 1
            x = network.block(at, x, stride=stride, padding=int(depthwise), groups=groups)
            x = network.excite(at, x, "reduce", "expand").relu()
    return network.classify(x)


def run_resnet(state: dict[str, Tensor], depth: int, x: Tensor) -> Tensor:
    network = Network(state)
    x = F.max_pool2d(network.conv("stage0.conv1", x, 2).relu(), 3, 2, 1)
    for stage, blocks in enumerate((2, 2, 2, 2) if depth == 18 else (3, 4, 6, 3), 1):
        for j in range(blocks):
            at, stride = f"stage{stage}.{j}", 2 if j == 0 and stage > 1 else 1
            if depth == 18:
                y = network.conv(f"{at}.conv2", network.conv(f"{at}.conv1", x, stride).relu())
            else:
                y = network.conv(f"{at}.conv2", network.conv(f"{at}.conv1", x).relu(), stride).relu()
                y = network.conv(f"{at}.conv3", y)
            x = network.conv(f"{at}.shortcut", x, stride) if f"{at}.shortcut.conv.weight" in state else x
            x = (x + y).relu()
    return network.classify(x)


def assert_same(got: Tensor, expected: Tensor, tolerance: float = 1e-11) -> None:
    assert float((got - expected).norm() / expected.norm()) < tolerance


# --- into timm's networks ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ORIGINALS)
def test_every_key_of_timm_has_its_place(arch: str) -> None:
    name = arch.lower().replace("-", "_")
    state = {f"module.{key}": value for key, value in zeros_on_meta(original_shapes(arch)).items()}
    model = orepa.load_official({"state_dict": state}, name)
    assert model.pretrained_cfg["architecture"] == name and model.training


@pytest.mark.parametrize("arch", ["RepVGG-A0", "MobileOne-S0", "MobileOne-S4"])
@torch.no_grad()
def test_outputs_are_those_of_their_blocks(arch: str) -> None:
    state = random_values(original_shapes(arch), torch.float64)
    x = torch.randn(1, 3, 40, 32, dtype=torch.float64)
    model = orepa.load_official(state, arch)
    assert {p.dtype for p in model.parameters()} == {torch.float64} and all(p.requires_grad for p in model.parameters())
    expected = (run_mobileone if arch in MOBILEONES else run_repvgg)(state, arch, x)
    assert_same(model.eval()(x), expected)


@torch.no_grad()
def test_online_repvgg_is_the_same_function() -> None:
    state = random_values(original_shapes("RepVGG-A0"), torch.float64)
    x = torch.randn(1, 3, 40, 32, dtype=torch.float64)
    model = orepa.load_official(state, "RepVGG-A0", online=True, backend="reference")
    assert orepa.report(model).operation == "prepare" and model.training
    assert [m.backend for m in model.modules() if isinstance(m, orepa.OREPAConv)] == ["reference"] * 22
    assert_same(model.eval()(x), run_repvgg(state, "RepVGG-A0", x))


# --- ResNets of Diverse Branch Blocks ---------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", [18, 50])
@torch.no_grad()
def test_resnet_of_diverse_branch_blocks(depth: int) -> None:
    state = random_values(dbb_resnet_shapes(depth), torch.float64)
    x = torch.randn(1, 3, 40, 32, dtype=torch.float64)
    expected = run_resnet(state, depth, x)
    model = orepa.load_official(state, f"ResNet-{depth}")
    assert model.training and sum(isinstance(m, orepa.OfflineConv) for m in model.modules()) == 16
    assert_same(model.eval()(x), expected)
    if depth == 50:  # the rest differs by the number of layers only
        return
    online = orepa.load_official(state, "resnet18", online=True, backend="reference")
    assert online.training and sum(isinstance(m, orepa.OREPAConv) for m in online.modules()) == 16
    assert {p.dtype for p in online.parameters()} == {torch.float64}
    assert online.layer1[0].conv2.backend == "reference" and online.layer1[0].conv2.topology == "dbb"
    assert isinstance(online.layer1[0].bn2, nn.BatchNorm2d) and isinstance(online.conv1, nn.Conv2d)
    assert_same(online.eval()(x), expected)


# --- orepa convert --official -------------------------------------------------------------------------------------------


@torch.no_grad()
def converted_file_fits(state: dict[str, Tensor], arch: str, name: str, folder: Path) -> None:
    torch.save(state, folder / "theirs.pth")
    assert main(["convert", "--official", str(folder / "theirs.pth"), "--arch", arch, str(folder / "plain.pth")]) == 0
    plain = timm.create_model(name).eval()
    plain.load_state_dict(torch.load(folder / "plain.pth", weights_only=True), strict=True)
    x = torch.randn(1, 3, 32, 32)
    assert_same(plain(x), orepa.load_official(state, arch).eval()(x), 1e-5)


def test_convert_repvgg(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    converted_file_fits(random_values(original_shapes("RepVGG-A0")), "RepVGG-A0", "repvgg_a0", tmp_path)
    assert "22 left" in capsys.readouterr().out


def test_convert_mobileone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    converted_file_fits(random_values(original_shapes("MobileOne-S0")), "MobileOne-S0", "mobileone_s0", tmp_path)
    printed = capsys.readouterr().out
    assert "43 left" in printed and "a state dict for timm.create_model('mobileone_s0')" in printed


def test_convert_dbb(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    converted_file_fits(random_values(dbb_resnet_shapes(18)), "ResNet-18", "resnet18", tmp_path)
    assert "16 converted" in capsys.readouterr().out


# --- another checkpoint ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shapes", "arch", "message"),
    [
        (
            original_shapes("MobileOne-S4"),
            "mobileone_s0",
            "no checkpoint of mobileone_s0: missing 'stage1.0.rbr_conv.1.conv",
        ),
        (
            original_shapes("RepVGG-A0"),
            "RepVGG-B1g4",
            "no checkpoint of repvgg_b1g4: missing 'stage1.2.rbr_identity.weight'",
        ),
        (
            original_shapes("RepVGG-A0"),
            "RepVGG-A1",
            r"'stage0.rbr_dense.conv.weight' is \[48, 3, 3, 3\] there, \[64, ",
        ),
        (
            original_shapes("RepVGG-A0"),
            "orepa_repvgg_a0",
            "of orepa_repvgg_a0: missing 'stage0.rbr_dense.weight_rbr_orig",
        ),
        (original_shapes("RepVGG-A0"), "RepVGG-B1g2", "got 'RepVGG-B1g2'; the originals that load are timm's repvgg_"),
        (
            dbb_resnet_shapes(18),
            "ResNet-34",
            "no checkpoint of resnet34 of DBB blocks: missing 'stage1.2.conv1.dbb_origin",
        ),
        (
            {"stage0.reparam_conv.weight": (48, 3, 3, 3)},
            "mobileone_s0",
            "deployed already .'stage0.reparam_conv.weight'",
        ),
    ],
)
def test_a_checkpoint_of_something_else(shapes: dict[str, tuple[int, ...]], arch: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        orepa.load_official(zeros_on_meta(shapes), arch)
