"""Triton's interpreter, faster: its language is patched once per launch and module, not at every call of a function.

While kernels are interpreted, the functions of ``triton.language`` are replaced by those of the interpreter. Triton does so
when a launch begins, and again in every call of one jitted function by another, which finds nothing left to replace. Ours
call each other hundreds of times per program: looking in vain was 40% of what these tests took.
"""

from __future__ import annotations

import functools
from typing import Any

from triton.runtime import interpreter


def patch_once() -> None:
    """Of Triton's interpreter in this process."""
    known: set[int] = set()  # whose names have been patched in this launch: modules, by their globals
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
