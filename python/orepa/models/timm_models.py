"""Registers models with timm: its plain ones with their convolutions swapped by `orepa.prepare`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

try:
    import timm
    from timm.models import (
        build_model_with_cfg,
        generate_default_cfgs,
        register_model,
        resolve_pretrained_cfg,
    )
    from timm.models.byobnet import RepVggBlock
    from timm.models.resnet import BasicBlock, ResNet
except ImportError as error:
    raise ImportError(f'orepa.models needs timm: pip install "orepa-kernels[models]" ({error})') from error

from ..module_info import conv_arguments, count_parameters, describe, walk
from ..modules.linear_block import LinearBlock
from ..modules.orepa_conv import OREPAConv, default_topology
from ..modules.repvgg import RepVGGBlock
from ..surgery.prepare import Choice, prepare
from ..surgery.replace import replace_modules
from ..surgery.report import LayerReport, Report, attach
from ..topology.language import Topology
from .key_map import CHECKPOINTS_URL, official_filter


@dataclass(frozen=True)
class ModelSpec:
    """One of the authors' models.

    Args:
        plain: the name of its plain network in timm.
        official: what the authors call it.
        keeps_shortcuts: the 1x1 convolutions of its shortcuts stay plain.
        is_repvgg: its blocks are timm's ``RepVggBlock``.
        defaults: arguments of the plain network that differ from timm's.
    """

    plain: str
    official: str
    keeps_shortcuts: bool = False
    is_repvgg: bool = False
    defaults: Mapping[str, Any] = field(default_factory=dict)


# The authors do not start the last norm of a residual branch at zero, as timm would.
_resnet = partial(ModelSpec, defaults={"zero_init_last": False})
_repvgg = partial(ModelSpec, is_repvgg=True)

#: every registered model by its name in timm
MODELS: dict[str, ModelSpec] = {
    "orepa_resnet18": _resnet("resnet18", "ResNet-18", keeps_shortcuts=True),
    "orepa_resnet34": _resnet("resnet34", "ResNet-34", keeps_shortcuts=True),
    "orepa_resnet50": _resnet("resnet50", "ResNet-50"),
    "orepa_resnet101": _resnet("resnet101", "ResNet-101"),
    "orepa_wide_resnet18_2": _resnet("wide_resnet18_2", "ResNet-18-2x", keeps_shortcuts=True),
    "orepa_resnext50_32x4d": _resnet("resnext50_32x4d", "ResNeXt-50"),
    "orepa_repvgg_a0": _repvgg("repvgg_a0", "RepVGG-A0"),
    "orepa_repvgg_a1": _repvgg("repvgg_a1", "RepVGG-A1"),
    "orepa_repvgg_a2": _repvgg("repvgg_a2", "RepVGG-A2"),
}


def spec_of(arch: str) -> tuple[str, ModelSpec]:
    """Return the registered name and the `ModelSpec` of a model.

    Args:
        arch: the registered name, with or without ``orepa_``, or the authors' name, such as ``"ResNet-18"``.

    Raises:
        ValueError: there is no such model.
    """
    for name, spec in MODELS.items():
        if arch in (name, name.removeprefix("orepa_"), spec.official):
            return name, spec
    known = ", ".join(f"{name} ({spec.official})" for name, spec in MODELS.items())
    raise ValueError(f"arch must be one of {known}, got {arch!r}")


def create_on_meta(name: str, **arguments: Any) -> nn.Module:
    """Call `timm.create_model` on the meta device: nothing is allocated, and no random number drawn."""
    with torch.device("meta"):
        model = timm.create_model(name, **arguments)
    assert isinstance(model, nn.Module)
    return model


def parameter_counts(name: str) -> tuple[int, int]:
    """Return the number of parameters in training, and after `orepa.convert` with every norm folded."""
    model = create_on_meta(name)
    deployed = 0
    for _, module in walk(model, (LinearBlock, RepVGGBlock)):
        conv = module.dense if isinstance(module, RepVGGBlock) else module
        if isinstance(conv, OREPAConv | nn.Conv2d):
            per_group = conv.in_channels // conv.groups
            deployed += conv.out_channels * (per_group * math.prod(conv.kernel_size) + 1)
        elif isinstance(module, nn.Linear):
            deployed += count_parameters(module)
    return count_parameters(model), deployed


# --- building -------------------------------------------------------------------------------------------------------------


def _build(
    spec: ModelSpec, topology: str | Callable[..., Topology] | None, options: dict[str, Any], **arguments: Any
) -> nn.Module:
    """Build timm's plain model with re-parameterised convolutions; ``options`` are those of the blocks."""
    overlay = {"first_conv": ()}  # timm keeps that of the innermost `create_model`
    model = timm.create_model(spec.plain, pretrained_cfg_overlay=overlay, **{**spec.defaults, **arguments})
    if spec.is_repvgg:
        return _swap_repvgg_blocks(model, {"topology": "repvgg_dense" if topology is None else topology, **options})

    def choose(name: str, conv: nn.Conv2d) -> Choice:
        if spec.keeps_shortcuts and ".downsample." in name:
            return None
        return (
            default_topology((conv.kernel_size[0], conv.kernel_size[1]), conv.groups) if topology is None else topology
        )

    return prepare(model, choose, inplace=True, **options)


_REPVGG_PAIRS = {
    "dense_bn": "conv_kxk.bn",
    "pointwise": "conv_1x1.conv",
    "pointwise_bn": "conv_1x1.bn",
    "identity_bn": "identity",
}


def _swap_repvgg_blocks(model: nn.Module, options: dict[str, Any]) -> nn.Module:
    before, layers = count_parameters(model), []
    blocks: dict[nn.Module, nn.Module] = {}
    for name, block in walk(model, (RepVggBlock,)):
        if not isinstance(block, RepVggBlock):
            continue
        _check_repvgg_block(name, block)
        conv = block.conv_kxk.conv
        placement = {"device": conv.weight.device, "dtype": conv.weight.dtype}
        new = RepVGGBlock(**conv_arguments(conv), **placement, act=block.act, **options)
        for ours, theirs in _REPVGG_PAIRS.items():
            norm = getattr(new, ours)
            if isinstance(norm, nn.BatchNorm2d):
                like = block.get_submodule(theirs)
                norm.eps, norm.momentum = like.eps, like.momentum
        layers.append(LayerReport(name, describe(conv), "swapped", f"RepVGGBlock, {new.dense.topology}"))
        blocks[block] = new
    model = replace_modules(model, blocks)
    attach(model, Report("prepare", layers, (before, count_parameters(model))))
    return model


def _check_repvgg_block(name: str, block: nn.Module) -> None:
    """Raise ValueError for what timm's block can have and `RepVGGBlock` cannot."""
    if block.reparam_conv is not None:
        raise ValueError(f"{name}: the model is built for inference (inference_mode); an OREPA block has to be trained")
    extras = {"attn_layer": block.attn, "drop_path_rate": block.drop_path, "drop_block_rate": block.conv_kxk.bn.drop}
    for argument, module in extras.items():
        if not isinstance(module, nn.Identity):
            raise ValueError(f"{name}: OREPA-VGG blocks take no {argument}")
    if not isinstance(block.conv_kxk.bn, nn.BatchNorm2d):
        raise ValueError(f"{name}: OREPA-VGG blocks take batch norms only, not {type(block.conv_kxk.bn).__name__}")


def timm_repvgg_block(name: str, block: RepVGGBlock, plain: nn.Module) -> dict[str, Tensor]:
    """Put the kxk branch of our block into timm's, and name the other weights as timm does.

    Args:
        name: of the block in both models.
        block: ours.
        plain: timm's model, whose block then convolves with ``block.dense``.

    Returns:
        The rest of timm's state dict of this block; the tensors are shared.
    """
    plain.get_submodule(f"{name}.conv_kxk").conv = block.dense
    return {
        f"{name}.{prefix}.{key}": value
        for ours, prefix in _REPVGG_PAIRS.items()
        if getattr(block, ours) is not None
        for key, value in getattr(block, ours).state_dict().items()
    }


# --- the plain network that timm lacks --------------------------------------------------------------------------------------


class WideResNet(ResNet):
    """timm's ResNet of basic blocks with every width multiplied, the stem's too, which timm fixes at 64.

    Args:
        width: the factor.
        arguments: of timm's ``ResNet``.
    """

    def __init__(self, width: int = 2, **arguments: Any) -> None:
        super().__init__(channels=tuple(width * channels for channels in (64, 128, 256, 512)), **arguments)
        stem, first, weight = 64 * width, self.layer1[0], next(self.parameters())
        conv, norm = self.get_submodule("conv1"), self.get_submodule("bn1")
        like: dict[str, Any] = {"device": weight.device, "dtype": weight.dtype}
        self.conv1 = nn.Conv2d(**{**conv_arguments(conv), "out_channels": stem}, bias=False, **like)
        self.bn1 = type(norm)(stem, **like)
        first.conv1 = nn.Conv2d(**{**conv_arguments(first.conv1), "in_channels": stem}, bias=False, **like)
        first.downsample = None  # the widths on its two sides are now equal
        self.feature_info[0]["num_chs"] = stem
        for conv in (self.conv1, first.conv1):
            nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")


def wide_resnet18_2(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Build a plain ResNet-18 with twice the width everywhere; timm has none."""
    arguments = {"block": BasicBlock, "layers": (2, 2, 2, 2), **kwargs}
    _refuse_missing_weights("wide_resnet18_2", pretrained, arguments)
    model = build_model_with_cfg(WideResNet, "wide_resnet18_2", pretrained, **arguments)
    assert isinstance(model, nn.Module)
    return model


# --- registration -----------------------------------------------------------------------------------------------------------


def _refuse_missing_weights(name: str, pretrained: bool, arguments: dict[str, Any]) -> None:
    """Resolve ``pretrained_cfg`` in ``arguments``. Raise RuntimeError for ``pretrained`` without a source to load from."""
    overlay = arguments.pop("pretrained_cfg_overlay", None)
    cfg = resolve_pretrained_cfg(name, arguments.get("pretrained_cfg"), overlay)
    arguments["pretrained_cfg"] = cfg
    if pretrained and not any((cfg.has_weights, cfg.state_dict, cfg.source)):
        raise RuntimeError(
            f"{name}: there are no weights to download for pretrained=True. The authors' checkpoints are linked at "
            f"{CHECKPOINTS_URL}; load one with orepa.load_official(path, arch)"
        )


def _entrypoint(name: str, spec: ModelSpec) -> Callable[..., nn.Module]:
    def create(
        pretrained: bool = False,
        *,
        topology: str | Callable[..., Topology] | None = None,
        scaling: str = "vector",
        backend: str = "auto",
        **kwargs: Any,
    ) -> nn.Module:
        _refuse_missing_weights(name, pretrained, kwargs)
        model = build_model_with_cfg(
            partial(_build, spec, topology, {"scaling": scaling, "backend": backend}),
            name,
            pretrained,
            pretrained_filter_fn=official_filter,
            feature_cfg={"flatten_sequential": True} if spec.is_repvgg else None,
            **kwargs,
        )
        assert isinstance(model, nn.Module)
        return model

    create.__name__ = create.__qualname__ = name
    create.__doc__ = f"timm's {spec.plain} with OREPA blocks, the authors' {spec.official}."
    return create


def _cfg(spec: ModelSpec | None) -> dict[str, Any]:
    """Return timm's ``default_cfg`` of a model; images as the authors' evaluation prepares them."""
    return {
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "crop_pct": 0.875,
        "interpolation": "bilinear",
        # What timm's loader adapts to `in_chans` by its `.weight`: plain convolutions only (see `official_filter`).
        "first_conv": "conv1" if spec is None else (),
        "classifier": "head.fc" if spec is not None and spec.is_repvgg else "fc",
        "paper_ids": None if spec is None else "arXiv:2204.00826",
        "origin_url": None if spec is None else CHECKPOINTS_URL,
    }


# `register_model` looks this name up.
default_cfgs = generate_default_cfgs(
    {"wide_resnet18_2": _cfg(None), **{name: _cfg(spec) for name, spec in MODELS.items()}}
)

register_model(wide_resnet18_2)
for _name, _spec in MODELS.items():
    globals()[_name] = register_model(_entrypoint(_name, _spec))
