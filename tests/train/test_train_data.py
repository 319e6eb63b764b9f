"""Where the images of `orepa train` come from, in which order, and what happens to broken ones."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from train_runs import FOLDER, assert_same_run, stop_and_resume, train

from orepa.train.config import Config
from orepa.train.data import EpochOrder, Images, Loaders, load_data
from orepa.train.files import load_checkpoint
from orepa.train.images import load_digits

pytest_plugins = ("train_runs",)
pytestmark = pytest.mark.usefixtures("small_and_quick")


# --- the order of the data --------------------------------------------------------------------------------------------------


def test_the_order_is_a_function_of_seed_and_epoch() -> None:
    def order(seed: int = 0, epoch: int = 0, first: int = 0, **ranks: int) -> list[list[tuple[int, int]]]:
        sampler = EpochOrder(23, 5, seed, **ranks)
        sampler.epoch, sampler.first = epoch, first
        return list(sampler)

    assert order() == order() and len(order()) == 4
    assert len({key for batch in order() for key in batch}) == 20
    assert order(epoch=1)[0] != order()[0] and order(seed=1)[0] != order()[0]
    assert order(first=2) == order()[2:]
    shares = [order(rank=rank, world_size=2) for rank in range(2)]
    assert [sorted(a + b) for a, b in zip(*shares, strict=True)] == [sorted(batch) for batch in order()]


def test_workers_end_though_they_ignore_signals() -> None:
    loaders = Loaders(load_digits(8, 35), Config(img_size=8, batch_size=8), workers=1)
    batches = loaders.train(0)
    next(batches)
    (worker,) = loaders._train._iterator._workers  # type: ignore[union-attr]
    worker.terminate()
    worker.join(0.3)
    assert worker.is_alive()
    loaders.close()
    worker.join(5)
    assert not worker.is_alive()


def test_augmentation_is_a_function_of_seed_epoch_and_image() -> None:
    data = load_digits(16)
    images = Images(data.train, data.augment, seed=0)
    first = images[(0, 5)][0]
    torch.rand(3)
    assert torch.equal(first, images[(0, 5)][0])
    assert not torch.equal(first, images[(1, 5)][0])
    assert not torch.equal(first, Images(data.train, data.augment, seed=1)[(0, 5)][0])


def test_the_digits_are_split_once_and_for_all() -> None:
    data = load_digits(8)
    assert (len(data.train), len(data.val)) == (1437, 360)
    held_out = {data.val.load(i)[0].tobytes() for i in range(len(data.val))}
    assert not held_out & {data.train.load(i)[0].tobytes() for i in range(len(data.train))}
    counts = torch.bincount(torch.tensor([data.val.load(i)[1] for i in range(len(data.val))]))
    assert counts.min() >= 34 and counts.max() <= 38, "stratified"


# --- image folders --------------------------------------------------------------------------------------------------------


def test_an_image_folder(folder: Path) -> None:
    assert train("--data", folder, *FOLDER, "--out", "run") == 0
    metrics = json.loads(Path("run/metrics.json").read_text())
    assert metrics["data"]["train_images"] == 24 and metrics["data"]["val_images"] == 8
    deployed = torch.load("run/deploy.pt", weights_only=True)
    assert deployed["classes"] == ["green", "red"] and deployed["model_kwargs"] == {"num_classes": 2, "in_chans": 3}
    (folder / "train" / "red" / "0.png").unlink()
    assert train("--resume", "--out", "run") == 2, "the images have changed"


@pytest.mark.usefixtures("only_training")
def test_workers_do_not_change_the_result(folder: Path) -> None:
    assert train("--data", folder, *FOLDER, "--out", "here") == 0
    assert train("--data", folder, *FOLDER, "--workers", 2, "--out", "there") == 0
    assert_same_run(Path("here"), Path("there"))


@pytest.mark.usefixtures("only_training")
@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_image_is_named_and_can_be_mended(
    folder: Path, workers: int, capsys: pytest.CaptureFixture[str]
) -> None:
    victim = folder / "train" / "red" / "3.png"
    whole = victim.read_bytes()
    victim.write_bytes(whole[:200])
    run_it = ("--data", folder, *FOLDER, "--workers", workers, "--out", "run", "--max-broken", 0)
    assert train(*run_it) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("orepa: error: cannot read the image") and str(victim) in error and "\n" not in error
    assert train("--resume", "--out", "run", "--max-broken", 0) == 2, "it is still broken"
    victim.write_bytes(whole)
    assert train("--resume", "--out", "run", "--workers", workers, "--max-broken", 0) == 0
    assert train(*run_it, "--out", "whole") == 0
    assert_same_run(Path("whole"), Path("run"))


def break_missing(root: Path) -> str:
    root.rename(root.with_name("elsewhere"))
    return "no such folder"


def break_no_validation(root: Path) -> str:
    (root / "validation").rename(root / "other")
    return "has no folder val/"


def break_empty_class(root: Path) -> str:
    (root / "train" / "blue").mkdir()
    (root / "validation" / "blue").mkdir()
    return f"{root / 'train' / 'blue'} holds no images"


def break_all_empty(root: Path) -> str:
    for image in (root / "train").glob("*/*.png"):
        image.unlink()
    return "holds no images"


def break_other_classes(root: Path) -> str:
    (root / "validation" / "red").rename(root / "validation" / "rouge")
    return "the class 'red' is in"


def break_one_class(root: Path) -> str:
    for split in ("train", "validation"):
        for image in (root / split / "red").iterdir():
            image.unlink()
        (root / split / "red").rmdir()
    return "one class only"


@pytest.mark.parametrize(
    "damage",
    [break_missing, break_no_validation, break_empty_class, break_all_empty, break_other_classes, break_one_class],
    ids=lambda damage: damage.__name__.removeprefix("break_"),
)
def test_a_folder_that_is_not_one(
    folder: Path, damage: Callable[[Path], str], capsys: pytest.CaptureFixture[str]
) -> None:
    message = damage(folder)
    assert train("--data", folder, *FOLDER, "--out", "run") == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("orepa: error: ") and message in error and "\n" not in error
    assert not Path("run").exists()


# --- broken images are skipped ----------------------------------------------------------------------------------------------


def damage(folder: Path) -> list[Path]:
    """Two training images and one for validation: one is cut off, one is no image, one is empty."""
    victims = [folder / "train/red/3.png", folder / "train/green/10.png", folder / "validation/red/1.png"]
    for victim, content in zip(victims, (victims[0].read_bytes()[:200], b"no image", b""), strict=True):
        victim.write_bytes(content)
    return victims


def test_broken_images_are_told_and_skipped(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    victims = damage(folder)
    assert train("--data", folder, *FOLDER, "--out", "run") == 0
    printed = capsys.readouterr()
    metrics = json.loads(Path("run/metrics.json").read_text())
    assert {Path(entry["image"]) for entry in metrics["skipped_images"]} == set(victims)
    for victim in victims:
        (line,) = (line for line in printed.err.splitlines() if str(victim) in line)  # once, whatever the epochs
        assert line.startswith(f"orepa: skipped an image, cannot read {victim}: ")
    assert "3 image(s) could not be read and were skipped" in printed.out and "3 skipped" in printed.out
    assert [record["skipped_images"] for record in metrics["history"]] == [3, 3]
    assert metrics["history"][-1]["val_accuracy"] == metrics["history"][-1]["val_correct"] / 7
    assert metrics["outcome"]["trained"]["images"] == 7


@pytest.mark.usefixtures("only_training")
def test_skipping_is_deterministic(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same bits from workers, and from a run that was stopped and resumed."""
    damage(folder)
    assert train("--data", folder, *FOLDER, "--out", "whole") == 0
    stop_and_resume(monkeypatch, 3, "--data", folder, *FOLDER)  # in the second epoch, of three steps
    assert_same_run(Path("whole"), Path("parts"))


def test_a_broken_image_is_replaced_in_training_and_left_out_in_validation(folder: Path) -> None:
    damage(folder)
    config = Config(data="folder", img_size=32, batch_size=8)
    loaders = Loaders(load_data(config, str(folder), {}), config)
    assert [len(labels) for _, labels in loaders.train(0)] == [8, 8, 8]
    assert sum(len(labels) for _, labels in loaders.val()) == 7
    loaders.bad_samples.sync()
    assert len(loaders.bad_samples.known) == 3


@pytest.mark.usefixtures("only_training")
@pytest.mark.parametrize(("allowed", "broken", "code"), [(2, 3, 2), (3, 3, 0), (None, 11, 2)])
def test_too_many_broken_images_end_the_run(
    allowed: int | None, broken: int, code: int, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for victim in sorted(folder.glob("train/*/*.png"))[:broken]:
        victim.write_bytes(b"no image")
    options = () if allowed is None else ("--max-broken", allowed)
    assert train("--data", folder, *FOLDER, *options, "--out", "run") == code
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert ("images cannot be read (see --max-broken): cannot read the image" in error) == (code == 2)
    assert load_checkpoint(Path("run/checkpoint.pt"))["progress"]["step"] < 6 or code == 0


def test_without_a_readable_image_the_run_ends(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for split, message in (("validation", "none of the validation images can be read"), ("train", "in a row")):
        for victim in folder.glob(f"{split}/*/*.png"):
            victim.write_bytes(b"no image")
        assert train("--data", folder, *FOLDER, "--max-broken", 1000, "--out", split) == 2
        assert message in capsys.readouterr().err.splitlines()[-1]
