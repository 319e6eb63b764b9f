"""Images in class folders, or in WebDataset shards that are read at random.

WebDataset streams shards, which cannot be resumed at an image, nor redistributed over other processes. But shards are tar
files: once their headers are indexed, their members are seekable, and they are a data set like a folder.
"""

from __future__ import annotations

import hashlib
import io
import re
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image
from timm.data.readers.reader_image_folder import find_images_and_targets

from ..errors import UserError, reason
from .config import Config
from .images import ImageData, crop_and_flip, subsample

_SPLITS = {"train": ("train", "training"), "val": ("val", "valid", "validation", "eval", "evaluation")}
_IMAGES = ("jpg", "jpeg", "png", "webp", "ppm", "pgm", "bmp", "tif", "tiff")
_LABEL = "cls"


class _File(NamedTuple):
    """An image file, or a member of a shard: ``size`` bytes from ``offset`` on."""

    path: str
    label: int
    member: str = ""
    offset: int = 0
    size: int = -1


class _Files:
    """The source of these images; see `Source`."""

    def __init__(self, files: list[_File], limit: int | None) -> None:
        self.files = [files[i] for i in subsample(len(files), limit)]

    def __len__(self) -> int:
        return len(self.files)

    def load(self, index: int) -> tuple[Any, int]:
        path, label, _, offset, size = self.files[index]
        with open(path, "rb") as file:  # once per image: workers that share a handle would move each other's position
            file.seek(offset)
            content = file.read(size)
        if len(content) < size:
            raise OSError("the shard ends within the image")
        return Image.open(io.BytesIO(content)).convert("RGB"), label

    def name(self, index: int) -> str:
        file = self.files[index]
        return f"{file.path}/{file.member}" if file.member else file.path


def _image_data(
    config: Config, cfg: dict[str, Any], files: dict[str, list[_File]], classes: list[str], key: Callable[[_File], str]
) -> ImageData:
    """Put the splits together. Their fingerprint is that of the keys of all images."""
    if len(classes) < 2:
        raise UserError(f"the images are of one class only, {classes[0]!r}: nothing to learn")
    train, val = (_Files(files[split], config.limit) for split in ("train", "val"))
    if len(train) < 2:
        raise UserError("training needs two images at least")
    listing = "\n\n".join("\n".join(map(key, source.files)) for source in (train, val))
    fingerprint = hashlib.sha256(listing.encode()).hexdigest()
    return ImageData(train, val, classes, fingerprint, **crop_and_flip(config.img_size, cfg))


# --- class folders --------------------------------------------------------------------------------------------------------


def load_folder(config: Config, root: Path, cfg: dict[str, Any]) -> ImageData:
    """Open an image folder: ``train/`` and ``val/`` (or ``validation/``, ...), each with one folder per class."""
    if not root.is_dir():
        raise UserError(f"--data {root}: {'not a folder' if root.exists() else 'no such folder'}")
    roots = {}
    for split, names in _SPLITS.items():
        present = [root / name for name in names if (root / name).is_dir()]
        if not present:
            raise UserError(f"--data {root} has no folder {split}/ (with one folder per class in it)")
        roots[split] = present[0]
    folders = {split: _class_folders(place) for split, place in roots.items()}
    for here, there in (("train", "val"), ("val", "train")):
        for name in sorted(folders[here] - folders[there]):
            raise UserError(f"the class {name!r} is in {roots[here]}, but not in {roots[there]}")
    files, labels = {}, {}
    for split, place in roots.items():
        samples, labels = find_images_and_targets(str(place))  # sorted, in natural order
        for name in sorted(folders[split] - labels.keys()):
            raise UserError(f"the class folder {place / name} holds no images")
        for name in sorted(labels.keys() - folders[split]):
            raise UserError(f"{place} must hold one level of class folders, but has images in {name or '.'!r} as well")
        files[split] = [_File(*sample) for sample in samples]
    classes = sorted(labels, key=labels.__getitem__)
    return _image_data(
        config, cfg, files, classes, lambda f: f"{'/'.join(Path(f.path).relative_to(root).parts[1:])} {f.label}"
    )


def _class_folders(root: Path) -> set[str]:
    try:
        names = {entry.name for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith(".")}
    except OSError as error:
        raise UserError(f"cannot read the folder {root}: {reason(error)}") from error
    if not names:
        raise UserError(f"{root} has no class folders")
    return names


# --- shards ---------------------------------------------------------------------------------------------------------------


def load_shards(config: Config, root: Path, cfg: dict[str, Any]) -> ImageData:
    """Open WebDataset shards, tar files of ``KEY.jpg`` and ``KEY.cls``: ``*train*.tar`` and ``*val*.tar``, or in such folders.

    ``classes.txt``, if present, names the classes, one per line; otherwise their numbers are their names.
    """
    shards = {split: _find_shards(root, split) for split in _SPLITS}
    files = {split: [file for shard in shards[split] for file in _index_shard(shard)] for split in _SPLITS}
    for split in files:
        if not files[split]:
            raise UserError(f"--data {root}: the shards of {split} hold no images ({', '.join(_IMAGES)})")
    classes = _class_names(root, 1 + max(file.label for split in files.values() for file in split))
    return _image_data(config, cfg, files, classes, lambda f: f"{Path(f.path).name} {f.member} {f.size} {f.label}")


def has_shards(path: Path) -> bool:
    """Return whether a folder, or its folder of training images, holds tar files instead of class folders."""
    folders = [path / name for name in _SPLITS["train"] if (path / name).is_dir()]
    if any(entry.is_dir() for folder in folders for entry in folder.iterdir()):
        return False  # an image folder beside its archive
    return any(any(folder.glob("*.tar")) for folder in (path, *folders))


def _find_shards(root: Path, split: str) -> list[Path]:
    names = _SPLITS[split]
    inside = [file for name in names for file in (root / name).glob("*.tar")]
    beside = [file for file in root.glob("*.tar") if set(re.split("[^a-z]+", file.stem.lower())) & set(names)]
    if not inside and not beside:
        raise UserError(f"--data {root} has no shards of {split}: neither *{split}*.tar nor {split}/*.tar")
    return sorted(inside or beside)


def _index_shard(shard: Path) -> list[_File]:
    images: dict[str, tarfile.TarInfo] = {}
    labels: dict[str, int] = {}
    end = 0
    try:
        with tarfile.open(shard, "r:") as tar:
            for member in tar:
                end = member.offset_data + -(-member.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
                folder, _, name = member.name.rpartition("/")
                stem, _, kind = name.partition(".")  # like WebDataset: everything after the first dot
                if member.isfile() and kind.lower() in _IMAGES:
                    images[f"{folder}/{stem}"] = member
                elif member.isfile() and kind.lower() == _LABEL:
                    labels[f"{folder}/{stem}"] = _read_label(tar, member, shard)
        # An archive ends with zeros; tarfile accepts one that was cut off between two files.
        with shard.open("rb") as file:
            file.seek(end)
            if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise tarfile.ReadError("unexpected end of data")
    except (tarfile.TarError, OSError) as error:
        raise UserError(f"the shard {shard} is not a readable tar file: {str(error).splitlines()[0]}") from error
    for key, member in images.items():
        if key not in labels:
            raise UserError(f"the shard {shard} has no label {member.name.rpartition('.')[0]}.{_LABEL}")
    return [_File(str(shard), labels[key], m.name, m.offset_data, m.size) for key, m in images.items()]


def _read_label(tar: tarfile.TarFile, member: tarfile.TarInfo, shard: Path) -> int:
    file = tar.extractfile(member)
    assert file is not None  # it is a regular file
    text = file.read().decode(errors="replace").strip()
    if not text.isdecimal():
        raise UserError(f"the shard {shard} has {text[:40]!r} in {member.name}, which must be a class number from 0 on")
    return int(text)


def _class_names(root: Path, count: int) -> list[str]:
    file = root / "classes.txt"
    if not file.exists():
        return [str(label) for label in range(count)]
    names = [name.strip() for name in file.read_text().splitlines() if name.strip()]
    if len(names) < count:
        raise UserError(f"{file} names {len(names)} classes, but there are labels up to {count - 1}")
    return names
