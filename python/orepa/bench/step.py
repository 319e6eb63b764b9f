"""``orepa bench step``: a whole training step, in every way in which a user could train."""

from __future__ import annotations

import functools
import gc
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import UserError
from ..module_info import count_parameters
from ..timing import CpuStopwatch, Stopwatch, Task, function, interleaved
from ..train.model import create_plain, model_arguments
from . import cuda, memory, step_check
from .contestants import Contestant, perturb
from .machine import environment
from .providers import configure_inductor
from .results import Results, Row
from .squeeze import Listener, Silent
from .training_step import TrainingStep

AUTOCAST = {"none": None, "bf16": torch.bfloat16, "fp16": torch.float16}
LAUNCHES = ("graph", "plain")
CLASSES = 1000


@dataclass(frozen=True)
class Case:
    """What is trained.

    Args:
        model: timm's name.
        batch: images.
        size: of the images, in pixels.
        autocast: a key of `AUTOCAST`.
        layout: ``"contiguous"`` or ``"channels_last"``.
        device: ``"cpu"`` or ``"cuda"``.
        components: of the blocks, in a sweep.
    """

    model: str
    batch: int
    size: int
    autocast: str = "none"
    layout: str = "contiguous"
    device: str = "cpu"
    components: str = ""

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for JSON: it identifies the case."""
        return {name: value for name, value in asdict(self).items() if name != "components" or value}

    def __str__(self) -> str:
        return f"{self.model}, batch {self.batch}{f', {self.components}' if self.components else ''}"


@dataclass(frozen=True)
class Request:
    """What to measure.

    Args:
        cases: each with its contestants, twins before those that refer to them.
        launches: of `LAUNCHES`; on the CPU there is but ``"plain"``.
        rounds: at most so many samples each.
        seconds: of measuring, over all cases; building, compiling and checking come on top.
        out: JSON file, written anew after every case.
    """

    cases: Sequence[tuple[Case, Sequence[Contestant]]]
    launches: Sequence[str] = ("plain",)
    rounds: int = 20
    seconds: float = 60.0
    out: Path | None = field(default=None, compare=False)

    @property
    def device(self) -> str:
        return self.cases[0][0].device


class StepStopwatch(CpuStopwatch):
    """The wall clock for calls long enough to be a sample each."""

    def calls(self, task: Task) -> int:
        self.sample(task, 1)
        return 1


def run(
    request: Request,
    settings: Mapping[str, Any],
    listener: Listener | None = None,
    stopwatch: Stopwatch | None = None,
    compiler: Callable[[nn.Module], Any] | None = None,
) -> Results:
    """Check, measure and time every contestant of every case.

    Args:
        request: what to measure.
        settings: what the user asked for, for the file.
        listener: of the progress, a step per case.
        stopwatch: for plain launches; by default that of the device.
        compiler: of models; by default `torch.compile`.

    Raises:
        UserError: no CUDA device, graphs on the CPU, a model that timm cannot build, or a file that cannot be written.
    """
    if request.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: PyTorch sees no CUDA device here")
    if request.device == "cpu" and "graph" in request.launches:
        raise UserError("--cuda-graph: there are no CUDA graphs on the CPU")
    listener = listener or Silent()
    results = Results("step", environment(request.device), dict(settings))
    watches: dict[str, Stopwatch] = {}
    for launch in request.launches:
        own = StepStopwatch() if request.device == "cpu" else cuda.CudaStopwatch(graphed=launch == "graph")
        watches[launch] = stopwatch if stopwatch and launch == "plain" else own
    left = request.seconds
    for index, (case, contestants) in enumerate(request.cases):
        torch._dynamo.reset()  # one model after the other would hit the limit of recompilations, and run uncompiled
        configure_inductor()
        bench = _Bench(case, compiler or functools.partial(torch.compile, dynamic=False))
        for contestant in contestants:
            listener.step(f"{case}: {contestant.name}: building, checking, measuring memory")
            bench.add(contestant)
        for number, (launch, watch) in enumerate(watches.items()):
            listener.step(f"{case}: timing")
            share = left / (len(request.cases) - index) / (len(watches) - number)
            began = time.perf_counter()
            rows = bench.refused_rows(launch) + bench.timed_rows(launch, watch, request.rounds, share)
            by_name = {row.provider: row for row in rows}
            results.rows += [by_name[contestant.name] for contestant in contestants]
            left = max(0.0, left - (time.perf_counter() - began))
            if request.out:
                results.save(request.out)
        del bench
        gc.collect()
        if request.device == "cuda":
            torch.cuda.empty_cache()
        listener.done()
    results.complete = True
    if request.out:
        results.save(request.out)
    return results


class _Bench:
    """One case: its batch, its plain model, and the contestants that may be timed."""

    def __init__(self, case: Case, compiler: Callable[[nn.Module], Any]) -> None:
        self.case, self._compiler = case, compiler
        torch.manual_seed(0)
        self._plain = create_plain(case.model, model_arguments(case.model, CLASSES, 3, case.size), case.size)
        form = torch.channels_last if case.layout == "channels_last" else torch.contiguous_format
        self._images = torch.randn(case.batch, 3, case.size, case.size).to(case.device, memory_format=form)
        self._labels = torch.randint(CLASSES, (case.batch,)).to(case.device)
        self._form = form
        self._ready: dict[str, tuple[TrainingStep, dict[str, Any]]] = {}
        self._refused: list[tuple[str, str, str, dict[str, Any]]] = []
        self._states: dict[str, tuple[dict[str, Any], step_check.Twin]] = {}  # of those that are someone's twin
        _warm_up(case.device)

    def add(self, contestant: Contestant) -> None:
        """Build, check and measure one contestant; whatever compiles does so here, before any clock runs."""
        try:
            status, reason, facts = self._add(contestant)
        except UserError:
            raise
        except Exception as error:  # one that breaks, or lacks memory, is a result like any other, and the rest goes on
            status, reason, facts = "failed", _first_line(error), {}
        if status != "ok":
            self._refused.append((contestant.name, status, reason, facts))

    def _add(self, contestant: Contestant) -> tuple[str, str, dict[str, Any]]:
        case, autocast = self.case, AUTOCAST[self.case.autocast]
        gc.collect()
        before = memory.occupied(case.device)
        torch.manual_seed(0)
        model = contestant.build(self._plain).train()
        perturb(model, torch.Generator().manual_seed(0))
        twin = self._states.get(contestant.twin)
        if twin is not None:
            model.load_state_dict(twin[0])
        elif contestant.twin != contestant.name:
            return "skipped", f"{contestant.twin}, which it is checked against, did not run", {}
        model = model.to(case.device, memory_format=self._form)  # type: ignore[call-overload]
        reason = contestant.why_not(model, autocast)
        if reason:
            return "skipped", reason, {}
        state = {name: value.detach().clone().cpu() for name, value in model.state_dict().items()}
        compiler = self._compiler if contestant.compiled else None
        step = TrainingStep(model, self._images, self._labels, autocast, compiler)
        observed = step_check.observe(step)
        facts: dict[str, Any] = {"parameter_count": count_parameters(model), "loss": observed.loss}
        wrong = step_check.verdict(observed, twin[1] if twin else None, facts)
        if wrong:
            return "wrong", wrong, facts
        if contestant.twin == contestant.name:
            exact = TrainingStep(model, self._images, self._labels) if autocast else None
            reference = step_check.as_twin(observed, step_check.observe(exact) if exact else None)
            self._states[contestant.name] = (state, reference)
        step()  # gives the optimizer its state
        facts |= memory.measure(step, memory.recorder(case.device), before, eager=not contestant.compiled)
        self._ready[contestant.name] = (step, facts)
        return "ok", "", facts

    def refused_rows(self, launch: str) -> list[Row]:
        return [
            Row(self.case.as_dict(), name, "step", launch, status, reason, facts=dict(facts))
            for name, status, reason, facts in self._refused
        ]

    def timed_rows(self, launch: str, watch: Stopwatch, rounds: int, seconds: float) -> list[Row]:
        """Time all contestants in turns."""
        rows: dict[str, Row] = {}
        tasks: dict[str, Task] = {}
        for name, (step, facts) in self._ready.items():
            rows[name] = Row(self.case.as_dict(), name, "step", launch, facts=dict(facts))
            try:
                tasks[name] = cuda.capture(function(step)) if launch == "graph" else function(step)
            except Exception as error:  # one that cannot be captured still has its plain launches
                rows[name].status, rows[name].reason = "failed", _first_line(error)
        if tasks:
            for name, samples in interleaved(tasks, rounds, seconds, watch).items():
                rows[name].processes = [samples]
        for step, _ in self._ready.values():
            step.clear()
        return list(rows.values())


def _warm_up(device: str) -> None:
    """Make the libraries take their workspaces now, so that no contestant is charged for them."""
    if device == "cuda":
        a = torch.ones(64, 64, device=device, requires_grad=True)
        (a @ a).sum().backward()
        torch.cuda.synchronize()


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
