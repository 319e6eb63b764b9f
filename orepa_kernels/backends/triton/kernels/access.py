"""How kernels read what a launch passes: sizes and strides from the table, addresses, taps, factors.

Common parameters:

- ``block``: (addresses, table, index). Addresses are arguments, one per slot, or a table with a row per block; the other table
  has sizes and strides, see `tile_map.block_words`; the index is that of a row in both.
- ``task``: pointer to a row of the tile map, (block, role, group, three coordinates, slice, serial number).
- ``tile``: the channels of a program, see `channels`.
- ``SPEC``: the structure, a `spec.Spec`; ``TERM``: index of one of its terms; ``TILES``: tile sizes, of `configs`.
"""

import triton
import triton.language as tl

#: words of the table: per block and per term (see `tile_map.block_words`); per slot there are four
HEADER = tl.constexpr(3)
TERM_WORDS = tl.constexpr(4)
#: words of a row of the tile map
TILE_WORDS = tl.constexpr(8)


@triton.constexpr_function
def field(structure, name):
    """Return a field of the structure, or of the tile sizes."""
    return getattr(structure, name)


@triton.constexpr_function
def term(spec, index, name):
    """Return a field of one of the structure's terms."""
    return getattr(spec.terms[index], name)


@triton.constexpr_function
def view(spec, slot, name):
    """Return a field of one of the structure's tensors."""
    return getattr(spec.views[slot], name)


@triton.constexpr_function
def count_terms(spec):
    """Return the number of terms."""
    return len(spec.terms)


@triton.constexpr_function
def count_slots(spec):
    """Return the number of tensors."""
    return len(spec.views)


@triton.constexpr_function
def pointer_type(spec, slot):
    """Return the type of a tensor's address."""
    return tl.pointer_type(getattr(tl, spec.views[slot].dtype))


@triton.constexpr_function
def needs_scale_gradient(spec, index):
    """Return whether a term has a scale whose gradient is asked for."""
    return spec.needs_scale_gradient(spec.terms[index])


@triton.jit
def as_pointer(address, DTYPE: tl.constexpr):
    """Return an integer argument as a pointer."""
    return address.to(tl.int64).to(tl.pointer_type(DTYPE))


@triton.jit
def open_tile(addresses, table, tiles, SPEC: tl.constexpr):
    """Return ``task`` and ``block`` of this program, from the arguments of a launch."""
    table = as_pointer(table, tl.int64)
    task = as_pointer(tiles, tl.int32) + tl.program_id(0) * TILE_WORDS
    if field(SPEC, "batched"):
        addresses = as_pointer(addresses, tl.int64)
    return task, (addresses, table, tl.load(task))


@triton.jit
def block_row(block, SPEC: tl.constexpr):
    """Return where a block's words begin in the table."""
    _, table, index = block
    return table + index * (HEADER + TERM_WORDS * count_terms(SPEC) + 4 * count_slots(SPEC))


@triton.jit
def sizes(block, SPEC: tl.constexpr):
    """Return groups, output channels per group, input channels per group."""
    row = block_row(block, SPEC)
    groups = tl.load(row).to(tl.int32)
    out_per_group = tl.load(row + 1).to(tl.int32)
    in_per_group = tl.multiple_of(tl.load(row + 2).to(tl.int32), field(SPEC, "in_multiple"))
    return groups, out_per_group, in_per_group


@triton.jit
def channels(task, block, SPEC: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Return ``tile``: group; output channels in it, their mask, their rows in tensors; input channels, mask, their number."""
    _, out_per_group, in_per_group = sizes(block, SPEC)
    group = tl.load(task + 2)
    o = tl.load(task + 3) * ROWS + tl.arange(0, ROWS)
    i = tl.load(task + 4) * COLUMNS + tl.arange(0, COLUMNS)
    return group, o, o < out_per_group, group * out_per_group + o, i, i < in_per_group, in_per_group


@triton.jit
def term_word(block, SPEC: tl.constexpr, TERM: tl.constexpr, WORD: tl.constexpr):
    """Return a word of a term: 0 is its internal channels per group, the others are offsets in the workspace."""
    return tl.load(block_row(block, SPEC) + HEADER + TERM_WORDS * TERM + WORD)


@triton.jit
def internal_channels(block, SPEC: tl.constexpr, TERM: tl.constexpr):
    """Return the internal channels per group of a composed term."""
    count = term_word(block, SPEC, TERM, 0).to(tl.int32)
    return tl.multiple_of(count, term(SPEC, TERM, "internal_multiple"))


@triton.jit
def _stride(row, SPEC: tl.constexpr, SLOT: tl.constexpr, DIM: tl.constexpr):
    if view(SPEC, SLOT, "unit") == DIM:
        step = 1
    else:
        step = tl.load(row + DIM)
        if not field(SPEC, "wide"):
            step = step.to(tl.int32)
        step = tl.multiple_of(step, view(SPEC, SLOT, "multiple"))
    return step


@triton.jit
def locate(block, SPEC: tl.constexpr, SLOT: tl.constexpr):
    """Return the pointer to a tensor, and its strides over (row, column, y, x)."""
    addresses, _, index = block
    if field(SPEC, "batched"):
        address = tl.load(addresses + index.to(tl.int64) * count_slots(SPEC) + SLOT)
    else:
        address = addresses[SLOT]
    pointer = address.to(tl.int64).to(pointer_type(SPEC, SLOT))
    if view(SPEC, SLOT, "aligned"):
        pointer = tl.multiple_of(pointer, 16)
    row = block_row(block, SPEC) + HEADER + TERM_WORDS * count_terms(SPEC) + 4 * SLOT
    s0 = _stride(row, SPEC, SLOT, 0)
    s1 = _stride(row, SPEC, SLOT, 1)
    s2 = _stride(row, SPEC, SLOT, 2)
    s3 = _stride(row, SPEC, SLOT, 3)
    return pointer, s0, s1, s2, s3


@triton.jit
def load(pointer, mask):
    """Load a tile, with zeros outside."""
    return tl.load(pointer, mask=mask, other=0.0)


@triton.jit
def load_fp32(pointer, mask):
    """Load a tile in float32, with zeros outside."""
    return load(pointer, mask).to(tl.float32)


@triton.jit
def multiply(one, other, total, PRECISION: tl.constexpr):
    """Return ``total + one @ other``. Halves are exact in TF32: one product of two such factors is enough."""
    one_fp32 = _factor(one, PRECISION)
    other_fp32 = _factor(other, PRECISION)
    if PRECISION == "rounded" or (PRECISION == "tf32x3" and one.dtype != tl.float32 and other.dtype != tl.float32):
        total = tl.dot(one_fp32, other_fp32, total, input_precision="tf32")
    else:
        total = tl.dot(one_fp32, other_fp32, total, input_precision=PRECISION)
    return total


@triton.jit
def _factor(value, PRECISION: tl.constexpr):
    """Return a factor in float32; ``"rounded"`` to TF32's nearest, which NVIDIA's tensor cores would truncate.

    They truncate all the same: half of a unit in the last place, 2^-11 of the power of two below, is added, exactly.
    """
    if PRECISION == "rounded" and value.dtype == tl.float32:
        power = (value.to(tl.int32, bitcast=True) & -0x800000).to(tl.float32, bitcast=True)
        value += power * 2**-11
    return value.to(tl.float32)


@triton.jit
def relayout(value, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Return a product as it is, but free of the tensor cores' layout, into which the compiler would move all that is added."""
    return tl.reshape(tl.permute(tl.reshape(value, (ROWS, 1, COLUMNS)), (1, 0, 2)), (ROWS, COLUMNS))


@triton.jit
def store(pointer, value, mask):
    """Store a tile in the dtype of the tensor."""
    tl.store(pointer, value.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def outer(a, b):
    """Return the mask of a tile, from those of its rows and columns."""
    return a[:, None] & b[None, :]


@triton.jit
def align_tap(p, SPEC: tl.constexpr, TERM: tl.constexpr):
    """Map tap ``p`` of the block's kernel to a term's smaller one: ``y, x`` and whether it is inside (Eq. 4's alignment)."""
    y = p // field(SPEC, "width") - term(SPEC, TERM, "top")
    x = p % field(SPEC, "width") - term(SPEC, TERM, "left")
    inside = (y >= 0) & (y < term(SPEC, TERM, "height")) & (x >= 0) & (x < term(SPEC, TERM, "width"))
    return y, x, inside


@triton.jit
def load_scale(rows, rows_ok, block, SPEC: tl.constexpr, TERM: tl.constexpr):
    """Load ``s_b[o]`` of a term, fp32 like ``rows``; ones where it has no scaling (paper section 3.2)."""
    if term(SPEC, TERM, "scale") < 0:
        scale = tl.full(rows.shape, 1.0, tl.float32)
    else:
        pointer, s0, s1, _, _ = locate(block, SPEC, field(SPEC, "scales"))
        scale = load_fp32(pointer + term(SPEC, TERM, "scale") * s0 + rows * s1, rows_ok)
    return scale


@triton.jit
def store_scale_gradient(value, rows, rows_ok, task, workspace, block, SPEC: tl.constexpr, TERM: tl.constexpr):
    """Store this program's part of ``ds[o] = sum_{i,p} dW * K_b`` to the workspace; ``value`` is fp32 [rows, columns]."""
    begin = term_word(block, SPEC, TERM, 1)
    if field(SPEC, "scalar"):
        tl.store(workspace + begin + tl.load(task + 7), tl.sum(tl.sum(value, 1), 0))
    else:
        groups, out_per_group, _ = sizes(block, SPEC)
        pointer = workspace + begin + tl.load(task + 6).to(tl.int64) * groups * out_per_group
        tl.store(pointer + rows, tl.sum(value, 1), mask=rows_ok)
