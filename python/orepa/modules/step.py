"""One squeeze for all blocks of a model: in each of its forwards by a hook, or over many forwards by `squeeze_once`.

A block that needs a kernel to train with asks the step that is open (`orepa.modules.orepa_conv`). The first one that asks makes
the step squeeze all blocks that it expects to ask: all that were used in one of the last forwards, each for the dtype and the
memory format that it asked for then. So nothing has to be known before the first block runs. A block that asks for something
else squeezes alone, and is served the next time.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any, NamedTuple
from weakref import ReferenceType, WeakKeyDictionary, ref

import torch
from torch import Tensor, nn

from orepa_kernels import Block
from orepa_kernels.api import squeeze_gradients, squeeze_together
from orepa_kernels.guards import is_watched

from .branch_order import SplitBlock
from .kernel_store import NotStored, StepSources, StoredKernel, in_backward, open_steps, request_key
from .orepa_conv import OREPAConv, process_count
from .reduction import BUCKET, Reducer, check_group, reducing

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


class _Member(NamedTuple):
    """A block to be squeezed with others."""

    block: OREPAConv
    split: SplitBlock | None
    operands: list[Tensor]
    sources: StepSources

    @property
    def plan(self) -> Block:
        return self.block.plan_of(self.split)


class _Made(NamedTuple):
    """What a step has squeezed for a block."""

    stored: StoredKernel
    kernel: Tensor


class _Step:
    """Kernels of the blocks of one model, for one forward."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.demands = model, _demands_of(model)
        self.used: set[OREPAConv] = set()
        self._grad = torch.is_grad_enabled()
        self._uses, self._may_split = 1, True
        self._made: dict[tuple[OREPAConv, tuple[Any, ...]], _Made] = {}
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
        groups: dict[tuple[Any, ...], list[_Member]] = {}
        with torch.set_grad_enabled(self._grad):
            for block in blocks:
                demand = self.demands.of(block)
                if demand is None:
                    continue
                member = _member(block, key[3] if block is asking else demand.split and self._may_split)
                if member is not None:
                    wanted = key[:2] if demand.memory_format is None else (demand.dtype, demand.memory_format)
                    like = member.operands[member.plan.leading]
                    groups.setdefault((*wanted, block.backend, like.device, like.dtype), []).append(member)
            for (dtype, memory_format, backend, *_), members in groups.items():
                like = members[0].operands[0]
                key = request_key(like, dtype, memory_format, backend)
                self._squeeze_group(members, None if like.dtype == torch.float64 else dtype, key)  # as autocast has it

    def _squeeze_group(self, members: Sequence[_Member], dtype: torch.dtype | None, key: tuple[Any, ...]) -> None:
        keys = [_with_split(key, member.split is not None) for member in members]
        again: list[Tensor] = []
        if in_backward():  # the second forward of a checkpoint around the whole model
            earlier = [(member.block._stored, own) for member, own in zip(members, keys, strict=True)]
            again = [stored.kernel for stored, own in earlier if stored is not None and stored.is_current(own)]
        kernels = _squeeze_members(members, dtype, key, again if len(again) == len(members) else None)
        for member, own, kernel in zip(members, keys, kernels, strict=True):
            stored = StoredKernel(kernel.detach(), own, member.sources)
            self._made[member.block, own] = _Made(stored, kernel)


def _squeeze_members(
    members: Sequence[_Member],
    dtype: torch.dtype | None,
    key: tuple[Any, ...],
    kernels: Sequence[Tensor] | None = None,
) -> list[Tensor]:
    plans, operands = [member.plan for member in members], [member.operands for member in members]
    _, memory_format, backend, *_ = key
    options: dict[str, Any] = {"dtype": dtype, "memory_format": memory_format, "backend": backend}
    return squeeze_together(plans, operands, kernels=kernels, **options)


def _with_split(key: tuple[Any, ...], split: bool) -> tuple[Any, ...]:
    return (*key[:3], split, *key[4:])


def _member(block: OREPAConv, splits: bool) -> _Member | None:
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
    return _Member(block, split, block.operands_of(sources.tensors, split), sources)


# --- in each forward ----------------------------------------------------------------------------------------------------


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
        open_steps.steps.append(_Step(model))


def end_step(model: nn.Module, _args: Any, _output: Any) -> None:
    """Close the step, after a forward of ``model`` or an exception in it."""
    steps = open_steps.steps
    if steps and steps[-1].model is model and not (torch.compiler.is_compiling() or torch._C._is_tracing()):
        step = steps.pop()
        if step.used:
            step.demands.close(step.used)


STEP_HOOKS = (begin_step, end_step)


# --- over many forwards -------------------------------------------------------------------------------------------------


@contextmanager
def squeeze_once(model: nn.Module, process_group: Any = None, micro_batches: int | None = None) -> Iterator[None]:
    """Squeeze all blocks of a model once for all forwards and backward passes within, and differentiate them once at the end.

    For gradient accumulation, which otherwise squeezes for every micro-batch::

        optimizer.zero_grad()
        with orepa.squeeze_once(model):
            for x, y in micro_batches:
                (loss_fn(model(x), y) / len(micro_batches)).backward()
        optimizer.step()

    Within, the gradients of the kernels add up; those of the blocks' parameters are there after the block. They equal those
    without `squeeze_once` to the rounding of a sum. After an exception all gradients of the model are as before; those that are
    there at the beginning are copied for that.

    Blocks that do not train use their cached kernels, as ever. Parametrized and sharded blocks, those with forward pre-hooks,
    and everything inside `torch.compile`, `torch.func` and `torch.nn.DataParallel` squeeze for every forward. A block that is
    open for a model stays so in a nested one. With a `torch.amp.GradScaler`, unscale and step after the block.

    With a ``process_group``, the mean over its processes is taken of the kernels' gradients instead of those of the parameters,
    which are several times as many. It is taken of sums in float32 at least, and has the same bits in all processes. A block
    that is used in some of them only counts with zeros in the others, as in `DistributedDataParallel`. DDP goes on to reduce
    the rest of the model, after `orepa.exclude_from_ddp`. After an exception in one process only, the others wait for it until
    their timeout and raise an error: restart them.

    Args:
        model: any module tree with `OREPAConv` in it, or DDP's wrapper of one. Parameters must not change within: step the
            optimizer after the block.
        process_group: as ``torch.distributed.group.WORLD``, which is None where there is a single process.
        micro_batches: the number of forwards of ``model`` within, if it is known. ``order="auto"`` of blocks goes by it, or
            else by 2. With a ``process_group``, the first gradients are exchanged during the backward pass of the last
            one already, and none may come after that.

    Raises:
        RuntimeError: a parameter changed within, or another thread has the blocks open. With a ``process_group``: DDP reduces
            the blocks' gradients already or has ``find_unused_parameters``, blocks are sharded (FSDP), the processes differ in
            what is frozen, in the blocks or in their first values, or the forwards are not ``micro_batches``.
    """
    step = _StepOnce(model, micro_batches or 2)
    gradients = [(p, None if p.grad is None else p.grad.clone()) for p in model.parameters()]
    step.open()
    try:
        with step.reduce(process_group, micro_batches):
            yield
            step.backward()
    except BaseException:
        for parameter, gradient in gradients:
            parameter.grad = gradient
        raise
    finally:
        step.close()


class _Leaf:
    """A kernel that gathers gradients: in float32 at least, as those of many batches are summed.

    Args:
        kernel: of ``member``.
        arrived: called with the block and the kernel whenever a backward pass has added to them.
    """

    def __init__(self, member: _Member, kernel: Tensor, arrived: Callable[[OREPAConv, Tensor], None]) -> None:
        self.member, self.kernel, self._arrived = member, kernel.requires_grad_(), arrived
        self._sum: Tensor | None = None
        self._widens = kernel.dtype in (torch.float16, torch.bfloat16)
        # A reference to itself would keep the gradients until a garbage collection.
        self.kernel.register_post_accumulate_grad_hook(partial(_accumulated, ref(self)))

    def accumulated(self) -> None:
        """Take note that a backward pass has added to the gradient."""
        kernel = self.kernel
        if self._widens:
            assert kernel.grad is not None
            gradient, kernel.grad = kernel.grad.float(), None
            self._sum = gradient if self._sum is None else self._sum.add_(gradient)
        self._arrived(self.member.block, kernel)

    @property
    def gradient(self) -> Tensor | None:
        return self._sum if self._widens else self.kernel.grad


def _accumulated(leaf: ReferenceType[_Leaf], _kernel: Tensor) -> None:
    here = leaf()
    if here is None:
        raise RuntimeError("squeeze_once: the gradient of a kernel came after the block, call backward within")
    here.accumulated()


class _Deliver(torch.autograd.Function):
    """Gives each operand its gradient, as a backward pass does: if nobody else holds a gradient, it is not copied."""

    @staticmethod
    def forward(ctx: Any, values: list[Tensor], *operands: Tensor) -> Tensor:
        ctx.values = values
        return operands[0].new_zeros(())

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, ...]:
        values = tuple(ctx.values)
        ctx.values.clear()
        return (None, *values)


class _StepOnce(_Step):
    """Kernels as leaves, for many forwards."""

    def __init__(self, model: nn.Module, uses: int) -> None:
        super().__init__(model)
        self._grad, self._uses, self._thread = True, uses, threading.get_ident()
        self._leaves: dict[OREPAConv, list[_Leaf]] = {}
        self._blocks: list[OREPAConv] = []
        self._reducer: Reducer | None = None
        self._is_nested = False

    def open(self) -> None:
        """Let the blocks ask, except those that ask another step already."""
        blocks = [module for module in self.model.modules() if isinstance(module, OREPAConv)]
        self.demands.add(self.model)
        steps = [block._once for block in blocks if block._once is not None]
        if any(isinstance(step, _StepOnce) and step._thread != self._thread for step in steps):
            raise RuntimeError("squeeze_once: another thread has blocks of this model open")
        self._blocks = [block for block in blocks if block._once is None]
        self._is_nested = bool(steps)
        for block in self._blocks:
            block._once = self

    @contextmanager
    def reduce(self, group: Any, micro_batches: int | None) -> Iterator[None]:
        """Average gradients over the processes of a group, if there are more than one."""
        if group is None:
            check_group(self._blocks)
        if group is None or torch.distributed.get_world_size(group) == 1:
            yield
            return
        if self._is_nested:
            raise RuntimeError("squeeze_once: process_group is for the outermost one")
        self._may_split = False  # the gradient of a kernel among processes has to be that of the whole
        with reducing(self.model, self._blocks, group, micro_batches, self.gradient) as self._reducer:
            try:
                yield
            finally:
                self._reducer = None

    def close(self) -> None:
        self._leaves.clear()
        for block in self._blocks:
            block._once = None
        if self.used:
            self.demands.close(self.used)

    def kernel(self, block: OREPAConv, key: tuple[Any, ...]) -> Tensor | None:
        kernel = super().kernel(block, key)
        if kernel is not None and self._reducer is not None:
            self._reducer.asked(block, kernel)
        return kernel

    def _arrived(self, block: OREPAConv, kernel: Tensor) -> None:
        """Take note that a backward pass has added to the gradient of a kernel."""
        if self._reducer is not None:
            self._reducer.arrived(block, kernel)

    def gradient(self, block: OREPAConv) -> Tensor | None:
        """Return the gradient of a block's kernel, from all that it has asked for."""
        return next((gradient for _, gradient in self._sums(block)), None)

    def _sums(self, block: OREPAConv) -> Iterator[tuple[_Member, Tensor]]:
        """Give the gradient of each kernel of a block, whole and in two parts, from all dtypes and memory formats."""
        for splits in (False, True):
            leaves = [leaf for leaf in self._leaves.get(block, ()) if (leaf.member.split is not None) == splits]
            gradients = [leaf.gradient for leaf in leaves if leaf.gradient is not None]
            if gradients:
                yield leaves[-1].member, sum(gradients[1:], gradients[0])

    def backward(self) -> None:
        """Add the gradients of the parameters, from those of the kernels."""
        for block, leaves in self._leaves.items():
            for leaf in leaves:
                if leaf.gradient is not None and not leaf.member.sources.are_current():
                    raise RuntimeError(
                        f"squeeze_once: parameters of {block} changed within; step the optimizer after the block"
                    )
        if self._reducer is None:
            sums = [pair for block in self._leaves for pair in self._sums(block)]
        else:
            sums = [(self._member(block), gradient) for block, gradient in self._reducer.average().items()]
        backends: dict[str, list[tuple[_Member, Tensor]]] = {}
        for member, gradient in sums:
            backends.setdefault(member.block.backend, []).append((member, gradient))
        operands: list[Tensor] = []
        values: list[Tensor] = []
        for backend, pairs in backends.items():
            members = [member for member, _ in pairs]
            plans, tensors = [member.plan for member in members], [member.operands for member in members]
            given = squeeze_gradients(plans, tensors, [gradient for _, gradient in pairs], backend=backend)
            for operand, value in zip(chain(*tensors), given, strict=True):
                if value is not None:
                    operands.append(operand)
                    values.append(value)
            del given  # who holds a gradient makes autograd copy it
        if operands:
            with torch.enable_grad():
                _Deliver.apply(values, *operands).backward()

    def _member(self, block: OREPAConv) -> _Member:
        leaves = self._leaves.get(block)
        member = leaves[-1].member if leaves else _member(block, splits=False)
        if member is None:
            raise RuntimeError(f"squeeze_once: {block} squeezes alone in this process, and not in others")
        return member

    def _chunks(self) -> list[list[OREPAConv]]:
        expected = self.demands.expected()
        return [[block for block in expected if block._once is self]]

    def _take(self, block: OREPAConv) -> list[OREPAConv]:
        return super()._take(block) or [block]

    def _squeeze_group(self, members: Sequence[_Member], dtype: torch.dtype | None, key: tuple[Any, ...]) -> None:
        with torch.no_grad():
            kernels = _squeeze_members(members, dtype, key)
        for member, kernel in zip(members, kernels, strict=True):
            leaf = _Leaf(member, kernel, self._arrived)
            self._leaves.setdefault(member.block, []).append(leaf)
            own = _with_split(key, member.split is not None)
            stored = StoredKernel(kernel.detach(), own, member.sources)
            self._made[member.block, own] = _Made(stored, leaf.kernel)
