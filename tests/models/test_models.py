"""The models registered with timm: the authors' sizes, timm's features, one policy."""

from __future__ import annotations

import copy
import functools
import subprocess
import sys
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import orepa
from orepa.module_info import count_parameters

timm = pytest.importorskip("timm", reason="timm is not installed (the [models] extra)")
from orepa import models  # noqa: E402  # after the check for timm

# (in training, deployed). Theirs, but for the sixth row of the vectors of OREPA-VGG blocks with an identity, which nothing
# reads: with it, RepVGG-A0/A1/A2 have 2,832, 3,776 and 5,664 more. Deployed: one convolution with a bias for each block.
PARAMETERS = {
    "orepa_resnet18": (37_756_041, 11_684_712),
    "orepa_resnet34": (71_722_121, 21_789_160),
    "orepa_resnet50": (68_579_977, 25_530_472),
    "orepa_resnet101": (122_492_553, 44_496_488),
    "orepa_wide_resnet18_2": (149_410_889, 45_683_432),
    "orepa_resnext50_32x4d": (63_711_625, 24_994_792),
    "orepa_repvgg_a0": (24_751_305, 8_309_384),
    "orepa_repvgg_a1": (39_709_129, 12_789_864),
    "orepa_repvgg_a2": (81_787_209, 25_499_944),
}
NAMES = list(PARAMETERS)


def on_meta(name: str, **arguments: Any) -> nn.Module:
    with torch.device("meta"):
        return timm.create_model(name, backend="reference", **arguments)


@functools.cache
def report_of(name: str) -> Any:
    return orepa.report(on_meta(name))


# --- sizes ----------------------------------------------------------------------------------------------------------------


def test_all_are_registered() -> None:
    assert set(timm.list_models("orepa_*")) == set(NAMES) == set(models.MODELS)
    assert timm.is_model("wide_resnet18_2")


@pytest.mark.parametrize("name", NAMES)
def test_parameter_counts_are_the_authors(name: str) -> None:
    assert models.parameter_counts(name) == PARAMETERS[name]
    assert report_of(name).parameters[1] == PARAMETERS[name][0]


def repvgg_parameters(widths: list[int], classes: int = 1000) -> int:
    """Counted from the description of the block: stem and stages of 2, 4, 14 and 1 blocks at ``widths``."""
    total, i = 0, 3
    for width, depth in zip(widths, (1, 2, 4, 14, 1), strict=True):
        for block in range(depth):
            o, identity = width, block > 0
            kxk = 9 * o * i + 2 * o * i + (i * i + 9 * o * i) + (9 * 8 * i + 8 * o * i) + 5 * o
            total += kxk + o * i + 2 * o * (3 if identity else 2)
            i = o
    return total + i * classes + classes


@pytest.mark.parametrize(
    ("name", "widths"),
    [
        ("orepa_repvgg_a0", [48, 48, 96, 192, 1280]),
        ("orepa_repvgg_a1", [64, 64, 128, 256, 1280]),
        ("orepa_repvgg_a2", [64, 96, 192, 384, 1408]),
    ],
)
def test_repvgg_counts_follow_from_the_description(name: str, widths: list[int]) -> None:
    assert repvgg_parameters(widths) == PARAMETERS[name][0]


@pytest.mark.parametrize("name", ["orepa_resnet18", "orepa_repvgg_a0"])
def test_the_deployed_count_is_that_of_convert(name: str) -> None:
    model = timm.create_model(name).eval()
    x = torch.randn(2, 3, 32, 32)
    plain = orepa.convert(model, example_inputs=x)
    assert count_parameters(plain) == PARAMETERS[name][1]
    assert not any(isinstance(m, orepa.OREPAConv | nn.BatchNorm2d) for m in plain.modules())


# --- which block goes where -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_the_policy(name: str) -> None:
    layers = report_of(name).layers
    if "repvgg" in name:
        assert len(layers) == 22 and {layer.detail for layer in layers} == {"RepVGGBlock, repvgg_dense"}
        return
    kept = ("18" in name or "34" in name) * ["downsample"]
    for layer in layers:
        if any(part in layer.name for part in kept):
            assert (layer.action, layer.layer[:3]) == ("left", "1x1")
        else:
            expected = {"7x7": "deep_stem", "3x3": "orepa", "1x1": "rep1x1"}[layer.layer[:3]]
            assert (layer.action, layer.detail) == ("swapped", expected), layer
    assert sum(layer.detail == "deep_stem" for layer in layers) == 1


def test_residual_branches_start_as_the_authors_do() -> None:
    norms = [m for m in timm.create_model("orepa_resnet18").modules() if isinstance(m, nn.BatchNorm2d)]
    assert all(torch.equal(norm.weight, torch.ones_like(norm.weight)) for norm in norms)
    zeroed = timm.create_model("orepa_resnet18", zero_init_last=True)
    assert not zeroed.layer1[0].bn2.weight.any()


def test_keywords_reach_the_blocks() -> None:
    model = on_meta("orepa_resnet18", topology="dbb", scaling="scalar")
    assert model.layer1[0].conv1.topology == "dbb" and model.layer1[0].conv1.scaling == "scalar"
    assert model.layer1[0].conv1.backend == "reference"
    assert type(model.layer2[0].downsample[0]) is nn.Conv2d
    block = on_meta("orepa_repvgg_a0", topology="orepa", scaling="none").stem
    assert (block.dense.topology, block.dense.scaling, block.dense.backend) == ("orepa", "none", "reference")


@pytest.mark.parametrize("name", ["orepa_resnet18", "orepa_repvgg_a0"])
@pytest.mark.parametrize("keyword", ["topology", "scaling", "backend"])
def test_unknown_keywords_are_refused(name: str, keyword: str) -> None:
    with torch.device("meta"), pytest.raises(ValueError, match="'nonsense'"):
        timm.create_model(name, **{keyword: "nonsense"})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"drop_path_rate": 0.1}, r"stages.0.1: OREPA-VGG blocks take no drop_path_rate"),
        ({"drop_block_rate": 0.1}, "OREPA-VGG blocks take no drop_block_rate"),
        ({"attn_layer": "se"}, "OREPA-VGG blocks take no attn_layer"),
        ({"block_kwargs": {"inference_mode": True}}, "built for inference"),
        ({"norm_layer": "layernorm2d"}, "batch norms only, not LayerNormAct2d"),
    ],
)
def test_what_an_orepa_vgg_block_cannot_hold(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        on_meta("orepa_repvgg_a0", **arguments)


# --- timm's features --------------------------------------------------------------------------------------------------------

WIDTHS = {"orepa_resnet18": 64, "orepa_resnet34": 64, "orepa_wide_resnet18_2": 128}


@settings(max_examples=5)
@given(
    st.sampled_from(NAMES),
    st.sampled_from([8, 16, 32]),
    st.integers(1, 5),
    st.integers(1, 20),
    st.sampled_from([64, 96]),
)
def test_create_model_arguments(name: str, output_stride: int, in_chans: int, num_classes: int, side: int) -> None:
    """As for timm's plain model, whose sizes the features also have."""
    arguments = {"output_stride": output_stride, "in_chans": in_chans}
    x = torch.zeros(2, in_chans, side, side, device="meta")
    model = on_meta(name, num_classes=num_classes, **arguments)
    assert model(x).shape == (2, num_classes)
    features = on_meta(name, features_only=True, **arguments)
    with torch.device("meta"):
        plain = timm.create_model(models.MODELS[name].plain, features_only=True, **arguments)
    outputs = features(x)
    assert [f.shape for f in outputs] == [f.shape for f in plain(x)]
    assert [f.shape[1] for f in outputs] == features.feature_info.channels()
    assert [side // f.shape[2] for f in outputs] == features.feature_info.reduction() == plain.feature_info.reduction()


@pytest.mark.parametrize("name", ["orepa_resnet18", "orepa_repvgg_a0"])
@pytest.mark.parametrize("feature_cls", ["hook", "getter", "fx"])
def test_other_feature_extractors(name: str, feature_cls: str) -> None:
    if feature_cls == "fx":
        pytest.importorskip("torchvision", reason="timm's fx features need torchvision")
    features = on_meta(name, features_only=True, feature_cls=feature_cls, out_indices=(1, 3))
    x = torch.zeros(1, 3, 64, 64, device="meta")
    channels = [64, 256] if "resnet" in name else [48, 192]
    assert [f.shape[1] for f in features(x)] == channels


def test_pretrained_cfg() -> None:
    model = on_meta("orepa_resnet50")
    cfg = model.pretrained_cfg
    assert (cfg["architecture"], cfg["num_classes"], cfg["classifier"]) == ("orepa_resnet50", 1000, "fc")
    assert (cfg["interpolation"], cfg["crop_pct"], tuple(cfg["input_size"])) == ("bilinear", 0.875, (3, 224, 224))
    overlaid = on_meta("orepa_resnet50", pretrained_cfg_overlay={"num_classes": 7, "crop_pct": 0.9})
    assert overlaid.num_classes == 7 and overlaid.pretrained_cfg["crop_pct"] == 0.9
    assert on_meta("orepa_repvgg_a0").pretrained_cfg["classifier"] == "head.fc"


@pytest.mark.parametrize("name", ["orepa_resnet18", "orepa_repvgg_a0", "wide_resnet18_2"])
def test_there_is_nothing_to_download(name: str) -> None:
    with pytest.raises(RuntimeError, match=rf"{name}: there are no weights.*https://.*orepa.load_official"):
        timm.create_model(name, pretrained=True)


def test_a_state_dict_of_its_own_can_be_pretrained(tmp_path: Any) -> None:
    model = timm.create_model("orepa_repvgg_a0", num_classes=4)
    path = tmp_path / "mine.pt"
    torch.save(model.state_dict(), path)
    twin = timm.create_model(
        "orepa_repvgg_a0", pretrained=True, pretrained_cfg_overlay={"file": str(path), "num_classes": 4}
    )
    assert all(torch.equal(value, twin.state_dict()[key]) for key, value in model.state_dict().items())


# --- the wide network -------------------------------------------------------------------------------------------------------


def test_the_wide_network_is_wide_everywhere() -> None:
    with torch.device("meta"):
        model = timm.create_model("wide_resnet18_2")
    narrow = timm.create_model("resnet18")
    theirs, ours = dict(narrow.named_parameters()), dict(model.named_parameters())
    assert theirs.keys() == ours.keys()
    for key, value in ours.items():
        expected = [2 * n for n in theirs[key].shape[:2]] + list(theirs[key].shape[2:])
        if key == "conv1.weight":
            expected[1] = 3
        if key.startswith("fc."):
            expected[0] //= 2
        assert list(value.shape) == expected, key


# --- the plain network ------------------------------------------------------------------------------------------------------


def test_converted_weights_fit_the_plain_network() -> None:
    model = timm.create_model("orepa_resnet18", num_classes=5).eval()
    x = torch.randn(2, 3, 32, 32)
    plain = timm.create_model("resnet18", num_classes=5).eval()
    plain.load_state_dict(orepa.convert(model, fold_bn=False).state_dict())
    with torch.no_grad():
        expected = model(x)
        assert (plain(x) - expected).norm() < 1e-5 * expected.norm()


def test_a_model_trains_and_is_copied() -> None:
    model = timm.create_model("orepa_repvgg_a0", num_classes=3)
    twin = copy.deepcopy(model)
    x = torch.randn(2, 3, 32, 32)
    nn.functional.cross_entropy(model(x), torch.tensor([0, 2])).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert torch.equal(model(x), twin(x))
    assert str(orepa.report(twin)) == str(orepa.report(model))


def test_without_timm_only_the_models_are_missing() -> None:
    code = """
import sys
sys.modules["timm"] = None
import orepa
for use in (lambda: __import__("orepa.models"), lambda: orepa.load_official({}, "orepa_resnet18")):
    try:
        use()
    except ImportError as error:
        print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    lines = done.stdout.splitlines()
    assert len(lines) == 2
    assert all('orepa.models needs timm: pip install "orepa-kernels[models]"' in line for line in lines)
