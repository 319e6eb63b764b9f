"""Finds linear regions: parts of an eval-mode forward that are one convolution, whatever classes they are made of.

Every traceable module's own forward is read symbolically (`LinearForward`). A region is what lies between a value and another
one of which it is an affine map, its source: parallel branches of one input, or a sequence of convolutions. It is exact,
borders included, or it is refused with a reason (`Region.problem`).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import fx, nn

from ..module_info import count_owners
from ..modules.conv_norm import ConvNorm
from ..modules.linear_block import LinearBlock
from ..modules.repvgg import RepVGGBlock
from .forward_graph import Forward, trace
from .linear_forward import Layer, LinearForward, Step
from .linear_map import Inexact, LinearMap
from .source_usage import Usage, usage_of_children
from .tracing import has_forward

#: Parallel convolutions are merged up to so many times their multiplications: a 1x3 and a 3x1, but not a depthwise 3x3 and a
#: dense 1x1. One launch and one pass over the input less are worth the rest (estimate). Sequences may take no more.
PARALLEL_COST = 1.5
_MAX_BRANCHES = 64


@dataclass(frozen=True)
class Branch:
    """One summand of a region: ``factor`` times its layers, from input to output.

    A layer after a sum stands in each branch of that sum. So the kernels add up to that of the region; shifts do not.
    """

    factor: float
    layers: tuple[Layer, ...] = ()


@dataclass(eq=False)
class Region:
    """A part of one module's forward that is one convolution of one value.

    Args:
        name: qualified name of its owner.
        owner: the smallest module whose forward holds it.
        forward: the owner's.
        source, sink: its input and its output, nodes of that forward.
        problem: why it must stay, or an empty string.
    """

    name: str
    owner: nn.Module
    forward: LinearForward = field(repr=False)
    source: fx.Node
    sink: fx.Node
    problem: str = ""

    def __post_init__(self) -> None:
        found, pending = set[fx.Node](), [self.sink]
        while pending:
            node = pending.pop()
            if node is not self.source and node not in found:
                step = self.forward.steps[node]
                found |= {node, step.stack or node}
                pending += [value for _, value in step.inputs]
        self.nodes = sorted(found, key=self.forward.index.__getitem__)
        self.layers = [step.layer for _, step in self.steps if step.layer is not None]
        self.convolutions = sum(layer.kind == "conv" for layer in self.layers)
        self.is_sum = any(len(step.inputs) > 1 for _, step in self.steps)
        #: what it reads, by ``id``; regions that share any of it overlap
        self.tensors = frozenset(id(t) for layer in self.layers for t in layer.tensors)

    @property
    def steps(self) -> Iterator[tuple[fx.Node, Step]]:
        """Its steps, in order."""
        return ((node, self.forward.steps[node]) for node in self.nodes if node in self.forward.steps)

    @property
    def entered(self) -> set[nn.Module]:
        """The modules below the owner whose forwards hold parts of it."""
        return {module for node in self.nodes for _, module in self.forward.forward.calls[node]}

    @property
    def calls(self) -> list[nn.Module]:
        """The modules in one call of which it lies, from outside to inside."""
        first, *others = (self.forward.forward.calls[node] for node in self.nodes)
        return [call[1] for i, call in enumerate(first) if all(other[i : i + 1] == (call,) for other in others)]

    @property
    def is_own_sum(self) -> bool:
        """Whether the forward of the owner itself adds branches."""
        return any(len(step.inputs) > 1 and not self.forward.forward.calls[node] for node, step in self.steps)

    @property
    def branches(self) -> list[Branch]:
        """The sum, written out."""
        found = {self.source: [Branch(1.0)]}
        for node, step in self.steps:
            last = () if step.layer is None else (step.layer,)
            found[node] = [Branch(f * b.factor, b.layers + last) for f, value in step.inputs for b in found[value]]
            if len(found[node]) > _MAX_BRANCHES:
                raise Inexact(f"it has more than {_MAX_BRANCHES} branches")
        return found[self.sink]

    @property
    def device(self) -> torch.device:
        """Where its weights are."""
        return next(layer.tensors[0].device for layer in self.layers if layer.kind == "conv")

    def linear_map(self, device: str | torch.device | None = None) -> LinearMap:
        """Return the whole region as one map, composed in float64; on the device "meta", its size only.

        Raises:
            Inexact: no convolution equals it.
        """
        return self._maps(self.device if device is None else device)[self.sink]

    def _maps(self, device: str | torch.device) -> dict[fx.Node, LinearMap]:
        """Return what every node is of the source."""
        known = next(layer.map for layer in self.layers if layer.map.groups or len(layer.map.kernel) > 1)
        channels = known.kernel.shape[1] * known.groups or len(known.kernel)
        maps = {self.source: LinearMap(torch.ones(1, 1, 1, 1), torch.zeros(1)).on(channels, device)}
        for node, step in self.steps:
            first, *others = (maps[value].times(factor) for factor, value in step.inputs)
            for other in others:
                first = first.plus(other)
            maps[node] = first if step.layer is None else first.then(step.layer.map_on(len(first.kernel), device))
        return maps

    def extends(self, nearer: Region) -> bool:
        """Return whether this region of a farther source is worth more: by a convolution, or by nothing but padding."""
        more = {layer.kind for layer in self.layers if layer not in nearer.layers}
        return self.convolutions > nearer.convolutions or more == {"pad"}

    def trimmed(self) -> Region:
        """Return the region without the norms and scales at its end, if these alone make it leave a module."""
        node, step = self.sink, self.forward.steps[self.sink]
        while len(step.inputs) == 1 and (step.layer is None or step.layer.kind != "conv"):
            ((_, node),) = step.inputs
            step = self.forward.steps[node]
            if len((inner := replace(self, sink=node)).calls) > len(self.calls):
                return inner
        return self

    def check(self) -> str:
        """Return why no convolution equals it or should take its place, or an empty string."""
        problem = next((f"{layer.name}: {layer.problem}" for layer in self.layers if layer.problem), "")
        if problem := problem or self._check_use() or self._check_writes():
            return problem
        if len({(t.dtype, t.device) for layer in self.layers for t in layer.tensors if t.dim()}) > 1:
            return "its parameters have several dtypes or devices"
        try:
            deepest = max(sum(layer.kind == "conv" for layer in branch.layers) for branch in self.branches)
            maps = self._maps("meta")
        except Inexact as error:
            return str(error)
        parts = sum(
            step.layer.map.kernel.numel() / math.prod(maps[node].stride)
            for node, step in self.steps
            if step.layer is not None and step.layer.kind == "conv"
        )
        merged = maps[self.sink].symmetric()
        cost = merged.kernel.numel() / math.prod(merged.stride) / parts
        allowed = PARALLEL_COST if deepest == 1 else 1.0
        return "" if cost <= allowed else f"one convolution would take {cost:.1f} times the multiplications"

    def _check_use(self) -> str:
        """Refuse values and layers that are used elsewhere in the owner's forward, too."""
        for node in self.nodes:
            if node is not self.sink and (users := [user for user in node.users if user not in self.nodes]):
                return f"the value of {node.name} goes to {users[0].name}, too"
        calls = [str(node.target) for node in self.forward.nodes if node.op == "call_module"]
        read = {id(t) for tensors in self.forward.read.values() for t in tensors}
        for layer in self.layers:
            if layer.module is not None and layer.tensors:
                if calls.count(layer.name) > 1:
                    return f"{layer.name} is called {calls.count(layer.name)} times"
                if any(id(t) in read for t in layer.tensors):
                    return f"the forward reads the parameters of {layer.name}"
        return ""

    def _check_writes(self) -> str:
        """Refuse writes in place that a branch, the source or the caller would see."""
        index = self.forward.index
        shared = {self.source: {self.source}}  # by value all that lie in the same memory
        for node in self.forward.nodes[index[self.nodes[0]] : index[self.sink] + 1]:
            writes = self.forward.writes(node)
            if node not in self.nodes:
                if writes:
                    return f"{node.name} writes in place among the branches"
                continue
            step = self.forward.steps.get(node)
            target = node.args[0]
            if writes and isinstance(target, fx.Node):
                if target not in shared or self.source in shared[target]:
                    return f"{node.name} writes into the input in place"
                if any(index[user] > index[node] for value in shared[target] for user in value.users):
                    return f"{node.name} changes a value in place that is used after it"
            elif step is None or step.layer is not None or len(step.inputs) > 1 or not isinstance(target, fx.Node):
                shared[node] = {node}
                continue
            shared[target].add(node)
            shared[node] = shared[target]
        return ""


def read_regions(
    name: str, owner: nn.Module, forward: Forward, whole: Collection[nn.Module] = (), everywhere: bool = False
) -> tuple[list[Region], set[nn.Module]]:
    """Find the largest regions of a traced forward.

    Args:
        name, owner: the module that was traced.
        forward: its trace.
        whole: modules that are regions with a single convolution, too, as a `ConvNorm` is.
        everywhere: return also what lies in one call of a module below, which it does not own.

    Returns:
        The regions, with the sums of one value that are none and their problem; and the modules below that own others.
    """
    linear = LinearForward(forward)
    found: list[Region] = []
    refused: dict[fx.Node, Region] = {}
    taken: set[fx.Node] = set()
    owners: set[nn.Module] = set()
    for sink in reversed(linear.nodes):
        step = linear.steps.get(sink)
        if step is None or sink in taken or (step.layer is None and len(step.inputs) == 1):
            continue
        best: Region | None = None
        for source in sorted(linear.sources[sink] - {sink}, key=linear.index.__getitem__, reverse=True):
            region = Region(name, owner, linear, source, sink)
            if not region.convolutions or taken & set(region.nodes):
                continue
            if not (
                region.is_sum
                or region.convolutions > 1
                or any(isinstance(m, ConvNorm) or m in whole for m in (owner, *region.calls))
            ):
                continue
            if best is not None and not region.extends(best):
                continue
            if not everywhere and region.calls:  # the owner checks it
                owners.update(region.calls)
                best = region
            elif not (problem := region.check()):
                best = region
            elif len(step.inputs) > 1:
                refused.setdefault(sink, replace(region, problem=problem))
        if best is not None:
            best = best.trimmed()
            taken |= set(best.nodes)
            owners.update(best.calls)
            found += [best] if everywhere or not best.calls else []
    found += [region for sink, region in refused.items() if sink not in taken]
    return sorted(found, key=lambda region: linear.index[region.sink]), owners


def find_regions(model: nn.Module, whole: Collection[nn.Module] = ()) -> list[Region]:
    """Find the linear regions of a model in eval mode, and the sums of branches of one value that must stay.

    Nothing is changed. Two modules, one in the other, may have regions that overlap (`Region.tensors`).

    Args:
        model: in eval mode.
        whole: modules in which a single convolution and its norm are a region, too.

    Returns:
        Regions with and without a `Region.problem`, those of outer modules first.
    """
    regions = dict.fromkeys(_Search(model, whole).visit(model, "", set()))
    return sorted(regions, key=lambda region: region.name.count(".") if region.name else -1)


class _Search:
    def __init__(self, model: nn.Module, whole: Collection[nn.Module]) -> None:
        self.whole = whole
        self.owners = count_owners(model)
        self.parents: dict[nn.Module, set[nn.Module]] = {}
        for parent in model.modules():
            for child in parent.children():
                self.parents.setdefault(child, set()).add(parent)
        self.visited: dict[nn.Module, list[Region]] = {}

    def visit(self, module: nn.Module, name: str, skipped: Collection[nn.Module]) -> list[Region]:
        """Return the regions of a module and of all below, the same ones for a module with several names."""
        stop = isinstance(module, LinearBlock | RepVGGBlock | torch.jit.ScriptModule)
        if stop or module in skipped or not any(isinstance(m, nn.Conv2d | LinearBlock) for m in module.modules()):
            return []
        if module not in self.visited:
            self.visited[module] = self._visit(module, name, skipped)
        return self.visited[module]

    def _visit(self, module: nn.Module, name: str, skipped: Collection[nn.Module]) -> list[Region]:
        forward = trace(module)
        own: list[Region] = []
        if forward is not None:
            own, owners = read_regions(name, module, forward, self.whole)
            skipped = forward.entered - owners
            for region in own:
                region.problem = region.problem or forward.problem or self._check_sharing(region)
        below = {
            key: self.visit(child, f"{name}.{key}" if name else key, skipped)
            for key, child in module._modules.items()
            if child is not None
        }
        regions = [region for found in below.values() for region in found]
        if forward is None and has_forward(module):
            self._check_usage(module, below)
        for region in regions:
            if forward is not None and not region.problem and self._is_used_apart(region, name, forward):
                region.problem = f"{name or 'the model'} uses its layers without a call of {region.name}"
        return own + regions

    def _check_usage(self, module: nn.Module, below: dict[str, list[Region]]) -> None:
        """Refuse what a module that cannot be traced may use in another way than by a call of the owner."""
        usages = usage_of_children(module)
        for key, regions in below.items():
            for region in regions:
                needed = Usage.CALLED if region.owner is module._modules[key] else Usage.ITERATED
                if usages[key] < needed:
                    region.problem = region.problem or f"its parent may use {key} in another way than by a call"

    def _is_used_apart(self, region: Region, name: str, forward: Forward) -> bool:
        prefix = f"{region.name[len(name) :].lstrip('.')}."
        return any(
            node.op in ("call_module", "get_attr")
            and str(node.target).startswith(prefix)
            and all(module is not region.owner for _, module in calls)
            for node, calls in forward.calls.items()
        )

    def _check_sharing(self, region: Region) -> str:
        for layer in region.layers:
            if any(self.owners[id(t)] > 1 for t in layer.tensors):
                return f"{layer.name} shares its parameters with another module"
            if layer.tensors and layer.module is not None and not self._is_only_in(layer.module, region.owner):
                return f"{layer.name} stands in another module, too"
        return ""

    def _is_only_in(self, module: nn.Module, owner: nn.Module) -> bool:
        parents = self.parents.get(module, set())
        return module is owner or (bool(parents) and all(self._is_only_in(parent, owner) for parent in parents))
