"""The kernels that blocks have in store, and the one rule for when a stored kernel is current.

A stored kernel is current for a request with the same key (`request_key`) as long as every operand that it was squeezed from is

- in its place: the same tensor, under its name in its module, and the same part of the same storage; and
- unwritten (`orepa.modules.writes`). Within a training step autograd's version counters tell, as between any forward and its
  backward pass. From step to step there are writers that nothing counts, such as ``parameter.data``: there marks tell.

A kernel is not stored where this cannot be told: where operands are traced, wrapped by a functional transform, sharded,
parametrized or computed by hooks, and, from step to step, in memory that is not PyTorch's own.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from orepa_kernels.guards import float32_precision, is_plain, is_watched

from .linear_block import LinearBlock
from .writes import Mark, Version, detects_writes, mark


class _Source(NamedTuple):
    """The place of one operand, its part of the storage, and what tells writes to it."""

    home: dict[str, Any]
    name: str
    tensor: Tensor
    offset: int
    stride: tuple[int, ...]
    unwritten: Mark | Version

    def is_current(self) -> bool:
        """Return whether the operand is in its place and unwritten."""
        home, name, tensor, offset, stride, unwritten = self
        return (
            home.get(name) is tensor
            and tensor.storage_offset() == offset
            and tensor.stride() == stride
            and unwritten.holds(tensor)
        )


@dataclass(frozen=True)
class StoredKernel:
    """A kernel without a graph, its key, and the operands that it was squeezed from."""

    kernel: Tensor
    key: tuple[Any, ...]
    sources: tuple[_Source, ...]

    def is_current(self, key: tuple[Any, ...]) -> bool:
        """Return whether this is still the kernel for a key (of `request_key`)."""
        return key == self.key and self.is_unwritten()

    def is_unwritten(self) -> bool:
        """Return whether every operand is in its place and unwritten."""
        return all([source.is_current() for source in self.sources])

    def is_trainable(self) -> bool:
        """Return whether an operand requires a gradient."""
        return any(source.tensor.requires_grad for source in self.sources)


def request_key(
    like: Tensor, dtype: torch.dtype | None, memory_format: torch.memory_format, backend: str
) -> tuple[Any, ...]:
    """Return all that a kernel on the device of ``like`` depends on, except the operands. Keys of different inputs compare.

    The stream is part of it: work queued on one stream need not be done when another reads the kernel, nor would its memory
    be reused in the order of both. So is whether a CUDA graph captures: it would go on using an earlier kernel after a change.
    """
    stream, captures = None, False
    if _is_on_gpu(like):
        stream, captures = torch.cuda.current_stream(like.device), torch.cuda.is_current_stream_capturing()
    return dtype, memory_format, backend, float32_precision(), stream, captures


def _is_on_gpu(x: Tensor) -> bool:
    return x.is_cuda and torch.cuda.is_initialized()  # a fake tensor claims a GPU where there is none


def in_backward() -> bool:
    """Return whether this runs within a backward pass, as the second forward of an activation checkpoint does."""
    return torch._C._current_graph_task_id() != -1


def squeeze_to_store(
    block: LinearBlock,
    operands: Sequence[Tensor],
    key: tuple[Any, ...],
    squeeze: Callable[[list[Tensor]], Tensor],
) -> StoredKernel | None:
    """Squeeze the operands of a block for more than one step; None where a write to them could go unseen."""
    if is_watched() or not is_plain(operands) or not detects_writes():
        return None
    # A tensor of inference mode could not be saved for a backward pass later.
    with torch.inference_mode(False), torch.no_grad():
        homes = _homes(block, operands)
        marks = None if homes is None else [mark(tensor) for tensor in operands]
        if homes is None or marks is None or None in marks:
            return None
        # Backends take addresses, which counts as a write. So they get copies, made while the marks are there.
        kernel = squeeze([tensor.clone() for tensor in operands])
        return StoredKernel(kernel, key, _sources(homes, operands, marks))


def step_sources(block: LinearBlock, operands: Sequence[Tensor]) -> tuple[_Source, ...] | None:
    """Return the sources of a kernel for this training step; None where a write to them could go unseen."""
    if not is_plain(operands) or any(tensor.is_inference() for tensor in operands):
        return None
    homes = _homes(block, operands)
    return None if homes is None else _sources(homes, operands, [Version(tensor) for tensor in operands])


def _sources(
    homes: Sequence[tuple[dict[str, Any], str]], operands: Sequence[Tensor], unwritten: Sequence[Any]
) -> tuple[_Source, ...]:
    places = zip(homes, operands, unwritten, strict=True)
    return tuple(
        _Source(home, name, t, int(t.storage_offset()), t.stride(), proof) for (home, name), t, proof in places
    )


def _homes(block: LinearBlock, operands: Sequence[Tensor]) -> list[tuple[dict[str, Any], str]] | None:
    """Return the dictionary and the name of each operand; None where one is no plain parameter or buffer of the block."""
    homes: list[tuple[dict[str, Any], str]] = []
    owner: nn.Module | None = None
    for (path, name), tensor in zip(block.sources, operands, strict=True):
        holder: nn.Module = block
        for child in path:
            holder = getattr(holder, child)
        if holder is not owner and _is_sharded(holder):
            return None
        owner = holder
        kind, home = (nn.Parameter, owner._parameters) if name in owner._parameters else (Tensor, owner._buffers)
        if type(tensor) is not kind or home.get(name) is not tensor:
            return None
        if hasattr(tensor, "_fsdp_flattened") or hasattr(tensor, "ds_id"):  # of FSDP and DeepSpeed
            return None
        homes.append((home, name))
    return homes


def _is_sharded(owner: nn.Module) -> bool:
    """Return whether FSDP2 manages the parameters: it frees them between forwards, which a stored kernel would hinder.

    Within a forward it leaves plain parameters, and `FSDPModule` may be any ancestor. But it hooks the state dict of each
    module whose parameters it shards.
    """
    hooks = (*owner._state_dict_pre_hooks.values(), *owner._load_state_dict_post_hooks.values())
    return any(str(getattr(hook, "__module__", "")).startswith("torch.distributed.") for hook in hooks)


# --- steps --------------------------------------------------------------------------------------------------------------


class Step(Protocol):
    """What squeezes the blocks of a model at once (`orepa.modules.step`)."""

    model: nn.Module

    def kernel(self, block: Any, key: tuple[Any, ...]) -> Tensor | None:
        """Return the kernel of a block for a key (of `request_key`), or None where the block has to squeeze alone."""


class _OpenSteps(threading.local):
    def __init__(self) -> None:
        self.steps: list[Any] = []


#: of the forwards that this thread runs, the innermost last
open_steps = _OpenSteps()
