"""Two repairs of Triton's interpreter, which runs these kernels on CPU tensors. Compiled kernels do not need them."""

from __future__ import annotations

import importlib
from typing import Any


def repair() -> None:
    """Let the interpreter's scalars be the bounds of a loop, and combinations of masks be masks.

    It keeps scalars as arrays of one element, which NumPy 2.4 no longer counts by; and Triton 3.9's turns a mask that is
    combined with a scalar condition into integers, which its own loads then refuse.
    """
    interpreter: Any = importlib.import_module("triton.runtime.interpreter")
    if getattr(interpreter, "orepa_repaired", False):
        return
    interpreter.orepa_repaired = True
    patch, builder = interpreter._patch_lang_tensor, interpreter.InterpreterBuilder
    load, store = builder.create_masked_load, builder.create_masked_store

    def patched(tensor: Any, *scope: Any) -> None:
        patch(tensor, *scope)
        tensor.__index__ = lambda self: int(self.handle.data.item())

    def masked_load(self: Any, pointers: Any, mask: Any, *others: Any) -> Any:
        mask.data = mask.data.astype(bool)
        return load(self, pointers, mask, *others)

    def masked_store(self: Any, pointers: Any, value: Any, mask: Any, *others: Any) -> Any:
        mask.data = mask.data.astype(bool)
        return store(self, pointers, value, mask, *others)

    interpreter._patch_lang_tensor = patched
    builder.create_masked_load, builder.create_masked_store = masked_load, masked_store
