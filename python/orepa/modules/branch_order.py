"""The cheapest order: one branch of a block runs on feature maps, the others are squeezed.

A sequence of convolutions can be squeezed before the convolution, for a price that grows with the channels, or run on the
block's input, for a price that grows with the pixels. `split_block` finds the branch of a block for which this matters most,
`SplitBlock.run` runs it, and `prefers_branch` says where that is the cheaper order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from orepa_kernels import Block
from orepa_kernels.reference import identity

from ..topology.language import Size
from ..topology.lowering import ConvStage, Lowered, ResolvedBranch
from .linear_block import insert_zeros

if TYPE_CHECKING:
    from .conv_base import ConvBlock

ORDERS = ("auto", "squeeze", "branch")


@dataclass(frozen=True, eq=False)
class SplitBlock:
    """A block in two parts. Operands are named by their places among those of the whole plan.

    Args:
        name: of the branch.
        stages: its layers, each behind the place of its weight.
        kernel_size: of the branch.
        scales: the place of the scales and the branch's row in them, or None where it is not scaled.
        rest: the plan of the other branches. Its scales keep their rows.
        places: of the operands of ``rest``.
    """

    name: str
    stages: tuple[tuple[int, ConvStage], ...]
    kernel_size: Size
    scales: tuple[int, int] | None
    rest: Block
    places: tuple[int, ...]

    def run(self, block: ConvBlock, tensors: Sequence[Tensor], x: Tensor) -> Tensor:
        """Run the branch on the input of its block.

        Args:
            block: whose branch this is.
            tensors: at `LinearBlock.sources`.
            x: ``[N, I, H, W]`` or ``[I, H, W]``, padded where the padding is not of zeros.

        Returns:
            What the branch adds to the output of the block.
        """
        # Centre alignment: a smaller kernel sees less of the border.
        sizes = zip(block.kernel_size, self.kernel_size, block.dilation, strict=True)
        rows, columns = ((k - b) // 2 * d for k, b, d in sizes)
        outer = block.borders if block.padding_mode == "zeros" else (0, 0, 0, 0)
        left, right, top, bottom = (b - m for b, m in zip(outer, (columns, columns, rows, rows), strict=True))
        padding = (top, left)
        if (left, top) != (right, bottom) or min(padding) < 0:
            x, padding = F.pad(x, (left, right, top, bottom)), (0, 0)
        # Zeros stay zeros in layers of one tap, which also need only the pixels that a later stride picks.
        taps = [index for index, (_, stage) in enumerate(self.stages) if stage.kernel_size != (1, 1)]
        first, last = (taps[0], taps[-1]) if taps else (0, 0)
        scale = None if self.scales is None else tensors[self.scales[0]][self.scales[1]]
        for index, (place, stage) in enumerate(self.stages):
            weight = tensors[place]
            if stage.identity:
                weight = weight + identity(weight.shape[0], weight.shape[1], weight)
            if scale is not None and stage is self.stages[-1][1] and _is_smaller(weight, x):
                weight, scale = weight * scale.view(-1, 1, 1, 1), None
            x = F.conv2d(
                x,
                weight,
                None,
                block.stride if index == last else 1,
                padding if index == first else 0,
                (block.dilation[0] * stage.dilation[0], block.dilation[1] * stage.dilation[1]),
                block.groups,
            )
        return x if scale is None else x * scale.to(x.dtype).view(-1, 1, 1)

    def rest_operands(self, block: ConvBlock, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return the operands of `rest`, of the tensors at `LinearBlock.sources`."""
        dilations = block._dilations
        return [insert_zeros(tensors[p], dilations[p]) if p in dilations else tensors[p] for p in self.places]


def _is_smaller(weight: Tensor, x: Tensor) -> bool:
    """Return whether an output channel has fewer weights than pixels: what is cheaper to scale."""
    return torch.compiler.is_compiling() or weight[0].numel() < x.numel() // x.shape[-3]


def split_block(lowered: Lowered) -> SplitBlock | None:
    """Return a block in two parts: the sequence of plain convolutions that costs most to squeeze, and all else.

    None where there is no such sequence, or nothing else to squeeze.
    """
    plan, candidates = lowered.plan, dict[int, int]()
    for index, branch in enumerate(lowered.branches):
        if len(branch.stages) > 1 and all(isinstance(stage, ConvStage) for stage in branch.stages):
            candidates[index] = squeeze_products(branch, plan)
    if not candidates or len(plan.terms) == 1:
        return None
    index = max(candidates, key=candidates.__getitem__)
    terms = tuple(term for place, term in enumerate(plan.terms) if place != index)
    rest = replace(plan, terms=terms, scales=plan.scales if any(t.scale is not None for t in terms) else None)
    if not rest.operands:
        return None
    branch, places = lowered.branches[index], {operand.name: place for place, operand in enumerate(plan.operands)}
    return SplitBlock(
        branch.name,
        tuple((places[stage.weight.name], stage) for stage in branch.stages if isinstance(stage, ConvStage)),
        branch.kernel_size,
        None if branch.scale is None or plan.scales is None else (places[plan.scales.name], branch.scale),
        rest,
        tuple(places[operand.name] for operand in rest.operands),
    )


def squeeze_products(branch: ResolvedBranch, plan: Block) -> int:
    """Return the products of squeezing a sequence of convolutions, folded from the input on."""
    products, height, width = 0, 0, 0
    for stage in branch.stages:
        assert isinstance(stage, ConvStage)
        rows, columns, kh, kw = stage.weight.shape
        products += rows * columns * (plan.in_channels // plan.groups) * kh * kw * height * width  # 0 for the first
        height, width = max(height, 1) + kh - 1, max(width, 1) + kw - 1
    return products


def prefers_branch(block: ConvBlock, split: SplitBlock, x: Tensor) -> bool:
    """Return whether the branch of a split block costs less on feature maps than in the squeeze."""
    return False
