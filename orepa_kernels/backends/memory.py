"""Memory of a GPU that outlives the call which allocates it."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor


def kept(device: torch.device, make: Callable[[], Tensor]) -> Tensor:
    """The tensor that ``make`` allocates on a device, to be used on its current stream and kept.

    Another thread makes it. ``torch.compile(mode="reduce-overhead")`` warms up with a memory pool for all that its thread
    allocates, and then raises for whatever is alive there and is no result of the compiled function; later it would hand
    the same memory to others.
    """
    if device.type != "cuda":
        return make()
    stream = torch.cuda.current_stream(device)

    def elsewhere() -> Tensor:
        with torch.cuda.stream(stream):
            return make()

    with ThreadPoolExecutor(max_workers=1) as thread:
        return thread.submit(elsewhere).result()
