"""`orepa train` from the options to the last file."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.fabric import Fabric
from lightning.fabric.loggers import TensorBoardLogger
from torch import nn
from tqdm.auto import tqdm

from ..conv import OREPAConv
from ..report import count_parameters
from .config import DIGITS, FOLDER, Config, default_out
from .data import ImageData, Loaders, load_data, mix, seed_everything
from .errors import UserError
from .export import save_deployed
from .files import load_checkpoint, make_folder
from .loop import Trainer
from .model import create, default_cfg, model_arguments
from .outcome import Outcome, conclude
from .outputs import environment, plot_curves, write_json
from .signals import Stopped, StopRequest

CHECKPOINT, DEPLOY, CURVES, METRICS, EVENTS = "checkpoint.pt", "deploy.pt", "curves.png", "metrics.json", "tensorboard"


@dataclass(frozen=True)
class Request:
    """What the command line asked for.

    Args:
        given: the fields of `Config` that the user set, ``data`` apart.
        data: an image folder, ``"digits"``, or None.
        out: folder for the outputs.
        resume: continue the run in ``out``.
        overwrite: replace the run in ``out``.
        workers: processes that load images.
        checkpoint_every: steps between checkpoints within an epoch.
        accelerator: ``"auto"``, ``"cpu"``, ``"cuda"`` or ``"mps"``.
        devices: their number.
    """

    given: dict[str, Any]
    data: str | None = None
    out: Path | None = None
    resume: bool = False
    overwrite: bool = False
    workers: int | None = None
    checkpoint_every: int = 500
    accelerator: str = "auto"
    devices: int = 1


def train(request: Request) -> int:
    """Train, convert, verify, and write everything.

    Returns:
        The exit code: 0, or 128 plus the number of the signal that stopped the run.

    Raises:
        UserError: nothing has been written then, or, once training began, the last good checkpoint is kept.
    """
    config, path, out, checkpoint = _resolve(request)
    cfg = default_cfg(config.model)
    data = load_data(config, path, cfg)
    if checkpoint is not None and checkpoint["data"]["fingerprint"] != data.fingerprint:
        raise UserError(f"cannot resume: the images in {path} are not those of the run (files were added, removed or moved)")
    seed_everything(mix(config.seed, "initial values"))
    arguments = model_arguments(config.model, len(data.classes), data.in_chans, config.img_size)
    model = create(config.model, arguments, config.img_size, orepa=config.orepa, preserve=config.preserve)
    step = 0 if checkpoint is None else checkpoint["progress"]["step"]
    fabric = _fabric(request, config, data, out, step)
    make_folder(out)
    fabric.launch()
    if fabric.is_global_zero and request.overwrite and checkpoint is None:
        _remove_old_run(out)
    fabric.barrier()

    loaders = Loaders(data, config, _workers(request, config), fabric.global_rank, fabric.world_size)
    about = {
        "model_spec": {
            "model": config.model,
            "model_kwargs": arguments,
            "img_size": config.img_size,
            "classes": data.classes,
            "preprocessing": data.preprocessing,
        },
        "data": {"path": path, "fingerprint": data.fingerprint},
        "environment": environment(),
    }
    if fabric.is_global_zero:
        _announce(config, data, model, fabric, out)
    with StopRequest() as stop, _deterministic(), _Progress(fabric, config, loaders.steps, step) as progress:
        trainer = Trainer(
            fabric, config, model, loaders, out / CHECKPOINT, about, stop, request.checkpoint_every, progress.step, progress.epoch
        )
        if checkpoint is not None:
            trainer.load(checkpoint)
            _compare_environments(checkpoint["environment"], about["environment"])
        try:
            trainer.run()
        except Stopped as stopped:
            progress.close()
            return _stopped(stopped, trainer, out)
        finally:
            fabric.logger.finalize("success")
    if fabric.is_global_zero:
        _conclude(trainer, data, out, about)
    return 0


def _resolve(request: Request) -> tuple[Config, str | None, Path, dict[str, Any] | None]:
    """The configuration, the path of the images, the output folder and, for ``--resume``, the checkpoint."""
    given = dict(request.given)
    if request.data is not None:
        given["data"] = DIGITS if request.data == DIGITS else FOLDER
    if given.get("orepa") is False and given.get("preserve"):
        raise UserError("--preserve is about the blocks that --no-orepa leaves out: give one of them")
    out = request.out or default_out(given.get("model", Config.model), given.get("orepa", True))
    found = out / CHECKPOINT
    if request.resume:
        if request.overwrite:
            raise UserError("--resume continues a run and --overwrite discards it: give one of them")
        if not found.exists():
            raise UserError(f"nothing to resume: there is no {found}")
        checkpoint = load_checkpoint(found)
        config = Config.from_saved(checkpoint["config"])
        config.check_resume(given)
        path = request.data if config.data == FOLDER and request.data else checkpoint["data"]["path"]
        return config, path, out, checkpoint
    if found.exists() and not request.overwrite:
        raise UserError(f"{out} holds a run already: --resume continues it, --overwrite discards it, --out names another folder")
    cfg = default_cfg(given.get("model", Config.model))
    side = 32 if given.get("data", DIGITS) == DIGITS else cfg.get("input_size", (3, 224, 224))[-1]
    config = Config.from_given(given, side)
    path = os.path.abspath(request.data) if config.data == FOLDER and request.data else None
    return config, path, out, None


def _fabric(request: Request, config: Config, data: ImageData, out: Path, step: int) -> Fabric:
    """Lightning Fabric for the devices, with TensorBoard; not yet launched."""
    accelerator = request.accelerator
    if accelerator == "auto":
        accelerator = "cuda" if torch.cuda.is_available() else "cpu"
    if accelerator == "cpu" and config.precision == "16-mixed":
        raise UserError("--precision 16-mixed needs a GPU; on a CPU take bf16-mixed")
    batch = min(config.batch_size, len(data.train))
    if batch % request.devices or batch // request.devices < 2:
        raise UserError(f"a batch of {batch} images cannot be shared by {request.devices} device(s), two or more for each")
    logger = TensorBoardLogger(root_dir=out, name=EVENTS, version="", purge_step=step or None)
    try:
        return Fabric(accelerator=accelerator, devices=request.devices, precision=config.precision, loggers=logger)  # type: ignore[arg-type]
    except Exception as error:  # Lightning has its own kinds for each missing device
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"cannot use --accelerator {accelerator} --devices {request.devices}: {reason}") from error


def _workers(request: Request, config: Config) -> int:
    if request.workers is not None:
        return request.workers
    return 0 if config.data == DIGITS else min(4, os.cpu_count() or 1)


def _remove_old_run(out: Path) -> None:
    """Only what a run writes: the folder may hold other things."""
    for name in (CHECKPOINT, DEPLOY, CURVES, METRICS):
        (out / name).unlink(missing_ok=True)
    shutil.rmtree(out / EVENTS, ignore_errors=True)


@contextlib.contextmanager
def _deterministic() -> Iterator[None]:
    """Kernels that give the same bits each time, also on a GPU: a resumed run would not be the same run otherwise."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    enabled, warn_only = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fill, benchmark = torch.utils.deterministic.fill_uninitialized_memory, torch.backends.cudnn.benchmark
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # a debugging aid that costs time
    torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
        torch.utils.deterministic.fill_uninitialized_memory = fill
        torch.backends.cudnn.benchmark = benchmark


# --- what the user sees ---------------------------------------------------------------------------------------------------


class _Progress:
    """A bar over the whole run on a terminal's stderr, and one line per epoch on stdout."""

    def __init__(self, fabric: Fabric, config: Config, steps: int, done: int) -> None:
        self._shown, self._config = fabric.is_global_zero, config
        # None hides the bar where stderr is not a terminal.
        hidden = None if self._shown else True
        self._bar = tqdm(total=config.epochs * steps, initial=done, unit="step", disable=hidden, leave=False, dynamic_ncols=True)

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._bar.close()

    def step(self, done: int, loss: float) -> None:
        self._bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
        self._bar.update(done - self._bar.n)

    def epoch(self, record: dict[str, Any]) -> None:
        if self._shown:
            tqdm.write(
                f"epoch {record['epoch']:3}/{self._config.epochs}  loss {record['train_loss']:.4f}  "
                f"val loss {record['val_loss']:.4f}  val accuracy {100 * record['val_accuracy']:.2f}%  {record['seconds']:.1f} s",
                file=sys.stdout,
            )
            sys.stdout.flush()


def _announce(config: Config, data: ImageData, model: nn.Module, fabric: Fabric, out: Path) -> None:
    swapped = sum(isinstance(module, OREPAConv) for module in model.modules())
    blocks = f"{swapped} convolutions as OREPA blocks" if config.orepa else "plain"
    print(f"model   {config.model}, {blocks}, {count_parameters(model):,} parameters")
    size = f"{config.img_size}x{config.img_size}"
    print(f"data    {config.data}, {len(data.train)} + {len(data.val)} images of {len(data.classes)} classes, {size}")
    print(f"device  {fabric.world_size} x {fabric.device.type}, {torch.get_num_threads()} threads, {config.precision}")
    print(f"out     {out}", flush=True)


def _compare_environments(then: dict[str, Any], now: dict[str, Any]) -> None:
    old, new = ({"threads": e["threads"], **e["packages"]} for e in (then, now))
    changed = [f"{name} {old.get(name)} -> {value}" for name, value in new.items() if old.get(name) != value]
    if changed:
        print(f"orepa: note: the last bits may differ from an uninterrupted run: {', '.join(changed)}", file=sys.stderr)


def _stopped(stopped: Stopped, trainer: Trainer, out: Path) -> int:
    if not trainer.fabric.is_global_zero:
        return 0  # another code would make Fabric kill the process that is still writing
    place = f"epoch {trainer.epoch + 1}, step {trainer.step}"
    print(f"orepa: stopped in {place}, nothing is lost. To continue: orepa train --resume --out {out}", file=sys.stderr)
    return 128 + stopped.number


def _conclude(trainer: Trainer, data: ImageData, out: Path, about: dict[str, Any]) -> None:
    config, spent = trainer.config, sum(record["seconds"] for record in trainer.history)
    print(f"trained {config.epochs} epochs in {spent:.1f} s; converting and measuring ...", flush=True)
    began = time.perf_counter()
    outcome = conclude(trainer.module, trainer.loaders.val_all, trainer.fabric.device)
    save_deployed(out / DEPLOY, outcome.converted, about["model_spec"])
    plot_curves(out / CURVES, trainer.history, f"{config.model}, {'OREPA' if config.orepa else 'plain'}")
    metrics = {
        "config": config.as_dict(),
        "data": {**about["data"], "train_images": len(data.train), "val_images": len(data.val)},
        "history": trainer.history,
        "best": trainer.best,
        "outcome": outcome.as_dict(),
        "training_seconds": round(spent, 3),
        "conclusion_seconds": round(time.perf_counter() - began, 3),
        "environment": about["environment"],
    }
    write_json(out / METRICS, metrics)
    print(f"\n{outcome}\n\n{_verdict(outcome)}")
    print("converted: plain convolutions; folded: their batch norms folded in as well, as orepa.convert does by default.")
    print(f"\nwritten to {out}/: {CHECKPOINT}, {DEPLOY}, {CURVES}, {METRICS}, {EVENTS}/", flush=True)


def _verdict(outcome: Outcome) -> str:
    trained, others = outcome.columns["trained"], [c for name, c in outcome.columns.items() if name != "trained"]
    if all(c.changed == 0 and c.correct == trained.correct for c in others):
        return f"Conversion changed no prediction: {trained.correct} of {trained.images} correct before and after."
    changed = max(c.changed for c in others)
    return (
        f"Conversion changed {changed} of {trained.images} predictions, by rounding: logits as large as "
        f"{outcome.largest_logit:.1e} differ by {max(c.max_difference for c in others):.1e} at most."
    )
