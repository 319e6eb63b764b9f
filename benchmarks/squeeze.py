"""Run ``orepa bench squeeze`` with two lower bounds (floors) more, in several fresh processes, and print rates.

    python benchmarks/squeeze.py [--models NAMES] [--processes N] [--plot FILE.png] [options of orepa bench squeeze]

The floors are ``gemms``, the bare matrix products, and ``copy``, a copy of the bytes that must move. The processes measure one
after the other, so that the spread includes how far processes differ.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import processes
import torch
from plots import plot
from roofline import amount, products, rates_table

from orepa.bench import providers, squeeze
from orepa.bench.cli import add_squeeze_options, check_folders, finish, names, require, say, squeeze_config
from orepa.bench.problem import Problem, Shape, parse_shapes
from orepa.bench.providers import Built, Provider
from orepa.bench.results import Results
from orepa.bench.runner import BenchConfig, Save, Say
from orepa.bench.tables import render
from orepa.errors import UserError
from orepa.timing import Task, function
from orepa.train.config import int_at_least

#: returns all providers to choose from; picklable
Providers = Callable[[], Mapping[str, Provider]]

#: The distinct convolutions of timm's models that a norm follows, in the model's order.
MODELS = {
    "resnet18": parse_shapes(
        "64,3,7; 64,64,3; 128,64,3; 128,128,3; 128,64,1; 256,128,3; 256,256,3; 256,128,1; 512,256,3; 512,512,3; 512,256,1"
    ),
    "resnet50": parse_shapes(
        "64,3,7; 64,64,1; 64,64,3; 256,64,1; 64,256,1; 128,256,1; 128,128,3; 512,128,1; 512,256,1; 128,512,1; 256,512,1;"
        "256,256,3; 1024,256,1; 1024,512,1; 256,1024,1; 512,1024,1; 512,512,3; 2048,512,1; 2048,1024,1; 512,2048,1"
    ),
    "resnext50_32x4d": parse_shapes(
        "64,3,7; 128,64,1; 128,128,3,32; 256,128,1; 256,64,1; 128,256,1; 256,256,1; 256,256,3,32; 512,256,1; 256,512,1;"
        "512,512,1; 512,512,3,32; 1024,512,1; 512,1024,1; 1024,1024,1; 1024,1024,3,32; 2048,1024,1; 1024,2048,1"
    ),
    "repvgg_a0": parse_shapes(
        "48,3,3; 48,3,1; 48,48,3; 48,48,1; 96,48,3; 96,48,1; 96,96,3; 96,96,1; 192,96,3; 192,96,1; 192,192,3; 192,192,1;"
        "1280,192,3; 1280,192,1"
    ),
}


def model_shapes(names: Iterable[str]) -> tuple[Shape, ...]:
    """Return the distinct blocks of some of `MODELS` together, or with ``"all"`` of all.

    Raises:
        UserError: a name that is not in `MODELS`.
    """
    chosen: dict[Shape, None] = {}
    for name in names:
        if name != "all" and name not in MODELS:
            raise UserError(f"--models must be all or among {', '.join(MODELS)}, got {name!r}")
        for model in MODELS if name == "all" else (name,):
            chosen.update(dict.fromkeys(MODELS[model]))
    return tuple(chosen)


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
    text = f"the blocks of {', '.join(MODELS)}; or all (instead of --shapes)"
    parser.add_argument("--models", metavar="NAMES", help=text)
    text = "one after the other (default: 3 on the CPU, 1 on CUDA): the more, the narrower the spread"
    parser.add_argument("--processes", type=int_at_least(1), metavar="N", help=text)
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
    config, chosen = config_of(args, choice)
    # How far processes differ was measured on CPUs only, and starting on CUDA takes longer.
    number = args.processes or {"cpu": 3, "cuda": 1}[config.device]

    def save(results: Results) -> None:
        results.settings |= {"processes": number, "seconds": args.seconds}
        if args.out:
            results.save(args.out)

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


def config_of(args: argparse.Namespace, choice: Providers) -> tuple[BenchConfig, Mapping[str, Provider]]:
    """Return what to measure, and the chosen providers."""
    if args.models and args.shapes:
        raise UserError("--models: not allowed with --shapes")
    shapes = model_shapes(names(args.models)) if args.models else ()
    text = ";".join(f"{s.out_channels},{s.in_channels},{s.kernel_size},{s.groups}" for s in shapes)
    return squeeze_config(argparse.Namespace(**{**vars(args), "shapes": text or args.shapes}), choice())


def _job(args: argparse.Namespace, choice: Providers, number: int, tell: Say, save: Save) -> Results:
    """Measure in one of several processes."""
    config, chosen = config_of(args, choice)
    return squeeze.run(replace(config, seconds=config.seconds / number), chosen, tell, save=save)


def main(argv: list[str] | None = None) -> int:
    """Run the script; return the exit code."""
    return run(parser_of(__doc__).parse_args(argv), all_providers)


if __name__ == "__main__":
    sys.exit(main())
