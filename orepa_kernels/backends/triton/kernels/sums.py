"""The second launch of the backward pass: the parts that programs left in the workspace, added in a fixed order."""

import triton
import triton.language as tl

from .access import as_pointer, count_slots, field, pointer_type, store

#: words of a job, see `tile_map.BackwardTables`
JOB_WORDS = tl.constexpr(16)


@triton.jit
def add_parts(addresses, jobs, tiles, workspace, SPEC: tl.constexpr, PARTS: tl.constexpr, COUNT: tl.constexpr):
    """Sum COUNT elements of one gradient, ``sum_n part[n]``, PARTS at a time, and store them with the gradient's own strides.

    Args:
        jobs: rows of (block, slot, first word in the workspace, parts, step from part to part, elements, rows x columns,
            columns, width, offset in the gradient, its four strides); elements are ordered (y, x, row, column).
        tiles: rows of (job, tile of elements).
    """
    tile = as_pointer(tiles, tl.int32) + tl.program_id(0) * 2
    workspace = as_pointer(workspace, tl.float32)
    job = as_pointer(jobs, tl.int64) + tl.load(tile) * JOB_WORDS
    slot = tl.load(job + 1)
    parts = tl.load(job + 3)
    step = tl.load(job + 4)
    elements = tl.load(job + 5).to(tl.int32)
    plane = tl.load(job + 6).to(tl.int32)
    columns = tl.load(job + 7).to(tl.int32)
    width = tl.load(job + 8).to(tl.int32)
    x = tl.load(tile + 1) * COUNT + tl.arange(0, COUNT)
    ok = x < elements
    n = tl.arange(0, PARTS)
    begin = workspace + tl.load(job + 2)
    total = tl.zeros((COUNT,), tl.float32)
    for n0 in range(0, parts, PARTS):
        pointer = begin + (n0 + n)[:, None] * step + x[None, :]
        total += tl.sum(tl.load(pointer, mask=(n0 + n < parts)[:, None] & ok[None, :], other=0.0), 0)

    p = x // plane
    row = x % plane // columns
    column = x % plane % columns
    offset = tl.load(job + 9) + row * tl.load(job + 10) + column * tl.load(job + 11)
    offset += p // width * tl.load(job + 12) + p % width * tl.load(job + 13)
    if field(SPEC, "batched"):
        table = as_pointer(addresses, tl.int64)
    for s in tl.static_range(count_slots(SPEC)):
        if s > field(SPEC, "upstream"):  # a gradient
            if slot == s:
                if field(SPEC, "batched"):
                    address = tl.load(table + tl.load(job) * count_slots(SPEC) + s)
                else:
                    address = addresses[s]
                store(address.to(tl.int64).to(pointer_type(SPEC, s)) + offset, total, ok)
