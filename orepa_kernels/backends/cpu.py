"""The CPU backend: one call of compiled code each way (csrc/cpu)."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from ..autograd import ForwardAgain, FusedBackend, Gradients, compute_dtype, maker
from ..plan import Block
from . import native
from .base import YES, Verdict


class CpuBackend(FusedBackend):
    """Composes in float64 where an operand is, else in float32. Keeps nothing for the backward pass.

    A few output channels are worked on at a time, term after term, matrix products among them, so that what one step
    leaves is in the nearest cache for the next.
    """

    name = "cpu"

    def __init__(self) -> None:
        self._dtypes: frozenset[torch.dtype] = frozenset()

    def available(self) -> Verdict:
        missing = native.why_missing()
        if missing:
            if native.IN_SOURCE_TREE:  # easily not meant: Python looks into the folder that it is started in first
                warnings.warn(f"slower kernels are used: {missing}", stacklevel=2)
            return Verdict(False, missing)
        module = native.module()
        self._dtypes = frozenset(dtype for dtype, number in native.TYPES.items() if module.cpu_knows(number))
        return YES

    def runs_on(self, device: torch.device) -> Verdict:
        return YES if device.type == "cpu" else Verdict(False, f"the tensors are on {device.type}")

    def knows(self, dtype: torch.dtype) -> Verdict:
        if dtype in self._dtypes:
            return YES
        return Verdict(False, f"{dtype} needs a newer compiler than this build had (GCC 12, Clang 15)")

    def covers(self, block: Block) -> Verdict:
        return native.covers(block)

    def forward(
        self,
        blocks: Sequence[Block],
        tensors: Sequence[Sequence[Tensor]],
        dtype: torch.dtype,
        memory_format: torch.memory_format,
        folds: Sequence[Tensor | None],
    ) -> list[Tensor]:
        work = zip(blocks, tensors, folds, strict=True)
        return [_kernel(block, operands, dtype, memory_format, fold) for block, operands, fold in work]

    def forward_again(
        self, block: Block, operands: Sequence[Tensor], dtype: torch.dtype, memory_format: torch.memory_format
    ) -> ForwardAgain:
        describe = native.described_again(block, operands)
        new = maker(block.shape, dtype, operands[0].device, memory_format)
        run, plan, compute = native.module().cpu_forward, native.plan(block), native.TYPES[compute_dtype(operands)]

        def again(own: Sequence[Tensor]) -> Tensor:
            kernel = new()
            _alive, views = describe(own)
            run(plan, views, native.view(kernel), (), compute, torch.get_num_threads())
            return kernel

        return again

    def backward(
        self,
        blocks: Sequence[Block],
        tensors: Sequence[Sequence[Tensor]],
        upstream: Sequence[Tensor],
        needed: Sequence[Sequence[bool]],
    ) -> list[Gradients]:
        return [_gradients(*work) for work in zip(blocks, tensors, upstream, needed, strict=True)]


def _kernel(
    block: Block,
    operands: Sequence[Tensor],
    dtype: torch.dtype,
    memory_format: torch.memory_format,
    fold: Tensor | None,
) -> Tensor:
    """One block's kernel, times ``fold [O]``."""
    # Views may point into copies, which `_alive` holds until the call is over.
    kernel = torch.empty(block.shape, dtype=dtype, device="cpu", memory_format=memory_format)
    _alive, views = native.described(block, operands)
    factor = () if fold is None else native.view(fold)
    how = native.TYPES[compute_dtype(operands)], torch.get_num_threads()
    native.module().cpu_forward(native.plan(block), views, native.view(kernel), factor, *how)
    return kernel


def _gradients(block: Block, operands: Sequence[Tensor], upstream: Tensor, needed: Sequence[bool]) -> Gradients:
    """The gradients of one block's operands, given that of its kernel."""
    gradients = [torch.empty_like(t) if need else None for t, need in zip(operands, needed, strict=True)]
    compute = compute_dtype(operands)
    _alive, views = native.described(block, operands)
    written, targets = native.places(block, gradients, compute)
    upstream = native.collapsed(upstream)
    how = native.TYPES[compute], torch.get_num_threads()
    native.module().cpu_backward(native.plan(block), views, targets, native.view(upstream), *how)
    native.hand_over(gradients, written)
    return gradients
