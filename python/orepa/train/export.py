"""Deploy files: plain weights that timm alone can load; and `orepa convert`, which makes them from checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import UserError
from ..surgery.convert import ConversionError, convert
from ..surgery.report import Report, report
from .files import DEPLOY_FORMAT, VERSION, load_checkpoint, save
from .model import as_timms_own, from_checkpoint, which_weights


def save_deployed(path: Path, model: nn.Module, spec: dict[str, Any]) -> None:
    """Write a converted model as plain weights and what is needed to use them.

    The batch norms are not folded, so the weights fit timm's own model::

        d = torch.load(path, weights_only=True)
        model = timm.create_model(d["model"], **d["model_kwargs"])
        model.load_state_dict(d["state_dict"])

    Args:
        path: of the file.
        model: converted with ``fold_bn=False``.
        spec: ``model``, ``model_kwargs``, ``classes``, ``img_size``, ``preprocessing``.

    Raises:
        UserError: the file cannot be written.
    """
    spec, state = as_timms_own(spec, {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()})
    save(path, {"format": DEPLOY_FORMAT, "version": VERSION, **spec, "state_dict": state})


def convert_checkpoint(checkpoint: Path, out: Path, force: bool = False) -> tuple[Report, str]:
    """Convert a checkpoint of ``orepa train``, verify, and write a deploy file.

    Args:
        checkpoint: finished or not.
        out: the deploy file.
        force: replace ``out`` if it exists.

    Returns:
        What was done, layer by layer, and which weights of the checkpoint it was done to.

    Raises:
        UserError: the checkpoint is missing, damaged or not one; ``out`` exists or cannot be written; or the converted model
            is not the same function. Nothing is written then.
    """
    if out.is_dir():
        raise UserError(f"{out} is a folder; name the file to write")
    if out.exists() and not force:
        raise UserError(f"{out} exists already (--force replaces it)")
    if not out.parent.is_dir():
        raise UserError(f"cannot write {out}: the folder {out.parent} does not exist")
    content = load_checkpoint(checkpoint)
    model, spec = from_checkpoint(content), content["model_spec"]
    side = spec["img_size"]
    images = torch.randn(4, spec["model_kwargs"]["in_chans"], side, side, generator=torch.Generator().manual_seed(0))
    try:
        converted = convert(model, fold_bn=False, example_inputs=images)
    except ConversionError as error:
        raise UserError(f"the conversion failed its check, nothing was written: {error}") from error
    save_deployed(out, converted, spec)
    return report(converted), which_weights(content)
