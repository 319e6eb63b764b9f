"""The command line, ``orepa COMMAND``; see ``orepa --help``. Imports what a command needs only when it runs."""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from .bench.cli import add_commands as add_bench
from .errors import UserError, reason
from .surgery.convert import ConversionError
from .train.config import add_options, float_in, parse_request

_TRAINING = ("lightning", "timm", "torchvision", "tensorboard", "tqdm", "matplotlib")
_INSTALL = 'pip install "orepa-kernels[train]"'
_INSTALL_MODELS = 'pip install "orepa-kernels[models]"'


def main(argv: list[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: without the program's name; by default those of the process.

    Returns:
        The exit code: 0; 2 for an error that the user can correct, reported in one line on stderr; 128 plus the number of the
        signal that stopped the run.
    """
    try:
        argv = sys.argv[1:] if argv is None else argv
        args = _parser(argv).parse_args(argv)
        if args.run is not _info:
            _check_backend()
        return args.run(args)
    except UserError as error:
        print(f"orepa: error: {error}", file=sys.stderr)
        return 2
    except ConversionError as error:
        print(f"orepa: error: the conversion failed its check, nothing was written: {reason(error)}", file=sys.stderr)
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
    from .train.run import train

    return train(parse_request(args))


def _convert(args: argparse.Namespace) -> int:
    if args.official != (args.arch is not None):
        raise UserError("--official and --arch go together: orepa convert --official CKPT --arch ARCH OUT")
    if (args.timm is None) != (args.weights is None):
        raise UserError("--timm and --checkpoint go together: orepa convert --timm NAME --checkpoint FILE OUT")
    if args.timm is not None and args.official:
        raise UserError("--timm and --official exclude each other: FILE has timm's keys, or CKPT the authors'")
    _require("timm", install=_INSTALL_MODELS if args.official or args.timm else _INSTALL)
    from .convert_cli import run

    return run(args)


def _analyze(args: argparse.Namespace) -> int:
    _require("timm", "matplotlib")
    from .analysis.measure import analyze
    from .analysis.plots import draw
    from .train.files import load_checkpoint, make_folder, write_atomically, write_json
    from .train.model import from_checkpoint

    out = args.checkpoint.parent if args.out is None else args.out
    for name in ("analysis.json", "analysis.png"):
        if (out / name).is_dir():
            raise UserError(f"cannot write {out / name}: it is a folder")
    content = load_checkpoint(args.checkpoint)
    model, name = from_checkpoint(content), content["model_spec"]["model"]
    try:
        analysis = analyze(model, args.tolerance)
    except ValueError as error:
        raise UserError(f"cannot analyse {args.checkpoint}: {error}") from error
    if not analysis.layers:
        raise UserError(f"{args.checkpoint} has no OREPA block: {name} was trained without")
    image = draw(analysis, name)
    make_folder(out)
    write_atomically(out / "analysis.png", lambda file: file.write(image))
    write_json(out / "analysis.json", {"model": name, **analysis.as_dict()})
    print(analysis)
    print(f"written to {out / 'analysis.json'} and analysis.png")
    return 0


def _models(args: argparse.Namespace) -> int:
    _require("timm", install=_INSTALL_MODELS)
    from .models.timm_models import MODELS, parameter_counts

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


def _check_backend() -> None:
    """Check ``OREPA_BACKEND`` before anything is written: training would use it only after its first checkpoint."""
    name = os.environ.get("OREPA_BACKEND", "")
    if name not in ("", "auto"):
        from orepa_kernels import backends

        known = backends()
        if name not in known:
            raise UserError(f"OREPA_BACKEND must be one of auto, {', '.join(known)}, got {name!r}")
        if not known[name]:
            raise UserError(f"OREPA_BACKEND={name} cannot run here: {known[name].reason}")


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


def _parser(argv: Sequence[str] = ()) -> argparse.ArgumentParser:
    """Return the parser of these arguments: with ``--timm``, ``convert`` has no CKPT (argparse cannot tell it from OUT)."""
    parser = _Parser(prog="orepa", description="Train with re-parameterised convolutions (OREPA), deploy plain ones.")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    train = commands.add_parser(
        "train",
        help="train a model, convert it, verify, measure",
        description="Train a timm model whose convolutions are OREPA blocks, then convert it to plain convolutions and hold "
        "the two against each other. Without options: a small ResNet on scikit-learn's digits, in half a minute on a CPU. "
        "Ctrl-C or kill: continue with --resume, bit by bit.",
    )
    train.set_defaults(run=_train)
    add_options(train)

    convert = commands.add_parser(
        "convert",
        help="turn a checkpoint into plain weights",
        usage="orepa convert [--force] CKPT OUT\n"
        "       orepa convert [--force] --official --arch ARCH CKPT OUT\n"
        "       orepa convert [--force] --timm NAME --checkpoint FILE OUT",
        description="Convert a checkpoint of `orepa train` to plain convolutions, verify, and write weights for timm's model. "
        "With --official and --arch, one of the authors' checkpoints: OUT then is a state dict of timm's plain model. With "
        "--timm, any weights of a model of timm: the branches of MobileOne, RepVGG and the like become one convolution each, "
        "norms are folded, and a JSON file beside OUT says what was done.",
    )
    convert.set_defaults(run=_convert, checkpoint=None)
    if not {"--timm", "--checkpoint"} & {argument.partition("=")[0] for argument in argv}:
        convert.add_argument(
            "checkpoint", type=Path, metavar="CKPT", help="checkpoint.pt of a run, or the authors' file"
        )
    convert.add_argument("out", type=Path, metavar="OUT", help="file to write: with --timm, .safetensors, .pt or .pth")
    convert.add_argument("--force", action="store_true", help="replace OUT (and its JSON file) if it exists")
    convert.add_argument("--timm", metavar="NAME", help="convert weights of timm.create_model(NAME)")
    convert.add_argument(
        "--checkpoint", dest="weights", type=Path, metavar="FILE", help="its weights: a safetensors or a PyTorch file"
    )
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
        type=float_in(),
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
