"""Describe the machine: what it is, and who else uses it."""

from __future__ import annotations

import contextlib
import os
import platform
import subprocess
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from torch import distributed

import orepa_kernels
from orepa_kernels.guards import float32_precision


def environment(device: str = "cpu") -> dict[str, Any]:
    """Return what the numbers depend on: machine, versions, threads, commit."""
    facts: dict[str, Any] = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": _commit(),
        "orepa_kernels": orepa_kernels.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.system(),
        "machine": platform.machine(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "float32_matmul_precision": float32_precision(),
        "device": device,
    }
    if device == "cuda":
        gpu = torch.cuda.get_device_properties(0)
        facts |= {"gpu": gpu.name, "gpu_memory": gpu.total_memory, "l2_bytes": gpu.L2_cache_size}
        facts["cuda"] = torch.version.cuda
    return facts


class OtherWork:
    """Measure how many cores other processes, or a hypervisor's other guests, keep busy: ``with other: …``, ``other.cores``.

    That is None where the system does not tell. Processes that work together, all of which have to ask, are no others.
    """

    def __init__(self) -> None:
        self.cores: float | None = None
        self._busy = self._elapsed = 0.0

    def __enter__(self) -> OtherWork:
        self._start = _clocks()
        return self

    def __exit__(self, *_: object) -> None:
        now = _clocks()
        if now is not None and self._start is not None:
            all_seconds, our_seconds, elapsed = (after - before for after, before in zip(now, self._start, strict=True))
            self._busy += all_seconds - our_seconds
            self._elapsed += elapsed
            self.cores = max(0.0, round(self._busy / max(self._elapsed, 0.1), 2))


def _clocks() -> tuple[float, float, float] | None:
    """Processor seconds of all processes and of ours, and the wall clock; only Linux tells."""
    ours = torch.tensor(sum(os.times()[:4]), dtype=torch.float64)
    if distributed.is_available() and distributed.is_initialized():
        distributed.all_reduce(ours)
    try:
        first = Path("/proc/stat").read_text().splitlines()[0]
        user, nice, system, _, _, *rest = map(int, first.split()[1:9])
    except (OSError, ValueError):
        return None
    busy = (user + nice + system + sum(rest)) / os.sysconf("SC_CLK_TCK")
    return busy, float(ours), time.perf_counter()


def _commit() -> str:
    """The commit of this source tree, with ``-dirty`` where it was changed; ``"unknown"`` for an installed package."""
    here = Path(__file__).resolve()
    root = here.parents[3]
    if not (root / ".git").exists() or here.parents[2] != root / "python":
        return "unknown"
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"]
    with contextlib.suppress(OSError):
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or "unknown"
    return "unknown"


def _processor() -> str:
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return platform.processor() or "unknown"
