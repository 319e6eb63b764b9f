"""Measure the squeeze of single blocks: ``orepa bench squeeze``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial

from ..timing import Stopwatch, saved_bytes
from . import runner
from .check import Truth
from .machine import environment
from .problem import Problem, SqueezeCase
from .providers import Provider
from .results import Results
from .runner import BenchConfig, Build, Candidate, Save, Say


def run(
    config: BenchConfig,
    providers: Mapping[str, Provider],
    say: Say = lambda _text: None,
    stopwatch: Stopwatch | None = None,
    save: Save | None = None,
) -> Results:
    """Check and time every provider on every case, each a `SqueezeCase`: see `orepa.bench.runner.run`."""

    def candidates_of(case: SqueezeCase) -> Iterator[tuple[Candidate, Build]]:
        problem = Problem(case)
        truth = Truth(problem)
        for name, provider in providers.items():
            say(f"{case}: building and checking {name}")
            yield Candidate(name, provider.floor), partial(_build, provider, problem, truth)

    settings = {**config.settings, "providers": list(providers)}
    results = Results("squeeze", environment(config.device), settings)
    return runner.run(results, config, candidates_of, say, stopwatch, save)


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
