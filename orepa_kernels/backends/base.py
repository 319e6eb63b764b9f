"""What a backend is: a name, one predicate with its reason, and the squeeze itself.

The same predicate serves the automatic choice and an explicit request, so the two can never disagree.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from ..plan import Block

#: one block's operands to its kernel, as a list of one
Shortcut: TypeAlias = Callable[[Sequence[Tensor]], list[Tensor]]


class BackendError(RuntimeError):
    """A backend was asked for by name and cannot do the work; the message says why."""


@dataclass(frozen=True)
class Verdict:
    """Whether a backend can run something, and the reason where it cannot. True or false in a condition.

    Args:
        ok: whether it can.
        reason: why not; empty where it can.
    """

    ok: bool
    reason: str = ""

    def __bool__(self) -> bool:
        return self.ok


YES = Verdict(True)


@dataclass(frozen=True)
class Request:
    """What a backend is asked to do for one block."""

    block: Block
    device: torch.device
    #: dtype of the operands
    dtype: torch.dtype
    #: dtype of the kernel to return
    out_dtype: torch.dtype
    #: whether the operands are ordinary tensors with memory of their own: no subclass, no functional transform
    plain: bool = True


class Backend(ABC):
    """One way to compute a squeeze."""

    name: str

    @abstractmethod
    def available(self) -> Verdict:
        """Whether this backend is built and can run anything on this machine."""

    @abstractmethod
    def can_run(self, request: Request) -> Verdict:
        """Whether this backend covers ``request``; called only where `available`."""

    @abstractmethod
    def squeeze(
        self,
        blocks: Sequence[Block],
        tensors: Sequence[Sequence[Tensor]],
        dtype: torch.dtype,
        memory_format: torch.memory_format,
        folds: Sequence[Tensor | None],
    ) -> list[Tensor]:
        """Squeeze validated blocks, differentiably.

        Args:
            blocks: the plans.
            tensors: per block, one tensor per operand, in ``block.operands`` order.
            dtype: of the returned kernels.
            memory_format: of the returned kernels.
            folds: per block None, or ``[O]``: a factor of each output channel's kernel, multiplied before rounding.

        Returns:
            One ``[O, I/g, kh, kw]`` per block.
        """

    def shortcut(
        self, block: Block, operands: Sequence[Tensor], dtype: torch.dtype, memory_format: torch.memory_format
    ) -> Shortcut | None:
        """`squeeze` of this block alone, without a fold, for other operands of the same signature (`orepa_kernels.guards`).

        Called once for each signature, so that it may work out what is the same every time. None where there is nothing to
        gain.
        """
        return None
