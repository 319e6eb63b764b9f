"""The recipe: preset, optimizer, schedule, and what can be switched on beside the paper's."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn
from train_runs import SMALL, lightning, restless_trainer, torchvision, train

from orepa.cli import main
from orepa.optim import without_weight_decay
from orepa.train import loop
from orepa.train.config import Config
from orepa.train.data import load_data
from orepa.train.files import load_checkpoint
from orepa.train.model import create, from_checkpoint
from orepa.train.runtime import StopRequest

pytest_plugins = ("train_runs",)
pytestmark = pytest.mark.usefixtures("small_and_quick")

TINY = ("--limit", 16, "--batch-size", 8, "--epochs", 1, "--out", "run")

# --- the preset -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("data", ["digits", "folder", "shards", "cifar10", "cifar100"])
def test_the_papers_recipe_is_the_same_for_all_data(data: str) -> None:
    config = Config.from_given({"recipe": "paper", "data": data}, 160)
    assert (config.lr, config.weight_decay, config.batch_size) == (0.1, 1e-4, 256)
    assert (config.epochs, config.warmup_epochs, config.img_size) == (120, 5, 224)
    off = (
        config.label_smoothing,
        config.mixup,
        config.cutmix,
        config.ema,
        config.grad_accum,
        config.scale_weight_decay,
    )
    assert off == (0, 0, 0, None, 1, False)
    assert config.crops_and_flips
    other = Config.from_given({"recipe": "paper", "data": data, "epochs": 3, "lr": 0.5, "img_size": 64}, 160)
    assert (other.epochs, other.warmup_epochs, other.lr, other.img_size, other.batch_size) == (3, 2, 0.5, 64, 256)


def test_without_a_recipe_the_data_decide() -> None:
    assert Config.from_given({"data": "folder"}, 160).img_size == 160
    assert Config.from_given({"data": "cifar10"}, 160).img_size == 32
    digits = Config.from_given({}, 160)
    assert (digits.epochs, digits.batch_size, digits.crops_and_flips) == (15, 64, False)


def test_the_papers_recipe_crops_and_flips() -> None:
    def kinds(config: Config) -> set[str]:
        augment = load_data(config, None, {}).augment
        assert isinstance(augment, torchvision.transforms.Compose)
        return {type(step).__name__ for step in augment.transforms}

    assert {"RandomResizedCropAndInterpolation", "RandomHorizontalFlip"} <= kinds(Config(recipe="paper"))
    assert not {"RandomResizedCropAndInterpolation", "RandomHorizontalFlip"} & kinds(Config())


def test_the_recipe_on_the_command_line() -> None:
    assert train("--recipe", "paper", "--img-size", 32, *TINY) == 0
    config = json.loads(Path("run/metrics.json").read_text())["config"]
    assert config["recipe"] == "paper" and config["lr"] == 0.1 and config["batch_size"] == 8


# --- optimizer and schedule -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scales_decay", [False, True])
def test_no_weight_decay_on_norms_biases_and_scalings(scales_decay: bool) -> None:
    model = create("test_resnet", {"num_classes": 10, "in_chans": 1}, 32, orepa=True, preserve=False)
    trainer = restless_trainer(Path("unused.pt"))  # only for its loaders
    config = Config(img_size=32, epochs=3, warmup_epochs=1, scale_weight_decay=scales_decay)
    fabric, about = lightning.Fabric(accelerator="cpu", devices=1), {"model_spec": {}, "data": {}, "environment": {}}
    prepared = loop.Trainer(fabric, config, model, trainer.loaders, Path("unused.pt"), about, StopRequest(), 1000)
    decay = {id(p): group["weight_decay"] for group in prepared._optimizer.param_groups for p in group["params"]}
    names = {name: decay[id(p)] for name, p in model.named_parameters()}
    assert len(names) == len(decay)
    spared = {name for name, value in names.items() if value == 0}
    scalings = set(without_weight_decay(model))
    assert len(scalings) == 15 and scalings & spared == (set() if scales_decay else scalings)
    assert {"bn1.weight", "bn1.bias", "fc.bias"} <= spared
    assert names["fc.weight"] == names["conv1.0.origin_weight"] == names["layer4.0.conv1.dws_depthwise"] == 1e-4
    group = prepared._optimizer.param_groups[0]
    assert type(prepared._optimizer) is torch.optim.SGD and group["momentum"] == 0.9 and not group["nesterov"]


def test_the_warm_up_lasts_epochs_and_the_cosine_ends_near_zero() -> None:
    rates: list[float] = []
    trainer = restless_trainer(Path("run.pt"), on_step=lambda *_: rates.append(trainer._learning_rate()))
    trainer.run()
    assert len(rates) == 12
    torch.testing.assert_close(rates[:5], [0.001 + 0.099 * t / 4 for t in range(4)] + [0.1])  # 1 epoch is 4 steps
    expected = [0.05 * (1 + math.cos(math.pi * t / 8)) for t in range(8)]
    torch.testing.assert_close(rates[4:], expected)


def test_an_optimizer_without_all_parameters_does_not_train(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = restless_trainer(Path("run.pt"))
    trainer.save()
    checkpoint = load_checkpoint(Path("run.pt"))
    trainer._optimizer.param_groups[0]["params"].pop()
    with pytest.raises(ValueError, match=r"misses 1 trainable parameter"):
        trainer.load(checkpoint)
    monkeypatch.setattr(loop, "parameter_groups", lambda model, lr, **_: [{"params": [*model.parameters()][2:]}])
    with pytest.raises(ValueError, match=r"misses 2 trainable parameter"):
        restless_trainer(Path("run.pt"))


# --- gradient accumulation ------------------------------------------------------------------------------------------------


def linear_trainer(path: str, parts: int) -> loop.Trainer:
    """Without batch norm and dropout, the parts of a step make up the whole."""
    torch.manual_seed(4)
    trainer = restless_trainer(Path(path), model=nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), grad_accum=parts)
    trainer.module.double()
    for loader in (trainer.loaders._train, trainer.loaders._val):
        transform = loader.dataset.transform  # type: ignore[attr-defined]
        loader.dataset.transform = lambda image, transform=transform: transform(image).double()  # type: ignore[attr-defined]
    return trainer


def test_the_parts_of_a_step_make_up_the_whole() -> None:
    whole, parts = linear_trainer("whole.pt", 1), linear_trainer("parts.pt", 4)
    start = {name: value.clone() for name, value in whole.module.state_dict().items()}
    whole.run()
    parts.run()
    for name, value in whole.module.state_dict().items():
        assert not torch.allclose(value, start[name])
        torch.testing.assert_close(parts.module.state_dict()[name], value, rtol=1e-12, atol=1e-14)
    for one, other in zip(whole.history, parts.history, strict=True):
        assert one["train_loss"] == pytest.approx(other["train_loss"], rel=1e-12)
        assert one["train_accuracy"] == other["train_accuracy"]


def test_gradients_are_exchanged_once_per_step(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, seen = restless_trainer(Path("run.pt"), grad_accum=4), []
    postpone = trainer.fabric.no_backward_sync

    def noted(module: Any, enabled: bool = True) -> Any:
        seen.append(enabled)
        return postpone(module, enabled=enabled)

    monkeypatch.setattr(trainer.fabric, "no_backward_sync", noted)
    trainer.run()
    assert seen == [True, True, True, False] * 12


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--grad-accum", 3), "a batch of 8 images cannot be shared by 1 device(s), in --grad-accum 3 parts each"),
        (("--grad-accum", 8), "two or more for each"),
        (("--batch-size", 9, "--mixup", 0.2), "mix pairs of images, but the 1 device(s) have 9 images each"),
        (("--strategy", "fsdp2", "--ema", 0.9), "take --strategy ddp"),
        (("--sync-bn", "--devices", 2, "--accelerator", "cpu"), "--sync-bn with several processes needs GPUs"),
        (("--strategy", "fsdp2", "--precision", "64-true"), "--precision 32-true or bf16-mixed, got 64-true"),
    ],
)
def test_what_cannot_be_combined(options: tuple[object, ...], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(*TINY, *options) == 2
    error = capsys.readouterr().err.strip()
    assert message in error and "\n" not in error
    assert not Path("run").exists()


# --- label smoothing, mixup, cutmix -----------------------------------------------------------------------------------------


def test_nothing_is_mixed_or_smoothed_unless_asked_for() -> None:
    images, labels = torch.randn(4, 1, 8, 8), torch.tensor([3, 1, 0, 2])
    objective, logits = loop.Objective(Config(), 10), torch.randn(4, 10)
    mixed, targets = objective.mix(images, labels)
    assert mixed is images and targets is labels
    torch.testing.assert_close(objective.loss(logits, labels), -logits.log_softmax(1)[range(4), labels].mean())


def test_label_smoothing() -> None:
    logits, labels = torch.randn(4, 10), torch.tensor([3, 1, 0, 2])
    targets = torch.full((4, 10), 0.02)
    targets[range(4), labels] += 0.8
    expected = -(targets * logits.log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(loop.Objective(Config(label_smoothing=0.2), 10).loss(logits, labels), expected)


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_mixing_mixes_images_and_targets_alike(kind: str) -> None:
    images = torch.stack([torch.full((1, 8, 8), float(i)) for i in range(4)])  # the image i is of class i
    objective = loop.Objective(Config(**{kind: 1.0, "label_smoothing": 0.1}), 4)
    numpy.random.seed(3)
    mixed, targets = objective.mix(images.clone(), torch.arange(4))
    assert not torch.equal(mixed, images)
    torch.testing.assert_close(targets.sum(1), torch.ones(4))
    unsmoothed = (targets - 0.025) / 0.9
    # The mean pixel tells the share of either image, and so does the target.
    torch.testing.assert_close(mixed.mean(dim=(1, 2, 3)), unsmoothed @ torch.arange(4.0))
    numpy.random.seed(3)
    assert torch.equal(objective.mix(images.clone(), torch.arange(4))[0], mixed)
    logits = torch.randn(4, 4)
    expected = -(targets * logits.log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(objective.loss(logits, targets), expected)


# --- moving average of the weights --------------------------------------------------------------------------------------------


def test_the_average_of_the_weights() -> None:
    """timm's: the decay rises from 0 to that asked for, as 1 - (1 + step)^(-2/3)."""
    course: list[dict[str, Tensor]] = []

    def note(*_: Any) -> None:
        course.append({name: value.clone() for name, value in trainer.module.state_dict().items()})

    trainer = restless_trainer(Path("run.pt"), on_step=note, ema=0.7)
    trainer.run()
    assert trainer.ema is not None
    for name, value in trainer.ema.module.state_dict().items():
        if value.is_floating_point():
            expected = course[0][name]
            for step, state in enumerate(course[1:], start=1):
                decay = min(0.7, 1 - (1 + step) ** (-2 / 3))
                expected = decay * expected + (1 - decay) * state[name]
            torch.testing.assert_close(value, expected, msg=name)
    last = course[-1]["layers.0.weight"]
    assert not torch.allclose(trainer.ema.module.state_dict()["layers.0.weight"], last), "the test must be able to fail"


def test_the_average_is_what_is_validated_and_converted(capsys: pytest.CaptureFixture[str]) -> None:
    assert train(*SMALL, "--ema", 0.9, "--out", "run") == 0
    assert "the moving average of the weights (--ema 0.9)" in capsys.readouterr().out
    checkpoint = load_checkpoint(Path("run/checkpoint.pt"))
    metrics = json.loads(Path("run/metrics.json").read_text())
    assert metrics["outcome"]["trained"]["correct"] == metrics["history"][-1]["val_correct"]
    x = torch.randn(5, 1, 32, 32)
    average = from_checkpoint(checkpoint)
    last = from_checkpoint({name: value for name, value in checkpoint.items() if name != "ema"})
    assert main(["convert", "run/checkpoint.pt", "again.pt"]) == 0
    assert "again.pt: the moving average of the weights (--ema 0.9)" in capsys.readouterr().out
    for path in ("run/deploy.pt", "again.pt"):
        deployed = torch.load(path, weights_only=True)
        plain = create(deployed["model"], deployed["model_kwargs"], 32, orepa=False, preserve=False).eval()
        plain.load_state_dict(deployed["state_dict"])
        with torch.no_grad():
            torch.testing.assert_close(plain(x), average(x), rtol=1e-4, atol=1e-4)
            assert not torch.allclose(plain(x), last(x), rtol=1e-2, atol=1e-2)


# --- what is logged -----------------------------------------------------------------------------------------------------------


def test_speed_and_memory_are_logged(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setattr(loop, "_LOG_EVERY", 2)
    assert train(*SMALL, "--out", "run") == 0
    printed = capsys.readouterr().out
    history = json.loads(Path("run/metrics.json").read_text())["history"]
    events = EventAccumulator("run/tensorboard").Reload()
    for record in history:
        rate, memory = record["images_per_second"], record["peak_memory_mb"]
        assert rate > 64 / record["seconds"], "validation does not count"
        assert 100 < memory < 100_000
        assert f"{rate:,.0f} images/s  {memory:,.0f} MB" in printed
    assert {"train/loss", "lr", "images_per_second", "peak_memory_mb", "skipped_images"} <= set(
        events.Tags()["scalars"]
    )
    assert [event.step for event in events.Scalars("images_per_second")] == [0, 2, 4, 6, 8, 10]
    assert [event.value for event in events.Scalars("peak_memory_mb")] == pytest.approx(
        [record["peak_memory_mb"] for record in history]
    )
