"""Timing that is fair on a noisy machine: the candidates take turns, round by round, and medians are compared."""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from datetime import datetime, timezone
from typing import Any

import torch


def interleaved(candidates: Mapping[str, Callable[[], object]], rounds: int, warmup: int = 5) -> dict[str, list[float]]:
    """Seconds per call, one sample per round and candidate; the order turns by one every round.

    Args:
        candidates: what to call, by name.
        rounds: samples per candidate.
        warmup: calls of each that are not counted.
    """
    names = list(candidates)
    for name in names:
        for _ in range(warmup):
            candidates[name]()
    samples: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        start = turn % len(names)
        for name in names[start:] + names[:start]:
            begin = time.perf_counter()
            candidates[name]()
            samples[name].append(time.perf_counter() - begin)
    return samples


def summary(samples: list[float]) -> dict[str, float]:
    """Median and the 20th and 80th percentile, in microseconds."""
    deciles = statistics.quantiles(samples, n=10)
    return {
        "median_us": statistics.median(samples) * 1e6,
        "p20_us": deciles[1] * 1e6,
        "p80_us": deciles[7] * 1e6,
    }


def environment() -> dict[str, Any]:
    """What the numbers depend on: machine, versions, threads, commit."""
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": _git("describe", "--always", "--dirty", "--abbrev=12"),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }


def _git(*arguments: str) -> str:
    here = os.path.dirname(os.path.abspath(__file__))
    result = subprocess.run(["git", *arguments], cwd=here, capture_output=True, text=True, check=False)
    return result.stdout.strip() or "unknown"


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or "unknown"
