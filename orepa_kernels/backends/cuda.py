"""The CUDA backend: compiled kernels for NVIDIA GPUs, one launch each way for any number of blocks."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from ..autograd import ForwardAgain, FusedBackend, Gradients, maker
from ..plan import Block, sources
from ..precision import float32_precision
from . import native
from .base import YES, Verdict
from .memory import kept

#: what `torch.set_float32_matmul_precision` was told, as the number that the kernels know it by (csrc/cuda/launch.h)
_PRECISIONS = {"highest": 0, "high": 1, "medium": 2}

#: lists of blocks whose memory needs are remembered
_MOST_NEEDS = 1 << 14


class CudaBackend(FusedBackend):
    """Every kind of term, in float32, bfloat16 and float16; products of composed terms on tensor cores from sm_80 on.

    Launches go to the current stream, wait for nothing, and may be captured in CUDA graphs.
    """

    name = "cuda"

    def __init__(self) -> None:
        self._architectures: tuple[int, ...] = ()
        self._ptx: tuple[int, ...] = ()
        self._max_taps = 0
        self._needs: dict[tuple[Block, ...], tuple[int, int]] = {}
        self._counters: dict[tuple[int, int], Tensor] = {}

    def available(self) -> Verdict:
        missing = native.why_missing()
        if missing:
            return Verdict(False, missing)
        module = native.module()
        if not hasattr(module, "cuda_forward"):
            return Verdict(False, f"built without CUDA: {module.build()['why_no_cuda']}")
        self._architectures = tuple(sorted(module.cuda_architectures()))
        self._ptx = _with_ptx(module.cuda_asked_architectures, self._architectures)
        self._max_taps = module.cuda_max_taps
        if torch.version.cuda is None:
            return Verdict(False, f"torch {torch.__version__} is built without CUDA")
        if not torch.cuda.is_available():
            return Verdict(False, "torch finds no CUDA device")
        verdicts = [self.runs_on(torch.device("cuda", index)) for index in range(torch.cuda.device_count())]
        return next((verdict for verdict in verdicts if verdict), verdicts[0])

    def runs_on(self, device: torch.device) -> Verdict:
        if device.type != "cuda":
            return Verdict(False, f"the tensors are on {device.type}")
        major, minor = torch.cuda.get_device_capability(device)
        capability = 10 * major + minor
        if any(built // 10 == major and built <= capability for built in self._architectures):
            return YES
        if any(ptx <= capability for ptx in self._ptx):  # which the driver compiles
            return YES
        built = ", ".join(f"sm_{architecture}" for architecture in self._architectures)
        return Verdict(False, f"{device} has compute capability {major}.{minor}, this build has {built}")

    def covers(self, block: Block) -> Verdict:
        taps = _most_taps(block)
        if taps > self._max_taps:
            return Verdict(False, f"the block has a kernel of {taps} taps, more than {self._max_taps}")
        return native.covers(block)

    def forward(
        self,
        blocks: Sequence[Block],
        tensors: Sequence[Sequence[Tensor]],
        dtype: torch.dtype,
        memory_format: torch.memory_format,
        folds: Sequence[Tensor | None],
    ) -> list[Tensor]:
        device = tensors[0][0].device
        operands = [native.described(block, own) for block, own in zip(blocks, tensors, strict=True)]
        kernels = [
            torch.empty(block.shape, dtype=dtype, device=device, memory_format=memory_format) for block in blocks
        ]
        native.module().cuda_forward(
            [native.plan(block) for block in blocks],
            [views for _, views in operands],
            native.views(kernels),
            native.views(folds),
            *_where(device),
        )
        return kernels

    def forward_again(
        self, block: Block, operands: Sequence[Tensor], dtype: torch.dtype, memory_format: torch.memory_format
    ) -> ForwardAgain:
        device, describe = operands[0].device, native.described_again(block, operands)
        new = maker(block.shape, dtype, device, memory_format)
        run, plans, no_folds = native.module().cuda_forward, [native.plan(block)], native.views([None])

        def again(own: Sequence[Tensor]) -> Tensor:
            kernel = new()
            _alive, views = describe(own)
            run(plans, [views], native.view(kernel), no_folds, *_where(device))
            return kernel

        return again

    def backward(
        self,
        blocks: Sequence[Block],
        tensors: Sequence[Sequence[Tensor]],
        upstream: Sequence[Tensor],
        needed: Sequence[Sequence[bool]],
    ) -> list[Gradients]:
        device = tensors[0][0].device
        operands = [native.described(block, own) for block, own in zip(blocks, tensors, strict=True)]
        upstream = [native.collapsed(gradient) for gradient in upstream]
        gradients = [
            [torch.empty_like(tensor) if need else None for tensor, need in zip(own, needs, strict=True)]
            for own, needs in zip(tensors, needed, strict=True)
        ]
        targets = [native.places(block, own, torch.float32) for block, own in zip(blocks, gradients, strict=True)]
        plans, views = [native.plan(block) for block in blocks], [numbers for _, numbers in operands]
        key = tuple(blocks)
        if key not in self._needs:
            if len(self._needs) >= _MOST_NEEDS:
                self._needs.clear()
            self._needs[key] = native.module().cuda_needs(plans, views, True)
        workspace_bytes, counter_bytes = self._needs[key]
        where = _where(device)
        workspace = torch.empty(workspace_bytes, dtype=torch.uint8, device=device)
        counters = self._zeros(device, where[1], counter_bytes)
        native.module().cuda_backward(
            plans,
            views,
            native.views(upstream),
            [numbers for _, numbers in targets],
            *where,
            workspace.data_ptr(),
            workspace_bytes,
            counters.data_ptr(),
            counters.nbytes,
        )
        for own, (buffers, _) in zip(gradients, targets, strict=True):
            native.hand_over(own, buffers)
        return gradients

    def _zeros(self, device: torch.device, stream: int, size: int) -> Tensor:
        """Counters, which kernels leave zero: kept per stream, because launches on one do not overlap."""
        if torch.cuda.is_current_stream_capturing():
            # The graph's own: what is kept here could be in use by another stream when the graph is replayed.
            return torch.zeros(size, dtype=torch.uint8, device=device)
        key = _index(device), stream
        found = self._counters.get(key)
        if found is None or found.nbytes < size:
            zeros = functools.partial(torch.zeros, max(size, 4096), dtype=torch.uint8, device=device)
            found = self._counters[key] = kept(device, zeros)
        return found


def _with_ptx(asked: str, built: tuple[int, ...]) -> tuple[int, ...]:
    """Of ``OREPA_CUDA_ARCHS``, such as ``"80-real,90"``, those whose code newer GPUs can run: no ``-real``, no ``90a``."""
    if asked in ("all", "all-major"):
        return built[-1:]
    names = [name.removesuffix("-virtual") for name in asked.split(",")]
    return tuple(sorted(int(name) for name in names if name.isdecimal()))


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


def _where(device: torch.device) -> tuple[int, int, int]:
    """Device, its current stream, and the precision of products."""
    index = _index(device)
    return index, torch._C._cuda_getCurrentRawStream(index), _PRECISIONS[float32_precision()]


def _most_taps(block: Block) -> int:
    """Of its kernel and of those of nested blocks. In plain loops, which torch.compile can trace."""
    most = block.kernel_size[0] * block.kernel_size[1]
    for term in block.terms:
        for source in sources(term):
            if isinstance(source, Block):
                most = max(most, _most_taps(source))
    return most
