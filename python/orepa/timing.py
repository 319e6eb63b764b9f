"""Timing that is fair on a noisy machine: the candidates take turns, round by round, and medians are compared."""

from __future__ import annotations

import contextlib
import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

#: a CPU sample is as many calls as fill this time, because a single short one is mostly the clock
LEAST_SAMPLE = 1e-3
MOST_CALLS = 100
LEAST_ROUNDS = 5

Samples = dict[str, list[float]]


@dataclass(frozen=True)
class Task:
    """One thing to time: ``run(prepare())``, of which only ``run`` counts."""

    prepare: Callable[[], Any]
    run: Callable[[Any], Any]


def nothing() -> None:
    """The preparation of a task that needs none."""


class Stopwatch(Protocol):
    """How one device is timed."""

    def sample(self, task: Task, calls: int) -> float:
        """Seconds per call of ``task.run``, over ``calls`` calls; ``task.prepare`` does not count."""

    def calls(self, task: Task) -> int:
        """How many calls make one sample. Warms up, too."""


class CpuStopwatch:
    """The wall clock, on tasks that are done when they return."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock

    def sample(self, task: Task, calls: int) -> float:
        states = [task.prepare() for _ in range(calls)]
        begin = self._clock()
        for index in range(calls):
            task.run(states[index])
            states[index] = None  # frees the graph of a backward pass where a training step would
        return (self._clock() - begin) / calls

    def calls(self, task: Task) -> int:
        seconds = self.sample(task, 1)
        if seconds > 1:
            return 1  # warm enough, and too long to repeat
        seconds = self.sample(task, 1)
        if seconds > 10 * LEAST_SAMPLE:
            return 1  # known well enough, and repeating long calls would take more time than measuring them
        seconds = min(seconds, *(self.sample(task, 1) for _ in range(3)))
        return max(1, min(MOST_CALLS, round(LEAST_SAMPLE / max(seconds, 1e-9))))


def interleaved(
    tasks: Mapping[str, Task],
    rounds: int,
    seconds: float = float("inf"),
    stopwatch: Stopwatch | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> Samples:
    """Seconds per call, one sample per round and candidate; the order turns by one every round.

    A busy machine slows all candidates alike, and none profits from always following the same other.

    Args:
        tasks: what to time, by name.
        rounds: at most so many samples per candidate.
        seconds: stop when the time is spent, but not before `LEAST_ROUNDS`.
        stopwatch: of the device; by default the CPU's.
        clock: for ``seconds``.
    """
    watch: Stopwatch = stopwatch or CpuStopwatch()
    names = list(tasks)
    samples: Samples = {name: [] for name in names}
    end = clock() + seconds
    with _no_garbage_collection():
        calls = {name: watch.calls(tasks[name]) for name in names}
        for turn in range(rounds):
            start = turn % len(names)
            for name in names[start:] + names[:start]:
                samples[name].append(watch.sample(tasks[name], calls[name]))
            if clock() > end and turn + 1 >= LEAST_ROUNDS:
                break
    return samples


def function(call: Callable[[], Any]) -> Task:
    """A task that needs no preparation."""
    return Task(nothing, lambda _: call())


def summary(processes: Sequence[Sequence[float]]) -> dict[str, float]:
    """Median and spread of the samples of one or more processes, in microseconds.

    ``median_us`` is the median of the processes' medians. ``low_us`` to ``high_us`` spans the 20th to 80th percentile of all
    samples and the interval that holds the mean over all processes with 95% confidence, by Student's t from the logarithms
    of the processes' medians. Of one process, percentiles are all there is.
    """
    samples = [s for process in processes for s in process]
    medians = [statistics.median(process) for process in processes]
    deciles = statistics.quantiles(samples, n=10, method="inclusive") if len(samples) > 1 else samples * 9
    median, p20, p80 = statistics.median(medians), deciles[1], deciles[7]
    low, high = min(p20, median), max(p80, median)
    if len(medians) > 1:
        logs = [math.log(m) for m in medians]
        factor = math.exp(half_width_95(logs))
        mean = math.exp(statistics.fmean(logs))
        low, high = min(low, mean / factor), max(high, mean * factor)
    values = {"median": median, "p20": p20, "p80": p80, "low": low, "high": high}
    return {f"{name}_us": value * 1e6 for name, value in values.items()}


def half_width_95(values: Sequence[float]) -> float:
    """Return half the width of the 95% confidence interval of the mean, by Student's t; of two values or more."""
    from scipy.special import stdtrit  # scipy.stats.t.ppf calls the same, and takes a second to import

    return float(stdtrit(len(values) - 1, 0.975)) * statistics.stdev(values) / math.sqrt(len(values))


def saved_bytes(squeeze: Callable[[], torch.Tensor], operands: list[torch.Tensor]) -> int:
    """Memory that one squeeze keeps for its backward pass, in bytes.

    Each storage counts once, and whole; the operands themselves do not count, because they stay in memory anyway.
    """
    owned = {t.untyped_storage().data_ptr() for t in operands}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in owned:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        kernel = squeeze()
    total = sum(kept.values())
    del kernel  # kept until here, so that no storage was freed and its address used again
    return total


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
