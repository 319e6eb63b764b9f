"""Settings of the process that a run needs, and that are as before once it is over."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import torch


@contextlib.contextmanager
def threads(number: int | None) -> Iterator[None]:
    """Compute on so many threads of the CPU, None for PyTorch's own choice."""
    before = torch.get_num_threads()
    torch.set_num_threads(number or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def default_dtype(precision: str) -> Iterator[None]:
    """With ``"64-true"`` everything is in float64: Fabric alone would round the network's output to the default dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64 if precision == "64-true" else before)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    """Kernels that give the same bits each time, also on a GPU: a resumed run would not be the same run otherwise."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    enabled, warn_only = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    debugging: Any = torch.utils.deterministic
    fill, benchmark = debugging.fill_uninitialized_memory, torch.backends.cudnn.benchmark
    torch.use_deterministic_algorithms(True, warn_only=True)
    debugging.fill_uninitialized_memory = False  # an aid that costs time
    torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
        debugging.fill_uninitialized_memory = fill
        torch.backends.cudnn.benchmark = benchmark
