# Triton's language, not Python: constants in capitals, static conditions apart from others, tuples grown by addition.
# mypy: ignore-errors
# ruff: noqa: N803, N806, RUF005
"""Roles of the backward kernel that serve a composed term: the gradients of its two factors and of its scale.

With ``K = s * (W2 o W1)`` (paper Eq. 3), both are matrix products with the upstream gradient ``dW``.
"""

import triton
import triton.language as tl

from .access import (
    internal_channels,
    load,
    locate,
    of,
    outer,
    precision_of,
    scale_is_needed,
    scale_of,
    sizes,
    store_scale_gradient,
    term,
    term_word,
)


@triton.jit
def second_gradient(
    tile,
    addresses,
    table,
    workspace,
    block,
    SPEC: tl.constexpr,
    TERM: tl.constexpr,
    PRECISION: tl.constexpr,
    BO: tl.constexpr,
    BM: tl.constexpr,
    BI: tl.constexpr,
    TAPS: tl.constexpr,
):
    """``U[o,m,q] = sum_{i,r} dW[o,i,q+r] * W1[m,i,r]``; then ``dW2 = s * U`` and ``ds[o] = sum_{m,q} U * W2``.

    An identity that is part of W1 adds ``dW`` as it is. Coordinates: o tile, m tile, tile of taps q.
    """
    EACH: tl.constexpr = precision_of(SPEC, PRECISION, of(SPEC, "upstream"), term(SPEC, TERM, "first"))
    COUNT1: tl.constexpr = term(SPEC, TERM, "height1") * term(SPEC, TERM, "width1")
    COUNT2: tl.constexpr = term(SPEC, TERM, "height2") * term(SPEC, TERM, "width2")
    _, out_per_group, in_per_group = sizes(table, block, SPEC)
    internal = internal_channels(table, block, SPEC, TERM)
    group = tl.load(tile + 2)
    o = tl.load(tile + 3) * BO + tl.arange(0, BO)
    m = tl.load(tile + 4) * BM + tl.arange(0, BM)
    q0 = tl.load(tile + 5) * TAPS
    i = tl.arange(0, BI)
    o_ok = o < out_per_group
    m_ok = m < internal
    rows = group * out_per_group + o
    upstream, g0, g1, g2, g3 = locate(addresses, table, block, SPEC, of(SPEC, "upstream"))
    first, a0, a1, a2, a3 = locate(addresses, table, block, SPEC, term(SPEC, TERM, "first"))
    second, b0, b1, b2, b3 = locate(addresses, table, block, SPEC, term(SPEC, TERM, "second"))
    upstream_corner = upstream + rows[:, None] * g0
    first_corner = first + (group * internal + m)[None, :] * a0

    u = ()
    for _ in tl.static_range(TAPS):
        u = u + (tl.zeros((BO, BM), tl.float32),)
    for j in range(0, tl.cdiv(in_per_group, BI) * COUNT1):
        ii = j // COUNT1 * BI + i
        i_ok = ii < in_per_group
        ry = j % COUNT1 // term(SPEC, TERM, "width1")
        rx = j % COUNT1 % term(SPEC, TERM, "width1")
        w1 = load(first_corner + ii[:, None] * a1 + ry * a2 + rx * a3, outer(i_ok, m_ok))
        result = ()
        for h in tl.static_range(TAPS):
            y = (q0 + h) // term(SPEC, TERM, "width2") + ry + term(SPEC, TERM, "top")
            x = (q0 + h) % term(SPEC, TERM, "width2") + rx + term(SPEC, TERM, "left")
            dw = load(upstream_corner + ii[None, :] * g1 + y * g2 + x * g3, outer(o_ok, i_ok) & (q0 + h < COUNT2))
            result = result + (tl.dot(dw, w1, u[h], input_precision=EACH),)
        u = result

    scale = scale_of(rows, o_ok, addresses, table, block, SPEC, TERM)[:, None]
    inner = tl.zeros((BO, BM), tl.float32)
    for h in tl.static_range(TAPS):
        value = u[h]
        qy = (q0 + h) // term(SPEC, TERM, "width2")
        qx = (q0 + h) % term(SPEC, TERM, "width2")
        there = outer(o_ok, m_ok) & (q0 + h < COUNT2)
        if term(SPEC, TERM, "repeats") > 0:
            y = qy + term(SPEC, TERM, "top")
            x = qx + term(SPEC, TERM, "left")
            value += load(upstream_corner + (m % in_per_group)[None, :] * g1 + y * g2 + x * g3, there)
        if scale_is_needed(SPEC, TERM):
            inner += value * load(second + rows[:, None] * b0 + m[None, :] * b1 + qy * b2 + qx * b3, there)
        if term(SPEC, TERM, "d_second") >= 0:
            d_second, c0, c1, c2, c3 = locate(addresses, table, block, SPEC, term(SPEC, TERM, "d_second"))
            place = d_second + rows[:, None] * c0 + m[None, :] * c1 + qy * c2 + qx * c3
            tl.store(place, (value * scale).to(d_second.dtype.element_ty), mask=there)
    if scale_is_needed(SPEC, TERM):
        store_scale_gradient(inner, rows, o_ok, tile, table, workspace, block, SPEC, TERM)


@triton.jit
def first_gradient(
    tile,
    addresses,
    table,
    workspace,
    block,
    SPEC: tl.constexpr,
    TERM: tl.constexpr,
    PRECISION: tl.constexpr,
    FM: tl.constexpr,
    FI: tl.constexpr,
    FO: tl.constexpr,
):
    """``dW1[m,i,r] = sum_{o,q} s[o] * W2[o,m,q] * dW[o,i,q+r]``, a slice of the output channels of each group.

    Coordinates: m tile, i tile, tap r. The parts are [slice, r, m, i] in the workspace.
    """
    WIDTH1: tl.constexpr = term(SPEC, TERM, "width1")
    COUNT1: tl.constexpr = term(SPEC, TERM, "height1") * WIDTH1
    COUNT2: tl.constexpr = term(SPEC, TERM, "height2") * term(SPEC, TERM, "width2")
    groups, out_per_group, in_per_group = sizes(table, block, SPEC)
    internal = internal_channels(table, block, SPEC, TERM)
    group = tl.load(tile + 2)
    m = tl.load(tile + 3) * FM + tl.arange(0, FM)
    i = tl.load(tile + 4) * FI + tl.arange(0, FI)
    r = tl.load(tile + 5)
    part = tl.load(tile + 6)
    slices = tl.load(tile + 7)
    o = tl.arange(0, FO)
    m_ok = m < internal
    i_ok = i < in_per_group
    ry = r // WIDTH1 + term(SPEC, TERM, "top")
    rx = r % WIDTH1 + term(SPEC, TERM, "left")
    upstream, g0, g1, g2, g3 = locate(addresses, table, block, SPEC, of(SPEC, "upstream"))
    second, b0, b1, b2, b3 = locate(addresses, table, block, SPEC, term(SPEC, TERM, "second"))
    second_corner = second + m[:, None] * b1
    upstream_corner = upstream + i[None, :] * g1

    depth = tl.cdiv(tl.cdiv(out_per_group, FO), slices) * FO
    o0 = part * depth
    end = tl.minimum(o0 + depth, out_per_group)
    product = tl.zeros((FM, FI), tl.float32)
    # One loop over (o tile, q), not two: one pair of tiles in shared memory.
    for j in range(0, tl.cdiv(tl.maximum(end - o0, 0), FO) * COUNT2):
        oo = o0 + j // COUNT2 * FO + o
        o_ok = oo < end
        rows = group * out_per_group + oo
        qy = j % COUNT2 // term(SPEC, TERM, "width2")
        qx = j % COUNT2 % term(SPEC, TERM, "width2")
        scale = scale_of(rows, o_ok, addresses, table, block, SPEC, TERM)
        w2 = load(second_corner + rows[None, :] * b0 + qy * b2 + qx * b3, outer(m_ok, o_ok)) * scale[None, :]
        place = upstream_corner + rows[:, None] * g0 + (qy + ry) * g2 + (qx + rx) * g3
        product = tl.dot(w2, load(place, outer(o_ok, i_ok)), product, input_precision=PRECISION)
    begin = term_word(table, block, SPEC, TERM, 2)
    row = (part.to(tl.int64) * COUNT1 + r) * groups * internal + group * internal + m
    tl.store(workspace + begin + row[:, None] * in_per_group + i[None, :], product, mask=outer(m_ok, i_ok))
