"""`prune_branches`: take the branches that a trained model does not need out of its blocks, verified."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from ..analysis.measure import branch_kernels, branch_names, check_tolerance, relative, select_prunable, sum_kernels
from ..module_info import conv_arguments, count_owners, count_parameters, describe, walk
from ..modules.linear_block import LinearBlock
from ..modules.orepa_conv import OREPAConv
from ..optim import watch_replaced
from ..topology.language import Topology, constant_declaration
from .convert import ConversionError
from .replace import carry_over, check_model, copy_model, customization, replace_modules
from .report import LayerReport, Report, attach


def prune_branches(
    model: nn.Module,
    tolerance: float = 1e-3,
    *,
    inplace: bool = False,
    branches: Mapping[str, Sequence[str]] | None = None,
) -> nn.Module:
    """Remove the branches of every `OREPAConv` that its squeezed kernel can do without.

    What remains is an `OREPAConv` with fewer branches, as trainable as before: its parameters, its rows of ``scales`` and its
    plan shrink. In every layer the squeezed kernel changes by at most ``tolerance`` (Frobenius norm, relative), all removed
    branches together; they are chosen greedily, the smallest first, and one always stays. The change of the whole model's
    output is not bounded by that: evaluate the pruned model.

    A branch behind scales of zero adds nothing now and is removed, although training could change that: freshly prepared
    models have many of those (``preserve=True``, the frequency prior). Prune after training.

    A layer is left alone, with the reason in `orepa.report`, where it is of a subclass, parametrized, hooked, frozen, or shares
    a parameter with another module. Blocks nested in a branch, the stages of a deep stem, keep all of theirs.

    Args:
        model: any module tree, in either mode.
        tolerance: 0 removes only what adds nothing at all; infinity leaves one branch in each layer.
        inplace: change ``model`` itself instead of a copy. Parameters that stay are the same objects, except ``scales``, so an
            optimizer must be made anew.
        branches: the ones to remove, in place of an automatic choice: branch names by layer name, such as
            `Analysis.prunable`. With a tolerance of infinity this gives a new model the shape of a pruned one, to load its
            ``state_dict``.

    Returns:
        The pruned model, in the mode, on the devices and in the dtypes that it had.

    Raises:
        ValueError: a tolerance that is negative or no number; parameters that are not finite, or on the meta device;
            ``branches`` that do not exist, cannot be pruned, or are all that a layer has. ``model`` is then unchanged.
        ConversionError: ``branches`` that change a kernel by more than the tolerance, or a result that is not the block
            without its branches. ``model`` is then unchanged.
    """
    check_tolerance(tolerance)
    check_model(model, "prune_branches")
    parameters = dict(model.named_parameters())
    if not inplace:
        model = copy_model(model)
    before = count_parameters(model)
    convs = {name: conv for name, conv in walk(model, (LinearBlock,)) if isinstance(conv, OREPAConv)}
    requested = None if branches is None else _check_request(branches, convs)
    owners = count_owners(model)
    layers: list[LayerReport] = []
    replacements: dict[nn.Module, nn.Module] = {}
    for name, conv in convs.items():
        removed = () if requested is None else requested.get(name, ())
        reason = _obstacle(conv, owners)
        if reason and removed:
            raise ValueError(f"branches: {name!r} cannot be pruned: {reason}")
        if not reason and requested is None:
            names = branch_names(conv)
            removed = tuple(names[i] for i in select_prunable(branch_kernels(conv, name), tolerance))
            reason = "" if removed else f"every branch changes the kernel by more than {tolerance:g}"
        if not removed:
            layers.append(LayerReport(name, describe(conv), "left", reason or "not asked for"))
            continue
        new = _without(conv, removed)
        error = _verify(name, conv, new, removed, tolerance)
        carry_over(conv, new)
        replacements[conv] = new
        detail = f"{', '.join(removed)} (keeps {', '.join(branch_names(new))})"
        layers.append(LayerReport(name, describe(conv), "pruned", detail, error))
    model = replace_modules(model, replacements)
    watch_replaced(parameters, model)
    attach(model, Report("prune", layers, (before, count_parameters(model))))
    return model


def _check_request(branches: Mapping[str, Sequence[str]], convs: Mapping[str, OREPAConv]) -> dict[str, tuple[str, ...]]:
    for name, removed in branches.items():
        if name not in convs:
            raise ValueError(f"branches: the model has no OREPAConv {name!r}")
        existing = branch_names(convs[name])
        unknown = sorted(set(removed) - set(existing)) if not isinstance(removed, str) else [removed]
        if unknown:
            raise ValueError(f"branches: {name!r} has {', '.join(existing)}; got {', '.join(unknown)}")
        if set(removed) == set(existing):
            raise ValueError(f"branches: one branch of {name!r} must stay, got all of {', '.join(existing)}")
    return {name: tuple(dict.fromkeys(removed)) for name, removed in branches.items()}


def _obstacle(conv: OREPAConv, owners: Mapping[int, int]) -> str:
    """Return the reason to leave a layer alone, or an empty string."""
    lowered, parameters = conv._lowered, list(conv.parameters())
    if len(lowered.branches) == 1:
        return "it has one branch only"
    inside = [module for module in conv.modules() if module is not conv]
    names = (set(conv._parameters), set(conv._buffers), set(conv._modules))
    expected = ({*lowered.parameters, "scales", "bias"}, set(lowered.constants), set(lowered.children))
    if names != expected or any(type(module) is not LinearBlock for module in inside):
        return "its parameters are not those of its topology: it is parametrized, or something was added"
    if type(conv) is not OREPAConv:
        return f"{type(conv).__name__} may compute something else than OREPAConv"
    for module in (conv, *inside):
        if reason := customization(module, backward_hooks=True):
            return reason
    if any(type(p) is not nn.Parameter for p in parameters):
        return "its parameters are not ordinary ones (sharded?)"
    if not all(p.requires_grad for p in parameters):
        return "some of its parameters are frozen"
    if any(owners[id(p)] > 1 for p in parameters):
        return "it shares a parameter with another module"
    return ""


def _without(conv: OREPAConv, removed: Sequence[str]) -> OREPAConv:
    """Return a block with the other branches only, which shares their parameters."""
    declared = conv._lowered.topology
    topology = Topology(**{name: branch for name, branch in declared if name not in removed})
    new = OREPAConv(
        **conv_arguments(conv),
        bias=conv.bias is not None,
        device="meta",  # draws no initial values
        dtype=next(conv.parameters()).dtype,
        topology=constant_declaration(topology),
        scaling=conv.scaling,
        backend=conv.backend,
    )
    if conv.order == "squeeze" or new._split is not None:
        new.order = conv.order
    new.topology = f"{conv.topology.partition('[')[0]}[{'+'.join(branch_names(new))}]"
    parameters = dict(conv.named_parameters())
    rows = [b.scale for b in conv._lowered.branches if b.name not in removed and b.scale is not None]
    if conv.scales is not None and rows:
        parameters["scales"] = nn.Parameter(conv.scales.detach()[rows])
    new.load_state_dict({name: parameters[name] for name, _ in new.named_parameters()}, assign=True)
    return new.train(conv.training)


@torch.no_grad()
def _verify(name: str, old: OREPAConv, new: OREPAConv, removed: Sequence[str], tolerance: float) -> float | None:
    """Return the relative change of the squeezed kernel, in float64, measured on the parameters of the new block.

    Raises:
        ConversionError: more than the tolerance, or another change than the loss of these branches.
    """
    by_name = dict(zip(branch_names(old), branch_kernels(old, name), strict=True))
    before, after = old._compose(torch.float64).cpu(), new._compose(torch.float64).cpu()
    missing = sum_kernels([by_name[branch] for branch in removed])
    # Sums in another order, or on another device, round differently; branches can be larger than their sum.
    noise = 1e-12 * sum(float(kernel.norm()) for kernel in by_name.values())
    if not float((before - after - missing).norm()) <= noise:
        raise ConversionError(f"{name}: the pruned block is not the old one without {', '.join(removed)}")
    norm, change = float(before.norm()), float((before - after).norm())
    limit = math.inf if math.isinf(tolerance) else tolerance * norm
    if not change <= limit + noise:
        raise ConversionError(
            f"{name}: without {', '.join(removed)} the kernel changes by {change:.1e} of {norm:.1e}, allowed is {limit:.1e}"
        )
    return relative(change, norm)
