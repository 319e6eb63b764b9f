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

import functools
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from ...fused import Memo
from ...plan import Block
from ..memory import kept
from . import configs, tables, tuning
from .backward import squeeze_backward
from .device import INTERPRETING, capturing, current, device_of, is_current, stream_of
from .forward import squeeze_forward
from .spec import Spec, backward_spec, forward_spec
from .sums import add_parts

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


class _Kernel:
    """A Triton kernel, its constants and its grid."""

    def __init__(self, function: Any, programs: int, constants: dict[str, Any], options: dict[str, int]) -> None:
        self._function, self._grid = function, (programs, 1, 1)
        self._constants, self._options = constants, options
        self._run: Callable[..., object] | None = None

    def __call__(self, *arguments: object) -> None:
        """Launch on the current stream; addresses are integers, in one tuple or one by one."""
        if self._run is not None:
            self._run(*arguments, *self._constants.values())
            return
        compiled = self._function[self._grid](*arguments, **self._constants, **self._options)
        # From here on without the front end's look at each argument: all that it could find out is part of our key.
        if compiled is not None:  # the interpreter compiles nothing
            self._run = compiled[self._grid]


class _Launch:
    """What launches of one structure share, forward and backward: which blocks, and tables on the device."""

    def __init__(self, spec: Spec, indices: list[int], device: torch.device) -> None:
        self.spec, self.indices, self.device = spec, indices, device
        self._tables: list[Tensor] = []
        self._addresses: dict[int, _AddressTables] = {}

    def upload(self, words: Sequence[int], dtype: torch.dtype) -> int:
        """The address of constant words on the device; they live as long as this does."""
        self._tables.append(kept(self.device, lambda: torch.tensor(words, dtype=dtype).to(self.device)))
        return self._tables[-1].data_ptr()

    def __call__(self, addresses: Sequence[tuple[int, ...]]) -> None:
        """Launch, with the addresses of all blocks of the call."""
        raise NotImplementedError

    def addresses(self, own: Sequence[tuple[int, ...]]) -> tuple[int, ...] | Tensor:
        """The first kernel argument: addresses of one block, or a table of those of many."""
        recorded = capturing(self.device)
        if recorded:
            _captured.add(self)
        if not self.spec.listed:
            return own[0]
        words = [address for block in own for address in block]
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
    table = torch.tensor(words, dtype=torch.int64)
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
        self._words = self.upload([word for row in words for word in row], torch.int64)
        self._tiles = self.upload(tiles, torch.int32)
        constants, options = split(config, SPEC=spec, PRECISION=precision)
        self._kernel = _Kernel(squeeze_forward, len(tiles) // tables.TILE_WORDS, constants, options)

    def __call__(self, addresses: Sequence[tuple[int, ...]]) -> None:
        own = self.addresses([addresses[index] for index in self.indices])
        self._kernel(own if isinstance(own, tuple) else own.data_ptr(), self._words, self._tiles)


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
        self._words = self.upload(plan.words, torch.int64)
        self._tiles = self.upload(plan.tiles, torch.int32)
        constants, options = split(config, SPEC=spec, PRECISION=precision)
        self._kernel = _Kernel(squeeze_backward, len(plan.tiles) // tables.TILE_WORDS, constants, options)
        self._workspace = plan.workspace
        sum_tiles = plan.sum_tiles(SUM_COUNT)
        self._sums: _Kernel | None = None
        if sum_tiles:
            self._jobs = self.upload([word for job in plan.jobs for word in job], torch.int64)
            self._sum_tiles = self.upload(sum_tiles, torch.int32)
            constants = {"SPEC": spec, "PARTS": SUM_PARTS, "COUNT": SUM_COUNT}
            self._sums = _Kernel(add_parts, len(sum_tiles) // 2, constants, SUM_OPTIONS)

    def __call__(self, addresses: Sequence[tuple[int, ...]]) -> None:
        table = self.addresses([addresses[index] for index in self.indices])
        own = table if isinstance(table, tuple) else table.data_ptr()
        workspace = torch.empty(max(1, self._workspace), dtype=torch.float32, device=self.device)
        self._kernel(own, self._words, self._tiles, workspace.data_ptr())
        if self._sums is not None:
            self._sums(own, self._jobs, self._sum_tiles, workspace.data_ptr())


def split(config: Any, **constants: Any) -> tuple[dict[str, Any], dict[str, int]]:
    """A config as the kernel's constants, in the order of its parameters, and the compiler's options."""
    values = asdict(config)
    options = {name: values.pop(name) for name in ("num_warps", "num_stages")}
    options["enable_fp_fusion"] = True  # Triton's default so far, about to change
    return {**constants, **values}, options


_forwards: _Cache[list[_Forward]] = _Cache(_LAUNCHERS)
_backwards: _Cache[list[_Backward]] = _Cache(_LAUNCHERS)


def _by_structure(specs: Sequence[Spec]) -> list[tuple[Spec, list[int]]]:
    """Blocks that can share a launch."""
    groups: dict[Spec, list[int]] = {}
    for index, spec in enumerate(specs):
        groups.setdefault(spec, []).append(index)
    return [(replace(spec, listed=len(own) > 1), own) for spec, own in groups.items()]


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
        key = tuning.key_of(direction, spec, plans, own, precision)
        config = tuning.choose(choices_of(spec, device_kind.arch), config, key, device, run_of)
    return kind(spec, indices, plans, own, precision, config)


def _alignment(addresses: Sequence[tuple[int, ...]]) -> tuple[bool, ...] | None:
    """Which addresses are multiples of 16; None where all are, as nearly always."""
    bits = 0
    for own in addresses:
        for address in own:
            bits |= address
    return tuple(address % 16 == 0 for own in addresses for address in own) if bits % 16 else None


def _run(launches: Sequence[_Launch], addresses: Sequence[tuple[int, ...]], device: torch.device) -> None:
    if not is_current(device):
        with current(device):
            for launch in launches:
                launch(addresses)
        return
    for launch in launches:
        launch(addresses)


class _Seen:
    """What forward calls for one block have in common where operands have one layout: all but addresses and precision."""

    def __init__(self, kernel: Tensor) -> None:
        self.device = kernel.device
        self.precision = device_of(kernel.device).precision
        self.new_kernel = functools.partial(
            torch.empty_strided, kernel.shape, kernel.stride(), dtype=kernel.dtype, device=kernel.device
        )
        #: by precision and `_alignment`
        self.launches: dict[tuple[str, tuple[bool, ...] | None], list[_Forward]] = {}


def forward(
    blocks: Sequence[Block],
    operands: Sequence[Sequence[Tensor]],
    dtype: torch.dtype,
    memory_format: torch.memory_format,
    folds: Sequence[Tensor | None],
    memo: Memo | None = None,
) -> list[Tensor]:
    """Kernels of flat blocks, see `orepa_kernels.fused.FusedBackend.forward`; one launch per structure."""
    if not blocks:
        return []
    if memo:
        seen: _Seen = memo["triton"]
        kernels = [seen.new_kernel()]
        addresses = [tuple([tensor.data_ptr() for tensor in (*operands[0], *kernels)])]
        what = seen.precision(), _alignment(addresses)
        if what in seen.launches:
            _run(seen.launches[what], addresses, seen.device)
            return kernels
    device = operands[0][0].device
    kernels = [torch.empty(block.shape, dtype=dtype, device=device, memory_format=memory_format) for block in blocks]
    tensors = [
        [*own, kernel] if fold is None else [*own, kernel, fold]
        for own, kernel, fold in zip(operands, kernels, folds, strict=True)
    ]
    addresses = [tuple([tensor.data_ptr() for tensor in own]) for own in tensors]
    what = device_of(device).precision(), _alignment(addresses)
    key = (
        *(device, memory_format, tuple(blocks), *what),
        tuple([(tensor.dtype, tensor.stride()) for own in tensors for tensor in own]),
        tuple([len(own) for own in tensors]),
    )

    def make() -> list[_Forward]:
        specs = [forward_spec(*of) for of in zip(blocks, operands, kernels, folds, strict=True)]
        how = _Forward, configs.forward_config, configs.forward_choices
        return [_made(*how, spec, own, blocks, tensors, addresses) for spec, own in _by_structure(specs)]

    launches = _forwards.find(key, make)
    if memo is not None:
        memo.setdefault("triton", _Seen(kernels[0])).launches[what] = launches
    _run(launches, addresses, device)
    return kernels


def backward(
    blocks: Sequence[Block],
    operands: Sequence[Sequence[Tensor]],
    upstream: Sequence[Tensor],
    needed: Sequence[Sequence[bool]],
) -> list[list[Tensor | None]]:
    """Gradients of flat blocks, see `orepa_kernels.fused.FusedBackend.backward`; two launches per structure."""
    gradients: list[list[Tensor | None]] = [
        [torch.empty_like(tensor) if need else None for tensor, need in zip(own, wanted, strict=True)]
        for own, wanted in zip(operands, needed, strict=True)
    ]
    busy = [index for index, own in enumerate(gradients) if any(gradient is not None for gradient in own)]
    if not busy:
        return gradients
    device = operands[0][0].device
    tensors = [[*operands[i], upstream[i], *(g for g in gradients[i] if g is not None)] for i in busy]
    addresses = [tuple([tensor.data_ptr() for tensor in own]) for own in tensors]
    device_kind = device_of(device)
    key = (
        device,
        device_kind.precision(),
        tuple([blocks[i] for i in busy]),
        tuple([tuple(needed[i]) for i in busy]),
        tuple([(tensor.dtype, tensor.stride()) for own in tensors for tensor in own]),
        _alignment(addresses),
    )

    def make() -> list[_Backward]:
        specs = [backward_spec(blocks[i], operands[i], upstream[i], gradients[i]) for i in busy]
        how, plans = (_Backward, configs.backward_config, configs.backward_choices), [blocks[i] for i in busy]
        return [_made(*how, spec, own, plans, tensors, addresses) for spec, own in _by_structure(specs)]

    _run(_backwards.find(key, make), addresses, device)
    return gradients
