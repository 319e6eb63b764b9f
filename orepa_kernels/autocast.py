"""What autocast asks for, readable under torch.compile too."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

# Asked once, at import: torch.compile cannot trace the question.
_AUTOCAST_DEVICES = frozenset(d for d in ("cpu", "cuda", "mps", "xpu", "hpu") if torch.amp.is_autocast_available(d))


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """The dtype that autocast computes in, or None where it is off. Traces under torch.compile.

    Args:
        device_type: such as ``"cuda"``.
    """
    if device_type in _AUTOCAST_DEVICES and torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return None


def no_autocast(device_type: str) -> AbstractContextManager[object]:
    """Autocast would run the matrix products in half precision; the squeeze rounds once, at its end."""
    if autocast_dtype(device_type) is None:
        return nullcontext()
    return torch.autocast(device_type, enabled=False)
