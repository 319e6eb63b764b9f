"""Define the commands and options of ``orepa bench``. Imports what a command needs only when it runs."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UserError

if TYPE_CHECKING:
    from .providers import Provider
    from .results import Results
    from .runner import Save, Say
    from .squeeze import SqueezeConfig
    from .step import StepConfig

_SQUEEZE = """One squeeze, forward and backward, against everything a user could pick instead. Providers are the plain
einsum formulation, torch.compile of it, every backend that runs here, and two floors: the bare matrix products, and a copy of
the bytes that must move. Each is first checked against float64; one that is wrong is reported and not timed. Compilation is
never timed. Several fresh processes measure, one after the other, so that the spread includes how far processes differ."""
_STEP = """A whole training step: forward, loss, backward and SGD. Variants are the plain model, OREPA on every backend that
runs here, both compiled, and DBB and RepVGG blocks trained offline. Those with the same weights must give the same logits and
gradients; one that does not is reported and not timed. Compilation is never timed."""
#: returns all providers to choose from; picklable
Providers = Callable[[], Mapping[str, "Provider"]]


def add_commands(commands: Any) -> None:
    """Add ``bench`` and its own commands to a parser's sub-commands."""
    bench = commands.add_parser("bench", help="benchmarks", description="Benchmarks, and their results.")
    inner = bench.add_subparsers(title="commands", required=True, metavar="COMMAND")

    def add(name: str, run: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
        parser = inner.add_parser(name, help=text.partition(".")[0], description=text)
        parser.set_defaults(run=run)
        return parser

    add_squeeze_options(add("squeeze", run_squeeze, _SQUEEZE))
    add_step_options(add("step", _step, _STEP))
    show = add("show", _show, "The tables of a result file, or a plot.")
    show.add_argument("results", type=Path, metavar="FILE.json")
    show.add_argument("--plot", type=Path, metavar="FILE.png", help="draw it as well")


def add_squeeze_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that `squeeze_config` reads."""
    what = parser.add_argument_group("what")
    blocks = what.add_mutually_exclusive_group()
    blocks.add_argument("--shapes", metavar="O,I,k[,g];...", help="blocks (default: 3x3, 64 to 512 channels)")
    text = "the blocks of: resnet18, resnet50, resnext50_32x4d, repvgg_a0; or all"
    blocks.add_argument("--models", metavar="NAMES", help=text)
    what.add_argument("--topology", metavar="NAME", help="of all blocks (default: what `prepare` chooses by size)")
    what.add_argument("--dtypes", default="fp32", metavar="LIST", help="of the kernels: fp32,bf16,fp16 (default: fp32)")
    what.add_argument("--mode", choices=("forward", "backward", "both", "all"), default="all", help="default: all")
    what.add_argument("--providers", metavar="LIST", help="such as eager,compile,gemms,copy (default: all)")
    how = _add_measuring_options(parser, rounds=50, seconds=45.0)
    how.add_argument(
        "--precision", choices=("highest", "high", "medium"), default="highest", help="of float32 products"
    )
    text = "(default: 3 on the CPU, 1 on CUDA): the more, the narrower the spread; one cannot tell how far processes differ"
    how.add_argument("--processes", type=count, metavar="N", help=f"one after the other {text}")


def add_step_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that `step_config` reads."""
    what = parser.add_argument_group("what")
    what.add_argument("--models", default="resnet18", metavar="NAMES", help="timm's names (default: resnet18)")
    what.add_argument("--batch-sizes", metavar="LIST", help="default: 8 on the CPU, 64,256 on CUDA")
    what.add_argument("--img-size", type=count, metavar="PX", help="default: 64 on the CPU, 224 on CUDA")
    what.add_argument("--inputs", metavar="LIST", help="instead of these two, pairs of them: 8x64,32x224")
    what.add_argument("--variants", metavar="LIST", help="default: all; a list of nothing shows them")
    how = _add_measuring_options(parser, rounds=20, seconds=60.0)
    how.add_argument("--autocast", choices=("none", "bf16", "fp16"), default="none", help="default: none")
    how.add_argument("--channels-last", action="store_true", help="memory format of model and images")
    text = "the step as a CUDA graph (default: both, on CUDA)"
    how.add_argument("--cuda-graph", choices=("off", "on", "both"), help=text)


def _add_measuring_options(parser: argparse.ArgumentParser, rounds: int, seconds: float) -> Any:
    files = parser.add_argument_group("files")
    files.add_argument("--out", type=Path, metavar="FILE.json", help="results with raw samples, written as they come")
    files.add_argument("--plot", type=Path, metavar="FILE.png", help="draw the times")
    how = parser.add_argument_group("how")
    how.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: cuda, or else cpu")
    how.add_argument("--threads", type=count, metavar="N", help="of the CPU (default: PyTorch's choice)")
    text = "samples of each at most, in each process (default: %(default)s)"
    how.add_argument("--rounds", type=count, default=rounds, metavar="N", help=text)
    text = "of timing, over all (default: %(default)s); all else comes on top, and 5 rounds are the least"
    how.add_argument("--seconds", type=above_0, default=seconds, metavar="X", help=text)
    return how


# --- commands -------------------------------------------------------------------------------------------------------------


def run_squeeze(args: argparse.Namespace, providers: Providers | None = None) -> int:
    """Run ``orepa bench squeeze``, by default with all providers of this package; return the exit code."""
    require("scipy", *(("matplotlib",) if args.plot else ()))
    from . import processes, squeeze

    config, chosen = squeeze_config(args, providers)
    check_folders(args.out, args.plot)
    if config.processes == 1:
        results = squeeze.run(config, chosen, _say)
    else:
        results = processes.run([partial(_job, args, providers)] * config.processes, _say, config.save)
    return finish(results, args)


def _job(args: argparse.Namespace, providers: Providers | None, say: Say, save: Save) -> Results:
    """Measure in one of several processes."""
    from . import squeeze

    return squeeze.run(*squeeze_config(args, providers), say, save=save)


def squeeze_config(
    args: argparse.Namespace, providers: Providers | None = None
) -> tuple[SqueezeConfig, Mapping[str, Provider]]:
    """Return what to measure and the providers, and set up torch in this process.

    Raises:
        UserError: an option that cannot be met.
    """
    import torch

    from .problem import DEFAULT, model_shapes, parse_shapes
    from .providers import all_providers
    from .roofline import MODES
    from .squeeze import SqueezeConfig

    chosen = (providers or all_providers)()
    if args.providers is not None:
        chosen = {name: chosen[name] for name in _pick("--providers", args.providers, chosen)}
    torch.set_float32_matmul_precision(args.precision)
    common = _set_up(args)
    device = common["device"]
    config = SqueezeConfig(
        shapes=parse_shapes(args.shapes)
        if args.shapes
        else model_shapes(names(args.models))
        if args.models
        else DEFAULT,
        topology=args.topology,
        dtypes=names(args.dtypes),
        modes=MODES if args.mode == "all" else (args.mode,),
        launches={"cpu": ("plain",), "cuda": ("graph", "plain")}[device],
        # How far processes differ was measured on CPUs only, and starting on CUDA takes longer.
        processes=args.processes or {"cpu": 3, "cuda": 1}[device],
        **common,
    )
    return config, chosen


def _step(args: argparse.Namespace) -> int:
    return finish(run_step(args, step_config(args)), args)


def run_step(args: argparse.Namespace, config: StepConfig, **options: Any) -> Results:
    """Measure training steps; ``options`` go to `orepa.bench.step.run`."""
    from . import step

    settings = {k: v for k, v in vars(args).items() if isinstance(v, (str, int, float, bool)) and k != "command"}
    return step.run(config, settings, _say, **options)


def step_config(args: argparse.Namespace) -> StepConfig:
    """Return what to measure, and set up torch in this process.

    Raises:
        UserError: an option that cannot be met, or a package that is missing.
    """
    require("timm", *(("matplotlib",) if args.plot else ()), extras="bench,models")
    from .step import StepCase, StepConfig
    from .variants import all_variants, choose

    check_folders(args.out, args.plot)
    variants = all_variants()
    selected = list(variants) if args.variants is None else _pick("--variants", args.variants, variants)
    common = _set_up(args)
    device = common["device"]
    if args.inputs and (args.batch_sizes or args.img_size):
        raise UserError("--inputs stands for --batch-sizes and --img-size together: leave these out")
    sizes, px = {"cpu": ("8", 64), "cuda": ("64,256", 224)}[device]
    inputs = args.inputs or ",".join(f"{n}x{args.img_size or px}" for n in names(args.batch_sizes or sizes))
    pairs = [tuple(int(n) if n.isdecimal() else 0 for n in pair.split("x")) for pair in names(inputs)]
    if not pairs or any(len(pair) != 2 or pair[0] < 2 or pair[1] < 1 for pair in pairs):
        option = "--inputs must be pairs such as 8x64" if args.inputs else "--batch-sizes must be whole numbers"
        raise UserError(f"{option}, batches from 2 on, got {args.inputs or args.batch_sizes!r}")
    layout = "channels_last" if args.channels_last else "contiguous"
    cases = [StepCase(m, n, px, args.autocast, layout, device) for m in names(args.models) for n, px in pairs]
    graphs = args.cuda_graph or {"cpu": "off", "cuda": "both"}[device]
    return StepConfig(
        cases=[(case, choose(selected, variants)) for case in cases],
        timed=selected,
        launches={"on": ("graph",), "off": ("plain",), "both": ("graph", "plain")}[graphs],
        **common,
    )


def _show(args: argparse.Namespace) -> int:
    require(*(("matplotlib",) if args.plot else ()))
    from .results import load

    check_folders(args.plot)
    finish(load(args.results), args)
    return 0


def finish(results: Results, args: argparse.Namespace, draw: Callable[[Results, Path], None] | None = None) -> int:
    """Print tables, plot if asked to, say which files were written, and return 1 where something is wrong or lost."""
    from .plots import plot
    from .tables import show

    _say("")
    show(results)
    if args.plot:
        (draw or plot)(results, args.plot)
    for path in (getattr(args, "out", None), args.plot):
        if path:
            print(f"written to {path}")
    return 1 if results.lost or any(row.status == "wrong" for row in results.rows) else 0


# --- options --------------------------------------------------------------------------------------------------------------


def require(*packages: str, extras: str = "bench") -> None:
    """Refuse politely where a package is missing.

    Raises:
        UserError: naming the packages and the extras that bring them.
    """
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        install = f'pip install "orepa-kernels[{extras}]"'
        raise UserError(f"this command needs {', '.join(missing)}, not installed here: {install}")


def check_folders(*paths: Path | None) -> None:
    """Refuse files that could not be written after minutes of measuring.

    Raises:
        UserError: a folder does not exist.
    """
    for path in paths:
        if path and not path.parent.is_dir():
            raise UserError(f"cannot write {path}: there is no folder {path.parent}")


def names(text: str) -> list[str]:
    """Return ``"a, b,a"`` as ``["a", "b"]``."""
    return list(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))


def _pick(option: str, text: str, among: Mapping[str, Any]) -> list[str]:
    """Return the names in a list, in the order of ``among``."""
    selected = names(text)
    if not selected or any(name not in among for name in selected):
        raise UserError(f"{option} must be among {', '.join(among)}, got {text!r}")
    return [name for name in among if name in selected]


def count(text: str) -> int:
    """Parse a whole number from 1 on."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number from 1 on, got {text!r}")
    return int(text)


def above_0(text: str) -> float:
    """Parse a finite number above 0."""
    if not 0 < float(text) < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a number above 0, got {text!r}")
    return float(text)


def _set_up(args: argparse.Namespace) -> dict[str, Any]:
    """Set the number of threads; return the part of a config that all benchmarks share."""
    import torch

    if args.threads:
        torch.set_num_threads(args.threads)
    device = ("cuda" if torch.cuda.is_available() else "cpu") if args.device == "auto" else args.device
    return {"device": device, "rounds": args.rounds, "seconds": args.seconds, "out": args.out}


def _say(text: str) -> None:
    """Rewrite one line of progress, where stderr is a terminal."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{text}"[:100], end="", file=sys.stderr, flush=True)
