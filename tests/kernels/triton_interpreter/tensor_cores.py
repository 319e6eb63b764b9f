"""What GPUs round and the interpreter does not, or otherwise: factors of TF32 products, and bfloat16."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton._C.libtriton import ir
from triton.runtime import interpreter


def emulate_rounding() -> None:
    """Patch the interpreter of this process."""
    builder = interpreter.InterpreterBuilder
    dot, cast = builder.create_dot, builder.cast_impl

    def create_dot(self: Any, a: Any, b: Any, d: Any, precision: Any, imprecise: int) -> Any:
        def product(one: Any, other: Any, total: Any) -> Any:
            factors = (interpreter.TensorHandle(data, tl.float32) for data in (one, other))
            return dot(self, *factors, total, precision, imprecise)

        if precision == ir.INPUT_PRECISION.IEEE:
            return dot(self, a, b, d, precision, imprecise)
        big, other_big = truncated(a.data), truncated(b.data)
        if precision == ir.INPUT_PRECISION.TF32x3:
            d = product(truncated(a.data - big), other_big, product(big, truncated(b.data - other_big), d))
        return product(big, other_big, d)

    def cast_impl(self: Any, source: Any, target: Any) -> Any:
        if (source.dtype.scalar, target.scalar) == (tl.float32, tl.bfloat16):  # the interpreter's is towards zero
            nearest = torch.from_numpy(np.ascontiguousarray(source.data)).to(torch.bfloat16)
            return interpreter.TensorHandle(nearest.view(torch.int16).numpy().view(np.uint16), tl.bfloat16)
        return cast(self, source, target)

    builder.create_dot, builder.cast_impl = create_dot, cast_impl


def truncated(values: np.ndarray) -> np.ndarray:
    """Return float32 values as tensor cores read them: the 10 leading bits of the mantissa."""
    return (np.ascontiguousarray(values).view(np.int32) & -(2**13)).view(np.float32)
