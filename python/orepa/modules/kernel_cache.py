"""The squeezed kernel that eval mode keeps, and how it knows that it is out of date."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from orepa_kernels.guards import float32_precision

from .linear_block import LinearBlock

#: steps of any optimizer so far; counted from the first kernel on that is kept
_steps = 0
_counts_steps = False


class _Source(NamedTuple):
    """One operand as it was: where its module keeps it, and what of it changes with most writes."""

    owner: dict[str, Any]
    name: str
    tensor: Tensor  # held, so that neither it nor its memory can come back as another
    version: int
    address: int


@dataclass(frozen=True)
class KeptKernel:
    """A kernel without a graph, the form that was asked for, and the operands that it was squeezed from.

    It is valid while the same form is asked for and each operand is the same tensor, of the same version (which in-place
    writes count up) and at the same address (which ``parameter.data = ...`` changes). Fused optimizers write uncounted: an
    optimizer's step is part of the form.
    """

    kernel: Tensor
    form: tuple[Any, ...]
    sources: tuple[_Source, ...]

    def is_current(self, form: tuple[Any, ...]) -> bool:
        """Whether this is still the kernel, in this form (of `form_of`)."""
        if form != self.form:
            return False
        for owner, name, tensor, version, address in self.sources:
            if owner.get(name) is not tensor or tensor._version != version or tensor.data_ptr() != address:
                return False
        return True


def form_of(x: Tensor, dtype: torch.dtype | None, memory_format: torch.memory_format, backend: str) -> tuple[Any, ...]:
    """All that the kernel for an input depends on, except the operands. Any two may be compared.

    The stream is part of it: what one stream has queued need not be done when another reads it, nor the memory be reused
    in the order of both.
    """
    stream = torch.cuda.current_stream(x.device) if _is_on_gpu(x) else None
    return dtype, memory_format, backend, _steps, float32_precision(), stream


def is_captured(x: Tensor) -> bool:
    """Whether a CUDA graph records what happens to ``x``. It would hold a kept kernel beyond the next change."""
    return _is_on_gpu(x) and torch.cuda.is_current_stream_capturing()


def _is_on_gpu(x: Tensor) -> bool:
    return x.is_cuda and torch.cuda.is_initialized()  # a fake tensor claims a GPU where there is none


def watch(block: LinearBlock, operands: Sequence[Tensor]) -> tuple[_Source, ...] | None:
    """Take down the operands as they are, before they are squeezed, or None where they are not ordinary parameters.

    Tensors that are traced, wrapped by a functional transform, sharded, parametrized, or born in inference mode tell nothing
    reliable about their changes.
    """
    sources = []
    for (path, name), tensor in zip(block.sources, operands, strict=True):
        owner = block.get_submodule(".".join(path))
        kind, home = (nn.Parameter, owner._parameters) if name in owner._parameters else (Tensor, owner._buffers)
        ordinary = type(tensor) is kind and home.get(name) is tensor and not tensor.is_inference()
        if not ordinary or _is_sharded(owner):
            return None
        sources.append(_Source(home, name, tensor, tensor._version, tensor.data_ptr()))
    _count_steps()
    return tuple(sources)


def _is_sharded(owner: nn.Module) -> bool:
    """Whether FSDP2 manages the module's parameters.

    Within a forward they are plain parameters, written uncounted and often at the address of the last forward, and
    `FSDPModule` may be any ancestor. But FSDP2 hooks the state dict of each module whose parameters it shards.
    """
    hooks = (*owner._state_dict_pre_hooks.values(), *owner._load_state_dict_post_hooks.values())
    return any(str(getattr(hook, "__module__", "")).startswith("torch.distributed.") for hook in hooks)


def _count_steps() -> None:
    global _counts_steps
    if not _counts_steps:
        _counts_steps = True
        register_optimizer_step_post_hook(_count_step)


def _count_step(_optimizer: Optimizer, _args: Any, _kwargs: Any) -> None:
    global _steps
    if not torch.compiler.is_compiling():  # a compiled step's writes are counted; a growing number would recompile it
        _steps += 1
