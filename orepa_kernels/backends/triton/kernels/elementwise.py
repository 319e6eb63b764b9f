# Triton's language, not Python: constants in capitals, static conditions apart from others, tuples grown by addition.
# mypy: ignore-errors
# ruff: noqa: N803, N806, RUF005, SIM102
"""The role of the backward kernel that serves all dense and pointwise terms in one pass over the upstream gradient."""

import triton
import triton.language as tl

from .access import (
    count_terms,
    filter_of,
    load,
    locate,
    of,
    outer,
    scale_is_needed,
    scale_of,
    selected,
    sizes,
    store_scale_gradient,
    tap,
    term,
    term_word,
)


@triton.jit
def elementwise_gradients(
    tile,
    addresses,
    table,
    workspace,
    block,
    SPEC: tl.constexpr,
    EO: tl.constexpr,
    EI: tl.constexpr,
):
    """Gradients of ``K = W`` and of ``K[o,i,p] = P[o,i] * F[o,p]``, for EO output x EI input channels and all taps.

    Per term one sum over the taps is kept: ``sum_p dW * W`` of a dense one, ``sum_p dW * F`` of a pointwise one.
    Coordinates: o tile, i tile.
    """
    _, out_per_group, in_per_group = sizes(table, block, SPEC)
    group = tl.load(tile + 2)
    o = tl.load(tile + 3) * EO + tl.arange(0, EO)
    i = tl.load(tile + 4) * EI + tl.arange(0, EI)
    o_ok = o < out_per_group
    i_ok = i < in_per_group
    rows = group * out_per_group + o
    there = outer(o_ok, i_ok)
    upstream, g0, g1, g2, g3 = locate(addresses, table, block, SPEC, of(SPEC, "upstream"))
    corner = upstream + rows[:, None] * g0 + i[None, :] * g1

    sums = ()
    for _ in tl.static_range(count_terms(SPEC)):
        sums = sums + (tl.zeros((EO, EI), tl.float32),)
    for p in tl.range(0, of(SPEC, "height") * of(SPEC, "width"), num_stages=1):
        dw = load(corner + p // of(SPEC, "width") * g2 + p % of(SPEC, "width") * g3, there)
        result = ()
        for t in tl.static_range(count_terms(SPEC)):
            added = sums[t]
            if term(SPEC, t, "kind") == "dense":
                added += dense_tap(dw, p, rows, o_ok, i, there, addresses, table, block, SPEC, t)
            if term(SPEC, t, "kind") == "pointwise":
                added += pointwise_tap(
                    dw, p, rows, o_ok, o, i, there, tile, in_per_group, addresses, table, workspace, block, SPEC, t
                )
            result = result + (added,)
        sums = result

    for t in tl.static_range(count_terms(SPEC)):
        if term(SPEC, t, "kind") == "dense":
            if scale_is_needed(SPEC, t):
                store_scale_gradient(sums[t], rows, o_ok, tile, table, workspace, block, SPEC, t)
        if term(SPEC, t, "kind") == "pointwise":
            value = sums[t]
            if term(SPEC, t, "d_pointwise") >= 0:
                scale = scale_of(rows, o_ok, addresses, table, block, SPEC, t)[:, None]
                d_pointwise, c0, c1, _, _ = locate(addresses, table, block, SPEC, term(SPEC, t, "d_pointwise"))
                place = d_pointwise + rows[:, None] * c0 + i[None, :] * c1
                tl.store(place, (value * scale).to(d_pointwise.dtype.element_ty), mask=there)
            if scale_is_needed(SPEC, t):
                value *= pointwise_of(rows, o, i, there, in_per_group, addresses, table, block, SPEC, t)
                store_scale_gradient(value, rows, o_ok, tile, table, workspace, block, SPEC, t)


@triton.jit
def dense_tap(dw, p, rows, o_ok, i, there, addresses, table, block, SPEC: tl.constexpr, TERM: tl.constexpr):
    """Store ``dW_b = s * dW`` at one tap; ``dW * W_b`` there."""
    y, x, inside = tap(p, SPEC, TERM)
    if term(SPEC, TERM, "d_weight") >= 0:
        scale = scale_of(rows, o_ok, addresses, table, block, SPEC, TERM)[:, None]
        d_weight, c0, c1, c2, c3 = locate(addresses, table, block, SPEC, term(SPEC, TERM, "d_weight"))
        place = d_weight + rows[:, None] * c0 + i[None, :] * c1 + y * c2 + x * c3
        tl.store(place, (dw * scale).to(d_weight.dtype.element_ty), mask=there & inside)
    added = tl.zeros_like(dw)
    if scale_is_needed(SPEC, TERM):
        weight, s0, s1, s2, s3 = locate(addresses, table, block, SPEC, term(SPEC, TERM, "weight"))
        value = load(weight + rows[:, None] * s0 + i[None, :] * s1 + y * s2 + x * s3, there & inside)
        added = tl.where(inside, dw * value, 0.0)
    return added


@triton.jit
def pointwise_of(rows, o, i, there, in_per_group, addresses, table, block, SPEC: tl.constexpr, TERM: tl.constexpr):
    """``P[o,i]``, or the identity."""
    if term(SPEC, TERM, "pointwise") < 0:
        value = selected(o, i, in_per_group, SPEC, TERM).to(tl.float32)
    else:
        pointwise, s0, s1, _, _ = locate(addresses, table, block, SPEC, term(SPEC, TERM, "pointwise"))
        value = load(pointwise + rows[:, None] * s0 + i[None, :] * s1, there)
    return value


@triton.jit
def pointwise_tap(
    dw,
    p,
    rows,
    o_ok,
    o,
    i,
    there,
    tile,
    in_per_group,
    addresses,
    table,
    workspace,
    block,
    SPEC: tl.constexpr,
    TERM: tl.constexpr,
):
    """``dW * F`` at one tap, fp32 like ``dw``; and, where asked for, this program's part of ``dF[o,p] = s * sum_i P * dW``.

    The parts of ``dF`` are [i tile, p, o] in the workspace, or [program, p] where one filter serves all.
    """
    y, x, inside = tap(p, SPEC, TERM)
    if term(SPEC, TERM, "d_filter") >= 0:
        COUNT: tl.constexpr = term(SPEC, TERM, "height") * term(SPEC, TERM, "width")
        scale = scale_of(rows, o_ok, addresses, table, block, SPEC, TERM)
        value = pointwise_of(rows, o, i, there, in_per_group, addresses, table, block, SPEC, TERM)
        value = tl.sum(value * dw, 1) * scale
        own = y * term(SPEC, TERM, "width") + x
        place = workspace + term_word(table, block, SPEC, TERM, 3)
        if term(SPEC, TERM, "filter_rows"):
            groups, out_per_group, _ = sizes(table, block, SPEC)
            place += (tl.load(tile + 6).to(tl.int64) * COUNT + own) * groups * out_per_group
            tl.store(place + rows, value, mask=o_ok & inside)
        else:
            tl.store(place + tl.load(tile + 7).to(tl.int64) * COUNT + own, tl.sum(value, 0), mask=inside)
    added = tl.zeros_like(dw)
    if term(SPEC, TERM, "d_pointwise") >= 0 or scale_is_needed(SPEC, TERM):
        filter = filter_of(y, x, inside, rows, o_ok, addresses, table, block, SPEC, TERM)
        added = tl.where(inside, dw * filter[:, None], 0.0)
    return added
