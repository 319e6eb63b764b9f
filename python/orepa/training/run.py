"""`orepa train` from the options to the last file."""

from __future__ import annotations

import contextlib
import os
import shlex
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

from .config import DIGITS, FOLDER, Config, default_out
from .data import Loaders, load_data, mix, seed_everything
from .display import Progress, announce, compare_environments, verdict
from .errors import UserError
from .export import save_deployed
from .files import load_checkpoint, make_folder
from .images import ImageData
from .loop import Trainer
from .model import create, default_cfg, model_arguments
from .outcome import conclude
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
    """Do all of it: train, convert, verify, and write everything.

    Returns:
        The exit code: 0, or 128 plus the number of the signal that stopped the run.

    Raises:
        UserError: nothing has been written then, or, once training began, the last good checkpoint is kept.
    """
    config, path, out, checkpoint = _resolve(request)
    with _threads(config.threads):
        return _train(request, config, path, out, checkpoint)


def _train(request: Request, config: Config, path: str | None, out: Path, checkpoint: dict[str, Any] | None) -> int:
    cfg = default_cfg(config.model)
    data = load_data(config, path, cfg)
    if checkpoint is not None and checkpoint["data"]["fingerprint"] != data.fingerprint:
        raise UserError(
            f"cannot resume: the images in {path} are not those of the run (files were added, removed or moved)"
        )
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
    about: dict[str, Any] = {
        "model_spec": {
            "model": config.model,
            "model_kwargs": arguments,
            "img_size": config.img_size,
            "classes": data.classes,
            "preprocessing": data.preprocessing,
        },
        "data": {"path": path, "fingerprint": data.fingerprint},
        "environment": {**environment(), "devices": f"{fabric.world_size} x {fabric.device.type}"},
    }
    if fabric.is_global_zero:
        announce(config, data, model, fabric, out)
    with StopRequest() as stop, _deterministic(), Progress(fabric, config, loaders.steps, step) as progress:
        trainer = Trainer(
            fabric,
            config,
            model,
            loaders,
            out / CHECKPOINT,
            about,
            stop,
            request.checkpoint_every,
            progress.step,
            progress.epoch,
        )
        if checkpoint is not None:
            trainer.load(checkpoint)
            compare_environments(checkpoint["environment"], about["environment"])
        try:
            trainer.run()
        except Stopped as stopped:
            progress.close()
            return _stopped(stopped, trainer, out)
        finally:
            loaders.close()
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
        raise UserError(
            f"{out} holds a run already: --resume continues it, --overwrite discards it, --out names another folder"
        )
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
        raise UserError(
            f"a batch of {batch} images cannot be shared by {request.devices} device(s), two or more for each"
        )
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
def _threads(number: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def _deterministic() -> Iterator[None]:
    """Kernels that give the same bits each time, also on a GPU: a resumed run would not be the same run otherwise."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    enabled, warn_only = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    debugging: Any = torch.utils.deterministic
    fill, benchmark = debugging.fill_uninitialized_memory, torch.backends.cudnn.benchmark
    torch.use_deterministic_algorithms(True, warn_only=True)
    debugging.fill_uninitialized_memory = False  # an aid that costs time
    torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
        debugging.fill_uninitialized_memory = fill
        torch.backends.cudnn.benchmark = benchmark


def _stopped(stopped: Stopped, trainer: Trainer, out: Path) -> int:
    if not trainer.fabric.is_global_zero:
        return 0  # another code would make Fabric kill the process that is still writing
    place = f"epoch {trainer.epoch + 1}, step {trainer.step}"
    devices = "" if trainer.fabric.world_size == 1 else f" --devices {trainer.fabric.world_size}"
    command = f"orepa train --resume --out {shlex.quote(str(out))}{devices}"
    print(f"orepa: stopped in {place}, nothing is lost. To continue: {command}", file=sys.stderr)
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
    print(f"\n{outcome}\n\n{verdict(outcome)}")
    print(
        "converted: plain convolutions; folded: their batch norms folded in as well, as orepa.convert does by default."
    )
    print(f"\nwritten to {out}/: {CHECKPOINT}, {DEPLOY}, {CURVES}, {METRICS}, {EVENTS}/", flush=True)
