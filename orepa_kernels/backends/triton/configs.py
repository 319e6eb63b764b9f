"""Tile sizes per kind of block, precision and GPU, chosen by the issue slots that the compiled main loops take per product.

No main loop spills registers (tests compile them all); what comes before and after may, a little. The rules look at shapes
alone, so the same block gets the same tiles, and the same bits, every time. Large tiles read each operand less often; they
are for work that fills the GPU with them, and the rest takes small ones. With tuning on, the clock decides between the same
tiles instead (`autotune`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import TypeVar

from ...plan import Block
from .spec import Spec

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

# Hopper's asynchronous products want 64 rows and as many columns as there are; with 8 warps, those of three TF32 products
# that correct the first one would be computed twice.
FORWARD = {True: Forward(64, 32, 32, 3, 4, 3), False: Forward(32, 64, 16, 3, 4, 3)}
#: for one product, larger ones, which read less
FORWARD_LARGE = Forward(64, 64, 32, 3, 8, 3)
#: one tap at a time: 1x1 kernels, and two kxk ones in sequence
FORWARD_TAP = Forward(64, 64, 32, 1, 4, 3)
FORWARD_SMALL = Forward(16, 32, 32, 3, 4, 3)
BACKWARD = {
    True: Backward(64, 32, 32, 3, 64, 64, 32, 16, 64, 4, 128, 64, 4, 3),
    False: Backward(32, 64, 16, 3, 64, 64, 32, 16, 64, 4, 128, 64, 4, 3),
}
BACKWARD_LARGE = Backward(64, 64, 32, 3, 128, 64, 32, 16, 64, 4, 128, 64, 8, 3)
BACKWARD_SMALL = Backward(16, 32, 32, 3, 32, 32, 32, 8, 64, 4, 64, 32, 4, 2)

#: taps up to which a separable term's gradients are summed with SO rows in flight; then two, one element per thread
_FEW_TAPS = 9


def forward_choices(spec: Spec, arch: int, precision: str) -> tuple[Forward, ...]:
    """Return the tiles for a structure, largest first.

    Args:
        spec: the structure.
        arch: NVIDIA's; 0 elsewhere, where large tiles would spill.
        precision: of products, see `device.Device.precision`.
    """
    taps = 1 if _one_tap(spec) else FORWARD_SMALL.TAPS
    small = replace(FORWARD_SMALL, TAPS=taps)
    if arch == 0:
        return (small,)
    if taps == 1:
        return FORWARD_TAP, small
    large = [FORWARD_LARGE] * (arch == _HOPPER and precision != "tf32x3")
    return *large, FORWARD[arch == _HOPPER], small


def backward_choices(spec: Spec, arch: int, precision: str) -> tuple[Backward, ...]:
    """Return the tiles for a structure, largest first; see `forward_choices`."""
    large = (BACKWARD_LARGE,) if arch == _HOPPER and precision != "tf32x3" else ()
    tiles = (BACKWARD_SMALL,) if arch == 0 else (*large, BACKWARD[arch == _HOPPER], BACKWARD_SMALL)
    changes = {}
    if max((branch.height2 * branch.width2 for branch in spec.terms), default=1) == 1:
        changes["TAPS"] = 1
    if any(branch.kind == "separable" and branch.height * branch.width > _FEW_TAPS for branch in spec.terms):
        changes["SO"] = 2
    return tuple([replace(tile, **changes) for tile in tiles])


def largest_filling(blocks: Sequence[Block], choices: Sequence[Config]) -> Config:
    """Return the heuristic's choice: the first of the tiles of which the kernels of blocks have enough for a GPU."""
    for tile in choices[:-1]:
        width, programs = tile.BI if isinstance(tile, Forward) else tile.BM, 0
        for block in blocks:
            out, per_group, *taps = block.shape
            grid = (-(-(out // block.groups) // tile.BO), -(-per_group // width), -(-prod(taps) // tile.TAPS))
            programs += block.groups * prod(grid)
        if programs >= _FILLED:
            return tile
    return choices[-1]


def _one_tap(spec: Spec) -> bool:
    """Return whether taps have nothing to share: there is one, or a sequence does not begin with a 1x1 kernel."""
    return spec.height * spec.width == 1 or any(branch.height1 * branch.width1 > 1 for branch in spec.terms)
