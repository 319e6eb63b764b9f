"""``orepa bench squeeze``: the micro-benchmark of the squeeze."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from ..errors import UserError
from ..timing import CpuStopwatch, Stopwatch, Task, interleaved, saved_bytes
from ..topology.language import topologies
from . import cuda
from .check import Truth
from .machine import OtherWork, ceilings, environment
from .providers import Built, Provider
from .results import Results, Row
from .shapes import DEFAULT, Shape
from .work import MODES
from .workload import DTYPES, Case, Workload, plan


@dataclass(frozen=True)
class Request:
    """What to measure.

    Args:
        shapes: of the blocks.
        topology: of all blocks; by default that of `Shape.topology`.
        dtypes: of the kernels, keys of `DTYPES`.
        device: ``"cpu"`` or ``"cuda"``.
        modes: of `MODES`.
        rounds: at most so many samples each, in each process.
        seconds: of measuring, over all cases and processes; compiling and checking come on top.
        processes: in how many the whole is measured: see `orepa.bench.processes`. `run` is one of them.
        out: JSON file, written anew after every case.

    Raises:
        UserError: a name that does not exist, or a topology that does not fit a shape.
    """

    shapes: Sequence[Shape] = DEFAULT
    topology: str | None = None
    dtypes: Sequence[str] = ("fp32",)
    device: str = "cpu"
    modes: Sequence[str] = MODES
    rounds: int = 50
    seconds: float = 60.0
    processes: int = 1
    out: Path | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        for what, values, allowed in (
            ("--dtypes", self.dtypes, DTYPES),
            ("--mode", self.modes, MODES),
            ("--topology", [self.topology] if self.topology else [], topologies()),
            ("--device", [self.device], ("cpu", "cuda")),
        ):
            for value in values:
                if value not in allowed:
                    raise UserError(f"{what} must be among {', '.join(allowed)}, got {value!r}")
        for case in self.cases:
            plan(case)  # what does not fit is told before an hour of measuring

    @property
    def cases(self) -> list[Case]:
        """Every combination, shapes innermost."""
        return [
            Case(shape, self.topology or shape.topology, dtype, self.device)
            for dtype in self.dtypes
            for shape in self.shapes
        ]

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return {**asdict(self), "shapes": [str(s) for s in self.shapes], "out": None}

    def save(self, results: Results) -> None:
        """Write results where ``out`` says, if it does.

        Raises:
            UserError: the file system refuses.
        """
        if self.out:
            results.save(self.out)


class Listener(Protocol):
    """Who is told how far it is."""

    def step(self, text: str) -> None:
        """Something begins."""

    def done(self) -> None:
        """A case is through."""


class Silent:
    """A listener that does nothing."""

    def step(self, text: str) -> None:
        pass

    def done(self) -> None:
        pass


def run(
    request: Request,
    providers: Mapping[str, Provider],
    listener: Listener | None = None,
    stopwatch: Stopwatch | None = None,
    keep: Callable[[Results], None] | None = None,
) -> Results:
    """Check and time every provider on every case, in this process; of several processes, each one's share of the time.

    Args:
        request: what to measure.
        providers: by name, in the order of the tables.
        listener: of the progress.
        stopwatch: for plain launches; by default that of the device.
        keep: is given all there is, every time that there is more; by default it writes ``request.out``.

    Raises:
        UserError: no CUDA device, or a file that cannot be written.
    """
    if request.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: PyTorch sees no CUDA device here")
    listener, keep = listener or Silent(), keep or request.save
    listener.step("measuring what this machine can do")
    settings = {**request.as_dict(), "providers": list(providers)}
    results = Results("squeeze", environment(request.device), settings, ceilings(request.device, 1 / request.processes))
    watches = _stopwatches(request.device, stopwatch)
    left, cases, others = request.seconds / request.processes, request.cases, OtherWork()
    for index, case in enumerate(cases):
        torch._dynamo.reset()  # one shape after the other would hit the limit of recompilations, and run uncompiled
        work = Workload(case)
        listener.step(f"{case.shape} {case.topology} {case.dtype}: building and checking")
        ready, refused = _make_ready(work, providers.values(), listener)
        results.rows += [
            Row(case.as_dict(), provider.name, mode, launch, status, reason, floor=provider.floor, facts=dict(facts))
            for provider, status, reason, facts in refused
            for mode in request.modes
            for launch in watches
        ]
        for number, mode in enumerate(request.modes):
            listener.step(f"{case.shape} {case.topology} {case.dtype}: timing {mode}")
            share = left / (len(cases) - index) / (len(request.modes) - number)
            spent = time.perf_counter()
            for launch, watch in watches.items():
                with others:
                    _measure(results, work, ready, mode, launch, watch, request.rounds, share / len(watches))
                results.environment["busy_cores_of_others"] = others.cores
                keep(results)
            left = max(0.0, left - (time.perf_counter() - spent))
        listener.done()
    results.complete = True
    keep(results)
    return results


@dataclass
class _Ready:
    """A provider that may be timed on a workload."""

    provider: Provider
    built: Built
    facts: dict[str, Any]


_Refusal = tuple[Provider, str, str, dict[str, Any]]


def _make_ready(
    work: Workload, providers: Iterable[Provider], listener: Listener
) -> tuple[list[_Ready], list[_Refusal]]:
    """Build and check all providers. Whatever compiles does so here, forward and backward, before any clock runs."""
    truth = Truth(work)
    ready: list[_Ready] = []
    refused: list[_Refusal] = []
    for provider in providers:
        reason = provider.why_not(work)
        if reason:
            refused.append((provider, "skipped", reason, {}))
            continue
        listener.step(f"{work.case.shape} {work.case.topology} {work.case.dtype}: {provider.name}")
        try:
            built = provider.build(work)
            facts: dict[str, Any] = {}
            if built.squeeze is not None:
                errors = truth.errors(built)
                facts = {"weight_error": errors.weight, "gradient_error": errors.gradient}
                wrong = truth.verdict(errors)
                if wrong:
                    refused.append((provider, "wrong", wrong, facts))
                    continue
                facts["saved_bytes"] = saved_bytes(built.squeeze, [*work.operands.values(), *built.parameters])
            for task in built.tasks.values():
                task.run(task.prepare())
        except UserError:
            raise
        except Exception as error:  # a provider that breaks is a result like any other, and the rest goes on
            refused.append((provider, "failed", _first_line(error), {}))
            continue
        ready.append(_Ready(provider, built, facts))
    return ready, refused


def _measure(
    results: Results,
    work: Workload,
    ready: Sequence[_Ready],
    mode: str,
    launch: str,
    watch: Stopwatch,
    rounds: int,
    seconds: float,
) -> None:
    """Time one mode of all providers in turns and add their rows."""
    tasks: dict[str, Task] = {}
    rows: dict[str, Row] = {}
    for entry in ready:
        facts = {**entry.facts, **entry.provider.amount(work, mode)}
        task = entry.built.tasks[mode]
        row = Row(work.case.as_dict(), entry.provider.name, mode, launch, floor=entry.provider.floor, facts=facts)
        rows[entry.provider.name] = row
        try:
            if work.case.device == "cuda" and launch == "plain":
                facts["launches"] = _launches(task)
                facts["host_us"] = cuda.host_us(task)
            tasks[entry.provider.name] = cuda.capture(task) if launch == "graph" else task
        except Exception as error:  # a provider that cannot be captured still has its plain launches
            row.status, row.reason = "failed", _first_line(error)
    if tasks:
        for name, samples in interleaved(tasks, rounds, seconds, watch).items():
            rows[name].processes = [samples]
    results.rows += rows.values()


def _launches(task: Task) -> int:
    states = [task.prepare() for _ in range(2)]  # counting warms up once; a graph runs backward only once
    return cuda.count_launches(lambda: task.run(states.pop()))


def _stopwatches(device: str, given: Stopwatch | None) -> dict[str, Stopwatch]:
    if device == "cpu":
        return {"plain": given or CpuStopwatch()}
    return {"graph": cuda.CudaStopwatch(graphed=True), "plain": given or cuda.CudaStopwatch(graphed=False)}


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
