"""Autograd around what a backend prepared. The backward pass needs nothing but the operands.

A node refers to its operands instead of saving them: they are mostly parameters, which live anyway. So hooks on saved tensors
(activation checkpointing, offloading) do not see them, and a backward pass does not free them: where parts of a model have
graphs of their own but share one squeeze, each may be differentiated without ``retain_graph``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .backends.base import Backend, Gradients, Prepared, Signature, split
from .backends.reference import differentiable_gradients, gradients
from .guards import is_dispatched, is_plain, is_watched, layout_guard, versions
from .nested import prepare
from .plan import Block

#: layouts of upstream gradients that a call recognises; a training step has one
_MOST_UPSTREAM_LAYOUTS = 4


class Call:
    """Squeezes blocks whose operands have one layout, any number of times, differentiably.

    Args:
        backend: that computes them all.
        blocks: the plans.
        tensors: operands of all blocks, one after the other; only their layouts matter.
        dtype: of the kernels.
        memory_format: of the kernels.
    """

    __slots__ = ("_backward", "_recorded", "alone", "backend", "blocks", "prepared", "signature")

    def __init__(
        self,
        backend: Backend,
        blocks: Sequence[Block],
        tensors: Sequence[Tensor],
        dtype: torch.dtype,
        memory_format: torch.memory_format,
    ) -> None:
        self.backend, self.blocks, self.alone = backend, tuple(blocks), len(blocks) == 1
        self.signature = Signature.of(tensors, dtype, memory_format)
        self.prepared = prepare(backend, self.blocks, self.signature)
        self._recorded = not backend.traceable and any([tensor.requires_grad for tensor in tensors])
        self._backward: list[tuple[Callable[..., bool], list[bool] | None, Prepared]] = []

    def __call__(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return the kernels."""
        if self._recorded and torch.is_grad_enabled():
            return self.record(tensors)
        return self.prepared.forward(tensors)

    def record(self, tensors: Sequence[Tensor], kernels: Sequence[Tensor] | None = None) -> list[Tensor]:
        """Return the kernels as the results of one node; given ones are those of an earlier call, to be differentiated anew."""
        recorded = _apply(self, kernels, *tensors)
        return [recorded] if self.alone else list(recorded)

    def backward(
        self, tensors: Sequence[Tensor], upstream: Sequence[Tensor | None], needed: Sequence[bool]
    ) -> Gradients:
        """Return the gradients of the operands that require one, as ``needed`` says; without autograd.

        A kernel without a gradient (None) was not used, so its operands get none.
        """
        given = [gradient for gradient in upstream if gradient is not None]
        if not given:
            return [None] * len(tensors)
        absent = None
        if len(given) < len(upstream):
            absent = [gradient is None for gradient in upstream]
            by_block = zip(split(self.blocks, needed), absent, strict=True)
            needed = [need and not unused for needs, unused in by_block for need in needs]
        # Operands need not look as they did, and gradients come in many layouts: expanded, of subclasses, inside a ``vmap``.
        for matches, pattern, prepared in self._backward:
            if pattern == absent and matches(*tensors, *given) and not is_watched():
                return prepared.backward(tensors, upstream, needed)
        both = (*tensors, *given)
        if not is_plain(both) or is_dispatched():
            return gradients(self.blocks, tensors, upstream, needed)
        signature = Signature.of(tensors, self.signature.dtype, self.signature.memory_format)
        prepared = self.prepared
        if signature != self.signature:
            prepared = prepare(self.backend, self.blocks, signature)
        if len(self._backward) < _MOST_UPSTREAM_LAYOUTS and not is_watched():
            self._backward.append((layout_guard(both), absent, prepared))
        return prepared.backward(tensors, upstream, needed)


class _Squeeze(torch.autograd.Function):
    """The eager path, for half the price of a registered operator: a small kernel takes no longer than its call."""

    # In the older style, without `setup_context`: that one inspects the signature at every call, for 30 microseconds.
    @staticmethod
    def forward(
        ctx: Any, call: Call, kernels: Sequence[Tensor] | None, *tensors: Tensor
    ) -> Tensor | tuple[Tensor, ...]:
        ctx.call, ctx.tensors, ctx.versions = call, tensors, versions(tensors)
        ctx.set_materialize_grads(False)
        made = call.prepared.forward(tensors) if kernels is None else [kernel.detach() for kernel in kernels]
        return made[0] if call.alone else tuple(made)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Any, ...]:
        call, tensors, needed = ctx.call, ctx.tensors, ctx.needs_input_grad[2:]
        check_versions(call.blocks, tensors, ctx.versions)
        if torch.is_grad_enabled():  # create_graph=True
            return (None, None, *differentiable_gradients(call.blocks, tensors, upstream, needed))
        return (None, None, *call.backward(tensors, upstream, needed))


# `_Squeeze.apply` without its Python half, which does nothing here for 3.5 microseconds: it looks after ``torch.func``
# transforms, and tensors inside one are not plain (see `orepa_kernels.guards.is_plain`).
_apply: Callable[..., Any] = super(torch.autograd.Function, _Squeeze).apply


def check_versions(blocks: Sequence[Block], tensors: Sequence[Tensor], expected: Sequence[int]) -> None:
    """Raise RuntimeError where an operand has been written to since `versions` were taken, as autograd does."""
    if versions(tensors) == expected:
        return
    names = [operand.name for block in blocks for operand in block.operands]
    changed = [n for n, new, old in zip(names, versions(tensors), expected, strict=True) if new != old]
    raise RuntimeError(
        "one of the variables needed for gradient computation has been modified by an inplace operation: operand "
        f"{changed[0]!r} of a squeeze, between the squeeze and its backward pass"
    )
