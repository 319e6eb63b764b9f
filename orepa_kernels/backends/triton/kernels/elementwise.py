"""Dense terms, ``K = W``, and pointwise ones, ``K[o,i,p] = P[o,i] * F[o,p]``: average, prior, 1x1, identity.

One role of the backward kernel serves all of them in one pass over the upstream gradient.
"""

import triton
import triton.language as tl

from .access import (
    align_tap,
    channels,
    count_terms,
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
def add_dense(total, tile, p0, block, SPEC: tl.constexpr, TERM: tl.constexpr, TAPS: tl.constexpr):
    """Add a convolution of any size."""
    _, _, o_ok, rows, i, i_ok, _ = tile
    scale = load_scale(rows, o_ok, block, SPEC, TERM)
    weight, s0, s1, s2, s3 = locate(block, SPEC, term(SPEC, TERM, "weight"))
    corner = weight + rows[:, None] * s0 + i[None, :] * s1
    result = ()
    for h in tl.static_range(TAPS):
        y, x, inside = align_tap(p0 + h, SPEC, TERM)
        value = load_fp32(corner + y * s2 + x * s3, outer(o_ok, i_ok) & inside)
        result = result + (total[h] + value * scale[:, None],)
    return result


@triton.jit
def add_pointwise(total, tile, p0, block, SPEC: tl.constexpr, TERM: tl.constexpr, TAPS: tl.constexpr):
    """Add a pointwise term. P is read once for all taps."""
    _, _, o_ok, rows, _, _, _ = tile
    scale = load_scale(rows, o_ok, block, SPEC, TERM)[:, None]
    if term(SPEC, TERM, "pointwise") < 0:
        value = tl.where(identity_mask(tile, SPEC, TERM), scale, 0.0)
    else:
        value = load_pointwise(tile, block, SPEC, TERM) * scale
    result = ()
    for h in tl.static_range(TAPS):
        y, x, inside = align_tap(p0 + h, SPEC, TERM)
        filter = load_filter(y, x, inside, rows, o_ok, block, SPEC, TERM)
        # Not by a zero of the filter: a tap that the branch does not have stays clean of its infinities.
        result = result + (total[h] + tl.where(inside, value * filter[:, None], 0.0),)
    return result


@triton.jit
def identity_mask(tile, SPEC: tl.constexpr, TERM: tl.constexpr):
    """Return the mask of the one input channel of each output channel, for a term without a pointwise factor."""
    _, o, _, _, i, _, in_per_group = tile
    return ((o // term(SPEC, TERM, "expand")) % in_per_group)[:, None] == i[None, :]


@triton.jit
def load_pointwise(tile, block, SPEC: tl.constexpr, TERM: tl.constexpr):
    """Load ``P[o,i]``, or make the identity."""
    _, _, o_ok, rows, i, i_ok, _ = tile
    if term(SPEC, TERM, "pointwise") < 0:
        value = identity_mask(tile, SPEC, TERM).to(tl.float32)
    else:
        pointwise, s0, s1, _, _ = locate(block, SPEC, term(SPEC, TERM, "pointwise"))
        value = load_fp32(pointwise + rows[:, None] * s0 + i[None, :] * s1, outer(o_ok, i_ok))
    return value


@triton.jit
def load_filter(y, x, inside, rows, rows_ok, block, SPEC: tl.constexpr, TERM: tl.constexpr):
    """Load ``F[o, y, x]``, fp32 like ``rows``; an average is ``1/(kh*kw)``, and all is zero outside."""
    if term(SPEC, TERM, "filter") < 0:
        value = tl.where(rows_ok & inside, 1.0 / (term(SPEC, TERM, "height") * term(SPEC, TERM, "width")), 0.0)
    else:
        pointer, s0, _, s2, s3 = locate(block, SPEC, term(SPEC, TERM, "filter"))
        value = load_fp32(pointer + rows * s0 + y * s2 + x * s3, rows_ok & inside)
    return value


@triton.jit
def elementwise_gradients(task, workspace, block, SPEC: tl.constexpr, TILES: tl.constexpr):
    """Compute the gradients of all dense and pointwise terms, for EO output x EI input channels and all taps.

    One sum over the taps is carried per term: ``sum_p dW * W`` of a dense one, ``sum_p dW * F`` of a pointwise one.
    Coordinates: o tile, i tile.
    """
    tile = channels(task, block, SPEC, field(TILES, "EO"), field(TILES, "EI"))
    _, _, o_ok, rows, i, i_ok, _ = tile
    mask = outer(o_ok, i_ok)
    upstream, g0, g1, g2, g3 = locate(block, SPEC, field(SPEC, "upstream"))
    corner = upstream + rows[:, None] * g0 + i[None, :] * g1

    sums = ()
    for _ in tl.static_range(count_terms(SPEC)):
        sums = sums + (tl.zeros((field(TILES, "EO"), field(TILES, "EI")), tl.float32),)
    for p in tl.range(0, field(SPEC, "height") * field(SPEC, "width"), num_stages=1):
        dw = load_fp32(corner + p // field(SPEC, "width") * g2 + p % field(SPEC, "width") * g3, mask)
        result = ()
        for t in tl.static_range(count_terms(SPEC)):
            value = sums[t]
            if term(SPEC, t, "kind") == "dense":
                value += dense_tap(dw, p, tile, block, SPEC, t)
            if term(SPEC, t, "kind") == "pointwise":
                value += pointwise_tap(dw, p, tile, task, workspace, block, SPEC, t)
            result = result + (value,)
        sums = result

    for t in tl.static_range(count_terms(SPEC)):
        if term(SPEC, t, "kind") == "dense":
            if needs_scale_gradient(SPEC, t):
                store_scale_gradient(sums[t], rows, o_ok, task, workspace, block, SPEC, t)
        if term(SPEC, t, "kind") == "pointwise":
            value = sums[t]
            if term(SPEC, t, "d_pointwise") >= 0:
                scale = load_scale(rows, o_ok, block, SPEC, t)[:, None]
                d_pointwise, c0, c1, _, _ = locate(block, SPEC, term(SPEC, t, "d_pointwise"))
                store(d_pointwise + rows[:, None] * c0 + i[None, :] * c1, value * scale, mask)
            if needs_scale_gradient(SPEC, t):
                value *= load_pointwise(tile, block, SPEC, t)
                store_scale_gradient(value, rows, o_ok, task, workspace, block, SPEC, t)


@triton.jit
def dense_tap(dw, p, tile, block, SPEC: tl.constexpr, TERM: tl.constexpr):
    """Store ``dW_b = s * dW`` at one tap, and return ``dW * W_b`` there."""
    _, _, o_ok, rows, i, i_ok, _ = tile
    y, x, inside = align_tap(p, SPEC, TERM)
    mask = outer(o_ok, i_ok) & inside
    if term(SPEC, TERM, "d_weight") >= 0:
        scale = load_scale(rows, o_ok, block, SPEC, TERM)[:, None]
        d_weight, c0, c1, c2, c3 = locate(block, SPEC, term(SPEC, TERM, "d_weight"))
        store(d_weight + rows[:, None] * c0 + i[None, :] * c1 + y * c2 + x * c3, dw * scale, mask)
    result = tl.zeros_like(dw)
    if needs_scale_gradient(SPEC, TERM):
        weight, s0, s1, s2, s3 = locate(block, SPEC, term(SPEC, TERM, "weight"))
        value = load_fp32(weight + rows[:, None] * s0 + i[None, :] * s1 + y * s2 + x * s3, mask)
        result = tl.where(inside, dw * value, 0.0)
    return result


@triton.jit
def pointwise_tap(dw, p, tile, task, workspace, block, SPEC: tl.constexpr, TERM: tl.constexpr):
    """Return ``dW * F`` at one tap, fp32 like ``dw``.

    Where asked for, store this program's part of ``dF[o,p] = s * sum_i P * dW``, too. The parts are [i tile, p, o] in the
    workspace, or [program, p] where one filter serves all.
    """
    _, _, o_ok, rows, _, _, _ = tile
    y, x, inside = align_tap(p, SPEC, TERM)
    if term(SPEC, TERM, "d_filter") >= 0:
        COUNT: tl.constexpr = term(SPEC, TERM, "height") * term(SPEC, TERM, "width")
        scale = load_scale(rows, o_ok, block, SPEC, TERM)
        value = tl.sum(load_pointwise(tile, block, SPEC, TERM) * dw, 1) * scale
        tap = y * term(SPEC, TERM, "width") + x
        pointer = workspace + term_word(block, SPEC, TERM, 3)
        if term(SPEC, TERM, "filter_rows"):
            groups, out_per_group, _ = sizes(block, SPEC)
            pointer += (tl.load(task + 6).to(tl.int64) * COUNT + tap) * groups * out_per_group
            tl.store(pointer + rows, value, mask=o_ok & inside)
        else:
            tl.store(pointer + tl.load(task + 7).to(tl.int64) * COUNT + tap, tl.sum(value, 0), mask=inside)
    result = tl.zeros_like(dw)
    if term(SPEC, TERM, "d_pointwise") >= 0 or needs_scale_gradient(SPEC, TERM):
        filter = load_filter(y, x, inside, rows, o_ok, block, SPEC, TERM)
        result = tl.where(inside, dw * filter[:, None], 0.0)
    return result
