"""The CUDA backend: compiled kernels for NVIDIA GPUs, one launch each way for any number of blocks."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..guards import float32_precision
from ..plan import Block, sources
from . import native
from .base import SUPPORTED, Backend, Gradients, Prepared, Signature, Support, empty_factory, split
from .memory import alloc_persistent

#: `torch.set_float32_matmul_precision` as the number that the kernels know it by (csrc/cuda/api.h)
_PRECISIONS = {"highest": 0, "high": 1, "medium": 2}


class CudaBackend(Backend):
    """Every kind of term, in float32, bfloat16 and float16; products of composed terms on tensor cores from sm_80 on.

    Launches go to the current stream, wait for nothing, and may be captured in CUDA graphs.
    """

    name = "cuda"

    def __init__(self) -> None:
        self._architectures: tuple[int, ...] = ()
        self._ptx: tuple[int, ...] = ()
        self._max_taps = 0
        self._counters: dict[tuple[int, int], Tensor] = {}

    def available(self) -> Support:
        missing = native.why_missing()
        if missing:
            return Support(False, missing)
        module = native.module()
        if not hasattr(module, "cuda_forward"):
            return Support(False, f"built without CUDA: {module.build()['why_no_cuda']}")
        self._architectures = tuple(sorted(module.cuda_architectures()))
        self._ptx = _ptx_architectures(module.cuda_requested_architectures, self._architectures)
        self._max_taps = module.cuda_max_taps
        if torch.version.cuda is None:
            return Support(False, f"torch {torch.__version__} is built without CUDA")
        if not torch.cuda.is_available():
            return Support(False, "torch finds no CUDA device")
        devices = [self._supports_capability(torch.device("cuda", index)) for index in range(torch.cuda.device_count())]
        support = next((support for support in devices if support), devices[0])
        reason = _unusable(-1) if support else support.reason
        return Support(not reason, reason)

    def supports_device(self, device: torch.device) -> Support:
        if device.type != "cuda":
            return Support(False, f"the tensors are on {device.type}")
        support = self._supports_capability(device)
        reason = _unusable(_index(device)) if support else support.reason
        return Support(not reason, reason)

    def _supports_capability(self, device: torch.device) -> Support:
        major, minor = torch.cuda.get_device_capability(device)
        capability = 10 * major + minor
        if any(built // 10 == major and built <= capability for built in self._architectures):
            return SUPPORTED
        if any(ptx <= capability for ptx in self._ptx):  # which the driver compiles
            return SUPPORTED
        built = ", ".join(f"sm_{architecture}" for architecture in self._architectures)
        return Support(False, f"{device} has compute capability {major}.{minor}, this build has {built}")

    def supports_block(self, block: Block) -> Support:
        taps = _most_taps(block)
        if taps > self._max_taps:
            return Support(False, f"the block has a kernel of {taps} taps, more than {self._max_taps}")
        return native.supports_block(block)

    def prepare(self, blocks: Sequence[Block], signature: Signature) -> Prepared:
        return _PreparedLaunch(blocks, signature, self._zeros)

    def _zeros(self, device: torch.device, stream: int, size: int) -> Tensor:
        """Counters, which kernels leave zero: cached per stream, because launches on one do not overlap."""
        if torch.cuda.is_current_stream_capturing():
            # The graph needs counters of its own: cached ones could be in use by another stream when it is replayed.
            return torch.zeros(size, dtype=torch.uint8, device=device)
        key = _index(device), stream
        counters = self._counters.get(key)
        if counters is None or counters.nbytes < size:
            zeros = functools.partial(torch.zeros, max(size, 4096), dtype=torch.uint8, device=device)
            counters = self._counters[key] = alloc_persistent(device, zeros)
        return counters


class _PreparedLaunch(Prepared):
    """Any number of blocks, ready for one launch each way."""

    def __init__(
        self, blocks: Sequence[Block], signature: Signature, zeros: Callable[[torch.device, int, int], Tensor]
    ) -> None:
        self._blocks, self._device, self._zeros = blocks, signature.device, zeros
        self._plans = [native.plan(block) for block in blocks]
        self._operands = [native.PackedOperands(part.layouts) for part in signature.split(blocks)]
        kernels = [signature.kernel(block) for block in blocks]
        self._new_kernels = [empty_factory(kernel, signature.device) for kernel in kernels]
        self._kernel_steps = [native.steps(kernel) for kernel in kernels]
        #: by block and needed gradients
        self._gradients: dict[tuple[int, tuple[bool, ...]], native.PackedGradients] = {}
        #: bytes of workspace and of counters, by the blocks of a backward launch
        self._needs: dict[tuple[int, ...], tuple[int, int]] = {}

    def forward(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        kernels = [new() for new in self._new_kernels]
        _alive, views = self._pack(tensors)
        targets: native.Views = []
        for kernel, steps in zip(kernels, self._kernel_steps, strict=True):
            targets += (kernel.data_ptr(), *steps)
        native.module().cuda_forward(self._plans, views, targets, *_where(self._device))
        return kernels

    def backward(
        self, tensors: Sequence[Tensor], upstream: Sequence[Tensor | None], needed: Sequence[bool]
    ) -> Gradients:
        operands, wanted = split(self._blocks, tensors), split(self._blocks, needed)
        gradients: list[Gradients] = [[None] * len(part) for part in operands]
        outputs, buffers, targets = {}, {}, []
        for index, gradient in enumerate(upstream):
            if gradient is None or not any(wanted[index]):
                continue
            outputs[index] = native.collapsed(gradient)
            rows = zip(operands[index], wanted[index], strict=True)
            gradients[index] = [torch.empty_like(tensor) if need else None for tensor, need in rows]
            buffers[index], views = self._pack_gradients(index, tuple(wanted[index]), gradients[index])
            targets.append(views)
        if outputs:
            self._launch_backward(tensors, outputs, targets)
        for index, written in buffers.items():
            native.PackedGradients.copy_back(gradients[index], written)
        return [gradient for part in gradients for gradient in part]

    def _launch_backward(
        self, tensors: Sequence[Tensor], upstream: dict[int, Tensor], targets: list[native.Views]
    ) -> None:
        _alive, views = self._pack(tensors)
        plans, views = [self._plans[index] for index in upstream], [views[index] for index in upstream]
        key = tuple(upstream)
        if key not in self._needs:
            self._needs[key] = native.module().cuda_memory_needs(plans, views, True)
        workspace_bytes, counter_bytes = self._needs[key]
        where = _where(self._device)
        workspace = torch.empty(workspace_bytes, dtype=torch.uint8, device=self._device)
        counters = self._zeros(self._device, where[1], counter_bytes)
        numbers = [number for gradient in upstream.values() for number in native.view(gradient)]
        memory = workspace.data_ptr(), workspace_bytes, counters.data_ptr(), counters.nbytes
        native.module().cuda_backward(plans, views, numbers, targets, *where, *memory)

    def _pack(self, tensors: Sequence[Tensor]) -> tuple[list[Sequence[Tensor]], list[native.Views]]:
        """The operands of each block as views, and the tensors that those point into."""
        pairs = zip(self._operands, split(self._blocks, tensors), strict=True)
        packed = [operands.pack(part) for operands, part in pairs]
        return [alive for alive, _ in packed], [views for _, views in packed]

    def _pack_gradients(
        self, index: int, needed: tuple[bool, ...], gradients: Gradients
    ) -> tuple[dict[int, Tensor], native.Views]:
        packed = self._gradients.get((index, needed))
        if packed is None:
            packed = native.PackedGradients(self._blocks[index], gradients, torch.float32)
            self._gradients[index, needed] = packed
        return packed.pack(gradients)


def _unusable(index: int) -> str:
    """Why the kernels cannot run on a device, or an empty string; with -1, as far as that shows without a context on one."""
    if index not in _UNUSABLE:
        _UNUSABLE[index] = native.module().cuda_unusable_reason(index)
    return _UNUSABLE[index]


_UNUSABLE: dict[int, str] = {}
_unusable._dynamo_marked_constant = True  # type: ignore[attr-defined]  # torch.compile shall not trace into the driver


def _ptx_architectures(requested: str, built: tuple[int, ...]) -> tuple[int, ...]:
    """Of ``OREPA_CUDA_ARCHS``, such as ``"80-real,90"``, those whose code newer GPUs can run: no ``-real``, no ``90a``."""
    if requested in ("all", "all-major"):
        return built[-1:]
    names = [name.removesuffix("-virtual") for name in requested.split(",")]
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
