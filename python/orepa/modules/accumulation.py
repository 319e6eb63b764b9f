"""One squeeze for all blocks of a model over many of its forwards: `squeeze_once`."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import chain
from typing import Any
from weakref import ReferenceType, ref

import torch
from torch import Tensor, nn

from orepa_kernels.api import squeeze_gradients

from .kernel_store import StoredKernel
from .orepa_conv import OREPAConv
from .reduction import Reducer, check_group, reducing
from .step import ForwardStep, Made, Member, member_of, squeeze_members, with_split


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
    step = _AccumulatingStep(model, micro_batches or 2)
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

    def __init__(self, member: Member, kernel: Tensor, arrived: Callable[[OREPAConv, Tensor], None]) -> None:
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


class _AccumulatingStep(ForwardStep):
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
        if any(isinstance(step, _AccumulatingStep) and step._thread != self._thread for step in steps):
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

    def _sums(self, block: OREPAConv) -> Iterator[tuple[Member, Tensor]]:
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
        backends: dict[str, list[tuple[Member, Tensor]]] = {}
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

    def _member(self, block: OREPAConv) -> Member:
        leaves = self._leaves.get(block)
        member = leaves[-1].member if leaves else member_of(block, splits=False)
        if member is None:
            raise RuntimeError(f"squeeze_once: {block} squeezes alone in this process, and not in others")
        return member

    def _chunks(self) -> list[list[OREPAConv]]:
        expected = self.demands.expected()
        return [[block for block in expected if block._once is self]]

    def _take(self, block: OREPAConv) -> list[OREPAConv]:
        return super()._take(block) or [block]

    def _squeeze_group(self, members: Sequence[Member], dtype: torch.dtype | None, key: tuple[Any, ...]) -> None:
        with torch.no_grad():
            kernels = squeeze_members(members, dtype, key)
        for member, kernel in zip(members, kernels, strict=True):
            leaf = _Leaf(member, kernel, self._arrived)
            self._leaves.setdefault(member.block, []).append(leaf)
            own = with_split(key, member.split is not None)
            stored = StoredKernel(kernel.detach(), own, member.sources)
            self._made[member.block, own] = Made(stored, leaf.kernel)
