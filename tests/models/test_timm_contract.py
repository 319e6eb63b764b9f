"""What timm asks of each of its models, asked of each kind of registered one, in a form with few channels."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from narrow_models import assert_close, images, narrow, settled
from official_checkpoints import synthetic
from torch import Tensor, nn

import orepa

timm = pytest.importorskip("timm", reason="timm is not installed (the [models] extra)")
from timm.data import resolve_data_config  # noqa: E402  # after the check for timm
from timm.models import FeatureInfo, get_notrace_functions, get_notrace_modules  # noqa: E402

from orepa import models  # noqa: E402

NAMES = [*models.MODELS, "wide_resnet18_2"]
#: with few channels and blocks, ResNet-34 is ResNet-18, ResNet-50 and -101 are ResNeXt-50 without groups, all OREPA-VGG one
KINDS = ["orepa_resnet18", "orepa_resnext50_32x4d", "orepa_wide_resnet18_2", "orepa_repvgg_a0"]
FEATURE_CLASSES = ("list", "dict", "hook", "getter", "fx")

every_kind = pytest.mark.parametrize("name", [*KINDS, "wide_resnet18_2"])
every_registered_kind = pytest.mark.parametrize("name", KINDS)


# --- the configuration ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_default_cfg_says_what_the_plain_models_does(name: str) -> None:
    model = narrow(name)
    cfg, state = model.default_cfg, model.state_dict()
    plain = timm.get_pretrained_cfg("resnet18").to_dict()
    of_the_weights = {
        "url",
        "hf_hub_id",
        "tag",
        "license",
        "test_input_size",
        "test_crop_pct",
        "origin_url",
        "paper_ids",
    }
    assert plain.keys() - of_the_weights <= {key for key, value in cfg.items() if value is not None}
    assert cfg is model.pretrained_cfg and cfg["num_classes"] == model.num_classes == 1000
    assert state[cfg["classifier"] + ".weight"].shape == (1000, model.num_features)
    first = (cfg["first_conv"],) if isinstance(cfg["first_conv"], str) else cfg["first_conv"]
    assert all(state[f"{conv}.weight"].shape[1] == cfg["input_size"][0] for conv in first)
    features = model.forward_features(torch.zeros(1, *cfg["input_size"]))
    assert features.shape == (1, model.num_features, *cfg["pool_size"])
    data = resolve_data_config(model=model)
    assert all(data[key] == cfg[key] for key in ("input_size", "interpolation", "crop_pct", "mean", "std"))


# --- forward, backward, heads -----------------------------------------------------------------------------------------------


@every_kind
@torch.no_grad()
def test_forward_is_its_two_halves(name: str) -> None:
    model = settled(narrow(name, num_classes=7))
    x = images()
    expected = model(x)
    assert expected.shape == (2, 7) and expected.isfinite().all()
    features = model.forward_features(x)
    assert features.shape == (2, model.num_features, 2, 2)
    assert torch.equal(model.forward_head(features), expected)
    hidden = model.forward_head(features, pre_logits=True)
    assert hidden.shape == (2, model.head_hidden_size)
    assert_close(model.get_classifier()(hidden), expected)


@every_kind
def test_every_parameter_gets_a_gradient_with_and_without_activation_checkpoints(name: str) -> None:
    model = narrow(name, num_classes=7)
    twin = copy.deepcopy(model)
    twin.set_grad_checkpointing()
    for each in (model, twin):
        each(images()).square().mean().backward()
        assert not [key for key, p in each.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    theirs = dict(twin.named_parameters())
    for key, parameter in model.named_parameters():
        assert (parameter.grad - theirs[key].grad).norm() <= 1e-4 * parameter.grad.norm() + 1e-12, key


@every_kind
@torch.no_grad()
def test_heads(name: str) -> None:
    model = narrow(name)
    pooled, unpooled = (2, model.num_features), (2, model.num_features, 2, 2)
    assert isinstance(model.get_classifier(), nn.Linear)
    model.reset_classifier(0)
    assert model(images()).shape == pooled and model.num_classes == 0
    model.reset_classifier(0, "")
    assert model(images()).shape == unpooled
    model.reset_classifier(5, "max")
    assert model(images()).shape == (2, 5) and model.num_classes == 5
    assert narrow(name, num_classes=0)(images()).shape == pooled
    assert narrow(name, num_classes=0, global_pool="")(images()).shape == unpooled


@pytest.mark.parametrize("name", [name for name in KINDS if "repvgg" not in name])
def test_regularization(name: str) -> None:
    model = narrow(name, drop_rate=0.2, drop_path_rate=0.3, drop_block_rate=0.1)
    assert model.drop_rate == 0.2
    assert max(getattr(module, "drop_prob", None) or 0 for module in model.modules()) == pytest.approx(0.3)
    assert model(images()).shape == (2, 1000)
    blocks = [sum(isinstance(m, orepa.OREPAConv) for m in each.modules()) for each in (model, narrow(name))]
    assert blocks[0] == blocks[1]


# --- features ---------------------------------------------------------------------------------------------------------------


@every_kind
@torch.no_grad()
def test_intermediates(name: str) -> None:
    model = settled(narrow(name, num_classes=7))
    info = FeatureInfo(model.feature_info, len(model.feature_info))
    final, features = model.forward_intermediates(images())
    assert_close(final, model.forward_features(images()))
    assert [feature.shape[1] for feature in features] == info.channels()
    assert [64 // feature.shape[2] for feature in features] == info.reduction() == [2, 4, 8, 16, 32]
    assert all(feature.isfinite().all() for feature in features)
    some = model.forward_intermediates(images(), indices=(1, -1), intermediates_only=True)
    assert all(torch.equal(got, features[index]) for got, index in zip(some, (1, -1), strict=True))
    model.set_grad_checkpointing()
    assert_close(model.forward_intermediates(images())[0], final)


@every_kind
@torch.no_grad()
def test_every_feature_extractor_gives_the_same(name: str) -> None:
    pytest.importorskip("torchvision", reason="timm's fx features need torchvision")
    reference: list[Tensor] = []
    for kind in FEATURE_CLASSES:
        torch.manual_seed(0)
        model = narrow(name, features_only=True, feature_cls=kind, out_indices=(1, 2, 4)).eval()
        features = model(images())
        features = list(features.values()) if isinstance(features, dict) else features
        assert [feature.shape[1] for feature in features] == model.feature_info.channels()
        assert [64 // feature.shape[2] for feature in features] == model.feature_info.reduction() == [4, 8, 32]
        assert all(torch.equal(got, expected) for got, expected in zip(features, reference or features, strict=True))
        reference = features


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *((name, "fx") for name in KINDS),
        *(("orepa_resnet18", kind) for kind in ("list", "dict", "hook", "getter")),
        *(("orepa_repvgg_a0", kind) for kind in ("list", "hook")),
    ],
)
@torch.no_grad()
def test_feature_extractors_are_converted(name: str, kind: str) -> None:
    if kind == "fx":
        pytest.importorskip("torchvision", reason="timm's fx features need torchvision")
    model = settled(narrow(name, features_only=True, feature_cls=kind))
    if kind == "hook" and "repvgg" in name:
        with pytest.raises(orepa.ConversionError, match="stem: it has forward hooks"):
            orepa.convert(model)
        return
    plain = orepa.convert(model, example_inputs=images())
    assert not any(isinstance(module, orepa.OREPAConv | orepa.RepVGGBlock) for module in plain.modules())
    got, expected = (list(m(images()).values()) if kind == "dict" else m(images()) for m in (plain, model))
    assert len(got) == 5
    for one, other in zip(got, expected, strict=True):
        assert_close(one, other)


# --- graphs: TorchScript and fx -----------------------------------------------------------------------------------------------


@every_registered_kind
def test_only_what_is_converted_is_scripted(name: str) -> None:
    model = narrow(name)
    model.reset_classifier(7, "max")
    with pytest.raises(Exception, match="convert") as refused:
        torch.jit.script(model)
    assert len(str(refused.value).strip().splitlines()) == 1
    plain = orepa.convert(settled(model))
    for each in (plain, torch.fx.symbolic_trace(plain)):
        assert_close(torch.jit.script(each)(images()), model(images()))


def test_the_wide_plain_network_is_scripted() -> None:
    model = narrow("wide_resnet18_2").eval()
    assert_close(torch.jit.script(model)(images()), model(images()))


@every_registered_kind
def test_a_graph_trains_and_is_converted(name: str) -> None:
    extraction = pytest.importorskip("torchvision.models.feature_extraction")
    options = {"leaf_modules": get_notrace_modules(), "autowrap_functions": get_notrace_functions()}
    model = narrow(name, num_classes=7)
    nodes, _ = extraction.get_graph_node_names(model, tracer_kwargs=options)
    graph = extraction.create_feature_extractor(model, nodes[-1:], tracer_kwargs=options)
    graph.train()(images())[nodes[-1]].square().mean().backward()
    used = dict(graph.named_parameters())
    assert len(used) == len(list(model.parameters())) and all(p.grad is not None for p in used.values())
    with torch.no_grad():
        expected = settled(graph)(images())[nodes[-1]]
        assert_close(model.eval()(images()), expected)  # they share parameters and statistics
        assert_close(orepa.convert(graph, example_inputs=images())(images())[nodes[-1]], expected)


# --- other input channels ---------------------------------------------------------------------------------------------------


@every_kind
def test_other_input_channels(name: str) -> None:
    model = narrow(name, in_chans=1, num_classes=7)
    model(images(1)).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    overlaid = narrow(name, pretrained_cfg_overlay={"input_size": (4, 64, 64)})
    assert overlaid(images(4)).shape == (2, 1000)
    assert overlaid.default_cfg["input_size"] == (4, 64, 64)


def pretrained_from(path: Path, **overlay: Any) -> dict[str, Any]:
    return {"pretrained": True, "pretrained_cfg_overlay": {"file": str(path), **overlay}}


@pytest.mark.parametrize(("name", "in_chans"), [*((name, 1) for name in KINDS), ("orepa_resnet18", 4)])
def test_a_checkpoint_of_other_input_channels_is_refused(name: str, in_chans: int, tmp_path: Path) -> None:
    torch.save(narrow(name).state_dict(), tmp_path / "rgb.pt")
    first = r"(conv1|stem)[\w.]*\.origin_weight"
    with pytest.raises(
        ValueError, match=rf"'{first}' is .* 3, \d, \d\] in the checkpoint, .* Use in_chans=3"
    ) as refused:
        narrow(name, in_chans=in_chans, **pretrained_from(tmp_path / "rgb.pt"))
    assert len(str(refused.value).splitlines()) == 1


def test_the_authors_checkpoints_of_other_input_channels_are_refused(tmp_path: Path) -> None:
    torch.save(synthetic("RepVGG-A0"), tmp_path / "theirs.pth")
    with pytest.raises(
        ValueError, match=r"'stem.dense.origin_weight' is \[48, 3, 3, 3\] in the checkpoint, \[48, 1, 3, 3"
    ):
        timm.create_model("orepa_repvgg_a0", in_chans=1, **pretrained_from(tmp_path / "theirs.pth"))


@torch.no_grad()
def test_the_ways_out_for_gray_images(tmp_path: Path) -> None:
    """Three equal channels; or the converted network, which timm adapts, prepared from its weights."""
    model = settled(narrow("orepa_resnet18"))
    gray = images(1)
    expected = model(gray.expand(-1, 3, -1, -1))
    torch.save(orepa.convert(model, fold_bn=False).state_dict(), tmp_path / "plain.pt")
    plain = narrow("resnet18", in_chans=1, **pretrained_from(tmp_path / "plain.pt")).eval()
    assert_close(plain(gray), expected)
    again = orepa.prepare(plain, preserve=True)
    assert again.conv1.in_channels == 1
    assert_close(again(gray), expected)


@pytest.mark.parametrize("name", ["orepa_resnet18", "orepa_repvgg_a0", "wide_resnet18_2"])
def test_a_checkpoint_of_the_same_input_channels(name: str, tmp_path: Path) -> None:
    state = narrow(name, in_chans=1, num_classes=7).state_dict()
    torch.save(state, tmp_path / "gray.pt")
    overlay = {"input_size": (1, 64, 64), "num_classes": 7}
    loaded = narrow(name, **pretrained_from(tmp_path / "gray.pt", **overlay)).state_dict()
    assert loaded.keys() == state.keys() and all(torch.equal(value, loaded[key]) for key, value in state.items())


def test_timm_adapts_the_plain_network(tmp_path: Path) -> None:
    state = narrow("wide_resnet18_2").state_dict()
    torch.save(state, tmp_path / "rgb.pt")
    gray = narrow("wide_resnet18_2", in_chans=1, num_classes=7, **pretrained_from(tmp_path / "rgb.pt"))
    assert_close(gray.conv1.weight, state["conv1.weight"].sum(1, keepdim=True))
