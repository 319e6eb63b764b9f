"""`orepa train`, from the options to the last file."""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from ..errors import CollectiveError, UserError
from ..surgery.evaluation import evaluate_conversion
from .config import DIGITS, Config, Request
from .data import Loaders, derive_seed, kind_of_data, load_data, seed_everything
from .distributed import make_fabric, world_size
from .files import load_checkpoint, make_folder, write_json
from .loop import Trainer
from .model import create, default_cfg, describe_weights, from_checkpoint, model_arguments, save_deployed
from .report import Events, compare_environments, environment, plot_curves, print_epoch, print_header, progress_bar
from .runtime import Stopped, StopRequest, deterministic, settings

CHECKPOINT, DEPLOY, CURVES, METRICS, EVENTS = "checkpoint.pt", "deploy.pt", "curves.png", "metrics.json", "tensorboard"


def train(request: Request) -> int:
    """Train, convert, verify, and write all files.

    Returns:
        The exit code: 0, or 128 plus the number of the signal that stopped the run.

    Raises:
        UserError, ConversionError: nothing has been written then or, once training began, the last good checkpoint remains.
    """
    config, path, out, checkpoint = _resolve(request)
    with settings(config.threads, config.precision):
        return _train(request, config, path, out, checkpoint)


def _train(request: Request, config: Config, path: str | None, out: Path, checkpoint: dict[str, Any] | None) -> int:
    data = load_data(config, path, default_cfg(config.model))
    if checkpoint is not None and checkpoint["data"]["fingerprint"] != data.fingerprint:
        raise UserError(f"cannot resume: the images in {path} are not those of the run (added, removed or moved)")
    _check_batch_size(config, world_size(request.devices, request.num_nodes), len(data.train))
    seed_everything(derive_seed(config.seed, "initial values"))
    arguments = model_arguments(config.model, len(data.classes), data.in_chans, config.img_size)
    model = create(config.model, arguments, config.img_size, orepa=config.orepa, preserve=config.preserve)
    step = 0 if checkpoint is None else checkpoint["progress"]["step"]
    fabric = make_fabric(config, request, out / EVENTS, step)
    make_folder(out)
    fabric.launch()
    if fabric.is_global_zero and request.overwrite and checkpoint is None:
        _remove_old_run(out)
    fabric.barrier()

    workers = 0 if config.data == DIGITS else min(4, os.cpu_count() or 1)
    workers = workers if request.workers is None else request.workers
    loaders = Loaders(data, config, workers, fabric.global_rank, fabric.world_size, request.max_broken)
    spec = {"model": config.model, "model_kwargs": arguments, "img_size": config.img_size}
    about: dict[str, Any] = {
        "model_spec": {**spec, "classes": data.classes, "preprocessing": data.preprocessing},
        "data": {"path": path, "fingerprint": data.fingerprint},
        "environment": {**environment(), "devices": f"{fabric.world_size} x {fabric.device.type}"},
    }
    if fabric.is_global_zero:
        print_header(config, data, model, fabric, out)
    bar = progress_bar(config.epochs * loaders.steps, step, fabric.is_global_zero)

    def on_step(done: int, loss: float) -> None:
        bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
        bar.update(done - bar.n)

    def on_epoch(record: dict[str, Any]) -> None:
        if fabric.is_global_zero:
            print_epoch(record, config.epochs)

    with StopRequest() as stop, deterministic(), Events(fabric) as events, contextlib.closing(bar):
        every, minutes = request.checkpoint_every, request.checkpoint_minutes
        trainer = Trainer(
            fabric, config, model, loaders, out / CHECKPOINT, about, stop, every, on_step, on_epoch, events.log, minutes
        )
        if checkpoint is not None:
            trainer.load(checkpoint)
            compare_environments(checkpoint["environment"], about["environment"])
        try:
            trainer.run()
        except Stopped as stopped:
            bar.close()
            return _stopped(stopped, trainer, request, out)
        except CollectiveError:
            if fabric.is_global_zero:
                raise
            return 0  # the first process reports it; see `_stopped`
        finally:
            loaders.close()
    if fabric.is_global_zero:
        _evaluate(trainer, out)
    return 0


def _resolve(request: Request) -> tuple[Config, str | None, Path, dict[str, Any] | None]:
    """Return the configuration, the path of the images, the output folder and, for ``--resume``, the checkpoint."""
    given = dict(request.given)
    if request.data is not None:
        given["data"] = kind_of_data(request.data)
    name, orepa = given.get("model", Config.model), given.get("orepa", True)
    if not orepa and given.get("preserve"):
        raise UserError("--preserve is about the blocks that --no-orepa leaves out: give one of them")
    out = request.out or Path("runs") / f"{name.replace('/', '_')}-{'orepa' if orepa else 'plain'}"
    path = out / CHECKPOINT
    if request.resume:
        if request.overwrite:
            raise UserError("--resume continues a run and --overwrite discards it: give one of them")
        if not path.exists():
            raise UserError(f"nothing to resume: there is no {path}")
        checkpoint = load_checkpoint(path)
        config = Config.from_saved(checkpoint["config"])
        config.check_resume(given)
        moved = request.data if config.data != DIGITS else None
        return config, moved or checkpoint["data"]["path"], out, checkpoint
    if path.exists() and not request.overwrite:
        raise UserError(f"{out} holds a run already: --resume continues it, --overwrite discards it (or change --out)")
    config = Config.from_given(given, default_cfg(name).get("input_size", (3, 224, 224))[-1])
    return config, os.path.abspath(request.data) if config.data != DIGITS and request.data else None, out, None


def _check_batch_size(config: Config, processes: int, images: int) -> None:
    """Check that every process gets the same number of images in every part of every step."""
    batch, parts = min(config.batch_size, images), config.grad_accum
    share, rest = divmod(batch, processes * parts)
    if rest or share < 2:
        cut = f", in --grad-accum {parts} parts each" if parts > 1 else ""
        raise UserError(
            f"a batch of {batch} images cannot be shared by {processes} device(s){cut}, two or more for each"
        )
    if share % 2 and (config.mixup or config.cutmix):
        odd = f"the {processes} device(s) have {share} images each"
        raise UserError(f"--mixup and --cutmix mix pairs of images, but {odd}: take another --batch-size")


def _remove_old_run(out: Path) -> None:
    """Remove what a run writes, and nothing else in the folder."""
    for name in (CHECKPOINT, DEPLOY, CURVES, METRICS):
        (out / name).unlink(missing_ok=True)
    shutil.rmtree(out / EVENTS, ignore_errors=True)


def _stopped(stopped: Stopped, trainer: Trainer, request: Request, out: Path) -> int:
    if not trainer.fabric.is_global_zero:
        return 0  # any other code would make Fabric kill the process that is still writing
    options = {"--out": shlex.quote(str(out)), "--devices": request.devices, "--num-nodes": request.num_nodes}
    if request.strategy != Request.strategy:
        options["--strategy"] = request.strategy
    command = "".join(f" {option} {value}" for option, value in options.items() if value is not None)
    place = f"epoch {trainer.epoch + 1}, step {trainer.step}"
    message = f"orepa: stopped in {place}, nothing is lost. To continue: orepa train --resume{command}"
    print(message, file=sys.stderr)
    return 128 + stopped.number


def _evaluate(trainer: Trainer, out: Path) -> None:
    config, about, data, device = trainer.config, trainer.about, trainer.loaders.data, trainer.fabric.device
    spent, skipped = sum(record["seconds"] for record in trainer.history), trainer.loaders.bad_samples.known
    print(f"trained {config.epochs} epochs in {spent:.1f} s; converting and measuring ...", flush=True)
    began = time.perf_counter()
    # From the checkpoint: whole tensors, plain batch norms, and the averaged weights if there are any.
    checkpoint = load_checkpoint(out / CHECKPOINT)
    weights = describe_weights(checkpoint)
    evaluation = evaluate_conversion(from_checkpoint(checkpoint).to(device), trainer.loaders.val_all, device)
    save_deployed(out / DEPLOY, evaluation.converted, about["model_spec"])
    plot_curves(out / CURVES, trainer.history, f"{config.model}, {'OREPA' if config.orepa else 'plain'}")
    metrics = {
        "config": config.as_dict(),
        "data": {**about["data"], "train_images": len(data.train), "val_images": len(data.val)},
        "history": trainer.history,
        "best": trainer.best,
        "skipped_images": [{"image": name, "reason": why} for name, why in skipped.items()],
        "weights": weights,
        "outcome": evaluation.as_dict(),
        "training_seconds": round(spent, 3),
        "conclusion_seconds": round(time.perf_counter() - began, 3),
        "environment": about["environment"],
    }
    write_json(out / METRICS, metrics)
    print(f"\n{evaluation}\n\n{evaluation.summary()}")
    print("converted: plain convolutions; folded: with batch norms folded as well, as orepa.convert does by default.")
    if "ema" in checkpoint:
        print(f"all three: {weights}.")
    if skipped:
        print(f"{len(skipped)} image(s) could not be read and were skipped: see {METRICS}.")
    print(f"\nwritten to {out}/: {CHECKPOINT}, {DEPLOY}, {CURVES}, {METRICS}, {EVENTS}/", flush=True)
