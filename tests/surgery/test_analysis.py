"""`orepa.analyze` measures what it says, and `orepa analyze` writes it down."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from strategies import MIXED_TOPOLOGIES, geometries, perturb
from torch import nn

import orepa
from orepa.cli import main
from orepa.topology import Branch, Conv, ConvSpec, Nested, Topology

pytestmark = pytest.mark.usefixtures("one_thread")


def three(spec: ConvSpec) -> Topology:
    return Topology(a=Branch(Conv(3)), b=Branch(Conv(3)), centre=Branch(Conv(1)))


def hand_made() -> orepa.OREPAConv:
    """Kernels 2 * ones, -ones and the centre: squeezed, ones plus the centre."""
    conv = orepa.OREPAConv(1, 1, 3, bias=False, topology=three)
    with torch.no_grad():
        conv.a_weight.fill_(1)
        conv.b_weight.fill_(1)
        conv.centre_weight.fill_(1)
        conv.scales.copy_(torch.tensor([[2.0], [-1.0], [1.0]]))
    return conv


# --- what is measured -------------------------------------------------------------------------------------------------------


def test_a_block_made_by_hand() -> None:
    (layer,) = orepa.analyze(nn.Sequential(hand_made())).layers
    assert (layer.name, layer.layer, layer.topology) == ("0", "3x3 1->1", "three")
    assert [branch.name for branch in layer.branches] == ["a", "b", "centre"]
    assert layer.norm == pytest.approx(math.sqrt(8 + 4))
    assert [branch.norm for branch in layer.branches] == pytest.approx([6, 3, 1])
    assert [branch.relative_norm for branch in layer.branches] == pytest.approx([n / math.sqrt(12) for n in (6, 3, 1)])
    expected = [1, -1, 1 / 3, -1, 1, -1 / 3, 1 / 3, -1 / 3, 1]
    assert torch.tensor(layer.similarity).flatten().tolist() == pytest.approx(expected)
    assert layer.prunable == () and layer.change == 0


def test_scale_statistics() -> None:
    conv = orepa.OREPAConv(3, 4, 3, topology="acnet")
    with torch.no_grad():
        conv.scales[1] = torch.tensor([-3.0, 0.0, 1e-4, 1.0])
    (layer,) = orepa.analyze(conv).layers
    scale = layer.branches[1].scale
    assert scale is not None
    values = [-3.0, 0.0, 1e-4, 1.0]
    mean = sum(values) / 4
    assert scale.mean == pytest.approx(mean)
    assert scale.std == pytest.approx(math.sqrt(sum((v - mean) ** 2 for v in values) / 4))
    assert (scale.minimum, scale.maximum, scale.near_zero) == (-3.0, 1.0, 0.5)
    assert scale.quartiles == pytest.approx((-0.75, 0.5e-4, 0.250075))


def test_scalar_and_absent_scales() -> None:
    scalar, none = (orepa.analyze(orepa.OREPAConv(3, 4, 3, scaling=s)).layers[0] for s in ("scalar", "none"))
    first = scalar.branches[0].scale
    assert first is not None and first.mean == first.minimum == first.maximum == 0.25 and first.std == 0
    assert all(branch.scale is None for branch in none.branches)


@settings(max_examples=25)
@given(geometry=geometries(), topology=st.sampled_from(MIXED_TOPOLOGIES), scaling=st.sampled_from(["vector", "scalar"]))
def test_every_measure_against_the_block_itself(geometry: dict[str, Any], topology: str, scaling: str) -> None:
    try:
        conv = orepa.OREPAConv(**geometry, topology=topology, scaling=scaling, dtype=torch.float64)
    except ValueError:
        assume(False)
    perturb(conv)
    (layer,) = orepa.analyze(conv, 0.3).layers
    kernels = []
    for row in range(len(layer.branches)):  # a block whose other branches are silenced
        alone = copy.deepcopy(conv)
        with torch.no_grad():
            alone.scales[[r for r in range(len(layer.branches)) if r != row]] = 0
            kernels.append(alone.to_conv2d().weight.flatten())
    for branch, kernel in zip(layer.branches, kernels, strict=True):
        assert branch.norm == pytest.approx(kernel.norm().item(), rel=1e-9)
        assert branch.relative_norm == pytest.approx(branch.norm / layer.norm, rel=1e-9)
    assert layer.norm == pytest.approx(conv.squeeze().norm().item(), rel=1e-9)

    similarity = torch.tensor(layer.similarity, dtype=torch.float64)
    assert torch.equal(similarity, similarity.T) and torch.equal(similarity.diag(), torch.ones(len(kernels)).double())
    assert float(similarity.abs().max()) <= 1
    units = torch.stack([kernel / kernel.norm() for kernel in kernels])
    torch.testing.assert_close(similarity, (units @ units.T).detach())

    going = [kernels[i] for i, branch in enumerate(layer.branches) if branch.name in layer.prunable]
    missing = sum(going, torch.zeros_like(kernels[0]))
    assert layer.change == pytest.approx(missing.norm().item() / layer.norm, abs=1e-12) and layer.change <= 0.3
    assert len(going) < len(kernels)


def test_branches_that_are_small_one_by_one_and_not_together() -> None:
    conv = orepa.OREPAConv(2, 2, 3, bias=False, topology="mobileone", branches=5, stride=2, dtype=torch.float64)
    with torch.no_grad():
        conv.scales.fill_(1)
        for name, parameter in conv.named_parameters():
            if name.endswith("_weight"):
                parameter.fill_(4e-4 if name != "conv1_weight" else 1.0)
        conv.conv1x1_weight.zero_()
    (layer,) = orepa.analyze(conv, 1e-3).layers
    # Each of the four others is 0.4 thousandths of the kernel, so that only two of them can go, and the 1x1, which is zero.
    assert layer.prunable[0] == "conv1x1" and len(layer.prunable) == 3
    assert layer.change == pytest.approx(8e-4, rel=1e-2)


def test_a_branch_behind_zeros() -> None:
    analysis = orepa.analyze(orepa.OREPAConv(4, 4, 3))  # the prior starts so
    (layer,) = analysis.layers
    names = [branch.name for branch in layer.branches]
    prior = names.index("prior")
    assert layer.branches[prior].norm == layer.branches[prior].relative_norm == 0
    assert layer.branches[prior].scale is not None and layer.branches[prior].scale.near_zero == 1
    assert [layer.similarity[prior][i] for i in range(6) if i != prior] == [None] * 5
    assert layer.similarity[prior][prior] == 1
    assert analysis.prunable == {"": ("prior",)} and layer.change == 0


def test_a_block_of_zeros() -> None:
    conv = orepa.OREPAConv(4, 4, 3)
    nn.init.zeros_(conv.scales)
    (layer,) = orepa.analyze(conv, 0).layers
    assert layer.norm == layer.change == 0 and len(layer.prunable) == 5 and "origin" not in layer.prunable
    json.dumps(layer.similarity, allow_nan=False)


def test_branches_that_cancel() -> None:
    conv = orepa.OREPAConv(1, 1, 3, bias=False, topology=three)
    with torch.no_grad():
        conv.b_weight.copy_(-conv.a_weight)
        conv.centre_weight.zero_()
    (layer,) = orepa.analyze(conv, math.inf).layers
    assert layer.norm == 0 and layer.branches[0].relative_norm is None and layer.change is None
    assert orepa.analyze(conv).prunable == {"": ("centre",)}


def test_the_model_stays_as_it_is_and_half_precision_is_measured_in_float64() -> None:
    conv = orepa.OREPAConv(6, 4, 3).to(torch.bfloat16)
    state, random = copy.deepcopy(conv.state_dict()), torch.get_rng_state()
    analysis = orepa.analyze(conv)
    assert analysis == orepa.analyze(copy.deepcopy(conv).double())
    assert all(torch.equal(state[name], tensor) for name, tensor in conv.state_dict().items())
    assert torch.equal(random, torch.get_rng_state()) and conv._cached is None


# --- models -----------------------------------------------------------------------------------------------------------------


def test_which_layers_of_a_model() -> None:
    model = nn.Sequential(
        orepa.OREPAConv(3, 4, 7),
        nn.Conv2d(4, 4, 3),
        orepa.RepVGGBlock(4, 4),
        orepa.OfflineConv(4, 4, 3),
    )
    layers = orepa.analyze(model, 0).layers
    names = ["0", "0.stack_block1", "0.stack_block2", "0.stack_block3", "2.dense"]
    assert [layer.name for layer in layers] == names
    assert [len(layer.branches) for layer in layers] == [1, 6, 6, 6, 5]
    assert [layer.layer for layer in layers][:2] == ["7x7 3->4", "3x3 3->4"]
    assert [bool(layer.prunable) for layer in layers] == [False] * 4 + [True], (
        "nested blocks have zeros too, but keep them"
    )
    assert orepa.analyze(nn.Conv2d(3, 4, 3)).layers == ()


def test_plain_data_and_a_table() -> None:
    analysis = orepa.analyze(nn.Sequential(orepa.OREPAConv(3, 4, 3), orepa.OREPAConv(4, 4, 1, topology="plain")))
    assert json.loads(json.dumps(analysis.as_dict(), allow_nan=False))["layers"][0]["prunable"] == ["prior"]
    header, first, second, summary = str(analysis).splitlines()
    assert header.split()[:2] == ["layer", "convolution"]
    assert first.startswith("0") and "3x3 3->4" in first and "prior 0" in first and first.endswith("  prior")
    assert second.endswith("origin 1")
    assert summary == "1 of 7 branches could go within a relative change of 0.001 per kernel"


@pytest.mark.parametrize("tolerance", [-1e-9, math.nan])
def test_bad_tolerances(tolerance: float) -> None:
    with pytest.raises(ValueError, match="tolerance must be a number from 0 on, got"):
        orepa.analyze(nn.Sequential(), tolerance)


def test_damaged_and_absent_parameters() -> None:
    model = nn.Sequential(orepa.OREPAConv(3, 4, 3))
    nn.init.constant_(model[0].avg_weight, math.nan)
    with pytest.raises(ValueError, match="0: the kernel of branch 'avg' is not finite"):
        orepa.analyze(model)
    with pytest.raises(ValueError, match="0 has parameters on the meta device"):
        orepa.analyze(model.to("meta"))


# --- the picture ------------------------------------------------------------------------------------------------------------


def nested_and_not(spec: ConvSpec) -> Topology:
    return Topology(stack=Branch(Nested(three, 3)), a=Branch(Conv(3)))


def test_the_layers_in_the_picture() -> None:
    pytest.importorskip("matplotlib")
    from orepa.analysis import plots

    def picked(model: nn.Module) -> list[str]:
        return [layer.name for layer in plots.pick(orepa.analyze(model).layers)]

    many = nn.Sequential(*(orepa.OREPAConv(2, 2, 1 if i % 2 else 3) for i in range(21)))
    assert picked(many) == ["0", "6", "14", "20"], "evenly spaced among those with the most branches"
    assert picked(nn.Sequential(orepa.OREPAConv(2, 2, 1, topology="plain"))) == []
    for model in (
        many,
        nn.Sequential(orepa.OREPAConv(2, 2, 1, topology="plain")),
        orepa.OREPAConv(2, 2, 3, topology=nested_and_not),
    ):
        image = plots.draw(orepa.analyze(model), "a title")
        assert image.startswith(b"\x89PNG") and len(image) > 10_000


# --- the command line -------------------------------------------------------------------------------------------------------


def refused(capsys: pytest.CaptureFixture[str], folder: Path, *arguments: object) -> str:
    """Run `orepa analyze`, which must fail, and write nothing; its one line of error."""
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    code = main(["analyze", *map(str, arguments)])
    captured = capsys.readouterr()
    assert code == 2 and captured.out == "" and len(captured.err.splitlines()) == 1
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()} == before
    return captured.err


def test_the_command(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from PIL import Image

    out = tmp_path / "new" / "folder"
    assert main(["analyze", str(checkpoint), "--out", str(out), "--tolerance", "0.05"]) == 0
    printed = capsys.readouterr().out
    assert sorted(path.name for path in out.iterdir()) == ["analysis.json", "analysis.png"]
    assert Image.open(out / "analysis.png").size[0] > 1000
    found = json.loads((out / "analysis.json").read_text())
    assert found["model"] == "test_resnet" and found["tolerance"] == 0.05
    names = [layer["name"] for layer in found["layers"]]
    assert "layer1.0.conv1" in names and all(name in printed for name in names)
    assert "within a relative change of 0.05 per kernel" in printed and f"written to {out}" in printed

    from orepa.train.files import load_checkpoint
    from orepa.train.model import from_checkpoint

    model = from_checkpoint(load_checkpoint(checkpoint))
    assert json.loads(json.dumps(orepa.analyze(model, 0.05).as_dict())) == {
        k: v for k, v in found.items() if k != "model"
    }
    pruned = orepa.report(orepa.prune_branches(model, 0.05)).select("pruned")
    assert [layer.name for layer in pruned] == [layer["name"] for layer in found["layers"] if layer["prunable"]]


def test_the_command_beside_the_checkpoint_and_again(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = tmp_path / "checkpoint.pt"
    mine.write_bytes(checkpoint.read_bytes())
    (tmp_path / "analysis.json").write_text("an older one")
    assert main(["analyze", str(mine)]) == 0
    assert json.loads((tmp_path / "analysis.json").read_text())["tolerance"] == 1e-3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["analysis.json", "analysis.png", "checkpoint.pt"]


def _damaged(content: dict[str, Any]) -> str:
    content["model"]["layer1.0.conv1.origin_weight"].fill_(math.nan)
    return "layer1.0.conv1: the kernel of branch 'origin' is not finite"


def _unknown_model(content: dict[str, Any]) -> str:
    content["model_spec"]["model"] = "resnet_from_the_future"
    return "timm has no model 'resnet_from_the_future'"


def _plain(content: dict[str, Any]) -> str:
    import timm

    content["config"]["orepa"] = False
    content["model"] = timm.create_model("test_resnet", **content["model_spec"]["model_kwargs"]).state_dict()
    return "has no OREPA block: test_resnet was trained without"


@pytest.mark.parametrize("change", [_damaged, _unknown_model, _plain])
def test_checkpoints_that_cannot_be_analysed(
    change: Any, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = torch.load(checkpoint, weights_only=True)
    message = change(content)
    torch.save(content, tmp_path / "changed.pt")
    assert message in refused(capsys, tmp_path, tmp_path / "changed.pt", "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_mistakes(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    missing = tmp_path / "missing.pt"
    assert f"cannot read the checkpoint {missing}: No such file" in refused(capsys, tmp_path, missing)
    (tmp_path / "file").write_text("precious")
    assert "cannot write to the folder" in refused(capsys, tmp_path, checkpoint, "--out", tmp_path / "file")
    (tmp_path / "out" / "analysis.png").mkdir(parents=True)
    assert "analysis.png: it is a folder" in refused(capsys, tmp_path, checkpoint, "--out", tmp_path / "out")
    with pytest.raises(SystemExit):
        main(["analyze", str(checkpoint), "--tolerance", "-1"])
    assert "--tolerance: must be a number from 0, got '-1'" in capsys.readouterr().err


def test_without_matplotlib(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from orepa import cli

    find = cli.importlib.util.find_spec
    monkeypatch.setattr(cli.importlib.util, "find_spec", lambda n: None if n == "matplotlib" else find(n))
    error = refused(capsys, tmp_path, tmp_path / "a.pt")
    assert "matplotlib" in error and 'pip install "orepa-kernels[train]"' in error
