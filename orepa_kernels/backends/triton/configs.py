"""Tile sizes per kind of block and GPU. Only what compiles without spilling registers is here (tests compile them all).

The rules look at shapes alone, so the same block gets the same tiles, and the same bits, every time. Large tiles read each
operand less often; they are for work that fills the GPU with them, and the rest takes small ones. With tuning on, the
clock decides between the same tiles instead (`autotune`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import TypeVar

from ...plan import Block
from .spec import ABSENT, Spec

#: least number of tiles for which a launch takes large ones: one per multiprocessor, roughly
_FILLED = 96


@dataclass(frozen=True)
class Forward:
    """Tile of a forward program: BO output x BI input channels x TAPS taps, BM internal channels at a time."""

    BO: int
    BI: int
    BM: int
    TAPS: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class Backward:
    """Tiles of the roles of a backward program: of ``second`` BO x BM x TAPS, BI input channels at a time; of ``first``
    FM x FI, FO output channels at a time; of element-wise terms EO x EI; of separable ones ROWS x SC, SO rows at a time."""

    BO: int
    BM: int
    BI: int
    TAPS: int
    FM: int
    FI: int
    FO: int
    EO: int
    EI: int
    SO: int
    SC: int
    ROWS: int
    num_warps: int
    num_stages: int


Config = TypeVar("Config", Forward, Backward)

_HOPPER = 90
_X = 3  # the last dimension of a view

#: by whether matrix products are Hopper's asynchronous ones (sm_90), which want 64 rows
FORWARD_LARGE = {True: Forward(64, 32, 32, 3, 8, 3), False: Forward(32, 64, 32, 3, 8, 3)}
#: one tap at a time: 1x1 kernels, and two kxk ones in sequence
FORWARD_TAP = Forward(64, 64, 32, 1, 8, 3)
FORWARD_SMALL = Forward(16, 32, 32, 3, 4, 3)
BACKWARD_LARGE = {
    True: Backward(64, 64, 16, 3, 64, 64, 32, 16, 64, 4, 128, 64, 8, 3),
    False: Backward(32, 64, 32, 3, 64, 64, 32, 16, 64, 4, 128, 64, 8, 3),
}
BACKWARD_SMALL = Backward(16, 32, 32, 3, 32, 32, 32, 8, 64, 4, 64, 32, 4, 2)

#: taps up to which a separable term's gradients are summed with SO rows in flight; then two, one element per thread
_FEW_TAPS = 9


def forward_choices(spec: Spec, arch: int) -> tuple[Forward, ...]:
    """Return the tiles for a structure, largest first.

    Args:
        spec: the structure.
        arch: NVIDIA's; 0 elsewhere, where large tiles would spill.
    """
    taps = 1 if _one_tap(spec) else FORWARD_SMALL.TAPS
    small = replace(FORWARD_SMALL, TAPS=taps)
    if arch == 0:
        return (small,)
    large = FORWARD_TAP if taps == 1 else FORWARD_LARGE[arch == _HOPPER]
    if arch != _HOPPER and taps > 1 and _multiplies_halves(spec):
        large = replace(large, num_stages=2)  # with one more, Triton 3.7 spills
    return large, small


def backward_choices(spec: Spec, arch: int) -> tuple[Backward, ...]:
    """Return the tiles for a structure, largest first; see `forward_choices`."""
    large, small = BACKWARD_LARGE[arch == _HOPPER], BACKWARD_SMALL
    if max((branch.height2 * branch.width2 for branch in spec.terms), default=1) == 1:
        large, small = replace(large, TAPS=1), replace(small, TAPS=1)
    if any(branch.kind == "separable" and branch.height * branch.width > _FEW_TAPS for branch in spec.terms):
        large, small = replace(large, SO=2), replace(small, SO=2)
    if _taps_innermost(spec):  # larger ones spill, with one version of Triton or another
        if arch == _HOPPER:
            large, small = replace(large, BM=32), replace(small, FO=16)
        else:
            large = replace(large, BI=16, EO=8)
    return (small,) if arch == 0 else (large, small)


def forward_config(blocks: Sequence[Block], spec: Spec, arch: int) -> Forward:
    """Return the heuristic's choice: the largest forward tile that fills the GPU."""
    choices = forward_choices(spec, arch)
    return _largest_filling(blocks, choices, [tile.BI for tile in choices])


def backward_config(blocks: Sequence[Block], spec: Spec, arch: int) -> Backward:
    """Return the heuristic's choice: the largest backward tiles that fill the GPU."""
    choices = backward_choices(spec, arch)
    return _largest_filling(blocks, choices, [tile.BM for tile in choices])


def _largest_filling(blocks: Sequence[Block], choices: Sequence[Config], widths: Sequence[int]) -> Config:
    """Return the first of the tiles, BO x ``width`` x TAPS large, of which the kernels of blocks have enough."""
    for tile, width in zip(choices[:-1], widths, strict=False):
        programs = 0
        for block in blocks:
            out, per_group, *taps = block.shape
            grid = (-(-(out // block.groups) // tile.BO), -(-per_group // width), -(-prod(taps) // tile.TAPS))
            programs += block.groups * prod(grid)
        if programs >= _FILLED:
            return tile
    return choices[-1]


def _taps_innermost(spec: Spec) -> bool:
    """Return whether kernels are contiguous, not channels_last: their addresses along channels take more registers."""
    slots = {spec.upstream, *(slot for branch in spec.terms for slot in (branch.second, branch.d_second))}
    return any(spec.views[slot].unit == _X for slot in slots if slot != ABSENT)


def _multiplies_halves(spec: Spec) -> bool:
    """Return whether there are matrix products of tensors in half precision."""
    factors = [slot for branch in spec.terms for slot in (branch.first, branch.second) if slot != ABSENT]
    return any(spec.views[slot].dtype in ("bfloat16", "float16") for slot in factors)


def _one_tap(spec: Spec) -> bool:
    """Return whether taps have nothing to share: there is one, or a sequence of two kernels larger than 1x1."""
    return spec.height * spec.width == 1 or any(
        branch.height1 * branch.width1 > 1 and branch.height2 * branch.width2 > 1 for branch in spec.terms
    )
