"""The options of ``orepa train``; imports nothing heavy."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Fields of `Request`; all other options are fields of `Config`, on which the result depends.
_HOW = (
    "data",
    "out",
    "resume",
    "overwrite",
    "workers",
    "max_broken",
    "checkpoint_every",
    "checkpoint_minutes",
    "accelerator",
    "strategy",
    "devices",
    "num_nodes",
)


def add(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``orepa train``. Settings that are not given are None: a recipe or a checkpoint decides."""
    _add_what(parser.add_argument_group("what"))
    _add_recipe(
        parser.add_argument_group(
            "recipe", "SGD with momentum 0.9, cosine schedule, linear warm-up (paper section 4.1)"
        )
    )
    _add_machine(
        parser.add_argument_group(
            "machine",
            "one process per device, on one machine or, with --num-nodes and MASTER_ADDR, MASTER_PORT, NODE_RANK, on several; "
            "or let torchrun start them",
        )
    )
    _add_files(parser.add_argument_group("files"))


def split(args: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Any]]:
    """The settings that the user gave, for `Config`, and the arguments of `Request`."""
    other = {"run", *_HOW}
    given = {name: value for name, value in vars(args).items() if name not in other and value is not None}
    return given, {name: getattr(args, name) for name in _HOW}


def _add_what(what: argparse._ArgumentGroup) -> None:
    what.add_argument("--model", metavar="NAME", help="any timm classifier (default: test_resnet)")
    what.add_argument("--no-orepa", dest="orepa", action="store_const", const=False, help="train the plain twin")
    what.add_argument(
        "--preserve",
        action="store_const",
        const=True,
        help="start from the function of the plain model's initial weights",
    )
    what.add_argument(
        "--data",
        metavar="DIR",
        help="train/ and val/ with class folders; WebDataset shards, *train*.tar and *val*.tar; or CIFAR-10 or -100 as "
        "unpacked (default: digits)",
    )
    what.add_argument(
        "--img-size", type=whole(8), metavar="N", help="default: the model's; 32 for the digits and CIFAR"
    )
    what.add_argument("--limit", type=whole(2), metavar="N", help="use N training and N validation images only")
    what.add_argument(
        "--max-broken",
        type=whole(0),
        metavar="N",
        help="skip and report up to N images that cannot be read, then stop (default: 1%% of the images, but at least 10)",
    )


def _add_recipe(recipe: argparse._ArgumentGroup) -> None:
    recipe.add_argument(
        "--recipe",
        choices=("paper",),
        help="the paper's, whatever the data: lr 0.1, weight decay 1e-4, batch 256, 120 epochs, 5 of them warm-up, 224x224, "
        "random-resized-crop and flip; other options override it (default: the same at --img-size, but for the digits)",
    )
    recipe.add_argument("--epochs", type=whole(1), metavar="N", help="default: 120; 15 for the digits")
    recipe.add_argument(
        "--batch-size",
        type=whole(2),
        metavar="N",
        help="images per step, over all devices (default: 256; 64 for the digits)",
    )
    recipe.add_argument("--grad-accum", type=whole(1), metavar="N", help="compute each step in N parts (default: 1)")
    recipe.add_argument("--lr", type=number(above=0.0), metavar="X", help="peak learning rate (default: 0.1)")
    recipe.add_argument("--weight-decay", type=number(), metavar="X", help="default: 1e-4; none on norms and biases")
    recipe.add_argument(
        "--scale-weight-decay",
        action="store_const",
        const=True,
        help="weight decay on the branch scalings as well",
    )
    recipe.add_argument("--warmup-epochs", type=whole(0), metavar="N", help="default: 5; 2 for the digits")
    recipe.add_argument("--label-smoothing", type=number(below=1.0), metavar="X", help="default: 0, off")
    recipe.add_argument("--mixup", type=number(), metavar="ALPHA", help="default: 0, off")
    recipe.add_argument("--cutmix", type=number(), metavar="ALPHA", help="default: 0, off")
    recipe.add_argument(
        "--ema",
        type=number(above=0.0, below=1.0),
        metavar="DECAY",
        help="keep a moving average of the weights; it is what is validated and converted (default: off)",
    )
    recipe.add_argument(
        "--sync-bn", action="store_const", const=True, help="batch norms take their statistics over all processes"
    )
    recipe.add_argument(
        "--seed", type=whole(0), metavar="N", help="of initial values, order, augmentation (default: 0)"
    )


def _add_machine(machine: argparse._ArgumentGroup) -> None:
    machine.add_argument(
        "--accelerator", choices=("auto", "cpu", "cuda", "mps"), default="auto", help="auto: cuda, or else cpu"
    )
    machine.add_argument("--devices", type=whole(1), metavar="N", help="per machine (default: 1, or torchrun's)")
    machine.add_argument("--num-nodes", type=whole(1), metavar="N", help="machines (default: 1, or torchrun's)")
    machine.add_argument(
        "--strategy",
        choices=("auto", "ddp", "fsdp2"),
        default="auto",
        help="ddp: every process has the model; fsdp2: each has a share of it (default: ddp where there are several)",
    )
    machine.add_argument(
        "--precision", choices=("32-true", "bf16-mixed", "16-mixed", "64-true"), help="default: 32-true"
    )
    machine.add_argument("--threads", type=whole(1), metavar="N", help="default: PyTorch's choice; 1 for the digits")
    machine.add_argument(
        "--workers", type=whole(0), metavar="N", help="processes that load images (default: 4; 0 for the digits)"
    )


def _add_files(files: argparse._ArgumentGroup) -> None:
    files.add_argument("--out", type=Path, metavar="DIR", help="default: runs/<model>-<orepa|plain>")
    files.add_argument(
        "--resume", action="store_true", help="continue the run in --out; its options need not be repeated"
    )
    files.add_argument("--overwrite", action="store_true", help="discard the run in --out")
    files.add_argument(
        "--checkpoint-every", type=whole(1), default=500, metavar="STEPS", help="within epochs too (default: 500)"
    )
    files.add_argument(
        "--checkpoint-minutes",
        type=number(above=0.0),
        default=15.0,
        metavar="N",
        help="and when so much time has passed since the last one (default: 15)",
    )


def whole(least: int) -> Callable[[str], int]:
    """For argparse: a whole number from ``least`` on."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least:
            raise argparse.ArgumentTypeError(f"must be a whole number from {least} on, got {text!r}")
        return value

    return parse


def number(above: float | None = None, below: float = math.inf) -> Callable[[str], float]:
    """For argparse: a finite number from 0 on, or above ``above``, and below ``below``."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not 0 <= value < below or (above is not None and value <= above):
            limit = "" if below == math.inf else f", below {below:g}"
            raise argparse.ArgumentTypeError(
                f"must be a number {'above' if above is not None else 'from'} 0{limit}, got {text!r}"
            )
        return value

    return parse
