"""Train every variant of the ablation with several seeds, resumably.

`orepa.train` trains: net, data and recipe are those of ``orepa train``, except for `NET_ARGUMENTS`. What a seed decides
(training images, initial values, order, augmentation) is the same for all variants, so that they compare in pairs.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightning.fabric import Fabric
from torch import nn

from orepa.bench.machine import OtherWork, environment
from orepa.bench.results import Results, Row, load
from orepa.bench.step import TrainingStep
from orepa.errors import UserError
from orepa.module_info import count_parameters
from orepa.modules.orepa_conv import OREPAConv
from orepa.timing import function, interleaved
from orepa.train.config import DIGITS, Config
from orepa.train.data import Loaders, derive_seed, load_data, seed_everything
from orepa.train.images import ImageData
from orepa.train.loop import Diverged, Trainer
from orepa.train.model import create_plain, default_cfg, model_arguments
from orepa.train.runtime import StopRequest, settings
from orepa_kernels.backends.base import Request
from orepa_kernels.dispatch import select

from .data import Picked, draw
from .models import variants
from .rows import BENCHMARK, STEP, TRAIN

IMG_SIZE = 32
#: Where the net follows the paper's ResNets instead of timm's toy: a 7x7 stem, which the deep stem replaces, and residual
#: branches that do not start at zero. Offline blocks have no norm after them that could; online ones would.
NET_ARGUMENTS = {"stem_type": "", "zero_init_last": False}


@dataclass(frozen=True)
class AblationConfig:
    """What to train.

    Args:
        rows: names of `variants`.
        seeds: as many runs of each.
        train_images: to learn from; None for all.
        epochs: None for the recipe's.
        threads: that compute.
        rounds: samples of each step time; 0 measures none.
        limit: of the data set's training and validation images, for a trial.
        out: JSON file, written anew after every run, and continued where it holds runs of the same protocol.
        overwrite: start anew whatever it holds.
    """

    rows: tuple[str, ...]
    seeds: int = 5
    train_images: int | None = 100
    epochs: int | None = None
    threads: int = 1
    rounds: int = 20
    limit: int | None = None
    out: Path | None = None
    overwrite: bool = False

    def recipe(self, seed: int) -> Config:
        """Return the recipe of ``orepa train`` on the digits."""
        given: dict[str, Any] = {"data": DIGITS, "seed": seed, "threads": self.threads, "limit": self.limit}
        if self.epochs is not None:
            given["epochs"] = self.epochs
        return Config.from_given(given, IMG_SIZE)


def run(ablation: AblationConfig, say: Callable[[str], None] = print) -> Results:
    """Train what the file lacks, then time a step of every variant in it.

    Args:
        ablation: what to train.
        say: gets a line per run.

    Raises:
        UserError: an unknown row, or the file holds something else.
        Stopped: a signal came; all runs that had finished are in the file.
    """
    known = variants()
    unknown = [name for name in ablation.rows if name not in known]
    if unknown or not ablation.rows:
        raise UserError(f"--rows must be among {', '.join(known)}, got {', '.join(unknown) or 'none'}")
    with settings(ablation.threads):
        return _run(ablation, say)


def _run(ablation: AblationConfig, say: Callable[[str], None]) -> Results:
    config = ablation.recipe(0)
    data = load_data(config, None, default_cfg(config.model))
    count = len(data.train) if ablation.train_images is None else ablation.train_images
    results = start(BENCHMARK, ablation.out, ablation.overwrite, _protocol(config, data, count))
    done = {(row.provider, row.case["seed"]) for row in results.rows if row.mode == TRAIN}
    with StopRequest() as stop:
        # Seeds are the outer loop, so that the runs of an interrupted ablation can be compared in pairs.
        for seed in range(ablation.seeds):
            drawn = draw(data, count, seed)
            for name in ablation.rows:
                if (name, seed) not in done:
                    row = _train(name, ablation.recipe(seed), drawn, stop)
                    _add(results, row, ablation.out)
                    say(f"seed {seed}  {name:22} {describe(row)}")
    trained, timed = ({row.provider for row in results.rows if row.mode == mode} for mode in (TRAIN, STEP))
    if ablation.rounds and trained != timed:
        say("timing one step of each in turns ...")
        _time(results, config, data, ablation.rounds)
    results.complete = True
    _save(results, ablation.out)
    # The file rounds numbers, and tables must say what it says.
    return results if ablation.out is None else load(ablation.out)


def _protocol(config: Config, data: ImageData, count: int) -> dict[str, Any]:
    """Return what all runs of a file have in common."""
    recipe = {k: v for k, v in config.as_dict().items() if k not in ("orepa", "preserve", "seed", "model")}
    drawn = draw(data, count, 0)
    return {
        "model": config.model,
        "model_arguments": NET_ARGUMENTS,
        "recipe": recipe,
        "steps_per_epoch": Loaders(drawn, config).steps,
        "train_images": count,
        "test_images": len(drawn.val),
        "fingerprint": data.fingerprint,
        "backend": backend(),
    }


def backend() -> str:
    """Return the backend that squeezes here: the last bits depend on it."""
    conv = OREPAConv(8, 8, 3)
    like = conv.operands()[0]
    return select("auto", Request(conv.plan, like.device, like.dtype, like.dtype)).name


def start(benchmark: str, out: Path | None, overwrite: bool, protocol: dict[str, Any]) -> Results:
    """Return the results to continue, or empty ones.

    Args:
        benchmark: its name.
        out: the file; None for none.
        overwrite: start anew whatever it holds.
        protocol: what all runs of a file have in common; ``recipe`` in it is of `Config`, or a part of it.

    Raises:
        UserError: the file holds something else, or runs of another protocol.
    """
    facts = environment()
    if out is None or overwrite or not out.exists():
        return Results(benchmark, facts, {"protocol": protocol})
    results = load(out)
    written = results.settings.get("protocol")
    if results.benchmark != benchmark or not isinstance(written, dict):
        raise UserError(f"{out} holds something else than results of {benchmark}: --overwrite discards it")
    old, new = _flat(written), _flat(protocol)
    changed = [f"{k} {old.get(k)!r} -> {v!r}" for k, v in new.items() if old.get(k) != v]
    if changed:
        raise UserError(
            f"{out} holds runs of another protocol ({'; '.join(changed)}): --overwrite discards them, another --out "
            "keeps them"
        )
    telling = ("commit", "torch", "processor")
    then, now = ({k: e.get(k) for k in telling} for e in (results.environment, facts))
    if then != now:  # the file says so, because its rows come from different environments
        others = results.environment.setdefault("continued_with", [])
        if now not in others:
            others.append(now)
        print(f"orepa: note: {out} was begun with {then}, this is {now}", file=sys.stderr)
    return results


def _flat(protocol: dict[str, Any]) -> dict[str, Any]:
    """Flatten a protocol to compare it: options added after a file was written had their defaults."""
    recipe = protocol.get("recipe")
    rest = {name: value for name, value in protocol.items() if name != "recipe"}
    return rest | (Config.from_saved(recipe).as_dict() if isinstance(recipe, dict) else {})


# --- one run --------------------------------------------------------------------------------------------------------------


def build(name: str, config: Config, data: ImageData) -> nn.Module:
    """Build a variant with the initial values of a seed. Layers that it does not swap are the same in all variants."""
    seed_everything(derive_seed(config.seed, "initial values"))
    arguments = model_arguments(config.model, len(data.classes), data.in_chans, config.img_size)
    return variants()[name](create_plain(config.model, {**arguments, **NET_ARGUMENTS}, config.img_size))


def _train(name: str, config: Config, data: ImageData, stop: StopRequest) -> Row:
    model = build(name, config, data)
    row = Row({"seed": config.seed}, name, TRAIN, facts={"parameters": count_parameters(model)})
    # On all images, validation after every epoch would take a third of the time for unused numbers.
    train(row, model, config, data, config.batch_size, stop)
    return row


def train(row: Row, model: nn.Module, config: Config, data: ImageData, watched: int, stop: StopRequest) -> list[int]:
    """Train a model, and note in its row how it went.

    The samples of the row are the seconds of processor time that the training of each epoch took, without validation.

    Args:
        row: gets samples and facts, or the reason why there are none.
        model: to train.
        config: the recipe.
        data: whose validation images are all tested at the end.
        watched: test so many of them after every epoch.
        stop: the request to stop.

    Returns:
        How many of the watched images were right after each epoch.

    Raises:
        Stopped: a signal came.
    """
    fabric = Fabric(accelerator="cpu", devices=1, precision=config.precision)  # type: ignore[arg-type]
    fabric.launch()
    few = Picked([(data.val, index) for index in range(min(watched, len(data.val)))])
    loaders = Loaders(replace(data, val=few), config)
    seconds: list[float] = []
    began = time.process_time()

    def on_step(step: int, _loss: float) -> None:
        if step % loaders.steps == 0:
            seconds.append(max(time.process_time() - began, 1e-3))

    def on_epoch(_record: dict[str, Any]) -> None:
        nonlocal began
        began = time.process_time()

    with tempfile.TemporaryDirectory(prefix="orepa-ablation-") as folder:
        path = Path(folder) / "checkpoint.pt"
        trainer = Trainer(fabric, config, model, loaders, path, {}, stop, sys.maxsize, on_step, on_epoch)
        began = time.process_time()
        try:
            trainer.run()
        except Diverged:
            row.status = "failed"
            row.reason = f"not finite any more in epoch {trainer.epoch + 1}, at step {trainer.step}"
            row.facts |= {"diverged": True, "steps": trainer.step}
            return [record["val_correct"] for record in trainer.history]
        finally:
            loaders.close()
    # The last epoch counts, never the best one, which would be chosen by the test images.
    correct, loss = _test(trainer.module, Loaders(data, config))
    row.processes = [seconds]
    row.facts |= {"correct": correct, "images": len(data.val), "test_loss": loss}
    row.facts["train_loss"] = trainer.history[-1]["train_loss"]
    return [record["val_correct"] for record in trainer.history]


@torch.no_grad()
def _test(model: nn.Module, loaders: Loaders) -> tuple[int, float]:
    """Return the number of correct predictions and the mean loss."""
    model.eval()
    correct, loss = 0, 0.0
    for images, labels in loaders.val():
        logits = model(images)
        correct += int((logits.argmax(1) == labels).sum())
        loss += float(F.cross_entropy(logits, labels, reduction="sum"))
    return correct, loss / len(loaders.data.val)


def describe(row: Row) -> str:
    """Say in half a line how a run ended."""
    if row.status != "ok":
        return row.reason
    facts = row.facts
    accuracy = 100 * facts["correct"] / facts["images"]
    return f"{accuracy:6.2f}%  training loss {facts['train_loss']:.4f}  {sum(row.seconds):5.1f} s"


# --- the file -------------------------------------------------------------------------------------------------------------


def _add(results: Results, row: Row, out: Path | None) -> None:
    results.rows.append(row)
    results.complete = False
    _save(results, out)


def _save(results: Results, out: Path | None) -> None:
    order = {name: number for number, name in enumerate(variants())}
    results.rows.sort(key=lambda row: (row.mode != TRAIN, order.get(row.provider, -1), row.case.get("seed", 0)))
    if out is not None:
        results.save(out)


def _time(results: Results, config: Config, data: ImageData, rounds: int) -> None:
    """Time forward, loss, backward and SGD on one batch, the variants in turns."""
    batches = Loaders(data, config)
    images, labels = next(iter(batches.train(0)))
    batches.close()
    names = list(dict.fromkeys(row.provider for row in results.rows))
    steps = {name: TrainingStep(build(name, config, data).train(), images, labels) for name in names}
    others = OtherWork()
    with others:
        samples = interleaved({name: function(step) for name, step in steps.items()}, rounds)
    results.environment["busy_cores_of_others"] = others.cores
    results.rows = [row for row in results.rows if row.mode != STEP]
    results.rows += [Row({}, name, STEP, processes=[values]) for name, values in samples.items()]
