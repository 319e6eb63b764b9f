"""The CPU backend: one call of compiled code each way and block (csrc/cpu)."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from ..plan import Block
from . import native
from .base import SUPPORTED, Backend, Gradients, Prepared, Signature, Support, empty_factory, split


class CpuBackend(Backend):
    """Composes in float64 where an operand is, else in float32. Saves nothing for the backward pass.

    A few output channels go through all terms, matrix products among them, while they are in the nearest cache.
    """

    name = "cpu"

    def __init__(self) -> None:
        self._dtypes: frozenset[torch.dtype] = frozenset()

    def available(self) -> Support:
        missing = native.why_missing()
        if missing:
            if native.IN_SOURCE_TREE:  # easily not meant: Python looks into the folder that it is started in first
                warnings.warn(f"slower kernels are used: {missing}", stacklevel=2)
            return Support(False, missing)
        module = native.module()
        self._dtypes = frozenset(dtype for dtype, number in native.TYPES.items() if module.cpu_supports_type(number))
        return SUPPORTED

    def supports_device(self, device: torch.device) -> Support:
        return SUPPORTED if device.type == "cpu" else Support(False, f"the tensors are on {device.type}")

    def supports_dtype(self, dtype: torch.dtype) -> Support:
        if dtype in self._dtypes:
            return SUPPORTED
        return Support(False, f"{dtype} needs a newer compiler than this build had (GCC 12, Clang 15)")

    def supports_block(self, block: Block) -> Support:
        return native.supports_block(block)

    def prepare(self, blocks: Sequence[Block], signature: Signature) -> Prepared:
        return _PreparedBlocks(blocks, signature)


class _PreparedBlocks(Prepared):
    """Blocks that are computed one after the other."""

    def __init__(self, blocks: Sequence[Block], signature: Signature) -> None:
        self._blocks = blocks
        self._parts = [_PreparedBlock(*part) for part in zip(blocks, signature.split(blocks), strict=True)]

    def forward(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        return [part.forward(own) for part, own in zip(self._parts, split(self._blocks, tensors), strict=True)]

    def backward(
        self, tensors: Sequence[Tensor], upstream: Sequence[Tensor | None], needed: Sequence[bool]
    ) -> Gradients:
        rows = zip(self._parts, split(self._blocks, tensors), upstream, split(self._blocks, needed), strict=True)
        return [g for part, operands, output, wanted in rows for g in part.backward(operands, output, wanted)]


class _PreparedBlock:
    """One block, ready for compiled code."""

    def __init__(self, block: Block, signature: Signature) -> None:
        self._block = block
        module, compute = native.module(), signature.compute_dtype
        self._run_forward, self._run_backward = module.cpu_forward, module.cpu_backward
        self._plan, self._compute, self._type = native.plan(block), compute, native.TYPES[compute]
        self._operands = native.PackedOperands(signature.layouts)
        kernel = signature.kernel(block)
        self._new_kernel, self._kernel_steps = empty_factory(kernel, signature.device), native.steps(kernel)
        self._gradients: dict[tuple[bool, ...], native.PackedGradients] = {}

    def forward(self, tensors: Sequence[Tensor]) -> Tensor:
        kernel = self._new_kernel()
        _alive, views = self._operands.pack(tensors)
        target = [kernel.data_ptr(), *self._kernel_steps]
        self._run_forward(self._plan, views, target, self._type, torch.get_num_threads())
        return kernel

    def backward(self, tensors: Sequence[Tensor], upstream: Tensor | None, needed: Sequence[bool]) -> Gradients:
        if upstream is None or not any(needed):
            return [None] * len(tensors)
        gradients = [torch.empty_like(tensor) if need else None for tensor, need in zip(tensors, needed, strict=True)]
        packed = self._gradients.get(tuple(needed))
        if packed is None:
            packed = self._gradients[tuple(needed)] = native.PackedGradients(self._block, gradients, self._compute)
        _alive, views = self._operands.pack(tensors)
        buffers, targets = packed.pack(gradients)
        upstream = native.collapsed(upstream)
        self._run_backward(self._plan, views, targets, native.view(upstream), self._type, torch.get_num_threads())
        packed.copy_back(gradients, buffers)
        return gradients
