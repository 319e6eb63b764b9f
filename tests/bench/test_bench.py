"""The benchmark of the squeeze: what is measured is right, compiled before, and fair."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import squeeze as script
import torch
from roofline import amount, flops, minimum_bytes, products
from squeeze import MODELS, model_shapes
from torch import Tensor

import orepa
from orepa.bench import squeeze as bench
from orepa.bench.check import Truth
from orepa.bench.problem import Problem, Shape, SqueezeCase, parse_shapes
from orepa.bench.providers import (
    MODES,
    Compiled,
    Eager,
    Kernels,
    Provider,
    configure_inductor,
)
from orepa.bench.runner import BenchConfig
from orepa.errors import UserError
from orepa.timing import LEAST_ROUNDS, CpuStopwatch, Task, function, interleaved, nothing, saved_bytes, summary

SMALL = Shape(6, 4, 3)


def problem_of(shape: Shape = SMALL, topology: str | None = None, dtype: str = "fp32") -> Problem:
    return Problem(SqueezeCase(shape, topology or shape.topology, dtype))


class FakeWatch:
    """A second per call, whatever is called."""

    def __init__(self) -> None:
        self.sampled: list[Task] = []

    def sample(self, task: Task, calls: int) -> float:
        self.sampled.append(task)
        task.run(task.prepare())
        return 1.0

    def calls(self, task: Task) -> int:
        return 1


def config(
    shapes: Sequence[Shape] = (SMALL,), device: str = "cpu", dtypes: Sequence[str] = ("fp32",), **changes: Any
) -> BenchConfig:
    cases = [SqueezeCase(shape, shape.topology, dtype, device) for dtype in dtypes for shape in shapes]
    return BenchConfig(cases=cases, device=device, **{"modes": MODES, "rounds": 3, "seconds": 1.0, **changes})


# --- shapes and work ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(MODELS))
def test_shapes_are_those_that_prepare_swaps(name: str) -> None:
    timm = pytest.importorskip("timm")
    with torch.device("meta"):
        model = timm.create_model(name)
    model = orepa.prepare(model, "plain")
    blocks = [m for m in model.modules() if isinstance(m, orepa.OREPAConv)]
    found = dict.fromkeys(Shape(m.out_channels, m.in_channels, m.kernel_size[0], m.groups) for m in blocks)
    assert set(found) == set(MODELS[name])
    assert len(set(MODELS[name])) == len(MODELS[name])


def test_shapes_that_the_user_names() -> None:
    assert parse_shapes("64,32,3; 8,8,1,4") == (Shape(64, 32, 3), Shape(8, 8, 1, 4))
    assert set(model_shapes(["all"])) == {shape for shapes in MODELS.values() for shape in shapes}
    assert [Shape(8, 8, k).topology for k in (1, 2, 3, 7)] == ["rep1x1", "repvgg_dense", "orepa", "deep_stem"]


@pytest.mark.parametrize("text", ["", "64", "64,64", "a,b,c", "8,8,3,3", "0,8,3", "8,8,3,2,1", "-8,8,3"])
def test_shapes_that_are_none(text: str) -> None:
    with pytest.raises(UserError, match="--shapes"):
        parse_shapes(text)


def test_work_of_a_block_counted_by_hand() -> None:
    o, i, k = 6, 4, 3
    w = problem_of()
    (product,) = products(w.plan)
    assert (product.batch, product.m, product.k, product.n) == (1, o * k * k, i, i)
    assert flops(w.plan, "forward") == 2 * o * i * i * k * k + 2 * o * 8 * i * k * k
    assert flops(w.plan, "both") == 3 * flops(w.plan, "forward")
    parameters = 2 * o * i * k * k + 3 * o * i + i * i + 8 * i * k * k + 8 * o * i + 6 * o
    operands, kernel = parameters + o * k * k, o * i * k * k
    count = [minimum_bytes(w.plan, w.constants, m, torch.float32, torch.bfloat16) for m in ("forward", "backward")]
    assert count == [4 * operands + 2 * kernel, 2 * kernel + 4 * operands + 4 * parameters]
    assert w.constants == {"prior_filter"} and sum(p.numel() for p in w.parameters) == parameters


def test_work_of_groups_and_of_nested_blocks() -> None:
    (grouped,) = products(problem_of(Shape(6, 4, 3, 2)).plan)
    assert (grouped.batch, grouped.m, grouped.k, grouped.n) == (2, 3 * 9, 2, 2)
    # Two compositions of the stem, and one inside each of its three stages.
    assert len(products(problem_of(Shape(4, 3, 7)).plan)) == 5


# --- providers are right --------------------------------------------------------------------------------------------------

CASES = [
    (SMALL, "orepa"),
    (Shape(6, 4, 3, 2), "orepa"),
    (Shape(12, 12, 3, 6), "orepa"),
    (Shape(5, 3, 5), "orepa"),
    (SMALL, "repvgg_dense"),
    (Shape(6, 4, 2), "repvgg_dense"),
    (Shape(6, 4, 1), "rep1x1"),
    (Shape(4, 6, 1, 2), "rep1x1"),
    (Shape(4, 3, 7), "deep_stem"),
    (SMALL, "dbb"),
]


@pytest.mark.parametrize(("shape", "topology"), CASES, ids=str)
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_baseline_and_backends_pass_their_check(shape: Shape, topology: str, dtype: str) -> None:
    w = problem_of(shape, topology, dtype)
    truth = Truth(w)
    assert truth.eager.weight < {"fp32": 5e-6, "bf16": 4e-3, "fp16": 5e-4}[dtype]
    assert truth.eager.gradient < 5e-6
    for provider in (Eager(), Kernels("reference")):
        assert truth.mistake(truth.errors(provider.build(w))) == ""


def test_every_parameter_matters_to_the_check() -> None:
    """No branch is at a zero or an identity, where a mistake in it would not show."""
    w = problem_of()
    truth = Truth(w)
    for parameter in w.parameters:
        kept = parameter.detach().clone()
        parameter.data.mul_(1.01)
        assert "the kernel" in truth.mistake(truth.errors(Eager().build(w)))
        parameter.data.copy_(kept)


def test_backends_that_cannot_run_say_why() -> None:
    assert Kernels("reference").why_not(problem_of()) == ""
    absent = [name for name, verdict in orepa_backends().items() if not verdict]
    for name in absent:
        assert Kernels(name).why_not(problem_of())


def orepa_backends() -> dict[str, object]:
    import orepa_kernels

    return dict(orepa_kernels.backends())


def test_floors_do_their_products() -> None:
    gemms = script.all_providers()["gemms"]
    w = problem_of(Shape(6, 4, 3, 2))
    built = gemms.build(w)
    assert built.squeeze is None and gemms.floor
    for mode in ("forward", "backward", "both"):
        built.tasks[mode].run(built.tasks[mode].prepare())
    assert gemms.why_not(problem_of(SMALL, "plain"))
    assert amount("gemms", w, "both")["flops"] == 3 * sum(p.flops for p in products(w.plan))


class Planted(Provider):
    """The plain formulation with a mistake."""

    name = "planted"

    def __init__(self, mistake: Callable[[Tensor], Tensor]) -> None:
        self._mistake = mistake

    def squeezer(self, problem: Problem) -> Callable[[], Tensor]:
        right = Eager().squeezer(problem)
        return lambda: self._mistake(right())


class Clock:
    """Every look at it takes a millisecond; work takes what it says it takes."""

    now = 0.0

    def __call__(self) -> float:
        self.now += 1e-3
        return self.now


class Slower(Provider):
    """The plain formulation, by ``clock`` slower by ``seconds``."""

    name = "planted"

    def __init__(self, clock: Clock, seconds: float) -> None:
        self._clock, self._seconds = clock, seconds

    def squeezer(self, problem: Problem) -> Callable[[], Tensor]:
        right = Eager().squeezer(problem)

        def squeeze() -> Tensor:
            self._clock.now += self._seconds
            return right()

        return squeeze


def _explode(kernel: Tensor) -> Tensor:
    raise RuntimeError("out of luck\nand more")


@pytest.mark.parametrize(
    ("mistake", "status", "reason"),
    [
        (lambda w: w * (1 + 1e-4), "wrong", "the kernel is off by 1.0e-04"),
        (lambda w: w + (2e-4 * w - (2e-4 * w).detach()), "wrong", "the gradient of origin_weight is off by 2.0e-04"),
        (lambda w: w * math.nan, "wrong", "the kernel is off by nan"),
        (lambda w: w.double(), "failed", "ValueError: the kernel is [6, 4, 3, 3] torch.float64"),
        (lambda w: w[:3], "failed", "ValueError: the kernel is [3, 4, 3, 3]"),
        (_explode, "failed", "RuntimeError: out of luck"),
    ],
    ids=["kernel", "gradient", "nan", "dtype", "shape", "exception"],
)
def test_planted_mistake_is_reported_and_not_timed(
    mistake: Callable[[Tensor], Tensor], status: str, reason: str
) -> None:
    watch = FakeWatch()
    results = bench.run(config(), {"eager": Eager(), "planted": Planted(mistake)}, stopwatch=watch)
    planted = [row for row in results.rows if row.provider == "planted"]
    assert len(planted) == 3
    for row in planted:
        assert row.status == status and row.reason.startswith(reason) and row.seconds == []
    assert {row.provider for row in results.timed} == {"eager"}
    assert len(watch.sampled) == 3 * 3  # modes, rounds: the baseline only


# --- timing ---------------------------------------------------------------------------------------------------------------


def test_order_turns_every_round() -> None:
    order: list[str] = []
    tasks = {name: function(lambda name=name: order.append(name)) for name in "abc"}
    interleaved(tasks, 4, stopwatch=FakeWatch())
    assert "".join(order) == "abcbcacababc"


def test_a_sample_counts_the_run_and_nothing_else() -> None:
    now = 0.0

    def spend(seconds: float) -> float:
        nonlocal now
        now += seconds
        return seconds

    watch = CpuStopwatch(lambda: now)
    assert watch.sample(Task(lambda: spend(100.0), lambda _: spend(3.0)), 4) == pytest.approx(3.0)
    assert watch.calls(Task(nothing, lambda _: spend(1e-5))) == 100
    assert watch.calls(Task(nothing, lambda _: spend(1e-4))) == 10
    assert watch.calls(Task(nothing, lambda _: spend(1.0))) == 1


def test_every_call_of_a_sample_gets_its_own_preparation() -> None:
    prepared, run = [], []
    CpuStopwatch().sample(Task(lambda: prepared.append(0) or len(prepared), run.append), 3)
    assert run == [1, 2, 3]


def test_time_box() -> None:
    now = 0.0

    def clock() -> float:
        nonlocal now
        now += 1.0
        return now

    tasks = {"a": function(lambda: None)}
    assert len(interleaved(tasks, 1000, 20.0, FakeWatch(), clock)["a"]) == 21
    assert len(interleaved(tasks, 1000, 0.0, FakeWatch(), clock)["a"]) == LEAST_ROUNDS


def test_summary() -> None:
    one = summary([[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]])
    assert one == {
        "median_us": pytest.approx(3.5e6),
        "p20_us": pytest.approx(2e6),
        "p80_us": pytest.approx(5e6),
        "low_us": one["p20_us"],
        "high_us": one["p80_us"],
    }
    assert summary([[2.0]])["p20_us"] == 2e6


def test_compilation_is_never_timed() -> None:
    """With torch.compile's front end: what compiles does so before the first clock starts, backward graphs too."""
    compiled: list[str] = []

    def backend(module: torch.fx.GraphModule, inputs: Sequence[Tensor]) -> Callable[..., object]:
        compiled.append("a graph")
        return module.forward

    def compiler(f: Callable[..., Tensor], *, mode: str, fullgraph: bool, dynamic: bool) -> Callable[..., Tensor]:
        return torch.compile(f, backend=backend, fullgraph=fullgraph, dynamic=dynamic)

    class Watch(FakeWatch):
        def calls(self, task: Task) -> int:
            counts.append(len(compiled))
            return 1

        def sample(self, task: Task, calls: int) -> float:
            counts.append(len(compiled))
            return super().sample(task, calls)

    counts: list[int] = []
    shapes = [SMALL, Shape(4, 4, 3), Shape(6, 4, 3, 2)]
    providers: dict[str, Provider] = {"compile": Compiled("compile", "default", compiler)}
    results = bench.run(config(shapes=shapes), providers, stopwatch=Watch())
    assert [row.status for row in results.rows] == ["ok"] * 9, results.rows
    per_case = len(counts) // len(shapes)
    for index in range(len(shapes)):
        assert set(counts[index * per_case : (index + 1) * per_case]) == {index + 1}
    assert len(compiled) == len(shapes)


def test_a_lazy_compiler_is_never_timed() -> None:
    def compiler(f: Callable[..., Tensor], **_: object) -> Callable[..., Tensor]:
        calls: list[int] = []

        def first_call_is_slow(*args: object) -> Tensor:
            if not calls:
                time.sleep(0.5)
            calls.append(1)
            return f(*args)

        return first_call_is_slow

    results = bench.run(config(rounds=5), {"compile": Compiled("compile", "default", compiler)})
    assert len(results.timed) == 3
    assert max(s for row in results.timed for s in row.seconds) < 0.25


def test_inductors_cache_tells_numbers_of_threads_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    config = pytest.importorskip("torch._inductor.config")
    monkeypatch.setattr("torch.get_num_threads", lambda: 7)
    with config.patch({"cpp.threads": -1}):
        configure_inductor()
        assert config.cpp.threads == 7


def test_saved_bytes_counts_storages_once_and_no_operand() -> None:
    a, b = (torch.randn(10, requires_grad=True) for _ in range(2))
    assert saved_bytes(lambda: a * b, [a, b]) == 0
    assert (
        saved_bytes(lambda: (a + b).view(2, 5).exp().view(10).square(), [a, b]) == 40
    )  # exp and square save one tensor
    w = problem_of(Shape(16, 16, 3))
    assert saved_bytes(Eager().squeezer(w), list(w.operands.values())) > 4 * 16 * 16 * 9
