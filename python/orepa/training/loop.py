"""The training loop: SGD on Lightning Fabric, resumable at every step."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightning.fabric import Fabric
from timm.optim import create_optimizer_v2, param_groups_weight_decay
from timm.scheduler import create_scheduler_v2
from torch import Tensor, nn

from .config import Config
from .data import Loaders, mix, seed_everything
from .errors import UserError
from .files import CHECKPOINT_FORMAT, VERSION, save
from .model import load_weights, without_weight_decay
from .signals import Stopped, StopRequest

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
    ) -> None:
        self.fabric, self.config, self.loaders = fabric, config, loaders
        self.path, self.about, self.stop, self.checkpoint_every = path, about, stop, checkpoint_every
        self.on_step, self.on_epoch = on_step, on_epoch

        spared = without_weight_decay(model)
        self.module = model
        self._optimizer = create_optimizer_v2(
            model,
            opt="momentum",  # timm's "sgd" has Nesterov momentum, the paper's has not
            lr=config.lr,
            momentum=0.9,
            param_group_fn=lambda m: param_groups_weight_decay(m, config.weight_decay, no_weight_decay_list=spared),
        )
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
        self.model, self.optimizer = fabric.setup(model, self._optimizer)

        self.epoch = 0
        self.batch = 0  # of this epoch, the next one
        self.seconds = 0.0  # spent on this epoch
        self.sums = self._zero_sums()
        self.history: list[dict[str, Any]] = []
        self.best: dict[str, Any] | None = None
        self._loss = math.nan

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
            UserError: the loss is not finite any more, an image cannot be read, the disk is full. The last good checkpoint
                stays.
        """
        if self.step == 0:
            self.save()
        while not self.finished:
            began = time.perf_counter() - self.seconds
            try:
                self._train_epoch(began)
                correct, loss = self._validate(began)
            except UserError:
                self.seconds = time.perf_counter() - began
                self._save_what_is_good()
                raise
            self._finish_epoch(correct, loss, time.perf_counter() - began)

    def _train_epoch(self, began: float) -> None:
        self.model.train()
        if self.batch >= self.loaders.steps:
            return  # resumed between the last step and validation
        for images, labels in self.loaders.train(self.epoch, self.batch):
            self._step(images.to(self.fabric.device), labels.to(self.fabric.device))
            self.batch += 1
            self.on_step(self.step, self._loss)
            if self.batch % _LOG_EVERY == 0 or self.fabric.device.type == "cpu":
                self._check_finite()
            if self._stop_requested():
                self._save_and_stop(began)
            if self.step % self.checkpoint_every == 0:
                self.seconds = time.perf_counter() - began
                self.save()

    def _step(self, images: Tensor, labels: Tensor) -> None:
        step = self.step
        seed_everything(mix(self.config.seed, "step", step, self.fabric.global_rank), self.fabric.device)
        self._scheduler.step_update(step)
        self.optimizer.zero_grad(set_to_none=True)
        logits = self.model(images)
        loss = F.cross_entropy(logits.float(), labels)
        self.fabric.backward(loss)
        self.optimizer.step()
        _accumulate(self.sums, loss.detach(), logits.detach(), labels)
        if step % _LOG_EVERY == 0:
            self._loss = loss.item()
            self.fabric.log_dict({"train/loss": self._loss, "lr": self._learning_rate()}, step)

    def _check_finite(self) -> None:
        if not math.isfinite(float(self.sums[0])):
            raise Diverged(
                f"the loss is not finite any more in epoch {self.epoch + 1}, at step {self.step}: try a lower --lr than "
                f"{self.config.lr:g} (the last good checkpoint is {self.path})"
            )

    @torch.no_grad()
    def _validate(self, began: float) -> tuple[int, float]:
        """Number of correct predictions and mean loss on the validation images."""
        self.model.eval()
        sums = self._zero_sums()
        for images, labels in self.loaders.val():
            images, labels = images.to(self.fabric.device), labels.to(self.fabric.device)
            logits = self.model(images)
            _accumulate(sums, F.cross_entropy(logits.float(), labels), logits, labels)
            # Ranks have shares of different length here, so only a lone process may leave in the middle.
            if self.fabric.world_size == 1 and self.stop.number:
                self._save_and_stop(began)
        loss, correct, seen = self._total(sums)
        return int(correct), loss / seen

    def _finish_epoch(self, correct: int, val_loss: float, seconds: float) -> None:
        loss, train_correct, seen = self._total(self.sums)
        record = {
            "epoch": self.epoch + 1,
            "lr": self._learning_rate(),
            "train_loss": loss / seen,
            "train_accuracy": train_correct / seen,
            "val_loss": val_loss,
            "val_accuracy": correct / len(self.loaders.data.val),
            "val_correct": correct,
            "seconds": round(seconds, 3),
        }
        self.history.append(record)
        if self.best is None or record["val_accuracy"] > self.best["val_accuracy"]:
            self.best = {"epoch": record["epoch"], "val_accuracy": record["val_accuracy"]}
        self.epoch, self.batch, self.seconds, self.sums = self.epoch + 1, 0, 0.0, self._zero_sums()
        scalars = {name.replace("_", "/", 1): record[name] for name in ("train_accuracy", "val_loss", "val_accuracy")}
        self.fabric.log_dict(scalars, self.step)
        self.save()
        self.on_epoch(record)

    # --- stop and resume -----------------------------------------------------------------------------------------------

    def _stop_requested(self) -> int:
        """The signal, agreed on by all processes: they have to stop at the same step."""
        if self.fabric.world_size == 1:
            return self.stop.number
        number = torch.tensor(float(self.stop.number), device=self.fabric.device)
        self.stop.number = int(self.fabric.all_reduce(number, reduce_op="max"))  # type: ignore[arg-type]
        return self.stop.number

    def _save_and_stop(self, began: float) -> None:
        self.seconds = time.perf_counter() - began
        self.save()
        raise Stopped(self.stop.number)

    def save(self) -> None:
        """Write the checkpoint, by the first process.

        Raises:
            UserError: the run has diverged (the last good checkpoint stays), or the file cannot be written.
        """
        self._check_finite()
        # A finite loss may have had gradients that are not.
        if not all(bool(torch.isfinite(t).all()) for t in self.module.state_dict().values() if t.is_floating_point()):
            raise Diverged(
                f"the weights are not finite any more in epoch {self.epoch + 1}, at step {self.step}: try a lower --lr than "
                f"{self.config.lr:g} (the last good checkpoint is {self.path})"
            )
        sums = self._total(self.sums)
        if self.fabric.is_global_zero:
            content = {
                "format": CHECKPOINT_FORMAT,
                "version": VERSION,
                "config": self.config.as_dict(),
                **self.about,
                "model": self.module.state_dict(),
                "optimizer": self._optimizer.state_dict(),
                "precision": self.fabric.strategy.precision.state_dict(),
                "progress": {
                    "epoch": self.epoch,
                    "batch": self.batch,
                    "step": self.step,
                    "seconds": self.seconds,
                    "sums": sums,
                    "history": self.history,
                    "best": self.best,
                },
            }
            save(self.path, content)

    def _save_what_is_good(self) -> None:
        """Before an error ends the run. With several processes, the others may be anywhere and cannot take part."""
        if self.fabric.world_size == 1:
            with contextlib.suppress(UserError):
                self.save()

    def load(self, checkpoint: dict[str, Any]) -> None:
        """Continue where a checkpoint was written."""
        load_weights(self.module, checkpoint["model"])
        self._optimizer.load_state_dict(checkpoint["optimizer"])
        self.fabric.strategy.precision.load_state_dict(checkpoint["precision"])
        progress = checkpoint["progress"]
        self.epoch, self.batch, self.seconds = progress["epoch"], progress["batch"], progress["seconds"]
        self.history, self.best = progress["history"], progress["best"]
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
        if self.fabric.world_size > 1:
            sums = self.fabric.all_reduce(sums.clone(), reduce_op="sum")  # type: ignore[assignment]
        return sums.tolist()


class Diverged(UserError):
    """The loss or the weights are not finite."""


def _accumulate(sums: Tensor, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
    sums += torch.stack([loss * len(labels), (logits.argmax(1) == labels).sum(), sums.new_tensor(len(labels))]).to(
        sums.dtype
    )
