"""The training loop: SGD on Lightning Fabric, resumable at every step."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.fabric import Fabric
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from ..errors import SharedError, UserError
from ..optim import parameter_groups
from .config import Config
from .data import Loaders, mix, seed_everything
from .files import CHECKPOINT_FORMAT, VERSION, save
from .meter import Meter, peak_memory
from .model import load_weights
from .objective import Objective, cross_entropy
from .processes import share_buffers
from .sharding import load_optimizer, shard_like, whole
from .signals import Stopped, StopRequest
from .sync_norm import synchronise_norms

_LOG_EVERY = 10
_WARMUP_START = 0.01  # of the peak learning rate, at the first step


class Trainer:
    """A run in progress: model, optimizer, schedule, position. All of it goes to the checkpoint and comes back bit by bit.

    Order and augmentation are functions of (seed, epoch, image), the generators are seeded anew before every step, and the
    learning rate is a function of the step: nothing random has a history that would have to be stored.

    Args:
        fabric: launched.
        config: of the run.
        model: not yet set up by Fabric.
        loaders: of the data.
        path: of the checkpoint.
        about: entries of the checkpoint that describe the model and the data.
        stop: asks for an end.
        checkpoint_every: steps between checkpoints within an epoch.
        on_step: called after each step with the number of steps done and the loss of the last logged one.
        on_epoch: called after each epoch with its record.
        log: called with scalars to plot, and the step they belong to.
        checkpoint_minutes: the most time between checkpoints, None for any.
    """

    def __init__(
        self,
        fabric: Fabric,
        config: Config,
        model: nn.Module,
        loaders: Loaders,
        path: Path,
        about: dict[str, Any],
        stop: StopRequest,
        checkpoint_every: int,
        on_step: Callable[[int, float], None] = lambda step, loss: None,
        on_epoch: Callable[[dict[str, Any]], None] = lambda record: None,
        log: Callable[[dict[str, float | None], int], None] = lambda scalars, step: None,
        checkpoint_minutes: float | None = None,
    ) -> None:
        self.fabric, self.config, self.loaders = fabric, config, loaders
        self.path, self.about, self.stop, self.checkpoint_every = path, about, stop, checkpoint_every
        self.on_step, self.on_epoch, self.log = on_step, on_epoch, log
        self.checkpoint_seconds = math.inf if checkpoint_minutes is None else 60 * checkpoint_minutes

        self.module = synchronise_norms(model, fabric.device) if config.sync_bn else model
        self.model = fabric.setup_module(self.module)  # before the optimizer: FSDP2 replaces the parameters
        groups = parameter_groups(
            self.module, config.lr, weight_decay=config.weight_decay, decay_scales=config.scale_weight_decay
        )
        self._optimizer = torch.optim.SGD(groups, config.lr, momentum=0.9)
        self._scheduler, _ = create_scheduler_v2(
            self._optimizer,
            "cosine",
            num_epochs=config.epochs - config.warmup_epochs,
            warmup_epochs=config.warmup_epochs,
            warmup_prefix=True,
            warmup_lr=config.lr * _WARMUP_START,
            step_on_epochs=False,
            updates_per_epoch=loaders.steps,
        )
        self.optimizer: Any = fabric.setup_optimizers(self._optimizer)
        # With the warm-up, short runs have an average that is worth something, too.
        self.ema = None if config.ema is None else ModelEmaV3(self.module, config.ema, use_warmup=True)
        self._objective = Objective(config, len(loaders.data.classes))

        self.epoch = 0
        self.batch = 0  # of this epoch, the next one
        self.seconds = 0.0  # spent on this epoch
        self.sums = self._zero_sums()
        self.history: list[dict[str, Any]] = []
        self.best: dict[str, Any] | None = None
        self._loss = math.nan
        self._alone = fabric.world_size == 1
        self._pace, self._recent = Meter(), Meter()
        self._rate: float | None = None  # images per second of training in this epoch, as far as this process saw it
        self._saved_at = time.monotonic()

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return self.epoch * self.loaders.steps + self.batch

    @property
    def finished(self) -> bool:
        return self.epoch >= self.config.epochs

    def run(self) -> None:
        """Train to the end, with a checkpoint at the start, after every epoch and every ``checkpoint_every`` steps.

        Raises:
            Stopped: a signal came; the checkpoint is written.
            UserError: the loss is not finite any more, too many images cannot be read, the disk is full. The last good
                checkpoint stays.
        """
        if self.step == 0:
            self.save()
        while not self.finished:
            began = time.perf_counter() - self.seconds
            try:
                self._train_epoch(began)
                result = self._validate(began)
            except UserError:
                self.seconds = time.perf_counter() - began
                self._save_what_is_good()
                raise
            self._finish_epoch(*result, time.perf_counter() - began)

    def _train_epoch(self, began: float) -> None:
        self.model.train()
        self._pace, self._recent, self._rate = Meter(), Meter(), None
        if self.batch >= self.loaders.steps:
            return  # resumed between the last step and validation
        for images, labels in self.loaders.train(self.epoch, self.batch):
            if self._alone:
                self.loaders.skipped.agree()  # before the step, so that one image too many has no part in what is saved
            self._step(images, labels)
            self.batch += 1
            self.on_step(self.step, self._loss)
            self._look_around(began)
            if self.step % self.checkpoint_every == 0:
                self.seconds = time.perf_counter() - began
                self.save()
        self._rate = self._pace.lap()

    def _step(self, images: Tensor, labels: Tensor) -> None:
        step, parts = self.step, self.config.grad_accum
        seed_everything(mix(self.config.seed, "step", step, self.fabric.global_rank), self.fabric.device)
        self._scheduler.step_update(step)
        self.optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), device=self.fabric.device)
        for part, (some, theirs) in enumerate(zip(images.chunk(parts), labels.chunk(parts), strict=True)):
            theirs = theirs.to(self.fabric.device)
            inputs, targets = self._objective.mix(some.to(self.fabric.device), theirs)
            with self.fabric.no_backward_sync(self.model, enabled=part < parts - 1):
                logits = self.model(inputs)
                loss = self._objective.loss(logits, targets)
                self.fabric.backward(loss / parts)
            total += loss.detach() / parts
            _accumulate(self.sums, loss.detach(), logits.detach(), theirs)
        self.optimizer.step()
        if self.ema is not None:
            self.ema.update(self.module, step + 1)
        for meter in (self._pace, self._recent):
            meter.count(len(labels) * self.fabric.world_size)
        if step % _LOG_EVERY == 0:
            self._loss = total.item()
            rate = self._recent.lap()
            self.log({"train/loss": self._loss, "lr": self._learning_rate(), "images_per_second": rate}, step)

    def _look_around(self, began: float) -> None:
        """Between two steps: is all well, has somebody asked for an end, is it time for a checkpoint?

        Processes have to agree on the answers, which takes time on a GPU, so there they do not ask after every step.
        """
        regular = self.batch % _LOG_EVERY == 0 or self.fabric.device.type == "cpu"
        if not regular and not self._alone:
            return
        diverged = regular and not math.isfinite(float(self.sums[0]))
        due = time.monotonic() - self._saved_at >= self.checkpoint_seconds
        diverged, broken, number, due = self._most(diverged, self.loaders.skipped.pending, self.stop.number, due)
        if diverged:
            raise self._diverged("loss is")
        if broken:
            self.loaders.skipped.agree()
        self.seconds = time.perf_counter() - began
        if number:  # a signal that came since it was read is for the next time
            self.stop.number = number
            self._save_and_stop(began)
        if due:
            self.save()

    @torch.no_grad()
    def _validate(self, began: float) -> tuple[int, float, int]:
        """Number of correct predictions, mean loss, and number of validation images.

        With a moving average of the weights, it is the average that is validated.
        """
        self.model.eval()
        module = self.module if self.ema is None else self.ema.module
        share_buffers(module)
        sums, done = self._zero_sums(), 0
        for images, labels in self.loaders.val():
            images, labels = images.to(self.fabric.device), labels.to(self.fabric.device)
            logits, done = self._predict(module, images), done + 1
            _accumulate(sums, cross_entropy(logits, labels), logits, labels)
            # Ranks have shares of different length here, so only a lone process may leave in the middle.
            if self._alone and self.stop.number:
                self._save_and_stop(began)
        if not self._alone:  # sharded parameters are gathered by all or by none
            side, channels = self.config.img_size, self.loaders.data.in_chans
            for _ in range(done, self.loaders.val_steps):
                self._predict(module, torch.zeros(1, channels, side, side, device=self.fabric.device))
        self.loaders.skipped.agree()
        loss, correct, seen = self._total(sums)
        if not seen:
            raise SharedError("none of the validation images can be read")
        return int(correct), loss / seen, int(seen)

    def _predict(self, module: nn.Module, images: Tensor) -> Tensor:
        """Without the wrapper of data-parallel training: it exchanges buffers, and not all processes need have images here."""
        with self.fabric.autocast():
            return module(self.fabric.strategy.precision.convert_input(images))

    def _finish_epoch(self, correct: int, val_loss: float, val_images: int, seconds: float) -> None:
        loss, train_correct, seen = self._total(self.sums)
        memory = peak_memory(self.fabric.device)
        record = {
            "epoch": self.epoch + 1,
            "lr": self._learning_rate(),
            "train_loss": loss / seen,
            "train_accuracy": train_correct / seen,
            "val_loss": val_loss,
            "val_accuracy": correct / val_images,
            "val_correct": correct,
            "skipped_images": len(self.loaders.skipped.known),
            "seconds": round(seconds, 3),
            "images_per_second": None if self._rate is None else round(self._rate, 1),
            "peak_memory_mb": None if memory is None else round(self._most(memory)[0], 1),
        }
        self.history.append(record)
        if self.best is None or record["val_accuracy"] > self.best["val_accuracy"]:
            self.best = {"epoch": record["epoch"], "val_accuracy": record["val_accuracy"]}
        self.epoch, self.batch, self.seconds, self.sums = self.epoch + 1, 0, 0.0, self._zero_sums()
        scalars = {name.replace("_", "/", 1): record[name] for name in ("train_accuracy", "val_loss", "val_accuracy")}
        scalars |= {name: record[name] for name in ("skipped_images", "peak_memory_mb")}
        self.log(scalars, self.step)
        self.save()
        self.on_epoch(record)

    # --- stop and resume -----------------------------------------------------------------------------------------------

    def _save_and_stop(self, began: float) -> None:
        self.seconds = time.perf_counter() - began
        self.save()
        raise Stopped(self.stop.number)

    def save(self) -> None:
        """Write the checkpoint, by the first process. All have to call it.

        Raises:
            SharedError: the run has diverged (the last good checkpoint stays), or the file cannot be written.
        """
        self.loaders.skipped.agree()
        sums = self._total(self.sums)
        model, optimizer = whole(self.module.state_dict()), whole(self._optimizer.state_dict())
        # A finite loss may have had gradients that are not.
        finite = all(bool(torch.isfinite(t).all()) for t in model.values() if t.is_floating_point())
        lost, ill = self._most(not math.isfinite(sums[0]), not finite)
        if lost or ill:
            raise self._diverged("loss is" if lost else "weights are")
        failure = None
        if self.fabric.is_global_zero:
            content = {
                "format": CHECKPOINT_FORMAT,
                "version": VERSION,
                "config": self.config.as_dict(),
                **self.about,
                "model": model,
                "optimizer": optimizer,
                "precision": self.fabric.strategy.precision.state_dict(),
                "progress": {
                    "epoch": self.epoch,
                    "batch": self.batch,
                    "step": self.step,
                    "seconds": self.seconds,
                    "sums": sums,
                    "history": self.history,
                    "best": self.best,
                    "skipped": self.loaders.skipped.known,
                },
            }
            if self.ema is not None:
                content["ema"] = self.ema.module.state_dict()
            try:
                save(self.path, content)
            except UserError as error:
                failure = str(error)
        failure = failure if self._alone else self.fabric.broadcast(failure)
        if failure is not None:
            raise SharedError(failure)
        self._saved_at = time.monotonic()

    def _save_what_is_good(self) -> None:
        """Before an error ends the run. With several processes, the others may be anywhere and cannot take part."""
        if self._alone:
            with contextlib.suppress(UserError):
                self.save()

    def load(self, checkpoint: dict[str, Any]) -> None:
        """Continue where a checkpoint was written, on whatever number of devices."""
        load_weights(self.module, shard_like(self.module, checkpoint["model"]))
        load_optimizer(self._optimizer, checkpoint["optimizer"])
        if self.ema is not None:
            load_weights(self.ema.module, checkpoint["ema"])
        self.fabric.strategy.precision.load_state_dict(checkpoint["precision"])
        progress = checkpoint["progress"]
        self.epoch, self.batch, self.seconds = progress["epoch"], progress["batch"], progress["seconds"]
        self.history, self.best = progress["history"], progress["best"]
        self.loaders.skipped.known.update(progress.get("skipped", {}))
        if self.fabric.is_global_zero:  # the sums are those of all processes
            self.sums = self.sums.new_tensor(progress["sums"])

    # --- small things ----------------------------------------------------------------------------------------------------

    def _learning_rate(self) -> float:
        return float(self._optimizer.param_groups[0]["lr"])

    def _zero_sums(self) -> Tensor:
        """Sums over images: loss, correct predictions, images."""
        wide = torch.float32 if self.fabric.device.type == "mps" else torch.float64
        return torch.zeros(3, dtype=wide, device=self.fabric.device)

    def _total(self, sums: Tensor) -> list[float]:
        if not self._alone:
            sums = self.fabric.all_reduce(sums.clone(), reduce_op="sum")  # type: ignore[assignment]
        return sums.tolist()

    def _most(self, *values: float) -> list[Any]:
        """The largest of each value over all processes: an agreement, where the value says whether something is the case."""
        if self._alone:
            return list(values)
        own = torch.tensor([float(value) for value in values], device=self.fabric.device)
        return [int(v) if v == int(v) else v for v in self.fabric.all_reduce(own, reduce_op="max").tolist()]  # type: ignore[union-attr]

    def _diverged(self, what: str) -> Diverged:
        return Diverged(
            f"the {what} not finite any more in epoch {self.epoch + 1}, at step {self.step}: try a lower --lr than "
            f"{self.config.lr:g} (the last good checkpoint is {self.path})"
        )


class Diverged(SharedError):
    """The loss or the weights are not finite."""


def _accumulate(sums: Tensor, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
    sums += torch.stack([loss * len(labels), (logits.argmax(1) == labels).sum(), sums.new_tensor(len(labels))]).to(
        sums.dtype
    )
