"""Launching the kernels: what does not change from call to call is worked out once and kept.

A call costs the host the building of a key (dtypes, strides, alignment) and the launch itself. Everything else sits in a
launcher: tile maps and strides on the device, and the compiled kernel.

CUDA graphs: a launch of one block passes addresses as kernel arguments, which a graph records by value. A launch of many
reads them from a table on the device. Outside of capture such tables are kept, per addresses and stream; under capture a
new one is filled by a copy that is part of the graph, from pinned memory that is never released; nor is a launcher that was
captured. The first use of a launcher copies its other tables and waits for them, and Triton compiles: warm up before
capturing, as every recipe for graphs says.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from ...autograd import BackwardAgain, ForwardAgain, maker
from ...plan import Block
from ..memory import kept
from . import autotune as tuning
from . import configs
from . import tile_map as tables
from .again import Again, addresses_of, alignment, run
from .compiled import Kernel
from .device import INTERPRETING, capturing, device_of, stream_of
from .kernels.backward import squeeze_backward
from .kernels.forward import squeeze_forward
from .kernels.sums import add_parts
from .spec import Spec, backward_spec, forward_spec

if INTERPRETING:
    from .interpreter import repair

    repair()

Value = TypeVar("Value")
Launch = TypeVar("Launch", bound="_Launch")

#: launchers kept; a model has one per layer and direction, and again for each dtype
_LAUNCHERS = 2048
#: address tables kept per launcher and stream
_ADDRESS_TABLES = 16
#: elements and parts that a program of the second backward launch adds at a time
SUM_COUNT, SUM_PARTS = 64, 16
SUM_OPTIONS = {"num_warps": 4, "enable_fp_fusion": True}

#: what graphs copy their address tables from, and the launchers whose tables they read
_pinned: list[Tensor] = []
_captured: set[_Launch] = set()


class _Cache(Generic[Value]):
    """The values made last, by key."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._values: OrderedDict[Any, Value] = OrderedDict()

    def find(self, key: Any, make: Callable[[], Value]) -> Value:
        """The value of ``key``."""
        value = self._values.get(key)
        if value is None:
            value = self._values[key] = make()
            if len(self._values) > self._size:
                self._values.popitem(last=False)
        return value


class _Launch:
    """What launches of one structure share, forward and backward: which blocks, and tables on the device."""

    #: what launches, with the addresses of one block, or that of a table of those of many
    launch: Callable[[int | tuple[int, ...]], None]

    def __init__(self, spec: Spec, indices: list[int], device: torch.device) -> None:
        self.spec, self.indices, self.device = spec, indices, device
        self._tables: list[Tensor] = []
        self._addresses: dict[int, _AddressTables] = {}

    def upload(self, words: Sequence[int], dtype: torch.dtype) -> int:
        """The address of constant words on the device; they live as long as this does."""
        self._tables.append(kept(self.device, lambda: torch.tensor(words, dtype=dtype, device="cpu").to(self.device)))
        return self._tables[-1].data_ptr()

    def __call__(self, addresses: Sequence[tuple[int, ...]]) -> None:
        """Launch, with the addresses of all blocks of the call. The device is the current one."""
        own = [addresses[index] for index in self.indices]
        recorded = capturing(self.device)
        if recorded:
            self.keep()
        if not self.spec.batched:
            self.launch(own[0])
            return
        table = self._table([address for block in own for address in block], recorded)
        self.launch(table.data_ptr())

    def keep(self) -> None:
        """Never release this, because a graph reads its tables."""
        _captured.add(self)

    def _table(self, words: list[int], recorded: bool) -> Tensor:
        """Addresses on the device."""
        if recorded:
            return _copied(words, self.device, _pinned)
        stream = stream_of(self.device)
        tables = self._addresses.get(stream)
        if tables is None:
            tables = self._addresses[stream] = _AddressTables(len(words), self.device)
        return tables.of(tuple(words))


class _AddressTables:
    """The address tables used last on one stream, whose order lets one be written over another."""

    def __init__(self, words: int, device: torch.device) -> None:
        pitch = words + words % 2  # Triton was told that tables are aligned to 16 bytes
        self._rows = kept(device, lambda: torch.empty(_ADDRESS_TABLES, pitch, dtype=torch.int64, device=device))
        self._words = words
        self._used: OrderedDict[tuple[int, ...], Tensor] = OrderedDict()

    def of(self, words: tuple[int, ...]) -> Tensor:
        """The table of these words."""
        row = self._used.get(words)
        if row is not None:
            self._used.move_to_end(words)
            return row
        full = len(self._used) == _ADDRESS_TABLES
        row = self._used.popitem(last=False)[1] if full else self._rows[len(self._used), : self._words]
        self._used[words] = row.copy_(_host(words, self._rows.device), non_blocking=True)
        return row


def _host(words: Sequence[int], device: torch.device) -> Tensor:
    """Words in memory that a device may copy from while the host goes on."""
    table = torch.tensor(words, dtype=torch.int64, device="cpu")
    return table if device.type == "cpu" else table.pin_memory()


def _copied(words: list[int], device: torch.device, keep: list[Tensor]) -> Tensor:
    """Words on the device, in the order of its current stream; ``keep`` gets what they are copied from."""
    keep.append(_host(words, device))
    return keep[-1].to(device, non_blocking=True)


class _Forward(_Launch):
    """The forward launch of blocks of one structure."""

    def __init__(
        self,
        spec: Spec,
        indices: list[int],
        blocks: Sequence[Block],
        tensors: Sequence[Sequence[Tensor]],
        precision: str,
        config: configs.Forward,
    ) -> None:
        super().__init__(spec, indices, tensors[0][0].device)
        tiles = tables.forward_tiles(blocks, spec, tensors, config)
        words = [tables.block_words(block, spec, own) for block, own in zip(blocks, tensors, strict=True)]
        uploaded = self.upload([word for row in words for word in row], torch.int64), self.upload(tiles, torch.int32)
        constants, options = split(config, SPEC=spec, PRECISION=precision)
        programs = len(tiles) // tables.TILE_WORDS
        self.launch = Kernel(squeeze_forward, programs, uploaded, constants, options, self.device.index)


class _Backward(_Launch):
    """The two backward launches of blocks of one structure."""

    def __init__(
        self,
        spec: Spec,
        indices: list[int],
        blocks: Sequence[Block],
        tensors: Sequence[Sequence[Tensor]],
        precision: str,
        config: configs.Backward,
    ) -> None:
        super().__init__(spec, indices, tensors[0][0].device)
        plan = tables.backward_tables(blocks, spec, tensors, config)
        uploaded = self.upload(plan.words, torch.int64), self.upload(plan.tiles, torch.int32)
        constants, options = split(config, SPEC=spec, PRECISION=precision)
        programs = len(plan.tiles) // tables.TILE_WORDS
        self.launch = self._both
        self._parts = Kernel(squeeze_backward, programs, uploaded, constants, options, self.device.index)
        self._new_workspace = maker([max(1, plan.workspace)], torch.float32, self.device)
        sum_tiles = plan.sum_tiles(SUM_COUNT)
        self._sums: Kernel | None = None
        if sum_tiles:
            jobs = [word for job in plan.jobs for word in job]
            uploaded = self.upload(jobs, torch.int64), self.upload(sum_tiles, torch.int32)
            constants = {"SPEC": spec, "PARTS": SUM_PARTS, "COUNT": SUM_COUNT}
            self._sums = Kernel(add_parts, len(sum_tiles) // 2, uploaded, constants, SUM_OPTIONS, self.device.index)

    def _both(self, addresses: int | tuple[int, ...]) -> None:
        workspace = self._new_workspace()
        address = workspace.data_ptr()
        self._parts(addresses, address)
        if self._sums is not None:
            self._sums(addresses, address)


def split(config: Any, **constants: Any) -> tuple[dict[str, Any], dict[str, int]]:
    """A config as the kernel's constants, in the order of its parameters, and the compiler's options."""
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    options["enable_fp_fusion"] = True  # Triton's default so far, about to change
    return {**constants, "TILES": config}, options


_forwards: _Cache[list[_Forward]] = _Cache(_LAUNCHERS)
_backwards: _Cache[list[_Backward]] = _Cache(_LAUNCHERS)


def _by_structure(specs: Sequence[Spec]) -> list[tuple[Spec, list[int]]]:
    """Blocks that can share a launch."""
    groups: dict[Spec, list[int]] = {}
    for index, spec in enumerate(specs):
        groups.setdefault(spec, []).append(index)
    return [(replace(spec, batched=len(own) > 1), own) for spec, own in groups.items()]


def _made(
    kind: Callable[..., Launch],
    config_of: Callable[[Sequence[Block], Spec, int], tuning.Config],
    choices_of: Callable[[Spec, int], Sequence[tuning.Config]],
    spec: Spec,
    indices: list[int],
    blocks: Sequence[Block],
    tensors: Sequence[Sequence[Tensor]],
    addresses: Sequence[tuple[int, ...]],
) -> Launch:
    """The launch of those blocks of a call that have one structure, with the tiles of the heuristics or of the clock."""
    plans, own = [blocks[i] for i in indices], [tensors[i] for i in indices]
    device = own[0][0].device
    device_kind = device_of(device)
    precision = device_kind.precision()
    config = config_of(plans, spec, device_kind.arch)
    if tuning.enabled():

        def run_of(candidate: tuning.Config) -> Callable[[], object]:
            launch = kind(spec, indices, plans, own, precision, candidate)
            return lambda: launch(addresses)

        direction = "forward" if isinstance(config, configs.Forward) else "backward"
        key = tuning.cache_key(direction, spec, plans, own, precision)
        config = tuning.choose(choices_of(spec, device_kind.arch), config, key, device, run_of)
    return kind(spec, indices, plans, own, precision, config)


# --- forward ------------------------------------------------------------------------------------------------------------


def forward(
    blocks: Sequence[Block],
    operands: Sequence[Sequence[Tensor]],
    dtype: torch.dtype,
    memory_format: torch.memory_format,
    folds: Sequence[Tensor | None],
) -> list[Tensor]:
    """Kernels of flat blocks, see `orepa_kernels.autograd.FusedBackend.forward`; one launch per structure."""
    if not blocks:
        return []
    device = operands[0][0].device
    kernels = [torch.empty(block.shape, dtype=dtype, device=device, memory_format=memory_format) for block in blocks]
    run(*_forward_launches(blocks, operands, kernels), device)
    return kernels


def _forward_launches(
    blocks: Sequence[Block],
    operands: Sequence[Sequence[Tensor]],
    kernels: Sequence[Tensor],
) -> tuple[list[_Forward], list[tuple[int, ...]]]:
    """The launches that write kernels, and the addresses of each block."""
    tensors = [[*own, kernel] for own, kernel in zip(operands, kernels, strict=True)]
    addresses = [addresses_of(own) for own in tensors]
    device = kernels[0].device
    key = (
        *(device, device_of(device).precision(), tuple(blocks), alignment(addresses)),
        tuple([(tensor.dtype, tensor.stride()) for own in tensors for tensor in own]),
        tuple([len(own) for own in tensors]),
    )

    def make() -> list[_Forward]:
        specs = [forward_spec(*own) for own in zip(blocks, operands, kernels, strict=True)]
        how = _Forward, configs.forward_config, configs.forward_choices
        return [_made(*how, spec, own, blocks, tensors, addresses) for spec, own in _by_structure(specs)]

    return _forwards.find(key, make), addresses


def forward_again(
    block: Block, operands: Sequence[Tensor], dtype: torch.dtype, memory_format: torch.memory_format
) -> ForwardAgain:
    """See `orepa_kernels.autograd.FusedBackend.forward_again`."""
    device = operands[0].device
    new = maker(block.shape, dtype, device, memory_format)
    launches: Again[_Forward] = Again(device)

    def again(own: Sequence[Tensor]) -> Tensor:
        kernel = new()
        if not launches.run(own, (kernel,)):
            launches.run_first(*_forward_launches((block,), (own,), (kernel,)))
        return kernel

    return again


# --- backward -----------------------------------------------------------------------------------------------------------
def backward(
    blocks: Sequence[Block],
    operands: Sequence[Sequence[Tensor]],
    upstream: Sequence[Tensor],
    needed: Sequence[Sequence[bool]],
) -> list[list[Tensor | None]]:
    """Gradients of flat blocks, see `orepa_kernels.autograd.FusedBackend.backward`; two launches per structure."""
    gradients: list[list[Tensor | None]] = [
        [torch.empty_like(tensor) if need else None for tensor, need in zip(own, wanted, strict=True)]
        for own, wanted in zip(operands, needed, strict=True)
    ]
    busy = [index for index, own in enumerate(gradients) if any(gradient is not None for gradient in own)]
    if busy:
        found = _backward_launches(
            [blocks[i] for i in busy],
            [operands[i] for i in busy],
            [upstream[i] for i in busy],
            [gradients[i] for i in busy],
        )
        run(*found, operands[0][0].device)
    return gradients


def _backward_launches(
    blocks: Sequence[Block],
    operands: Sequence[Sequence[Tensor]],
    upstream: Sequence[Tensor],
    gradients: Sequence[Sequence[Tensor | None]],
) -> tuple[list[_Backward], list[tuple[int, ...]]]:
    """The launches that write gradients, of which each block has one at least, and the addresses of each block."""
    tensors = [
        [*own, gradient, *(g for g in wanted if g is not None)]
        for own, gradient, wanted in zip(operands, upstream, gradients, strict=True)
    ]
    addresses = [addresses_of(own) for own in tensors]
    device = upstream[0].device
    key = (
        *(device, device_of(device).precision(), tuple(blocks), alignment(addresses)),
        tuple([tuple([gradient is not None for gradient in own]) for own in gradients]),
        tuple([(tensor.dtype, tensor.stride()) for own in tensors for tensor in own]),
    )

    def make() -> list[_Backward]:
        specs = [backward_spec(*of) for of in zip(blocks, operands, upstream, gradients, strict=True)]
        how = _Backward, configs.backward_config, configs.backward_choices
        return [_made(*how, spec, own, blocks, tensors, addresses) for spec, own in _by_structure(specs)]

    return _backwards.find(key, make), addresses


def backward_again(device: torch.device, block: Block, needed: Sequence[bool]) -> BackwardAgain:
    """See `orepa_kernels.autograd.FusedBackend.backward_again`."""
    wanted = [index for index, need in enumerate(needed) if need]
    launches: Again[_Backward] = Again(device)

    def again(own: Sequence[Tensor], upstream: Tensor) -> list[Tensor | None]:
        made = [torch.empty_like(own[index]) for index in wanted]
        gradients: list[Tensor | None] = [None] * len(own)
        for index, gradient in zip(wanted, made, strict=True):
            gradients[index] = gradient
        if not launches.run(own, (upstream, *made)):
            launches.run_first(*_backward_launches((block,), (own,), (upstream,), (gradients,)))
        return gradients

    return again
