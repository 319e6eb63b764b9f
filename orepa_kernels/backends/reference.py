"""The reference backend: plain PyTorch, any device, any dtype, differentiable to any order."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import reference
from ..guards import no_autocast
from ..plan import Block
from .base import SUPPORTED, Backend, Gradients, Prepared, Request, Signature, Support, split


class ReferenceBackend(Backend):
    """`orepa_kernels.reference`, composed in float32 at least and rounded once."""

    name = "reference"
    traceable = True

    def available(self) -> Support:
        return SUPPORTED

    def supports(self, request: Request) -> Support:
        return SUPPORTED

    def prepare(self, blocks: Sequence[Block], signature: Signature) -> Prepared:
        return _PreparedReference(blocks, signature)


class _PreparedReference(Prepared):
    def __init__(self, blocks: Sequence[Block], signature: Signature) -> None:
        self._blocks, self._signature = blocks, signature

    def forward(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        kernels, signature = [], self._signature
        for block, operands in zip(self._blocks, split(self._blocks, tensors), strict=True):
            # Half-precision operands are composed in float32: rounding every product of a sequence would add up.
            compute = torch.promote_types(operands[0].dtype, torch.float32)
            values = {op.name: t.to(compute) for op, t in zip(block.operands, operands, strict=True)}
            with no_autocast(operands[0].device.type):
                kernel = reference.squeeze_block(block, values)
            kernels.append(kernel.to(signature.dtype).contiguous(memory_format=signature.memory_format))
        return kernels

    def backward(
        self, tensors: Sequence[Tensor], upstream: Sequence[Tensor | None], needed: Sequence[bool]
    ) -> Gradients:
        return gradients(self._blocks, tensors, upstream, needed)


def gradients(
    blocks: Sequence[Block], tensors: Sequence[Tensor], upstream: Sequence[Tensor | None], needed: Sequence[bool]
) -> Gradients:
    """Return gradients by plain operations, without a graph; see `Prepared.backward`."""
    with torch.enable_grad():
        leaves = [tensor.detach().requires_grad_(need) for tensor, need in zip(tensors, needed, strict=True)]
        return differentiable_gradients(blocks, leaves, upstream, needed, create_graph=False)


def differentiable_gradients(
    blocks: Sequence[Block],
    tensors: Sequence[Tensor],
    upstream: Sequence[Tensor | None],
    needed: Sequence[bool],
    create_graph: bool = True,
) -> Gradients:
    """Return gradients by plain operations, which can be differentiated again; see `Prepared.backward`."""
    kernels, outputs = [], []
    with no_autocast(tensors[0].device.type):
        for block, operands, gradient in zip(blocks, split(blocks, tensors), upstream, strict=True):
            if gradient is None:
                continue
            compute = torch.float64 if torch.float64 in {t.dtype for t in operands} else torch.float32
            named = {op.name: t.to(compute) for op, t in zip(block.operands, operands, strict=True)}
            kernels.append(reference.squeeze_block(block, named))
            outputs.append(gradient.to(kernels[-1].dtype))
        if not kernels:
            return [None] * len(tensors)
        wanted = [tensor for tensor, need in zip(tensors, needed, strict=True) if need]
        values = iter(torch.autograd.grad(kernels, wanted, outputs, create_graph=create_graph, allow_unused=True))
    return [next(values) if need else None for need in needed]
