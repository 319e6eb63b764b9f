"""Run a benchmark: build and check all candidates of a case, then time them interleaved, within a time budget."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..errors import UserError
from ..timing import CpuStopwatch, CudaStopwatch, Stopwatch, Task, capture, count_launches, host_us, interleaved
from .machine import OtherWork
from .results import Results, Row

Say = Callable[[str], object]  # hears of the progress
Save = Callable[[Results], object]  # gets all results whenever there are more


@dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """How to measure: ``seconds`` of timing over all cases; everything else comes on top.

    A candidate gets ``rounds`` samples where the time suffices, and at least `orepa.timing.LEAST_ROUNDS`.

    Raises:
        UserError: no CUDA device, or graphs on the CPU.
    """

    device: str = "cpu"  # or "cuda"
    modes: Sequence[str]  # the tasks of each candidate
    launches: Sequence[str] = ("plain",)  # on CUDA "graph" as well
    rounds: int = 50
    seconds: float = 60.0
    timed: Sequence[str] | None = None  # names of candidates, where others only serve to check these
    out: Path | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        if self.device == "cuda" and not torch.cuda.is_available():
            raise UserError("--device cuda: PyTorch sees no CUDA device here")
        if self.device == "cpu" and "graph" in self.launches:
            raise UserError("--cuda-graph: there are no CUDA graphs on the CPU")

    def save(self, results: Results) -> None:
        """Write results to ``out``, if there is one."""
        if self.out:
            results.save(self.out)


@dataclass
class Candidate:
    """A provider or variant on one case; see `orepa.bench.results.Row`."""

    name: str
    floor: bool = False
    tasks: Mapping[str, Task] = field(default_factory=dict)  # by mode; none where the status is not "ok"
    status: str = "ok"
    reason: str = ""
    facts: dict[str, Any] = field(default_factory=dict)


#: Builds and checks a candidate: fills in its tasks and facts, and returns its status and reason. Compilation happens here.
Build = Callable[[Candidate], tuple[str, str]]


def run(
    config: BenchConfig,
    results: Results,
    cases: Sequence[Any],
    candidates_of: Callable[[Any], Iterable[tuple[Candidate, Build]]],
    say: Say,
    stopwatch: Stopwatch | None = None,
    save: Save | None = None,
    on_host: bool = False,
) -> Results:
    """Fill in the rows of a benchmark.

    Args:
        config: how to measure.
        results: to complete.
        cases: what to measure; each has a method ``as_dict``.
        candidates_of: returns the candidates of a case; they are built in this order, before any clock runs.
        say: hears of the progress.
        stopwatch: for plain launches; by default that of the device.
        save: by default writes ``config.out``.
        on_host: whether to count launches, and time the host, on CUDA.
    """
    save = save or config.save
    watches: dict[str, Stopwatch] = {}
    for launch in config.launches:
        default = CpuStopwatch() if config.device == "cpu" else CudaStopwatch(graphed=launch == "graph")
        watches[launch] = stopwatch if stopwatch and launch == "plain" else default
    left, others = config.seconds, OtherWork()
    for index, case in enumerate(cases):
        torch._dynamo.reset()  # one case after the other would hit the limit of recompilations, and run uncompiled
        candidates = [_built(candidate, build, f"{case}", say) for candidate, build in candidates_of(case)]
        if config.timed is not None:
            candidates = [c for c in candidates if c.name in config.timed or c.status != "ok"]
        for number, mode in enumerate(config.modes):
            say(f"{case}: timing {mode}")
            share = left / (len(cases) - index) / (len(config.modes) - number) / len(watches)
            began = time.perf_counter()
            for launch, watch in watches.items():
                with others:
                    rows, tasks = _rows(case, candidates, mode, launch, on_host and config.device == "cuda")
                    for name, samples in interleaved(tasks, config.rounds, share, watch).items() if tasks else ():
                        rows[name].processes = [samples]
                results.rows += rows.values()
                results.environment["busy_cores_of_others"] = others.cores
                save(results)
            left = max(0.0, left - (time.perf_counter() - began))
        del candidates
        gc.collect()
        if config.device == "cuda":
            torch.cuda.empty_cache()
    results.complete = True
    save(results)
    return results


def _built(candidate: Candidate, build: Build, case: str, say: Say) -> Candidate:
    """Build a candidate; one that breaks is a result like any other, and the rest goes on."""
    say(f"{case}: building and checking {candidate.name}")
    try:
        candidate.status, candidate.reason = build(candidate)
    except UserError:
        raise
    except Exception as error:
        candidate.status, candidate.reason = "failed", _first_line(error)
    return candidate


def _rows(
    case: Any, candidates: Sequence[Candidate], mode: str, launch: str, on_host: bool
) -> tuple[dict[str, Row], dict[str, Task]]:
    """Return a row for each candidate, and the tasks of those to time."""
    rows: dict[str, Row] = {}
    tasks: dict[str, Task] = {}
    for c in candidates:
        facts = dict(c.facts)
        row = rows[c.name] = Row(case.as_dict(), c.name, mode, launch, c.status, c.reason, floor=c.floor, facts=facts)
        if c.status == "ok":
            try:
                if on_host and launch == "plain":
                    facts["launches"] = _launches(c.tasks[mode])
                    facts["host_us"] = host_us(c.tasks[mode])
                tasks[c.name] = capture(c.tasks[mode]) if launch == "graph" else c.tasks[mode]
            except Exception as error:  # one that cannot be captured still has its plain launches
                row.status, row.reason = "failed", _first_line(error)
    return rows, tasks


def _launches(task: Task) -> int:
    states = [task.prepare() for _ in range(2)]  # counting warms up once; a graph runs backward only once
    return count_launches(lambda: task.run(states.pop()))


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
