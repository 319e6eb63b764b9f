"""An image folder, ``DIR/train/<class>/*`` and ``DIR/val/<class>/*``, read by timm."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from PIL import Image
from timm.data import create_dataset

from ..errors import UserError
from .images import SPLITS, ImageData, evenly
from .transforms import crop_and_flip


class _Folder:
    def __init__(self, dataset: Any, root: Path, limit: int | None) -> None:
        self.reader, self.root = dataset.reader, root
        self.indices = evenly(len(dataset), limit)

    def __len__(self) -> int:
        return len(self.indices)

    def load(self, index: int) -> tuple[Any, int]:
        # timm's dataset would replace an unreadable image by its neighbour.
        file, label = self.reader[self.indices[index]]
        with file:
            return Image.open(file).convert("RGB"), label

    def name(self, index: int) -> str:
        return str(self.reader.filename(self.indices[index], absolute=True))

    def listing(self) -> str:
        files = (self.reader.samples[i] for i in self.indices)
        return "\n".join(f"{Path(name).relative_to(self.root).as_posix()} {label}" for name, label in files)


def load_folder(path: str, img_size: int, limit: int | None, cfg: dict[str, Any]) -> ImageData:
    """Images in class folders, augmented as in the paper.

    Args:
        path: holds ``train/`` and ``val/`` (or ``validation/``, ...), each with one folder per class.
        img_size: side of the crops.
        limit: number of training and of validation images, spread over the classes.
        cfg: timm's facts about the model.

    Raises:
        UserError: a folder is missing or empty, or training and validation have other classes.
    """
    roots = _find_splits(Path(path))
    classes = {split: _class_folders(root) for split, root in roots.items()}
    if classes["train"] != classes["val"]:
        odd = sorted(set(classes["train"]) ^ set(classes["val"]))[0]
        here, there = ("train", "val") if odd in classes["train"] else ("val", "train")
        raise UserError(f"the class {odd!r} is in {roots[here]}, but not in {roots[there]}")
    if len(classes["train"]) < 2:
        raise UserError(f"{roots['train']} holds one class only, {classes['train'][0]!r}: nothing to learn")

    sources = {}
    class_map: dict[str, int] = {}
    for split, root in roots.items():
        try:
            dataset = create_dataset("", root=str(root), search_split=False, class_map=class_map or "")
        except RuntimeError as error:  # no image at all
            raise UserError(f"the class folder {root / classes[split][0]} holds no images") from error
        found = dataset.reader.class_to_idx
        empty = sorted(set(classes[split]) - {Path(name).parent.name for name, _ in dataset.reader.samples})
        if empty:
            raise UserError(f"the class folder {root / empty[0]} holds no images")
        if set(found) != set(classes[split]):
            raise UserError(
                f"{root} must hold one level of class folders, but has images in {sorted(found)[0] or '.'!r} as well"
            )
        class_map = found
        sources[split] = _Folder(dataset, root, limit)
    if len(sources["train"]) < 2:
        raise UserError("training needs two images at least")

    listing = sources["train"].listing() + "\n\n" + sources["val"].listing()
    transforms = crop_and_flip(img_size, cfg)
    return ImageData(
        train=sources["train"],
        val=sources["val"],
        augment=transforms.augment,
        transform=transforms.transform,
        classes=sorted(class_map, key=class_map.__getitem__),
        in_chans=3,
        fingerprint=hashlib.sha256(listing.encode()).hexdigest(),
        preprocessing=transforms.preprocessing,
    )


def _find_splits(root: Path) -> dict[str, Path]:
    if not root.is_dir():
        raise UserError(f"--data {root}: {'not a folder' if root.exists() else 'no such folder'}")
    found = {}
    for split, names in SPLITS.items():
        present = [root / name for name in names if (root / name).is_dir()]
        if not present:
            raise UserError(f"--data {root} has no folder {split}/ (with one folder per class in it)")
        found[split] = present[0]
    return found


def _class_folders(root: Path) -> list[str]:
    try:
        names = sorted(entry.name for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    except OSError as error:
        raise UserError(f"cannot read the folder {root}: {error.strerror}") from error
    if not names:
        raise UserError(f"{root} has no class folders")
    return names
