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
    """What to measure, and how; a UserError where there is no CUDA device, and for graphs on the CPU.

    Timing takes ``seconds`` over all cases; everything else comes on top. A candidate gets ``rounds`` samples where the time
    suffices, and at least `orepa.timing.LEAST_ROUNDS`.
    """

    cases: Sequence[Any]  # each has ``as_dict``; of steps, pairs of a case and its variants, twins first
    modes: Sequence[str]  # the tasks of each candidate
    device: str = "cpu"  # or "cuda"
    launches: Sequence[str] = ("plain",)  # on CUDA "graph" as well
    rounds: int = 50
    seconds: float = 60.0
    timed: Sequence[str] | None = None  # names of candidates, where others only serve to check these
    out: Path | None = None  # written whenever there are more results
    settings: Mapping[str, Any] = field(default_factory=dict)  # the user's options, for the file

    def __post_init__(self) -> None:
        if self.device == "cuda" and not torch.cuda.is_available():
            raise UserError("--device cuda: PyTorch sees no CUDA device here")
        if self.device == "cpu" and "graph" in self.launches:
            raise UserError("--cuda-graph: there are no CUDA graphs on the CPU")


@dataclass
class Candidate:
    """A provider or variant on one case; see `orepa.bench.results.Row`."""

    name: str
    floor: bool = False
    tasks: Mapping[str, Task] = field(default_factory=dict)  # by mode; none where the status is not "ok"
    status: str = "ok"
    reason: str = ""
    facts: dict[str, Any] = field(default_factory=dict)
    modes: Sequence[str] | None = None  # it has a row for these only; by default for all of the config's


#: Builds and checks a candidate: fills in its tasks and facts, and returns its status and reason. Compilation happens here.
Build = Callable[[Candidate], tuple[str, str]]


def run(
    results: Results,
    config: BenchConfig,
    candidates_of: Callable[[Any], Iterable[tuple[Candidate, Build]]],
    say: Say,
    stopwatch: Stopwatch | None = None,
    save: Save | None = None,
) -> Results:
    """Fill in the rows of a benchmark.

    Args:
        results: to complete.
        config: what to measure, and how.
        candidates_of: returns the candidates of a case, to be built in this order, before any clock runs.
        say: hears of the progress.
        stopwatch: for plain launches; by default that of the device.
        save: by default writes ``config.out``.
    """
    save = save or (lambda results: results.save(config.out) if config.out else None)
    watches: dict[str, Stopwatch] = {}
    for launch in config.launches:
        watches[launch] = CpuStopwatch() if config.device == "cpu" else CudaStopwatch(graphed=launch == "graph")
    if stopwatch:
        watches["plain"] = stopwatch
    left, others = config.seconds, OtherWork()
    for index, case in enumerate(config.cases):
        torch._dynamo.reset()  # one case after the other would hit the limit of recompilations, and run uncompiled
        candidates = [_built(candidate, build) for candidate, build in candidates_of(case)]
        if config.timed is not None:
            candidates = [c for c in candidates if c.name in config.timed or c.status != "ok"]
        for number, mode in enumerate(config.modes):
            say(f"{case}: timing {mode}")
            share = left / (len(config.cases) - index) / (len(config.modes) - number) / len(watches)
            began = time.perf_counter()
            for launch, watch in watches.items():
                with others:
                    chosen = [c for c in candidates if mode in (c.modes or config.modes)]
                    rows, tasks = _rows(case, chosen, mode, launch, config.device)
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


def _built(candidate: Candidate, build: Build) -> Candidate:
    """Build a candidate; one that breaks is a result like any other, and the rest goes on."""
    try:
        candidate.status, candidate.reason = build(candidate)
    except UserError:
        raise
    except Exception as error:
        candidate.status, candidate.reason = "failed", _first_line(error)
    return candidate


def _rows(
    case: Any, candidates: Sequence[Candidate], mode: str, launch: str, device: str
) -> tuple[dict[str, Row], dict[str, Task]]:
    """Return a row for each candidate, and the tasks of those to time."""
    rows: dict[str, Row] = {}
    tasks: dict[str, Task] = {}
    for c in candidates:
        facts = dict(c.facts)
        row = rows[c.name] = Row(case.as_dict(), c.name, mode, launch, c.status, c.reason, floor=c.floor, facts=facts)
        if c.status == "ok":
            try:
                if device == "cuda" and launch == "plain" and mode != "step":  # it takes 100 runs: too long for steps
                    facts |= {"launches": _launches(c.tasks[mode]), "host_us": host_us(c.tasks[mode])}
                tasks[c.name] = capture(c.tasks[mode]) if launch == "graph" else c.tasks[mode]
            except Exception as error:  # one that cannot be captured still has its plain launches
                row.status, row.reason = "failed", _first_line(error)
    return rows, tasks


def _launches(task: Task) -> int:
    states = [task.prepare() for _ in range(2)]  # counting warms up once; a graph runs backward only once
    return count_launches(lambda: task.run(states.pop()))


def _first_line(error: Exception) -> str:
    return ": ".join([type(error).__name__, *str(error).strip().splitlines()[:1]])
