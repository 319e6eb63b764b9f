"""The interface between a data set of images and the training loop, and the paper's preprocessing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy
from PIL import Image
from timm.data import create_transform, resolve_data_config
from torch import Tensor


class Source(Protocol):
    """Images by index."""

    def __len__(self) -> int: ...

    def load(self, index: int) -> tuple[Any, int]:
        """Return a decoded PIL image and its label. Any exception means that the image cannot be read."""

    def name(self, index: int) -> str:
        """Return the name of the image's file, for error messages."""


class InMemory:
    """Images in an array.

    Args:
        pixels: ``[N, H, W]`` or ``[N, H, W, 3]``, uint8.
        labels: ``[N]``.
        noun: for error messages, such as "digit".
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
        classes: the names of the labels.
        fingerprint: changes when images are added, removed or relabelled.
        augment, transform: from a PIL image to ``[C, S, S]``, for training and validation.
        preprocessing: mean, std, ...: what a user of the trained model has to know.
        in_chans: ``C``.
    """

    train: Source
    val: Source
    classes: list[str]
    fingerprint: str
    augment: Callable[[Any], Tensor]
    transform: Callable[[Any], Tensor]
    preprocessing: dict[str, Any]
    in_chans: int = 3


def subsample(size: int, limit: int | None) -> list[int]:
    """Return at most ``limit`` of ``range(size)``, evenly spaced, so that a sorted folder gives some of every class."""
    if limit is None or limit >= size:
        return list(range(size))
    return [i * size // limit for i in range(limit)]


def crop_and_flip(img_size: int, cfg: dict[str, Any], in_chans: int = 3) -> dict[str, Any]:
    """Return the paper's preprocessing (section 4.1), by timm, as keyword arguments for `ImageData`.

    Random-resized-crop and flip for training, resize and centre crop for validation.

    Args:
        img_size: side of the crops.
        cfg: timm's configuration of the model; mean, std, interpolation and crop_pct have timm's defaults.
        in_chans: 3 for RGB, 1 for grey images.
    """
    size = (in_chans, img_size, img_size)
    resolved = resolve_data_config({"input_size": size}, pretrained_cfg=cfg)
    common = {"input_size": size} | {name: resolved[name] for name in ("mean", "std", "interpolation")}
    facts = {name: resolved[name] for name in ("mean", "std", "interpolation", "crop_pct")}
    return {
        "augment": create_transform(**common, is_training=True, color_jitter=None),
        "transform": create_transform(**common, crop_pct=resolved["crop_pct"]),
        "preprocessing": {"input": f"{'RGB' if in_chans == 3 else 'grey'}, 0..1"}
        | {name: list(value) if isinstance(value, tuple) else value for name, value in facts.items()},
        "in_chans": in_chans,
    }
