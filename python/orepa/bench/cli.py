"""The options of ``orepa bench``. Imports nothing heavy: the commands do, when they run."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UserError
from .options import check_folders, count, names, require, seconds
from .step_cli import add_command as add_step

if TYPE_CHECKING:
    from .providers import Provider
    from .results import Results
    from .squeeze import Listener, Request


def add_commands(commands: Any) -> None:
    """Add ``bench`` and its own commands to a parser's sub-commands."""
    bench = commands.add_parser("bench", help="measure the squeeze", description="Benchmarks, and what became of them.")
    inner = bench.add_subparsers(title="commands", required=True, metavar="COMMAND")

    squeeze = inner.add_parser(
        "squeeze",
        help="forward and backward of one squeeze, against everything a user could pick instead",
        description="Time the squeeze of single blocks: the plain einsum formulation, torch.compile of it, every backend "
        "that runs here, and two floors (the bare matrix products; a copy of the bytes that must move). Each is first held "
        "against the float64 reference; one that is wrong is reported and not timed. Compilation is never timed. All of it is "
        "done in several fresh processes, one after the other, so that the reported spread knows how far processes differ.",
    )
    squeeze.set_defaults(run=_squeeze)
    _add_squeeze_options(squeeze)

    add_step(inner)

    compare = inner.add_parser(
        "compare",
        help="two result files: ratios, and whether they are more than noise",
        description="Compare two result files of the same benchmark.",
    )
    compare.set_defaults(run=_compare)
    compare.add_argument("before", type=Path, metavar="A.json")
    compare.add_argument("after", type=Path, metavar="B.json")

    show = inner.add_parser(
        "show",
        help="the tables of a result file, whole or partial",
        description="Print a result file as tables, or plot it.",
    )
    show.set_defaults(run=_show)
    show.add_argument("results", type=Path, metavar="FILE.json")
    show.add_argument("--plot", type=Path, metavar="FILE.png", help="draw it as well")


def _add_squeeze_options(parser: argparse.ArgumentParser) -> None:
    what = parser.add_argument_group("what")
    blocks = what.add_mutually_exclusive_group()
    blocks.add_argument("--shapes", metavar="O,I,k[,g];...", help="blocks (default: 3x3, 64 to 512 channels)")
    blocks.add_argument(
        "--models", metavar="NAMES", help="the blocks of: resnet18, resnet50, resnext50_32x4d, repvgg_a0; or all"
    )
    what.add_argument("--topology", metavar="NAME", help="of all blocks (default: what `prepare` chooses by size)")
    what.add_argument("--dtypes", default="fp32", metavar="LIST", help="of the kernels: fp32,bf16,fp16 (default: fp32)")
    what.add_argument("--mode", choices=("forward", "backward", "both", "all"), default="all", help="default: all")
    what.add_argument("--providers", metavar="LIST", help="such as eager,compile,gemms,copy (default: all)")
    what.add_argument("--against", type=Path, metavar="DIR", help="add the authors' code, from your checkout of it")

    how = parser.add_argument_group("how")
    how.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: cuda, or else cpu")
    how.add_argument("--threads", type=count, metavar="N", help="of the CPU (default: PyTorch's choice)")
    how.add_argument(
        "--precision",
        choices=("highest", "high", "medium"),
        default="highest",
        help="of float32 products (default: highest)",
    )
    how.add_argument(
        "--processes",
        type=count,
        metavar="N",
        help="to measure in, one after the other (default: 3 on the CPU, 1 on CUDA): the more, the narrower the spread; one "
        "cannot tell how far processes differ",
    )
    how.add_argument(
        "--rounds", type=count, default=50, metavar="N", help="samples of each at most, in each process (default: 50)"
    )
    how.add_argument(
        "--seconds",
        type=seconds,
        default=45.0,
        metavar="X",
        help="of measuring, split over the processes; starting, compiling and checking come on top (default: 45)",
    )

    files = parser.add_argument_group("files")
    files.add_argument("--out", type=Path, metavar="FILE.json", help="results with raw samples, written as they come")
    files.add_argument("--plot", type=Path, metavar="FILE.png", help="times over block size, with the floors drawn in")


def _squeeze(args: argparse.Namespace) -> int:
    require("rich", *(("matplotlib",) if args.plot else ()))
    from . import processes, squeeze, tables

    request, providers = _asked(args)
    check_folders(args.out, args.plot)
    with tables.progress(len(request.cases) * request.processes) as bar:
        if request.processes == 1:
            results = squeeze.run(request, providers, bar)
        else:
            results = processes.run([partial(_job, args)] * request.processes, bar, request.save)
    tables.show(results)
    _plot(results, args.plot)
    if args.out:
        print(f"written to {args.out}")
    return 1 if results.lost or any(row.status == "wrong" for row in results.rows) else 0


def _job(args: argparse.Namespace, listener: Listener, keep: Callable[[Results], None]) -> Results:
    """What each of several processes does."""
    from . import squeeze

    request, providers = _asked(args)
    return squeeze.run(request, providers, listener, keep=keep)


def _asked(args: argparse.Namespace) -> tuple[Request, dict[str, Provider]]:
    """What to measure and who; sets up torch in this process for it.

    Raises:
        UserError: an option that cannot be met.
    """
    import torch

    from . import squeeze
    from .providers import everything
    from .shapes import DEFAULT, model_shapes, parse_shapes
    from .work import MODES

    providers = everything()
    if args.against:
        from .authors import Authors

        providers = {"eager": providers.pop("eager"), "authors": Authors(args.against), **providers}
    if args.providers is not None:
        asked = names(args.providers)
        if not asked or any(name not in providers for name in asked):
            raise UserError(f"--providers must be among {', '.join(providers)}, got {args.providers!r}")
        providers = {name: provider for name, provider in providers.items() if name in asked}
    shapes = parse_shapes(args.shapes) if args.shapes else model_shapes(names(args.models)) if args.models else DEFAULT
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.set_float32_matmul_precision(args.precision)
    device = ("cuda" if torch.cuda.is_available() else "cpu") if args.device == "auto" else args.device
    request = squeeze.Request(
        shapes=shapes,
        topology=args.topology,
        dtypes=names(args.dtypes),
        device=device,
        modes=MODES if args.mode == "all" else (args.mode,),
        rounds=args.rounds,
        seconds=args.seconds,
        # What differs between processes has been measured on CPUs only, and starting on CUDA takes longer.
        processes=args.processes or {"cpu": 3, "cuda": 1}[device],
        out=args.out,
    )
    return request, providers


def _compare(args: argparse.Namespace) -> int:
    require("rich")
    from .compare import compare
    from .results import load
    from .tables import show_comparison

    show_comparison(compare(load(args.before), load(args.after)))
    return 0


def _show(args: argparse.Namespace) -> int:
    require("rich", *(("matplotlib",) if args.plot else ()))
    from . import step_tables, tables
    from .results import load

    check_folders(args.plot)
    results = load(args.results)
    (step_tables if results.benchmark == "step" else tables).show(results)
    _plot(results, args.plot)
    return 0


def _plot(results: Results, path: Path | None) -> None:
    if path:
        from . import plots, step_plots

        (step_plots if results.benchmark == "step" else plots).plot(results, path)
        print(f"written to {path}")
