"""One squeeze for all blocks of a model in each of its forwards, by a hook that `orepa.prepare` installs.

A block that needs a kernel to train with asks the step that is open (`orepa.modules.orepa_conv`). The first one that asks makes
the step squeeze all blocks that it expects to ask: all that were used in one of the last forwards, each for the dtype and the
memory format that it asked for then. So nothing has to be known before the first block runs. A block that asks for something
else squeezes alone, and is served the next time.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from orepa_kernels import Block
from orepa_kernels.api import squeeze_together
from orepa_kernels.guards import is_watched

from .branch_order import SplitBlock
from .kernel_store import NotStored, StepSources, StoredKernel, in_backward, open_steps, request_key
from .orepa_conv import OREPAConv, process_count
from .reduction import BUCKET

#: forwards without a block until it is no longer squeezed for the next one
_PATIENCE = 8


@dataclass
class _Demand:
    """What a block asked for last, None before it has asked, and the steps since."""

    dtype: torch.dtype | None = None
    memory_format: torch.memory_format | None = None
    split: bool = False
    idle: int = 0


class _Demands:
    """The blocks of one model with their demands."""

    def __init__(self, model: nn.Module) -> None:
        self._of: WeakKeyDictionary[OREPAConv, _Demand] = WeakKeyDictionary()
        self.add(model)

    def add(self, model: nn.Module) -> None:
        """Add the blocks of a model that are new."""
        for module in model.modules():
            if isinstance(module, OREPAConv):
                self._of.setdefault(module, _Demand(split=module.order == "branch"))

    def of(self, block: OREPAConv) -> _Demand | None:
        return self._of.get(block)

    def expected(self) -> list[OREPAConv]:
        """Return the blocks that are likely to ask in the next forward. What was a block may be a plain convolution now."""
        demands = list(self._of.items())
        return [block for block, demand in demands if demand.idle < _PATIENCE and isinstance(block, OREPAConv)]

    def close(self, used: Collection[OREPAConv]) -> None:
        """End a step, in which some blocks were used."""
        for block, demand in list(self._of.items()):
            demand.idle = 0 if block in used else demand.idle + 1


_demands: WeakKeyDictionary[nn.Module, _Demands] = WeakKeyDictionary()
_lock = threading.Lock()


def _demands_of(model: nn.Module) -> _Demands:
    with _lock:
        demands = _demands.get(model)
        if demands is None:
            demands = _demands[model] = _Demands(model)
        return demands


class Member(NamedTuple):
    """A block to be squeezed with others."""

    block: OREPAConv
    split: SplitBlock | None
    operands: list[Tensor]
    sources: StepSources

    @property
    def plan(self) -> Block:
        return self.block.plan_of(self.split)


class Made(NamedTuple):
    """What a step has squeezed for a block."""

    stored: StoredKernel
    kernel: Tensor


class ForwardStep:
    """Kernels of the blocks of one model, for one forward."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.demands = model, _demands_of(model)
        self.used: set[OREPAConv] = set()
        self._grad = torch.is_grad_enabled()
        self._uses, self._may_split = 1, True
        self._made: dict[tuple[OREPAConv, tuple[Any, ...]], Made] = {}
        self._waiting: dict[OREPAConv, list[OREPAConv]] | None = None  # by block, those to be squeezed with it

    def kernel(self, block: OREPAConv, key: tuple[Any, ...]) -> Tensor | None:
        """Return the kernel of a block for a key (of `request_key`), or None where the block has to squeeze alone."""
        demand = self.demands.of(block)
        if demand is None or is_watched():
            return None
        demand.dtype, demand.memory_format, *_ = key
        self.used.add(block)
        made = self._made.get((block, key))
        if made is None:
            self._squeeze(self._take(block), block, key)
            made = self._made.get((block, key))
        if made is None or not made.stored.sources.are_current():
            return None
        vars(block)["_stored"] = made.stored  # a tenth of the price of setting an attribute of a module
        return made.kernel

    def splits(self, block: OREPAConv, x: Tensor) -> bool:
        """Return whether a branch of a block runs on feature maps, for an input.

        The input alone decides, so that a run that is resumed has the same bits. What is squeezed before the inputs are known
        goes by those of the last step; where they differ, the block squeezes alone.
        """
        demand = self.demands.of(block)
        wanted = self._may_split and block.prefers_branch(x, self._uses)
        if demand is not None:
            demand.split = wanted
        return wanted

    def _take(self, block: OREPAConv) -> list[OREPAConv]:
        """Return what has to be squeezed when a block asks that has no kernel."""
        if self._waiting is None:
            self._waiting = {member: chunk for chunk in self._chunks() for member in chunk}
        chunk = self._waiting.get(block, [])
        for member in chunk:
            del self._waiting[member]
        return chunk

    def _chunks(self) -> list[list[OREPAConv]]:
        """Return the blocks that are expected to ask, in parts that are squeezed at once.

        `DistributedDataParallel` reduces the first gradients while the backward pass goes on: a part is one of its buckets.
        """
        blocks = self.demands.expected()
        if process_count() == 1:
            return [blocks]
        chunks: list[list[OREPAConv]] = []
        room = 0
        for block in blocks:
            size = sum(parameter.nbytes for parameter in block.parameters())
            if room < size:
                chunks.append([])
                room = BUCKET
            chunks[-1].append(block)
            room -= size
        return chunks

    def _squeeze(self, blocks: Sequence[OREPAConv], asking: OREPAConv, key: tuple[Any, ...]) -> None:
        """Squeeze blocks: each for what it asked for last, or, if it has not, for the given key, which one is asking for."""
        groups: dict[tuple[Any, ...], list[Member]] = {}
        with torch.set_grad_enabled(self._grad):
            for block in blocks:
                demand = self.demands.of(block)
                if demand is None:
                    continue
                member = member_of(block, key[3] if block is asking else demand.split and self._may_split)
                if member is not None:
                    wanted = key[:2] if demand.memory_format is None else (demand.dtype, demand.memory_format)
                    like = member.operands[member.plan.leading]
                    groups.setdefault((*wanted, block.backend, like.device, like.dtype), []).append(member)
            for (dtype, memory_format, backend, *_), members in groups.items():
                like = members[0].operands[0]
                key = request_key(like, dtype, memory_format, backend)
                self._squeeze_group(members, None if like.dtype == torch.float64 else dtype, key)  # as autocast has it

    def _squeeze_group(self, members: Sequence[Member], dtype: torch.dtype | None, key: tuple[Any, ...]) -> None:
        keys = [with_split(key, member.split is not None) for member in members]
        again: list[Tensor] = []
        if in_backward():  # the second forward of a checkpoint around the whole model
            earlier = [(member.block._stored, own) for member, own in zip(members, keys, strict=True)]
            again = [stored.kernel for stored, own in earlier if stored is not None and stored.is_current(own)]
        kernels = squeeze_members(members, dtype, key, again if len(again) == len(members) else None)
        for member, own, kernel in zip(members, keys, kernels, strict=True):
            stored = StoredKernel(kernel.detach(), own, member.sources)
            self._made[member.block, own] = Made(stored, kernel)


def squeeze_members(
    members: Sequence[Member],
    dtype: torch.dtype | None,
    key: tuple[Any, ...],
    kernels: Sequence[Tensor] | None = None,
) -> list[Tensor]:
    """Squeeze members of one key (of `request_key`) as one node, with ``kernels`` where they are known already."""
    plans, operands = [member.plan for member in members], [member.operands for member in members]
    _, memory_format, backend, *_ = key
    options: dict[str, Any] = {"dtype": dtype, "memory_format": memory_format, "backend": backend}
    return squeeze_together(plans, operands, kernels=kernels, **options)


def with_split(key: tuple[Any, ...], split: bool) -> tuple[Any, ...]:
    """Return a key (of `request_key`) for a block in two parts or one."""
    return (*key[:3], split, *key[4:])


def member_of(block: OREPAConv, splits: bool) -> Member | None:
    """Return a block with its operands, in two parts where it ``splits``, or None where it has to squeeze alone.

    That is where it is frozen, where a write to it could go unseen, and where a hook of its own may change it before it runs.
    """
    if block._forward_pre_hooks:
        return None
    try:
        sources = StepSources(block)
    except NotStored:
        return None
    if not any([tensor.requires_grad for tensor in sources.tensors]):
        return None
    split = block._split if splits else None
    return Member(block, split, block.operands_of(sources.tensors, split), sources)


# --- the hooks ----------------------------------------------------------------------------------------------------------


def squeeze_together_in(model: nn.Module) -> None:
    """Make every forward of a model squeeze all of its blocks at once, as one node of autograd.

    The hooks are plain functions, so that copies of the model, pickled ones too, have them as well.
    """
    squeeze_alone_in(model)
    model.register_forward_pre_hook(begin_step)
    model.register_forward_hook(end_step, always_call=True)


def squeeze_alone_in(model: nn.Module) -> None:
    """Undo `squeeze_together_in`, for a model and its parts."""
    for module in model.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for number in [number for number, hook in hooks.items() if hook in STEP_HOOKS]:
                del hooks[number]
                module._forward_hooks_always_called.pop(number, None)


def begin_step(model: nn.Module, _args: Any) -> None:
    """Open a step, before a forward of ``model``."""
    if not (torch.compiler.is_compiling() or torch._C._is_tracing()):
        while any(step.model is model for step in open_steps.steps):  # it called itself, or was interrupted
            open_steps.steps.pop()
        open_steps.steps.append(ForwardStep(model))


def end_step(model: nn.Module, _args: Any, _output: Any) -> None:
    """Close the step, after a forward of ``model`` or an exception in it."""
    steps = open_steps.steps
    if steps and steps[-1].model is model and not (torch.compiler.is_compiling() or torch._C._is_tracing()):
        step = steps.pop()
        if step.used:
            step.demands.close(step.used)


STEP_HOOKS = (begin_step, end_step)
