"""What determines the result of a run, where its defaults come from, and what `--resume` may change."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from .errors import UserError

DIGITS = "digits"
FOLDER = "folder"

# The paper's recipe (section 4.1) for image folders. The digits are 1437 small images: they want smaller and fewer steps, and
# a second thread would gain little on them, lose a lot on a busy machine, and change the last bits from machine to machine.
_RECIPES: dict[str, dict[str, Any]] = {
    FOLDER: {"epochs": 120, "batch_size": 256, "warmup_epochs": 5},
    DIGITS: {"epochs": 15, "batch_size": 64, "warmup_epochs": 2, "threads": 1},
}


@dataclass(frozen=True)
class Config:
    """Everything that the trained weights depend on; stored in every checkpoint. `--resume` may change none of it.

    Args:
        model: a timm name.
        orepa: whether the convolutions are swapped for `OREPAConv`.
        preserve: whether the swapped model starts from the function of the plain one.
        data: ``"digits"`` or ``"folder"``.
        img_size: side of the square input, in pixels.
        epochs: length of the cosine schedule, warm-up included.
        batch_size: images per step, over all devices.
        lr: peak learning rate, in steps of SGD with momentum 0.9.
        weight_decay: on kernels and the classifier; norms, biases and branch scalings have none.
        warmup_epochs: linear warm-up, in epochs.
        seed: of initial values, order and augmentation.
        limit: number of training and of validation images, None for all.
        precision: ``"32-true"``, ``"bf16-mixed"`` or ``"16-mixed"``, as in Lightning Fabric.
        threads: that compute on the CPU, None for PyTorch's own choice.
    """

    model: str = "test_resnet"
    orepa: bool = True
    preserve: bool = False
    data: str = DIGITS
    img_size: int = 32
    epochs: int = 120
    batch_size: int = 256
    lr: float = 0.1
    weight_decay: float = 1e-4
    warmup_epochs: int = 5
    seed: int = 0
    limit: int | None = None
    precision: str = "32-true"
    threads: int | None = None

    @classmethod
    def from_given(cls, given: dict[str, Any], default_img_size: int) -> Config:
        """Fill in the defaults of the data set.

        Args:
            given: the fields that the user set.
            default_img_size: that of the model, or of the digits.

        Raises:
            UserError: a warm-up as long as the run.
        """
        recipe = _RECIPES[given.get("data", DIGITS)]
        values = {"img_size": default_img_size, **recipe, **given}
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
