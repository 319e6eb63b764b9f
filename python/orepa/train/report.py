"""What a run reports: stdout, a progress bar on stderr, TensorBoard, curves, speed and memory."""

from __future__ import annotations

import contextlib
import importlib.metadata
import platform
import shutil
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.fabric import Fabric
from matplotlib.figure import Figure
from torch import nn
from tqdm.auto import tqdm

from ..errors import reason
from ..module_info import count_parameters
from ..modules.orepa_conv import OREPAConv
from .config import Config
from .files import write_atomically
from .images import ImageData

_PACKAGES = ("orepa-kernels", "torch", "timm", "lightning", "torchvision", "numpy", "scikit-learn")


def progress_bar(total: int, done: int, shown: bool) -> Any:
    """Return a bar of steps on stderr, if that is a terminal."""
    size = shutil.get_terminal_size()  # tqdm shows nothing on a terminal that reports no rows
    style: dict[str, Any] = {"unit": "step", "leave": False, "ncols": size.columns, "nrows": size.lines}
    return tqdm(
        total=total, initial=done, disable=None if shown else True, **style
    )  # None: where stderr is no terminal


def print_epoch(record: dict[str, Any], epochs: int) -> None:
    """Print one record of `Trainer.history`, above the bar."""
    losses = f"loss {record['train_loss']:.4f}  val loss {record['val_loss']:.4f}"
    accuracy = f"val accuracy {100 * record['val_accuracy']:.2f}%"
    parts = [f"epoch {record['epoch']:3}/{epochs}", losses, accuracy, f"{record['seconds']:.1f} s"]
    units = {"images_per_second": "{:,.0f} images/s", "peak_memory_mb": "{:,.0f} MB", "skipped_images": "{} skipped"}
    parts += [unit.format(record[name]) for name, unit in units.items() if record[name]]
    tqdm.write("  ".join(parts), file=sys.stdout)
    sys.stdout.flush()


class Events:
    """Scalars for TensorBoard. Where they cannot be written, it warns once, and the run continues without them.

    TensorBoard writes in another thread, and raises its errors at the next call; meanwhile, that thread prints no traceback.
    """

    def __init__(self, fabric: Fabric) -> None:
        self._fabric, self._lost = fabric, False

    def __enter__(self) -> Events:
        self._hook, threading.excepthook = threading.excepthook, self._thread_failed
        return self

    def __exit__(self, *_: object) -> None:
        with self._tolerate_errors():
            self._fabric.logger.finalize("success")
        threading.excepthook = self._hook

    def log(self, scalars: Mapping[str, float | None], step: int) -> None:
        """Write those that are not None."""
        if not self._lost:
            with self._tolerate_errors():
                self._fabric.log_dict({name: value for name, value in scalars.items() if value is not None}, step)

    @contextlib.contextmanager
    def _tolerate_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if not self._lost:
                tqdm.write(f"orepa: cannot write for TensorBoard any more: {reason(error)}", file=sys.stderr)
            self._lost = True

    def _thread_failed(self, args: Any) -> None:
        if not isinstance(args.exc_value, OSError):
            self._hook(args)


def peak_memory(device: torch.device) -> float | None:
    """Return the peak memory so far, in MB: of tensors on a CUDA device, otherwise of this process. None on Windows."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    try:
        import resource
    except ImportError:
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e6


def print_header(config: Config, data: ImageData, model: nn.Module, fabric: Fabric, out: Path) -> None:
    """Print model, data, device and output folder of a run."""
    blocks = f"{sum(isinstance(module, OREPAConv) for module in model.modules())} convolutions as OREPA blocks"
    print(f"model   {config.model}, {blocks if config.orepa else 'plain'}, {count_parameters(model):,} parameters")
    images = f"{len(data.train)} + {len(data.val)} images of {len(data.classes)} classes"
    print(f"data    {config.data}, {images}, {config.img_size}x{config.img_size}")
    devices = f"{fabric.world_size} x {fabric.device.type}, {torch.get_num_threads()} thread(s)"
    print(f"device  {devices}, {config.precision}\nout     {out}", flush=True)


def environment() -> dict[str, Any]:
    """Return versions and threads: what the last bits of a result depend on."""
    packages: dict[str, str | None] = dict.fromkeys(_PACKAGES)
    for name in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            packages[name] = importlib.metadata.version(name)
    packages["torch"] = str(torch.__version__)
    versions = {"python": platform.python_version(), "packages": packages}
    return {**versions, "machine": platform.machine(), "threads": torch.get_num_threads()}


def compare_environments(then: dict[str, Any], now: dict[str, Any]) -> None:
    """Print why a resumed run may differ in the last bits: other devices, threads or versions."""
    old, new = ({"devices": e["devices"], "threads": e["threads"], **e["packages"]} for e in (then, now))
    changed = [f"{name} {old.get(name)} -> {value}" for name, value in new.items() if old.get(name) != value]
    if changed:
        print(f"orepa: note: the last bits may differ from an uninterrupted run: {', '.join(changed)}", file=sys.stderr)


def plot_curves(path: Path, history: list[dict[str, Any]], title: str) -> None:
    """Plot loss and accuracy by epoch, from the records of `Trainer.history`, as a PNG."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    figure.suptitle(title)
    epochs = [record["epoch"] for record in history]
    for axis, quantity in zip(figure.subplots(1, 2), ("loss", "accuracy"), strict=True):
        for split, style in (("train", "--"), ("val", "-")):
            axis.plot(epochs, [record[f"{split}_{quantity}"] for record in history], style, label=split, marker=".")
        axis.set(xlabel="epoch", ylabel=quantity)
        axis.grid(alpha=0.3)
        axis.legend()
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=120))
