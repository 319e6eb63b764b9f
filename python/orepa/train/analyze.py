"""What `orepa analyze` does: a checkpoint of `orepa train` in, ``analysis.json`` and ``analysis.png`` out."""

from __future__ import annotations

import json
from pathlib import Path

from ..analysis.measure import Analysis, analyze
from ..analysis.plots import draw
from ..errors import UserError
from .files import load_checkpoint, make_folder, write_atomically
from .model import from_checkpoint


def analyze_checkpoint(checkpoint: Path, out: Path, tolerance: float) -> Analysis:
    """Analyse a checkpoint of ``orepa train`` and write what was found.

    Args:
        checkpoint: finished or not.
        out: a folder, created where it is missing. ``analysis.json`` and ``analysis.png`` in it are replaced.
        tolerance: see `analyze`.

    Returns:
        What the JSON file holds.

    Raises:
        UserError: the checkpoint is missing, damaged or not one, or has no OREPA block; or ``out`` cannot be written to.
            Nothing is written then.
    """
    files = {kind: out / f"analysis.{kind}" for kind in ("json", "png")}
    for path in files.values():
        if path.is_dir():
            raise UserError(f"cannot write {path}: it is a folder")
    content = load_checkpoint(checkpoint)
    model, name = from_checkpoint(content), content["model_spec"]["model"]
    try:
        found = analyze(model, tolerance)
    except ValueError as error:
        raise UserError(f"cannot analyse {checkpoint}: {error}") from error
    if not found.layers:
        raise UserError(f"{checkpoint} has no OREPA block: {name} was trained without")
    image = draw(found, name)
    text = json.dumps({"model": name, **found.as_dict()}, indent=2, allow_nan=False) + "\n"
    make_folder(out)
    write_atomically(files["png"], lambda file: file.write(image))
    write_atomically(files["json"], lambda file: file.write(text.encode()))
    return found
