"""Memory of a GPU that outlives the call which allocates it."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor


def alloc_persistent(device: torch.device, allocate: Callable[[], Tensor]) -> Tensor:
    """Return the tensor that ``allocate`` makes on a device, for use on its current stream in this and later calls.

    Another thread allocates it. ``torch.compile(mode="reduce-overhead")`` warms up with a memory pool for all that its thread
    allocates, raises for whatever is alive there and is no result of the compiled function, and later reuses the memory.
    """
    if device.type != "cuda":
        return allocate()
    stream = torch.cuda.current_stream(device)

    def allocate_on_stream() -> Tensor:
        with torch.cuda.stream(stream):
            return allocate()

    with ThreadPoolExecutor(max_workers=1) as thread:
        return thread.submit(allocate_on_stream).result()
