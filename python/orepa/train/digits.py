"""scikit-learn's digits: 1797 scanned 8x8 images that come with the package."""

from __future__ import annotations

import hashlib

import numpy
from sklearn.datasets import load_digits as load_bunch
from sklearn.model_selection import train_test_split
from torchvision import transforms

from .images import ImageData, InMemory, evenly
from .transforms import Transforms, crop_and_flip

_MEAN, _STD = 0.305, 0.376  # of all pixels, in 0..1
_FACTS = {"mean": (_MEAN,), "std": (_STD,), "interpolation": "bilinear", "crop_pct": 1.0}


def load_digits(img_size: int, limit: int | None = None, crops_and_flips: bool = False) -> ImageData:
    """One fifth is for validation: a fixed, stratified split that no option changes.

    Args:
        img_size: to which the images are enlarged.
        limit: number of training and of validation images.
        crops_and_flips: augment as the paper does with photographs, instead of moving the digits about.
    """
    bunch = load_bunch()
    images = numpy.round(bunch.images * (255 / 16)).astype(numpy.uint8)
    train, val = train_test_split(numpy.arange(len(images)), test_size=0.2, stratify=bunch.target, random_state=0)
    train, val = (part[evenly(len(part), limit)] for part in (train, val))
    ways = crop_and_flip(img_size, _FACTS, "grey") if crops_and_flips else _moved_about(img_size)
    return ImageData(
        train=InMemory(images[train], bunch.target[train], "digit"),
        val=InMemory(images[val], bunch.target[val], "digit"),
        augment=ways.augment,
        transform=ways.transform,
        classes=[str(name) for name in bunch.target_names],
        in_chans=1,
        fingerprint=hashlib.sha256(images[train].tobytes() + images[val].tobytes()).hexdigest(),
        preprocessing=ways.preprocessing,
    )


def _moved_about(img_size: int) -> Transforms:
    resize = transforms.Resize((img_size, img_size), transforms.InterpolationMode.BILINEAR)
    to_tensor = [transforms.ToTensor(), transforms.Normalize([_MEAN], [_STD])]
    # No flips: a mirrored digit is no digit.
    move = transforms.RandomAffine(10, (0.1, 0.1), (0.9, 1.1), interpolation=transforms.InterpolationMode.BILINEAR)
    return Transforms(
        augment=transforms.Compose([resize, move, *to_tensor]),
        transform=transforms.Compose([resize, *to_tensor]),
        preprocessing={
            "input": "grey, 0..1",
            "mean": [_MEAN],
            "std": [_STD],
            "interpolation": "bilinear",
            "crop_pct": 1.0,
        },
    )
