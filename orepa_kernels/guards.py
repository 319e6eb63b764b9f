"""Whether tensors look as they did: a call that has been seen before may skip its questions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

_TensorGuards: Any = None
try:  # what torch.compile asks before it reuses code: all tensors in one call, in a microsecond
    from torch._C._dynamo import guards as _guards

    _TensorGuards = _guards.TensorGuards
except (ImportError, AttributeError):
    pass


# Asked before every call, so each is looked up once.
_transforms, _tracing = torch._C._functorch.peek_interpreter_stack, torch._C._is_tracing
_modes = torch._C._len_torch_dispatch_stack

_ORDINARY = frozenset((Tensor, torch.nn.Parameter, torch.nn.Buffer))


def is_plain(tensors: Sequence[Tensor]) -> bool:
    """Whether raw memory may be read.

    Not of tensor subclasses, of tensors that stand for others (a batch of them, or a negative), inside ``torch.func``
    transforms or ``torch.jit.trace``, nor where derivatives go forward: all of these have to see what is computed.
    """
    return (
        _transforms() is None
        and not _tracing()
        and forward_ad._current_level < 0
        and _ORDINARY.issuperset(map(type, tensors))
        and all(map(torch._C._has_storage, tensors))
        and not any(map(Tensor.is_neg, tensors))
    )


def is_dispatched() -> bool:
    """Whether a ``TorchDispatchMode`` is active, such as a counter of operations or a tracer: it has to see an operator."""
    return _modes() > 0


def is_watched() -> bool:
    """Whether raw memory may not be read unseen though tensors do not tell: `is_dispatched`, or derivatives go forward."""
    return _modes() > 0 or forward_ad._current_level >= 0


def signature(tensors: Sequence[Tensor]) -> Callable[..., bool]:
    """A predicate ``matches(*tensors)`` of ordinary tensors, outside of ``torch.func`` transforms.

    It holds for as many tensors of the same types, dtypes, devices, shapes and strides, of which the same require gradients,
    and never inside a transform or under ``torch.jit.trace``, if it was made outside. It may fail for tensors that look the
    same (under autocast, say), and does not answer `is_watched`.
    """
    if _TensorGuards is not None:
        shapes, strides = [list(tensor.shape) for tensor in tensors], [list(tensor.stride()) for tensor in tensors]
        try:
            matches: Callable[..., bool] = _TensorGuards(
                *tensors, dynamic_dims_sizes=shapes, dynamic_dims_strides=strides
            ).check
        except (TypeError, SystemError):  # a later torch, to which one says it differently
            return in_python(tensors)
        return matches
    return in_python(tensors)


def in_python(tensors: Sequence[Tensor]) -> Callable[..., bool]:
    """`signature` by public means."""
    looks = [_look(tensor) for tensor in tensors]

    def matches(*others: Tensor) -> bool:
        outside = _transforms() is None and not _tracing()
        return outside and len(others) == len(looks) and [_look(tensor) for tensor in others] == looks

    return matches


def _look(tensor: Tensor) -> tuple[Any, ...]:
    how = tensor.requires_grad, tensor.is_neg()
    return (type(tensor), tensor.dtype, tensor.device, tensor.shape, tensor.stride(), *how)
