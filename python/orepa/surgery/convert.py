"""`convert`: a trained model back to plain convolutions, verified."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from functools import partial
from itertools import chain
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from ..module_info import count_parameters, describe, join, random_input, run_example, walk
from ..modules.linear_block import LinearBlock
from ..modules.offline_conv import OfflineConv
from ..modules.orepa_conv import OREPAConv
from ..modules.reduction import include_in_ddp
from ..modules.repvgg import RepVGGBlock
from ..modules.step import squeeze_alone_in
from ..optim import watch_replaced
from .consumer_graph import Consumer, consumers
from .deploy_methods import deploy_conflicts, self_fusing_pairs
from .fold_bn import fold_batch_norm, is_foldable, norm_placeholder
from .merge import merge_regions
from .references import find_references
from .replace import carry_over, check_model, copy_model, customization, exact_copy, replace_modules
from .report import LayerReport, Report, attach, relative_error, rounding_limit

log = logging.getLogger("orepa")

_FLOAT32_TOLERANCE = 1e-4


class ConversionError(RuntimeError):
    """A model that cannot be converted, or whose converted form does not compute the same function."""


class _OutputDiffers(ConversionError):
    """More than the tolerance, which rounding may be the cause of."""


def convert(
    model: nn.Module,
    *,
    inplace: bool = False,
    merge: bool = True,
    fold_bn: bool | Literal["all"] = True,
    example_inputs: Any = None,
    tolerance: float | None = None,
) -> nn.Module:
    """Replace every re-parameterised block, of this package or of any other class, by one plain `nn.Conv2d`.

    `OREPAConv`, `RepVGGBlock` and `OfflineConv` are composed from their branches. Of everybody's modules, whatever their
    class, each *linear region* (parallel branches of one value: convolutions, batch norms, identities, scales) is merged.
    Then batch norms are folded into the convolution before them where that is provable.

    Kernels are composed in float64 and rounded once. Every new layer is compared, in float64 and on random input, with the
    unsqueezed multi-branch forward (and batch norm) that it replaces, and with a plain call of it. A second call changes
    nothing.

    Args:
        model: in eval mode throughout.
        inplace: change ``model`` itself instead of a copy.
        merge: merge linear regions, exactly, borders included. One that must stay is listed in `orepa.report`, with the reason.
            A module that holds a region becomes a convolution, a sequence, or a `torch.fx.GraphModule`.
        fold_bn: fold each batch norm, frozen ones included, into the convolution before it, where a traced graph (or an
            `nn.Sequential`) proves that it takes all of that convolution's output; with ``example_inputs`` also where only the
            order of modules says so, if the outputs stay. A norm stays, with the reason in `orepa.report`, where a deploy
            method of the model (``fuse``, ``reparameterize``, ...) would then build something else; ``"all"`` folds it.
        example_inputs: a tensor, a tuple of positional or a mapping of keyword arguments: the whole model is then compared too.
        tolerance: largest relative error (Frobenius norm) of the whole model's outputs; by default 1e-9 in float64, 1e-4 in
            float32 (1e-2 where TF32 is on), 5e-2 in half precision, and where rounding alone may exceed that, 1e-4 for a copy
            of the model in float64.

    Returns:
        The converted model, with the device, dtype, memory format and ``requires_grad`` of the old one.

    Raises:
        ConversionError: train mode, a model that is wrapped for distributed training, non-finite parameters, a layer with hooks
            or another forward than its class, a block norm that is no affine map, or a result that differs. ``model`` is then
            unchanged.
        ValueError: another ``fold_bn``.
    """
    if fold_bn not in (False, True, "all"):
        raise ValueError(f'fold_bn must be True, False or "all", got {fold_bn!r}')
    _check_mode(model)
    parameters = dict(model.named_parameters())
    try:
        check_model(model, "convert")
        if not inplace:
            model = copy_model(model)
    except ValueError as problem:
        raise ConversionError(str(problem)) from problem
    before = count_parameters(model)
    check = None if example_inputs is None else _Comparison(model, example_inputs, tolerance)
    merge_all = partial(_merge, whole=bool(fold_bn)) if merge else _merge_nothing
    layers, merged = merge_all(model)
    try:
        follows = consumers(model) if fold_bn else {}
        folds, left = _choose_folds(model, follows, trust_order=check is not None, spare_deployment=fold_bn != "all")
        try:
            replaced, error = _replace(model, merged, folds, left, check, merge_all)
        except ConversionError:
            guesses = {
                name: f"only its place says that it follows {name}" for name in folds if not follows[name].is_proven
            }
            if not guesses:
                raise
            _leave(guesses, folds, left)
            replaced, error = _replace(model, merged, folds, left, check, merge_all)
    except Exception:
        replace_modules(model, merged)  # undoes it
        raise
    watch_replaced(parameters, model)
    squeeze_alone_in(model)
    include_in_ddp(model)
    attach(model, Report("convert", layers + replaced, (before, count_parameters(model)), error))
    return model


def _merge_nothing(_model: nn.Module) -> tuple[list[LayerReport], dict[nn.Module, nn.Module]]:
    return [], {}


def _merge(model: nn.Module, whole: bool) -> tuple[list[LayerReport], dict[nn.Module, nn.Module]]:
    """Merge the linear regions of a model; return the report's lines and the replacements.

    With ``whole``, so are pairs of a convolution and a norm that their module could fuse itself, but not with the norm folded.
    """
    rewrite = merge_regions(model, self_fusing_pairs(model) if whole else ())
    layers = []
    for region, conv, error in rewrite.done:
        detail = f"{region.convolutions} convolutions in {len(region.branches)} branches"
        layers.append(LayerReport(region.name, describe(conv), "merged", detail, error))
    for region in rewrite.left:
        layers.append(LayerReport(region.name, f"{region.convolutions} convolutions", "left", region.problem))
    try:
        replace_modules(model, rewrite.replacements)
    except ValueError as problem:
        raise ConversionError(str(problem)) from problem
    return layers, rewrite.replacements


def _check_mode(model: nn.Module) -> None:
    training = [name or "the model" for name, module in model.named_modules() if module.training]
    if training:
        others = len(training) - 1
        subject = (
            f"{training[0]} is" if not others else f"{training[0]} and {others} other module{'s' * (others > 1)} are"
        )
        raise ConversionError(f"convert needs eval mode (call model.eval() first): {subject} in train mode")


def _choose_folds(
    model: nn.Module, follows: Mapping[str, Consumer], trust_order: bool, spare_deployment: bool
) -> tuple[dict[str, str], dict[str, str]]:
    """Return the norms to fold, and why others are left, by the convolution's name."""
    folds: dict[str, str] = {}
    for name, consumer in follows.items():
        norm = consumer.norm or consumer.affine
        if norm is None or not consumer.direct or not (consumer.is_proven or trust_order):
            continue
        conv = model.get_submodule(name)
        known = type(conv) is nn.Conv2d or isinstance(conv, OREPAConv | OfflineConv)
        if known and not customization(conv) and is_foldable(model.get_submodule(norm)):
            folds[name] = norm
    left: dict[str, str] = {}
    layers = {name: [model.get_submodule(name), model.get_submodule(norm)] for name, norm in folds.items()}
    held = find_references(model, chain(*layers.values()), parameters=False)
    _leave({name: held[m] for name, pair in layers.items() for m in pair if m in held}, folds, left)
    if spare_deployment:
        conflicts = deploy_conflicts(model, folds)
        hint = "reads it; call that after conversion, or pass fold_bn='all'"
        _leave({name: f"{method} {hint}" for name, method in conflicts.items()}, folds, left)
    return folds, left


def _leave(reasons: Mapping[str, str], folds: dict[str, str], left: dict[str, str]) -> None:
    for name, reason in reasons.items():
        left[name] = f"norm {folds.pop(name)} left: {reason}"


class _Comparison:
    """The outputs of a model on example inputs, to be compared with those after conversion."""

    def __init__(self, model: nn.Module, inputs: Any, tolerance: float | None) -> None:
        self.inputs, self.tolerance = inputs, tolerance
        self.expected = run_example(model, inputs)

    def error(self, model: nn.Module) -> float:
        return compare_outputs(self.expected, run_example(model, self.inputs), self.tolerance)

    def error_in_float64(
        self, model: nn.Module, merge: Callable[[nn.Module], object], folds: Mapping[str, str]
    ) -> float | None:
        """Convert a copy of the model in float64; return its error, or None where that is too large or it does not run."""
        try:
            exact = exact_copy(model)
            inputs = tree_map_only(Tensor, lambda t: t.double() if t.is_floating_point() else t, self.inputs)
            check = _Comparison(exact, inputs, _FLOAT32_TOLERANCE)
            merge(exact)
            replace_modules(exact, _build(exact, folds, {})[1])
            return check.error(exact)
        except Exception as problem:  # of the model's own code, too
            log.debug("no comparison in float64: %s", problem)
            return None


def _replace(
    model: nn.Module,
    merged: Mapping[nn.Module, nn.Module],
    folds: Mapping[str, str],
    left: Mapping[str, str],
    check: _Comparison | None,
    merge_all: Callable[[nn.Module], object],
) -> tuple[list[LayerReport], float | None]:
    """Replace the layers of a merged model, unless its outputs differ; return the report's lines and their error."""
    layers, replacements = _build(model, folds, left)
    try:
        replace_modules(model, replacements)
    except ValueError as problem:
        raise ConversionError(str(problem)) from problem
    if check is None:
        return layers, None
    try:
        return layers, check.error(model)
    except Exception as difference:
        replace_modules(model, replacements)  # undoes it
        if check.tolerance is not None or not isinstance(difference, _OutputDiffers):
            raise
        replace_modules(model, merged)  # undoes that, too
        error = check.error_in_float64(model, merge_all, folds)
        replace_modules(model, merged)
        if error is None:
            raise
        log.warning("%s; that is rounding: a copy in float64 differs by %.1e", difference, error)
    replace_modules(model, replacements)
    return layers, error


def _build(
    model: nn.Module, folds: Mapping[str, str], left: Mapping[str, str]
) -> tuple[list[LayerReport], dict[nn.Module, nn.Module]]:
    """Return the report's lines and the new modules by the old ones, without changing the model.

    Args:
        model: in eval mode.
        folds: the name of the norm to fold, by the convolution's name.
        left: why the norm of a convolution stays, by the convolution's name.
    """
    layers: list[LayerReport] = []
    replacements: dict[nn.Module, nn.Module] = {}
    for name, module in walk(model, (LinearBlock, RepVGGBlock)):
        _check_call(name, module)
        norm = model.get_submodule(folds[name]) if name in folds else None
        try:
            plain = _to_plain(module, norm)
            if plain is None:
                if name in left:
                    layers.append(LayerReport(name, describe(module), "left", left[name]))
                continue
            new, action, detail = plain
            error = _verify(name, module, norm, new)
            replacements[module] = new
            carry_over(module, new)
            if norm is not None:
                replacements[norm] = norm_placeholder(norm)
                carry_over(norm, replacements[norm])
                detail = f"{detail} + {folds[name]}"
        except (TypeError, ValueError) as problem:
            raise ConversionError(f"{name or 'the model'}: {problem}") from problem
        geometry = describe(module.dense if isinstance(module, RepVGGBlock) else module)
        layers.append(
            LayerReport(name, geometry, action, f"{detail} ({left[name]})" if name in left else detail, error)
        )
    return layers, replacements


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
        # The block's own backward hooks are carried over.
        if reason := customization(inner) or customization(inner, backward_hooks=inner is not module):
            raise ConversionError(f"{join(name, path) or 'the model'}: {reason}; remove that before conversion")


@torch.no_grad()
def _verify(name: str, old: nn.Module, norm: nn.Module | None, new: nn.Module) -> float:
    """Return the relative error of a new layer, compared in float64, where only the rounded weights make a difference."""
    dtype = next(new.parameters()).dtype
    conv = new if isinstance(new, nn.Conv2d) else next(m for m in new.modules() if isinstance(m, nn.Conv2d))
    x = random_input(conv)

    exact = exact_copy(old)
    if isinstance(exact, RepVGGBlock):
        exact.act, new = nn.Identity(), conv  # an activation could hide a difference
    called = exact(x)
    unsqueezed = exact.forward_branches(x) if isinstance(exact, OREPAConv | RepVGGBlock) else called
    converted = exact_copy(new)(x)
    if norm is not None:
        affine = exact_copy(norm)
        called, unsqueezed, converted = affine(called), affine(unsqueezed), norm_placeholder(affine)(converted)
    if not bool(torch.isfinite(unsqueezed).all()):
        raise ConversionError(
            f"{name}: the trained layer gives non-finite values; its parameters or statistics are damaged"
        )
    if not bool(torch.isfinite(converted).all()):
        raise ConversionError(f"{name}: the kernel overflows in {dtype}; convert in float32, or pass fold_bn=False")
    errors = [relative_error(expected, converted) for expected in (unsqueezed, called)]
    limit = rounding_limit(dtype)
    for error in errors:
        if not error <= limit:
            raise ConversionError(
                f"{name}: the converted layer differs by {error:.1e} (relative), allowed is {limit:.1e}"
            )
    return max(errors)


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
        for output, when in ((before, "before"), (after, "only after")):
            if not bool(torch.isfinite(output).all()):
                raise ConversionError(
                    f"the model's output is not finite {when} conversion (an overflow in {output.dtype}?); give other "
                    "example_inputs"
                )
        error = relative_error(before, after) if before.is_floating_point() else float((before != after).any())
        allowed = _default_tolerance(before) if tolerance is None else tolerance
        if not error <= allowed:
            raise _OutputDiffers(
                f"the converted model's output differs by {error:.1e} (relative), allowed is {allowed:.1e}"
            )
        worst = max(worst, error)
    return worst


def _default_tolerance(output: Tensor) -> float:
    if output.dtype == torch.float64:
        return 1e-9
    if output.dtype in (torch.bfloat16, torch.float16):
        return 5e-2
    return 1e-2 if output.is_cuda and torch.backends.cudnn.allow_tf32 else _FLOAT32_TOLERANCE
