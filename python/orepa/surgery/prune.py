"""`prune_branches`: take the branches that a trained model does not need out of its blocks, verified."""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import partial

import torch
from torch import nn

import orepa_kernels

from ..analysis.measure import branch_kernels, branch_names, check_tolerance, choose, relative, sum_of
from ..module_info import conv_arguments, count_parameters, describe, walk
from ..modules.linear_block import LinearBlock
from ..modules.orepa_conv import OREPAConv
from ..topology.language import AvgPool, Branch, Conv, ConvSpec, Depthwise, Layer, Nested, Topology
from ..topology.lowering import ConvStage, DepthwiseStage, Lowered, NestedStage, ResolvedBranch
from .convert import ConversionError
from .replace import lost_in_a_new_module, replace_modules
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

    A branch behind scales of zero adds nothing now and goes, even though training could have woken it up: freshly prepared
    models are full of those (``preserve=True``, the frequency prior). Prune after training.

    A layer is left alone, and reported, where it is of a subclass, parametrized, hooked, frozen, or shares a parameter with
    another module. Blocks nested in a branch, the stages of a deep stem, keep all of theirs. `orepa.report` tells.

    Args:
        model: any module tree, in either mode.
        tolerance: 0 takes only what adds nothing at all; infinity leaves one branch in each layer.
        inplace: change ``model`` itself instead of a copy. Parameters that stay are the same objects, except ``scales``, so an
            optimizer must be made anew.
        branches: take these out instead of choosing: branch names by layer name, such as `Analysis.prunable`. With a
            tolerance of infinity this brings a new model into the shape of a pruned one, to load its ``state_dict``.

    Returns:
        The pruned model, in the mode, on the devices and in the dtypes that it had.

    Raises:
        ValueError: a tolerance that is negative or no number; parameters that are not finite, or on the meta device;
            ``branches`` that do not exist, cannot be pruned, or are all that a layer has. ``model`` is then as it was.
        ConversionError: ``branches`` that change a kernel by more than the tolerance, or a result that is not the block
            without its branches. ``model`` is then as it was.
    """
    check_tolerance(tolerance)
    if not inplace:
        model = copy.deepcopy(model)
    before = count_parameters(model)
    found = {name: conv for name, conv in walk(model, (LinearBlock,)) if isinstance(conv, OREPAConv)}
    asked = None if branches is None else _checked(branches, found)
    owners = Counter(id(p) for module in model.modules() for p in module._parameters.values() if p is not None)
    layers: list[LayerReport] = []
    replacements: dict[nn.Module, nn.Module] = {}
    for name, conv in found.items():
        going, reason = (() if asked is None else asked.get(name, ())), _why_not(conv, owners)
        if reason and going:
            raise ValueError(f"branches: {name!r} cannot be pruned: {reason}")
        if not reason and asked is None:
            names = branch_names(conv)
            going = tuple(names[i] for i in choose(branch_kernels(conv, name), tolerance))
            reason = "" if going else f"every branch changes the kernel by more than {tolerance:g}"
        if not going:
            layers.append(LayerReport(name, describe(conv), "left", reason or "not asked for"))
            continue
        new = _without(conv, going)
        error = _verify(name, conv, new, going, tolerance)
        replacements[conv] = new
        kept = ", ".join(branch_names(new))
        layers.append(LayerReport(name, describe(conv), "pruned", f"{', '.join(going)} (keeps {kept})", error))
    model = replace_modules(model, replacements)
    attach(model, Report("prune", layers, (before, count_parameters(model))))
    return model


def _checked(branches: Mapping[str, Sequence[str]], found: Mapping[str, OREPAConv]) -> dict[str, tuple[str, ...]]:
    for name, going in branches.items():
        if name not in found:
            raise ValueError(f"branches: the model has no OREPAConv {name!r}")
        has = branch_names(found[name])
        unknown = sorted(set(going) - set(has)) if not isinstance(going, str) else [going]
        if unknown:
            raise ValueError(f"branches: {name!r} has {', '.join(has)}; got {', '.join(unknown)}")
        if set(going) == set(has):
            raise ValueError(f"branches: one branch of {name!r} must stay, got all of {', '.join(has)}")
    return {name: tuple(dict.fromkeys(going)) for name, going in branches.items()}


def _why_not(conv: OREPAConv, owners: Mapping[int, int]) -> str:
    """The reason to leave a layer alone, or an empty string."""
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
        if reason := lost_in_a_new_module(module):
            return reason
    if any(type(p) is not nn.Parameter for p in parameters):
        return "its parameters are not ordinary ones (sharded?)"
    if not all(p.requires_grad for p in parameters):
        return "some of its parameters are frozen"
    if any(owners[id(p)] > 1 for p in parameters):
        return "it shares a parameter with another module"
    return ""


# --- the smaller block ------------------------------------------------------------------------------------------------


def _without(conv: OREPAConv, going: Sequence[str]) -> OREPAConv:
    """The block with its other branches only. It takes their parameters over, as they are."""
    lowered = conv._lowered
    kept = [branch for branch in lowered.branches if branch.name not in going]
    topology = Topology(**{branch.name: _declared(lowered, branch) for branch in kept})
    new = OREPAConv(
        **conv_arguments(conv),
        bias=conv.bias is not None,
        device="meta",  # its own initial values are not wanted
        dtype=next(conv.parameters()).dtype,
        topology=partial(_constant, topology),
        scaling=conv.scaling,
        backend=conv.backend,
    )
    new.topology = f"{conv.topology.partition('[')[0]}[{'+'.join(branch.name for branch in kept)}]"
    own = dict(conv.named_parameters())
    rows = [branch.scale for branch in kept if branch.scale is not None]
    if conv.scales is not None and rows:
        own["scales"] = nn.Parameter(conv.scales.detach()[rows])
    new.load_state_dict({name: own[name] for name in new.state_dict()}, assign=True)
    return new.train(conv.training)


def _declared(lowered: Lowered, branch: ResolvedBranch) -> Branch:
    """A branch as it was declared, with its channels spelled out: it lowers to the same stages and names."""
    scale = None if branch.scale is None else lowered.scale_values[branch.scale]
    return Branch(*_layers(lowered, branch), scale=scale)


def _layers(lowered: Lowered, branch: ResolvedBranch) -> Iterator[Layer]:
    channels = lowered.spec.in_channels
    for stage in branch.stages:
        if isinstance(stage, ConvStage):
            channels = stage.weight.shape[0]
            yield Conv(stage.kernel_size, channels, stage.identity, lowered.parameters[stage.weight.name][1])
        elif isinstance(stage, DepthwiseStage):
            rows = stage.weight.shape[0]
            yield Depthwise(stage.kernel_size, rows // channels, lowered.parameters[stage.weight.name][1])
            channels = rows
        elif isinstance(stage, NestedStage):
            _, topology = lowered.children[stage.child]
            channels = stage.lowered.spec.out_channels
            yield Nested(partial(_constant, topology), stage.kernel_size, channels)
        elif isinstance(stage.filter, orepa_kernels.Average):  # the identity too: it averages over one element
            yield AvgPool(stage.kernel_size)
        else:
            yield lowered.constants[stage.filter.name][2]


def _constant(topology: Topology, spec: ConvSpec) -> Topology:
    """A declaration that was resolved already."""
    return topology


@torch.no_grad()
def _verify(name: str, old: OREPAConv, new: OREPAConv, going: Sequence[str], tolerance: float) -> float | None:
    """Relative change of the squeezed kernel, in float64, on the parameters that the new block really has.

    Raises:
        ConversionError: more than the tolerance, or another change than the loss of these branches.
    """
    by_name = dict(zip(branch_names(old), branch_kernels(old, name), strict=True))
    before, after = old._compose(torch.float64).cpu(), new._compose(torch.float64).cpu()
    missing = sum_of([by_name[branch] for branch in going])
    # Sums in another order, or on another device, round differently; branches can be larger than their sum.
    noise = 1e-12 * sum(float(kernel.norm()) for kernel in by_name.values())
    if not float((before - after - missing).norm()) <= noise:
        raise ConversionError(f"{name}: the pruned block is not the old one without {', '.join(going)}")
    norm, change = float(before.norm()), float((before - after).norm())
    limit = math.inf if math.isinf(tolerance) else tolerance * norm
    if not change <= limit + noise:
        raise ConversionError(
            f"{name}: without {', '.join(going)} the kernel changes by {change:.1e} of {norm:.1e}, allowed is {limit:.1e}"
        )
    return relative(change, norm)
