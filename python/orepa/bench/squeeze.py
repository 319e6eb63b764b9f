"""Measure the squeeze of single blocks: ``orepa bench squeeze``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
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
from .providers import MODES, Provider
from .results import Results
from .runner import Build, Candidate, Save, Say


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


def run(
    config: SqueezeConfig,
    providers: Mapping[str, Provider],
    say: Say = lambda _text: None,
    stopwatch: Stopwatch | None = None,
    save: Save | None = None,
) -> Results:
    """Check and time every provider on every case: see `orepa.bench.runner.run`."""

    def candidates_of(case: SqueezeCase) -> Iterator[tuple[Candidate, Build]]:
        problem = Problem(case)
        truth = Truth(problem)
        for name, provider in providers.items():
            yield Candidate(name, provider.floor), partial(_build, provider, problem, truth)

    settings: dict[str, Any] = {**asdict(config), "shapes": [str(s) for s in config.shapes], "out": None}
    results = Results("squeeze", environment(config.device), {**settings, "providers": list(providers)})
    return runner.run(config, results, config.cases, candidates_of, say, stopwatch, save, on_host=True)


def _build(provider: Provider, problem: Problem, truth: Truth, candidate: Candidate) -> tuple[str, str]:
    """Build and check a provider, forward and backward."""
    reason = provider.why_not(problem)
    if reason:
        return "skipped", reason
    built = provider.build(problem)
    if built.squeeze is not None:
        errors = truth.errors(built)
        candidate.facts = {"weight_error": errors.weight, "gradient_error": errors.gradient}
        mistake = truth.mistake(errors)
        if mistake:
            return "wrong", mistake
        operands = [*problem.operands.values(), *built.parameters]
        candidate.facts["saved_bytes"] = saved_bytes(built.squeeze, operands)
    for task in built.tasks.values():
        task.run(task.prepare())
    candidate.tasks = built.tasks
    return "ok", ""
