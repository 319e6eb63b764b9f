"""How fast a run is and how much memory it takes."""

from __future__ import annotations

import sys
import time

import torch

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]


class Meter:
    """Images per second since the last `lap`."""

    def __init__(self) -> None:
        self._images, self._began = 0, time.perf_counter()

    def count(self, images: int) -> None:
        """Add images that are done."""
        self._images += images

    def lap(self) -> float | None:
        """Images per second since the last call, None if there were no images; begins anew."""
        now = time.perf_counter()
        rate = self._images / (now - self._began) if self._images and now > self._began else None
        self._images, self._began = 0, now
        return rate


def peak_memory(device: torch.device) -> float | None:
    """Most memory taken so far, in MB: by tensors on a CUDA device, otherwise by this process. None where nobody tells."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    if resource is None:
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6
