"""Caches the squeezed kernel in eval mode, and detects that it is out of date."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from orepa_kernels.guards import float32_precision

from .linear_block import LinearBlock

#: steps of any optimizer, counted once a kernel is cached
_steps = 0


class _Source(NamedTuple):
    """The place of one operand, and the state of it that most writes change."""

    owner: dict[str, Any]
    name: str
    tensor: Tensor  # a reference, so that its id and its memory are not reused
    version: int
    address: int


@dataclass(frozen=True)
class CachedKernel:
    """A kernel without a graph, its key, and the operands that it was squeezed from.

    It is valid for the same key, while each operand is the same tensor, of the same version (which in-place writes count up)
    and at the same address (which ``parameter.data = ...`` changes). Fused optimizers write uncounted, so the key has the
    number of optimizer steps.
    """

    kernel: Tensor
    key: tuple[Any, ...]
    sources: tuple[_Source, ...]

    def is_current(self, key: tuple[Any, ...]) -> bool:
        """Return whether this is still the kernel for a key (of `cache_key`)."""
        if key != self.key:
            return False
        for owner, name, tensor, version, address in self.sources:
            if owner.get(name) is not tensor or tensor._version != version or tensor.data_ptr() != address:
                return False
        return True


def cache_key(
    x: Tensor, dtype: torch.dtype | None, memory_format: torch.memory_format, backend: str
) -> tuple[Any, ...]:
    """Return all that the kernel for an input depends on, except the operands. Keys of different inputs compare.

    The stream is part of it: work queued on one stream need not be done when another reads the kernel, nor would its memory
    be reused in the order of both.
    """
    stream = torch.cuda.current_stream(x.device) if _is_on_gpu(x) else None
    return dtype, memory_format, backend, _steps, float32_precision(), stream


def is_capturing(x: Tensor) -> bool:
    """Return whether a CUDA graph is capturing. It would go on using a cached kernel after the next change."""
    return _is_on_gpu(x) and torch.cuda.is_current_stream_capturing()


def _is_on_gpu(x: Tensor) -> bool:
    return x.is_cuda and torch.cuda.is_initialized()  # a fake tensor claims a GPU where there is none


def record_sources(block: LinearBlock, operands: Sequence[Tensor]) -> tuple[_Source, ...] | None:
    """Record the operands before they are squeezed; None where they are not ordinary parameters.

    Changes go unseen in tensors that are traced, wrapped by a functional transform, sharded, parametrized, or born in
    inference mode.
    """
    sources = []
    for (path, name), tensor in zip(block.sources, operands, strict=True):
        owner = block.get_submodule(".".join(path))
        kind, home = (nn.Parameter, owner._parameters) if name in owner._parameters else (Tensor, owner._buffers)
        ordinary = type(tensor) is kind and home.get(name) is tensor and not tensor.is_inference()
        if not ordinary or _is_sharded(owner):
            return None
        sources.append(_Source(home, name, tensor, tensor._version, tensor.data_ptr()))
    _start_counting_steps()
    return tuple(sources)


def _is_sharded(owner: nn.Module) -> bool:
    """Return whether FSDP2 manages the module's parameters.

    Within a forward they are plain parameters, written uncounted and often at the address of the last forward, and
    `FSDPModule` may be any ancestor. But FSDP2 hooks the state dict of each module whose parameters it shards.
    """
    hooks = (*owner._state_dict_pre_hooks.values(), *owner._load_state_dict_post_hooks.values())
    return any(str(getattr(hook, "__module__", "")).startswith("torch.distributed.") for hook in hooks)


@functools.cache
def _start_counting_steps() -> None:
    register_optimizer_step_post_hook(_count_step)


def _count_step(_optimizer: Optimizer, _args: Any, _kwargs: Any) -> None:
    global _steps
    if not torch.compiler.is_compiling():  # a compiled step's writes are counted; a growing number would recompile it
        _steps += 1
