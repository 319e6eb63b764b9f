"""Speed up Triton's interpreter: most of its time goes into what it does at every operation, and need not.

- It replaces the functions of ``triton.language`` when a launch begins, and looks for more to replace in every call of one
  jitted function by another. Once per launch and module is enough.
- It checks every sum, difference and product of 32-bit integers for overflow in eight operations of the language. NumPy
  needs three.
- It derives the type of every tuple, shapes included. Hardly any is ever asked for.
- It builds a table of all dtypes to look one up.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from triton.language import core
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter


def speed_up() -> None:
    """Patch the interpreter of this process."""
    _patch_language_once()
    _cache_dtypes()
    _derive_tuple_types_lazily()
    TritonSemantic.binary_op_sanitize_overflow_impl = _check_overflow


def _patch_language_once() -> None:
    known: set[int] = set()  # modules, by their globals, whose names have been patched in this launch
    patch, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__

    def patched(function: Any) -> Any:
        module = id(function.__globals__)
        if module in known:
            return None  # asked for by a call, which leaves it to the launch to put things back
        known.add(module)
        return patch(function)

    @functools.wraps(launch)
    def launched(*arguments: Any, **options: Any) -> Any:
        known.clear()
        try:
            return launch(*arguments, **options)
        finally:
            known.clear()

    interpreter._patch_lang = patched
    interpreter.GridExecutor.__call__ = launched


def _cache_dtypes() -> None:
    known: dict[str, Any] = {}
    find = interpreter._get_np_dtype

    def cached(dtype: Any) -> Any:
        name = dtype.scalar.name
        if name not in known:
            known[name] = find(dtype)
        return known[name]

    interpreter._get_np_dtype = cached


def _derive_tuple_types_lazily() -> None:
    eager = core.tuple.__init__

    def lazy(self: Any, args: Any, type: Any = None) -> None:
        if type is None:
            self.values = list(args)
        else:
            eager(self, args, type)

    derived = functools.cached_property(lambda self: core._type_for_tuple_values(self.values))
    derived.__set_name__(core.tuple, "type")
    core.tuple.__init__, core.tuple.type = lazy, derived


_EXACT = {"add": np.add, "sub": np.subtract, "mul": np.multiply}


def _check_overflow(self: Any, lhs: Any, rhs: Any, operation: Any) -> None:
    """Raise where an operation on integers of at most 32 bits overflows, as the method that this replaces does."""
    dtype = lhs.type.scalar
    if dtype.int_bitwidth < 64:
        exact = _EXACT[operation.__name__](lhs.handle.data, rhs.handle.data, dtype=np.int64)
        in_range = dtype.get_int_min_value() <= exact.min() and exact.max() <= dtype.get_int_max_value()
        assert in_range, f"{dtype} overflow detected for operation {operation.__name__}"
