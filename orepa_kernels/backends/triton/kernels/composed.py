"""Composed terms: two convolutions in sequence, ``K[o,i,p] = sum_m sum_q W2[o,m,q] * W1[m,i,p-q]`` (paper Eq. 3).

The kernel and the gradients of both factors are matrix products. An identity that is part of W1 is not multiplied: W2, or the
upstream gradient ``dW``, is added as it is, exactly.
"""

import triton
import triton.language as tl

from .access import (
    align_tap,
    channels,
    field,
    internal_channels,
    load,
    load_fp32,
    load_scale,
    locate,
    multiply,
    needs_scale_gradient,
    outer,
    relayout,
    sizes,
    store,
    store_scale_gradient,
    term,
    term_word,
)


@triton.jit
def add_composed(
    total, tile, p0, block, SPEC: tl.constexpr, TERM: tl.constexpr, PRECISION: tl.constexpr, TILES: tl.constexpr
):
    """Add a sequence, BM internal channels at a time."""
    FIRST_1X1: tl.constexpr = term(SPEC, TERM, "height1") * term(SPEC, TERM, "width1") == 1
    BM: tl.constexpr = field(TILES, "BM")
    TAPS: tl.constexpr = field(TILES, "TAPS")
    group, _, o_ok, rows, i, i_ok, _ = tile
    first, a0, a1, a2, a3 = locate(block, SPEC, term(SPEC, TERM, "first"))
    second, b0, b1, b2, b3 = locate(block, SPEC, term(SPEC, TERM, "second"))
    internal = internal_channels(block, SPEC, TERM)
    first_corner = first + group.to(tl.int64) * internal * a0 + i[None, :] * a1
    second_corner = second + rows[:, None] * b0
    m = tl.arange(0, BM)

    products = ()
    for h in tl.static_range(TAPS):
        products = products + (tl.zeros_like(total[h]),)
    if FIRST_1X1:
        for m0 in range(0, internal, BM):
            m_ok = m0 + m < internal
            w1 = load(first_corner + (m0 + m)[:, None] * a0, outer(m_ok, i_ok))
            result = ()
            for h in tl.static_range(TAPS):
                y, x, inside = align_tap(p0 + h, SPEC, TERM)
                w2 = load(second_corner + (m0 + m)[None, :] * b1 + y * b2 + x * b3, outer(o_ok, m_ok) & inside)
                result = result + (multiply(w2, w1, products[h], PRECISION),)
            products = result
    else:
        result = ()
        for h in tl.static_range(TAPS):
            y, x, inside = align_tap(p0 + h, SPEC, TERM)
            # the taps q of W2 for which p - q is a tap of W1
            y0 = tl.maximum(y - term(SPEC, TERM, "height1") + 1, 0)
            x0 = tl.maximum(x - term(SPEC, TERM, "width1") + 1, 0)
            height = tl.minimum(y, term(SPEC, TERM, "height2") - 1) - y0 + 1
            width = tl.minimum(x, term(SPEC, TERM, "width2") - 1) - x0 + 1
            taps = tl.where(inside, height * width, 0)
            product = products[h]
            # One loop over (m tile, q), not two: one pair of tiles in shared memory.
            for j in range(0, tl.cdiv(internal, BM) * taps):
                mm = j // taps * BM + m
                qy = y0 + j % taps // width
                qx = x0 + j % taps % width
                m_ok = mm < internal
                w1 = load(first_corner + mm[:, None] * a0 + (y - qy) * a2 + (x - qx) * a3, outer(m_ok, i_ok))
                w2 = load(second_corner + mm[None, :] * b1 + qy * b2 + qx * b3, outer(o_ok, m_ok))
                product = multiply(w2, w1, product, PRECISION)
            result = result + (product,)
        products = result

    scale = load_scale(rows, o_ok, block, SPEC, TERM)[:, None]
    result = ()
    for h in tl.static_range(TAPS):
        value = relayout(products[h], field(TILES, "BO"), field(TILES, "BI"))
        if term(SPEC, TERM, "repeats") > 0:
            per_group = internal // term(SPEC, TERM, "repeats")
            y, x, inside = align_tap(p0 + h, SPEC, TERM)
            corner = second_corner + i[None, :] * b1 + y * b2 + x * b3
            for n in tl.static_range(term(SPEC, TERM, "repeats")):
                value += load_fp32(corner + n * per_group * b1, outer(o_ok, i_ok) & inside)
        result = result + (total[h] + value * scale,)
    return result


@triton.jit
def second_gradient(
    task, workspace, block, SPEC: tl.constexpr, TERM: tl.constexpr, PRECISION: tl.constexpr, TILES: tl.constexpr
):
    """Compute ``dW2 = s * U`` and ``ds[o] = sum_{m,q} U * W2`` from ``U[o,m,q] = sum_{i,r} dW[o,i,q+r] * W1[m,i,r]``.

    A program takes BO x BM x TAPS of them, BI input channels at a time. Coordinates: o tile, m tile, tile of taps q.
    """
    COUNT1: tl.constexpr = term(SPEC, TERM, "height1") * term(SPEC, TERM, "width1")
    COUNT2: tl.constexpr = term(SPEC, TERM, "height2") * term(SPEC, TERM, "width2")
    BO: tl.constexpr = field(TILES, "BO")
    BM: tl.constexpr = field(TILES, "BM")
    BI: tl.constexpr = field(TILES, "BI")
    TAPS: tl.constexpr = field(TILES, "TAPS")
    internal = internal_channels(block, SPEC, TERM)
    group, _, o_ok, rows, m, _, in_per_group = channels(task, block, SPEC, BO, BM)
    m_ok = m < internal
    q0 = tl.load(task + 5) * TAPS
    i = tl.arange(0, BI)
    upstream, g0, g1, g2, g3 = locate(block, SPEC, field(SPEC, "upstream"))
    first, a0, a1, a2, a3 = locate(block, SPEC, term(SPEC, TERM, "first"))
    second, b0, b1, b2, b3 = locate(block, SPEC, term(SPEC, TERM, "second"))
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
            mask = outer(o_ok, i_ok) & (q0 + h < COUNT2)
            dw = load(upstream_corner + ii[None, :] * g1 + y * g2 + x * g3, mask)
            result = result + (multiply(dw, w1, u[h], PRECISION),)
        u = result

    scale = load_scale(rows, o_ok, block, SPEC, TERM)[:, None]
    d_scale = tl.zeros((BO, BM), tl.float32)
    for h in tl.static_range(TAPS):
        value = relayout(u[h], BO, BM)
        qy = (q0 + h) // term(SPEC, TERM, "width2")
        qx = (q0 + h) % term(SPEC, TERM, "width2")
        mask = outer(o_ok, m_ok) & (q0 + h < COUNT2)
        if term(SPEC, TERM, "repeats") > 0:
            y = qy + term(SPEC, TERM, "top")
            x = qx + term(SPEC, TERM, "left")
            value += load_fp32(upstream_corner + (m % in_per_group)[None, :] * g1 + y * g2 + x * g3, mask)
        if needs_scale_gradient(SPEC, TERM):
            d_scale += value * load_fp32(second + rows[:, None] * b0 + m[None, :] * b1 + qy * b2 + qx * b3, mask)
        if term(SPEC, TERM, "d_second") >= 0:
            d_second, c0, c1, c2, c3 = locate(block, SPEC, term(SPEC, TERM, "d_second"))
            store(d_second + rows[:, None] * c0 + m[None, :] * c1 + qy * c2 + qx * c3, value * scale, mask)
    if needs_scale_gradient(SPEC, TERM):
        store_scale_gradient(d_scale, rows, o_ok, task, workspace, block, SPEC, TERM)


@triton.jit
def first_gradient(
    task, workspace, block, SPEC: tl.constexpr, TERM: tl.constexpr, PRECISION: tl.constexpr, TILES: tl.constexpr
):
    """Compute ``dW1[m,i,r] = sum_{o,q} s[o] * W2[o,m,q] * dW[o,i,q+r]`` over a slice of each group's output channels.

    A program takes FM x FI of them, FO output channels at a time. Coordinates: m tile, i tile, tap r. The parts are
    [slice, r, m, i] in the workspace.
    """
    WIDTH1: tl.constexpr = term(SPEC, TERM, "width1")
    COUNT1: tl.constexpr = term(SPEC, TERM, "height1") * WIDTH1
    COUNT2: tl.constexpr = term(SPEC, TERM, "height2") * term(SPEC, TERM, "width2")
    FM: tl.constexpr = field(TILES, "FM")
    FI: tl.constexpr = field(TILES, "FI")
    FO: tl.constexpr = field(TILES, "FO")
    groups, out_per_group, in_per_group = sizes(block, SPEC)
    internal = internal_channels(block, SPEC, TERM)
    group = tl.load(task + 2)
    m = tl.load(task + 3) * FM + tl.arange(0, FM)
    i = tl.load(task + 4) * FI + tl.arange(0, FI)
    r = tl.load(task + 5)
    part = tl.load(task + 6)
    slices = tl.load(task + 7)
    o = tl.arange(0, FO)
    m_ok = m < internal
    i_ok = i < in_per_group
    ry = r // WIDTH1 + term(SPEC, TERM, "top")
    rx = r % WIDTH1 + term(SPEC, TERM, "left")
    upstream, g0, g1, g2, g3 = locate(block, SPEC, field(SPEC, "upstream"))
    second, b0, b1, b2, b3 = locate(block, SPEC, term(SPEC, TERM, "second"))
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
        scale = load_scale(rows, o_ok, block, SPEC, TERM)
        w2 = load_fp32(second_corner + rows[None, :] * b0 + qy * b2 + qx * b3, outer(m_ok, o_ok)) * scale[None, :]
        dw = load(upstream_corner + rows[:, None] * g0 + (qy + ry) * g2 + (qx + rx) * g3, outer(o_ok, i_ok))
        product = multiply(w2, dw, product, PRECISION)
    begin = term_word(block, SPEC, TERM, 2)
    row = (part.to(tl.int64) * COUNT1 + r) * groups * internal + group * internal + m
    tl.store(workspace + begin + row[:, None] * in_per_group + i[None, :], product, mask=outer(m_ok, i_ok))
