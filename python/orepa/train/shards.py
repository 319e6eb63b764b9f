"""WebDataset shards: tar files of ``KEY.jpg`` and ``KEY.cls``, read at random through an index of their members.

WebDataset streams shards, and a stream cannot be resumed at an image, nor shared out again among other processes. Shards are
tar files, though, and tar files have seekable members: once their headers are listed, they are a data set like a folder.
"""

from __future__ import annotations

import hashlib
import io
import tarfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from ..errors import UserError
from .images import SPLITS, ImageData, evenly
from .transforms import crop_and_flip

_IMAGES = ("jpg", "jpeg", "png", "webp", "ppm", "pgm", "bmp", "tif", "tiff")
_LABEL = "cls"


@dataclass
class _Index:
    """Where the images of a split are. Parallel lists, which take less memory than a million objects."""

    shards: list[Path] = field(default_factory=list)
    shard: list[int] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)


class _Shards:
    def __init__(self, index: _Index, limit: int | None) -> None:
        self.index, self.indices = index, evenly(len(index.names), limit)

    def __len__(self) -> int:
        return len(self.indices)

    def load(self, index: int) -> tuple[Any, int]:
        at, all_ = self.indices[index], self.index
        # Opened for each image: a handle could not be shared by workers, which would seek under each other's hands.
        with all_.shards[all_.shard[at]].open("rb") as file:
            file.seek(all_.offsets[at])
            content = file.read(all_.sizes[at])
        if len(content) < all_.sizes[at]:
            raise OSError("the shard ends within the image")
        return Image.open(io.BytesIO(content)).convert("RGB"), all_.labels[at]

    def name(self, index: int) -> str:
        at = self.indices[index]
        return f"{self.index.shards[self.index.shard[at]]}/{self.index.names[at]}"

    def listing(self) -> str:
        all_ = self.index
        return "\n".join(
            f"{all_.shards[all_.shard[i]].name} {all_.names[i]} {all_.sizes[i]} {all_.labels[i]}" for i in self.indices
        )


def load_shards(path: str, img_size: int, limit: int | None, cfg: dict[str, Any]) -> ImageData:
    """Images in shards, augmented as in the paper.

    Args:
        path: holds ``*train*.tar`` and ``*val*.tar``, or folders of those names with tar files in them. ``classes.txt``, if
            there, names the classes, one per line; otherwise they are called by their numbers.
        img_size: side of the crops.
        limit: number of training and of validation images.
        cfg: timm's facts about the model.

    Raises:
        UserError: a split has no shards, or a shard is no tar file, or an image in it has no label.
    """
    root = Path(path)
    indices = {split: _list(files) for split, files in _find_shards(root).items()}
    for split, index in indices.items():
        if not index.names:
            raise UserError(f"--data {path}: the shards of {split} hold no images ({', '.join(_IMAGES)})")
    train, val = (_Shards(indices[split], limit) for split in ("train", "val"))
    classes = _class_names(root, 1 + max(max(index.labels) for index in indices.values()))
    if len(classes) < 2:
        raise UserError(f"--data {path}: the shards hold one class only: nothing to learn")
    if len(train) < 2:
        raise UserError("training needs two images at least")
    transforms = crop_and_flip(img_size, cfg)
    return ImageData(
        train=train,
        val=val,
        augment=transforms.augment,
        transform=transforms.transform,
        classes=classes,
        in_chans=3,
        fingerprint=hashlib.sha256(f"{train.listing()}\n\n{val.listing()}".encode()).hexdigest(),
        preprocessing=transforms.preprocessing,
    )


def has_shards(path: Path) -> bool:
    """Whether a folder holds tar files instead of class folders, itself or in its folder of training images."""
    folders = [path / name for name in SPLITS["train"] if (path / name).is_dir()]
    if any(entry.is_dir() for folder in folders for entry in folder.iterdir()):
        return False  # an image folder, beside the archive it came in
    return any(any(folder.glob("*.tar")) for folder in (path, *folders))


def _find_shards(root: Path) -> dict[str, list[Path]]:
    found = {}
    for split, names in SPLITS.items():
        inside = [file for name in names for file in (root / name).glob("*.tar")]
        beside = [file for file in root.glob("*.tar") if _words(file.stem) & set(names)]
        found[split] = sorted(inside or beside)
        if not found[split]:
            raise UserError(f"--data {root} has no shards of {split}: neither *{split}*.tar nor {split}/*.tar")
    return found


def _words(name: str) -> set[str]:
    return set("".join(c if c.isalpha() else " " for c in name.lower()).split())


def _list(shards: list[Path]) -> _Index:
    index = _Index(shards)
    for number, shard in enumerate(shards):
        images: dict[str, tarfile.TarInfo] = {}
        labels: dict[str, int] = {}
        try:
            with tarfile.open(shard, "r:") as tar:
                end = 0
                for member in tar:
                    end = member.offset_data + -(-member.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
                    folder, _, file = member.name.rpartition("/")
                    key, _, kind = file.partition(".")  # as WebDataset does: all after the first dot
                    key = f"{folder}/{key}"
                    if not member.isfile():
                        continue
                    if kind.lower() in _IMAGES:
                        images[key] = member
                    elif kind.lower() == _LABEL:
                        labels[key] = _label(tar, member, shard)
            _check_end(shard, end)
        except (tarfile.TarError, OSError) as error:
            raise UserError(f"the shard {shard} is not a readable tar file: {str(error).splitlines()[0]}") from error
        for key, member in images.items():
            if key not in labels:
                raise UserError(f"the shard {shard} has no label {member.name.rpartition('.')[0]}.{_LABEL}")
            index.shard.append(number)
            index.names.append(member.name)
            index.offsets.append(member.offset_data)
            index.sizes.append(member.size)
            index.labels.append(labels[key])
    return index


def _check_end(shard: Path, end: int) -> None:
    """An archive ends with blocks of zeros. Python's reader takes one that was cut off between two files for whole."""
    with shard.open("rb") as file:
        file.seek(end)
        if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise tarfile.ReadError("unexpected end of data")


def _label(tar: tarfile.TarFile, member: tarfile.TarInfo, shard: Path) -> int:
    file = tar.extractfile(member)
    assert file is not None  # it is a regular file
    text = file.read().decode(errors="replace").strip()
    if not text.isdecimal():
        raise UserError(f"the shard {shard} has {text[:40]!r} in {member.name}, which must be a class number from 0 on")
    return int(text)


def _class_names(root: Path, number: int) -> list[str]:
    file = root / "classes.txt"
    if not file.exists():
        return [str(label) for label in range(number)]
    names = file.read_text().split("\n")
    names = [name.strip() for name in names if name.strip()]
    if len(names) < number:
        raise UserError(f"{file} names {len(names)} classes, but there are labels up to {number - 1}")
    return names
