"""The forward kernel: the sum of a block's scaled, centred branches (paper Eq. 4), stored once.

A program computes BO output channels x BI input channels x TAPS taps of one kernel. Sequences (paper Eq. 3) are matrix products
over their internal channels; the TAPS products share one tile of the factor that is 1x1. Every other branch is added to
the same registers afterwards: no intermediate kernel is ever written.
"""

import triton
import triton.language as tl

from .access import channels, count_terms, field, locate, open_tile, outer, store, term
from .composed import add_composed
from .elementwise import add_dense, add_pointwise
from .separable import add_separable


@triton.jit
def squeeze_forward(addresses, table, tiles, SPEC: tl.constexpr, PRECISION: tl.constexpr, TILES: tl.constexpr):
    """Compute one tile of ``W = sum_b s_b * align(K_b)``; the coordinates are o tile, i tile, tap tile."""
    TAPS: tl.constexpr = field(TILES, "TAPS")
    task, block = open_tile(addresses, table, tiles, SPEC)
    tile = channels(task, block, SPEC, field(TILES, "BO"), field(TILES, "BI"))
    _, _, o_ok, rows, i, i_ok, _ = tile
    p0 = tl.load(task + 5) * TAPS

    total = ()
    for _ in tl.static_range(TAPS):
        total = total + (tl.zeros((field(TILES, "BO"), field(TILES, "BI")), tl.float32),)
    # Sequences first: only then do the products' accumulators not compete with the sum for registers.
    for t in tl.static_range(count_terms(SPEC)):
        if term(SPEC, t, "kind") == "composed":
            total = add_composed(total, tile, p0, block, SPEC, t, PRECISION, TILES)
    for t in tl.static_range(count_terms(SPEC)):
        if term(SPEC, t, "kind") == "dense":
            total = add_dense(total, tile, p0, block, SPEC, t, TAPS)
        if term(SPEC, t, "kind") == "pointwise":
            total = add_pointwise(total, tile, p0, block, SPEC, t, TAPS)
        if term(SPEC, t, "kind") == "separable":
            total = add_separable(total, tile, p0, block, SPEC, t, TAPS)

    kernel, s0, s1, s2, s3 = locate(block, SPEC, field(SPEC, "kernel"))
    corner = kernel + rows[:, None] * s0 + i[None, :] * s1
    for h in tl.static_range(TAPS):
        p = p0 + h
        y = p // field(SPEC, "width")
        x = p % field(SPEC, "width")
        mask = outer(o_ok, i_ok) & (p < field(SPEC, "height") * field(SPEC, "width"))
        store(corner + y * s2 + x * s3, total[h], mask)
