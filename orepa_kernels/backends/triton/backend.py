"""Who may use the Triton kernels: the backend as `orepa_kernels.dispatch` sees it. Does not import Triton."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

import torch

from ...plan import Block, Separable, kernel_size_of, sources
from ..base import SUPPORTED, Backend, Prepared, Signature, Support
from .device import INTERPRET, INTERPRETING, OLDEST

# Asked once, at import: torch.compile cannot trace the question.
_INSTALLED = importlib.util.find_spec("triton") is not None

#: taps of a separable term beyond which its gradients would no longer fit into registers
_MOST_SEPARABLE_TAPS = 49


class TritonBackend(Backend):
    """Every kind of term, in float32, bfloat16 and float16."""

    name = "triton"

    def available(self) -> Support:
        if not _INSTALLED:
            return Support(False, "triton is not installed")
        if INTERPRETING or torch.cuda.is_available() or torch.xpu.is_available():
            return SUPPORTED
        return Support(False, f"no CUDA, ROCm or XPU device, and {INTERPRET}=1 is not set")

    def supports_device(self, device: torch.device) -> Support:
        if INTERPRETING:
            return (
                SUPPORTED
                if device.type == "cpu"
                else Support(False, f"{INTERPRET}=1 runs on CPU tensors, got {device}")
            )
        if device.type == "xpu":
            return SUPPORTED
        if device.type != "cuda":
            return Support(False, f"{device} is no CUDA, ROCm or XPU device")
        if torch.version.hip is not None or torch.cuda.get_device_capability(device) >= OLDEST:
            return SUPPORTED
        return Support(False, f"{device} is older than compute capability {OLDEST[0]}.{OLDEST[1]}")

    def supports_block(self, block: Block) -> Support:
        height, width = block.kernel_size
        if height * width > _MOST_SEPARABLE_TAPS and _largest_separable(block) > _MOST_SEPARABLE_TAPS:
            return Support(False, f"a separable term has more than {_MOST_SEPARABLE_TAPS} taps")
        return SUPPORTED

    def prepare(self, blocks: Sequence[Block], signature: Signature) -> Prepared:
        from .launcher import PreparedLaunches  # imports Triton

        return PreparedLaunches(blocks, signature)


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
