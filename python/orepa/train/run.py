"""`orepa train` from the options to the last file."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import SharedError, UserError
from .config import DIGITS, Config, default_out
from .data import Loaders, kind_of_data, load_data, mix, seed_everything
from .determinism import default_dtype, deterministic, threads
from .display import Progress, announce, compare_environments, verdict
from .events import Events
from .export import save_deployed
from .files import load_checkpoint, make_folder
from .images import ImageData
from .loop import Trainer
from .model import create, default_cfg, from_checkpoint, model_arguments, which_weights
from .outcome import conclude
from .outputs import environment, plot_curves, write_json
from .processes import make_fabric, world_size
from .signals import Stopped, StopRequest

CHECKPOINT, DEPLOY, CURVES, METRICS, EVENTS = "checkpoint.pt", "deploy.pt", "curves.png", "metrics.json", "tensorboard"


@dataclass(frozen=True)
class Request:
    """What the command line asked for.

    Args:
        given: the fields of `Config` that the user set, ``data`` apart.
        data: ``"digits"``, None for them, or a folder of images, shards, or CIFAR.
        out: folder for the outputs.
        resume: continue the run in ``out``.
        overwrite: replace the run in ``out``.
        workers: processes that load images.
        max_broken: images that may be unreadable, None for the default of `Skipped`.
        checkpoint_every: steps between checkpoints within an epoch.
        checkpoint_minutes: the most time between checkpoints.
        accelerator: ``"auto"``, ``"cpu"``, ``"cuda"`` or ``"mps"``.
        strategy: ``"auto"``, ``"ddp"`` or ``"fsdp2"``.
        devices: per node, None for one, or what torchrun says.
        num_nodes: machines, None for one, or what torchrun says.
    """

    given: dict[str, Any]
    data: str | None = None
    out: Path | None = None
    resume: bool = False
    overwrite: bool = False
    workers: int | None = None
    max_broken: int | None = None
    checkpoint_every: int = 500
    checkpoint_minutes: float = 15.0
    accelerator: str = "auto"
    strategy: str = "auto"
    devices: int | None = None
    num_nodes: int | None = None


def train(request: Request) -> int:
    """Do all of it: train, convert, verify, and write everything.

    Returns:
        The exit code: 0, or 128 plus the number of the signal that stopped the run.

    Raises:
        UserError: nothing has been written then, or, once training began, the last good checkpoint is kept.
    """
    config, path, out, checkpoint = _resolve(request)
    with threads(config.threads), default_dtype(config.precision):
        return _train(request, config, path, out, checkpoint)


def _train(request: Request, config: Config, path: str | None, out: Path, checkpoint: dict[str, Any] | None) -> int:
    cfg = default_cfg(config.model)
    data = load_data(config, path, cfg)
    if checkpoint is not None and checkpoint["data"]["fingerprint"] != data.fingerprint:
        raise UserError(
            f"cannot resume: the images in {path} are not those of the run (files were added, removed or moved)"
        )
    _check_shares(config, world_size(request.devices, request.num_nodes), len(data.train))
    seed_everything(mix(config.seed, "initial values"))
    arguments = model_arguments(config.model, len(data.classes), data.in_chans, config.img_size)
    model = create(config.model, arguments, config.img_size, orepa=config.orepa, preserve=config.preserve)
    step = 0 if checkpoint is None else checkpoint["progress"]["step"]
    fabric = make_fabric(
        config,
        accelerator=request.accelerator,
        strategy=request.strategy,
        devices=request.devices,
        num_nodes=request.num_nodes,
        events=out / EVENTS,
        step=step,
    )
    make_folder(out)
    fabric.launch()
    if fabric.is_global_zero and request.overwrite and checkpoint is None:
        _remove_old_run(out)
    fabric.barrier()

    ranks = fabric.global_rank, fabric.world_size
    loaders = Loaders(data, config, _workers(request, config), *ranks, max_broken=request.max_broken)
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
    progress = Progress(fabric, config, loaders.steps, step)
    with StopRequest() as stop, deterministic(), Events(fabric) as events, progress:
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
            events.log,
            request.checkpoint_minutes,
        )
        if checkpoint is not None:
            trainer.load(checkpoint)
            compare_environments(checkpoint["environment"], about["environment"])
        try:
            trainer.run()
        except Stopped as stopped:
            progress.close()
            return _stopped(stopped, trainer, request, out)
        except SharedError:
            if fabric.is_global_zero:
                raise
            return 0  # the first process tells; see `_stopped`
        finally:
            loaders.close()
    if fabric.is_global_zero:
        _conclude(trainer, data, out, about)
    return 0


def _resolve(request: Request) -> tuple[Config, str | None, Path, dict[str, Any] | None]:
    """The configuration, the path of the images, the output folder and, for ``--resume``, the checkpoint."""
    given = dict(request.given)
    if request.data is not None:
        given["data"] = kind_of_data(request.data)
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
        path = request.data if config.data != DIGITS and request.data else checkpoint["data"]["path"]
        return config, path, out, checkpoint
    if found.exists() and not request.overwrite:
        raise UserError(
            f"{out} holds a run already: --resume continues it, --overwrite discards it, --out names another folder"
        )
    cfg = default_cfg(given.get("model", Config.model))
    config = Config.from_given(given, cfg.get("input_size", (3, 224, 224))[-1])
    path = os.path.abspath(request.data) if config.data != DIGITS and request.data else None
    return config, path, out, None


def _check_shares(config: Config, processes: int, images: int) -> None:
    """Every process has to have the same number of images in every part of every step."""
    batch, parts = min(config.batch_size, images), config.grad_accum
    share, rest = divmod(batch, processes * parts)
    if rest or share < 2:
        cut = f", in --grad-accum {parts} parts each" if parts > 1 else ""
        raise UserError(
            f"a batch of {batch} images cannot be shared by {processes} device(s){cut}, two or more for each"
        )
    if share % 2 and (config.mixup or config.cutmix):
        raise UserError(
            f"--mixup and --cutmix mix pairs of images, but the {processes} device(s) have {share} images each, an odd number: "
            "take another --batch-size"
        )


def _workers(request: Request, config: Config) -> int:
    if request.workers is not None:
        return request.workers
    return 0 if config.data == DIGITS else min(4, os.cpu_count() or 1)


def _remove_old_run(out: Path) -> None:
    """Only what a run writes: the folder may hold other things."""
    for name in (CHECKPOINT, DEPLOY, CURVES, METRICS):
        (out / name).unlink(missing_ok=True)
    shutil.rmtree(out / EVENTS, ignore_errors=True)


def _stopped(stopped: Stopped, trainer: Trainer, request: Request, out: Path) -> int:
    if not trainer.fabric.is_global_zero:
        return 0  # another code would make Fabric kill the process that is still writing
    place = f"epoch {trainer.epoch + 1}, step {trainer.step}"
    machine = {
        "--devices": request.devices,
        "--num-nodes": request.num_nodes,
        "--strategy": None if request.strategy == Request.strategy else request.strategy,
    }
    again = "".join(f" {option} {value}" for option, value in machine.items() if value is not None)
    command = f"orepa train --resume --out {shlex.quote(str(out))}{again}"
    print(f"orepa: stopped in {place}, nothing is lost. To continue: {command}", file=sys.stderr)
    return 128 + stopped.number


def _conclude(trainer: Trainer, data: ImageData, out: Path, about: dict[str, Any]) -> None:
    config, spent = trainer.config, sum(record["seconds"] for record in trainer.history)
    skipped = trainer.loaders.skipped.known
    print(f"trained {config.epochs} epochs in {spent:.1f} s; converting and measuring ...", flush=True)
    began = time.perf_counter()
    # What is converted is what was saved: whole tensors, plain batch norms, and the average of the weights if there is one.
    checkpoint = load_checkpoint(out / CHECKPOINT)
    model = from_checkpoint(checkpoint).to(trainer.fabric.device)
    outcome = conclude(model, trainer.loaders.val_all, trainer.fabric.device)
    save_deployed(out / DEPLOY, outcome.converted, about["model_spec"])
    plot_curves(out / CURVES, trainer.history, f"{config.model}, {'OREPA' if config.orepa else 'plain'}")
    metrics = {
        "config": config.as_dict(),
        "data": {**about["data"], "train_images": len(data.train), "val_images": len(data.val)},
        "history": trainer.history,
        "best": trainer.best,
        "skipped_images": [{"image": name, "reason": reason} for name, reason in skipped.items()],
        "weights": which_weights(checkpoint),
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
    if "ema" in checkpoint:
        print(f"all three: {which_weights(checkpoint)}.")
    if skipped:
        print(f"{len(skipped)} image(s) could not be read and were skipped: see {METRICS}.")
    print(f"\nwritten to {out}/: {CHECKPOINT}, {DEPLOY}, {CURVES}, {METRICS}, {EVENTS}/", flush=True)
