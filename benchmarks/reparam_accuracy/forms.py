"""The forms of a re-parameterised net, each made from timm's, and Fashion-MNIST."""

from __future__ import annotations

import gzip
import hashlib
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy
from torch import nn
from torchvision import transforms

from orepa.bench.reparam import plain_twin
from orepa.errors import UserError, reason
from orepa.surgery.prepare import prepare
from orepa.surgery.replace import copy_model
from orepa.train.images import ImageData, InMemory, subsample

from .tables import FORMS

_MEAN, _STD = 0.286, 0.353  # of Fashion-MNIST's training pixels in 0..1
_CLASSES = ["T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot"]


def forms() -> dict[str, Callable[[nn.Module], nn.Module]]:
    """Return functions that build each of `FORMS` from timm's net, which stays as it is.

    Initial values matter as much as the branches, so every form has a control that starts from the others' distribution.
    """
    builders = (
        _plain,
        lambda model: _start_as_timm(_plain(model)),
        prepare,
        partial(prepare, preserve=True),
        copy_model,
        lambda model: _start_as_torch(copy_model(model), nn.Conv2d),
    )
    return dict(zip(FORMS, builders, strict=True))


def _plain(model: nn.Module) -> nn.Module:
    return _start_as_torch(plain_twin(copy_model(model).eval()).train(), nn.Conv2d, nn.BatchNorm2d)


def _start_as_torch(model: nn.Module, *types: type[nn.Conv2d | nn.BatchNorm2d]) -> nn.Module:
    """Draw the values of all layers of some types anew, as PyTorch does."""
    for layer in model.modules():
        if isinstance(layer, types):
            layer.reset_parameters()
    return model


def _start_as_timm(model: nn.Module) -> nn.Module:
    """Draw all convolutions anew, as timm does for these nets."""
    for conv in model.modules():
        if isinstance(conv, nn.Conv2d):
            fan_out = math.prod(conv.kernel_size) * conv.out_channels // conv.groups
            nn.init.normal_(conv.weight, std=math.sqrt(2 / fan_out))
    return model


# --- Fashion-MNIST --------------------------------------------------------------------------------------------------------


def load_fashion(folder: Path, limit: int | None) -> ImageData:
    """Open Fashion-MNIST, as published, with zeros around the 28x28 pixels to make 32x32.

    Training images are moved by up to two pixels and mirrored; all test images are for validation.

    Args:
        folder: holds the four ``.gz`` files.
        limit: of training images, evenly spaced.

    Raises:
        UserError: a file is missing or damaged.
    """
    splits = []
    for name in ("train", "t10k"):
        pixels, labels = (_read_idx(folder / f"{name}-{kind}-ubyte.gz") for kind in ("images-idx3", "labels-idx1"))
        some = subsample(len(labels), limit if name == "train" else None)
        splits.append(InMemory(pixels[some], labels[some], "Fashion-MNIST image"))
    train, val = splits
    to_tensor = (transforms.ToTensor(), transforms.Normalize(_MEAN, _STD))
    return ImageData(
        train,
        val,
        _CLASSES,
        hashlib.sha256(b"".join(part.pixels.tobytes() + part.labels.tobytes() for part in splits)).hexdigest(),
        augment=transforms.Compose([transforms.RandomCrop(32, 4), transforms.RandomHorizontalFlip(), *to_tensor]),
        transform=transforms.Compose([transforms.Pad(2), *to_tensor]),
        preprocessing={},
        in_chans=1,
    )


def _read_idx(path: Path) -> numpy.ndarray:
    """Read a file of bytes: two zeros, the type, the number of dimensions, each as four bytes, then the values."""
    try:
        content = gzip.decompress(path.read_bytes())
        count = content[3]
        shape = numpy.frombuffer(content, ">u4", count, 4)
        return numpy.frombuffer(content, numpy.uint8, offset=4 + 4 * count).reshape(shape)
    except (OSError, EOFError, ValueError, IndexError) as error:
        raise UserError(f"cannot read {path}: {reason(error)} (Debian's package is dataset-fashion-mnist)") from error
