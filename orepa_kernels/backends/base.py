"""What a backend is: one predicate with its reason, `Backend.prepare`, and the raw run of what it prepared.

A training step makes the same squeezes every time. `Backend.prepare` works out everything that does not depend on
addresses; what it returns runs any number of times, on plain tensors and without autograd. Nested blocks, autograd, double
backward, torch.compile and validation are written once, above: `orepa_kernels.nested`, `orepa_kernels.autograd`,
`orepa_kernels.ops`, `orepa_kernels.api`.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, TypeAlias, TypeVar

import torch
from torch import Tensor

from ..plan import Block

#: gradients of all operands of all blocks, one after the other; None where none was asked for
Gradients: TypeAlias = list[Tensor | None]

_Value = TypeVar("_Value")


class BackendError(RuntimeError):
    """A backend was asked for by name and cannot do the work; the message says why."""


@dataclass(frozen=True)
class Support:
    """Whether a backend can run something, and the reason where it cannot. True or false in a condition.

    Args:
        ok: whether it can.
        reason: why not; empty where it can.
    """

    ok: bool
    reason: str = ""

    def __bool__(self) -> bool:
        return self.ok


SUPPORTED = Support(True)


@dataclass(frozen=True)
class Request:
    """One block to squeeze, as far as the choice of a backend depends on it."""

    block: Block
    device: torch.device
    dtype: torch.dtype  # of the operands; float64 where a filter is
    out_dtype: torch.dtype  # of the kernel
    plain: bool = True  # whether raw memory may be read, see `orepa_kernels.guards.is_plain`


class Layout(NamedTuple):
    """How one tensor lies in memory."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def dense(cls, shape: Sequence[int], dtype: torch.dtype, memory_format: torch.memory_format) -> Layout:
        """The layout of ``torch.empty`` in that memory format."""
        stride = torch.empty(shape, device="meta", memory_format=memory_format).stride()
        return cls(tuple(shape), stride, dtype)


def layout_of(tensor: Tensor) -> Layout:
    """Return how a tensor lies in memory."""
    return Layout(tuple(tensor.shape), tensor.stride(), tensor.dtype)


@dataclass(frozen=True)
class Signature:
    """What calls have in common that run the same prepared launch. Holds no tensor."""

    layouts: tuple[Layout, ...]  # of the operands of all blocks, one after the other
    device: torch.device
    dtype: torch.dtype  # of the kernels
    memory_format: torch.memory_format  # of the kernels

    @classmethod
    def of(cls, tensors: Sequence[Tensor], dtype: torch.dtype, memory_format: torch.memory_format) -> Signature:
        """The signature of a call with these operands."""
        return cls(tuple(map(layout_of, tensors)), tensors[0].device, dtype, memory_format)

    @property
    def compute_dtype(self) -> torch.dtype:
        """What blocks are composed in: float32 at least, because roundings of every product of a sequence would add up."""
        return torch.float64 if any(layout.dtype == torch.float64 for layout in self.layouts) else torch.float32

    def kernel(self, block: Block) -> Layout:
        """The layout of a block's kernel."""
        return Layout.dense(block.shape, self.dtype, self.memory_format)

    def split(self, blocks: Sequence[Block]) -> list[Signature]:
        """The signature of each block."""
        return [replace(self, layouts=tuple(layouts)) for layouts in split(blocks, self.layouts)]


def split(blocks: Sequence[Block], values: Sequence[_Value]) -> list[Sequence[_Value]]:
    """Cut a list with one value per operand of all blocks into the parts of each block."""
    if len(blocks) == 1:
        return [values]
    parts, begin = [], 0
    for block in blocks:
        parts.append(values[begin : begin + len(block.operands)])
        begin += len(block.operands)
    return parts


def empty_factory(layout: Layout, device: torch.device) -> Callable[[], Tensor]:
    """Return a function that allocates such a tensor, uninitialised."""
    return functools.partial(torch.empty_strided, layout.shape, layout.stride, dtype=layout.dtype, device=device)


class Prepared(ABC):
    """A launch of blocks of one `Signature`, ready to run: raw memory in, new tensors out, no autograd.

    Operands are those of all blocks, one after the other. Global settings (precision, threads), the stream and the current
    device may differ from run to run. The same inputs give the same bits every time.
    """

    @abstractmethod
    def forward(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Squeeze: one new kernel ``[O, I/g, kh, kw]`` per block."""

    @abstractmethod
    def backward(
        self, tensors: Sequence[Tensor], upstream: Sequence[Tensor | None], needed: Sequence[bool]
    ) -> Gradients:
        """Gradients of `forward`.

        Args:
            tensors: as for `forward`.
            upstream: per block, the gradient of its kernel, ``[O, I/g, kh, kw]`` of any dtype and any strides; None where the
                block has none, and so no gradient of it is needed.
            needed: per operand, whether its gradient is asked for.

        Returns:
            Per operand the gradient, with the shape, dtype and strides of ``torch.empty_like(operand)``, or None.
        """


class Backend(ABC):
    """One way to compute a squeeze."""

    name: str

    #: whether `Prepared.forward` is made of operations that autograd, tracers and torch.compile see
    traceable = False

    @abstractmethod
    def available(self) -> Support:
        """Whether this backend is built and can run anything on this machine."""

    def supports(self, request: Request) -> Support:
        """Whether this backend covers ``request``; called only where `available`. Traced by torch.compile."""
        support = self.supports_device(request.device)
        if not support:
            return support
        if not request.plain:
            return Support(False, "tensor subclasses, torch.func, torch.jit and forward-mode AD need plain operations")
        for dtype in (request.dtype, request.out_dtype):
            support = self.supports_dtype(dtype)
            if not support:
                return support
        return self.supports_block(request.block)

    def supports_device(self, device: torch.device) -> Support:
        """Whether it runs on a device."""
        return SUPPORTED

    def supports_dtype(self, dtype: torch.dtype) -> Support:
        """Whether it reads and writes tensors of a dtype."""
        if dtype in (torch.float32, torch.bfloat16, torch.float16):
            return SUPPORTED
        return Support(False, f"{dtype} is not one of float32, bfloat16, float16")

    def supports_block(self, block: Block) -> Support:
        """Whether it computes a block, and those nested in it."""
        return SUPPORTED

    @abstractmethod
    def prepare(self, blocks: Sequence[Block], signature: Signature) -> Prepared:
        """Work out what does not depend on addresses.

        Args:
            blocks: plans that do not depend on each other; flat ones (see `orepa_kernels.nested`), unless `traceable`.
            signature: of their operands and kernels. Dtypes may differ within a block: filters and kernels of nested blocks
                can be wider than parameters. Any strides.
        """
