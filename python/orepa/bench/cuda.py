"""Time on CUDA: cold caches, events, plain launches and graph replays; count launches; time the host alone."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from ..timing import Task, nothing


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
