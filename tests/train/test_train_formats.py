"""CIFAR from a local folder, and WebDataset shards: data sets like any other."""

from __future__ import annotations

import hashlib
import io
import json
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy
import pytest
import torch
from train_runs import FOLDER, assert_same, assert_same_run, stop_and_resume, torchvision, train

from orepa.train.config import Config
from orepa.train.data import kind_of_data, load_data
from orepa.train.files import load_checkpoint

pytest_plugins = ("train_runs",)
pytestmark = pytest.mark.usefixtures("small_and_quick")

# --- CIFAR ------------------------------------------------------------------------------------------------------------------


def make_cifar(root: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> Path:
    """A folder in the published format, with a few images only, whose checksums torchvision is told to expect."""
    dataset = {"cifar10": torchvision.datasets.CIFAR10, "cifar100": torchvision.datasets.CIFAR100}[kind]
    place, generator = root / dataset.base_folder, numpy.random.default_rng(0)
    place.mkdir(parents=True)
    names = [f"class {i}" for i in range(10 if kind == "cifar10" else 100)]

    def write(name: str, content: dict[str, object]) -> str:
        (place / name).write_bytes(pickle.dumps(content))
        return hashlib.md5((place / name).read_bytes()).hexdigest()

    def batch(name: str) -> list[str]:
        count = 6
        data = generator.integers(0, 256, (count, 3072), dtype=numpy.uint8)
        labels = [i * 7 % len(names) for i in range(count)]
        key = "labels" if kind == "cifar10" else "fine_labels"
        return [name, write(name, {"data": data, key: labels, "filenames": [f"{i}.png" for i in range(count)]})]

    for attribute in ("train_list", "test_list"):
        monkeypatch.setattr(dataset, attribute, [batch(name) for name, _ in getattr(dataset, attribute)])
    meta = {**dataset.meta}
    meta["md5"] = write(meta["filename"], {meta["key"]: names})
    monkeypatch.setattr(dataset, "meta", meta)
    return place


@pytest.mark.parametrize("kind", ["cifar10", "cifar100"])
def test_cifar_from_a_local_folder(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = make_cifar(tmp_path / "data", monkeypatch, kind)
    for path in (place, place.parent):
        assert kind_of_data(str(path)) == kind
        data = load_data(Config(data=kind, img_size=32), str(path), {})
        assert (len(data.train), len(data.val)) == (30 if kind == "cifar10" else 6, 6)
    assert data.classes[1] == "class 1" and len(data.classes) == (10 if kind == "cifar10" else 100)
    image, label = data.train.load(2)
    (first, _), *_ = getattr(torchvision.datasets, kind.upper()).train_list
    with (place / first).open("rb") as file:
        stored = pickle.load(file)
    pixels = stored["data"][2].reshape(3, 32, 32).transpose(1, 2, 0)
    assert numpy.array_equal(numpy.asarray(image), pixels)
    assert label == stored["labels" if kind == "cifar10" else "fine_labels"][2] == 14 % len(data.classes)


def test_training_on_cifar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = make_cifar(tmp_path / "data", monkeypatch, "cifar10")
    assert train("--data", place.parent, "--epochs", 1, "--batch-size", 10, "--workers", 0, "--out", "run") == 0
    metrics = json.loads(Path("run/metrics.json").read_text())
    assert (metrics["config"]["data"], metrics["config"]["img_size"]) == ("cifar10", 32)
    assert torch.load("run/deploy.pt", weights_only=True)["classes"][9] == "class 9"


@pytest.mark.parametrize("damage", ["missing", "altered"])
def test_cifar_that_is_not_as_published(
    damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    place = make_cifar(tmp_path / "data", monkeypatch, "cifar10")
    victim = place / "data_batch_3"
    if damage == "missing":
        victim.unlink()
    else:
        victim.write_bytes(victim.read_bytes()[:-1] + b"!")
    assert train("--data", place, "--out", "run") == 2
    error = capsys.readouterr().err.strip()
    assert "is missing or differs from the published one: unpack cifar-10-python.tar.gz again" in error
    assert str(place) in error and "\n" not in error and not Path("run").exists()


# --- shards -----------------------------------------------------------------------------------------------------------------


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


@pytest.fixture
def shards(folder: Path, tmp_path: Path) -> Path:
    """The images of `folder`, in the order in which a folder is read, seven to a shard, as WebDataset writes them."""
    root = tmp_path / "shards"
    root.mkdir()
    for split in ("train", "validation"):
        files = sorted(folder.glob(f"{split}/*/*.png"), key=lambda file: (file.parent.name, int(file.stem)))
        for first in range(0, len(files), 7):
            with tarfile.open(root / f"colours-{split}-{first // 7:04}.tar", "w") as tar:
                for number, file in enumerate(files[first : first + 7], first):
                    key = f"{split}/{number:06}"
                    add(tar, f"{key}.cls", str(int(file.parent.name == "red")).encode())
                    add(tar, f"{key}.png", file.read_bytes())
                    add(tar, f"{key}.json", b"{}")
    (root / "classes.txt").write_text("green\nred\n")
    return root


def test_shards_train_as_the_folder_does(folder: Path, shards: Path) -> None:
    assert train("--data", folder, *FOLDER, "--out", "one") == 0
    assert train("--data", shards, *FOLDER, "--workers", 2, "--out", "other") == 0
    one, other = (load_checkpoint(Path(out) / "checkpoint.pt") for out in ("one", "other"))
    assert one["config"]["data"] == "folder" and other["config"]["data"] == "shards"
    assert_same(one["model"], other["model"])
    assert torch.load("other/deploy.pt", weights_only=True)["classes"] == ["green", "red"]


@pytest.mark.usefixtures("only_training")
def test_shards_resume_bit_by_bit(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert train("--data", shards, *FOLDER, "--out", "whole") == 0
    stop_and_resume(monkeypatch, 3, "--data", shards, *FOLDER)  # in the second epoch, of three steps
    assert_same_run(Path("whole"), Path("parts"))


def test_the_library_that_made_the_format_reads_the_same(shards: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    data = load_data(Config(data="shards", img_size=32), str(shards), {})
    urls = [str(path) for path in sorted(shards.glob("*train*.tar"))]
    theirs = list(webdataset.WebDataset(urls, shardshuffle=False).decode("pil").to_tuple("png", "cls"))
    assert len(theirs) == len(data.train) == 24
    for index, (image, label) in enumerate(theirs):
        mine, my_label = data.train.load(index)
        assert numpy.array_equal(numpy.asarray(image.convert("RGB")), numpy.asarray(mine)) and label == my_label


def test_shards_in_folders_and_without_names(shards: Path) -> None:
    (shards / "classes.txt").unlink()
    for split in ("train", "validation"):
        (shards / split).mkdir()
        for number, file in enumerate(sorted(shards.glob(f"*-{split}-*.tar"))):
            file.rename(shards / split / f"{number}.tar")
    data = load_data(Config(data="shards", img_size=32), str(shards), {})
    assert kind_of_data(str(shards)) == "shards"
    assert (len(data.train), len(data.val), data.classes) == (24, 8, ["0", "1"])


def test_a_folder_beside_its_archive_is_a_folder(folder: Path) -> None:
    (folder / "images_train.tar").write_bytes(b"")
    assert kind_of_data(str(folder)) == "folder"


def not_a_tar(root: Path) -> str:
    (root / "colours-train-0001.tar").write_bytes(b"not an archive" * 100)
    return "colours-train-0001.tar is not a readable tar file"


def cut_off(root: Path) -> str:
    victim = root / "colours-train-0001.tar"
    victim.write_bytes(victim.read_bytes()[: victim.stat().st_size // 2])
    return f"{victim.name} is not a readable tar file: unexpected end of data"


def cut_off_between_files(root: Path) -> str:
    victim = root / "colours-train-0001.tar"
    with tarfile.open(victim) as tar:
        third = list(tar)[6]  # an image has three files
    victim.write_bytes(victim.read_bytes()[: third.offset])
    return f"{victim.name} is not a readable tar file: unexpected end of data"


def no_label(root: Path) -> str:
    with tarfile.open(root / "colours-train-0009.tar", "w") as tar:
        add(tar, "x/1.png", b"")
    return "colours-train-0009.tar has no label x/1.cls"


def bad_label(root: Path) -> str:
    with tarfile.open(root / "colours-train-0009.tar", "w") as tar:
        add(tar, "x/1.cls", b"red")
    return "colours-train-0009.tar has 'red' in x/1.cls, which must be a class number"


def no_validation(root: Path) -> str:
    for file in root.glob("*validation*"):
        file.unlink()
    return "has no shards of val: neither *val*.tar nor val/*.tar"


def no_images(root: Path) -> str:
    for file in root.glob("*validation*"):
        with tarfile.open(file, "w") as tar:
            add(tar, "1.txt", b"")
    return "the shards of val hold no images"


def too_few_names(root: Path) -> str:
    (root / "classes.txt").write_text("green\n")
    return "classes.txt names 1 classes, but there are labels up to 1"


@pytest.mark.parametrize(
    "damage", [not_a_tar, cut_off, cut_off_between_files, no_label, bad_label, no_validation, no_images, too_few_names]
)
def test_shards_that_are_none(shards: Path, damage: Callable[[Path], str], capsys: pytest.CaptureFixture[str]) -> None:
    message = damage(shards)
    assert train("--data", shards, *FOLDER, "--out", "run") == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("orepa: error: ") and message in error and "\n" not in error
    assert not Path("run").exists()


def test_broken_images_in_shards_are_told_and_skipped(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    victim = shards / "colours-train-0001.tar"
    with tarfile.open(victim) as tar:
        member = [member for member in tar if member.name.endswith(".png")][3]
    content = bytearray(victim.read_bytes())
    content[member.offset_data : member.offset_data + 8] = bytes(8)
    victim.write_bytes(content)
    assert train("--data", shards, *FOLDER, "--out", "run") == 0
    skipped = json.loads(Path("run/metrics.json").read_text())["skipped_images"]
    assert skipped == [{"image": f"{victim}/{member.name}", "reason": "not an image in a known format"}]
    assert f"skipped an image, cannot read {victim}/{member.name}" in capsys.readouterr().err


def test_a_shard_that_shrinks_under_the_run(shards: Path) -> None:
    data = load_data(Config(data="shards", img_size=32), str(shards), {})
    (shards / "colours-train-0000.tar").write_bytes(b"")
    data.train.load(7)  # of the second shard
    with pytest.raises(OSError, match="the shard ends within the image"):
        data.train.load(0)
