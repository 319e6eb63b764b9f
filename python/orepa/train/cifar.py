"""CIFAR-10 and CIFAR-100 from a local folder, as the authors of the data publish them for Python; read by torchvision."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy
from torchvision import datasets

from ..errors import UserError
from .config import CIFAR10, CIFAR100
from .images import ImageData, InMemory, evenly
from .transforms import crop_and_flip

_KINDS: dict[str, Any] = {CIFAR10: datasets.CIFAR10, CIFAR100: datasets.CIFAR100}


def load_cifar(kind: str, path: str, img_size: int, limit: int | None, cfg: dict[str, Any]) -> ImageData:
    """The 50000 training and 10000 test images, held in memory; the test images are for validation.

    Args:
        kind: ``"cifar10"`` or ``"cifar100"``.
        path: the folder ``cifar-10-batches-py`` or ``cifar-100-python``, or the one that holds it. Nothing is downloaded.
        img_size: side of the crops.
        limit: number of training and of validation images.
        cfg: timm's facts about the model.

    Raises:
        UserError: a file is missing, or is not as published. The files are pickles, which are opened only if their checksums
            are right.
    """
    dataset = _KINDS[kind]
    root = Path(path)
    root = root.parent if root.name == dataset.base_folder else root
    try:
        train, val = (dataset(str(root), train=training) for training in (True, False))
    except (RuntimeError, OSError) as error:
        raise UserError(
            f"--data {path}: a file in {root / dataset.base_folder} is missing or differs from the published one: "
            f"unpack {dataset.filename} again"
        ) from error
    parts = _in_memory(train, limit), _in_memory(val, limit)
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.pixels.tobytes() + part.labels.tobytes())
    transforms = crop_and_flip(img_size, cfg)
    return ImageData(
        train=parts[0],
        val=parts[1],
        augment=transforms.augment,
        transform=transforms.transform,
        classes=[str(name) for name in train.classes],
        in_chans=3,
        fingerprint=digest.hexdigest(),
        preprocessing=transforms.preprocessing,
    )


def _in_memory(dataset: Any, limit: int | None) -> InMemory:
    indices = evenly(len(dataset), limit)
    return InMemory(dataset.data[indices], numpy.asarray(dataset.targets)[indices], "CIFAR image")


def which_cifar(path: Path) -> str | None:
    """Which of the two a folder is or holds: ``"cifar10"``, ``"cifar100"``, or None."""
    for kind, dataset in _KINDS.items():
        if path.name == dataset.base_folder or (path / dataset.base_folder).is_dir():
            return kind
    return None
