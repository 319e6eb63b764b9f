"""Curves and metrics of a finished run."""

from __future__ import annotations

import importlib.metadata
import json
import platform
from pathlib import Path
from typing import Any

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from .files import write_atomically

_PACKAGES = ("orepa-kernels", "torch", "timm", "lightning", "torchvision", "numpy", "scikit-learn")


def environment() -> dict[str, Any]:
    """Versions and threads: what the last bits of a result depend on."""
    versions: dict[str, str | None] = {}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    versions["torch"] = str(torch.__version__)
    return {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "packages": versions,
    }


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write plain data, atomically.

    Raises:
        UserError: the file cannot be written.
    """
    text = json.dumps(content, indent=2, allow_nan=False) + "\n"
    write_atomically(path, lambda file: file.write(text.encode()))


def plot_curves(path: Path, history: list[dict[str, Any]], title: str) -> None:
    """Loss and accuracy by epoch, as a PNG.

    Args:
        path: of the PNG.
        history: one record per epoch, as in `Trainer.history`.
        title: of the figure.

    Raises:
        UserError: the file cannot be written.
    """
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    epochs = [record["epoch"] for record in history]
    for axis, quantity in zip(figure.subplots(1, 2), ("loss", "accuracy"), strict=True):
        for split, style in (("train", "--"), ("val", "-")):
            axis.plot(epochs, [record[f"{split}_{quantity}"] for record in history], style, label=split, marker=".")
        axis.set(xlabel="epoch", ylabel=quantity)
        axis.grid(alpha=0.3)
        axis.legend()
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=120))
