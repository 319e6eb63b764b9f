"""Turns a declared topology into the two forms that run.

`lower` resolves a linearized topology for one convolution (channels, groups, kernel size) into

- the *plan*, an `orepa_kernels.Block`: the sum of terms that a backend squeezes, and
- the *branches*, sequences of resolved layers, called stages: the unsqueezed forward runs them on feature maps.

Both read the same operands, named as the parameters and buffers of the module that holds them (`orepa.modules.linear_block`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TypeAlias, TypeGuard

from orepa_kernels import IMPULSE, Average, Block, Composed, Dense, Operand, PointwiseFilter, Separable, Term
from orepa_kernels.plan import check_alignment

from . import language as lang
from .language import Branch, ConvSpec, Init, Size, Topology, constant_declaration, pair

SCALINGS = ("vector", "scalar", "none")


@dataclass(frozen=True)
class ConvStage:
    """A convolution with weight ``[M, I/g, kh, kw]``, plus the identity where ``identity``."""

    weight: Operand
    kernel_size: Size
    identity: bool = False


@dataclass(frozen=True)
class DepthwiseStage:
    """A depthwise convolution with weight ``[I*E, 1, kh, kw]``."""

    weight: Operand
    kernel_size: Size


@dataclass(frozen=True)
class FilterStage:
    """A fixed depthwise filter; the identity is the `IMPULSE`."""

    filter: Operand | Average
    kernel_size: Size


@dataclass(frozen=True)
class NestedStage:
    """A block within a block. ``child`` is the name of the submodule that holds its parameters."""

    child: str
    lowered: Lowered
    kernel_size: Size


Stage: TypeAlias = ConvStage | DepthwiseStage | FilterStage | NestedStage


@dataclass(frozen=True)
class ResolvedBranch:
    """A branch with its channels, names and sizes worked out. ``scale`` is its row of the scales."""

    name: str
    stages: tuple[Stage, ...]
    kernel_size: Size
    scale: int | None


@dataclass
class Lowered:
    """The result of `lower`. ``topology`` is what was lowered, with nested blocks as constants: it pickles."""

    spec: ConvSpec
    prefix: str
    branches: list[ResolvedBranch] = field(default_factory=list)
    parameters: dict[str, tuple[tuple[int, ...], Init]] = field(default_factory=dict)
    constants: dict[str, tuple[int, Size, lang.Filter]] = field(default_factory=dict)
    children: dict[str, Lowered] = field(default_factory=dict)
    scale_values: list[float] = field(default_factory=list)
    scales: Operand | None = None
    plan: Block = field(init=False)
    topology: Topology = field(init=False)


def lower(topology: Topology, spec: ConvSpec, scaling: str = "vector", prefix: str = "") -> Lowered:
    """Resolve a topology for one convolution.

    Args:
        topology: linearized; see `Topology.linearize`.
        spec: the convolution.
        scaling: ``"vector"`` for one scale per branch and channel, ``"scalar"`` for one per branch, ``"none"``.
        prefix: of the operand names, for nested blocks.

    Raises:
        ValueError: an unknown scaling, a branch that does not fit the convolution (the message names it), or norms left.
    """
    if scaling not in SCALINGS:
        raise ValueError(f"scaling must be one of {', '.join(SCALINGS)}, got {scaling!r}")
    result = Lowered(spec, prefix)
    branches: dict[str, Branch] = {}
    for name, branch in topology:
        scale = None
        if branch.scale is not None and scaling != "none":
            scale = len(result.scale_values)
            result.scale_values.append(branch.scale)
        stages = _resolve(result, name, branch, scaling)
        size = _composed_size(stages)
        check_alignment(size, spec.kernel_size, f"branch {name!r}")
        result.branches.append(ResolvedBranch(name, stages, size, scale))
        branches[name] = _with_constants(branch, stages)
    result.topology = Topology(**branches)
    if result.scale_values:
        columns = spec.out_channels if scaling == "vector" else 1
        result.scales = Operand(f"{prefix}scales", (len(result.scale_values), columns))
    terms = tuple(_term(branch.stages, spec, branch.scale) for branch in result.branches)
    result.plan = _block(terms, spec, result.scales)
    return result


def _resolve(result: Lowered, name: str, branch: Branch, scaling: str) -> tuple[Stage, ...]:
    spec, prefix, channels = result.spec, result.prefix, result.spec.in_channels
    stages: list[Stage] = []

    def parameter(suffix: str, shape: tuple[int, ...], init: Init) -> Operand:
        result.parameters[f"{name}_{suffix}"] = (shape, init)
        return Operand(f"{prefix}{name}_{suffix}", shape)

    names = _suffixes(branch.layers)
    for index, layer in enumerate(branch.layers):
        out = _channels_after(layer, channels, spec)
        if out % spec.groups:
            raise ValueError(f"branch {name!r}: groups={spec.groups} must divide the {out} channels of layer {index}")
        if isinstance(layer, lang.Norm):
            raise ValueError(f"branch {name!r} has a branch-wise norm: linearize the topology first")
        if isinstance(layer, lang.Nested):
            child_spec = replace(
                spec, in_channels=channels, out_channels=out, kernel_size=pair(layer.kernel_size), stride=(1, 1)
            )
            child = f"{name}_{names[index]}"
            nested = lower(layer.topology(child_spec).linearize(), child_spec, scaling, f"{prefix}{child}.")
            result.children[child] = nested
            stages.append(NestedStage(child, nested, child_spec.kernel_size))
        elif isinstance(layer, lang.Identity):
            stages.append(FilterStage(IMPULSE, (1, 1)))
        else:
            kernel = pair(layer.kernel_size)
            if isinstance(layer, lang.Conv):
                if layer.identity and kernel != (1, 1):
                    raise ValueError(f"branch {name!r}: a convolution plus identity must be 1x1, got {kernel}")
                weight = parameter(names[index], (out, channels // spec.groups, *kernel), layer.init)
                stages.append(ConvStage(weight, kernel, layer.identity))
            elif isinstance(layer, lang.Depthwise):
                stages.append(DepthwiseStage(parameter(names[index], (out, 1, *kernel), layer.init), kernel))
            elif isinstance(layer, lang.AvgPool):
                stages.append(FilterStage(Average(kernel), kernel))
            else:
                constant = f"{name}_{names[index]}"
                rows, *size = layer.values(channels, kernel).shape
                if tuple(size) != kernel or rows not in (1, channels):
                    raise ValueError(
                        f"branch {name!r}: a filter's values must be [1 or {channels}, {kernel[0]}, {kernel[1]}], "
                        f"got {[rows, *size]}"
                    )
                result.constants[constant] = (channels, kernel, layer)
                stages.append(FilterStage(Operand(f"{prefix}{constant}", (rows, *kernel)), kernel))
        channels = out
    if channels != spec.out_channels:
        raise ValueError(f"branch {name!r} ends with {channels} channels, the block has {spec.out_channels}")
    return tuple(stages)


def _with_constants(branch: Branch, stages: tuple[Stage, ...]) -> Branch:
    """Replace the declarations of nested blocks by their results."""

    def replaced(layer: lang.Layer, stage: Stage) -> lang.Layer:
        if not isinstance(stage, NestedStage):
            return layer
        block = stage.lowered
        return lang.Nested(constant_declaration(block.topology), block.spec.kernel_size, block.spec.out_channels)

    return Branch(*map(replaced, branch.layers, stages), scale=branch.scale)


def _channels_after(layer: lang.Layer, channels: int, spec: ConvSpec) -> int:
    if isinstance(layer, lang.Conv | lang.Nested):
        return spec.out_channels if layer.out_channels is None else layer.out_channels
    return channels * layer.expand if isinstance(layer, lang.Depthwise) else channels


def _suffixes(layers: tuple[lang.Layer, ...]) -> list[str]:
    """Name each layer's parameter: by the field's name where there is one, by a number otherwise."""
    convs = sum(isinstance(layer, lang.Conv) for layer in layers)
    suffixes: list[str] = []
    counts = dict.fromkeys((lang.Conv, lang.Depthwise, lang.Filter, lang.Nested), 0)
    for layer in layers:
        kind = type(layer)
        counts[kind] = counts.get(kind, 0) + 1
        if isinstance(layer, lang.Conv) and suffixes and suffixes[-1] == "depthwise" and convs == 1:
            suffixes.append("pointwise")
        elif isinstance(layer, lang.Conv):
            suffixes.append("weight" if convs == 1 else f"conv{counts[kind]}")
        elif isinstance(layer, lang.Nested):
            suffixes.append(f"block{counts[kind]}")
        else:
            suffixes.append(kind.__name__.lower() + (str(counts[kind]) if counts[kind] > 1 else ""))
    return suffixes


# --- terms ------------------------------------------------------------------------------------------------------------


def _block(terms: tuple[Term, ...], spec: ConvSpec, scales: Operand | None = None) -> Block:
    return Block(spec.out_channels, spec.in_channels, spec.kernel_size, terms, spec.groups, scales)


def _term(stages: tuple[Stage, ...], spec: ConvSpec, scale: int | None = None) -> Term:
    """Return a sequence of stages as a term: one of the four fused forms where it matches, else a fold from the left."""
    first, last = stages[0], stages[-1]
    if len(stages) == 1:
        if isinstance(first, ConvStage) and not first.identity:
            if first.kernel_size == (1, 1) and spec.kernel_size != (1, 1):
                return PointwiseFilter(first.weight, IMPULSE, scale)
            return Dense(first.weight, scale)
        if isinstance(first, DepthwiseStage):
            return Separable(first.weight, None, scale)
        if isinstance(first, FilterStage):
            return PointwiseFilter(None, first.filter, scale)
        return Dense(_factor(stages, spec), scale)
    if len(stages) == 2:
        if _is_pointwise(first) and isinstance(last, FilterStage):
            return PointwiseFilter(first.weight, last.filter, scale)
        if isinstance(first, DepthwiseStage) and _is_pointwise(last):
            return Separable(first.weight, last.weight, scale)
        if isinstance(first, ConvStage) and first.identity:
            middle = replace(spec, in_channels=first.weight.shape[0])
            return Composed(first.weight, _factor((last,), middle), True, scale)
    middle_channels = channels_out(stages[:-1], spec.in_channels)
    head = _factor(stages[:-1], replace(spec, out_channels=middle_channels))
    tail = _factor(stages[-1:], replace(spec, in_channels=middle_channels))
    return Composed(head, tail, False, scale)


def _is_pointwise(stage: Stage) -> TypeGuard[ConvStage]:
    return isinstance(stage, ConvStage) and stage.kernel_size == (1, 1) and not stage.identity


def _factor(stages: tuple[Stage, ...], spec: ConvSpec) -> Operand | Block:
    """Return a factor of a composition: an operand where one is enough, else a nested block."""
    stage = stages[0]
    spec = replace(spec, kernel_size=_composed_size(stages), stride=(1, 1))
    if len(stages) == 1 and isinstance(stage, NestedStage):
        return stage.lowered.plan
    if len(stages) == 1 and isinstance(stage, ConvStage):
        if stage.identity:
            return _block((Dense(stage.weight), PointwiseFilter(None, IMPULSE)), spec)
        return stage.weight
    return _block((_term(stages, spec),), spec)


def _composed_size(stages: Sequence[Stage]) -> Size:
    """Return the kernel size of stages in sequence."""
    return 1 + sum(s.kernel_size[0] - 1 for s in stages), 1 + sum(s.kernel_size[1] - 1 for s in stages)


def channels_out(stages: Sequence[Stage], channels: int) -> int:
    """Return the number of channels after stages that get ``channels``."""
    for stage in stages:
        if isinstance(stage, ConvStage | DepthwiseStage):
            channels = stage.weight.shape[0]
        elif isinstance(stage, NestedStage):
            channels = stage.lowered.spec.out_channels
    return channels
