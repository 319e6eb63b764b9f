"""Run ``orepa bench squeeze`` with two lower bounds (floors) more, in several fresh processes, and print rates.

    python benchmarks/squeeze.py [--processes N] [--plot FILE.png] [options of orepa bench squeeze]

The floors are ``gemms``, the bare matrix products, and ``copy``, a copy of the bytes that must move. The processes measure one
after the other, so that the spread includes how far processes differ.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import processes
import torch
from plots import plot
from roofline import amount, products, rates_table

from orepa.bench import providers, squeeze
from orepa.bench.cli import add_squeeze_options, check_folders, count, finish, require, say, squeeze_config
from orepa.bench.problem import Problem
from orepa.bench.providers import Built, Provider
from orepa.bench.results import Results
from orepa.bench.runner import Save, Say
from orepa.bench.tables import render
from orepa.errors import UserError
from orepa.timing import Task, function

#: returns all providers to choose from; picklable
Providers = Callable[[], Mapping[str, Provider]]


# --- floors ---------------------------------------------------------------------------------------------------------------


class Gemms(Provider):
    """The float32 matrix products alone, by the vendor's library, into allocated memory, and those of their gradients."""

    name, floor = "gemms", True

    def why_not(self, problem: Problem) -> str:
        return "" if products(problem.plan) else "the block composes no layers, so it has no matrix product"

    def build(self, problem: Problem) -> Built:
        forward: list[Callable[[], Any]] = []
        backward: list[Callable[[], Any]] = []
        for p in products(problem.plan):
            shapes = ((p.batch, p.m, p.k), (p.batch, p.k, p.n), (p.batch, p.m, p.n))
            a, b, c = (torch.randn(shape, device=problem.case.device) for shape in shapes)
            product: Callable[..., Any] = torch.bmm
            if p.batch == 1:  # the plain product has less overhead than a batch of one
                a, b, c, product = a[0], b[0], c[0], torch.mm
            forward.append(partial(product, a, b, out=c))
            backward.append(partial(product, c, b.mT, out=torch.zeros_like(a)))
            backward.append(partial(product, a.mT, c, out=torch.zeros_like(b)))
        return _floor(forward, backward)


class Copy(Provider):
    """A copy that moves as many bytes as the squeeze has to: half of them read, half of them written."""

    name, floor = "copy", True

    def build(self, problem: Problem) -> Built:
        def copy(size: int) -> Callable[[], Any]:
            source = torch.ones(size, dtype=torch.uint8, device=problem.case.device)
            target = torch.zeros_like(source)
            return partial(target.copy_, source)

        return _floor(*([copy(amount("copy", problem, mode)["bytes"] // 2)] for mode in ("forward", "backward")))


def _floor(forward: list[Callable[[], Any]], backward: list[Callable[[], Any]]) -> Built:
    def task(calls: list[Callable[[], Any]]) -> Task:
        return function(lambda: [call() for call in calls])

    return Built({"forward": task(forward), "backward": task(backward), "both": task(forward + backward)})


def all_providers() -> dict[str, Provider]:
    """Return every provider of the package, and the floors, by name."""
    floors: list[Provider] = [Gemms(), Copy()]
    return {**providers.all_providers(), **{floor.name: floor for floor in floors}}


# --- the script -----------------------------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    """argparse, with errors of one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"squeeze: error: {message}\n")


def parser_of(description: str | None) -> argparse.ArgumentParser:
    """Return a parser of the options that `run` reads."""
    parser = _Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    text = "one after the other (default: 3 on the CPU, 1 on CUDA): the more, the narrower the spread"
    parser.add_argument("--processes", type=count, metavar="N", help=text)
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw the times")
    add_squeeze_options(parser)
    return parser


def run(args: argparse.Namespace, choice: Providers) -> int:
    """Measure, print tables and rates, and return the exit code; one line on stderr for a mistake of the user's."""
    try:
        return _run(args, choice)
    except UserError as error:
        print(f"squeeze: error: {error}", file=sys.stderr)
        return 2


def _run(args: argparse.Namespace, choice: Providers) -> int:
    require("scipy", *(("matplotlib",) if args.plot else ()))
    check_folders(args.plot)
    config, chosen = squeeze_config(args, choice())
    # How far processes differ was measured on CPUs only, and starting on CUDA takes longer.
    number = args.processes or {"cpu": 3, "cuda": 1}[config.device]

    def save(results: Results) -> None:
        results.settings |= {"processes": number, "seconds": args.seconds}
        config.save(results)

    if number == 1:
        results = squeeze.run(config, chosen, say, save=save)
    else:
        results = processes.run([partial(_job, args, choice, number)] * number, say, save)
    code = finish(results, args.out)
    if results.timed:
        print(f"\nrates\n\n{render(*rates_table(results), text=4)}")
    if args.plot:
        plot(results, args.plot)
        print(f"written to {args.plot}")
    return code


def _job(args: argparse.Namespace, choice: Providers, number: int, tell: Say, save: Save) -> Results:
    """Measure in one of several processes."""
    config, chosen = squeeze_config(args, choice())
    return squeeze.run(replace(config, seconds=config.seconds / number), chosen, tell, save=save)


def main(argv: list[str] | None = None) -> int:
    """Run the script; return the exit code."""
    return run(parser_of(__doc__).parse_args(argv), all_providers)


if __name__ == "__main__":
    sys.exit(main())
