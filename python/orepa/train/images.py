"""What a data set of images is to the training loop."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy
from PIL import Image
from torch import Tensor

#: what folders and files of either split may be called
SPLITS = {"train": ("train", "training"), "val": ("val", "valid", "validation", "eval", "evaluation")}


class Source(Protocol):
    """Images by index."""

    def __len__(self) -> int: ...

    def load(self, index: int) -> tuple[Any, int]:
        """A PIL image, decoded, and its label. Any exception means that it cannot be read."""

    def name(self, index: int) -> str:
        """For error messages: the file."""


class InMemory:
    """Images in an array.

    Args:
        pixels: ``[N, H, W]`` or ``[N, H, W, 3]``, uint8.
        labels: ``[N]``.
        noun: what one is called, for error messages.
    """

    def __init__(self, pixels: numpy.ndarray, labels: numpy.ndarray, noun: str) -> None:
        self.pixels, self.labels, self.noun = pixels, labels, noun

    def __len__(self) -> int:
        return len(self.labels)

    def load(self, index: int) -> tuple[Any, int]:
        return Image.fromarray(self.pixels[index]), int(self.labels[index])

    def name(self, index: int) -> str:
        return f"{self.noun} {index}"


@dataclass
class ImageData:
    """A data set for classification.

    Args:
        train, val: the images.
        augment, transform: from a PIL image to ``[C, S, S]``, for training and validation.
        classes: their names, by label.
        in_chans: ``C``.
        fingerprint: changes when images come, go or change their label.
        preprocessing: mean, std, ...: what a user of the trained model has to know.
    """

    train: Source
    val: Source
    augment: Callable[[Any], Tensor]
    transform: Callable[[Any], Tensor]
    classes: list[str]
    in_chans: int
    fingerprint: str
    preprocessing: dict[str, Any]


def evenly(size: int, limit: int | None) -> list[int]:
    """At most ``limit`` of ``range(size)``, evenly spread, so that a sorted folder gives some of every class."""
    if limit is None or limit >= size:
        return list(range(size))
    return [i * size // limit for i in range(limit)]
