"""The reference backend: plain PyTorch, any device, any dtype, differentiable to any order."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import reference
from ..autocast import no_autocast
from ..plan import Block
from .base import YES, Backend, Request, Verdict


class ReferenceBackend(Backend):
    """`orepa_kernels.reference`, composed in float32 at least and rounded once."""

    name = "reference"

    def available(self) -> Verdict:
        return YES

    def can_run(self, request: Request) -> Verdict:
        return YES

    def squeeze(
        self,
        blocks: Sequence[Block],
        tensors: Sequence[Sequence[Tensor]],
        dtype: torch.dtype,
        memory_format: torch.memory_format,
        folds: Sequence[Tensor | None],
    ) -> list[Tensor]:
        kernels = []
        for block, operands, factor in zip(blocks, tensors, folds, strict=True):
            # Half-precision operands are composed in float32: rounding every product of a sequence would add up.
            compute = torch.promote_types(operands[0].dtype, torch.float32)
            values = {op.name: t.to(compute) for op, t in zip(block.operands, operands, strict=True)}
            with no_autocast(operands[0].device.type):
                kernel = reference.fold(reference.squeeze_block(block, values), factor)
            kernels.append(kernel.to(dtype).contiguous(memory_format=memory_format))
        return kernels
