"""segmentation_models_pytorch: what it asks of an encoder, asked of prepared and of registered ones."""

from __future__ import annotations

import copy
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from narrow_models import assert_close, images
from torch import Tensor, nn

import orepa

smp = pytest.importorskip("segmentation_models_pytorch", reason="segmentation_models_pytorch is not installed")
pytest.importorskip("timm", reason="timm is not installed (the [models] extra)")
import orepa.models  # noqa: E402  # registers the models; after the check for timm

FEW: dict[str, dict[str, Any]] = {
    "resnet18": {},
    "tu-orepa_resnet18": {"channels": (16, 16, 32, 32)},
    "tu-orepa_repvgg_a0": {"width_factor": 0.25},
}
every_encoder = pytest.mark.parametrize("name", FEW)


def encoder(name: str, **arguments: Any) -> nn.Module:
    """Return an encoder with OREPA blocks: smp's own, prepared, or one of the registered models."""
    built = smp.encoders.get_encoder(name, weights=None, **FEW[name], **arguments)
    return built if "orepa" in name else orepa.prepare(built)


def unet(name: str) -> nn.Module:
    """Return a prepared network with a short encoder, and with blocks in its decoder."""
    arguments = {"encoder_depth": 3, "decoder_channels": (16, 8, 8), "classes": 2}
    return orepa.prepare(smp.Unet(name, encoder_weights=None, **FEW[name], **arguments))


def script(model: nn.Module) -> nn.Module:
    """Script with torch's own `torch.empty`, which smp's encoder calls: tests/conftest.py puts a wrapper in its place."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "empty", inspect.unwrap(torch.empty))
        return torch.jit.script(model)


def assert_all_close(got: list[Tensor], expected: list[Tensor]) -> None:
    for one, other in zip(got, expected, strict=True):
        assert_close(one, other)


# --- the contract -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "depth", "in_channels"),
    [
        *(("resnet18", depth, in_channels) for depth, in_channels in ((3, 3), (4, 1))),
        *(("tu-orepa_resnet18", depth, in_channels) for depth, in_channels in ((4, 1), (5, 4))),
        *(("tu-orepa_repvgg_a0", depth, in_channels) for depth, in_channels in ((3, 3), (5, 1))),
    ],
)
def test_features_have_the_promised_sizes(name: str, depth: int, in_channels: int) -> None:
    body = encoder(name, depth=depth, in_channels=in_channels)
    assert any(isinstance(module, orepa.OREPAConv) for module in body.modules())
    features = body(images(in_channels))
    strides = [1, 2, 4, 8, 16, 32][: depth + 1]
    assert (
        [64 // feature.shape[2] for feature in features] == [64 // feature.shape[3] for feature in features] == strides
    )
    assert [feature.shape[1] for feature in features] == list(body.out_channels) and features[0].shape[1] == in_channels
    assert body.output_stride == strides[-1]
    features[-1].square().mean().backward()
    ungraded = {key for key, parameter in body.named_parameters() if parameter.grad is None}
    assert all(key.startswith(("layer3", "layer4")) for key in ungraded) and (depth < 5 or not ungraded)


@pytest.mark.parametrize(
    ("name", "stride"),
    [("resnet18", 8), ("tu-orepa_resnet18", 8), ("tu-orepa_resnet18", 16), ("tu-orepa_repvgg_a0", 8)],
)
def test_dilated_encoders(name: str, stride: int) -> None:
    body = encoder(name, output_stride=stride)
    features = body(images())
    assert [64 // feature.shape[2] for feature in features] == [min(each, stride) for each in (1, 2, 4, 8, 16, 32)]
    if stride == 8:
        assert any(isinstance(m, orepa.OREPAConv) and m.dilation != (1, 1) for m in body.modules())


def test_changes_by_hand_come_before_prepare_or_after_convert() -> None:
    """`make_dilated` and `set_in_channels` look for `nn.Conv2d`."""
    body = smp.encoders.get_encoder("resnet18", weights=None, depth=4)
    body.make_dilated(8)
    body.set_in_channels(1)
    prepared = orepa.prepare(body, preserve=True).eval()
    assert [64 // feature.shape[2] for feature in prepared(images(1))] == [1, 2, 4, 8, 8]
    assert_all_close(prepared(images(1)), body.eval()(images(1)))

    short = encoder("resnet18", depth=3).eval()
    plain = orepa.convert(short)
    plain.set_in_channels(1)
    gray = images(1)
    assert_all_close(plain(gray)[1:], short(gray.expand(-1, 3, -1, -1))[1:])


# --- graphs -----------------------------------------------------------------------------------------------------------------


@every_encoder
def test_prepared_encoders_are_exported(name: str) -> None:
    body = encoder(name, depth=3).eval()
    exported = torch.export.export(body, (images(),), strict=False).module()
    with torch.no_grad():
        assert_all_close(exported(images()), body(images()))


@every_encoder
def test_only_converted_encoders_are_scripted(name: str) -> None:
    body = encoder(name, depth=3).eval()
    with pytest.raises(Exception, match="convert"):
        script(body)
    with torch.no_grad():
        expected = body(images())
        scripted = script(orepa.convert(body, example_inputs=images()))
        assert_all_close(scripted(images()), expected)


# --- whole networks ---------------------------------------------------------------------------------------------------------


@every_encoder
def test_a_network_trains_and_is_deployed(name: str) -> None:
    network = unet(name)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05)
    before = copy.deepcopy(network.state_dict())
    target = (images()[:, 0] > 0).long()
    nn.functional.cross_entropy(network.train()(images()), target).backward()
    optimizer.step()
    after = network.state_dict()
    assert any("decoder" in key and not torch.equal(value, after[key]) for key, value in before.items())
    assert any("encoder" in key and not torch.equal(value, after[key]) for key, value in before.items())
    with torch.no_grad():
        expected = network.eval()(images())
        plain = orepa.convert(network, example_inputs=images())
        assert not any(isinstance(module, orepa.OREPAConv | orepa.RepVGGBlock) for module in plain.modules())
        exported = torch.export.export(plain, (images(),)).module()
        for deployed in (plain, exported, script(plain)):
            assert_close(deployed(images()), expected)


def test_a_frozen_encoder_stays() -> None:
    network = unet("resnet18")
    network.freeze_encoder()
    before = copy.deepcopy(network.encoder.state_dict())
    optimizer = torch.optim.SGD((p for p in network.parameters() if p.requires_grad), lr=0.1)
    network.train()(images()).square().mean().backward()
    optimizer.step()
    assert all(torch.equal(value, before[key]) for key, value in network.encoder.state_dict().items())
    network.unfreeze_encoder()
    assert all(parameter.requires_grad for parameter in network.encoder.parameters())


def test_pretrained_folders(tmp_path: Path) -> None:
    """A network on a registered encoder is saved as it is; a prepared one after conversion without folding."""
    registered = smp.Linknet("tu-orepa_repvgg_a0", encoder_weights=None, width_factor=0.25, encoder_depth=3).eval()
    registered.save_pretrained(tmp_path / "registered")
    assert_close(smp.from_pretrained(tmp_path / "registered").eval()(images()), registered(images()))

    prepared = unet("resnet18").eval()
    prepared.save_pretrained(tmp_path / "prepared")
    with pytest.raises(RuntimeError, match="Missing key"):
        smp.from_pretrained(tmp_path / "prepared")
    orepa.convert(prepared, fold_bn=False).save_pretrained(tmp_path / "converted")
    assert_close(smp.from_pretrained(tmp_path / "converted").eval()(images()), prepared(images()))
