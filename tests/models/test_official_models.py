"""Whole checkpoints of the authors: synthetic ones with their keys and shapes, in all nine architectures."""

from __future__ import annotations

import copy
import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from official_checkpoints import ARCHS, on_meta, shapes_of, synthetic
from torch import Tensor, nn

import orepa
from orepa import block_from_official
from orepa.cli import main
from orepa.modules import official_blocks as official

timm = pytest.importorskip("timm", reason="timm is not installed (the [models] extra)")
from orepa import models  # noqa: E402
from orepa.models import key_map  # noqa: E402  # after the check for timm

# --- the same network, put together block by block ----------------------------------------------------------------------------


def at(state: dict[str, Tensor], prefix: str, **geometry: int) -> nn.Module:
    own = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    return block_from_official(own, **geometry).eval()  # type: ignore[arg-type]


def plain_resnet18(state: dict[str, Tensor], x: Tensor) -> Tensor:
    x = F.max_pool2d(at(state, "stage0.conv1.", stride=2, padding=3)(x).relu(), 3, 2, 1)
    for stage in range(1, 5):
        for j in range(2):
            stride = 2 if stage > 1 and j == 0 else 1
            block = f"stage{stage}.{j}"
            y = at(state, f"{block}.conv1.", stride=stride, padding=1)(x).relu()
            y = at(state, f"{block}.conv2.", stride=1, padding=1)(y)
            if f"{block}.shortcut.conv.weight" in state:
                mean, var, weight, bias = (
                    state[f"{block}.shortcut.bn.{k}"] for k in ("running_mean", "running_var", "weight", "bias")
                )
                x = F.conv2d(x, state[f"{block}.shortcut.conv.weight"], stride=stride)
                x = F.batch_norm(x, mean, var, weight, bias)
            x = (x + y).relu()
    return F.linear(x.mean((2, 3)), state["linear.weight"], state["linear.bias"])


def plain_repvgg(state: dict[str, Tensor], x: Tensor) -> Tensor:
    x = at(state, "stage0.", stride=2, padding=1)(x)
    for stage, blocks in enumerate((2, 4, 14, 1), 1):
        for j in range(blocks):
            x = at(state, f"stage{stage}.{j}.", stride=1 if j else 2, padding=1)(x)
    return F.linear(x.mean((2, 3)), state["linear.weight"], state["linear.bias"])


EVALUATIONS = {"ResNet-18": plain_resnet18, "RepVGG-A0": plain_repvgg}


def relative_error(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).norm() / expected.norm())


@pytest.mark.parametrize("arch", EVALUATIONS)
@torch.no_grad()
def test_outputs_are_those_of_their_blocks(arch: str) -> None:
    state = synthetic(arch, torch.float64)
    before = copy.deepcopy(state)
    x = torch.randn(2, 3, 48, 40, dtype=torch.float64)
    seed = torch.get_rng_state()
    model = orepa.load_official(state, arch)
    assert torch.equal(torch.get_rng_state(), seed) and model.training
    assert {p.dtype for p in model.parameters()} == {torch.float64} and all(p.requires_grad for p in model.parameters())
    expected = EVALUATIONS[arch](state, x)
    assert relative_error(model.eval()(x), expected) < 1e-12

    model.train()(x)  # moves the running statistics of the copy
    assert all(torch.equal(value.nan_to_num(), before[key].nan_to_num()) for key, value in state.items())


@pytest.mark.parametrize("skipped", ["_flip", "_mirror_prior"])
@torch.no_grad()
def test_without_its_conversion_a_model_differs(skipped: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control of the comparison."""
    state = synthetic("ResNet-18")
    x = torch.randn(2, 3, 32, 32)
    expected = orepa.load_official(state, "ResNet-18").eval()(x)
    monkeypatch.setattr(official, skipped, lambda tensor: tensor)
    assert relative_error(orepa.load_official(state, "ResNet-18").eval()(x), expected) > 1e-3


# --- keys -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ARCHS)
def test_every_key_has_its_place(arch: str) -> None:
    """Their keys but the constants, one to one onto ours, with the shapes of ours."""
    state = on_meta(arch)
    model = orepa.load_official(state, arch)
    entries = key_map.official_entries(model)
    constants = [key for key in state if re.search(r"id_tensor|_prior$|_avg_avg$", key)]
    assert entries.keys() == state.keys() - set(constants)
    ours = {key: value for key, value in model.state_dict().items() if not key.endswith("_extra_state")}
    assert sorted(entry.name for entry in entries.values()) == sorted(ours)
    for key, entry in entries.items():
        assert tuple(state[key].shape) in entry.shapes(tuple(ours[entry.name].shape))


@settings(max_examples=8)
@given(
    st.sampled_from(["ResNet-18", "ResNeXt-50", "RepVGG-A0"]),
    st.booleans(),
    st.booleans(),
    st.sampled_from(["num_batches_tracked", "id_tensor", "avg_avg", "prior", "nothing"]),
)
def test_wrappers_prefixes_and_what_may_be_absent(arch: str, wrapped: bool, prefixed: bool, absent: str) -> None:
    state = {key: value for key, value in on_meta(arch).items() if not key.endswith(absent)}
    if prefixed:
        state = {f"module.{key}": value for key, value in state.items()}
    content: Any = {"state_dict": state, "epoch": 120, "optimizer": {}} if wrapped else state
    assert orepa.report(orepa.load_official(content, arch)).operation == "prepare"


@pytest.mark.parametrize("arch", ["orepa_resnext50_32x4d", "resnext50_32x4d", "ResNeXt-50"])
def test_names_of_an_architecture(arch: str) -> None:
    model = orepa.load_official(on_meta("ResNeXt-50"), arch, backend="reference")
    assert model.pretrained_cfg["architecture"] == "orepa_resnext50_32x4d"
    assert model.layer1[0].conv2.backend == "reference"


def test_a_checkpoint_of_other_classes() -> None:
    state = on_meta("RepVGG-A0")
    state |= {"linear.weight": torch.zeros(10, 1280, device="meta"), "linear.bias": torch.zeros(10, device="meta")}
    assert orepa.load_official(state, "RepVGG-A0").num_classes == 10


# --- files ------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """RepVGG-A0 as their training writes it."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("official") / "RepVGG-A0.pth.tar"
    state = {f"module.{key}": value for key, value in synthetic("RepVGG-A0").items()}
    torch.save({"epoch": 120, "arch": "RepVGG-A0", "state_dict": state, "best_acc1": torch.tensor(73.0)}, path)
    return path


@torch.no_grad()
def test_a_file_is_what_it_holds(checkpoint: Path) -> None:
    model = orepa.load_official(checkpoint, "RepVGG-A0").eval()
    twin = orepa.load_official(torch.load(checkpoint, weights_only=True), "RepVGG-A0").eval()
    assert all(torch.equal(value, twin.state_dict()[key]) for key, value in model.state_dict().items())
    x = torch.randn(2, 3, 32, 32)
    assert relative_error(orepa.convert(model, example_inputs=x)(x), model(x)) < 1e-5


@torch.no_grad()
def test_timm_loads_the_authors_file(checkpoint: Path) -> None:
    """With another head and as a feature extractor, which need more than `load_official`."""
    model = orepa.load_official(str(checkpoint), "RepVGG-A0").eval()
    x = torch.randn(2, 3, 32, 32)
    arguments = {"pretrained": True, "pretrained_cfg_overlay": {"file": str(checkpoint)}}
    fine = timm.create_model("orepa_repvgg_a0", num_classes=7, **arguments).eval()
    assert fine(x).shape == (2, 7) and torch.equal(fine.forward_features(x), model.forward_features(x))
    features = timm.create_model("orepa_repvgg_a0", features_only=True, **arguments).eval()
    assert torch.equal(features(x)[-1], model.forward_features(x))
    with pytest.raises(ValueError, match="no checkpoint of this model: missing 'stage0.conv1.weight0.weight_orepa_or"):
        timm.create_model("orepa_resnet18", **arguments)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not a readable checkpoint"),
        (b"\x80\x02not a pickle", "is not a readable checkpoint"),
        (Path("pickled"), "is not a readable checkpoint"),
        (torch.ones(3), "it holds a Tensor, no state dict"),
        ({"state_dict": [1]}, "its state_dict is a list"),
        ({"model": {}}, "'model' must be a tensor, got a dict"),
        ({}, "missing 'stage0.rbr_dense.weight_rbr_origin'"),
        ({"stage0.rbr_reparam.weight": torch.ones(1)}, "deployed already"),
    ],
    ids=["empty", "bytes", "object", "tensor", "list", "another's", "nothing", "deployed"],
)
def test_files_that_are_no_checkpoint(content: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / "other.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(ValueError, match=message):
        orepa.load_official(path, "RepVGG-A0")


def test_no_file_and_no_source(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="missing.pth"):
        orepa.load_official(tmp_path / "missing.pth", "ResNet-18")
    with pytest.raises(OSError, match="directory"):
        orepa.load_official(tmp_path, "ResNet-18")
    with pytest.raises(TypeError, match="must be a file or a mapping of names to tensors, got int"):
        orepa.load_official(3, "ResNet-18")  # type: ignore[arg-type]


# --- another architecture ---------------------------------------------------------------------------------------------------


@settings(max_examples=10)
@given(st.sampled_from(ARCHS), st.sampled_from(ARCHS))
def test_a_checkpoint_of_another_architecture(theirs: str, asked: str) -> None:
    have, want = shapes_of(theirs), shapes_of(asked)
    if theirs == asked:
        orepa.load_official(on_meta(theirs), asked)
        return
    with pytest.raises(ValueError, match="no checkpoint of orepa_") as raised:
        orepa.load_official(on_meta(theirs), asked)
    text = str(raised.value)
    constant = re.compile(r"id_tensor|_prior$|_avg_avg$|num_batches_tracked$")
    named = re.findall(r"'([\w.]+)'", text)
    assert named
    if [key for key in want if key not in have and not constant.search(key)]:
        assert "missing" in text
    if [key for key in have if key not in want and not constant.search(key)]:
        assert "unexpected" in text
    for key, one, other in re.findall(r"'([\w.]+)' is (\[[\d, ]*\]) there, (\[[\d, ]*\]) in the model", text):
        assert one == str(list(have[key])) and other.partition(",")[2] == str(list(want[key])).partition(",")[2]


@pytest.mark.parametrize(
    ("theirs", "asked", "message"),
    [
        (
            "ResNet-34",
            "ResNet-18",
            r"of orepa_resnet18: unexpected 'stage1.2.conv1.weight_orepa_origin'.* and \d+ more",
        ),
        ("ResNet-18", "ResNet-34", r"of orepa_resnet34: missing 'stage1.2.conv1.weight_orepa_origin'.* and \d+ more"),
        (
            "ResNet-18-2x",
            "ResNet-18",
            r"'stage0.conv1.weight0.weight_orepa_origin' is \[128, 3, 3, 3\] there, \[64, 3, 3, 3\] in",
        ),
        (
            "ResNeXt-50",
            "ResNet-50",
            r"50: 'stage1.0.conv1.weight_or1x1_origin' is \[128, 64, 1, 1\] there, \[64, 64, 1, 1\] in",
        ),
        ("RepVGG-A0", "ResNet-18", r"missing 'stage0.conv1.weight0.*; unexpected 'stage0.rbr_dense"),
    ],
)
def test_the_first_differences_are_named(theirs: str, asked: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        orepa.load_official(on_meta(theirs), asked)


def test_bad_tensors_and_names() -> None:
    state = on_meta("RepVGG-A0")
    with pytest.raises(ValueError, match=r"arch must be one of orepa_resnet18 \(ResNet-18\).*got 'RepVGG-C1'"):
        orepa.load_official(state, "RepVGG-C1")
    with pytest.raises(TypeError, match=r"'linear.bias' must be floating-point, got torch.int64"):
        orepa.load_official({**state, "linear.bias": torch.zeros(1000, dtype=torch.int64, device="meta")}, "RepVGG-A0")
    with pytest.raises(ValueError, match="'linear.weight' is on cpu"):
        orepa.load_official({**state, "linear.weight": torch.zeros(1000, 1280)}, "RepVGG-A0")


# --- orepa convert --official -----------------------------------------------------------------------------------------------


@torch.no_grad()
def converted_file_fits(source: Path, arch: str, out: Path) -> None:
    assert main(["convert", "--official", str(source), "--arch", arch, str(out)]) == 0
    plain = timm.create_model(models.spec_of(arch)[1].plain).eval()
    plain.load_state_dict(torch.load(out, weights_only=True), strict=True)
    x = torch.randn(2, 3, 32, 32)
    assert relative_error(plain(x), orepa.load_official(source, arch).eval()(x)) < 1e-5


def test_convert_repvgg(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    converted_file_fits(checkpoint, "RepVGG-A0", tmp_path / "plain.pth")
    printed = capsys.readouterr().out
    assert "22 converted" in printed and "timm.create_model('repvgg_a0')" in printed


def test_convert_resnet(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(synthetic("ResNet-18"), tmp_path / "theirs.pth")
    converted_file_fits(tmp_path / "theirs.pth", "orepa_resnet18", tmp_path / "plain.pth")
    assert "17 converted" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plain.pth", "theirs.pth"]


def refuses(folder: Path, capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    before = {path: path.read_bytes() for path in folder.iterdir()}
    assert main(["convert", *map(str, arguments)]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and len(captured.err.splitlines()) == 1
    assert {path: path.read_bytes() for path in folder.iterdir()} == before
    return captured.err


def test_convert_refuses(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "plain.pth"
    refused = partial(refuses, tmp_path, capsys)
    assert "no checkpoint of orepa_resnet18: missing" in refused("--official", checkpoint, "--arch", "ResNet-18", out)
    assert "arch must be one of" in refused("--official", checkpoint, "--arch", "ResNet-19", out)
    assert "--official and --arch go together" in refused("--official", checkpoint, out)
    assert "--official and --arch go together" in refused(checkpoint, out, "--arch", "RepVGG-A0")
    missing = refused("--official", tmp_path / "missing.pth", "--arch", "RepVGG-A0", out)
    assert "cannot read the checkpoint" in missing and "No such file" in missing
    assert "does not exist" in refused("--official", checkpoint, "--arch", "RepVGG-A0", tmp_path / "no" / "out.pth")
    assert "is a folder" in refused("--official", checkpoint, "--arch", "RepVGG-A0", tmp_path)
    (tmp_path / "text.pth").write_text("not a checkpoint")
    assert "not a readable checkpoint" in refused("--official", tmp_path / "text.pth", "--arch", "RepVGG-A0", out)
    out.write_text("precious")
    assert "exists already" in refused("--official", checkpoint, "--arch", "RepVGG-A0", out)


def test_convert_checks_its_result(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = synthetic("RepVGG-A0")
    state["stage2.1.rbr_dense.weight_rbr_origin"].fill_(torch.nan)
    torch.save(state, tmp_path / "damaged.pth")
    error = refuses(tmp_path, capsys, "--official", tmp_path / "damaged.pth", "--arch", "RepVGG-A0", tmp_path / "o.pth")
    assert "the conversion failed its check, nothing was written" in error
