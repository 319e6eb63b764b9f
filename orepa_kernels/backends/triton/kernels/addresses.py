"""Fills the table from which a launch of many blocks reads its addresses: a CUDA graph records them as kernel arguments."""

import triton
import triton.language as tl

from .access import as_pointer


@triton.jit
def write_words(words, table, COUNT: tl.constexpr):
    """Write COUNT integers to a table, int64."""
    for n in tl.static_range(COUNT):
        tl.store(as_pointer(table, tl.int64) + n, words[n].to(tl.int64))
