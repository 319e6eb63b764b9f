"""Train re-parameterised nets of timm as they come, online, and as plain nets, with several seeds and learning rates.

    python benchmarks/reparam_accuracy/run.py --out runs/reparam_digits.json
    python benchmarks/reparam_accuracy/run.py --data /usr/share/datasets/fashion-mnist --out runs/reparam_fashion.json

Data, recipe and training loop are those of ``orepa train`` on the digits (`ablation.training.train`); Fashion-MNIST has the
recipe of the digits. What a seed decides is the same for all forms, so that they compare in pairs. A file is continued: killed,
it loses only the run in progress, and another call adds other nets, epochs, learning rates, forms and seeds. Processes with
different rows may share it.
"""

from __future__ import annotations

import argparse
import sys
from itertools import product
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from ablation.run import command

from orepa.bench.cli import check_folders, names, require
from orepa.bench.results import Row, load
from orepa.errors import UserError
from orepa.train.config import DIGITS, Config, float_in, int_at_least

_VARIES = ("model", "lr", "epochs", "warmup_epochs", "seed")  # between the runs of a file
_WATCHED = 1000  # images for the curve
_MEMORY_FORMAT = torch.channels_last


def main(argv: list[str] | None = None) -> int:
    """Train what the file lacks, print the tables, and return the exit code."""
    return command("reparam_accuracy", lambda: _run(_parser().parse_args(argv)))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, metavar="DIR", help="of Fashion-MNIST's four files (default: digits)")
    parser.add_argument("--limit", type=int_at_least(64), metavar="N", help="training images (default: all)")
    parser.add_argument("--models", default="mobileone_s0", metavar="NAMES", help="timm's (default: mobileone_s0)")
    parser.add_argument("--forms", metavar="LIST", help="default: all; a list of nothing shows them")
    parser.add_argument("--epochs", type=int_at_least(1), default=10, metavar="N", help="default: 10")
    parser.add_argument("--lrs", default="0.1,0.03", metavar="LIST", help="peak learning rates (default: 0.1,0.03)")
    parser.add_argument("--seeds", type=int_at_least(1), default=5, metavar="N", help="runs of each (default: 5)")
    parser.add_argument(
        "--out", type=Path, required=True, metavar="FILE.json", help="written after every run, continued"
    )
    parser.add_argument("--overwrite", action="store_true", help="start --out anew")
    return parser


def _run(args: argparse.Namespace) -> int:
    require("lightning", "timm", "sklearn", "torchvision", extras="train")
    from ablation.training import describe, start

    from orepa.train.images import load_digits
    from orepa.train.runtime import StopRequest, settings
    from reparam_accuracy.forms import load_fashion
    from reparam_accuracy.tables import BENCHMARK, FORMS, markdown

    chosen = list(FORMS) if args.forms is None else names(args.forms)
    if not chosen or not set(chosen) <= set(FORMS):
        raise UserError(f"--forms must be among {', '.join(FORMS)}, got {args.forms}")
    rates = [float_in(0.0)(rate) for rate in names(args.lrs)]
    check_folders(args.out)
    data = load_digits(32, args.limit) if args.data is None else load_fashion(args.data, args.limit)
    recipe = {k: v for k, v in _config("", 1, 0.1, 0).as_dict().items() if k not in ("orepa", "preserve", *_VARIES)}
    protocol = {
        "memory_format": str(_MEMORY_FORMAT).removeprefix("torch."),
        "data": DIGITS if args.data is None else "Fashion-MNIST",
        "recipe": recipe,
    }
    protocol |= {"train_images": len(data.train), "test_images": len(data.val), "fingerprint": data.fingerprint}
    runs = product(range(args.seeds), names(args.models), rates, chosen)
    if args.overwrite:
        args.out.unlink(missing_ok=True)
    with settings(1), StopRequest() as stop:
        for seed, model, lr, form in runs:  # seeds are the outer loop: what an interrupted file holds is in pairs
            row = Row({"model": model, "epochs": args.epochs, "lr": lr, "seed": seed}, form, "train")
            if row.key in {done.key for done in start(BENCHMARK, args.out, False, protocol).rows}:
                continue
            _train(row, data, stop)
            results = start(BENCHMARK, args.out, False, protocol)  # again: another process may have added rows
            results.rows = sorted([*results.rows, row], key=lambda row: (*row.case.values(), row.provider))
            results.complete = False
            results.save(args.out)
            print(f"{row.case} {form:16} {describe(row)}", flush=True)
    results = load(args.out)
    results.complete = True
    results.save(args.out)
    print(f"\n{markdown(results)}")
    return 0


def _config(model: str, epochs: int, lr: float, seed: int) -> Config:
    return Config.from_given({"data": DIGITS, "model": model, "epochs": epochs, "lr": lr, "seed": seed}, 32)


def _train(row: Row, data: Any, stop: Any) -> None:
    from ablation.training import train

    from orepa.module_info import count_parameters
    from orepa.train.data import derive_seed, seed_everything
    from orepa.train.model import create_plain, model_arguments
    from reparam_accuracy.forms import forms

    config = _config(**row.case)
    seed_everything(derive_seed(config.seed, "initial values"))
    arguments = model_arguments(config.model, len(data.classes), data.in_chans, config.img_size)
    model = forms()[row.provider](create_plain(config.model, arguments, config.img_size))
    # Channels-last is the fastest for every form on a CPU. `Tensor.contiguous` would keep the strides of grey images.
    model.to(memory_format=_MEMORY_FORMAT)
    model.register_forward_pre_hook(lambda _, args: (args[0].to(memory_format=_MEMORY_FORMAT),))
    row.facts["parameters"] = count_parameters(model)
    row.facts["curve"] = train(row, model, config, data, _WATCHED, stop)


if __name__ == "__main__":
    sys.exit(main())
