"""The examples do what they say, on small generated images, and `parameter_groups` which they use."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

import orepa
from orepa import OREPAConv, parameter_groups

ROOT = Path(__file__).resolve().parent.parent
SMALL = ("--size", "64", "--steps", "10", "--batch", "2")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # such small tensors gain nothing from more, and wait for them on a busy machine
    yield
    torch.set_num_threads(threads)


def example(name: str, *needs: str) -> ModuleType:
    """Import an example as a module; skip where what it needs is missing, or broken by another torch than its own."""
    for package in needs:
        try:
            importlib.import_module(package)
        except (ImportError, RuntimeError, AttributeError) as error:
            pytest.skip(f"the example needs {package}: {error!r}")
    spec = importlib.util.spec_from_file_location(f"examples_{name}", ROOT / "examples" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# --- downstream (paper, Table 5) --------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("model", ["fasterrcnn", "retinanet"])
def test_detection(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    detection = example("detection", "timm", "torchvision.models.detection")
    out = tmp_path / "backbone.pt2"
    result = detection.main(["--model", model, "--backbone", "orepa_resnet18", *SMALL, "--out", str(out)])
    assert result["last"] < 0.9 * result["first"]
    assert 0 < result["error"] < 1e-4
    # Rounding can move a box over a threshold; one in ten is what that may cost.
    assert result["total"] >= 10 and result["equal"] >= 0.9 * result["total"]
    assert result["export_difference"] < 1e-4
    assert "convert: 17 converted, 3 folded" in capsys.readouterr().out
    operators = {str(node.target) for node in torch.export.load(out).graph.nodes}
    assert any("conv2d" in name for name in operators) and not any("batch_norm" in name for name in operators)


@pytest.mark.slow
@pytest.mark.parametrize("model", ["pspnet", "deeplabv3plus"])
def test_segmentation(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    segmentation = example("segmentation", "timm", "segmentation_models_pytorch")
    out = tmp_path / "encoder.pt2"
    result = segmentation.main(["--model", model, "--encoder", "orepa_resnet18", *SMALL, "--out", str(out)])
    assert result["last"] < 0.8 * result["first"]
    assert 0 < result["error"] < 1e-4
    assert result["changed"] <= 4, "of 8192 pixels; rounding may decide a tie"
    assert result["export_difference"] < 1e-4
    assert "deep_stem + encoder.model.bn1" in capsys.readouterr().out
    assert not any("batch_norm" in str(node.target) for node in torch.export.load(out).graph.nodes)


def test_segmentation_with_orepa_blocks_everywhere() -> None:
    segmentation = example("segmentation", "timm", "segmentation_models_pytorch")
    paper, everywhere = (segmentation.build("pspnet", "orepa_resnet18", everywhere=choice) for choice in (False, True))
    assert not any(isinstance(module, OREPAConv) for module in paper.decoder.modules())
    assert sum(isinstance(module, OREPAConv) for module in everywhere.decoder.modules()) == 4
    assert everywhere(torch.randn(2, 3, 64, 64)).shape == (2, 3, 64, 64)


def test_an_example_starts_from_a_checkpoint(tmp_path: Path) -> None:
    detection = example("detection", "timm", "torchvision.models.detection")
    import timm

    state = timm.create_model("orepa_resnet18").state_dict()
    torch.save(state, tmp_path / "resnet18.pt")
    body = detection.build("fasterrcnn", "orepa_resnet18", 64, str(tmp_path / "resnet18.pt")).backbone.body
    got = dict(body.named_parameters())
    assert len(got) > 100 and all(torch.equal(got[name], state[name]) for name in got)


def test_the_comparison_of_detections_can_fail() -> None:
    detection = example("detection", "timm", "torchvision.models.detection")
    torch.manual_seed(0)
    found = {"boxes": 50 * torch.rand(6, 4), "labels": torch.ones(6, dtype=torch.long), "scores": torch.rand(6)}
    turned = {key: value.flip(0) for key, value in found.items()}
    assert detection.count_equal([found], [turned]) == (6, 6)
    for key, change in (("boxes", 0.1), ("labels", 1), ("scores", 0.01)):
        other = {**found, key: found[key].clone()}
        other[key][2] += change
        assert detection.count_equal([found], [other]) == (5, 6)
    assert detection.count_equal([found], [{key: value[:4] for key, value in found.items()}]) == (4, 6)


# --- super-resolution -----------------------------------------------------------------------------------------------------


def test_super_resolution(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    super_resolution = example("super_resolution", "skimage", "onnx", "onnxscript", "onnxruntime")
    options = ["--steps", "60", "--width", "8", "--depth", "2", "--crop", "32", "--batch", "8"]
    result = super_resolution.main([*options, "--out", str(tmp_path / "sr.onnx")])
    assert result["swapped"] == 3
    assert abs(result["after"] - result["before"]) < 0.01
    assert result["before"] > result["bicubic"] - 0.5 > 25, "the shortcut is the bicubic picture"
    assert result["export_difference"] < 1e-5
    assert "ecb (no norm follows)" in capsys.readouterr().out


# --- parameter_groups -------------------------------------------------------------------------------------------------------


class Net(nn.Module):
    """A deep stem with its norm, one more block, a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = OREPAConv(3, 8, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.body = nn.Sequential(OREPAConv(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8))
        self.fc = nn.Linear(8, 4)


def by_name(model: nn.Module, **options: object) -> dict[str, tuple[float, float]]:
    """Learning rate and weight decay of every parameter, each of which must be in one group at most."""
    groups = parameter_groups(model, 0.1, **options)  # type: ignore[arg-type]
    assert all(group["params"] for group in groups)
    torch.optim.SGD(groups, momentum=0.9)  # which refuses duplicates
    found = {id(p): (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    return {name: found[id(p)] for name, p in model.named_parameters() if id(p) in found}


def test_every_parameter_has_its_rate_and_decay() -> None:
    model = Net()
    found = by_name(model, weight_decay=0.01, stem_lr_scale=0.5)
    assert found.keys() == dict(model.named_parameters()).keys()
    for name, (lr, decay) in found.items():
        assert lr == (0.05 if name.startswith("conv1.") else 0.1), name
        spared = name.endswith((".bias", ".scales")) or name in ("bn1.weight", "body.1.weight")
        assert decay == (0 if spared else 0.01), name
    assert sum(name.endswith(".scales") for name in found) == 4, "three stages of the stem, one block"


def test_scalings_may_decay_and_frozen_parameters_are_left_out() -> None:
    model = Net()
    model.body.requires_grad_(False)
    found = by_name(model, decay_scales=True)
    assert not any(name.startswith("body.") for name in found)
    assert {decay for name, (_, decay) in found.items() if name.endswith(".scales")} == {1e-4}
    assert {lr for lr, _ in found.values()} == {0.1}
    names = [group["name"] for group in parameter_groups(model, 0.1)]
    assert names == ["model, no decay", "model", "stem, no decay", "stem"]


def test_the_stem_by_name() -> None:
    found = by_name(Net(), stem=["conv1", "bn*"], stem_lr_scale=0.1)
    assert {name.split(".")[0] for name, (lr, _) in found.items() if lr < 0.1} == {"conv1", "bn1"}
    assert {lr for lr, _ in by_name(nn.Linear(2, 2)).values()} == {0.1}, "no stem, none asked for"


def test_a_stem_that_is_not_there() -> None:
    with pytest.raises(ValueError, match="no convolution has one of the topologies"):
        parameter_groups(nn.Linear(2, 2), 0.1, stem_lr_scale=0.1)
    with pytest.raises(ValueError, match="no module matches stem"):
        parameter_groups(Net(), 0.1, stem="stem*")
    with pytest.raises(ValueError, match="stem_lr_scale must be at least 0, got -1"):
        parameter_groups(Net(), 0.1, stem_lr_scale=-1)


def test_the_same_decay_as_timm_gives() -> None:
    """Whose groups `orepa train` uses, with the branch scalings spared."""
    optim = pytest.importorskip("timm.optim", reason="timm is not installed (the [models] extra)")
    model = orepa.prepare(Net())
    spared, decayed = optim.param_groups_weight_decay(
        model, 1e-4, no_weight_decay_list=orepa.optim.without_weight_decay(model)
    )
    mine = parameter_groups(model, 0.1)
    for decay, theirs in ((0, spared), (1e-4, decayed)):
        own = {id(p) for group in mine if group["weight_decay"] == decay for p in group["params"]}
        assert own == {id(p) for p in theirs["params"]}
