"""Who may use the Triton kernels: the backend as `orepa_kernels.backends` sees it. Does not import Triton."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from ...autograd import BackwardAgain, ForwardAgain, FusedBackend, Gradients
from ...plan import Block, Separable, kernel_size_of, sources
from ..base import YES, Verdict
from .device import INTERPRET, INTERPRETING, OLDEST

# Asked once, at import: torch.compile cannot trace the question.
_INSTALLED = importlib.util.find_spec("triton") is not None

#: taps of a separable term beyond which its gradients would no longer fit into registers
_MOST_SEPARABLE_TAPS = 49

#: by index of a CUDA or ROCm device (a plain dict: torch.compile cannot trace functools.cache)
_SUPPORTED: dict[int | None, bool] = {}


class TritonBackend(FusedBackend):
    """Every kind of term, in float32, bfloat16 and float16."""

    name = "triton"

    def available(self) -> Verdict:
        if not _INSTALLED:
            return Verdict(False, "triton is not installed")
        if INTERPRETING or torch.cuda.is_available() or torch.xpu.is_available():
            return YES
        return Verdict(False, f"no CUDA, ROCm or XPU device, and {INTERPRET}=1 is not set")

    def runs_on(self, device: torch.device) -> Verdict:
        if INTERPRETING:
            return YES if device.type == "cpu" else Verdict(False, f"{INTERPRET}=1 runs on CPU tensors, got {device}")
        if device.type == "xpu":
            return YES
        if device.type != "cuda":
            return Verdict(False, f"{device} is no CUDA, ROCm or XPU device")
        if device.index not in _SUPPORTED:
            _SUPPORTED[device.index] = (
                torch.version.hip is not None or torch.cuda.get_device_capability(device) >= OLDEST
            )
        if _SUPPORTED[device.index]:
            return YES
        return Verdict(False, f"{device} is older than compute capability {OLDEST[0]}.{OLDEST[1]}")

    def covers(self, block: Block) -> Verdict:
        height, width = block.kernel_size
        if height * width > _MOST_SEPARABLE_TAPS and _largest_separable(block) > _MOST_SEPARABLE_TAPS:
            return Verdict(False, f"a separable term has more than {_MOST_SEPARABLE_TAPS} taps")
        return YES

    def forward(
        self,
        blocks: Sequence[Block],
        tensors: Sequence[Sequence[Tensor]],
        dtype: torch.dtype,
        memory_format: torch.memory_format,
        folds: Sequence[Tensor | None],
    ) -> list[Tensor]:
        return _launch().forward(blocks, tensors, dtype, memory_format, folds)

    def forward_again(
        self, block: Block, operands: Sequence[Tensor], dtype: torch.dtype, memory_format: torch.memory_format
    ) -> ForwardAgain:
        return _launch().forward_again(block, operands, dtype, memory_format)

    def backward(
        self,
        blocks: Sequence[Block],
        tensors: Sequence[Sequence[Tensor]],
        upstream: Sequence[Tensor],
        needed: Sequence[Sequence[bool]],
    ) -> list[Gradients]:
        return _launch().backward(blocks, tensors, upstream, needed)

    def backward_again(
        self, block: Block, operands: Sequence[Tensor], upstream: Tensor, needed: Sequence[bool]
    ) -> BackwardAgain:
        return _launch().backward_again(upstream.device, block, needed)


@functools.cache
def _launch() -> ModuleType:
    """The module that imports Triton. (The import statement alone takes half a microsecond every time.)"""
    from . import launcher as launch

    return launch


def _largest_separable(block: Block) -> int:
    """The most taps of any separable term, nested blocks included. In plain loops, which torch.compile can trace."""
    most = 0
    for term in block.terms:
        if isinstance(term, Separable) and term.pointwise is not None:
            height, width = kernel_size_of(term.depthwise)
            most = max(most, height * width)
        for source in sources(term):
            if isinstance(source, Block):
                most = max(most, _largest_separable(source))
    return most
