# Triton's language, not Python: constants in capitals, static conditions apart from others, tuples grown by addition.
# mypy: ignore-errors
# ruff: noqa: N803, SIM102
"""The backward kernel: the gradient of every factor of every branch from that of the kernel, ``dW``.

One launch; its programs take one of four roles, which the tile map hands out: the two factors of a composed term, a
separable term, and all other terms together. No branch's kernel is computed again, and nothing but the operands is read.
Sums over several programs (scales, ``first``, ``depthwise``, ``filter``) go to a workspace, one place per program; a
second launch (see `sums`) adds them in a fixed order: no atomics, so the same bits every time.
"""

import triton
import triton.language as tl

from .access import TILE_WORDS, constexpr_function, count_terms, of, scale_is_needed, term
from .composed import first_gradient, second_gradient
from .elementwise import elementwise_gradients
from .separable import separable_gradients

#: roles of a program: these, plus three times the number of the term that they serve
SECOND = tl.constexpr(0)
FIRST = tl.constexpr(1)
SEPARABLE = tl.constexpr(2)
#: the role that serves all dense and pointwise terms
ELEMENTWISE = tl.constexpr(-1)


@constexpr_function
def elementwise_is_needed(spec):
    """Whether any gradient of a dense or pointwise term is asked for."""
    return any(
        branch.wanted or (spec.d_scales >= 0 and branch.scale >= 0)
        for branch in spec.terms
        if branch.kind in ("dense", "pointwise")
    )


@triton.jit
def squeeze_backward(
    addresses,
    table,
    tiles,
    workspace,
    SPEC: tl.constexpr,
    PRECISION: tl.constexpr,
    BO: tl.constexpr,
    BM: tl.constexpr,
    BI: tl.constexpr,
    TAPS: tl.constexpr,
    FM: tl.constexpr,
    FI: tl.constexpr,
    FO: tl.constexpr,
    EO: tl.constexpr,
    EI: tl.constexpr,
    SO: tl.constexpr,
    SC: tl.constexpr,
    ROWS: tl.constexpr,
):
    """All gradients of one tile; rows of ``tiles`` are (block, role, group, three coordinates, slice, serial number).

    Tiles: BO x BM x TAPS of ``d_second`` (BI deep), FM x FI of ``d_first`` (FO deep), EO x EI of the element-wise terms,
    ROWS x SC of a separable one, SO rows at a time.
    """
    table = table.to(tl.int64).to(tl.pointer_type(tl.int64))
    workspace = workspace.to(tl.int64).to(tl.pointer_type(tl.float32))
    tile = tiles.to(tl.int64).to(tl.pointer_type(tl.int32)) + tl.program_id(0) * TILE_WORDS
    if of(SPEC, "listed"):
        addresses = addresses.to(tl.int64).to(tl.pointer_type(tl.int64))
    block = tl.load(tile)
    role = tl.load(tile + 1)
    for t in tl.static_range(count_terms(SPEC)):
        if term(SPEC, t, "kind") == "composed":
            if term(SPEC, t, "d_second") >= 0 or scale_is_needed(SPEC, t):
                if role == 3 * t + SECOND:
                    second_gradient(tile, addresses, table, workspace, block, SPEC, t, PRECISION, BO, BM, BI, TAPS)
            if term(SPEC, t, "d_first") >= 0:
                if role == 3 * t + FIRST:
                    first_gradient(tile, addresses, table, workspace, block, SPEC, t, PRECISION, FM, FI, FO)
        if term(SPEC, t, "kind") == "separable":
            if term(SPEC, t, "wanted") or scale_is_needed(SPEC, t):
                if role == 3 * t + SEPARABLE:
                    separable_gradients(tile, addresses, table, workspace, block, SPEC, t, SO, SC, ROWS)
    if elementwise_is_needed(SPEC):
        if role == ELEMENTWISE:
            elementwise_gradients(tile, addresses, table, workspace, block, SPEC, EO, EI)
