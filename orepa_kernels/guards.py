"""What a call has to ask before it may run prepared work: tensors, tracers and modes, autocast, precision."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

_TensorGuards: Any = None
try:  # torch.compile's own check before it reuses code: all tensors in one call, in a microsecond
    from torch._C._dynamo import guards as _guards

    _TensorGuards = _guards.TensorGuards
except (ImportError, AttributeError):
    pass

# Looked up once, because every call asks.
_transforms, _tracing = torch._C._functorch.peek_interpreter_stack, torch._C._is_tracing
_modes = torch._C._len_torch_dispatch_stack

_ORDINARY = frozenset((Tensor, torch.nn.Parameter, torch.nn.Buffer))

# --- raw memory ---------------------------------------------------------------------------------------------------------


def is_plain(tensors: Sequence[Tensor]) -> bool:
    """Return whether raw memory may be read.

    Not of tensor subclasses, of tensors that stand for others (a batch of them, or a negative), inside ``torch.func``
    transforms or ``torch.jit.trace``, nor under forward-mode AD: all of these have to see the operations.
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
    """Return whether a ``TorchDispatchMode`` is active, such as a FLOP counter or a tracer: it has to see an operator."""
    return _modes() > 0


def is_watched() -> bool:
    """Return whether the operations have to be seen though no tensor tells: `is_dispatched`, or forward-mode AD."""
    return _modes() > 0 or forward_ad._current_level >= 0


def versions(tensors: Sequence[Tensor]) -> list[int]:
    """Return the number of writes to each tensor, as far as autograd counts them; 0 for those of inference mode."""
    try:
        return [tensor._version for tensor in tensors]
    except RuntimeError:
        return [0 if tensor.is_inference() else tensor._version for tensor in tensors]


# --- layouts ------------------------------------------------------------------------------------------------------------


def layout_guard(tensors: Sequence[Tensor]) -> Callable[..., bool]:
    """Return a predicate ``matches(*tensors)``, made from ordinary tensors outside of ``torch.func`` transforms.

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
            return layout_guard_in_python(tensors)
        return matches
    return layout_guard_in_python(tensors)


def layout_guard_in_python(tensors: Sequence[Tensor]) -> Callable[..., bool]:
    """Return `layout_guard` by public means."""
    expected = [_traits(tensor) for tensor in tensors]

    def matches(*others: Tensor) -> bool:
        outside = _transforms() is None and not _tracing()
        return outside and len(others) == len(expected) and [_traits(tensor) for tensor in others] == expected

    return matches


def _traits(tensor: Tensor) -> tuple[Any, ...]:
    flags = tensor.requires_grad, tensor.is_neg()
    return (type(tensor), tensor.dtype, tensor.device, tensor.shape, tensor.stride(), *flags)


# --- autocast and precision ---------------------------------------------------------------------------------------------

# Asked once, at import: torch.compile cannot trace the question.
_AUTOCAST_DEVICES = frozenset(d for d in ("cpu", "cuda", "mps", "xpu", "hpu") if torch.amp.is_autocast_available(d))


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """Return the dtype that autocast computes in, or None where it is off. Traces under torch.compile.

    Args:
        device_type: such as ``"cuda"``.
    """
    if device_type in _AUTOCAST_DEVICES and torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return None


def no_autocast(device_type: str) -> AbstractContextManager[object]:
    """Switch autocast off, which would run the matrix products in half precision; the squeeze rounds once, at its end."""
    if autocast_dtype(device_type) is None:
        return nullcontext()
    return torch.autocast(device_type, enabled=False)


def float32_precision() -> str:
    """Return how exact matrix products in float32 shall be: ``"highest"``, ``"high"`` or ``"medium"``.

    `torch.get_float32_matmul_precision` raises where TF32 was set the newer way, through ``torch.backends.fp32_precision``
    or ``torch.backends.cuda.matmul.fp32_precision`` (torch 2.9 and later).
    """
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:
        return "high" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "highest"
