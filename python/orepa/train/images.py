"""The interface between a data set of images and the training loop; the digits and CIFAR, which fit in memory."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy
from PIL import Image
from timm.data import create_transform, resolve_data_config
from torch import Tensor
from torchvision import datasets, transforms

from ..errors import UserError
from .config import CIFAR10, CIFAR100, Config

CIFAR: dict[str, Any] = {CIFAR10: datasets.CIFAR10, CIFAR100: datasets.CIFAR100}
_DIGITS_CFG = {"mean": (0.305,), "std": (0.376,), "interpolation": "bilinear", "crop_pct": 1.0}  # of pixels in 0..1


class Source(Protocol):
    """Images by index."""

    def __len__(self) -> int: ...

    def load(self, index: int) -> tuple[Any, int]:
        """Return a decoded PIL image and its label. Any exception means that the image cannot be read."""

    def name(self, index: int) -> str:
        """Return the name of the image's file, for error messages."""


@dataclass(eq=False)
class InMemory:
    """Images in an array."""

    pixels: numpy.ndarray  # [N, H, W] or [N, H, W, 3], uint8
    labels: numpy.ndarray  # [N]
    noun: str  # for error messages, such as "digit"

    def __len__(self) -> int:
        return len(self.labels)

    def load(self, index: int) -> tuple[Any, int]:
        return Image.fromarray(self.pixels[index]), int(self.labels[index])

    def name(self, index: int) -> str:
        return f"{self.noun} {index}"


@dataclass
class ImageData:
    """A data set for classification."""

    train: Source
    val: Source
    classes: list[str]
    fingerprint: str  # changes when images are added, removed or relabelled
    augment: Callable[[Any], Tensor]  # from a PIL image to [C, S, S], for training
    transform: Callable[[Any], Tensor]  # likewise, for validation
    preprocessing: dict[str, Any]  # mean, std, ...: what a user of the trained model has to know
    in_chans: int  # C


def subsample(size: int, limit: int | None) -> list[int]:
    """Return at most ``limit`` of ``range(size)``, evenly spaced, so that a sorted folder gives some of every class."""
    count = size if limit is None else min(limit, size)
    return [i * size // count for i in range(count)]


def crop_and_flip(img_size: int, cfg: dict[str, Any], in_chans: int = 3) -> dict[str, Any]:
    """Return the paper's preprocessing (section 4.1), by timm, as keyword arguments for `ImageData`.

    Random-resized-crop and flip for training, resize and centre crop for validation. Mean, std, interpolation and crop_pct
    are those of ``cfg``, timm's configuration of the model, or timm's defaults.
    """
    size = (in_chans, img_size, img_size)
    resolved = resolve_data_config({"input_size": size}, pretrained_cfg=cfg)
    facts = {name: resolved[name] for name in ("mean", "std", "interpolation", "crop_pct")}
    plain = {name: list(value) if isinstance(value, tuple) else value for name, value in facts.items()}
    return {
        "augment": create_transform(size, is_training=True, color_jitter=None, **facts),
        "transform": create_transform(size, **facts),
        "preprocessing": {"input": f"{'RGB' if in_chans == 3 else 'grey'}, 0..1", **plain},
        "in_chans": in_chans,
    }


def load_digits(img_size: int, limit: int | None = None, crops_and_flips: bool = False) -> ImageData:
    """Open scikit-learn's digits, 1797 scanned 8x8 images; one fifth, by a fixed, stratified split, is for validation."""
    from sklearn.datasets import load_digits as load_bunch  # other data do not need scikit-learn
    from sklearn.model_selection import train_test_split

    bunch = load_bunch()
    images = numpy.round(bunch.images * (255 / 16)).astype(numpy.uint8)
    split = train_test_split(numpy.arange(len(images)), test_size=0.2, stratify=bunch.target, random_state=0)
    train, val = (part[subsample(len(part), limit)] for part in split)
    facts = crop_and_flip(img_size, _DIGITS_CFG, in_chans=1)
    if not crops_and_flips:
        bilinear = transforms.InterpolationMode.BILINEAR
        resize = transforms.Resize((img_size, img_size), bilinear)
        move = transforms.RandomAffine(10, (0.1, 0.1), (0.9, 1.1), interpolation=bilinear)
        to_tensor = [transforms.ToTensor(), transforms.Normalize(_DIGITS_CFG["mean"], _DIGITS_CFG["std"])]
        facts["augment"] = transforms.Compose([resize, move, *to_tensor])
        facts["transform"] = transforms.Compose([resize, *to_tensor])
    return ImageData(
        train=InMemory(images[train], bunch.target[train], "digit"),
        val=InMemory(images[val], bunch.target[val], "digit"),
        classes=[str(name) for name in bunch.target_names],
        fingerprint=hashlib.sha256(images[train].tobytes() + images[val].tobytes()).hexdigest(),
        **facts,
    )


def load_cifar(config: Config, path: Path, cfg: dict[str, Any]) -> ImageData:
    """Open the 50000 training and 10000 test images of CIFAR as published for Python; the test images are for validation.

    The path is that of the folder ``cifar-10-batches-py`` or ``cifar-100-python``, or of the one that holds it. Its files are
    pickles, which torchvision opens only if their checksums are right.
    """
    dataset = CIFAR[config.data]
    folder = path if path.name == dataset.base_folder else path / dataset.base_folder
    try:
        splits = [dataset(str(folder.parent), train=training) for training in (True, False)]
    except (RuntimeError, OSError) as error:
        problem = f"a file in {folder} is missing or differs from the published one"
        raise UserError(f"--data {path}: {problem}: unpack {dataset.filename} again") from error
    digest, sources = hashlib.sha256(), []
    for split in splits:
        indices = subsample(len(split), config.limit)
        sources.append(InMemory(split.data[indices], numpy.asarray(split.targets)[indices], "CIFAR image"))
        digest.update(sources[-1].pixels.tobytes() + sources[-1].labels.tobytes())
    train, val = sources
    return ImageData(train, val, list(splits[0].classes), digest.hexdigest(), **crop_and_flip(config.img_size, cfg))
