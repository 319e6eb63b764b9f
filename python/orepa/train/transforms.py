"""From an image to the network's input, as in the paper, by timm."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from timm.data import create_transform, resolve_data_config
from torch import Tensor

_FACTS = ("mean", "std", "interpolation", "crop_pct")


@dataclass(frozen=True)
class Transforms:
    """What happens to every image.

    Args:
        augment, transform: from a PIL image to ``[C, S, S]``, for training and validation.
        preprocessing: mean, std, ...: what a user of the trained model has to know.
    """

    augment: Callable[[Any], Tensor]
    transform: Callable[[Any], Tensor]
    preprocessing: dict[str, Any]


def crop_and_flip(img_size: int, facts: dict[str, Any], channels: str = "RGB") -> Transforms:
    """Random-resized-crop and flip for training, resize and centre crop for validation (paper section 4.1).

    Args:
        img_size: side of the crops.
        facts: mean, std, interpolation and crop_pct, as timm keeps them about a model; what is missing is timm's default.
        channels: ``"RGB"``, or ``"grey"`` with a mean and std of one channel.
    """
    size = (3 if channels == "RGB" else 1, img_size, img_size)
    resolved = resolve_data_config({"input_size": size}, pretrained_cfg=facts)
    resolved = {name: resolved[name] for name in _FACTS}
    common = {"input_size": size} | {name: resolved[name] for name in ("mean", "std", "interpolation")}
    return Transforms(
        augment=create_transform(**common, is_training=True, color_jitter=None),
        transform=create_transform(**common, crop_pct=resolved["crop_pct"]),
        preprocessing={"input": f"{channels}, 0..1"}
        | {name: list(value) if isinstance(value, tuple) else value for name, value in resolved.items()},
    )
