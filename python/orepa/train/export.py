"""`orepa convert` and `orepa analyze`: what becomes of a checkpoint of `orepa train`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..analysis.measure import Analysis, analyze
from ..errors import UserError
from ..surgery.convert import ConversionError, convert
from ..surgery.report import Report, report
from .files import (
    DEPLOY_FORMAT,
    VERSION,
    check_target,
    load_checkpoint,
    make_folder,
    save,
    write_atomically,
    write_json,
)
from .model import describe_weights, from_checkpoint, to_timm


def save_deployed(path: Path, model: nn.Module, spec: dict[str, Any]) -> None:
    """Write a converted model as plain weights and what is needed to use them, which timm alone can load::

        d = torch.load(path, weights_only=True)
        model = timm.create_model(d["model"], **d["model_kwargs"])
        model.load_state_dict(d["state_dict"])

    Args:
        path: of the file.
        model: converted with ``fold_bn=False``, as timm's model has batch norms.
        spec: ``model``, ``model_kwargs``, ``classes``, ``img_size``, ``preprocessing``.

    Raises:
        UserError: the file cannot be written.
    """
    spec, state = to_timm(spec, {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()})
    save(path, {"format": DEPLOY_FORMAT, "version": VERSION, **spec, "state_dict": state})


def convert_checkpoint(checkpoint: Path, out: Path, force: bool = False) -> tuple[Report, str]:
    """Convert a checkpoint of ``orepa train``, finished or not, verify the result, and write a deploy file.

    Args:
        checkpoint: to read.
        out: the deploy file.
        force: replace ``out`` if it exists.

    Returns:
        The report of the conversion, layer by layer, and which weights of the checkpoint were converted.

    Raises:
        UserError: the checkpoint is missing, damaged or not one; ``out`` exists or cannot be written; or the converted model
            computes another function. Nothing is written then.
    """
    check_target(out, force)
    content = load_checkpoint(checkpoint)
    model, spec = from_checkpoint(content), content["model_spec"]
    shape = (4, spec["model_kwargs"]["in_chans"], spec["img_size"], spec["img_size"])
    images = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    try:
        converted = convert(model, fold_bn=False, example_inputs=images)
    except ConversionError as error:
        raise UserError(f"the conversion failed its check, nothing was written: {error}") from error
    save_deployed(out, converted, spec)
    return report(converted), describe_weights(content)


def analyze_checkpoint(checkpoint: Path, out: Path, tolerance: float) -> Analysis:
    """Analyse a checkpoint of ``orepa train``, finished or not, and write the results.

    Args:
        checkpoint: to read.
        out: a folder, created if missing. ``analysis.json`` and ``analysis.png`` in it are replaced.
        tolerance: see `analyze`.

    Returns:
        The content of the JSON file.

    Raises:
        UserError: the checkpoint is missing, damaged or not one, or has no OREPA block; or ``out`` cannot be written to.
            Nothing is written then.
    """
    from ..analysis.plots import draw  # needs matplotlib, which `orepa convert` does not

    as_json, as_png = out / "analysis.json", out / "analysis.png"
    for path in (as_json, as_png):
        if path.is_dir():
            raise UserError(f"cannot write {path}: it is a folder")
    content = load_checkpoint(checkpoint)
    model, name = from_checkpoint(content), content["model_spec"]["model"]
    try:
        analysis = analyze(model, tolerance)
    except ValueError as error:
        raise UserError(f"cannot analyse {checkpoint}: {error}") from error
    if not analysis.layers:
        raise UserError(f"{checkpoint} has no OREPA block: {name} was trained without")
    image = draw(analysis, name)
    make_folder(out)
    write_atomically(as_png, lambda file: file.write(image))
    write_json(as_json, {"model": name, **analysis.as_dict()})
    return analysis
