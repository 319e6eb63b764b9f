"""What all fused backends share: nested blocks, autograd, and operators that torch.compile can see.

A backend computes flat blocks forward and backward on plain tensors; everything between those two raw calls and
`orepa_kernels.squeeze` is here and in `orepa_kernels.ops`. Nothing is saved for the backward pass but the operands.
"""

from __future__ import annotations

import functools
import itertools
from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from . import reference
from .autocast import no_autocast
from .backends.base import YES, Backend, Request, Shortcut, Verdict
from .guards import is_dispatched, is_plain, is_watched, signature
from .nested import Key, Program, Step, program
from .plan import Block

#: gradients of one block, in the order of its operands; None where none was asked for
Gradients = list[Tensor | None]

#: `FusedBackend.forward` of one block, for operands that look like those it was made for
ForwardAgain: TypeAlias = Callable[[Sequence[Tensor]], Tensor]

#: `FusedBackend.backward` of one block, for operands and an upstream gradient that look like those it was made for
BackwardAgain: TypeAlias = Callable[[Sequence[Tensor], Tensor], Gradients]

#: kinds of upstream gradients that a repeated call keeps a shortcut for; a training step has one
_MOST_GRADIENTS = 4


class FusedBackend(Backend):
    """A backend that computes flat blocks (see `orepa_kernels.nested`), any number of them in one call."""

    @abstractmethod
    def runs_on(self, device: torch.device) -> Verdict:
        """Whether it runs on a device."""

    def knows(self, dtype: torch.dtype) -> Verdict:
        """Whether it reads and writes tensors of a dtype."""
        if dtype in (torch.float32, torch.bfloat16, torch.float16):
            return YES
        return Verdict(False, f"{dtype} is not one of float32, bfloat16, float16")

    @abstractmethod
    def covers(self, block: Block) -> Verdict:
        """Whether it computes a block, and those nested in it."""

    def can_run(self, request: Request) -> Verdict:
        verdict = self.runs_on(request.device)
        if not verdict:
            return verdict
        if not request.plain:
            return Verdict(False, "tensor subclasses, torch.func, torch.jit and forward-mode AD need plain operations")
        for dtype in (request.dtype, request.out_dtype):
            verdict = self.knows(dtype)
            if not verdict:
                return verdict
        return self.covers(request.block)

    @abstractmethod
    def forward(
        self,
        blocks: Sequence[Block],
        tensors: Sequence[Sequence[Tensor]],
        dtype: torch.dtype,
        memory_format: torch.memory_format,
        folds: Sequence[Tensor | None],
    ) -> list[Tensor]:
        """Squeeze flat blocks into new memory. Not differentiable; called without autograd.

        Args:
            blocks: the plans; they do not depend on each other.
            tensors: per block, one per operand, all of one device. Dtypes may differ within a block: filters and results
                of earlier steps can be wider than parameters. Any strides.
            dtype: of the kernels.
            memory_format: of the kernels.
            folds: per block None, or a contiguous ``[O]`` in `compute_dtype`: a factor of each output channel's kernel.
        """

    @abstractmethod
    def backward(
        self,
        blocks: Sequence[Block],
        tensors: Sequence[Sequence[Tensor]],
        upstream: Sequence[Tensor],
        needed: Sequence[Sequence[bool]],
    ) -> list[Gradients]:
        """Gradients of `forward` without a fold, the same bits every time.

        Args:
            blocks: as for `forward`.
            tensors: as for `forward`.
            upstream: per block, the gradient of its kernel, ``[O, I/g, kh, kw]`` of any dtype and any strides.
            needed: per block and operand, whether its gradient is asked for.

        Returns:
            Per block and operand the gradient, with the shape, dtype and strides of ``torch.empty_like(operand)``.
        """

    def forward_again(
        self, block: Block, operands: Sequence[Tensor], dtype: torch.dtype, memory_format: torch.memory_format
    ) -> ForwardAgain:
        """`forward` of one flat block without a fold, for calls that will be made many times.

        What operands of one signature (`orepa_kernels.guards`) have in common may be worked out here: everything but
        their addresses. Global settings, the stream and the device that is current may differ from call to call.
        """
        return lambda own: self.forward((block,), (own,), dtype, memory_format, (None,))[0]

    def backward_again(
        self, block: Block, operands: Sequence[Tensor], upstream: Tensor, needed: Sequence[bool]
    ) -> BackwardAgain:
        """`backward` of one flat block, for calls that will be made many times; see `forward_again`."""
        return lambda own, gradient: self.backward((block,), (own,), (gradient,), (needed,))[0]

    def squeeze(
        self,
        blocks: Sequence[Block],
        tensors: Sequence[Sequence[Tensor]],
        dtype: torch.dtype,
        memory_format: torch.memory_format,
        folds: Sequence[Tensor | None],
    ) -> list[Tensor]:
        operands = [tensor for own in tensors for tensor in own] if len(tensors) > 1 else tensors[0]
        # A fold is for deployment. Where it has to be seen by autograd or the compiler, it is a product like any other.
        folded = any([fold is not None for fold in folds])
        compiling = torch.compiler.is_compiling() or is_dispatched()
        differentiable = torch.is_grad_enabled() and (_any_requires_grad(operands) or _any_requires_grad(folds))
        if not (compiling or differentiable):
            return run_forward(self, tuple(blocks), operands, dtype, memory_format, folds)
        emitted = compute_dtype(operands) if folded else dtype
        if compiling:
            texts, channels_last = [block.text for block in blocks], memory_format == torch.channels_last
            kernels = torch.ops.orepa_kernels.squeeze(list(operands), texts, self.name, emitted, channels_last)
        else:
            kernels = list(_apply(Call(self, tuple(blocks), emitted, memory_format), *operands))
        if folded:
            kernels = [reference.fold(k, f).to(dtype) for k, f in zip(kernels, folds, strict=True)]
        return kernels

    def shortcut(
        self, block: Block, operands: Sequence[Tensor], dtype: torch.dtype, memory_format: torch.memory_format
    ) -> Shortcut:
        flat = program((block,)).flat
        if flat is None:
            call = Call(self, (block,), dtype, memory_format)
            return call.differentiable if _any_requires_grad(operands) else call.forward
        again = self.forward_again(flat[0], operands, dtype, memory_format)
        if not _any_requires_grad(operands):
            return lambda own: [again(own)]
        repeated = Repeated(self, flat[0], again)
        return lambda own: [_apply_again(repeated, *own)] if torch.is_grad_enabled() else [again(own)]


class Call:
    """Blocks to be squeezed, and how.

    Args:
        backend: who computes them.
        blocks: the plans.
        dtype: of the kernels.
        memory_format: of the kernels.
    """

    def __init__(
        self, backend: FusedBackend, blocks: tuple[Block, ...], dtype: torch.dtype, memory_format: torch.memory_format
    ) -> None:
        self.backend, self.blocks = backend, blocks
        self._how = dtype, memory_format, [None] * len(blocks)

    def differentiable(self, operands: Sequence[Tensor]) -> list[Tensor]:
        """The kernels, for operands of which some require gradients."""
        return list(_apply(self, *operands)) if torch.is_grad_enabled() else self.forward(operands)

    def forward(self, operands: Sequence[Tensor]) -> list[Tensor]:
        """The kernels, without autograd."""
        return run_forward(self.backend, self.blocks, operands, *self._how)

    def backward(self, tensors: Sequence[Tensor], upstream: Sequence[Tensor], needed: Sequence[bool]) -> Gradients:
        """The gradients of the operands, without autograd."""
        return _gradients_seen(self.backend, self.blocks, tensors, upstream, needed)


class Repeated:
    """One flat block that is squeezed again and again, from operands of one signature.

    Args:
        backend: who computes it.
        block: the plan.
        forward: its kernel, without autograd.
    """

    def __init__(self, backend: FusedBackend, block: Block, forward: ForwardAgain) -> None:
        self.backend, self.blocks, self.forward = backend, (block,), forward
        self._seen: list[tuple[Callable[..., bool], BackwardAgain]] = []

    def backward(self, tensors: Sequence[Tensor], upstream: Sequence[Tensor], needed: Sequence[bool]) -> Gradients:
        """The gradients of the operands that require one, as ``needed`` says; without autograd."""
        # Saved tensors need not look as they did (hooks may bring them back with other strides), and gradients come in
        # many shapes: expanded, of subclasses, inside a ``vmap``.
        (gradient,) = upstream
        for matches, again in self._seen:
            if matches(*tensors, gradient) and not is_watched():
                return again(tensors, gradient)
        found = _gradients_seen(self.backend, self.blocks, tensors, upstream, needed)
        if len(self._seen) < _MOST_GRADIENTS and is_plain((*tensors, gradient)) and not is_watched():
            again = self.backend.backward_again(self.blocks[0], tensors, gradient, needed)
            self._seen.append((signature((*tensors, gradient)), again))
        return found


class _Squeeze(torch.autograd.Function):
    """The eager path, for half the price of a registered operator: a small kernel takes no longer than its call."""

    # In the older style, without `setup_context`: that one inspects the signature at every call, for 30 microseconds.
    @staticmethod
    def forward(ctx: Any, call: Call, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.call = call
        ctx.save_for_backward(*tensors)
        return tuple(call.forward(tensors))

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Any, ...]:
        call, tensors, needed = ctx.call, ctx.saved_tensors, ctx.needs_input_grad[1:]
        if torch.is_grad_enabled():  # create_graph=True
            return (None, *differentiable_gradients(call.blocks, tensors, upstream, needed))
        return (None, *call.backward(tensors, upstream, needed))


class _SqueezeAgain(_Squeeze):
    """The same for calls that were made before, of one kernel."""

    @staticmethod
    def forward(ctx: Any, call: Repeated, *tensors: Tensor) -> Tensor:  # type: ignore[override]
        ctx.call = call
        ctx.save_for_backward(*tensors)
        return call.forward(tensors)


# `_Squeeze.apply` without its Python half, which does nothing here for 3.5 microseconds: it looks after ``torch.func``
# transforms, and tensors inside one are not plain (see `orepa_kernels.backends.base.Request`).
_apply: Callable[..., tuple[Tensor, ...]] = super(torch.autograd.Function, _Squeeze).apply
_apply_again: Callable[..., Tensor] = super(torch.autograd.Function, _SqueezeAgain).apply


def maker(
    shape: Sequence[int],
    dtype: torch.dtype,
    device: torch.device,
    memory_format: torch.memory_format = torch.contiguous_format,
) -> Callable[[], Tensor]:
    """Makes new tensors, uninitialised, one after the other, in half the time that `torch.empty` takes to find out how."""
    strides = torch.empty(shape, device="meta", memory_format=memory_format).stride()
    return functools.partial(torch.empty_strided, tuple(shape), strides, dtype=dtype, device=device)


def _any_requires_grad(tensors: Sequence[Tensor | None]) -> bool:
    return any(tensor is not None and tensor.requires_grad for tensor in tensors)


def _gradients_seen(
    backend: FusedBackend,
    blocks: tuple[Block, ...],
    tensors: Sequence[Tensor],
    upstream: Sequence[Tensor],
    needed: Sequence[bool],
) -> Gradients:
    """`run_backward`, or the reference's where raw memory may not be read or somebody has to see the operations.

    Gradients can come from inside a ``vmap`` (``is_grads_batched=True``) though the operands do not.
    """
    if is_plain((*tensors, *upstream)) and not is_dispatched():
        return run_backward(backend, blocks, tensors, upstream, needed)
    with torch.enable_grad():
        leaves = [tensor.detach().requires_grad_(need) for tensor, need in zip(tensors, needed, strict=True)]
        return differentiable_gradients(blocks, leaves, upstream, needed, create_graph=False)


def differentiable_gradients(
    blocks: tuple[Block, ...],
    tensors: Sequence[Tensor],
    upstream: Sequence[Tensor],
    needed: Sequence[bool],
    create_graph: bool = True,
) -> Gradients:
    """Gradients through the reference, which can be differentiated again: double backward is rare."""
    kernels = []
    with no_autocast(tensors[0].device.type):
        for block, operands in zip(blocks, _cut(blocks, tensors), strict=True):
            compute = compute_dtype(operands)
            values = {op.name: t.to(compute) for op, t in zip(block.operands, operands, strict=True)}
            kernels.append(reference.squeeze_block(block, values))
        wanted = [tensor for tensor, need in zip(tensors, needed, strict=True) if need]
        outputs = [gradient.to(kernel.dtype) for kernel, gradient in zip(kernels, upstream, strict=True)]
        found = iter(torch.autograd.grad(kernels, wanted, outputs, create_graph=create_graph, allow_unused=True))
    return [next(found) if need else None for need in needed]


def compute_dtype(tensors: Sequence[Tensor]) -> torch.dtype:
    """What a block is composed in: float32 at least, because roundings of every product of a sequence would add up."""
    return torch.float64 if torch.float64 in {tensor.dtype for tensor in tensors} else torch.float32


def _cut(blocks: Sequence[Block], values: Sequence[Any]) -> list[Sequence[Any]]:
    """A flat list cut into the parts of each block."""
    if len(blocks) == 1:
        return [values]
    ends = [0]
    for block in blocks:
        ends.append(ends[-1] + len(block.operands))
    return [values[begin:end] for begin, end in itertools.pairwise(ends)]


# --- programs: one raw call per level of nesting ------------------------------------------------------------------------


def run_forward(
    backend: FusedBackend,
    blocks: tuple[Block, ...],
    tensors: Sequence[Tensor],
    dtype: torch.dtype,
    memory_format: torch.memory_format,
    folds: Sequence[Tensor | None],
) -> list[Tensor]:
    """The kernels of blocks, nested or not; ``tensors`` are the operands of all of them."""
    plan = program(blocks)
    if any([fold is not None for fold in folds]):
        dtypes = (compute_dtype(operands) for operands in _cut(blocks, tensors))
        folds = [f if f is None else f.to(d).contiguous() for f, d in zip(folds, dtypes, strict=True)]
    if plan.flat is not None:
        return backend.forward(plan.flat, _cut(plan.flat, tensors), dtype, memory_format, folds)
    return _launch(backend, plan.last, _inner_kernels(backend, plan, tensors), dtype, memory_format, folds)


def run_backward(
    backend: FusedBackend,
    blocks: tuple[Block, ...],
    tensors: Sequence[Tensor],
    upstream: Sequence[Tensor],
    needed: Sequence[bool],
) -> Gradients:
    """Gradients of `run_forward`. The kernels of nested blocks are computed again, not saved."""
    plan = program(blocks)
    if plan.flat is not None:
        flat = plan.flat
        found = backend.backward(flat, _cut(flat, tensors), upstream, _cut(flat, needed))
        return [gradient for gradients in found for gradient in gradients]

    values = _inner_kernels(backend, plan, tensors)
    wanted = {key for key, need in zip(plan.inputs, needed, strict=True) if need}
    for level in plan.inner:
        wanted |= {step.output for step in level if not wanted.isdisjoint(step.inputs)}
    sums: dict[Key, Tensor] = dict(zip((step.output for step in plan.last), upstream, strict=True))
    for level in (plan.last, *reversed(plan.inner)):
        steps = [step for step in level if step.output in sums]
        found = backend.backward(
            [step.block for step in steps],
            [[values[key] for key in step.inputs] for step in steps],
            [sums[step.output] for step in steps],
            [[key in wanted for key in step.inputs] for step in steps],
        )
        for step, gradients in zip(steps, found, strict=True):
            for key, gradient in zip(step.inputs, gradients, strict=True):
                if gradient is not None:
                    sums[key] = sums[key] + gradient if key in sums else gradient
    return [sums.get(key) if need else None for key, need in zip(plan.inputs, needed, strict=True)]


def _inner_kernels(backend: FusedBackend, plan: Program, tensors: Sequence[Tensor]) -> dict[Key, Tensor]:
    """All values that the last steps read: operands, and kernels of nested blocks in the precision of composing."""
    values: dict[Key, Tensor] = dict(zip(plan.inputs, tensors, strict=True))
    dtype, device = compute_dtype(tensors), tensors[0].device
    like = {"": torch.empty(0, dtype=dtype, device=device)}  # a constant has no operand that would tell
    for step in plan.constants:
        values[step.output] = reference.squeeze_block(step.block, like)
    for level in plan.inner:
        kernels = _launch(backend, level, values, dtype, torch.channels_last, [None] * len(level))
        values.update(zip((step.output for step in level), kernels, strict=True))
    return values


def _launch(
    backend: FusedBackend,
    steps: Sequence[Step],
    values: dict[Key, Tensor],
    dtype: torch.dtype,
    memory_format: torch.memory_format,
    folds: Sequence[Tensor | None],
) -> list[Tensor]:
    operands = [[values[key] for key in step.inputs] for step in steps]
    return backend.forward([step.block for step in steps], operands, dtype, memory_format, folds)
