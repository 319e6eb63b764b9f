"""The machine that was measured on: what it is, and what it can do at most."""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

import orepa_kernels
from orepa_kernels.guards import float32_precision

_GEMM = {"cpu": 1024, "cuda": 8192}
_COPY_BYTES = {"cpu": 1 << 28, "cuda": 1 << 31}


def environment(device: str = "cpu") -> dict[str, Any]:
    """What the numbers depend on: machine, versions, threads, commit."""
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
        properties = torch.cuda.get_device_properties(0)
        facts |= {
            "gpu": properties.name,
            "gpu_memory": properties.total_memory,
            "l2_bytes": properties.L2_cache_size,
            "cuda": torch.version.cuda,
        }
    return facts


def ceilings(device: str = "cpu", seconds: float = 1.0) -> dict[str, float]:
    """The most that this machine does, measured: the scale for rates.

    Returns:
        ``copy_bytes_per_second`` (read plus written, far beyond the caches) and ``gemm_flops_per_second`` of a large square
        float32 product, at the current ``float32_matmul_precision``.
    """
    copy, gemm = _copy(device, seconds / 2), _gemm(device, seconds / 2)
    return {"copy_bytes_per_second": _COPY_BYTES[device] / copy, "gemm_flops_per_second": 2 * _GEMM[device] ** 3 / gemm}


class OtherWork:
    """How much other processes, or a hypervisor's other guests, used the processor while this ran: ``with other: …``.

    Attributes:
        cores: how many were busy with something else, on average; None where the system does not tell.
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
            (everyone, own, wall), (everyone_then, own_then, wall_then) = now, self._start
            self._busy += (everyone - everyone_then) - (own - own_then)
            self._elapsed += wall - wall_then
            self.cores = max(0.0, round(self._busy / max(self._elapsed, 0.1), 2))


def _clocks() -> tuple[float, float, float] | None:
    """Processor seconds of everyone and of this process, and the wall clock; only Linux tells."""
    try:
        with open("/proc/stat") as file:
            user, nice, system, _, _, *rest = (int(field) for field in file.readline().split()[1:9])
    except (OSError, ValueError):
        return None
    everyone = (user + nice + system + sum(rest)) / os.sysconf("SC_CLK_TCK")
    return everyone, sum(os.times()[:4]), time.perf_counter()


def _copy(device: str, seconds: float) -> float:
    source = torch.ones(_COPY_BYTES[device] // 2, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    return _typical(lambda: target.copy_(source), device, seconds)


def _gemm(device: str, seconds: float) -> float:
    a, b, out = (torch.ones(_GEMM[device], _GEMM[device], device=device) for _ in range(3))
    return _typical(lambda: torch.mm(a, b, out=out), device, seconds)


def _typical(call: Callable[[], object], device: str, seconds: float) -> float:
    """Median seconds of a long operation."""

    def once() -> float:
        begin = time.perf_counter()
        call()
        if device != "cpu":
            torch.cuda.synchronize()
        return time.perf_counter() - begin

    once(), once()
    samples, end = [once()], time.perf_counter() + seconds
    while time.perf_counter() < end:
        samples.append(once())
    return statistics.median(samples)


def _commit() -> str:
    """The commit of this source tree, with ``-dirty`` where it was changed; ``"unknown"`` for an installed package."""
    here = Path(__file__).resolve()
    root = here.parents[3]
    if not (root / ".git").exists() or here.parents[2] != root / "python":
        return "unknown"
    try:
        described = subprocess.run(
            ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"],
            capture_output=True,
            text=True,
            check=False,
        )
    except OSError:
        return "unknown"
    return described.stdout.strip() or "unknown"


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or "unknown"
