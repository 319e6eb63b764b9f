# Triton's language, not Python: constants in capitals, static conditions apart from others, tuples grown by addition.
# mypy: ignore-errors
# ruff: noqa: N803, N806, RUF005
"""The role of the backward kernel that serves a separable term: the gradients of its two factors and of its scale."""

import triton
import triton.language as tl

from .access import load, locate, of, outer, scale_is_needed, scale_of, sizes, store_scale_gradient, term, term_word


@triton.jit
def separable_gradients(
    tile,
    addresses,
    table,
    workspace,
    block,
    SPEC: tl.constexpr,
    TERM: tl.constexpr,
    SO: tl.constexpr,
    SC: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Gradients of ``K[o,i,p] = sum_e pw[o,c] * dw[c,p]`` with ``c = i*E+e``.

    ``V[o,c] = sum_p dW[o, c // E, p] * dw[c,p]`` gives ``dpw = s * V`` and ``ds[o] = sum_c V * pw``; and
    ``ddw[c,p] = sum_o s[o] * pw[o,c] * dW[o, c // E, p]``. Coordinates: tile of ROWS output channels, tile of SC columns
    ``c``. The parts of ``ddw`` are [o tile, p, c] in the workspace.
    """
    EXPAND: tl.constexpr = term(SPEC, TERM, "expand")
    WIDTH: tl.constexpr = term(SPEC, TERM, "width")
    COUNT: tl.constexpr = term(SPEC, TERM, "height") * WIDTH
    groups, out_per_group, in_per_group = sizes(table, block, SPEC)
    group = tl.load(tile + 2)
    o0 = tl.load(tile + 3) * ROWS
    columns = in_per_group * EXPAND
    c = tl.load(tile + 4) * SC + tl.arange(0, SC)
    c_ok = c < columns
    upstream, g0, g1, g2, g3 = locate(addresses, table, block, SPEC, of(SPEC, "upstream"))
    pointwise, q0, q1, _, _ = locate(addresses, table, block, SPEC, term(SPEC, TERM, "pointwise"))
    depthwise, d0, _, d2, d3 = locate(addresses, table, block, SPEC, term(SPEC, TERM, "depthwise"))
    depthwise_corner = depthwise + (group * columns + c) * d0

    if term(SPEC, TERM, "d_pointwise") >= 0:
        d_pointwise, r0, r1, _, _ = locate(addresses, table, block, SPEC, term(SPEC, TERM, "d_pointwise"))
    d_depthwise = ()
    for _ in tl.static_range(COUNT):
        d_depthwise = d_depthwise + (tl.zeros((SO, SC), tl.float32),)
    inner = tl.zeros((SO, SC), tl.float32)
    for n in tl.range(0, ROWS // SO, num_stages=1):
        o = o0 + n * SO + tl.arange(0, SO)
        o_ok = o < out_per_group
        there = outer(o_ok, c_ok)
        rows = group * out_per_group + o
        scale = scale_of(rows, o_ok, addresses, table, block, SPEC, TERM)[:, None]
        pw = load(pointwise + rows[:, None] * q0 + c[None, :] * q1, there)
        corner = upstream + rows[:, None] * g0 + (c // EXPAND)[None, :] * g1
        v = tl.zeros((SO, SC), tl.float32)
        result = ()
        for p in tl.static_range(COUNT):
            y = p // WIDTH
            x = p % WIDTH
            dw = load(corner + (y + term(SPEC, TERM, "top")) * g2 + (x + term(SPEC, TERM, "left")) * g3, there)
            v += dw * load(depthwise_corner + y * d2 + x * d3, c_ok)[None, :]
            result = result + (d_depthwise[p] + pw * scale * dw,)
        d_depthwise = result
        if term(SPEC, TERM, "d_pointwise") >= 0:
            place = d_pointwise + rows[:, None] * r0 + c[None, :] * r1
            tl.store(place, (v * scale).to(d_pointwise.dtype.element_ty), mask=there)
        if scale_is_needed(SPEC, TERM):
            if of(SPEC, "scalar"):
                inner += v * pw
            else:
                store_scale_gradient(v * pw, rows, o_ok, tile, table, workspace, block, SPEC, TERM)
    if scale_is_needed(SPEC, TERM) and of(SPEC, "scalar"):
        store_scale_gradient(inner, c, c_ok, tile, table, workspace, block, SPEC, TERM)
    if term(SPEC, TERM, "d_depthwise") >= 0:
        part = tl.load(tile + 3).to(tl.int64)
        place = workspace + term_word(table, block, SPEC, TERM, 2) + group * columns + c
        for p in tl.static_range(COUNT):
            tl.store(place + (part * COUNT + p) * groups * columns, tl.sum(d_depthwise[p], 0), mask=c_ok)
