"""Autograd around what a backend prepared. Nothing is saved for the backward pass but the operands."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .backends.base import Backend, Gradients, Prepared, Signature
from .backends.reference import differentiable_gradients, gradients
from .guards import is_dispatched, is_plain, is_watched, layout_guard
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
        self._backward: list[tuple[Callable[..., bool], Prepared]] = []

    def __call__(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return the kernels."""
        if self._recorded and torch.is_grad_enabled():
            kernels = _apply(self, *tensors)
            return [kernels] if self.alone else list(kernels)
        return self.prepared.forward(tensors)

    def backward(self, tensors: Sequence[Tensor], upstream: Sequence[Tensor], needed: Sequence[bool]) -> Gradients:
        """Return the gradients of the operands that require one, as ``needed`` says; without autograd."""
        # Saved tensors need not look as they did (hooks may bring them back with other strides), and gradients come in
        # many layouts: expanded, of subclasses, inside a ``vmap``.
        for matches, prepared in self._backward:
            if matches(*tensors, *upstream) and not is_watched():
                return prepared.backward(tensors, upstream, needed)
        both = (*tensors, *upstream)
        if not is_plain(both) or is_dispatched():
            return gradients(self.blocks, tensors, upstream, needed)
        signature = Signature.of(tensors, self.signature.dtype, self.signature.memory_format)
        prepared = self.prepared
        if signature != self.signature:
            prepared = prepare(self.backend, self.blocks, signature)
        if len(self._backward) < _MOST_UPSTREAM_LAYOUTS and not is_watched():
            self._backward.append((layout_guard(both), prepared))
        return prepared.backward(tensors, upstream, needed)


class _Squeeze(torch.autograd.Function):
    """The eager path, for half the price of a registered operator: a small kernel takes no longer than its call."""

    # In the older style, without `setup_context`: that one inspects the signature at every call, for 30 microseconds.
    @staticmethod
    def forward(ctx: Any, call: Call, *tensors: Tensor) -> Tensor | tuple[Tensor, ...]:
        ctx.call = call
        ctx.save_for_backward(*tensors)
        kernels = call.prepared.forward(tensors)
        return kernels[0] if call.alone else tuple(kernels)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Any, ...]:
        call, tensors, needed = ctx.call, ctx.saved_tensors, ctx.needs_input_grad[1:]
        if torch.is_grad_enabled():  # create_graph=True
            return (None, *differentiable_gradients(call.blocks, tensors, upstream, needed))
        return (None, *call.backward(tensors, upstream, needed))


# `_Squeeze.apply` without its Python half, which does nothing here for 3.5 microseconds: it looks after ``torch.func``
# transforms, and tensors inside one are not plain (see `orepa_kernels.guards.is_plain`).
_apply: Callable[..., Any] = super(torch.autograd.Function, _Squeeze).apply
