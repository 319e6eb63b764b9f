"""Define the commands and options of ``orepa bench``. Imports what a command needs only when it runs."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UserError
from ..train.config import float_in, int_at_least

if TYPE_CHECKING:
    from .providers import Provider
    from .results import Results
    from .runner import BenchConfig
    from .step import StepCase

    Providers = Mapping[str, Provider]

_SQUEEZE = """One squeeze, forward and backward, against everything a user could pick instead. Providers are the plain
einsum formulation, torch.compile of it, and every backend that runs here. Each is first checked against float64; one that is
wrong is reported and not timed. Compilation is never timed."""
_STEP = """A whole training step: forward, loss, backward and SGD. Variants are the plain model, OREPA on every backend that
runs here, both compiled, and DBB and RepVGG blocks trained offline. Those with the same weights must give the same logits and
gradients; one that does not is reported and not timed. Compilation is never timed."""
_REPARAM = """Re-parameterised nets of others. Steps, with their peak memory, of the net as it comes, of it online (every linear
region is one OREPAConv), and of its plain twin (one convolution in each place). Inference of the net as it comes, after timm's
reparameterize_model, and after orepa.convert. In eval mode all of them must give the same outputs; one that does not is
reported and not timed."""
#: by command and device batch sizes and pixels, where the user gives none
_INPUTS: dict[str, dict[str, tuple[str, int]]] = {
    "step": {"cpu": ("8", 64), "cuda": ("64,256", 224)},
    "reparam": {"cpu": ("16", 128), "cuda": ("128", 224)},
}


def add_commands(commands: Any) -> None:
    """Add ``bench`` and its own commands to a parser's sub-commands."""
    bench = commands.add_parser("bench", help="benchmarks", description="Benchmarks, and their results.")
    inner = bench.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for name, run, text, add_options in (
        ("squeeze", _squeeze, _SQUEEZE, add_squeeze_options),
        ("step", _step, _STEP, add_step_options),
        ("reparam", _reparam, _REPARAM, _add_reparam_options),
        ("show", _show, "The tables of a result file.", _add_show_options),
    ):
        parser = inner.add_parser(name, help=text.partition(".")[0], description=text)
        parser.set_defaults(run=run)
        add_options(parser)


def add_squeeze_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that `squeeze_config` reads."""
    add = parser.add_argument
    add("--shapes", metavar="O,I,k[,g];...", help="blocks (default: 3x3, 64 to 512 channels)")
    add("--topology", metavar="NAME", help="of all blocks (default: what `prepare` chooses by size)")
    add("--dtypes", default="fp32", metavar="LIST", help="of the kernels: fp32,bf16,fp16 (default: fp32)")
    add("--mode", choices=("forward", "backward", "both", "all"), default="all", help="default: all")
    add("--providers", metavar="LIST", help="such as eager,compile,cpu (default: all)")
    add("--precision", choices=("highest", "high", "medium"), default="highest", help="of float32 products")
    _add_common_options(parser, rounds=50, seconds=45.0)


def add_step_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that `step_config` reads."""
    _add_model_options(parser, "resnet18", _INPUTS["step"])
    add = parser.add_argument
    add("--variants", metavar="LIST", help="default: all; a list of nothing shows them")
    add("--order", default="auto", metavar="LIST", help="of OREPA's branches: auto,squeeze,branch (default: auto)")
    add("--grad-accum", type=_counts, default=[1], metavar="LIST", help="batches per step, such as 1,4,8 (default: 1)")
    text = "that train together, on CPUs: --rounds samples of each variant, however long (default: %(default)s)"
    add("--processes", type=int_at_least(1), default=1, metavar="N", help=text)


def _add_reparam_options(parser: argparse.ArgumentParser) -> None:
    nets = "mobileone_s0,mobileone_s1,repvgg_a0,repvit_m0_9,fastvit_t8"
    _add_model_options(parser, nets, _INPUTS["reparam"])


def _add_model_options(parser: argparse.ArgumentParser, models: str, inputs: dict[str, tuple[str, int]]) -> None:
    add, (cpu, cuda) = parser.add_argument, inputs.values()
    add("--models", default=models, metavar="NAMES", help="timm's names (default: %(default)s)")
    add("--batch-sizes", metavar="LIST", help=f"default: {cpu[0]} on the CPU, {cuda[0]} on CUDA")
    add("--img-size", type=int_at_least(1), metavar="PX", help=f"default: {cpu[1]} on the CPU, {cuda[1]} on CUDA")
    add("--inputs", metavar="LIST", help="instead of these two, pairs of them: 8x64,32x224")
    add("--autocast", choices=("none", "bf16", "fp16"), default="none", help="default: none")
    add("--channels-last", action="store_true", help="memory format of model and images")
    add("--cuda-graph", choices=("off", "on", "both"), help="the step as a CUDA graph (default: both, on CUDA)")
    _add_common_options(parser, rounds=20, seconds=60.0)


def _add_show_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, metavar="FILE.json")


def _add_common_options(parser: argparse.ArgumentParser, rounds: int, seconds: float) -> None:
    add = parser.add_argument
    add("--out", type=Path, metavar="FILE.json", help="results with raw samples, written as they come")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: cuda, or else cpu")
    add("--threads", type=int_at_least(1), metavar="N", help="of the CPU (default: PyTorch's choice)")
    add(
        "--rounds",
        type=int_at_least(1),
        default=rounds,
        metavar="N",
        help="samples of each at most (default: %(default)s)",
    )
    text = "of timing, over all (default: %(default)s); all else comes on top, and 3 rounds are the least"
    add("--seconds", type=float_in(above=0.0), default=seconds, metavar="X", help=text)


def _squeeze(args: argparse.Namespace) -> int:
    import torch

    from orepa_kernels.dispatch import names_on

    from . import providers, squeeze
    from .tables import order_advice

    results = squeeze.run(*squeeze_config(args, providers.all_providers()), say)
    code, advice = finish(results, args.out), order_advice(results.rows, names_on(torch.device(_device(args))))
    if advice:
        say(advice)
    return code


def squeeze_config(args: argparse.Namespace, providers: Providers) -> tuple[BenchConfig, Providers]:
    """Return what to measure and the chosen providers, and set up torch; a UserError for what cannot be met."""
    import torch

    from ..topology.language import topologies
    from .problem import DEFAULT, DTYPES, SqueezeCase, parse_shapes
    from .providers import MODES

    chosen = _pick("--providers", args.providers, providers)
    dtypes = _pick("--dtypes", args.dtypes, DTYPES)
    if args.topology not in (None, *topologies()):
        raise UserError(f"--topology must be among {', '.join(topologies())}, got {args.topology!r}")
    shapes, device = parse_shapes(args.shapes) if args.shapes else DEFAULT, _device(args)
    cases = [SqueezeCase(s, args.topology or s.topology, dtype, device) for dtype in dtypes for s in shapes]
    for case in cases:
        case.plan()  # reports a misfit before an hour of measuring
    torch.set_float32_matmul_precision(args.precision)
    config = _config(args, cases, MODES if args.mode == "all" else (args.mode,), cuda_graph=None)
    return config, {name: providers[name] for name in chosen}


def _step(args: argparse.Namespace) -> int:
    config = step_config(args)  # also finds out whether timm is installed, which the next lines import
    from . import processes, step

    return finish(processes.run(args, step_config, say) if args.processes > 1 else step.run(config, say), args.out)


def step_config(args: argparse.Namespace) -> BenchConfig:
    """Return what to measure, and set up torch; a UserError for what cannot be met."""
    require("timm", extras="bench,models")
    from ..modules.branch_order import ORDERS
    from .variants import all_variants, choose, in_orders

    if args.processes > 1 and _device(args) != "cpu":
        raise UserError("--processes measures CPUs only: add --device cpu")
    variants, orders = all_variants(), _pick("--order", args.order, ORDERS)
    timed = list(in_orders({name: variants[name] for name in _pick("--variants", args.variants, variants)}, orders))
    chosen = choose(timed, in_orders(variants, orders))
    works = [(case, count) for case in _cases(args, _INPUTS["step"]) for count in args.grad_accum]
    cases = [(replace(case, accumulate=count, processes=args.processes), chosen) for case, count in works]
    return _config(args, cases, ("step",), args.cuda_graph, timed)


def _reparam(args: argparse.Namespace) -> int:
    require("timm", extras="bench,models")
    from . import reparam

    config = _config(args, _cases(args, _INPUTS["reparam"]), tuple(reparam.FORMS), args.cuda_graph)
    return finish(reparam.run(config, say), args.out)


def _cases(args: argparse.Namespace, defaults: dict[str, tuple[str, int]]) -> list[StepCase]:
    """Return a case per model and input; a UserError for inputs that are none."""
    from .step import StepCase

    device = _device(args)
    if args.inputs and (args.batch_sizes or args.img_size):
        raise UserError("--inputs stands for --batch-sizes and --img-size together: leave these out")
    sizes, px = defaults[device]
    inputs = args.inputs or ",".join(f"{n}x{args.img_size or px}" for n in names(args.batch_sizes or sizes))
    pairs = [tuple(int(n) if n.isdecimal() else 0 for n in pair.split("x")) for pair in names(inputs)]
    if not pairs or any(len(pair) != 2 or pair[0] < 2 or pair[1] < 1 for pair in pairs):
        option = "--inputs must be pairs such as 8x64" if args.inputs else "--batch-sizes must be whole numbers"
        raise UserError(f"{option}, batches from 2 on, got {args.inputs or args.batch_sizes!r}")
    layout = "channels_last" if args.channels_last else "contiguous"
    return [StepCase(m, n, px, args.autocast, layout, device) for m in names(args.models) for n, px in pairs]


def _config(
    args: argparse.Namespace, cases: Sequence[Any], modes: Sequence[str], cuda_graph: str | None, timed: Any = None
) -> BenchConfig:
    """Set the number of threads; return a config with the options that all benchmarks share."""
    import torch

    from .runner import BenchConfig

    check_folders(args.out)
    if args.threads:
        torch.set_num_threads(args.threads)
    device = _device(args)
    graphs = cuda_graph or {"cpu": "off", "cuda": "both"}[device]
    launches = {"on": ("graph",), "off": ("plain",), "both": ("graph", "plain")}[graphs]
    settings = {k: v for k, v in vars(args).items() if isinstance(v, (str, int, float, bool)) and k != "command"}
    how = {"device": device, "launches": launches, "rounds": args.rounds, "seconds": args.seconds, "out": args.out}
    return BenchConfig(cases=cases, modes=modes, timed=timed, settings=settings, **how)


def _device(args: argparse.Namespace) -> str:
    import torch

    return ("cuda" if torch.cuda.is_available() else "cpu") if args.device == "auto" else args.device


def _show(args: argparse.Namespace) -> int:
    from .results import load

    finish(load(args.file))
    return 0


def finish(results: Results, *written: Path | None) -> int:
    """Print tables, say which files were written, and return 1 where something is wrong or lost."""
    from .tables import show

    if results.processes > 1:
        require("scipy")  # for the spread
    say("")
    show(results)
    for path in filter(None, written):
        print(f"written to {path}")
    return 1 if results.lost or any(row.status == "wrong" for row in results.rows) else 0


def require(*packages: str, extras: str = "bench") -> None:
    """Raise a UserError where a package is missing, naming the extras that bring it."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        install = f'pip install "orepa-kernels[{extras}]"'
        raise UserError(f"this command needs {', '.join(missing)}, not installed here: {install}")


def check_folders(*paths: Path | None) -> None:
    """Raise a UserError where a folder does not exist, rather than after minutes of measuring."""
    for path in paths:
        if path and not path.parent.is_dir():
            raise UserError(f"cannot write {path}: there is no folder {path.parent}")


def names(text: str) -> list[str]:
    """Return ``"a, b,a"`` as ``["a", "b"]``."""
    return list(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))


def _counts(text: str) -> list[int]:
    return [int_at_least(1)(name) for name in names(text)]


def _pick(option: str, text: str | None, among: Collection[str]) -> list[str]:
    """Return the names in a list, by default all, in the order of ``among``."""
    selected = list(among) if text is None else names(text)
    if not selected or any(name not in among for name in selected):
        raise UserError(f"{option} must be among {', '.join(among)}, got {text!r}")
    return [name for name in among if name in selected]


def say(text: str) -> None:
    """Rewrite one line of progress, where stderr is a terminal."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{text}"[:100], end="", file=sys.stderr, flush=True)
