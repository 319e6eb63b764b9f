"""The data sets of `orepa train`: scikit-learn's digits, CIFAR, image folders and shards."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy
from torchvision import datasets, transforms

from ..errors import UserError
from .config import CIFAR10, CIFAR100, DIGITS, FOLDER, SHARDS, Config
from .image_files import has_shards, load_folder, load_shards
from .images import ImageData, InMemory, crop_and_flip, subsample

_CIFAR: dict[str, Any] = {CIFAR10: datasets.CIFAR10, CIFAR100: datasets.CIFAR100}
_DIGITS_CFG = {"mean": (0.305,), "std": (0.376,), "interpolation": "bilinear", "crop_pct": 1.0}  # of pixels in 0..1


def kind_of_data(path: str | None) -> str:
    """Return what a path holds, as in `Config.data`. Anything unknown counts as an image folder."""
    if path in (None, DIGITS):
        return DIGITS
    place = Path(path)
    for kind, dataset in _CIFAR.items():
        if place.name == dataset.base_folder or (place / dataset.base_folder).is_dir():
            return kind
    return SHARDS if has_shards(place) else FOLDER


def load_data(config: Config, path: str | None, cfg: dict[str, Any]) -> ImageData:
    """Open the data of a run.

    Args:
        config: of the run.
        path: of the folder, None for the digits.
        cfg: timm's configuration of the model, for mean, std and interpolation.

    Raises:
        UserError: the folder or its content is not as expected.
    """
    if config.data == DIGITS:
        return load_digits(config.img_size, config.limit, config.crops_and_flips)
    assert path is not None
    if config.data in _CIFAR:
        return load_cifar(config.data, path, config.img_size, config.limit, cfg)
    load = load_shards if config.data == SHARDS else load_folder
    return load(path, config.img_size, config.limit, cfg)


def load_digits(img_size: int, limit: int | None = None, crops_and_flips: bool = False) -> ImageData:
    """Open scikit-learn's digits: 1797 scanned 8x8 images that come with the package.

    One fifth is for validation: a fixed, stratified split that no option changes.

    Args:
        img_size: side in pixels that the images are enlarged to.
        limit: number of training and of validation images.
        crops_and_flips: augment as the paper does with photographs, instead of by small affine moves.
    """
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


def load_cifar(kind: str, path: str, img_size: int, limit: int | None, cfg: dict[str, Any]) -> ImageData:
    """Open the 50000 training and 10000 test images of CIFAR as published for Python; the test images are for validation.

    Args:
        kind: ``"cifar10"`` or ``"cifar100"``.
        path: the folder ``cifar-10-batches-py`` or ``cifar-100-python``, or the one that holds it. Nothing is downloaded.
        img_size: side of the crops.
        limit: number of training and of validation images.
        cfg: timm's configuration of the model.

    Raises:
        UserError: a file is missing, or is not as published. The files are pickles; torchvision checks their sums first.
    """
    dataset, root = _CIFAR[kind], Path(path)
    root = root.parent if root.name == dataset.base_folder else root
    try:
        splits = [dataset(str(root), train=training) for training in (True, False)]
    except (RuntimeError, OSError) as error:
        raise UserError(
            f"--data {path}: a file in {root / dataset.base_folder} is missing or differs from the published one: "
            f"unpack {dataset.filename} again"
        ) from error
    digest, sources = hashlib.sha256(), []
    for split in splits:
        indices = subsample(len(split), limit)
        sources.append(InMemory(split.data[indices], numpy.asarray(split.targets)[indices], "CIFAR image"))
        digest.update(sources[-1].pixels.tobytes() + sources[-1].labels.tobytes())
    train, val = sources
    classes = [str(name) for name in splits[0].classes]
    return ImageData(train, val, classes, digest.hexdigest(), **crop_and_flip(img_size, cfg))
