"""The squeeze as operators registered with PyTorch: what torch.compile sees of a fused backend.

Python owns the schemas. Plans travel as text (see `orepa_kernels.plan.encode`), backends by name.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .autograd import Call
from .dispatch import calls, get
from .plan import decode

_LIBRARY = torch.library.Library("orepa_kernels", "DEF")
_LIBRARY.define(
    "squeeze(Tensor[] tensors, str[] plans, str backend, ScalarType dtype, bool channels_last) -> Tensor[]",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_LIBRARY.define(
    "squeeze_backward(Tensor[] upstream, Tensor[] tensors, str[] plans, str backend, bool[] needed) -> Tensor[]",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _call(
    backend: str,
    plans: Sequence[str],
    tensors: Sequence[Tensor],
    dtype: torch.dtype,
    memory_format: torch.memory_format,
) -> Call:
    """What squeezes operands of these layouts, from the cache of calls."""
    key = (backend, dtype, memory_format, *plans)
    call = calls.find(key, tensors)
    if call is None:
        blocks = [decode(text) for text in plans]
        call = Call(get(backend), blocks, tensors, dtype, memory_format)
        calls.add(key, tensors, call)
    assert isinstance(call, Call)
    return call


def _memory_format(channels_last: bool) -> torch.memory_format:
    return torch.channels_last if channels_last else torch.contiguous_format


def _squeeze(
    tensors: Sequence[Tensor], plans: Sequence[str], backend: str, dtype: torch.dtype, channels_last: bool
) -> list[Tensor]:
    return _call(backend, plans, tensors, dtype, _memory_format(channels_last)).prepared.forward(tensors)


def _squeeze_fake(
    tensors: Sequence[Tensor], plans: Sequence[str], backend: str, dtype: torch.dtype, channels_last: bool
) -> list[Tensor]:
    kernels = [tensors[0].new_empty(decode(text).shape, dtype=dtype) for text in plans]
    return [kernel.to(memory_format=_memory_format(channels_last)) for kernel in kernels]


def _backward(
    upstream: Sequence[Tensor], tensors: Sequence[Tensor], plans: Sequence[str], backend: str, needed: Sequence[bool]
) -> list[Tensor]:
    # No gradient depends on the dtype and memory format of kernels: any will do.
    prepared = _call(backend, plans, tensors, upstream[0].dtype, torch.contiguous_format).prepared
    gradients = prepared.backward(tensors, upstream, needed)
    return [gradient for gradient in gradients if gradient is not None]


def _backward_fake(
    upstream: Sequence[Tensor], tensors: Sequence[Tensor], plans: Sequence[str], backend: str, needed: Sequence[bool]
) -> list[Tensor]:
    return [torch.empty_like(tensor) for tensor, need in zip(tensors, needed, strict=True) if need]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    tensors, ctx.plans, ctx.backend, _, _ = inputs
    ctx.save_for_backward(*tensors)


def _gradients(ctx: Any, upstream: Sequence[Tensor]) -> tuple[Any, ...]:
    tensors = ctx.saved_tensors
    needed = [bool(need) for need in ctx.needs_input_grad[0]]
    gradients = iter(
        torch.ops.orepa_kernels.squeeze_backward(list(upstream), list(tensors), ctx.plans, ctx.backend, needed)
    )
    return [next(gradients) if need else None for need in needed], None, None, None, None


# One implementation for every device: the backend's name says where it runs.
_LIBRARY.impl("squeeze", _squeeze, "CompositeExplicitAutograd")
_LIBRARY.impl("squeeze_backward", _backward, "CompositeExplicitAutograd")
torch.library.register_fake("orepa_kernels::squeeze", _squeeze_fake, lib=_LIBRARY)
torch.library.register_fake("orepa_kernels::squeeze_backward", _backward_fake, lib=_LIBRARY)
torch.library.register_autograd("orepa_kernels::squeeze", _gradients, setup_context=_setup_context, lib=_LIBRARY)
