"""Launches blocks: everything that does not change from call to call is prepared once.

A repeated call costs the host the addresses of its tensors and the launch. The rest is in `PreparedLaunches`: tile maps and
strides on the device, and the compiled kernels.

CUDA graphs: a launch of one block passes addresses as kernel arguments, which a graph records by value. A launch of many
reads them from a table on the device, which a kernel with addresses as arguments has filled. Outside of capture such tables
are cached, per addresses and stream; under capture, filling a new one is part of the graph. A launch that was captured is
never released. The first use of a launch copies its other tables and waits for them, and Triton compiles: warm up before
capturing, as every recipe for graphs says.
"""

from __future__ import annotations

from abc import abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...guards import float32_precision
from ...plan import Block
from ..base import Gradients, Layout, Prepared, Signature, empty_factory, split
from ..memory import alloc_persistent
from . import autotune, configs, tile_map
from .compiled_kernel import CompiledKernel
from .device import INTERPRETING, device_of, launch_state, on_device, stream_of
from .kernels.addresses import write_words
from .kernels.backward import squeeze_backward
from .kernels.forward import squeeze_forward
from .kernels.sums import add_parts
from .spec import Spec, backward_spec, forward_spec

if INTERPRETING:
    from .interpreter import repair

    repair()

#: address tables cached per launch and stream
_ADDRESS_TABLES = 16
#: elements and parts that a program of the second backward launch adds at a time
SUM_COUNT, SUM_PARTS = 64, 16
SUM_OPTIONS = {"num_warps": 4, "enable_fp_fusion": True}

#: addresses that one launch writes to a table
_WORDS = 128

#: launches whose tables graphs read
_captured: set[Launch] = set()

# --- launches of blocks of one structure --------------------------------------------------------------------------------


class Launch:
    """What ``blocks`` of one structure share, which have ``indices`` in the call: tables on the device, compiled kernels.

    ``tensors`` are per block those of the spec; ``config`` has the tiles.
    """

    #: launches, with the addresses of one block, or that of a table of those of many
    run: Callable[[int | tuple[int, ...]], None]

    def __init__(
        self,
        spec: Spec,
        indices: Sequence[int],
        blocks: Sequence[Block],
        tensors: Sequence[Sequence[Tensor]],
        precision: str,
        config: Any,
    ) -> None:
        self.spec, self.indices, self.device = spec, indices, tensors[0][0].device
        self._addresses: dict[int, AddressTables] = {}
        self._write = CompiledKernel(write_words, 1, (), {"COUNT": _WORDS}, {"num_warps": 1}, self.device.index)
        self._prepare(blocks, tensors, precision, config)

    @abstractmethod
    def _prepare(
        self, blocks: Sequence[Block], tensors: Sequence[Sequence[Tensor]], precision: str, config: Any
    ) -> None:
        """Fill the tables and set `run`."""

    def __call__(self, addresses: Sequence[tuple[int, ...]], capturing: bool) -> None:
        """Launch, with the addresses of all blocks of the call. The device is the current one."""
        mine = [addresses[index] for index in self.indices]
        if self.spec.batched:
            # A name: memory of a graph's that nobody holds is anybody's, the workspace's too.
            table = self._table([address for block in mine for address in block], capturing)
            self.run(table.data_ptr())
        else:
            self.run(mine[0])

    def _kernel(
        self, function: Any, words: Sequence[int], tiles: Sequence[int], tile_words: int, arguments: tuple[Any, Any]
    ) -> CompiledKernel:
        """A kernel with one program per tile."""
        tables = []
        for table, dtype in ((words, torch.int64), (tiles, torch.int32)):
            host = torch.tensor(table, dtype=dtype, device="cpu")
            tables.append(alloc_persistent(self.device, partial(host.to, self.device)))
        return CompiledKernel(function, len(tiles) // tile_words, tables, *arguments, self.device.index)

    def _table(self, words: list[int], capturing: bool) -> Tensor:
        """Addresses on the device."""
        shape = 1 if capturing else _ADDRESS_TABLES, -(-len(words) // _WORDS) * _WORDS
        allocate = partial(torch.empty, shape, dtype=torch.int64, device=self.device)
        if capturing:
            return AddressTables(allocate(), self._write).find(tuple(words))
        stream = stream_of(self.device)
        if stream not in self._addresses:
            self._addresses[stream] = AddressTables(alloc_persistent(self.device, allocate), self._write)
        return self._addresses[stream].find(tuple(words))


class AddressTables:
    """The address tables used last on one stream, whose order lets one be written over another.

    ``rows`` has memory for each; ``write`` writes _WORDS words at an address, none so small that it compiles as another type.
    """

    def __init__(self, rows: Tensor, write: Callable[[tuple[int, ...], int], None]) -> None:
        self._rows, self._write = rows, write
        self._used: OrderedDict[tuple[int, ...], Tensor] = OrderedDict()

    def find(self, words: tuple[int, ...]) -> Tensor:
        """Return the table of these words."""
        row = self._used.get(words)
        if row is not None:
            self._used.move_to_end(words)
            return row
        full = len(self._used) == len(self._rows)
        self._used[words] = row = self._used.popitem(last=False)[1] if full else self._rows[len(self._used)]
        for begin in range(0, len(words), _WORDS):
            some = words[begin : begin + _WORDS]
            self._write(some + words[:1] * (_WORDS - len(some)), row.data_ptr() + 8 * begin)
        return row


class ForwardLaunch(Launch):
    """The forward launch of blocks of one structure."""

    def _prepare(
        self, blocks: Sequence[Block], tensors: Sequence[Sequence[Tensor]], precision: str, config: configs.Forward
    ) -> None:
        tiles = tile_map.forward_tiles(blocks, self.spec, tensors, config)
        pairs = zip(blocks, tensors, strict=True)
        words = [word for block, slots in pairs for word in tile_map.block_words(block, self.spec, slots)]
        arguments = kernel_arguments(config, self.spec, precision)
        self.run = self._kernel(squeeze_forward, words, tiles, tile_map.TILE_WORDS, arguments)


class BackwardLaunch(Launch):
    """The two backward launches of blocks of one structure."""

    def _prepare(
        self, blocks: Sequence[Block], tensors: Sequence[Sequence[Tensor]], precision: str, config: configs.Backward
    ) -> None:
        plan = tile_map.backward_tables(blocks, self.spec, tensors, config)
        arguments = kernel_arguments(config, self.spec, precision)
        self.run = self._run_both
        self._parts = self._kernel(squeeze_backward, plan.words, plan.tiles, tile_map.TILE_WORDS, arguments)
        self._new_workspace = empty_factory(Layout((max(1, plan.workspace),), (1,), torch.float32), self.device)
        self._sums: CompiledKernel | None = None
        sum_tiles = plan.sum_tiles(SUM_COUNT)
        if sum_tiles:
            jobs = [word for job in plan.jobs for word in job]
            constants = {"SPEC": self.spec, "PARTS": SUM_PARTS, "COUNT": SUM_COUNT}
            self._sums = self._kernel(add_parts, jobs, sum_tiles, 2, (constants, SUM_OPTIONS))

    def _run_both(self, addresses: int | tuple[int, ...]) -> None:
        workspace = self._new_workspace()
        address = workspace.data_ptr()
        self._parts(addresses, address)
        if self._sums is not None:
            self._sums(addresses, address)


def kernel_arguments(config: Any, spec: Spec, precision: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the kernel's constants, in the order of its parameters, and the compiler's options."""
    # Fusion is Triton's default so far, about to change.
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages, "enable_fp_fusion": True}
    return {"SPEC": spec, "PRECISION": precision, "TILES": config}, options


# --- prepared -----------------------------------------------------------------------------------------------------------


class PreparedLaunches(Prepared):
    """Any number of blocks: one launch per structure forward, two backward.

    Launches are made when they are first needed, because Triton compiles for the alignment of addresses. They are found by
    what else they depend on: precision, alignment, and backward the layouts of upstream gradients and which gradients are
    needed.
    """

    def __init__(self, blocks: Sequence[Block], signature: Signature) -> None:
        self._blocks, self._device, self._alone = blocks, signature.device, len(blocks) == 1
        self._new_kernels = [empty_factory(signature.kernel(block), signature.device) for block in blocks]
        state = launch_state(signature.device)
        self._index, self._current, self._capturing = state.index, state.current, state.capturing
        self._forward: dict[object, list[ForwardLaunch]] = {}
        self._backward: dict[object, list[BackwardLaunch]] = {}
        #: the last addresses of operands that were multiples of 16: parameters stay where they are
        self._aligned: tuple[int, ...] = ()

    def forward(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        if self._current() != self._index:
            with on_device(self._device):
                return self.forward(tensors)
        kernels = [self._new_kernels[0]()] if self._alone else [new() for new in self._new_kernels]
        addresses, setting = self._addresses(tensors, kernels)
        launches = self._forward.get(setting)
        if launches is None:
            launches = self._forward[setting] = self._make_forward(tensors, kernels)
        if self._alone and not self._capturing():
            launches[0].run(addresses)
        else:
            self._launch(launches, addresses, tensors, [1] * len(kernels))
        return kernels

    def backward(
        self, tensors: Sequence[Tensor], upstream: Sequence[Tensor | None], needed: Sequence[bool]
    ) -> Gradients:
        if self._current() != self._index:
            with on_device(self._device):
                return self.backward(tensors, upstream, needed)
        gradients = [torch.empty_like(tensor) if need else None for tensor, need in zip(tensors, needed, strict=True)]
        if self._alone:
            counts: list[int] = []
            others = [tensor for tensor in (*upstream, *gradients) if tensor is not None]
        else:
            counts, others = self._others(upstream, gradients)
        if len(others) < 2:  # no upstream gradient, or none of an operand
            return gradients
        addresses, setting = self._addresses(tensors, others)
        layouts = [None if output is None else (output.dtype, output.stride()) for output in upstream]
        key = (setting, tuple(needed), *layouts)
        launches = self._backward.get(key)
        if launches is None:
            launches = self._backward[key] = self._make_backward(tensors, upstream, gradients)
        if self._alone and not self._capturing():
            launches[0].run(addresses)
        else:
            self._launch(launches, addresses, tensors, counts)
        return gradients

    def _others(self, upstream: Sequence[Tensor | None], gradients: Gradients) -> tuple[list[int], list[Tensor]]:
        """What launches write or read beside operands: block by block, and how many per block; none where none is needed."""
        counts, others = [], []
        for output, part in zip(upstream, split(self._blocks, gradients), strict=True):
            made = [gradient for gradient in part if gradient is not None]
            used = [output, *made] if output is not None and made else []
            counts.append(len(used))
            others += used
        return counts, others

    def _addresses(self, operands: Sequence[Tensor], others: Sequence[Tensor]) -> tuple[tuple[int, ...], object]:
        """Addresses; and the precision, with which addresses are multiples of 16 where not all are."""
        bits, addresses = 0, tuple(map(Tensor.data_ptr, operands))
        made = tuple(map(Tensor.data_ptr, others))
        if addresses != self._aligned:
            for address in addresses:
                bits |= address
            if bits % 16 == 0:
                self._aligned = addresses
        for address in made:
            bits |= address
        addresses += made
        if bits % 16 == 0:
            return addresses, float32_precision()
        return addresses, (float32_precision(), tuple([address % 16 == 0 for address in addresses]))

    def _launch(
        self, launches: Sequence[Launch], addresses: tuple[int, ...], operands: Sequence[Tensor], others: Sequence[int]
    ) -> None:
        """Launch, with the addresses of all operands, then those of each block's ``others``, so many per block."""
        capturing = self._capturing()
        if capturing:  # graphs read the tables
            _captured.update(launches)
        if self._alone:
            launches[0].run(addresses)
            return
        by_block, position = [], len(operands)
        for part, count in zip(split(self._blocks, addresses[: len(operands)]), others, strict=True):
            end = position + count
            by_block.append((*part, *addresses[position:end]))
            position = end
        for launch in launches:
            launch(by_block, capturing)

    def _make_forward(self, tensors: Sequence[Tensor], kernels: Sequence[Tensor]) -> list[ForwardLaunch]:
        operands = split(self._blocks, tensors)
        rows = zip(self._blocks, operands, kernels, strict=True)
        specs = {index: forward_spec(*row) for index, row in enumerate(rows)}
        slots = [[*part, kernel] for part, kernel in zip(operands, kernels, strict=True)]
        return [
            make_launch(ForwardLaunch, configs.forward_choices, *shared, self._blocks, slots)
            for shared in _by_structure(specs)
        ]

    def _make_backward(
        self, tensors: Sequence[Tensor], upstream: Sequence[Tensor | None], gradients: Gradients
    ) -> list[BackwardLaunch]:
        specs, slots = {}, []
        rows = zip(self._blocks, split(self._blocks, tensors), upstream, split(self._blocks, gradients), strict=True)
        for index, (block, operands, output, part) in enumerate(rows):
            made = [gradient for gradient in part if gradient is not None]
            slots.append([*operands, *([] if output is None else [output]), *made])
            if output is not None and made:
                specs[index] = backward_spec(block, operands, output, part)
        return [
            make_launch(BackwardLaunch, configs.backward_choices, *shared, self._blocks, slots)
            for shared in _by_structure(specs)
        ]


def make_launch(
    kind: Callable[..., Launch],
    choices_of: Callable[[Spec, int, str], Sequence[configs.Config]],
    spec: Spec,
    indices: Sequence[int],
    blocks: Sequence[Block],
    slots: Sequence[Sequence[Tensor]],
) -> Any:
    """Make the launch of those blocks of a call, by their ``indices``, that have one structure.

    Tiles are the heuristic's of ``choices_of``, or with tuning the fastest. ``slots`` are per block the tensors of the spec.
    """
    chosen, tensors = [blocks[index] for index in indices], [slots[index] for index in indices]
    device = tensors[0][0].device
    device_kind = device_of(device)
    precision = device_kind.precision(spec.half)
    choices = choices_of(spec, device_kind.arch, precision)
    config = configs.largest_filling(chosen, choices)
    if autotune.enabled():
        addresses = [tuple(map(Tensor.data_ptr, part)) for part in slots]

        def prepare(candidate: configs.Config) -> Callable[[], object]:
            launch = kind(spec, indices, chosen, tensors, precision, candidate)
            return lambda: launch(addresses, False)

        direction = "forward" if isinstance(config, configs.Forward) else "backward"
        key = autotune.cache_key(direction, spec, chosen, tensors, precision)
        config = autotune.choose(choices, config, key, device, prepare)
    return kind(spec, indices, chosen, tensors, precision, config)


def _by_structure(specs: dict[int, Spec]) -> list[tuple[Spec, list[int]]]:
    """Blocks, by their index, that can share a launch."""
    groups: dict[Spec, list[int]] = {}
    for index, spec in specs.items():
        groups.setdefault(spec, []).append(index)
    return [(replace(spec, batched=len(indices) > 1), indices) for spec, indices in groups.items()]
