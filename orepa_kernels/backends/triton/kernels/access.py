# Triton's language, not Python: constants in capitals, static conditions apart from others, tuples grown by addition.
# mypy: ignore-errors
# ruff: noqa: N803, SIM108
"""How the kernels reach their tensors: addresses and strides from tables, taps, scales.

Common arguments: ``addresses`` (arguments, one per slot, or a table of them), ``table`` (sizes and strides, see
`tables`), ``block`` (row of both), ``SPEC`` (the structure, see `spec`), ``TERM`` (number of a term).
"""

import triton
import triton.language as tl

from ..device import INTERPRETING

if hasattr(triton, "constexpr_function"):
    constexpr_function = triton.constexpr_function
elif (
    INTERPRETING
):  # Triton 3.4, whose interpreter computes with plain values, and could not with what the function wraps them in

    def constexpr_function(function):
        """Nothing to do."""
        return function

else:
    constexpr_function = tl.constexpr_function

#: words of the table: per block, per term and per slot (see `tables.block_words`)
HEADER = tl.constexpr(3)
TERM_WORDS = tl.constexpr(4)
#: words of one row of a tile map
TILE_WORDS = tl.constexpr(8)


@constexpr_function
def of(spec, name):
    """A field of the structure."""
    return getattr(spec, name)


@constexpr_function
def term(spec, index, name):
    """A field of one of its terms."""
    return getattr(spec.terms[index], name)


@constexpr_function
def count_terms(spec):
    """How many terms it has."""
    return len(spec.terms)


@constexpr_function
def count_slots(spec):
    """How many tensors it has."""
    return len(spec.views)


@constexpr_function
def view(spec, slot, name):
    """A field of one of its tensors."""
    return getattr(spec.views[slot], name)


@constexpr_function
def pointer_type(spec, slot):
    """The type of a tensor's address."""
    return tl.pointer_type(getattr(tl, spec.views[slot].dtype))


@triton.jit
def row_of(table, block, SPEC: tl.constexpr):
    """Where a block's words begin in the table."""
    return table + block * (HEADER + TERM_WORDS * count_terms(SPEC) + 4 * count_slots(SPEC))


@triton.jit
def sizes(table, block, SPEC: tl.constexpr):
    """Groups, output channels per group, input channels per group."""
    row = row_of(table, block, SPEC)
    groups = tl.load(row).to(tl.int32)
    out_per_group = tl.load(row + 1).to(tl.int32)
    in_per_group = tl.multiple_of(tl.load(row + 2).to(tl.int32), of(SPEC, "in_multiple"))
    return groups, out_per_group, in_per_group


@triton.jit
def term_word(table, block, SPEC: tl.constexpr, TERM: tl.constexpr, WORD: tl.constexpr):
    """A number that belongs to a term: its internal channels per group, or the begin of a part of the workspace."""
    return tl.load(row_of(table, block, SPEC) + HEADER + TERM_WORDS * TERM + WORD)


@triton.jit
def internal_channels(table, block, SPEC: tl.constexpr, TERM: tl.constexpr):
    """Internal channels per group of a composed term."""
    channels = term_word(table, block, SPEC, TERM, 0).to(tl.int32)
    return tl.multiple_of(channels, term(SPEC, TERM, "internal_multiple"))


@triton.jit
def _stride(row, SPEC: tl.constexpr, SLOT: tl.constexpr, DIM: tl.constexpr):
    if view(SPEC, SLOT, "unit") == DIM:
        step = 1
    else:
        step = tl.load(row + DIM)
        if not of(SPEC, "wide"):
            step = step.to(tl.int32)
        step = tl.multiple_of(step, view(SPEC, SLOT, "multiple"))
    return step


@triton.jit
def locate(addresses, table, block, SPEC: tl.constexpr, SLOT: tl.constexpr):
    """Pointer to a tensor, and its strides over (row, column, y, x)."""
    if of(SPEC, "listed"):
        address = tl.load(addresses + block.to(tl.int64) * count_slots(SPEC) + SLOT)
    else:
        address = addresses[SLOT]
    pointer = address.to(tl.int64).to(pointer_type(SPEC, SLOT))
    if view(SPEC, SLOT, "aligned"):
        pointer = tl.multiple_of(pointer, 16)
    row = row_of(table, block, SPEC) + HEADER + TERM_WORDS * count_terms(SPEC) + 4 * SLOT
    s0 = _stride(row, SPEC, SLOT, 0)
    s1 = _stride(row, SPEC, SLOT, 1)
    s2 = _stride(row, SPEC, SLOT, 2)
    s3 = _stride(row, SPEC, SLOT, 3)
    return pointer, s0, s1, s2, s3


@constexpr_function
def precision_of(spec, precision, one, other):
    """The precision of the products of two tensors: halves are exact in TF32, one product of three is enough."""
    halves = spec.views[one].dtype in ("bfloat16", "float16") and spec.views[other].dtype in ("bfloat16", "float16")
    return "tf32" if halves and precision == "tf32x3" else precision


@constexpr_function
def scale_is_needed(spec, index):
    """Whether a term has a scale whose gradient is asked for."""
    return spec.d_scales >= 0 and spec.terms[index].scale >= 0


@triton.jit
def load(pointer, mask):
    """A tile in float32, zero outside."""
    return tl.load(pointer, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def outer(a, b):
    """The mask of a tile from those of its rows and columns."""
    return a[:, None] & b[None, :]


@triton.jit
def tap(p, SPEC: tl.constexpr, TERM: tl.constexpr):
    """Tap ``p`` of the block's kernel in a term's own, smaller one: ``y, x`` and whether it is there (Eq. 4's alignment)."""
    y = p // of(SPEC, "width") - term(SPEC, TERM, "top")
    x = p % of(SPEC, "width") - term(SPEC, TERM, "left")
    inside = (y >= 0) & (y < term(SPEC, TERM, "height")) & (x >= 0) & (x < term(SPEC, TERM, "width"))
    return y, x, inside


@triton.jit
def scale_of(rows, rows_ok, addresses, table, block, SPEC: tl.constexpr, TERM: tl.constexpr):
    """``s_b[o]`` of a term, fp32 like ``rows``; ones where it has no scaling (paper section 3.2)."""
    if term(SPEC, TERM, "scale") < 0:
        scale = tl.full(rows.shape, 1.0, tl.float32)
    else:
        pointer, s0, s1, _, _ = locate(addresses, table, block, SPEC, of(SPEC, "scales"))
        scale = load(pointer + term(SPEC, TERM, "scale") * s0 + rows * s1, rows_ok)
    return scale


@triton.jit
def store_scale_gradient(value, rows, rows_ok, tile, table, workspace, block, SPEC: tl.constexpr, TERM: tl.constexpr):
    """This program's part of ``ds[o] = sum_{i,p} dW * K_b``, to the workspace; ``value`` is fp32 [rows, columns]."""
    begin = term_word(table, block, SPEC, TERM, 1)
    if of(SPEC, "scalar"):
        tl.store(workspace + begin + tl.load(tile + 7), tl.sum(tl.sum(value, 1), 0))
    else:
        groups, out_per_group, _ = sizes(table, block, SPEC)
        place = workspace + begin + tl.load(tile + 6).to(tl.int64) * groups * out_per_group
        tl.store(place + rows, tl.sum(value, 1), mask=rows_ok)


@triton.jit
def filter_of(y, x, inside, rows, rows_ok, addresses, table, block, SPEC: tl.constexpr, TERM: tl.constexpr):
    """``F[o, y, x]`` of a pointwise term, fp32 like ``rows``: from memory, or ``1/(kh*kw)``; zero outside."""
    if term(SPEC, TERM, "filter") < 0:
        value = tl.where(rows_ok & inside, 1.0 / (term(SPEC, TERM, "height") * term(SPEC, TERM, "width")), 0.0)
    else:
        pointer, s0, _, s2, s3 = locate(addresses, table, block, SPEC, term(SPEC, TERM, "filter"))
        value = load(pointer + rows * s0 + y * s2 + x * s3, rows_ok & inside)
    return value


@triton.jit
def selected(o, i, in_per_group, SPEC: tl.constexpr, TERM: tl.constexpr):
    """The mask of the one input channel of each output channel, where a term has no pointwise factor."""
    return ((o // term(SPEC, TERM, "expand")) % in_per_group)[:, None] == i[None, :]
