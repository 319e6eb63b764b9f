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
from lightning.fabric.strategies import DDPStrategy
from timm.data import Mixup
from timm.layers import convert_sync_batchnorm
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from ..errors import CollectiveError, UserError
from ..modules.accumulation import squeeze_once
from ..modules.reduction import exclude_from_ddp
from ..optim import check_optimizer, parameter_groups
from .config import Config
from .data import Loaders, derive_seed, seed_everything
from .distributed import broadcast_buffers, full_state, load_optimizer
from .files import CHECKPOINT_FORMAT, VERSION, save
from .model import load_weights
from .report import peak_memory
from .runtime import Stopped, StopRequest

_LOG_EVERY = 10
_WARMUP_START = 0.01  # of the peak learning rate, at the first step


class Diverged(CollectiveError):
    """The loss or the weights are not finite."""


class Objective:
    """Cross entropy with label smoothing, mixup and cutmix, which draws from NumPy's generator, seeded before every step."""

    def __init__(self, config: Config, classes: int) -> None:
        smoothing = self._smoothing = config.label_smoothing
        self._mixup = None
        if config.mixup > 0 or config.cutmix > 0:
            self._mixup = Mixup(config.mixup, config.cutmix, label_smoothing=smoothing, num_classes=classes)

    def mix(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return images and targets of a step; mixed ones have probabilities ``[N, classes]`` as targets."""
        return (images, labels) if self._mixup is None else self._mixup(images, labels)

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Return the mean over the images, in float32 at least."""
        smoothing = 0.0 if targets.is_floating_point() else self._smoothing  # mixed targets are smooth already
        return cross_entropy(logits, targets, smoothing)


def cross_entropy(logits: Tensor, targets: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Return the mean cross entropy of labels or probabilities, in float32 at least."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    targets = targets.to(wide.dtype) if targets.is_floating_point() else targets
    return F.cross_entropy(wide, targets, label_smoothing=label_smoothing)


class Trainer:
    """A run in progress: model, optimizer, schedule, position. A checkpoint restores all of it bit by bit.

    Order and augmentation are functions of (seed, epoch, image), the generators are seeded before every step, and the
    learning rate is a function of the step: there is no random state to store.

    Args:
        fabric: launched.
        model: not yet set up by Fabric.
        path: of the checkpoint.
        about: entries of the checkpoint that describe the model and the data.
        checkpoint_every, checkpoint_minutes: steps, and minutes at most, between checkpoints within an epoch.
        on_step, on_epoch: called with the steps done and the last logged loss, and with the record of an epoch.
        log: called with scalars to plot, and their step.
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

        self._single = fabric.world_size == 1
        self.module = convert_sync_batchnorm(model) if config.sync_bn and not self._single else model
        self._group = (
            torch.distributed.group.WORLD if isinstance(fabric.strategy, DDPStrategy) and config.orepa else None
        )
        if self._group is not None:
            exclude_from_ddp(self.module)  # `squeeze_once` exchanges fewer bytes
        self.model = fabric.setup_module(self.module)  # before the optimizer: FSDP2 replaces the parameters
        decay: dict[str, Any] = {"weight_decay": config.weight_decay, "decay_scales": config.scale_weight_decay}
        self._optimizer = torch.optim.SGD(parameter_groups(self.module, config.lr, **decay), config.lr, momentum=0.9)
        check_optimizer(self.module, self._optimizer)
        steps, warmup = config.epochs * loaders.steps, config.warmup_epochs * loaders.steps
        start: dict[str, Any] = {"warmup_t": warmup, "warmup_lr_init": config.lr * _WARMUP_START, "warmup_prefix": True}
        self._scheduler = CosineLRScheduler(self._optimizer, steps - warmup, t_in_epochs=False, **start)
        self.optimizer: Any = fabric.setup_optimizers(self._optimizer)
        # use_warmup: without, the average of a short run would consist of initial values.
        self.ema = None if config.ema is None else ModelEmaV3(self.module, config.ema, use_warmup=True)
        self._objective = Objective(config, len(loaders.data.classes))

        self.epoch = 0
        self.batch = 0  # the next one of this epoch
        self.sums = self._zero_sums()
        self.history: list[dict[str, Any]] = []
        self.best: dict[str, Any] | None = None
        self._loss = math.nan
        self._images_per_second: float | None = None  # of training in this epoch, since it began or was resumed
        self._lap = 0, 0.0  # when it was logged last: step and time
        self._began = time.perf_counter()  # when this epoch began, less the time between a stop and its resumption
        self._saved_at = time.monotonic()

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return self.epoch * self.loaders.steps + self.batch

    def run(self) -> None:
        """Train to the end, with a checkpoint at the start, after every epoch and every ``checkpoint_every`` steps.

        Raises:
            Stopped: on a signal; the checkpoint is written.
            UserError: the loss is not finite, too many images cannot be read, or the disk is full. The checkpoint remains good.
        """
        if self.step == 0:
            self.save()
            self._began = time.perf_counter()
        while self.epoch < self.config.epochs:
            try:
                self._train_epoch()
                result = self._validate()
            except UserError:
                if self._single:  # other processes may be anywhere, and cannot take part
                    with contextlib.suppress(UserError):
                        self.save()
                raise
            self._finish_epoch(*result)

    def _train_epoch(self) -> None:
        self.model.train()
        start = self._lap = self.step, time.perf_counter()
        self._images_per_second = None
        if self.batch >= self.loaders.steps:
            return  # resumed between the last step and validation
        for images, labels in self.loaders.train(self.epoch, self.batch):
            if self._single:
                self.loaders.bad_samples.sync()  # before the step: one image too many must not affect the checkpoint
            self._step(images, labels)
            self.batch += 1
            self.on_step(self.step, self._loss)
            self._poll()
            if self.step % self.checkpoint_every == 0:
                self.save()
        self._images_per_second = self._rate(self.step, *start)

    def _step(self, images: Tensor, labels: Tensor) -> None:
        step, parts, device = self.step, self.config.grad_accum, self.fabric.device
        seed_everything(derive_seed(self.config.seed, "step", step, self.fabric.global_rank), device)
        self._scheduler.step_update(step)
        self.optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), device=device)
        # For one forward, the hook of `prepare` squeezes all blocks at once just as well, and takes less time.
        once = parts > 1 or self._group is not None
        with squeeze_once(self.model, self._group, micro_batches=parts) if once else contextlib.nullcontext():
            for part, (inputs, truth) in enumerate(zip(images.chunk(parts), labels.chunk(parts), strict=True)):
                truth = truth.to(device)
                inputs, targets = self._objective.mix(inputs.to(device), truth)
                with self.fabric.no_backward_sync(self.model, enabled=part < parts - 1):
                    logits = self.model(inputs)
                    loss = self._objective.loss(logits, targets)
                    self.fabric.backward(loss / parts)
                total += loss.detach() / parts
                _accumulate(self.sums, loss.detach(), logits.detach(), truth)
        self.optimizer.step()
        if self.ema is not None:
            self.ema.update(self.module, step + 1)
        if step % _LOG_EVERY == 0:
            self._loss = total.item()
            rate = self._rate(step + 1, *self._lap)
            self._lap = step + 1, time.perf_counter()
            self.log({"train/loss": self._loss, "lr": self._learning_rate(), "images_per_second": rate}, step)

    def _poll(self) -> None:
        """Check between two steps for divergence, bad samples, signals, and whether a checkpoint is due.

        All processes have to agree, and exchanging that takes time on a GPU; several GPUs do it only once in a while.
        """
        regular = self.batch % _LOG_EVERY == 0 or self.fabric.device.type == "cpu"
        if not regular and not self._single:
            return
        diverged = regular and not math.isfinite(float(self.sums[0]))
        due = time.monotonic() - self._saved_at >= self.checkpoint_seconds
        bad = self.loaders.bad_samples
        diverged, pending, signal, due = self._all_reduce_max(diverged, bool(bad.new), self.stop.number, due)
        if diverged:
            raise self._diverged("loss is")
        if pending:
            bad.sync()
        if signal:  # as agreed: one that arrived since waits for the next poll
            self.stop.number = signal
            self._save_and_stop()
        if due:
            self.save()

    @torch.no_grad()
    def _validate(self) -> tuple[int, float, int]:
        """Return correct predictions, mean loss and number of validation images, with the averaged weights if there are any."""
        self.model.eval()
        module = self.module if self.ema is None else self.ema.module
        broadcast_buffers(module)
        device, sums, done = self.fabric.device, self._zero_sums(), 0
        for images, labels in self.loaders.val():
            labels = labels.to(device)
            logits, done = self._predict(module, images.to(device)), done + 1
            _accumulate(sums, cross_entropy(logits, labels), logits, labels)
            if self._single and self.stop.number:  # ranks have different numbers of batches: several cannot stop here
                self._save_and_stop()
        side, channels = self.config.img_size, self.loaders.data.in_chans
        for _ in range(done, 0 if self._single else self.loaders.val_steps):
            # Gathering sharded parameters is a collective: a rank with fewer batches takes part.
            self._predict(module, torch.zeros(1, channels, side, side, device=device))
        self.loaders.bad_samples.sync()
        loss, correct, seen = self._total(sums)
        if not seen:
            raise CollectiveError("none of the validation images can be read")
        return int(correct), loss / seen, int(seen)

    def _predict(self, module: nn.Module, images: Tensor) -> Tensor:
        """Call the bare module: DDP's wrapper exchanges buffers, and not all processes need have images here."""
        with self.fabric.autocast():
            return module(self.fabric.strategy.precision.convert_input(images))

    def _finish_epoch(self, correct: int, val_loss: float, val_images: int) -> None:
        loss, train_correct, seen = self._total(self.sums)
        rate, memory = self._images_per_second, peak_memory(self.fabric.device)
        record = {
            "epoch": self.epoch + 1,
            "lr": self._learning_rate(),
            "train_loss": loss / seen,
            "train_accuracy": train_correct / seen,
            "val_loss": val_loss,
            "val_accuracy": correct / val_images,
            "val_correct": correct,
            "skipped_images": len(self.loaders.bad_samples.known),
            "seconds": round(time.perf_counter() - self._began, 3),
            "images_per_second": None if rate is None else round(rate, 1),
            "peak_memory_mb": None if memory is None else round(self._all_reduce_max(memory)[0], 1),
        }
        self.history.append(record)
        if self.best is None or record["val_accuracy"] > self.best["val_accuracy"]:
            self.best = {"epoch": record["epoch"], "val_accuracy": record["val_accuracy"]}
        self.epoch, self.batch, self.sums, self._began = self.epoch + 1, 0, self._zero_sums(), time.perf_counter()
        curves = {"train_accuracy": "train/accuracy", "val_loss": "val/loss", "val_accuracy": "val/accuracy"}
        self.log(
            {curves.get(name, name): record[name] for name in (*curves, "skipped_images", "peak_memory_mb")}, self.step
        )
        self.save()
        self.on_epoch(record)

    # --- stop and resume -----------------------------------------------------------------------------------------------

    def _save_and_stop(self) -> None:
        self.save()
        raise Stopped(self.stop.number)

    def save(self) -> None:
        """Write the checkpoint, unless the run has diverged. A collective: all processes have to call it."""
        self.loaders.bad_samples.sync()
        sums = self._total(self.sums)
        model, optimizer = full_state(self.module, self._optimizer)
        # A finite loss may have had gradients that are not.
        finite = all(bool(torch.isfinite(t).all()) for t in model.values() if t.is_floating_point())
        bad_loss, bad_weights = self._all_reduce_max(not math.isfinite(sums[0]), not finite)
        if bad_loss or bad_weights:
            raise self._diverged("loss is" if bad_loss else "weights are")
        progress = {name: getattr(self, name) for name in ("epoch", "batch", "step", "history", "best")}
        progress |= {"seconds": time.perf_counter() - self._began, "sums": sums}
        content = {"format": CHECKPOINT_FORMAT, "version": VERSION, "config": self.config.as_dict(), **self.about}
        content |= {"model": model, "optimizer": optimizer, "precision": self.fabric.strategy.precision.state_dict()}
        content |= {"progress": {**progress, "skipped": self.loaders.bad_samples.known}}
        if self.ema is not None:
            content["ema"] = self.ema.module.state_dict()
        failure = None
        if self.fabric.is_global_zero:
            try:
                save(self.path, content)
            except UserError as error:
                failure = str(error)
        failure = failure if self._single else self.fabric.broadcast(failure)
        if failure is not None:
            raise CollectiveError(failure)
        self._saved_at = time.monotonic()

    def load(self, checkpoint: dict[str, Any]) -> None:
        """Restore a checkpoint, written by any number of devices."""
        load_optimizer(self.module, self._optimizer, checkpoint["optimizer"])
        load_weights(self.module, checkpoint["model"])
        check_optimizer(self.module, self._optimizer)
        if self.ema is not None:
            load_weights(self.ema.module, checkpoint["ema"])
        self.fabric.strategy.precision.load_state_dict(checkpoint["precision"])
        progress = checkpoint["progress"]
        for name in ("epoch", "batch", "history", "best"):
            setattr(self, name, progress[name])
        self._began = time.perf_counter() - progress["seconds"]
        self.loaders.bad_samples.known.update(progress.get("skipped", {}))
        if self.fabric.is_global_zero:  # the sums are those of all processes
            self.sums = self.sums.new_tensor(progress["sums"])

    def _rate(self, step: int, first: int, since: float) -> float:
        """Return images per second, of the steps from ``first`` up to ``step``."""
        return (step - first) * self.loaders.images_per_step / (time.perf_counter() - since)

    def _learning_rate(self) -> float:
        return float(self._optimizer.param_groups[0]["lr"])

    def _zero_sums(self) -> Tensor:
        """Return zeros for the sums over images: loss, correct predictions, images."""
        dtype = torch.float32 if self.fabric.device.type == "mps" else torch.float64
        return torch.zeros(3, dtype=dtype, device=self.fabric.device)

    def _total(self, sums: Tensor) -> list[float]:
        if not self._single:
            sums = self.fabric.all_reduce(sums.clone(), reduce_op="sum")  # type: ignore[assignment]
        return sums.tolist()

    def _all_reduce_max(self, *values: float) -> list[Any]:
        """Return the maximum of each value over all processes; of a truth value, whether it holds for any of them."""
        if self._single:
            return list(values)
        local = torch.tensor([float(value) for value in values], device=self.fabric.device)
        return [int(v) if v == int(v) else v for v in self.fabric.all_reduce(local, reduce_op="max").tolist()]  # type: ignore[union-attr]

    def _diverged(self, what: str) -> Diverged:
        return Diverged(
            f"the {what} not finite any more in epoch {self.epoch + 1}, at step {self.step}: try a lower --lr than "
            f"{self.config.lr:g} (the last good checkpoint is {self.path})"
        )


def _accumulate(sums: Tensor, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
    new = torch.stack([loss * len(labels), (logits.argmax(1) == labels).sum(), sums.new_tensor(len(labels))])
    sums += new.to(sums.dtype)
