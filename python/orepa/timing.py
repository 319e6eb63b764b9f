"""Time fairly on a noisy machine: candidates take turns, round by round, and medians are compared."""

from __future__ import annotations

import contextlib
import gc
import math
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

#: seconds that the calls of one CPU sample fill, because a single short call measures mostly the clock
LEAST_SAMPLE = 1e-3
MOST_CALLS = 100
LEAST_ROUNDS = 3

Samples = dict[str, list[float]]


@dataclass(frozen=True)
class Task:
    """One thing to time: ``run(prepare())``, of which only ``run`` counts."""

    prepare: Callable[[], Any]
    run: Callable[[Any], Any]


def nothing() -> None:
    """Prepare a task that needs no preparation."""


class Stopwatch(Protocol):
    """Times one device."""

    def sample(self, task: Task, calls: int) -> float:
        """Return seconds per call of ``task.run``, over ``calls`` calls; ``task.prepare`` does not count."""

    def calls(self, task: Task) -> int:
        """Warm up, and return the number of calls that make one sample."""


class CpuStopwatch:
    """The wall clock, for tasks that are finished when they return."""

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


class CudaStopwatch:
    """CUDA events around single calls, with the L2 cache flushed before each.

    In training, a squeeze runs between convolutions that have filled the cache with feature maps; a loop over one kernel
    alone would measure a cache state that never occurs. Where tasks are graph replays (``graphed``), the flush still runs on
    the device while the replay is queued, so that the events enclose device time only. Plain launches start on an idle
    device: they include the host's time.
    """

    def __init__(self, graphed: bool, device: str = "cuda") -> None:
        self._graphed = graphed
        l2: int = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
        self._flush = torch.zeros(max(4 * l2, 1 << 27), dtype=torch.uint8, device=device)

    def sample(self, task: Task, calls: int) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        total = 0.0
        for _ in range(calls):
            state = task.prepare()
            self._flush.zero_()
            if not self._graphed:
                torch.cuda.synchronize()
            start.record()
            task.run(state)
            end.record()
            torch.cuda.synchronize()
            total += start.elapsed_time(end) * 1e-3
        return total / calls

    def calls(self, task: Task) -> int:
        for _ in range(3):
            self.sample(task, 1)
        return 1


def interleaved(
    tasks: Mapping[str, Task],
    rounds: int,
    seconds: float = float("inf"),
    stopwatch: Stopwatch | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> Samples:
    """Return seconds per call, one sample per round and candidate; the order rotates by one every round.

    So a busy machine slows all candidates alike, and none profits from always following the same other.

    Args:
        tasks: what to time, by name.
        rounds: samples per candidate, at most.
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
    """Return a task without preparation."""
    return Task(nothing, lambda _: call())


def summary(processes: Sequence[Sequence[float]]) -> dict[str, float]:
    """Return median and spread of the samples of one or more processes, in microseconds.

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


def capture(task: Task) -> Task:
    """Capture a task in CUDA graphs, one for its preparation and one for what is timed; a RuntimeError where that fails.

    Every timed replay follows one of the preparation, so a backward pass finds what its forward saved.
    """
    # On a side stream: the autograd engine runs a backward pass on the stream of its forward.
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            task.run(task.prepare())
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()

    pool = torch.cuda.graph_pool_handle()
    state, prepare = (None, nothing) if task.prepare is nothing else _record(task.prepare, stream, pool)
    result, run = _record(lambda: task.run(state), stream, pool)
    # Referenced by the task: memory of the pool without a tensor could be handed to the next graph.
    referenced = (state, result)

    def replay(_: object) -> Any:
        run()
        return referenced[1]

    return Task(prepare, replay)


def _record(call: Callable[[], Any], stream: Any, pool: Any) -> tuple[Any, Callable[[], None]]:
    """Return the value of a call while it was captured, and the replay of its graph."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool, stream=stream):
        value = call()
    return value, graph.replay


def count_launches(call: Callable[[], object]) -> int:
    """Count the kernels, copies and fills that one call puts on the device."""
    from torch.profiler import ProfilerActivity, profile

    call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize()
    on_device = (e for e in profiler.events() if e.device_type == torch.autograd.DeviceType.CUDA)
    return sum(not e.is_user_annotation for e in on_device)


def host_us(task: Task, calls: int = 10, rounds: int = 10, clock: Callable[[], float] = time.perf_counter) -> float:
    """Return the host's time for one run of a task in microseconds: the least of some rounds that do not wait for the device.

    Each round enqueues ``calls`` runs, too few to fill the device's queue, which would make the host wait.
    """
    totals = []
    for _ in range(rounds):
        states = [task.prepare() for _ in range(calls)]
        torch.cuda.synchronize()
        begin = clock()
        for state in states:
            task.run(state)
        totals.append(clock() - begin)
    torch.cuda.synchronize()
    return min(totals) / calls * 1e6


def cpu_peak(call: Callable[[], object]) -> int:
    """Return how many bytes more than before a call has allocated on the CPU at its peak."""
    total = peak = 0
    events = _cpu_events(call, profile_memory=True)
    for _, size in sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"):
        total += size
        peak = max(peak, total)
    return peak


def reduced_bytes(call: Callable[[], object]) -> int:
    """Return the bytes that one call hands over to be summed among processes, on CPUs."""
    sizes = {"double": 8, "long int": 8, "float": 4, "int": 4, "c10::Half": 2, "c10::BFloat16": 2, "unsigned char": 1}
    events = [event for event in _cpu_events(call, record_shapes=True) if event.name() == "gloo:all_reduce"]
    return sum(sizes[event.dtypes()[0]] * math.prod(event.shapes()[0]) for event in events)


def _cpu_events(call: Callable[[], object], profile_memory: bool = False, record_shapes: bool = False) -> list[Any]:
    from torch.profiler import ProfilerActivity, profile

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the profiler's, on repeated use
        how = {"profile_memory": profile_memory, "record_shapes": record_shapes, "acc_events": True}
        with profile(activities=[ProfilerActivity.CPU], **how) as profiler:  # type: ignore[arg-type]
            call()
    return list(profiler.profiler.kineto_results.events())


def saved_bytes(squeeze: Callable[[], torch.Tensor], operands: list[torch.Tensor]) -> int:
    """Return the bytes that one squeeze saves for its backward pass.

    Each storage counts once and in full; the operands do not count, because they stay in memory anyway.
    """
    operand_storages = {t.untyped_storage().data_ptr() for t in operands}
    saved: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in operand_storages:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        kernel = squeeze()
    total = sum(saved.values())
    del kernel  # alive until here, so that no storage was freed and its address reused
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
