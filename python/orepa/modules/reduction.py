"""Averages gradients over processes: those of the kernels instead of those of the parameters, which are several times as many.

The gradients of a block's parameters are linear in that of its kernel, and the parameters are the same everywhere. So the mean
over the processes may as well be taken of the kernels' gradients, in `orepa.squeeze_once`. What else has got gradients within
(biases, blocks that squeezed alone) is averaged as such.

Two groups of processes come with the given one: a gloo group for a few numbers, which the host reads without waiting for a
GPU; and, where gradients go during a backward pass, one for these. `DistributedDataParallel` reduces its own gradients
meanwhile, and where a block is unused in one process, the two need not come in the same order everywhere.
"""

from __future__ import annotations

import math
import threading
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary, WeakSet

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .kernel_store import in_backward, is_sharded
from .linear_block import LinearBlock
from .orepa_conv import OREPAConv, process_count

#: bytes that are reduced at once, as in DistributedDataParallel: large enough for the bandwidth, small enough to begin early
BUCKET = 25 * 2**20

#: the attribute of a model with the names that `exclude_from_ddp` has added to those that DDP ignores
_EXCLUDED = "_excluded_from_ddp"


def exclude_from_ddp(model: nn.Module) -> None:
    """Make `DistributedDataParallel` leave the parameters of all `OREPAConv` in a model alone, before it wraps the model::

        orepa.exclude_from_ddp(model)
        model = DistributedDataParallel(model)
        ...
        with orepa.squeeze_once(model, process_group=torch.distributed.group.WORLD):
            ...

    `orepa.squeeze_once` then averages the gradients of their kernels, several times fewer bytes. Outside of it, blocks that
    train raise an error, as nobody would average their gradients. DDP does not send excluded parameters to the other processes
    when it wraps a model: they have to be equal from the start, which `orepa.squeeze_once` checks the first time.

    Args:
        model: what DDP is going to wrap. Its other parameters, and what is excluded already, stay as they are.

    Raises:
        RuntimeError: DDP has wrapped it already.
    """
    if _wrappers(model):
        raise RuntimeError("exclude_from_ddp: call it before DistributedDataParallel wraps the model")
    mine: set[str] = set()
    for path, block in model.named_modules():
        if isinstance(block, OREPAConv):
            block.excluded = True
            prefix = f"{path}." if path else ""
            mine.update(prefix + name for name, _ in block.named_parameters())
            # The fixed filters are equal everywhere. A broadcast would count as a write to them.
            parts = [(place, part) for place, part in block.named_modules(prefix=path) if isinstance(part, LinearBlock)]
            mine.update(f"{place}.{name}".lstrip(".") for place, part in parts for name in part._lowered.constants)
    ignored = set(getattr(model, "_ddp_params_and_buffers_to_ignore", ()))
    setattr(model, _EXCLUDED, sorted(mine - ignored | set(getattr(model, _EXCLUDED, ()))))
    ddp: Any = nn.parallel.DistributedDataParallel
    ddp._set_params_and_buffers_to_ignore_for_model(model, sorted(mine | ignored))


def include_in_ddp(model: nn.Module) -> None:
    """Undo `exclude_from_ddp`, whatever its blocks are now."""
    mine = vars(model).pop(_EXCLUDED, None)
    if mine is not None:
        left = set(model._ddp_params_and_buffers_to_ignore) - set(mine)  # type: ignore[arg-type]
        vars(model)["_ddp_params_and_buffers_to_ignore"] = sorted(left)
        for block in model.modules():
            if isinstance(block, OREPAConv):
                block.excluded = False


def check_group(blocks: Iterable[OREPAConv]) -> None:
    """Raise where blocks are excluded from DDP, and no group was given."""
    if process_count() > 1 and any(block.excluded for block in blocks):
        raise RuntimeError(
            "squeeze_once: blocks that are excluded from DDP need process_group=torch.distributed.group.WORLD"
        )


# --- groups -------------------------------------------------------------------------------------------------------------


class _Groups(NamedTuple):
    """For the processes of a group: one for a few numbers, and one for gradients during a backward pass."""

    control: Any
    overlapping: Any


_groups: WeakKeyDictionary[Any, _Groups] = WeakKeyDictionary()
#: the blocks whose values have been compared among the processes
_compared: WeakSet[OREPAConv] = WeakSet()


def _groups_of(group: Any, overlap: bool) -> _Groups:
    groups = _groups.get(group)
    if groups is None or (overlap and groups.overlapping is None):
        ranks = dist.get_process_group_ranks(group)
        settings: Any = {"timeout": _timeout(group), "use_local_synchronization": True}
        control = dist.new_group(ranks, backend="gloo", **settings) if groups is None else groups.control
        groups = _groups[group] = _Groups(control, dist.new_group(ranks, **settings) if overlap else None)
    return groups


def _timeout(group: Any) -> Any:
    for device in group._device_types:
        options: Any = getattr(group._get_backend(device), "options", None)
        if hasattr(options, "_timeout"):
            return options._timeout
    return None


# --- buckets ------------------------------------------------------------------------------------------------------------


class _Entry(NamedTuple):
    """A gradient to be averaged: that of a block's kernel, or of a parameter."""

    owner: Any
    shape: tuple[int, ...]
    like: Tensor  # of its device and dtype

    @property
    def kind(self) -> tuple[torch.device, torch.dtype]:
        return self.like.device, torch.promote_types(self.like.dtype, torch.float32)


class _Bucket:
    """Gradients of one device and dtype, float32 at least, that are averaged at once."""

    def __init__(self) -> None:
        self.entries: list[_Entry] = []
        self.nbytes = 0
        self._sizes: list[int] = []
        self._flat: Tensor | None = None
        self._work: Any = None

    def add(self, entry: _Entry) -> None:
        self.entries.append(entry)
        self._sizes.append(math.prod(entry.shape))
        self.nbytes += self._sizes[-1] * entry.kind[1].itemsize

    @property
    def is_sent(self) -> bool:
        return self._work is not None

    @torch.no_grad()
    def send(self, value: Callable[[Any], Tensor | None], group: Any) -> None:
        """Begin to sum the values of all owners, with zeros where there is none."""
        device, dtype = self.entries[0].kind
        self._flat = torch.empty(sum(self._sizes), device=device, dtype=dtype)
        for entry, part in zip(self.entries, self._flat.split(self._sizes), strict=True):
            tensor = value(entry.owner)
            if tensor is None:
                part.zero_()
            else:
                part.view(entry.shape).copy_(tensor)
        self._work = dist.all_reduce(self._flat, group=group, async_op=True)

    def means(self, processes: int) -> Iterator[tuple[Any, Tensor]]:
        """Give each owner and the mean of its values."""
        assert self._flat is not None
        self._work.wait()
        self._flat.div_(processes)
        for entry, part in zip(self.entries, self._flat.split(self._sizes), strict=True):
            yield entry.owner, part.view(entry.shape)


def _fill_buckets(entries: Iterable[_Entry]) -> list[_Bucket]:
    buckets: list[_Bucket] = []
    last: dict[Any, _Bucket] = {}  # by device and dtype
    for entry in entries:
        bucket = last.get(entry.kind)
        if bucket is None or bucket.nbytes >= BUCKET:
            bucket = last[entry.kind] = _Bucket()
            buckets.append(bucket)
        bucket.add(entry)
    return buckets


# --- one step -----------------------------------------------------------------------------------------------------------


class Reducer:
    """Averages the gradients of blocks over the processes of a group, once.

    Args:
        model: whose forwards are micro-batches.
        blocks: that train or are frozen, in the order of the model.
        group: of processes.
        micro_batches: after so many forwards, a bucket goes as soon as its kernels have got their gradients. None: all go at
            the end.
        gradient: gives that of a block's kernel, None where it has none.

    Raises:
        RuntimeError: what it cannot do; the message says why.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: Sequence[OREPAConv],
        group: Any,
        micro_batches: int | None,
        gradient: Callable[[OREPAConv], Tensor | None],
    ) -> None:
        self._micro_batches, self._gradient = micro_batches, gradient
        #: by block; to collect them takes time
        self._of_block = {block: list(block.parameters()) for block in blocks}
        every = [p for parameters in self._of_block.values() for p in parameters]
        self._parameters = list(dict.fromkeys(p for p in every if p.requires_grad))
        for ddp in _wrappers(model):
            self._check_wrapper(ddp)
        self._processes = dist.get_world_size(group)
        if self._processes < 1:
            raise RuntimeError("squeeze_once: this process is not in process_group")
        self._group, self._groups = group, _groups_of(group, overlap=micro_batches is not None)
        self._before = {p: None if p.grad is None else (p.grad, p.grad._version) for p in self._parameters}
        # The last blocks get their gradients first.
        rows = [(block, of) for block, of in self._of_block.items() if any([p.requires_grad for p in of])]
        self._buckets = _fill_buckets(_Entry(block, block.plan.shape, of[0]) for block, of in reversed(rows))
        self._places = {entry.owner: bucket for bucket in self._buckets for entry in bucket.entries}
        self._forwards, self._sent = 0, 0
        self._awaited: dict[OREPAConv, set[int]] = {}  # by block, its kernels that the last forward has used
        self._lock = threading.Lock()  # there is one backward thread per device
        self._checks: tuple[Any, Tensor] | None = self._compare()
        self._hook = model.register_forward_hook(self._end_forward)

    def close(self) -> None:
        """Forget the model."""
        self._hook.remove()

    # --- what it cannot do ----------------------------------------------------------------------------------------------

    def _check_wrapper(self, ddp: Any) -> None:
        if ddp.find_unused_parameters:
            raise RuntimeError("squeeze_once: DistributedDataParallel must not have find_unused_parameters=True")
        reduced = set(map(id, ddp._module_parameters))
        if any(id(parameter) in reduced for parameter in self._parameters):
            raise RuntimeError(
                "squeeze_once: DistributedDataParallel averages the gradients of the blocks already; call "
                "orepa.exclude_from_ddp(model) before it wraps the model"
            )

    def _compare(self) -> tuple[Any, Tensor]:
        """Begin to compare among the processes what has to be equal: of blocks that are new, names and values as well."""
        new = [block for block in self._of_block if block not in _compared]
        for block in new:
            _check_shards(block)
        named = [(name, p) for block in new for name, p in block.named_parameters()]
        layout = [(name, p.shape, p.dtype) for name, p in named], self._micro_batches
        trains = [
            [bool(block._forward_pre_hooks), *(p.requires_grad for p in of)] for block, of in self._of_block.items()
        ]
        numbers = [
            zlib.crc32(repr(part).encode()) for part in (layout, trains, [zlib.crc32(_bytes(p)) for _, p in named])
        ]
        both = torch.tensor([*numbers, *(-number for number in numbers)])
        return dist.all_reduce(both, dist.ReduceOp.MAX, group=self._groups.control, async_op=True), both

    def _check_compared(self) -> None:
        """Raise where the processes differ, before they exchange gradients."""
        if self._checks is None:
            return
        work, both = self._checks
        work.wait()
        self._checks = None
        layout, frozen, values = [high == -low for high, low in zip(*both.view(2, -1).tolist(), strict=True)]
        if not layout:
            raise RuntimeError("squeeze_once: the blocks, or micro_batches, are not the same in all processes")
        if not frozen:
            raise RuntimeError("squeeze_once: different blocks are frozen (or hooked) in different processes")
        if not values:
            raise RuntimeError(
                "squeeze_once: parameters of blocks differ among the processes, and DDP does not send those that it ignores: "
                "seed all processes alike, or load the same checkpoint"
            )
        _compared.update(self._of_block)

    # --- within the step ------------------------------------------------------------------------------------------------

    def _end_forward(self, _model: nn.Module, _args: Any, _output: Any) -> None:
        """Count a forward that trains. The second one of an activation checkpoint is none."""
        if torch.compiler.is_compiling() or not torch.is_grad_enabled() or in_backward():
            return
        ddp = nn.parallel.DistributedDataParallel._get_active_ddp_module()
        if ddp is not None and self._forwards == 0:
            self._check_wrapper(ddp)
        self._forwards += 1
        if self._micro_batches is not None and self._forwards < self._micro_batches:
            self._awaited.clear()

    def asked(self, block: OREPAConv, kernel: Tensor) -> None:
        """Take note that a forward uses a kernel of a block."""
        self._awaited.setdefault(block, set()).add(id(kernel))

    def arrived(self, block: OREPAConv, kernel: Tensor) -> None:
        """Take note that a backward pass is done with a kernel, and send what is complete."""
        with self._lock:
            if self._places[block].is_sent:
                raise RuntimeError(
                    f"squeeze_once: a gradient of {block} came after it was sent; leave micro_batches away, or call "
                    "backward for each micro-batch once, after its forward"
                )
            if self._forwards != self._micro_batches:
                return
            self._awaited.get(block, set()).discard(id(kernel))
            while self._sent < len(self._buckets):
                owners = [entry.owner for entry in self._buckets[self._sent].entries]
                if any(self._awaited.get(owner) for owner in owners):
                    break
                self._send()

    def _send(self) -> None:
        """Send the next bucket. Their order is the same in all processes."""
        self._check_compared()
        group = self._group if self._micro_batches is None else self._groups.overlapping
        self._buckets[self._sent].send(self._gradient, group)
        self._sent += 1

    # --- in the end -----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def average(self) -> dict[OREPAConv, Tensor]:
        """Return the mean gradients of kernels, where any process has one; and put those of parameters in their place."""
        if self._micro_batches not in (None, self._forwards):
            raise RuntimeError(
                f"squeeze_once: micro_batches={self._micro_batches}, but the model ran {self._forwards} forwards that train"
            )
        self._check_compared()
        while self._sent < len(self._buckets):
            self._send()
        flags = [self._gradient(block) is not None for block in self._places] + [*map(self._is_new, self._parameters)]
        used = torch.tensor(flags, dtype=torch.uint8)
        dist.all_reduce(used, dist.ReduceOp.MAX, group=self._groups.control)
        flags = used.tolist()
        in_place = [p for p, flag in zip(self._parameters, flags[len(self._places) :], strict=True) if flag]
        others = _fill_buckets(_Entry(p, p.shape, p) for p in in_place)
        for bucket in others:
            bucket.send(lambda p: p.grad, self._group)
        means = {owner: mean for bucket in self._buckets for owner, mean in bucket.means(self._processes)}
        for bucket in others:
            for parameter, mean in bucket.means(self._processes):
                if parameter.grad is None:
                    parameter.grad = torch.empty_like(parameter)
                parameter.grad.copy_(mean)
        return {block: means[block] for block, flag in zip(self._places, flags, strict=False) if flag}

    def _is_new(self, parameter: nn.Parameter) -> bool:
        """Return whether a parameter has got a gradient within. One from before is the same in all processes."""
        gradient, before = parameter.grad, self._before[parameter]
        return gradient is not None and (before is None or gradient is not before[0] or gradient._version != before[1])


def _check_shards(block: OREPAConv) -> None:
    """Raise where FSDP or DeepSpeed have taken a block over."""
    marks = ("full_tensor", "_fsdp_flattened", "ds_id")
    if is_sharded(block) or any(hasattr(p, mark) for p in block.parameters() for mark in marks):
        raise RuntimeError(
            f"squeeze_once: {block} is sharded, and FSDP reduces its gradients: leave process_group away"
        )


def _wrappers(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, nn.parallel.DistributedDataParallel)]


def _bytes(tensor: Tensor) -> Any:
    return tensor.detach().to("cpu", copy=True).reshape(-1).view(torch.uint8).numpy()


@contextmanager
def reducing(*arguments: Any) -> Iterator[Reducer]:
    """Give a `Reducer`, for one step."""
    reducer = Reducer(*arguments)
    try:
        yield reducer
    finally:
        reducer.close()
