"""Caches the squeezed kernel, and detects every write to what it was squeezed from.

A cached kernel is current as long as nothing has written to its operands. PyTorch's copy-on-write storages tell: an operand
is marked by a lazy clone that is dropped at once, so that its storage has one owner again. The first access that may write,
by whatever alias, takes the mark away, and neither copies nor moves anything. Reading leaves it.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from orepa_kernels.guards import float32_precision, is_plain, is_watched

from .linear_block import LinearBlock

_is_marked: Callable[[Tensor], bool] = getattr(torch._C, "_is_cow_tensor", lambda tensor: False)
#: of the storage; unlike ``data_ptr()`` it does not count as a write
_address: Callable[[Tensor], int] = getattr(torch._C, "_data_address", lambda tensor: 0)


class _Mark:
    """A period without writes to the storage at ``address``, which is None once a later mark has begun."""

    def __init__(self, address: int) -> None:
        self.address: int | None = address


#: by address: the kernels of all blocks that read a storage share its mark
_marks: WeakValueDictionary[int, _Mark] = WeakValueDictionary()
_lock = threading.Lock()


class _Source(NamedTuple):
    """The place of one operand, its mark, and its part of the storage."""

    owner: dict[str, Any]
    name: str
    tensor: Tensor
    mark: _Mark
    offset: int
    stride: tuple[int, ...]


@dataclass(frozen=True)
class CachedKernel:
    """A kernel without a graph, its key, and the operands that it was squeezed from."""

    kernel: Tensor
    key: tuple[Any, ...]
    sources: tuple[_Source, ...]

    def is_current(self, key: tuple[Any, ...], trains: bool) -> bool:
        """Return whether this is still the kernel for a key (of `cache_key`).

        That is while each operand is the same tensor, its mark is still there, and it is the same part of the same storage;
        and, where the block ``trains``, none requires a gradient.
        """
        if key != self.key:
            return False
        for owner, name, tensor, mark, offset, stride in self.sources:
            if not (
                owner.get(name) is tensor
                and _is_marked(tensor)
                and _address(tensor) == mark.address
                and tensor.storage_offset() == offset
                and tensor.stride() == stride
                and not (trains and tensor.requires_grad)
            ):
                return False
        return True


def cache_key(
    like: Tensor, dtype: torch.dtype | None, memory_format: torch.memory_format, backend: str
) -> tuple[Any, ...]:
    """Return all that a kernel on the device of ``like`` depends on, except the operands. Keys of different inputs compare.

    The stream is part of it: work queued on one stream need not be done when another reads the kernel, nor would its memory
    be reused in the order of both.
    """
    stream = torch.cuda.current_stream(like.device) if _is_on_gpu(like) else None
    return dtype, memory_format, backend, float32_precision(), stream


def is_capturing(x: Tensor) -> bool:
    """Return whether a CUDA graph or `torch.jit.trace` is capturing, which would go on using a cached kernel after a change."""
    return torch._C._is_tracing() or (_is_on_gpu(x) and torch.cuda.is_current_stream_capturing())


def _is_on_gpu(x: Tensor) -> bool:
    return x.is_cuda and torch.cuda.is_initialized()  # a fake tensor claims a GPU where there is none


def squeeze_to_cache(
    block: LinearBlock,
    operands: Sequence[Tensor],
    key: tuple[Any, ...],
    squeeze: Callable[[list[Tensor]], Tensor],
) -> CachedKernel | None:
    """Squeeze the operands of a block; None where a write to them could go unseen.

    That is where they are traced, wrapped by a functional transform, sharded or parametrized, and where their memory is not
    PyTorch's own: shared with another process, mapped from a file, NumPy's.
    """
    if is_watched() or not is_plain(operands) or not _detects_writes():
        return None
    # A tensor of inference mode could not be saved for a backward pass later.
    with torch.inference_mode(False), torch.no_grad():
        sources = _mark_sources(block, operands)
        # Backends take addresses, which counts as a write. So they get copies, made while the marks are there.
        return None if sources is None else CachedKernel(squeeze([t.clone() for t in operands]), key, sources)


def _mark_sources(block: LinearBlock, operands: Sequence[Tensor]) -> tuple[_Source, ...] | None:
    sources = []
    for (path, name), tensor in zip(block.sources, operands, strict=True):
        owner = block.get_submodule(".".join(path))
        kind, home = (nn.Parameter, owner._parameters) if name in owner._parameters else (Tensor, owner._buffers)
        if type(tensor) is not kind or home.get(name) is not tensor or _is_sharded(owner, tensor):
            return None
        mark = _mark(tensor)
        if mark is None:
            return None
        sources.append(_Source(home, name, tensor, mark, int(tensor.storage_offset()), tensor.stride()))
    return tuple(sources)


def _mark(tensor: Tensor) -> _Mark | None:
    """Mark the storage of a tensor; None where it cannot be."""
    with _lock:
        address = _address(tensor)
        mark = _marks.get(address)
        if not _is_marked(tensor):
            try:
                torch._lazy_clone(tensor)
            except RuntimeError:  # not PyTorch's own memory
                return None
            if mark is not None:  # there was a write since, which other caches of this storage no longer see
                mark.address, mark = None, None
        if mark is None:
            mark = _marks[address] = _Mark(address)
        return mark


@functools.cache
def _detects_writes() -> bool:
    """Return whether this PyTorch tells writes from reads as the above expects. Its functions are not public."""
    try:
        tensor = torch.zeros(1, device="cpu")
        address = _address(tensor)
        torch._lazy_clone(tensor)
        tensor.clone()
        marked = _is_marked(tensor)
        tensor.data.add_(1)
        return marked and not _is_marked(tensor) and _address(tensor) == address
    except (AttributeError, RuntimeError):
        return False


def _is_sharded(owner: nn.Module, tensor: Tensor) -> bool:
    """Return whether FSDP or DeepSpeed manages a parameter: they free it between forwards, which a cache would hinder.

    FSDP2 leaves plain parameters within a forward, and `FSDPModule` may be any ancestor. But it hooks the state dict of each
    module whose parameters it shards.
    """
    if hasattr(tensor, "_fsdp_flattened") or hasattr(tensor, "ds_id"):
        return True
    hooks = (*owner._state_dict_pre_hooks.values(), *owner._load_state_dict_post_hooks.values())
    return any(str(getattr(hook, "__module__", "")).startswith("torch.distributed.") for hook in hooks)
