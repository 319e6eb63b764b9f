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
    """A convolution with kernel ``[M, I/g, kh, kw]``, plus the identity where ``identity``.

    A dilated one has a smaller parameter of the same name: the kernel has zeros between its taps.
    """

    weight: Operand
    kernel_size: Size
    dilation: Size
    identity: bool


@dataclass(frozen=True)
class DepthwiseStage:
    """A depthwise convolution with kernel ``[I*E, 1, kh, kw]``, dilated as a `ConvStage`."""

    weight: Operand
    kernel_size: Size
    dilation: Size


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


@dataclass(frozen=True)
class NormStep:
    """A norm of ``channels`` channels. ``name`` is that of the submodule."""

    name: str
    channels: int


Stage: TypeAlias = ConvStage | DepthwiseStage | FilterStage | NestedStage
Step: TypeAlias = Stage | NormStep


@dataclass(frozen=True)
class ResolvedBranch:
    """A branch with its channels, names and sizes resolved."""

    name: str
    steps: tuple[Step, ...]
    stages: tuple[Stage, ...]  # the steps without the norms
    kernel_size: Size  # of the stages in sequence
    scale: int | None  # row of the scales


@dataclass
class Lowered:
    """The result of `lower`. ``topology`` is its argument with nested blocks as constants, which pickles."""

    spec: ConvSpec
    prefix: str
    branches: list[ResolvedBranch] = field(default_factory=list)
    parameters: dict[str, tuple[tuple[int, ...], Init]] = field(default_factory=dict)
    #: of the operands that are dilated parameters, nested blocks included
    dilations: dict[str, Size] = field(default_factory=dict)
    constants: dict[str, tuple[int, Size, lang.Filter]] = field(default_factory=dict)
    children: dict[str, Lowered] = field(default_factory=dict)
    scale_values: list[float] = field(default_factory=list)
    scales: Operand | None = None
    numbers: list[int] | None = None  # of `orepa.topology.fingerprint`, once they have been asked for
    plan: Block = field(init=False)
    topology: Topology = field(init=False)


def lower(topology: Topology, spec: ConvSpec, scaling: str = "vector", prefix: str = "") -> Lowered:
    """Resolve a topology for one convolution.

    Args:
        topology: its norms are steps of the branches, but not part of the plan.
        spec: the convolution.
        scaling: ``"vector"`` for one scale per branch and channel, ``"scalar"`` for one per branch, ``"none"``.
        prefix: of operand names in a nested block.

    Raises:
        ValueError: an unknown scaling, or a branch that does not fit the convolution; the message names it.
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
        steps = _resolve(result, name, branch, scaling)
        stages = tuple(step for step in steps if not isinstance(step, NormStep))
        size = _composed_size(stages)
        check_alignment(size, spec.kernel_size, f"branch {name!r}")
        result.branches.append(ResolvedBranch(name, steps, stages, size, scale))
        branches[name] = _with_constants(branch, steps)
    result.topology = Topology(**branches)
    if result.scale_values:
        columns = spec.out_channels if scaling == "vector" else 1
        result.scales = Operand(f"{prefix}scales", (len(result.scale_values), columns))
    terms = tuple(_term(branch.stages, spec, branch.scale) for branch in result.branches)
    result.plan = _block(terms, spec, result.scales)
    return result


def _resolve(result: Lowered, name: str, branch: Branch, scaling: str) -> tuple[Step, ...]:
    spec, prefix, channels = result.spec, result.prefix, result.spec.in_channels
    steps: list[Step] = []

    def kernel_of(
        layer: lang.Conv | lang.Depthwise, taps: Size, suffix: str, rows: int, columns: int
    ) -> tuple[Operand, Size, Size]:
        """Add a parameter. Return its kernel, the kernel's size, and the dilation, which means nothing to a single tap."""
        height, width = pair(layer.dilation, "dilation")
        dilation = (height if taps[0] > 1 else 1, width if taps[1] > 1 else 1)
        size = (dilation[0] * (taps[0] - 1) + 1, dilation[1] * (taps[1] - 1) + 1)
        kernel = Operand(f"{prefix}{name}_{suffix}", (rows, columns, *size))
        result.parameters[f"{name}_{suffix}"] = ((rows, columns, *taps), layer.init)
        if dilation != (1, 1):
            result.dilations[kernel.name] = dilation
        return kernel, size, dilation

    for index, (layer, suffix) in enumerate(zip(branch.layers, _suffixes(branch.layers), strict=True)):
        out = _channels_after(layer, channels, spec)
        if out % spec.groups:
            raise ValueError(f"branch {name!r}: groups={spec.groups} must divide the {out} channels of layer {index}")
        if isinstance(layer, lang.Norm):
            steps.append(NormStep(f"{name}_{suffix}", channels))
        elif isinstance(layer, lang.Identity):
            steps.append(FilterStage(IMPULSE, (1, 1)))
        else:
            kernel = pair(layer.kernel_size)
            if isinstance(layer, lang.Conv):
                if layer.identity and kernel != (1, 1):
                    raise ValueError(f"branch {name!r}: a convolution plus identity must be 1x1, got {kernel}")
                steps.append(ConvStage(*kernel_of(layer, kernel, suffix, out, channels // spec.groups), layer.identity))
            elif isinstance(layer, lang.Depthwise):
                steps.append(DepthwiseStage(*kernel_of(layer, kernel, suffix, out, 1)))
            elif isinstance(layer, lang.AvgPool):
                steps.append(FilterStage(Average(kernel), kernel))
            elif isinstance(layer, lang.Nested):
                child = f"{name}_{suffix}"
                child_spec = ConvSpec(channels, out, kernel, spec.groups)
                nested = lower(layer.topology(child_spec), child_spec, scaling, f"{prefix}{child}.")
                result.children[child] = nested
                result.dilations |= nested.dilations
                steps.append(NestedStage(child, nested, kernel))
            else:
                constant = f"{name}_{suffix}"
                rows, *size = layer.values(channels, kernel).shape
                if tuple(size) != kernel or rows not in (1, channels):
                    raise ValueError(
                        f"branch {name!r}: a filter's values must be [1 or {channels}, {kernel[0]}, {kernel[1]}], "
                        f"got {[rows, *size]}"
                    )
                result.constants[constant] = (channels, kernel, layer)
                steps.append(FilterStage(Operand(f"{prefix}{constant}", (rows, *kernel)), kernel))
        channels = out
    if channels != spec.out_channels:
        raise ValueError(f"branch {name!r} ends with {channels} channels, the block has {spec.out_channels}")
    return tuple(steps)


def _with_constants(branch: Branch, steps: tuple[Step, ...]) -> Branch:
    """Replace the declarations of nested blocks by their results."""

    def replaced(layer: lang.Layer, step: Step) -> lang.Layer:
        if not isinstance(step, NestedStage):
            return layer
        block = step.lowered
        return lang.Nested(constant_declaration(block.topology), block.spec.kernel_size, block.spec.out_channels)

    return Branch(*map(replaced, branch.layers, steps), scale=branch.scale)


def _channels_after(layer: lang.Layer, channels: int, spec: ConvSpec) -> int:
    if isinstance(layer, lang.Conv | lang.Nested):
        return spec.out_channels if layer.out_channels is None else layer.out_channels
    return channels * layer.expand if isinstance(layer, lang.Depthwise) else channels


def _suffixes(layers: tuple[lang.Layer, ...]) -> list[str]:
    """Name each layer's parameters: by the field's names where there are any, by numbers otherwise."""
    kinds = [lang.Conv if isinstance(layer, lang.Conv) else type(layer) for layer in layers]
    suffixes: list[str] = []
    linear_before = ""  # suffix of the last layer that is no norm
    for index, kind in enumerate(kinds):
        total, number = kinds.count(kind), 1 + kinds[:index].count(kind)
        if kind is lang.Norm:
            suffixes.append("bn" if total == 1 else f"bn{number}")
            continue
        if kind is lang.Conv:
            several = f"conv{number}" if total > 1 else "weight"
            suffixes.append("pointwise" if linear_before == "depthwise" and total == 1 else several)
        elif kind is lang.Nested:
            suffixes.append(f"block{number}")
        else:
            suffixes.append(kind.__name__.lower() + (str(number) if number > 1 else ""))
        linear_before = suffixes[-1]
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
    middle_channels = _channels_out(stages[:-1], spec.in_channels)
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


def _channels_out(stages: Sequence[Stage], channels: int) -> int:
    for stage in stages:
        if isinstance(stage, ConvStage | DepthwiseStage):
            channels = stage.weight.shape[0]
        elif isinstance(stage, NestedStage):
            channels = stage.lowered.spec.out_channels
    return channels
