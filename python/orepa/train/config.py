"""The options of `orepa train`, declared once as dataclass fields: parser, defaults, and what `--resume` may change.

Imports nothing heavy, so that ``orepa --help`` is quick.
"""

from __future__ import annotations

import argparse
import contextlib
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from ..errors import UserError

DIGITS, FOLDER, CIFAR10, CIFAR100, SHARDS = ("digits", "folder", "cifar10", "cifar100", "shards")
PRECISIONS, STRATEGIES = ("32-true", "bf16-mixed", "16-mixed", "64-true"), ("auto", "ddp", "fsdp2")

# The paper's recipe (section 4.1); SGD with momentum 0.9, the cosine schedule, random-resized-crop and flip are not options.
_PAPER: dict[str, Any] = {"epochs": 120, "batch_size": 256, "lr": 0.1, "weight_decay": 1e-4, "warmup_epochs": 5}

#: presets of ``--recipe``, for any data
RECIPES: dict[str, dict[str, Any]] = {"paper": {**_PAPER, "img_size": 224}}

# Defaults by kind of data. The digits are 1437 small images: they want smaller and fewer steps, and a second thread would gain
# little, lose a lot on a busy machine, and change the last bits from machine to machine.
_DEFAULTS: dict[str, dict[str, Any]] = {
    FOLDER: _PAPER,
    SHARDS: _PAPER,
    CIFAR10: {**_PAPER, "img_size": 32},
    CIFAR100: {**_PAPER, "img_size": 32},
    DIGITS: {"epochs": 15, "batch_size": 64, "warmup_epochs": 2, "threads": 1, "img_size": 32},
}

_GROUPS = {
    "what": None,
    "recipe": "SGD with momentum 0.9, cosine schedule, linear warm-up (paper section 4.1)",
    "machine": "one process per device, on one machine or, with --num-nodes and MASTER_ADDR, MASTER_PORT, NODE_RANK, on "
    "several; or let torchrun start them",
    "files": None,
}


def int_at_least(minimum: int) -> Callable[[str], int]:
    """Return an argparse type: an integer of at least ``minimum``."""

    def parse(text: str) -> int:
        with contextlib.suppress(ValueError):
            if int(text) >= minimum:
                return int(text)
        raise argparse.ArgumentTypeError(f"must be a whole number from {minimum} on, got {text!r}")

    return parse


def float_in(above: float | None = None, below: float = math.inf) -> Callable[[str], float]:
    """Return an argparse type: a finite number, at least 0 (or above ``above``) and below ``below``."""
    bounds = f"{'from' if above is None else 'above'} 0" + ("" if below == math.inf else f", below {below:g}")

    def parse(text: str) -> float:
        with contextlib.suppress(ValueError):
            value = float(text)
            if 0 <= value < below and (above is None or value > above):
                return value
        raise argparse.ArgumentTypeError(f"must be a number {bounds}, got {text!r}")

    return parse


def _option(default: Any, group: str, help: str, type: Any = None, metavar: str = "N", choices: Any = None) -> Any:
    """Declare a field with an option: ``--name``, or a flag where the default is a bool (``--no-name`` if that is True)."""
    arguments: dict[str, Any] = {"type": type, "metavar": metavar} if choices is None else {"choices": choices}
    if isinstance(default, bool):
        arguments = {"action": "store_const", "const": not default}
    return field(default=default, metadata={"group": group, "arguments": {"help": help, **arguments}})


@dataclass(frozen=True)
class Config:
    """Everything that the trained weights depend on; stored in every checkpoint. `--resume` may change none of it.

    ``data`` is the kind of data, one of the constants above. The help text of the other fields says what they are.
    """

    model: str = _option("test_resnet", "what", "any timm classifier (default: test_resnet)", metavar="NAME")
    orepa: bool = _option(True, "what", "train the plain twin")
    preserve: bool = _option(False, "what", "start from the function of the plain model's initial weights")
    data: str = DIGITS
    img_size: int = _option(32, "what", "default: the model's; 32 for the digits and CIFAR", int_at_least(8))
    limit: int | None = _option(None, "what", "use N training and N validation images only", int_at_least(2))
    recipe: str | None = _option(
        None,
        "recipe",
        "the paper's, whatever the data: lr 0.1, weight decay 1e-4, batch 256, 120 epochs, 5 of them warm-up, 224x224, "
        "random-resized-crop and flip; other options override it (default: the same at --img-size, but for the digits)",
        choices=tuple(RECIPES),
    )
    epochs: int = _option(120, "recipe", "default: 120; 15 for the digits", int_at_least(1))
    batch_size: int = _option(256, "recipe", "images per step, in all (default: 256; digits 64)", int_at_least(2))
    grad_accum: int = _option(1, "recipe", "compute each step in N parts (default: 1)", int_at_least(1))
    lr: float = _option(0.1, "recipe", "peak learning rate (default: 0.1)", float_in(above=0.0), "X")
    weight_decay: float = _option(1e-4, "recipe", "default: 1e-4; none on norms and biases", float_in(), "X")
    scale_weight_decay: bool = _option(False, "recipe", "weight decay on the branch scalings as well")
    warmup_epochs: int = _option(5, "recipe", "default: 5; 2 for the digits", int_at_least(0))
    label_smoothing: float = _option(0.0, "recipe", "default: 0, off", float_in(below=1.0), "X")
    mixup: float = _option(0.0, "recipe", "default: 0, off", float_in(), "ALPHA")
    cutmix: float = _option(0.0, "recipe", "default: 0, off", float_in(), "ALPHA")
    ema: float | None = _option(
        None, "recipe", "validate and convert averaged weights (default: off)", float_in(0.0, 1.0), "DECAY"
    )
    sync_bn: bool = _option(False, "recipe", "batch norms take their statistics over all processes (on GPUs)")
    seed: int = _option(0, "recipe", "of initial values, order, augmentation (default: 0)", int_at_least(0))
    precision: str = _option("32-true", "machine", "default: 32-true", choices=PRECISIONS)
    threads: int | None = _option(None, "machine", "default: PyTorch's choice; 1 for the digits", int_at_least(1))

    @classmethod
    def from_given(cls, given: dict[str, Any], model_img_size: int) -> Config:
        """Fill in the defaults: the user's settings go before the recipe's, those before the data's and the model's."""
        recipe = RECIPES[given["recipe"]] if "recipe" in given else {}
        values = {"img_size": model_img_size, **_DEFAULTS[given.get("data", DIGITS)], **recipe, **given}
        if "warmup_epochs" not in given:
            values["warmup_epochs"] = min(values["warmup_epochs"], values["epochs"] - 1)
        if values["warmup_epochs"] >= values["epochs"]:
            raise UserError(f"--warmup-epochs {values['warmup_epochs']} must be less than --epochs {values['epochs']}")
        return cls(**values)

    @classmethod
    def from_saved(cls, saved: dict[str, Any]) -> Config:
        """Restore what `as_dict` returned."""
        known = {f.name for f in fields(cls)}
        return cls(**{name: value for name, value in saved.items() if name in known})

    def as_dict(self) -> dict[str, Any]:
        """Return plain data, for the checkpoint and JSON."""
        return asdict(self)

    @property
    def crops_and_flips(self) -> bool:
        """Whether images are augmented as in the paper. A mirrored digit is no digit, so digits are only moved a little."""
        return self.recipe == "paper" or self.data != DIGITS

    def check_resume(self, given: dict[str, Any]) -> None:
        """Raise a `UserError` on the first option that contradicts the run: its continuation would be another run."""
        for name, value in given.items():
            mine = getattr(self, name)
            if value != mine and not (isinstance(value, float) and math.isclose(value, mine)):
                raise UserError(
                    f"cannot resume with another {_flag(name, getattr(Config, name))}: the checkpoint has {mine!r}, "
                    f"asked is {value!r} (leave the option away, or start a new run in another --out)"
                )


@dataclass(frozen=True)
class Request:
    """One call of `orepa train`: the user's settings, and the options that the trained weights do not depend on."""

    given: dict[str, Any]  # the fields of `Config` that the user set, ``data`` apart
    data: str | None = _option(
        None,
        "what",
        "train/ and val/ with class folders; WebDataset shards, *train*.tar and *val*.tar; or CIFAR-10 or -100 as "
        "unpacked (default: digits)",
        metavar="DIR",
    )
    max_broken: int | None = _option(
        None, "what", "skip up to N images that cannot be read (default: 1%% of all, but at least 10)", int_at_least(0)
    )
    accelerator: str = _option("auto", "machine", "auto: cuda, or else cpu", choices=("auto", "cpu", "cuda", "mps"))
    devices: int | None = _option(None, "machine", "per machine (default: 1, or torchrun's)", int_at_least(1))
    num_nodes: int | None = _option(None, "machine", "machines (default: 1, or torchrun's)", int_at_least(1))
    strategy: str = _option(
        "auto", "machine", "ddp: every process has the model; fsdp2: a share of it (default: ddp)", choices=STRATEGIES
    )
    workers: int | None = _option(None, "machine", "processes that load images (default: 4; digits 0)", int_at_least(0))
    out: Path | None = _option(None, "files", "default: runs/<model>-<orepa|plain>", Path, "DIR")  # noqa: RUF009
    resume: bool = _option(False, "files", "continue the run in --out; its options need not be repeated")
    overwrite: bool = _option(False, "files", "discard the run in --out")
    checkpoint_every: int = _option(
        500, "files", "write one within epochs, too (default: 500)", int_at_least(1), "STEPS"
    )
    checkpoint_minutes: float = _option(15.0, "files", "at most, between checkpoints (default: 15)", float_in(0.0))


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add one option per field of `Config` and `Request`. Those that the user leaves out are None."""
    declared = [f for cls in (Config, Request) for f in fields(cls) if f.metadata]
    for title, description in _GROUPS.items():
        group = parser.add_argument_group(title, description)
        for f in declared:
            if f.metadata["group"] == title:
                group.add_argument(_flag(f.name, f.default), dest=f.name, **f.metadata["arguments"])


def parse_request(args: argparse.Namespace) -> Request:
    """Build the request from the parsed options."""
    names = {f.name for f in fields(Request)}
    given = {name: value for name, value in vars(args).items() if name != "run" and value is not None}
    config = {name: value for name, value in given.items() if name not in names}
    return Request(config, **{name: value for name, value in given.items() if name in names})


def _flag(name: str, default: Any) -> str:
    return ("--no-" if default is True else "--") + name.replace("_", "-")
