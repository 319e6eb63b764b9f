"""The kernels that blocks have in store, and the one rule for when a stored kernel is current.

A stored kernel is current for a request with the same key (`request_key`) as long as every operand that it was squeezed from is

- in its place: the same tensor, under its name in its module, and the same part of the same storage; and
- unwritten (`orepa.modules.writes`). Within a training step autograd's version counters tell, as between any forward and its
  backward pass. From step to step there are writers that nothing counts, such as ``parameter.data``: there marks tell.

A kernel is not stored where this cannot be told: where operands are traced, wrapped by a functional transform, sharded,
parametrized or computed by hooks, and, from step to step, in memory that is not PyTorch's own.
"""

from __future__ import annotations

import operator
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from orepa_kernels.guards import float32_precision, is_plain, is_watched

from .linear_block import LinearBlock
from .writes import Mark, Versions, detects_writes, mark


class Sources:
    """The tensors of a block's operands, and where they are.

    Raises:
        NotStored: one of them is no plain parameter or buffer of the block.
    """

    def __init__(self, block: LinearBlock) -> None:
        self._homes: list[dict[str, Any]] = []
        self._names: list[str] = []
        self.tensors: list[Tensor] = []
        owner: nn.Module | None = None
        for path, name in block.sources:
            holder: nn.Module = block
            for child in path:
                holder = getattr(holder, child)
            if holder is not owner and is_sharded(holder):
                raise NotStored
            owner = holder
            kind, home = (nn.Parameter, owner._parameters) if name in owner._parameters else (Tensor, owner._buffers)
            tensor = home.get(name)
            if type(tensor) is not kind or (vars(tensor) and not _FREED_BETWEEN_FORWARDS.isdisjoint(vars(tensor))):
                raise NotStored
            self._homes.append(home)
            self._names.append(name)
            self.tensors.append(tensor)
        if not is_plain(self.tensors):
            raise NotStored

    def are_current(self) -> bool:
        """Return whether every operand is in its place and unwritten."""
        return all(map(operator.is_, map(dict.get, self._homes, self._names), self.tensors))


class StepSources(Sources):
    """Those of a kernel for one training step."""

    def __init__(self, block: LinearBlock) -> None:
        super().__init__(block)
        if any([tensor.is_inference() for tensor in self.tensors]):
            raise NotStored
        self._versions = Versions(self.tensors)

    def are_current(self) -> bool:
        return super().are_current() and self._versions.hold()


class LastingSources(Sources):
    """Those of a kernel for more than one step."""

    def __init__(self, block: LinearBlock) -> None:
        super().__init__(block)
        self._layouts = [(tensor.storage_offset(), tensor.stride()) for tensor in self.tensors]
        marks = [mark(tensor) for tensor in self.tensors]
        self._marks = [each for each in marks if each is not None]
        if len(self._marks) < len(marks):
            raise NotStored

    def are_current(self) -> bool:
        return (
            super().are_current()
            and all(map(Mark.holds, self._marks, self.tensors))
            and [(tensor.storage_offset(), tensor.stride()) for tensor in self.tensors] == self._layouts
        )


class NotStored(Exception):
    """A write to an operand could go unseen."""


#: attributes by which FSDP1 and DeepSpeed mark parameters that they free between forwards, which a stored kernel would hinder
_FREED_BETWEEN_FORWARDS = frozenset(("_fsdp_flattened", "ds_id"))


def is_sharded(owner: nn.Module) -> bool:
    """Return whether FSDP2 manages the parameters, which frees them between forwards, too.

    Within a forward it leaves plain parameters, and `FSDPModule` may be any ancestor. But it hooks the state dict of each
    module whose parameters it shards.
    """
    hooks = (*owner._state_dict_pre_hooks.values(), *owner._load_state_dict_post_hooks.values())
    return any([str(getattr(hook, "__module__", "")).startswith("torch.distributed.") for hook in hooks])


@dataclass(frozen=True)
class StoredKernel:
    """A kernel without a graph, its key, and the operands that it was squeezed from."""

    kernel: Tensor
    key: tuple[Any, ...]
    sources: Sources

    def is_current(self, key: tuple[Any, ...]) -> bool:
        """Return whether this is still the kernel for a key (of `request_key`)."""
        return key == self.key and self.sources.are_current()

    def is_trainable(self) -> bool:
        """Return whether an operand requires a gradient."""
        return any([tensor.requires_grad for tensor in self.sources.tensors])


def request_key(
    like: Tensor, dtype: torch.dtype | None, memory_format: torch.memory_format, backend: str, split: bool = False
) -> tuple[Any, ...]:
    """Return all that a kernel on the device of ``like`` depends on, except the operands. Keys of different inputs compare.

    ``split`` says whether one branch runs on feature maps (`orepa.modules.branch_order`).

    The stream is part of it: work queued on one stream need not be done when another reads the kernel, nor would its memory
    be reused in the order of both. So is whether a CUDA graph captures: it would go on using an earlier kernel after a change.
    """
    stream, captures = None, False
    if _is_on_gpu(like):
        stream, captures = torch.cuda.current_stream(like.device), torch.cuda.is_current_stream_capturing()
    return dtype, memory_format, backend, split, float32_precision(), stream, captures


def _is_on_gpu(x: Tensor) -> bool:
    return x.is_cuda and torch.cuda.is_initialized()  # a fake tensor claims a GPU where there is none


def in_backward() -> bool:
    """Return whether this runs within a backward pass, as the second forward of an activation checkpoint does."""
    return torch._C._current_graph_task_id() != -1


def squeeze_to_store(
    block: LinearBlock, key: tuple[Any, ...], squeeze: Callable[[list[Tensor]], Tensor]
) -> StoredKernel | None:
    """Squeeze the operands of a block for more than one step; None where a write to them could go unseen."""
    if is_watched() or not detects_writes():
        return None
    # A tensor of inference mode could not be saved for a backward pass later.
    with torch.inference_mode(False), torch.no_grad():
        try:
            sources = LastingSources(block)
        except NotStored:
            return None
        # Backends take addresses, which counts as a write. So they get copies, made while the marks are there.
        return StoredKernel(squeeze([tensor.clone() for tensor in sources.tensors]), key, sources)


# --- steps --------------------------------------------------------------------------------------------------------------


class Step(Protocol):
    """What squeezes the blocks of a model at once (`orepa.modules.step`)."""

    model: nn.Module

    def kernel(self, block: Any, key: tuple[Any, ...]) -> Tensor | None:
        """Return the kernel of a block for a key (of `request_key`), or None where the block has to squeeze alone."""

    def splits(self, block: Any, x: Tensor) -> bool:
        """Return whether a branch of a block runs on feature maps, for an input."""


class _OpenSteps(threading.local):
    def __init__(self) -> None:
        self.steps: list[Any] = []


#: of the forwards that this thread runs, the innermost last
open_steps = _OpenSteps()
