# Triton's language, not Python: constants in capitals, static conditions apart from others, tuples grown by addition.
# mypy: ignore-errors
# ruff: noqa: N803, N806, RUF005
"""The forward kernel: the sum of a block's scaled, centred branches (paper Eq. 4), stored once.

A program owns BO output channels x BI input channels x TAPS taps of one kernel. Sequences (paper Eq. 3) are matrix products
over their internal channels; the TAPS products share one tile of the factor that is 1x1. Every other branch is added to
the same registers afterwards: no intermediate kernel is ever written.
"""

import triton
import triton.language as tl

from .access import (
    TILE_WORDS,
    count_terms,
    filter_of,
    internal_channels,
    load,
    locate,
    of,
    outer,
    precision_of,
    scale_of,
    selected,
    sizes,
    tap,
    term,
)


@triton.jit
def squeeze_forward(
    addresses,
    table,
    tiles,
    SPEC: tl.constexpr,
    PRECISION: tl.constexpr,
    BO: tl.constexpr,
    BI: tl.constexpr,
    BM: tl.constexpr,
    TAPS: tl.constexpr,
):
    """``W = fold * sum_b s_b * align(K_b)`` for one tile; ``tiles`` rows are (block, -, group, o tile, i tile, tap tile)."""
    table = table.to(tl.int64).to(tl.pointer_type(tl.int64))
    tile = tiles.to(tl.int64).to(tl.pointer_type(tl.int32)) + tl.program_id(0) * TILE_WORDS
    if of(SPEC, "listed"):
        addresses = addresses.to(tl.int64).to(tl.pointer_type(tl.int64))
    block = tl.load(tile)
    group = tl.load(tile + 2)
    _, out_per_group, in_per_group = sizes(table, block, SPEC)
    o = tl.load(tile + 3) * BO + tl.arange(0, BO)
    i = tl.load(tile + 4) * BI + tl.arange(0, BI)
    p0 = tl.load(tile + 5) * TAPS
    o_ok = o < out_per_group
    i_ok = i < in_per_group
    rows = group * out_per_group + o

    total = ()
    for _ in tl.static_range(TAPS):
        total = total + (tl.zeros((BO, BI), tl.float32),)
    # Sequences first: only then do the products' accumulators not compete with the sum for registers.
    for t in tl.static_range(count_terms(SPEC)):
        if term(SPEC, t, "kind") == "composed":
            total = add_composed(
                total, rows, o_ok, group, i, i_ok, p0, addresses, table, block, SPEC, t, PRECISION, BM, TAPS
            )
    for t in tl.static_range(count_terms(SPEC)):
        if term(SPEC, t, "kind") == "dense":
            total = add_dense(total, rows, o_ok, i, i_ok, p0, addresses, table, block, SPEC, t, TAPS)
        if term(SPEC, t, "kind") == "pointwise":
            total = add_pointwise(
                total, rows, o_ok, o, i, i_ok, p0, in_per_group, addresses, table, block, SPEC, t, TAPS
            )
        if term(SPEC, t, "kind") == "separable":
            total = add_separable(
                total, rows, o_ok, group, i, i_ok, p0, in_per_group, addresses, table, block, SPEC, t, TAPS
            )

    kernel, s0, s1, s2, s3 = locate(addresses, table, block, SPEC, of(SPEC, "kernel"))
    corner = kernel + rows[:, None] * s0 + i[None, :] * s1
    for h in tl.static_range(TAPS):
        p = p0 + h
        value = total[h]
        if of(SPEC, "fold") >= 0:
            fold, f0, _, _, _ = locate(addresses, table, block, SPEC, of(SPEC, "fold"))
            value *= load(fold + rows * f0, o_ok)[:, None]
        y = p // of(SPEC, "width")
        x = p % of(SPEC, "width")
        there = outer(o_ok, i_ok) & (p < of(SPEC, "height") * of(SPEC, "width"))
        tl.store(corner + y * s2 + x * s3, value.to(kernel.dtype.element_ty), mask=there)


@triton.jit
def add_dense(
    total, rows, o_ok, i, i_ok, p0, addresses, table, block, SPEC: tl.constexpr, TERM: tl.constexpr, TAPS: tl.constexpr
):
    """``K = W``: a convolution of any size."""
    scale = scale_of(rows, o_ok, addresses, table, block, SPEC, TERM)
    weight, s0, s1, s2, s3 = locate(addresses, table, block, SPEC, term(SPEC, TERM, "weight"))
    corner = weight + rows[:, None] * s0 + i[None, :] * s1
    result = ()
    for h in tl.static_range(TAPS):
        y, x, inside = tap(p0 + h, SPEC, TERM)
        value = load(corner + y * s2 + x * s3, outer(o_ok, i_ok) & inside)
        result = result + (total[h] + value * scale[:, None],)
    return result


@triton.jit
def add_pointwise(
    total,
    rows,
    o_ok,
    o,
    i,
    i_ok,
    p0,
    in_per_group,
    addresses,
    table,
    block,
    SPEC: tl.constexpr,
    TERM: tl.constexpr,
    TAPS: tl.constexpr,
):
    """``K[o,i,p] = P[o,i] * F[o,p]``: average, prior, 1x1, identity. P is read once for all taps."""
    scale = scale_of(rows, o_ok, addresses, table, block, SPEC, TERM)[:, None]
    if term(SPEC, TERM, "pointwise") < 0:
        value = tl.where(selected(o, i, in_per_group, SPEC, TERM), scale, 0.0)
    else:
        pointwise, s0, s1, _, _ = locate(addresses, table, block, SPEC, term(SPEC, TERM, "pointwise"))
        value = load(pointwise + rows[:, None] * s0 + i[None, :] * s1, outer(o_ok, i_ok)) * scale
    result = ()
    for h in tl.static_range(TAPS):
        y, x, inside = tap(p0 + h, SPEC, TERM)
        filter = filter_of(y, x, inside, rows, o_ok, addresses, table, block, SPEC, TERM)
        # Not by a zero of the filter: a tap that the branch does not have stays clean of its infinities.
        result = result + (total[h] + tl.where(inside, value * filter[:, None], 0.0),)
    return result


@triton.jit
def add_separable(
    total,
    rows,
    o_ok,
    group,
    i,
    i_ok,
    p0,
    in_per_group,
    addresses,
    table,
    block,
    SPEC: tl.constexpr,
    TERM: tl.constexpr,
    TAPS: tl.constexpr,
):
    """``K[o,i,p] = sum_e pw[o, i*E+e] * dw[i*E+e, p]``: the linear depthwise separable branch."""
    EXPAND: tl.constexpr = term(SPEC, TERM, "expand")
    scale = scale_of(rows, o_ok, addresses, table, block, SPEC, TERM)[:, None]
    pointwise, q0, q1, _, _ = locate(addresses, table, block, SPEC, term(SPEC, TERM, "pointwise"))
    depthwise, d0, _, d2, d3 = locate(addresses, table, block, SPEC, term(SPEC, TERM, "depthwise"))
    for e in tl.range(0, EXPAND, num_stages=1):  # a loop, not unrolled: loads hoisted out of it would spill registers
        column = i * EXPAND + e
        value = load(pointwise + rows[:, None] * q0 + column[None, :] * q1, outer(o_ok, i_ok)) * scale
        corner = depthwise + (group * in_per_group * EXPAND + column) * d0
        result = ()
        for h in tl.static_range(TAPS):
            y, x, inside = tap(p0 + h, SPEC, TERM)
            result = result + (total[h] + value * load(corner + y * d2 + x * d3, i_ok & inside)[None, :],)
        total = result
    return total


@triton.jit
def add_composed(
    total,
    rows,
    o_ok,
    group,
    i,
    i_ok,
    p0,
    addresses,
    table,
    block,
    SPEC: tl.constexpr,
    TERM: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    TAPS: tl.constexpr,
):
    """``K[o,i,p] = sum_m sum_q W2[o,m,q] * W1[m,i,p-q]``: two convolutions in sequence (paper Eq. 3).

    An identity that is part of W1 is not multiplied: W2 is added as it is, exactly.
    """
    FIRST_1X1: tl.constexpr = term(SPEC, TERM, "height1") * term(SPEC, TERM, "width1") == 1
    EACH: tl.constexpr = precision_of(SPEC, PRECISION, term(SPEC, TERM, "first"), term(SPEC, TERM, "second"))
    LAST_1X1: tl.constexpr = term(SPEC, TERM, "height2") * term(SPEC, TERM, "width2") == 1
    first, a0, a1, a2, a3 = locate(addresses, table, block, SPEC, term(SPEC, TERM, "first"))
    second, b0, b1, b2, b3 = locate(addresses, table, block, SPEC, term(SPEC, TERM, "second"))
    internal = internal_channels(table, block, SPEC, TERM)
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
                y, x, inside = tap(p0 + h, SPEC, TERM)
                w2 = load(second_corner + (m0 + m)[None, :] * b1 + y * b2 + x * b3, outer(o_ok, m_ok) & inside)
                result = result + (tl.dot(w2, w1, products[h], input_precision=EACH),)
            products = result
    elif LAST_1X1:
        for m0 in range(0, internal, BM):
            m_ok = m0 + m < internal
            w2 = load(second_corner + (m0 + m)[None, :] * b1, outer(o_ok, m_ok))
            result = ()
            for h in tl.static_range(TAPS):
                y, x, inside = tap(p0 + h, SPEC, TERM)
                w1 = load(first_corner + (m0 + m)[:, None] * a0 + y * a2 + x * a3, outer(m_ok, i_ok) & inside)
                result = result + (tl.dot(w2, w1, products[h], input_precision=EACH),)
            products = result
    else:
        result = ()
        for h in tl.static_range(TAPS):
            y, x, inside = tap(p0 + h, SPEC, TERM)
            # the taps q of W2 for which p - q is a tap of W1
            y0 = tl.maximum(y - term(SPEC, TERM, "height1") + 1, 0)
            x0 = tl.maximum(x - term(SPEC, TERM, "width1") + 1, 0)
            high = tl.minimum(y, term(SPEC, TERM, "height2") - 1) - y0 + 1
            wide = tl.minimum(x, term(SPEC, TERM, "width2") - 1) - x0 + 1
            taps = tl.where(inside, high * wide, 0)
            product = products[h]
            # One loop over (m tile, q), not two: one pair of tiles in shared memory.
            for j in range(0, tl.cdiv(internal, BM) * taps):
                mm = j // taps * BM + m
                qy = y0 + j % taps // wide
                qx = x0 + j % taps % wide
                m_ok = mm < internal
                w1 = load(first_corner + mm[:, None] * a0 + (y - qy) * a2 + (x - qx) * a3, outer(m_ok, i_ok))
                w2 = load(second_corner + mm[None, :] * b1 + qy * b2 + qx * b3, outer(o_ok, m_ok))
                product = tl.dot(w2, w1, product, input_precision=EACH)
            result = result + (product,)
        products = result

    scale = scale_of(rows, o_ok, addresses, table, block, SPEC, TERM)[:, None]
    result = ()
    for h in tl.static_range(TAPS):
        value = products[h]
        if term(SPEC, TERM, "repeats") > 0:
            per_group = internal // term(SPEC, TERM, "repeats")
            y, x, inside = tap(p0 + h, SPEC, TERM)
            corner = second_corner + i[None, :] * b1 + y * b2 + x * b3
            for n in tl.static_range(term(SPEC, TERM, "repeats")):
                value += load(corner + n * per_group * b1, outer(o_ok, i_ok) & inside)
        result = result + (total[h] + value * scale,)
    return result
