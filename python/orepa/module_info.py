"""Reads facts off plain torch modules: the tree, a convolution's arguments, a batch norm's affine map."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

_GEOMETRY = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")


def walk(model: nn.Module, stop: tuple[type[nn.Module], ...] = ()) -> Iterator[tuple[str, nn.Module]]:
    """Every module once, by its first qualified name; the inside of ``stop`` types is skipped."""
    inside: set[int] = set()
    for name, module in model.named_modules():
        if id(module) in inside:
            continue
        yield name, module
        if isinstance(module, stop):
            inside.update(id(m) for m in module.modules() if m is not module)


def conv_arguments(conv: nn.Module) -> dict[str, Any]:
    """The constructor arguments that an `nn.Conv2d` and an `OREPAConv` share, except ``bias``, device and dtype."""
    return {name: getattr(conv, name) for name in _GEOMETRY}


def is_channels_last(*kernels: Tensor) -> bool:
    """Whether any of these 4-D tensors is channels_last and not also contiguous, as a 1x1 kernel is."""
    return any(t.is_contiguous(memory_format=torch.channels_last) and not t.is_contiguous() for t in kernels)


def batch_norm_affine(norm: nn.Module) -> tuple[Tensor, Tensor]:
    """A batch norm in eval mode as ``y = factor * x + shift``, both ``[O]`` in float64."""
    assert isinstance(norm, nn.modules.batchnorm._BatchNorm)
    assert norm.running_mean is not None and norm.running_var is not None
    factor = torch.rsqrt(norm.running_var.double() + norm.eps)
    if norm.weight is not None:
        factor = factor * norm.weight.double()
    shift = -norm.running_mean.double() * factor
    return factor, shift if norm.bias is None else shift + norm.bias.double()


def describe(conv: nn.Module) -> str:
    """Geometry in one short string: ``"3x3 64->128 s2 g4"``."""
    size = "x".join(map(str, getattr(conv, "kernel_size", ())))
    text = f"{size} {getattr(conv, 'in_channels', '?')}->{getattr(conv, 'out_channels', '?')}"
    for letter, name in (("s", "stride"), ("d", "dilation")):
        values = getattr(conv, name, (1,))
        if set(values) != {1}:
            text += f" {letter}" + ("x".join(map(str, values)) if len(set(values)) > 1 else str(values[0]))
    groups = getattr(conv, "groups", 1)
    return text if groups == 1 else f"{text} g{groups}"


def count_parameters(model: nn.Module) -> int:
    """Number of parameters, shared ones once, those of lazy modules not."""
    return sum(p.numel() for p in model.parameters() if not is_lazy(p))
