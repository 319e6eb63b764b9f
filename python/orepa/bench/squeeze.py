"""Measure the squeeze of single blocks: ``orepa bench squeeze``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from ..errors import UserError
from ..timing import Stopwatch, saved_bytes
from ..topology.language import topologies
from . import runner
from .check import Truth
from .machine import environment
from .problem import DEFAULT, DTYPES, Problem, Shape, SqueezeCase
from .providers import Provider
from .results import Results
from .roofline import MODES
from .runner import Candidate, Save, Say


@dataclass(frozen=True, kw_only=True)
class SqueezeConfig(runner.BenchConfig):
    """What to measure, and how.

    Raises:
        UserError: a name that does not exist, or a topology that does not fit a shape.
    """

    modes: Sequence[str] = MODES
    shapes: Sequence[Shape] = DEFAULT
    topology: str | None = None  # of all blocks; None: see `Shape.topology`
    dtypes: Sequence[str] = ("fp32",)  # of the kernels

    def __post_init__(self) -> None:
        super().__post_init__()
        topology = [self.topology] if self.topology else []
        checked = (("dtypes", self.dtypes, DTYPES), ("mode", self.modes, MODES), ("topology", topology, topologies()))
        for option, values, allowed in checked:
            for value in values:
                if value not in allowed:
                    raise UserError(f"--{option} must be among {', '.join(allowed)}, got {value!r}")
        for case in self.cases:
            case.plan()  # reports a misfit before an hour of measuring

    @property
    def cases(self) -> list[SqueezeCase]:
        """Every combination, shapes innermost."""
        pairs = ((dtype, shape) for dtype in self.dtypes for shape in self.shapes)
        return [SqueezeCase(shape, self.topology or shape.topology, dtype, self.device) for dtype, shape in pairs]

    def as_dict(self) -> dict[str, Any]:
        """Return plain data, for JSON."""
        return {**asdict(self), "shapes": [str(s) for s in self.shapes], "out": None}


def run(
    config: SqueezeConfig,
    providers: Mapping[str, Provider],
    say: Say = lambda _text: None,
    stopwatch: Stopwatch | None = None,
    save: Save | None = None,
) -> Results:
    """Check and time every provider on every case, in this process: see `orepa.bench.runner.run`."""

    def build(case: SqueezeCase) -> list[Candidate]:
        problem = Problem(case)
        truth = Truth(problem)
        candidates = []
        for name, provider in providers.items():
            say(f"{case}: building and checking {name}")
            candidates.append(runner.build_safely(name, partial(_build, provider, problem, truth), provider.floor))
        return candidates

    settings = {**config.as_dict(), "providers": list(providers)}
    results = Results("squeeze", environment(config.device), settings)
    return runner.run(config, results, config.cases, build, say, stopwatch, save, on_host=True)


def _build(provider: Provider, problem: Problem, truth: Truth) -> Candidate:
    """Build and check a provider, forward and backward."""
    candidate = Candidate(provider.name, floor=provider.floor)
    candidate.reason = provider.why_not(problem)
    if candidate.reason:
        candidate.status = "skipped"
        return candidate
    built = provider.build(problem)
    if built.squeeze is not None:
        errors = truth.errors(built)
        candidate.facts = {"weight_error": errors.weight, "gradient_error": errors.gradient}
        candidate.reason = truth.mistake(errors)
        if candidate.reason:
            candidate.status = "wrong"
            return candidate
        operands = [*problem.operands.values(), *built.parameters]
        candidate.facts["saved_bytes"] = saved_bytes(built.squeeze, operands)
    for task in built.tasks.values():
        task.run(task.prepare())
    candidate.tasks = built.tasks
    candidate.facts_of_mode = {mode: provider.amount(problem, mode) for mode in built.tasks}
    return candidate
