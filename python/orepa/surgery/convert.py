"""`convert`: a trained model back to plain convolutions, verified."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..module_info import count_parameters, describe, walk
from ..modules.linear_block import LinearBlock
from ..modules.offline_conv import OfflineConv
from ..modules.orepa_conv import OREPAConv
from ..modules.repvgg import RepVGGBlock
from ..optim import watch_replaced
from .consumer_graph import Consumer, consumers
from .fold_bn import fold_batch_norm, is_foldable, norm_placeholder
from .replace import customization, replace_modules
from .report import LayerReport, Report, attach, relative_error


class ConversionError(RuntimeError):
    """A model that cannot be converted, or whose converted form does not compute the same function."""


def convert(
    model: nn.Module,
    *,
    inplace: bool = False,
    fold_bn: bool = True,
    example_inputs: Any = None,
    tolerance: float | None = None,
) -> nn.Module:
    """Replace every `OREPAConv`, `RepVGGBlock` and `OfflineConv` by a plain `nn.Conv2d`, and fold batch norms where provable.

    Kernels are composed in float64 and rounded once. Every new layer is compared, in float64 and on random input, with the
    unsqueezed multi-branch forward (and batch norm) that it replaces, and with a plain call of it. A second call changes
    nothing.

    Args:
        model: in eval mode throughout.
        inplace: change ``model`` itself instead of a copy.
        fold_bn: fold each batch norm into the convolution before it, where a traced graph (or an `nn.Sequential`) proves that
            it takes all of that convolution's output; with ``example_inputs`` also where only the order of modules says so.
        example_inputs: a tensor, a tuple of positional or a mapping of keyword arguments: the whole model is then compared too.
        tolerance: largest relative error (Frobenius norm) of the whole model's outputs; by default 1e-9 in float64, 1e-4 in
            float32 (1e-2 where TF32 is on), 5e-2 in half precision.

    Returns:
        The converted model, with the device, dtype, memory format and ``requires_grad`` of the old one.

    Raises:
        ConversionError: train mode, non-finite parameters, a layer with forward hooks or another forward than its class, or a
            result that differs. ``model`` is then unchanged.
    """
    training = [name for name, module in model.named_modules() if module.training]
    if training:
        raise ConversionError(
            f"convert needs eval mode (call model.eval() first): {training[0] or 'the model'} and "
            f"{len(training) - 1} other modules are in train mode"
        )
    parameters = dict(model.named_parameters())
    if not inplace:
        model = copy.deepcopy(model)
    expected = None if example_inputs is None else _run(model, example_inputs)
    before = count_parameters(model)
    follows = consumers(model) if fold_bn else {}

    layers: list[LayerReport] = []
    replacements: dict[nn.Module, nn.Module] = {}
    for name, module in walk(model, (LinearBlock, RepVGGBlock)):
        _check_call(name, module)
        norm_name = _foldable_norm(model, module, follows.get(name), trust_order=example_inputs is not None)
        norm = model.get_submodule(norm_name) if norm_name else None
        plain = _to_plain(module, norm)
        if plain is None:
            continue
        new, action, detail = plain
        if norm is not None:
            replacements[norm] = norm_placeholder(norm)
            detail = f"{detail} + {norm_name}"
        geometry = describe(module.dense if isinstance(module, RepVGGBlock) else module)
        layers.append(LayerReport(name, geometry, action, detail, _verify(name, module, norm, new)))
        replacements[module] = new

    undo = {new: old for old, new in replacements.items()}
    model = replace_modules(model, replacements)
    result = Report("convert", layers, (before, count_parameters(model)))
    if example_inputs is not None:
        try:
            result.error = compare_outputs(expected, _run(model, example_inputs), tolerance)
        except ConversionError:
            replace_modules(model, undo)
            raise
    watch_replaced(parameters, model)
    attach(model, result)
    return model


def _foldable_norm(model: nn.Module, conv: nn.Module, consumer: Consumer | None, trust_order: bool) -> str:
    """Return the name of the norm to fold, or an empty string."""
    if consumer is None or consumer.norm is None or not consumer.direct or customization(conv):
        return ""
    if not (consumer.is_proven or trust_order):
        return ""
    return consumer.norm if is_foldable(model.get_submodule(consumer.norm)) else ""


def _to_plain(module: nn.Module, norm: nn.Module | None) -> tuple[nn.Module, str, str] | None:
    """Return a plain replacement with the norm folded in, what was done, and to what; None for what stays."""
    if isinstance(module, RepVGGBlock):
        return module.deploy(), "converted", "RepVGG block to one convolution"
    if isinstance(module, OREPAConv | OfflineConv):
        detail = f"{module.topology} trained offline" if isinstance(module, OfflineConv) else module.topology
        if norm is None:
            return module.to_conv2d(), "converted", detail
        dtype = next(module.parameters()).dtype
        return fold_batch_norm(module.to_conv2d(torch.float64), norm, dtype), "converted", detail
    if type(module) is nn.Conv2d and norm is not None:
        return fold_batch_norm(module, norm), "folded", "nn.Conv2d"
    return None


def _check_call(name: str, module: nn.Module) -> None:
    """Refuse a block whose call is more than its class's forward: a plain convolution would silently lose that."""
    base = next((kind for kind in (OREPAConv, OfflineConv, RepVGGBlock) if isinstance(module, kind)), None)
    if base is None:
        return
    if type(module).forward is not base.forward:
        raise ConversionError(f"{name}: {type(module).__name__} may compute something else than {base.__name__}")
    for path, inner in module.named_modules():
        if isinstance(module, RepVGGBlock) and path.partition(".")[0] == "act":
            continue  # it becomes part of the deployed block
        if reason := customization(inner):
            where = ".".join(part for part in (name, path) if part)
            raise ConversionError(f"{where or 'the model'}: {reason}; remove that before conversion")


@torch.no_grad()
def _verify(name: str, old: nn.Module, norm: nn.Module | None, new: nn.Module) -> float:
    """Return the relative error of a new layer, compared in float64, where only the rounded weights make a difference."""
    dtype = next(new.parameters()).dtype
    conv = new if isinstance(new, nn.Conv2d) else next(m for m in new.modules() if isinstance(m, nn.Conv2d))
    extents = [d * (k - 1) + 1 for k, d in zip(conv.kernel_size, conv.dilation, strict=True)]
    size = [extent + 2 * stride for extent, stride in zip(extents, conv.stride, strict=True)]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, conv.in_channels, *size, generator=generator, dtype=torch.float64).to(conv.weight.device)

    exact = copy.deepcopy(old).double()
    if isinstance(exact, RepVGGBlock):
        exact.act, new = nn.Identity(), conv  # an activation could hide a difference
    for block in exact.modules():
        if isinstance(block, OREPAConv):
            block.backend = "reference"  # covers float64 on every device
    called = exact(x)
    unsqueezed = exact.forward_branches(x) if isinstance(exact, OREPAConv | RepVGGBlock) else called
    converted = copy.deepcopy(new).double()(x)
    if norm is not None:
        affine = copy.deepcopy(norm).double()
        called, unsqueezed, converted = affine(called), affine(unsqueezed), norm_placeholder(norm)(converted)
    if not bool(torch.isfinite(unsqueezed).all()):
        raise ConversionError(
            f"{name}: the trained layer gives non-finite values; its parameters or statistics are damaged"
        )
    errors = [relative_error(expected, converted) for expected in (unsqueezed, called)]
    # One rounding of each weight and bias, with room for sums that cancel, and the noise of float64 itself.
    limit = 8 * torch.finfo(dtype).eps + 1e-11
    for error in errors:
        if not error <= limit:
            raise ConversionError(
                f"{name}: the converted layer differs by {error:.1e} (relative), allowed is {limit:.1e}"
            )
    return max(errors)


@torch.no_grad()
def _run(model: nn.Module, inputs: Any) -> Any:
    if isinstance(inputs, Mapping):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple) else model(inputs)


def compare_outputs(expected: Any, actual: Any, tolerance: float | None) -> float:
    """Return the largest relative error over all tensors that two outputs hold.

    Raises:
        ConversionError: an error above the tolerance, by default that of `convert`, or another structure.
    """
    old, new = ([t for t in tree_leaves(output) if isinstance(t, Tensor)] for output in (expected, actual))
    if len(old) != len(new) or not old:
        raise ConversionError(f"the model returned {len(old)} tensors before conversion and {len(new)} after it")
    worst = 0.0
    for before, after in zip(old, new, strict=True):
        if before.shape != after.shape:
            raise ConversionError(f"an output changed its shape from {list(before.shape)} to {list(after.shape)}")
        error = relative_error(before, after) if before.is_floating_point() else float((before != after).any())
        allowed = _default_tolerance(before) if tolerance is None else tolerance
        if not error <= allowed:
            raise ConversionError(
                f"the converted model's output differs by {error:.1e} (relative), allowed is {allowed:.1e}"
            )
        worst = max(worst, error)
    return worst


def _default_tolerance(output: Tensor) -> float:
    if output.dtype == torch.float64:
        return 1e-9
    if output.dtype in (torch.bfloat16, torch.float16):
        return 5e-2
    return 1e-2 if output.is_cuda and torch.backends.cudnn.allow_tf32 else 1e-4
