"""The cheapest order: one branch of a block runs on feature maps, the others are squeezed.

A sequence of convolutions can be squeezed before the convolution, for a price that grows with the channels, or run on the
block's input, for a price that grows with the pixels. `split_block` finds the branch of a block for which this matters most,
`SplitBlock.run` runs it, and `prefers_branch` says where that is the cheaper order.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from orepa_kernels import Block, autocast_dtype
from orepa_kernels.guards import is_dispatched
from orepa_kernels.reference import identity

from ..topology.language import Size
from ..topology.lowering import ConvStage, Lowered, ResolvedBranch
from .linear_block import insert_zeros

if TYPE_CHECKING:
    from .conv_base import ConvBlock

ORDERS = ("auto", "squeeze", "branch")

Borders: TypeAlias = tuple[int, int, int, int]  # left, right, top, bottom


def check_order(order: str) -> None:
    """Raise ValueError for anything but one of `ORDERS`."""
    if order not in ORDERS:
        raise ValueError(f"order must be one of {', '.join(ORDERS)}, got {order!r}")


@dataclass(frozen=True, eq=False)
class SplitBlock:
    """A block in two parts. Operands are named by their places among those of the whole plan.

    Args:
        name: of the branch.
        products: of squeezing the branch.
        stages: its layers, each behind the place of its weight.
        kernel_size: of the branch.
        scales: the place of the scales and the branch's row in them, or None where it is not scaled.
        rest: the plan of the other branches. Its scales keep their rows.
        places: of the operands of ``rest``.
    """

    name: str
    products: int
    stages: tuple[tuple[int, ConvStage], ...]
    kernel_size: Size
    scales: tuple[int, int] | None
    rest: Block
    places: tuple[int, ...]

    @property
    def ends(self) -> tuple[int, int]:
        """The layers with the padding and with the stride: the first and the last of several taps.

        Zeros stay zeros in a layer of one tap, which also needs only the pixels that a later stride picks.
        """
        taps = [index for index, (_, stage) in enumerate(self.stages) if stage.kernel_size != (1, 1)]
        return (taps[0], taps[-1]) if taps else (0, 0)

    def run(self, block: ConvBlock, tensors: Sequence[Tensor], x: Tensor) -> Tensor:
        """Run the branch on the input of its block.

        Args:
            block: whose branch this is.
            tensors: at `LinearBlock.sources`.
            x: ``[N, I, H, W]`` or ``[I, H, W]``, padded where the padding is not of zeros.

        Returns:
            What the branch adds to the output of the block.
        """
        outer = block.borders if block.padding_mode == "zeros" else (0, 0, 0, 0)
        left, right, top, bottom = self.own_borders(outer, block.dilation)
        padding = (top, left)
        if (left, top) != (right, bottom) or min(padding) < 0:
            x, padding = F.pad(x, (left, right, top, bottom)), (0, 0)
        first, last = self.ends
        scale = None if self.scales is None else tensors[self.scales[0]][self.scales[1]]
        for index, (place, stage) in enumerate(self.stages):
            weight = tensors[place]
            if stage.identity:
                weight = weight + identity(weight.shape[0], weight.shape[1], weight)
            if scale is not None and stage is self.stages[-1][1] and _has_fewer_weights(weight, x):
                weight, scale = weight * scale.view(-1, 1, 1, 1), None
            dilation = (block.dilation[0] * stage.dilation[0], block.dilation[1] * stage.dilation[1])
            strides, borders = block.stride if index == last else (1, 1), padding if index == first else (0, 0)
            x = _convolve(x, weight, strides, borders, dilation, block.groups)
        return x if scale is None else x * scale.to(x.dtype).view(-1, 1, 1)

    def own_borders(self, borders: Borders, dilation: Size) -> Borders:
        """Return the borders of the branch in a block with these: centred, a smaller kernel sees less of them."""
        rows, columns = (
            (k - b) // 2 * d for k, b, d in zip(self.rest.kernel_size, self.kernel_size, dilation, strict=True)
        )
        left, right, top, bottom = borders
        return (left - columns, right - columns, top - rows, bottom - rows)

    def rest_operands(self, block: ConvBlock, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return the operands of `rest`, of the tensors at `LinearBlock.sources`."""
        dilations = block._dilations
        return [insert_zeros(tensors[p], dilations[p]) if p in dilations else tensors[p] for p in self.places]


def _convolve(x: Tensor, weight: Tensor, stride: Size, padding: Size, dilation: Size, groups: int) -> Tensor:
    """Return `F.conv2d`: of few and small images on a CPU as one matrix product, which is up to 4 times as fast there."""
    if groups > 1 or not x.is_cpu or x.dim() < 4 or _has_fewer_weights(weight, x) or x.shape[2] * x.shape[3] >= 64:
        return F.conv2d(x, weight, None, stride, padding, dilation, groups)
    sides = zip(x.shape[2:], weight.shape[2:], stride, padding, dilation, strict=True)
    size = [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in sides]
    columns = F.unfold(x, weight.shape[2:], dilation, padding, stride)  # [N, C * taps, pixels]
    product = weight.flatten(1) @ columns.transpose(0, 1).flatten(1)
    return product.view(len(weight), len(x), *size).transpose(0, 1)


def _has_fewer_weights(weight: Tensor, x: Tensor) -> bool:
    """Return whether an output channel has fewer weights than pixels."""
    return torch.compiler.is_compiling() or weight[0].numel() < x.numel() // x.shape[-3]


def split_block(lowered: Lowered) -> SplitBlock | None:
    """Return a block in two parts: the sequence of plain convolutions that costs most to squeeze, and all else.

    None where there is no such sequence, or nothing else to squeeze.
    """
    plan, candidates = lowered.plan, dict[int, int]()
    for index, branch in enumerate(lowered.branches):
        if len(branch.stages) > 1 and all(isinstance(stage, ConvStage) for stage in branch.stages):
            candidates[index] = _squeeze_products(branch, plan)
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
        candidates[index],
        tuple((places[stage.weight.name], stage) for stage in branch.stages if isinstance(stage, ConvStage)),
        branch.kernel_size,
        None if branch.scale is None or plan.scales is None else (places[plan.scales.name], branch.scale),
        rest,
        tuple(places[operand.name] for operand in rest.operands),
    )


def _squeeze_products(branch: ResolvedBranch, plan: Block) -> int:
    """Return the products of squeezing a sequence of convolutions, folded from the input on."""
    products, height, width = 0, 0, 0
    for stage in branch.stages:
        assert isinstance(stage, ConvStage)
        rows, columns, kh, kw = stage.weight.shape
        products += rows * columns * (plan.in_channels // plan.groups) * kh * kw * height * width  # 0 for the first
        height, width = max(height, 1) + kh - 1, max(width, 1) + kw - 1
    return products


# --- the cheaper order --------------------------------------------------------------------------------------------------


class Rates(NamedTuple):
    """How fast a kind of device is."""

    squeezed: float  # products per second
    convolved: float  # products per second
    moved: float  # bytes per second
    calls: float  # operations per second

    def squeeze(self, work: Work) -> float:
        """Return the seconds of a squeeze."""
        return work.products / self.squeezed + work.moved / self.moved + work.calls / self.calls

    def convolve(self, work: Work) -> float:
        """Return the seconds of convolutions."""
        return work.products / self.convolved + work.moved / self.moved + work.calls / self.calls


#: By kind of device (all but CPUs count as GPUs) and whether convolutions are in half precision. Those of CPUs were fitted by
#: benchmarks/branch_order.py (benchmarks/results/cpu/branch_order.json) on an AMD EPYC without AVX-512. It emulates bfloat16,
#: for which the rate of convolutions is a rough one, from a single input. Those of GPUs are estimates, about half of the H100's
#: peak rates: nothing has been measured there.
RATES = {
    ("cpu", False): Rates(44e9, 35e9, 4.6e9, 1e5),
    ("cpu", True): Rates(44e9, 1.5e9, 4.6e9, 1e5),
    ("cuda", False): Rates(28e12, 120e12, 2e12, 2e5),
    ("cuda", True): Rates(28e12, 250e12, 2e12, 2e5),
}
#: A branch runs on feature maps where that costs less than this share of its squeeze. Rates differ by more from machine to
#: machine, and a branch on feature maps saves an intermediate for the backward pass.
MARGIN = 0.85


class Work(NamedTuple):
    """What a branch costs, forward and backward."""

    products: int
    moved: int  # bytes
    calls: int  # operations


def squeeze_work(split: SplitBlock) -> Work:
    """Return what the branch of a block costs in the squeeze.

    That is three products of matrices, the kernel and the gradients of both weights. They go through all weights, and once per
    64 output channels, which is about what a cache or a tile holds, through the first one.
    """
    weights = 4 * sum(math.prod(stage.weight.shape) for _, stage in split.stages)
    again = 3 * split.products // (64 * math.prod(split.kernel_size))
    return Work(3 * split.products, 4 * (weights + again), 0)


def branch_work(
    split: SplitBlock, shape: tuple[int, ...], stride: Size, dilation: Size, borders: Borders, itemsize: int
) -> Work:
    """Return what the branch of a block costs on an input of a shape.

    Each layer has three products: its own, and those of the gradients of its input and its weight. Each of them reads two
    tensors and writes one. Outputs are added to those of the other branches, and so are gradients of the input.
    """
    images, channels, (height, width) = math.prod(shape[:-3]), shape[-3], shape[-2:]
    left, right, top, bottom = split.own_borders(borders, dilation)
    first, last = split.ends
    products, weights, weight = 0, 0, 0
    values = [images * channels * height * width]
    for index, (_, stage) in enumerate(split.stages):
        channels, columns, kh, kw = stage.weight.shape
        if index == first:
            height, width = height + top + bottom, width + left + right
        height, width = height - (kh - 1) * dilation[0], width - (kw - 1) * dilation[1]
        if index == last:
            height, width = (height - 1) // stride[0] + 1, (width - 1) // stride[1] + 1
        # Dilated kernels have fewer taps than their size.
        weight = channels * columns * math.prod((k - 1) // d + 1 for k, d in zip((kh, kw), stage.dilation, strict=True))
        weights += weight
        products += 3 * weight * images * height * width
        values.append(images * channels * height * width)
    scaled = 6 * min(weight, values[-1]) if split.scales is not None else 0
    return Work(products, itemsize * (6 * sum(values) + scaled) + 4 * 6 * weights, 3 * len(split.stages) + 6)


def prefers_branch(block: ConvBlock, split: SplitBlock, x: Tensor, uses: int = 1) -> bool:
    """Return whether the branch of a split block costs less on feature maps than in the squeeze.

    The answer depends on shapes, dtype and kind of device only, so it is the same in all processes.

    Args:
        block: whose branch this is.
        split: the block in two parts.
        x: the input of the block.
        uses: forwards that share one squeeze.
    """
    if torch.compiler.is_compiling() or torch._C._is_tracing():
        return False
    if is_dispatched() and any(type(size) is not int for size in x.shape):  # symbols of a tracer
        return False
    # Asking for the name of a device costs more than all else.
    autocast = autocast_dtype("cpu" if x.is_cpu else "cuda" if x.is_cuda else x.device.type)
    half, kind = (autocast or x.dtype).itemsize < 4, "cpu" if x.is_cpu else "cuda"
    return _prefers_branch(split, tuple(x.shape), block.stride, block.dilation, block.borders, half, kind, uses)


@functools.lru_cache(maxsize=4096)
def _prefers_branch(
    split: SplitBlock,
    shape: tuple[int, ...],
    stride: Size,
    dilation: Size,
    borders: Borders,
    half: bool,
    kind: str,
    uses: int,
) -> bool:
    rates = RATES[kind, half]
    branch = rates.convolve(branch_work(split, shape, stride, dilation, borders, 2 if half else 4))
    return branch < MARGIN * rates.squeeze(squeeze_work(split)) / uses
