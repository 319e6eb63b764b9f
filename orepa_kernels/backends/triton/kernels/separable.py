"""Separable terms: ``K[o,i,p] = sum_e pw[o,c] * dw[c,p]`` with ``c = i*E + e``, and all gradients."""

import triton
import triton.language as tl

from .access import (
    align_tap,
    field,
    load_fp32,
    load_scale,
    locate,
    needs_scale_gradient,
    outer,
    sizes,
    store,
    store_scale_gradient,
    term,
    term_word,
)


@triton.jit
def add_separable(total, tile, p0, block, SPEC: tl.constexpr, TERM: tl.constexpr, TAPS: tl.constexpr):
    """Add the linear depthwise separable branch."""
    EXPAND: tl.constexpr = term(SPEC, TERM, "expand")
    group, _, o_ok, rows, i, i_ok, in_per_group = tile
    scale = load_scale(rows, o_ok, block, SPEC, TERM)[:, None]
    pointwise, q0, q1, _, _ = locate(block, SPEC, term(SPEC, TERM, "pointwise"))
    depthwise, d0, _, d2, d3 = locate(block, SPEC, term(SPEC, TERM, "depthwise"))
    for e in tl.range(0, EXPAND, num_stages=1):  # a loop, not unrolled: loads hoisted out of it would spill registers
        column = i * EXPAND + e
        value = load_fp32(pointwise + rows[:, None] * q0 + column[None, :] * q1, outer(o_ok, i_ok)) * scale
        corner = depthwise + (group * in_per_group * EXPAND + column) * d0
        result = ()
        for h in tl.static_range(TAPS):
            y, x, inside = align_tap(p0 + h, SPEC, TERM)
            result = result + (total[h] + value * load_fp32(corner + y * d2 + x * d3, i_ok & inside)[None, :],)
        total = result
    return total


@triton.jit
def separable_gradients(task, workspace, block, SPEC: tl.constexpr, TERM: tl.constexpr, TILES: tl.constexpr):
    """Compute the gradients for ROWS output channels, SO at a time, and SC columns ``c``; coordinates: o tile, c tile.

    ``V[o,c] = sum_p dW[o, c // E, p] * dw[c,p]`` gives ``dpw = s * V`` and ``ds[o] = sum_c V * pw``; and
    ``ddw[c,p] = sum_o s[o] * pw[o,c] * dW[o, c // E, p]``, whose parts are [o tile, p, c] in the workspace.
    """
    EXPAND: tl.constexpr = term(SPEC, TERM, "expand")
    WIDTH: tl.constexpr = term(SPEC, TERM, "width")
    COUNT: tl.constexpr = term(SPEC, TERM, "height") * WIDTH
    SO: tl.constexpr = field(TILES, "SO")
    SC: tl.constexpr = field(TILES, "SC")
    ROWS: tl.constexpr = field(TILES, "ROWS")
    groups, out_per_group, in_per_group = sizes(block, SPEC)
    group = tl.load(task + 2)
    o0 = tl.load(task + 3) * ROWS
    columns = in_per_group * EXPAND
    c = tl.load(task + 4) * SC + tl.arange(0, SC)
    c_ok = c < columns
    upstream, g0, g1, g2, g3 = locate(block, SPEC, field(SPEC, "upstream"))
    pointwise, q0, q1, _, _ = locate(block, SPEC, term(SPEC, TERM, "pointwise"))
    depthwise, d0, _, d2, d3 = locate(block, SPEC, term(SPEC, TERM, "depthwise"))
    depthwise_corner = depthwise + (group * columns + c) * d0

    if term(SPEC, TERM, "d_pointwise") >= 0:
        d_pointwise, r0, r1, _, _ = locate(block, SPEC, term(SPEC, TERM, "d_pointwise"))
    d_depthwise = ()
    for _ in tl.static_range(COUNT):
        d_depthwise = d_depthwise + (tl.zeros((SO, SC), tl.float32),)
    d_scale = tl.zeros((SO, SC), tl.float32)
    for n in tl.range(0, ROWS // SO, num_stages=1):
        o = o0 + n * SO + tl.arange(0, SO)
        o_ok = o < out_per_group
        mask = outer(o_ok, c_ok)
        rows = group * out_per_group + o
        scale = load_scale(rows, o_ok, block, SPEC, TERM)[:, None]
        pw = load_fp32(pointwise + rows[:, None] * q0 + c[None, :] * q1, mask)
        corner = upstream + rows[:, None] * g0 + (c // EXPAND)[None, :] * g1
        v = tl.zeros((SO, SC), tl.float32)
        result = ()
        for p in tl.static_range(COUNT):
            y = p // WIDTH
            x = p % WIDTH
            dw = load_fp32(corner + (y + term(SPEC, TERM, "top")) * g2 + (x + term(SPEC, TERM, "left")) * g3, mask)
            v += dw * load_fp32(depthwise_corner + y * d2 + x * d3, c_ok)[None, :]
            result = result + (d_depthwise[p] + pw * scale * dw,)
        d_depthwise = result
        if term(SPEC, TERM, "d_pointwise") >= 0:
            store(d_pointwise + rows[:, None] * r0 + c[None, :] * r1, v * scale, mask)
        if needs_scale_gradient(SPEC, TERM):
            if field(SPEC, "scalar"):
                d_scale += v * pw
            else:
                store_scale_gradient(v * pw, rows, o_ok, task, workspace, block, SPEC, TERM)
    if needs_scale_gradient(SPEC, TERM) and field(SPEC, "scalar"):
        store_scale_gradient(d_scale, c, c_ok, task, workspace, block, SPEC, TERM)
    if term(SPEC, TERM, "d_depthwise") >= 0:
        part = tl.load(task + 3).to(tl.int64)
        pointer = workspace + term_word(block, SPEC, TERM, 2) + group * columns + c
        for p in tl.static_range(COUNT):
            tl.store(pointer + (part * COUNT + p) * groups * columns, tl.sum(d_depthwise[p], 0), mask=c_ok)
