"""What a run prints: a progress bar on stderr, its story on stdout."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from lightning.fabric import Fabric
from torch import nn
from tqdm.auto import tqdm

from ..module_info import count_parameters
from ..modules.orepa_conv import OREPAConv
from .config import Config
from .images import ImageData
from .outcome import Outcome


class Progress:
    """A bar over the whole run on a terminal's stderr, and one line per epoch on stdout."""

    def __init__(self, fabric: Fabric, config: Config, steps: int, done: int) -> None:
        self._shown, self._config = fabric.is_global_zero, config
        size = shutil.get_terminal_size()  # tqdm shows nothing on a terminal that says it has no rows
        self._bar = tqdm(
            total=config.epochs * steps,
            initial=done,
            unit="step",
            leave=False,
            ncols=size.columns,
            nrows=size.lines,
            disable=None if self._shown else True,  # None: where stderr is not a terminal
        )

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._bar.close()

    def step(self, done: int, loss: float) -> None:
        """Move the bar to ``done`` steps."""
        self._bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
        self._bar.update(done - self._bar.n)

    def epoch(self, record: dict[str, Any]) -> None:
        """Print one record of `Trainer.history`."""
        if self._shown:
            tqdm.write(
                f"epoch {record['epoch']:3}/{self._config.epochs}  loss {record['train_loss']:.4f}  "
                f"val loss {record['val_loss']:.4f}  val accuracy {100 * record['val_accuracy']:.2f}%  "
                f"{record['seconds']:.1f} s{_pace(record)}",
                file=sys.stdout,
            )
            sys.stdout.flush()


def _pace(record: dict[str, Any]) -> str:
    rate, memory, skipped = record["images_per_second"], record["peak_memory_mb"], record["skipped_images"]
    parts = [
        "" if rate is None else f"{rate:,.0f} images/s",
        "" if memory is None else f"{memory:,.0f} MB",
        f"{skipped} skipped" if skipped else "",
    ]
    return "".join(f"  {part}" for part in parts if part)


def announce(config: Config, data: ImageData, model: nn.Module, fabric: Fabric, out: Path) -> None:
    """Say what is going to happen."""
    swapped = sum(isinstance(module, OREPAConv) for module in model.modules())
    blocks = f"{swapped} convolutions as OREPA blocks" if config.orepa else "plain"
    print(f"model   {config.model}, {blocks}, {count_parameters(model):,} parameters")
    size = f"{config.img_size}x{config.img_size}"
    print(f"data    {config.data}, {len(data.train)} + {len(data.val)} images of {len(data.classes)} classes, {size}")
    print(
        f"device  {fabric.world_size} x {fabric.device.type}, {torch.get_num_threads()} thread(s), {config.precision}"
    )
    print(f"out     {out}", flush=True)


def compare_environments(then: dict[str, Any], now: dict[str, Any]) -> None:
    """Say where a resumed run cannot be bitwise the same: other devices, threads or versions."""
    old, new = ({"devices": e["devices"], "threads": e["threads"], **e["packages"]} for e in (then, now))
    changed = [f"{name} {old.get(name)} -> {value}" for name, value in new.items() if old.get(name) != value]
    if changed:
        print(f"orepa: note: the last bits may differ from an uninterrupted run: {', '.join(changed)}", file=sys.stderr)


def verdict(outcome: Outcome) -> str:
    """The conversion in a sentence."""
    trained, others = outcome.columns["trained"], [c for name, c in outcome.columns.items() if name != "trained"]
    if all(c.changed == 0 and c.correct == trained.correct for c in others):
        return f"Conversion changed no prediction: {trained.correct} of {trained.images} correct before and after."
    changed = max(c.changed for c in others)
    return (
        f"Conversion changed {changed} of {trained.images} predictions, by rounding: logits as large as "
        f"{outcome.largest_logit:.1e} differ by {max(c.max_difference for c in others):.1e} at most."
    )
