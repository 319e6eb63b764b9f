"""Whether tensors look as they did: a call that has been seen before may skip its questions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

_TensorGuards: Any = None
try:  # what torch.compile asks before it reuses code: all tensors in one call, in a microsecond
    from torch._C._dynamo import guards as _guards

    _TensorGuards = _guards.TensorGuards
except (ImportError, AttributeError):
    pass


_ORDINARY = frozenset((Tensor, torch.nn.Parameter, torch.nn.Buffer))


def is_plain(tensors: Sequence[Tensor]) -> bool:
    """Whether raw memory may be read: not of tensor subclasses, nor inside ``torch.func`` transforms."""
    return torch._C._functorch.peek_interpreter_stack() is None and _ORDINARY.issuperset(map(type, tensors))


def signature(tensors: Sequence[Tensor]) -> Callable[..., bool]:
    """A predicate ``matches(*tensors)`` of ordinary tensors, outside of ``torch.func`` transforms.

    It holds for as many tensors of the same types, dtypes, devices, shapes and strides, of which the same require gradients,
    and never inside a transform. It may fail for tensors that look the same (under autocast, say).
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
        outside = torch._C._functorch.peek_interpreter_stack() is None
        return outside and len(others) == len(looks) and [_look(tensor) for tensor in others] == looks

    return matches


def _look(tensor: Tensor) -> tuple[Any, ...]:
    return (type(tensor), tensor.dtype, tensor.device, tensor.shape, tensor.stride(), tensor.requires_grad)
