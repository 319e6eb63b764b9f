"""A branch with norms, resolved for feature maps: what `orepa.modules.offline_conv` runs, as plain data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import torch.nn.functional as F
from torch import Tensor

from orepa_kernels import Operand

from ..topology.language import Branch, Nested, Norm, Size, Topology
from ..topology.lowering import ConvStage, DepthwiseStage, FilterStage, Lowered, NestedStage, ResolvedBranch, Stage

#: a linear layer, or the name of the batch norm that stands there
Step: TypeAlias = Stage | str
#: left, right, top, bottom, as `torch.nn.functional.pad` counts; negative ones crop
Margins: TypeAlias = tuple[int, int, int, int]


@dataclass(frozen=True)
class OfflineBranch:
    """A branch and its place in the block.

    Args:
        steps: from input to output.
        last: index of the last linear layer, which takes the stride.
        pad_at: index of the step before which ``margins`` are due: the first layer larger than 1x1.
        margins: the block's padding, less what centre alignment crops.
        norms: name and channels of every norm, in order.
        scale: row of the scales, or None.
    """

    steps: tuple[Step, ...]
    last: int
    pad_at: int
    margins: Margins
    norms: tuple[tuple[str, int], ...]
    scale: int | None


def resolve_branches(
    topology: Topology, lowered: Lowered, borders: Margins, dilation: Size
) -> tuple[OfflineBranch, ...]:
    """Put the norms of a topology back where they were declared.

    Args:
        topology: with its norms; see `Topology.offline`.
        lowered: the same without.
        borders: padding of the block's input: left, right, top, bottom.
        dilation: of every layer.

    Raises:
        ValueError: norms inside a nested block.
    """
    _refuse_nested_norms(topology, lowered)
    found = []
    for (_, branch), resolved in zip(topology, lowered.branches, strict=True):
        steps, norms = _steps(branch, resolved, lowered.spec.in_channels)
        sizes = {i: step.kernel_size for i, step in enumerate(steps) if not isinstance(step, str)}
        # Where no layer looks around, the input is padded: a 1x1 of zeros is what is left of the border.
        pad_at = next((i for i, size in sizes.items() if size != (1, 1)), 0)
        blocks = zip(lowered.spec.kernel_size, resolved.kernel_size, dilation, strict=True)
        height, width = ((k - b) // 2 * d for k, b, d in blocks)
        left, right, top, bottom = borders
        margins = (left - width, right - width, top - height, bottom - height)
        found.append(OfflineBranch(steps, max(sizes), pad_at, margins, norms, resolved.scale))
    return tuple(found)


def _steps(
    branch: Branch, resolved: ResolvedBranch, channels: int
) -> tuple[tuple[Step, ...], tuple[tuple[str, int], ...]]:
    several = sum(isinstance(layer, Norm) for layer in branch.layers) > 1
    stages = iter(resolved.stages)
    steps: list[Step] = []
    norms: list[tuple[str, int]] = []
    for layer in branch.layers:
        if isinstance(layer, Norm):
            norms.append((f"{resolved.name}_bn{len(norms) + 1 if several else ''}", channels))
            steps.append(norms[-1][0])
            continue
        stage = next(stages)
        steps.append(stage)
        if isinstance(stage, NestedStage):
            channels = stage.lowered.spec.out_channels
        elif not isinstance(stage, FilterStage):
            channels = stage.weight.shape[0]
    return tuple(steps), tuple(norms)


def _refuse_nested_norms(topology: Topology, lowered: Lowered) -> None:
    """Nested blocks are lowered without their norms, which must not go unnoticed."""
    for (name, branch), resolved in zip(topology, lowered.branches, strict=True):
        linear = (layer for layer in branch.layers if not isinstance(layer, Norm))
        for layer, stage in zip(linear, resolved.stages, strict=True):
            if isinstance(layer, Nested) and isinstance(stage, NestedStage):
                child = layer.topology(stage.lowered.spec)
                if any(isinstance(inner, Norm) for _, b in child for inner in b.layers):
                    raise ValueError(f"branch {name!r} nests a block with branch-wise norms, which cannot run offline")
                _refuse_nested_norms(child, stage.lowered)


def pads_zeros_itself(step: Step) -> bool:
    """Whether a step runs as one `torch.nn.functional.conv2d`, whose padding spares a padded copy of the map."""
    filtering = isinstance(step, FilterStage) and isinstance(step.filter, Operand)
    return filtering or isinstance(step, ConvStage | DepthwiseStage)


def pad(x: Tensor, margins: Margins, mode: str = "zeros", value: Tensor | None = None) -> Tensor:
    """Pad a map, or crop it where a margin is negative.

    Args:
        x: ``[N, C, H, W]``.
        margins: left, right, top, bottom.
        mode: a ``padding_mode`` of `torch.nn.Conv2d`.
        value: ``[C]``, with which to pad in mode ``"zeros"``; None is zero.
    """
    left, right, top, bottom = (max(-margin, 0) for margin in margins)
    grow = [max(margin, 0) for margin in margins]
    if any(grow):
        size = x.shape[2:]
        x = F.pad(x, grow, mode="constant" if mode == "zeros" else mode)
        if value is not None:
            # One addition for the whole frame: written in place, its four strips would copy the gradient four times.
            frame = F.pad(x.new_zeros(1, 1, *size), grow, value=1.0)
            x = x + value.to(x.dtype).view(1, -1, 1, 1) * frame
    return x[:, :, top : x.shape[2] - bottom, left : x.shape[3] - right]
