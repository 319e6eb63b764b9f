"""The command line, ``orepa COMMAND``; see ``orepa --help``. Imports what a command needs only when it runs."""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from .bench.cli import add_commands as add_bench
from .training.errors import UserError

_TRAINING = ("lightning", "timm", "torchvision", "tensorboard", "tqdm", "matplotlib")
_INSTALL = 'pip install "orepa-kernels[train]"'
_INSTALL_MODELS = 'pip install "orepa-kernels[models]"'
_SETTINGS = (
    "model",
    "orepa",
    "preserve",
    "img_size",
    "epochs",
    "batch_size",
    "lr",
    "weight_decay",
    "warmup_epochs",
    "seed",
    "limit",
    "precision",
    "threads",
)


def main(argv: list[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: without the program's name; by default those of the process.

    Returns:
        The exit code: 0; 2 for a mistake of the user's, told in one line on stderr; 128 plus the number of the signal that
        stopped the run.
    """
    try:
        args = _parser().parse_args(argv)
        return args.run(args)
    except UserError as error:
        print(f"orepa: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("orepa: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `orepa ... | head`; Python would complain once more when it flushes at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


# --- commands -------------------------------------------------------------------------------------------------------------


def _train(args: argparse.Namespace) -> int:
    digits = args.data in (None, "digits")
    _require(*_TRAINING, *(("sklearn",) if digits else ()))
    from .training.run import Request, train

    given = {name: getattr(args, name) for name in _SETTINGS if getattr(args, name) is not None}
    names = ("data", "out", "resume", "overwrite", "workers", "checkpoint_every", "accelerator", "devices")
    return train(Request(given, **{name: getattr(args, name) for name in names}))


def _convert(args: argparse.Namespace) -> int:
    if args.official != (args.arch is not None):
        raise UserError("--official and --arch go together: orepa convert --official CKPT --arch ARCH OUT")
    _require("timm", install=_INSTALL_MODELS if args.official else _INSTALL)
    if args.official:
        return _convert_official(args)
    from .training.export import convert_checkpoint

    print(convert_checkpoint(args.checkpoint, args.out, args.force))
    print(f"written to {args.out}")
    return 0


def _analyze(args: argparse.Namespace) -> int:
    _require("timm", "matplotlib")
    from .analysis.checkpoint import analyze_checkpoint

    out = args.checkpoint.parent if args.out is None else args.out
    print(analyze_checkpoint(args.checkpoint, out, args.tolerance))
    print(f"written to {out / 'analysis.json'} and analysis.png")
    return 0


def _convert_official(args: argparse.Namespace) -> int:
    from . import models
    from .convert import ConversionError
    from .official_models import plain_from_official
    from .report import report
    from .training.files import save

    _check_target(args.out, args.force)
    try:
        _, spec = models.spec_of(args.arch)
        model = plain_from_official(args.checkpoint, args.arch)
    except OSError as error:
        raise UserError(f"cannot read the checkpoint {args.checkpoint}: {error.strerror or error}") from error
    except (TypeError, ValueError) as error:
        raise UserError(str(error)) from error
    except ConversionError as error:
        raise UserError(f"the conversion failed its check, nothing was written: {error}") from error
    save(args.out, dict(model.state_dict()))
    print(report(model))
    ours = " (after import orepa.models)" if hasattr(models, spec.plain) else ""  # the one that timm lacks
    print(f"written to {args.out}: a state dict for timm.create_model({spec.plain!r}){ours}")
    return 0


def _check_target(out: Path, force: bool) -> None:
    if out.is_dir():
        raise UserError(f"{out} is a folder; name the file to write")
    if out.exists() and not force:
        raise UserError(f"{out} exists already (--force replaces it)")
    if not out.parent.is_dir():
        raise UserError(f"cannot write {out}: the folder {out.parent} does not exist")


def _models(args: argparse.Namespace) -> int:
    _require("timm", install=_INSTALL_MODELS)
    from .models import MODELS, parameter_counts

    rows = [
        {"name": name, "official": spec.official, "plain": spec.plain, "training": training, "deployed": deployed}
        for name, spec in MODELS.items()
        for training, deployed in [parameter_counts(name)]
    ]
    if args.json:
        print(json.dumps(rows, indent=2))
        return 0
    print(f"{'timm.create_model':24}{'the authors call it':22}{'parameters: training':>20}{'deployed':>14}")
    for row in rows:
        print(f"{row['name']:24}{row['official']:22}{row['training']:>20,}{row['deployed']:>14,}")
    return 0


def _info(args: argparse.Namespace) -> int:
    from orepa_kernels import info

    versions = {name: _version(name) for name in ("timm", "lightning")}
    if args.json:
        print(json.dumps({**info.collect(), **versions}, indent=2))
        return 0
    info.main([])
    print()
    for name, version in versions.items():
        print(f"{name:26} {version or _INSTALL}")
    return 0


def _require(*packages: str, install: str = _INSTALL) -> None:
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        names = ", ".join("scikit-learn" if name == "sklearn" else name for name in missing)
        raise UserError(f"this command needs {names}, not installed here: {install}")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


# --- options --------------------------------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    """argparse, with errors of one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"orepa: error: {message} (see {self.prog} --help)\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="orepa", description="Train with re-parameterised convolutions (OREPA), deploy plain ones.")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    train = commands.add_parser(
        "train",
        help="train a model, convert it, verify, measure",
        description="Train a timm model whose convolutions are OREPA blocks, then convert it to plain convolutions and hold "
        "the two against each other. Without options: a small ResNet on scikit-learn's digits, on a CPU in about a minute. "
        "Branch scalings, norms and biases have no weight decay. Ctrl-C or kill: continue with --resume, bit by bit.",
    )
    train.set_defaults(run=_train)
    _add_train_options(train)

    convert = commands.add_parser(
        "convert",
        help="turn a checkpoint of `orepa train` into plain weights",
        description="Convert a checkpoint of `orepa train` to plain convolutions, verify, and write weights for timm's model. "
        "Or, with --official and --arch, one of the authors' checkpoints: OUT then is a state dict of timm's plain model.",
    )
    convert.set_defaults(run=_convert)
    convert.add_argument("checkpoint", type=Path, metavar="CKPT", help="checkpoint.pt of a run, or the authors' file")
    convert.add_argument("out", type=Path, metavar="OUT", help="file to write")
    convert.add_argument("--force", action="store_true", help="replace OUT if it exists")
    convert.add_argument("--official", action="store_true", help="CKPT is one of the authors' checkpoints")
    convert.add_argument("--arch", metavar="ARCH", help="its model, such as ResNet-18 (see `orepa models`)")

    analyze = commands.add_parser(
        "analyze",
        help="what the branches of a trained model do, and which could go",
        description="Measure the branches of every OREPA block of a checkpoint of `orepa train`: how similar their squeezed "
        "kernels are, how their scales are distributed, what each adds to its block's kernel, and which could be pruned "
        "(orepa.prune_branches does it). Prints a table, writes analysis.json and analysis.png, replacing older ones.",
    )
    analyze.set_defaults(run=_analyze)
    analyze.add_argument("checkpoint", type=Path, metavar="CKPT", help="checkpoint.pt of a run")
    analyze.add_argument("--out", type=Path, metavar="DIR", help="folder to write to (default: that of CKPT)")
    analyze.add_argument(
        "--tolerance",
        type=_number(),
        default=1e-3,
        metavar="X",
        help="relative change of a block's kernel that pruning may cause (default: 1e-3)",
    )

    add_bench(commands)

    models = commands.add_parser(
        "models",
        help="the models registered with timm, and their sizes",
        description="The authors' models, registered with timm by `import orepa.models`; deployed: after orepa.convert.",
    )
    models.set_defaults(run=_models)
    models.add_argument("--json", action="store_true", help="print one JSON array")

    info = commands.add_parser(
        "info", help="versions, devices, and which backends run here", description="What runs here."
    )
    info.set_defaults(run=_info)
    info.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def _add_train_options(parser: argparse.ArgumentParser) -> None:
    what = parser.add_argument_group("what")
    what.add_argument("--model", metavar="NAME", help="any timm classifier (default: test_resnet)")
    what.add_argument("--no-orepa", dest="orepa", action="store_const", const=False, help="train the plain twin")
    what.add_argument(
        "--preserve",
        action="store_const",
        const=True,
        help="start from the function of the plain model's initial weights",
    )
    what.add_argument("--data", metavar="DIR", help="image folder with train/ and val/ (default: digits)")
    what.add_argument("--img-size", type=_whole(8), metavar="N", help="default: the model's; 32 for the digits")
    what.add_argument("--limit", type=_whole(2), metavar="N", help="use N training and N validation images only")

    recipe = parser.add_argument_group(
        "recipe", "SGD with momentum 0.9, cosine schedule, linear warm-up (paper section 4.1)"
    )
    recipe.add_argument("--epochs", type=_whole(1), metavar="N", help="default: 120; 15 for the digits")
    recipe.add_argument(
        "--batch-size", type=_whole(2), metavar="N", help="over all devices (default: 256; 64 for the digits)"
    )
    recipe.add_argument("--lr", type=_number(above=0.0), metavar="X", help="peak learning rate (default: 0.1)")
    recipe.add_argument("--weight-decay", type=_number(), metavar="X", help="default: 1e-4")
    recipe.add_argument("--warmup-epochs", type=_whole(0), metavar="N", help="default: 5; 2 for the digits")
    recipe.add_argument(
        "--seed", type=_whole(0), metavar="N", help="of initial values, order, augmentation (default: 0)"
    )

    machine = parser.add_argument_group("machine")
    machine.add_argument(
        "--accelerator", choices=("auto", "cpu", "cuda", "mps"), default="auto", help="auto: cuda, or else cpu"
    )
    machine.add_argument("--devices", type=_whole(1), default=1, metavar="N", help="more than one trains data-parallel")
    machine.add_argument("--precision", choices=("32-true", "bf16-mixed", "16-mixed"), help="default: 32-true")
    machine.add_argument("--threads", type=_whole(1), metavar="N", help="default: PyTorch's choice; 1 for the digits")
    machine.add_argument(
        "--workers", type=_whole(0), metavar="N", help="processes that load images (default: 4; 0 for the digits)"
    )

    files = parser.add_argument_group("files")
    files.add_argument("--out", type=Path, metavar="DIR", help="default: runs/<model>-<orepa|plain>")
    files.add_argument(
        "--resume", action="store_true", help="continue the run in --out; its options need not be repeated"
    )
    files.add_argument("--overwrite", action="store_true", help="discard the run in --out")
    files.add_argument(
        "--checkpoint-every", type=_whole(1), default=500, metavar="STEPS", help="within epochs too (default: 500)"
    )


def _whole(least: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least:
            raise argparse.ArgumentTypeError(f"must be a whole number from {least} on, got {text!r}")
        return value

    return parse


def _number(above: float | None = None) -> Callable[[str], Any]:
    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not math.isfinite(value) or value < 0 or (above is not None and value <= above):
            raise argparse.ArgumentTypeError(
                f"must be a number {'above' if above is not None else 'from'} 0, got {text!r}"
            )
        return value

    return parse
