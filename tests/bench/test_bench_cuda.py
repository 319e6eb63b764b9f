"""Timing on CUDA: the order of events with stand-ins for the device, and the real thing where there is one."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

import pytest
import torch
from squeeze import all_providers
from test_bench import config

from orepa import timing
from orepa.bench import squeeze as bench
from orepa.bench.check import Truth
from orepa.bench.problem import Problem, Shape, SqueezeCase
from orepa.bench.providers import Eager
from orepa.timing import Task, nothing


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the device is asked to do, in order."""
    events: list[str] = []

    class Stream:
        def wait_stream(self, other: object) -> None:
            pass

    class Graph:
        count = 0

        def __init__(self) -> None:
            Graph.count += 1
            self.name = f"graph {Graph.count}"

        def replay(self) -> None:
            events.append(f"replay {self.name}")

    @contextlib.contextmanager
    def graph(captured: Graph, pool: object, stream: object):
        events.append(f"capture {captured.name}")
        yield
        events.append("captured")

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            events.append("record")

        def elapsed_time(self, end: object) -> float:
            return 2.0

    fakes = {
        "Stream": Stream,
        "CUDAGraph": Graph,
        "graph": graph,
        "Event": Event,
        "current_stream": Stream,
        "stream": lambda _: contextlib.nullcontext(),
        "synchronize": lambda: events.append("synchronize"),
        "graph_pool_handle": lambda: "pool",
        "current_device": lambda: 0,
        "get_device_properties": lambda _: SimpleNamespace(L2_cache_size=1 << 10),
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    return events


def test_a_backward_is_captured_after_its_forward_and_replayed_after_it(log: list[str]) -> None:
    def prepare() -> str:
        log.append("forward")
        return "state"

    task = timing.capture(Task(prepare, lambda state: log.append(f"backward of {state}")))
    start = log.index("capture graph 1")
    assert log[start:] == [
        *("capture graph 1", "forward", "captured"),
        *("capture graph 2", "backward of state", "captured"),
    ]
    log.clear()
    task.run(task.prepare())
    assert log == ["replay graph 1", "replay graph 2"]


def test_no_graph_for_an_empty_preparation(log: list[str]) -> None:
    task = timing.capture(Task(nothing, lambda _: log.append("squeeze")))
    assert [e for e in log if e.startswith("capture ")] == ["capture graph 1"]
    assert task.prepare is nothing


@pytest.mark.parametrize(
    ("graphed", "order"),
    [
        (True, ["prepare", "flush", "record", "run", "record", "synchronize"]),
        (False, ["prepare", "flush", "synchronize", "record", "run", "record", "synchronize"]),
    ],
)
def test_the_cache_is_cold_and_only_the_run_is_timed(log: list[str], graphed: bool, order: list[str]) -> None:
    watch = timing.CudaStopwatch(graphed, device="cpu")
    watch._flush = SimpleNamespace(zero_=lambda: log.append("flush"))  # type: ignore[assignment]
    task = Task(lambda: log.append("prepare"), lambda _: log.append("run"))
    assert watch.sample(task, 1) == pytest.approx(2e-3)
    assert log == order
    assert watch.calls(task) == 1


def test_the_host_is_timed_while_nothing_is_waited_for(log: list[str]) -> None:
    seconds = iter([1.0, 7.0, 10.0, 13.0])

    def clock() -> float:
        log.append("clock")
        return next(seconds)

    task = Task(lambda: log.append("prepare"), lambda _: log.append("run"))
    assert timing.host_us(task, calls=3, rounds=2, clock=clock) == pytest.approx(
        1e6
    )  # three in three seconds, the better
    turn = [*["prepare"] * 3, "synchronize", "clock", *["run"] * 3, "clock"]
    assert log == [*turn, *turn, "synchronize"]


# --- on a device ----------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
def test_replays_compute_what_eager_computes() -> None:
    problem = Problem(SqueezeCase(Shape(32, 16, 3), "orepa", "bf16", "cuda"))
    built = Eager().build(problem)
    expected = built.squeeze()
    for mode in ("forward", "backward", "both"):
        task = timing.capture(built.tasks[mode])
        found = task.run(task.prepare())
        torch.cuda.synchronize()
        if mode == "forward":
            assert torch.equal(found, expected)
        else:
            truth = torch.autograd.grad(built.squeeze(), problem.parameters, problem.grad)
            for a, b in zip(found, truth, strict=True):
                torch.testing.assert_close(a, b)


@pytest.mark.gpu
def test_launches_are_counted() -> None:
    x = torch.ones(10, device="cuda")
    assert timing.count_launches(lambda: x + 1) == 1
    assert timing.count_launches(lambda: (x + 1) * 2) == 2


@pytest.mark.gpu
def test_everything_runs_on_cuda() -> None:
    shapes = [Shape(32, 16, 3), Shape(16, 16, 1), Shape(16, 3, 7), Shape(16, 16, 3, 4)]
    launches, dtypes = ("graph", "plain"), ("fp32", "bf16")
    chosen = config(shapes, "cuda", dtypes, launches=launches, rounds=5, seconds=5)
    providers = {name: p for name, p in all_providers().items() if "max-autotune" not in name}
    results = bench.run(chosen, providers)
    assert not [row for row in results.rows if row.status in ("wrong", "failed")], results.rows
    assert {row.launch for row in results.timed} == {"graph", "plain"}
    eager = [row for row in results.timed if row.provider == "eager" and row.launch == "plain"]
    assert all(row.facts["launches"] > 1 and row.facts["host_us"] > 1 for row in eager)


@pytest.mark.gpu
def test_truth_on_cuda() -> None:
    truth = Truth(Problem(SqueezeCase(Shape(32, 16, 3), "orepa", "fp32", "cuda")))
    assert truth.eager.weight < 5e-6 and truth.eager.gradient < 5e-6
