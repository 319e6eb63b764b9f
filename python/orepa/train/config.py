"""What determines the result of a run, where its defaults come from, and what `--resume` may change."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from ..errors import UserError

DIGITS = "digits"
FOLDER = "folder"
CIFAR10 = "cifar10"
CIFAR100 = "cifar100"
SHARDS = "shards"

# The paper's recipe (section 4.1); SGD with momentum 0.9, the cosine schedule, random-resized-crop and flip are the loop's own.
_PAPER: dict[str, Any] = {"epochs": 120, "batch_size": 256, "lr": 0.1, "weight_decay": 1e-4, "warmup_epochs": 5}

#: presets that can be asked for by name, with any data
RECIPES: dict[str, dict[str, Any]] = {"paper": {**_PAPER, "img_size": 224}}

# What each kind of data begins with. The digits are 1437 small images: they want smaller and fewer steps, and a second thread
# would gain little on them, lose a lot on a busy machine, and change the last bits from machine to machine.
_DEFAULTS: dict[str, dict[str, Any]] = {
    FOLDER: _PAPER,
    SHARDS: _PAPER,
    CIFAR10: {**_PAPER, "img_size": 32},
    CIFAR100: {**_PAPER, "img_size": 32},
    DIGITS: {"epochs": 15, "batch_size": 64, "warmup_epochs": 2, "threads": 1, "img_size": 32},
}


@dataclass(frozen=True)
class Config:
    """Everything that the trained weights depend on; stored in every checkpoint. `--resume` may change none of it.

    Args:
        model: a timm name.
        orepa: whether the convolutions are swapped for `OREPAConv`.
        preserve: whether the swapped model starts from the function of the plain one.
        recipe: the preset that was asked for by name, ``"paper"``, or None.
        data: ``"digits"``, ``"folder"``, ``"cifar10"``, ``"cifar100"`` or ``"shards"``.
        img_size: side of the square input, in pixels.
        epochs: length of the cosine schedule, warm-up included.
        batch_size: images per optimizer step, over all devices and all parts of ``grad_accum``.
        lr: peak learning rate, in steps of SGD with momentum 0.9.
        weight_decay: on kernels and the classifier; norms and biases have none.
        scale_weight_decay: whether the branch scalings have weight decay as well.
        warmup_epochs: linear warm-up, in epochs.
        grad_accum: parts that the images of a step are cut into, one forward and backward pass each.
        ema: decay of the moving average of the weights, None for no such average.
        label_smoothing: share of the target that is spread over all classes.
        mixup, cutmix: their alpha; 0 turns each off.
        sync_bn: whether batch norms take their statistics over all processes.
        seed: of initial values, order and augmentation.
        limit: number of training and of validation images, None for all.
        precision: ``"32-true"``, ``"bf16-mixed"``, ``"16-mixed"`` or ``"64-true"``, as in Lightning Fabric.
        threads: that compute on the CPU, None for PyTorch's own choice.
    """

    model: str = "test_resnet"
    orepa: bool = True
    preserve: bool = False
    recipe: str | None = None
    data: str = DIGITS
    img_size: int = 32
    epochs: int = 120
    batch_size: int = 256
    lr: float = 0.1
    weight_decay: float = 1e-4
    scale_weight_decay: bool = False
    warmup_epochs: int = 5
    grad_accum: int = 1
    ema: float | None = None
    label_smoothing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    sync_bn: bool = False
    seed: int = 0
    limit: int | None = None
    precision: str = "32-true"
    threads: int | None = None

    @classmethod
    def from_given(cls, given: dict[str, Any], model_img_size: int) -> Config:
        """Fill in the defaults: those of the data set, over them the recipe's, over them what the user gave.

        Args:
            given: the fields that the user set.
            model_img_size: side of the images that the model is made for.

        Raises:
            UserError: a warm-up as long as the run.
        """
        recipe = RECIPES[given["recipe"]] if "recipe" in given else {}
        values = {"img_size": model_img_size, **_DEFAULTS[given.get("data", DIGITS)], **recipe, **given}
        if "warmup_epochs" not in given:
            values["warmup_epochs"] = min(values["warmup_epochs"], values["epochs"] - 1)
        if values["warmup_epochs"] >= values["epochs"]:
            raise UserError(f"--warmup-epochs {values['warmup_epochs']} must be less than --epochs {values['epochs']}")
        return cls(**values)

    @classmethod
    def from_saved(cls, saved: dict[str, Any]) -> Config:
        """Read back what `as_dict` gave."""
        known = {f.name for f in fields(cls)}
        return cls(**{name: value for name, value in saved.items() if name in known})

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for the checkpoint and JSON."""
        return asdict(self)

    @property
    def crops_and_flips(self) -> bool:
        """Whether images are augmented as in the paper. A mirrored digit is no digit: the digits are only moved about."""
        return self.recipe == "paper" or self.data != DIGITS

    def check_resume(self, given: dict[str, Any]) -> None:
        """Refuse options that contradict the run that is resumed: the continuation would not be that run.

        Raises:
            UserError: names the first such option and both values.
        """
        for name, value in given.items():
            mine = getattr(self, name)
            if value != mine and not (isinstance(value, float) and math.isclose(value, mine)):
                raise UserError(
                    f"cannot resume with another {option(name)}: the checkpoint has {mine!r}, asked is {value!r} "
                    "(leave the option away, or start a new run in another --out)"
                )


def default_out(model: str, orepa: bool) -> Path:
    """Where a run goes without ``--out``."""
    return Path("runs") / f"{model.replace('/', '_')}-{'orepa' if orepa else 'plain'}"


def option(name: str) -> str:
    """The command line's name of a field."""
    return {"orepa": "--no-orepa"}.get(name, "--" + name.replace("_", "-"))
