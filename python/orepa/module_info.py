"""Facts about plain torch modules: the tree, the geometry of a convolution, the affine map of a batch norm."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_map_only

_GEOMETRY = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")


def walk(model: nn.Module, stop: tuple[type[nn.Module], ...] = ()) -> Iterator[tuple[str, nn.Module]]:
    """Yield every module once, by its first qualified name, without the inside of ``stop`` types."""
    inside: set[int] = set()
    for name, module in model.named_modules():
        if id(module) in inside:
            continue
        yield name, module
        if isinstance(module, stop):
            inside.update(id(m) for m in module.modules() if m is not module)


def join(*names: str) -> str:
    """Return the qualified name of a module from the parts that are not empty."""
    return ".".join(filter(None, names))


def count_parameters(model: nn.Module) -> int:
    """Return the number of parameters: shared ones once, those of lazy modules not."""
    return sum(p.numel() for p in model.parameters() if not is_lazy(p))


def count_owners(model: nn.Module) -> Counter[int]:
    """Count the modules that own each parameter, by the parameter's ``id``."""
    return Counter(id(p) for module in model.modules() for p in module._parameters.values() if p is not None)


def conv_arguments(conv: nn.Module) -> dict[str, Any]:
    """Return the constructor arguments that `nn.Conv2d` and `OREPAConv` share, except ``bias``, device and dtype."""
    return {name: getattr(conv, name) for name in _GEOMETRY}


def conv2d_like(conv: nn.Module, weight: Tensor, bias: Tensor | None, trainable: bool) -> nn.Conv2d:
    """Build an `nn.Conv2d` with the geometry and the mode of another convolution around given tensors, not copied."""
    result = nn.Conv2d(**conv_arguments(conv), bias=bias is not None, device="meta")
    result.weight = nn.Parameter(weight, requires_grad=trainable)
    if bias is not None:
        result.bias = nn.Parameter(bias, requires_grad=trainable)
    return result.train(conv.training)


def random_input(conv: nn.Conv2d, device: torch.device | None = None) -> Tensor:
    """Return a batch ``[2, I, H, W]`` in float64, always the same, of a size at which all of a kernel meets all borders.

    It is on the device of the convolution, or on another one.
    """
    extents = [d * (k - 1) + 1 for k, d in zip(conv.kernel_size, conv.dilation, strict=True)]
    size = [extent + 2 * stride for extent, stride in zip(extents, conv.stride, strict=True)]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, conv.in_channels, *size, generator=generator, dtype=torch.float64)
    return x.to(device or conv.weight.device)


@torch.no_grad()
def run_example(model: nn.Module, inputs: Any) -> Any:
    """Call a model with ``example_inputs``: one, a tuple of positional or a mapping of keyword arguments."""
    inputs = tree_map_only(Tensor, torch.clone, inputs)  # a model may write into them
    if isinstance(inputs, Mapping):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple) else model(inputs)


def is_channels_last(*kernels: Tensor) -> bool:
    """Return whether any 4-D tensor is channels_last and not also contiguous, as a 1x1 kernel is."""
    return any(t.is_contiguous(memory_format=torch.channels_last) and not t.is_contiguous() for t in kernels)


def saved_buffers(module: nn.Module) -> set[str]:
    """Return the names of the buffers that are in the ``state_dict``, unlike those of what takes a folded norm's place."""
    if isinstance(module, torch.jit.ScriptModule):
        return set()
    return module._buffers.keys() - module._non_persistent_buffers_set


def is_frozen_norm(module: nn.Module) -> bool:
    """Return whether a module is called or built like a frozen batch norm of torchvision, detectron2 or timm."""
    looks_frozen = {"weight", "bias", "running_mean", "running_var"} <= saved_buffers(module)
    looks_frozen = looks_frozen or type(module).__name__.startswith("FrozenBatchNorm")
    return looks_frozen and module._modules.keys() <= {"drop", "act"} and not isinstance(module, _NormBase)


def batch_norm_affine(norm: nn.Module, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return a norm in eval mode as ``y = factor * x + shift``, both ``[C]`` in float64.

    Batch norms count with their running statistics, frozen ones without their activation. An identity changes nothing.

    Args:
        norm: the module.
        like: ``[C, ...]``, with the channels of the norm, on its device.

    Raises:
        TypeError: a module of another kind, which is no affine map.
    """
    if isinstance(norm, nn.Identity):
        return like.new_ones(len(like), dtype=torch.float64), like.new_zeros(len(like), dtype=torch.float64)
    if is_frozen_norm(norm):
        exact = copy.deepcopy(norm).double().eval()
        for name in exact._modules:
            setattr(exact, name, nn.Identity())
        with torch.no_grad():  # eps may be a constant in its code, so ask its forward
            shift, one = (
                exact(like.new_full((1, len(like), 1, 1), x, dtype=torch.float64)).flatten() for x in (0.0, 1.0)
            )
        return one - shift, shift
    if not isinstance(norm, _BatchNorm) or norm.running_mean is None or norm.running_var is None:
        raise TypeError(
            f"{type(norm).__name__} is no affine map: a batch norm needs running statistics, others cannot be folded"
        )
    return affine_of_statistics(norm)


def affine_of_statistics(norm: nn.Module) -> tuple[Tensor, Tensor]:
    """Return ``factor`` and ``shift`` of a module with the attributes of a batch norm; eps, weight and bias may miss."""
    mean, var, weight, bias = (getattr(norm, key, None) for key in ("running_mean", "running_var", "weight", "bias"))
    assert isinstance(mean, Tensor) and isinstance(var, Tensor)
    factor = torch.rsqrt(var.double() + getattr(norm, "eps", 0.0))
    if weight is not None:
        factor = factor * weight.double()
    shift = -mean.double() * factor
    return factor, shift if bias is None else shift + bias.double()


def describe(conv: object) -> str:
    """Return the geometry of a convolution, or of a `ConvSpec`, in one short string: ``"3x3 64->128 s2 g4"``."""
    size = "x".join(map(str, getattr(conv, "kernel_size", ())))
    text = f"{size} {getattr(conv, 'in_channels', '?')}->{getattr(conv, 'out_channels', '?')}"
    for letter, name in (("s", "stride"), ("d", "dilation")):
        values = getattr(conv, name, (1,))
        if set(values) != {1}:
            text += f" {letter}" + ("x".join(map(str, values)) if len(set(values)) > 1 else str(values[0]))
    groups = getattr(conv, "groups", 1)
    return text if groups == 1 else f"{text} g{groups}"


def text_table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return rows of cells as lines with aligned columns; the last column stays ragged."""
    widths = [max(map(len, column)) for column in list(zip(*rows, strict=True))[:-1]]
    padded = ([*map(str.ljust, row, widths), row[-1]] for row in rows)
    return ["  ".join(cells).rstrip() for cells in padded]
