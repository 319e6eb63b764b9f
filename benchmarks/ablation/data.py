"""Draw the data of the ablation: few images to learn from, all others to test on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import zip_longest
from typing import Any

import torch

from orepa.errors import UserError
from orepa.train.data import derive_seed
from orepa.train.images import ImageData, Source


class Picked:
    """Images of other sources, in any order, each any number of times."""

    def __init__(self, places: Sequence[tuple[Source, int]]) -> None:
        self.places = places

    def __len__(self) -> int:
        return len(self.places)

    def load(self, index: int) -> tuple[Any, int]:
        source, place = self.places[index]
        return source.load(place)

    def name(self, index: int) -> str:
        source, place = self.places[index]
        return source.name(place)


def draw(data: ImageData, count: int, seed: int) -> ImageData:
    """Draw ``count`` training images, balanced over the classes, and test on all others.

    An epoch keeps its length: it repeats the few images, each time augmented anew. So the recipe's epochs, warm-up and steps
    mean the same whatever the count.

    Args:
        data: as `orepa train` has it. Its validation images are never trained on.
        count: images to train on; the full number leaves the data unchanged.
        seed: of the draw.

    Raises:
        UserError: fewer images than one, or more than there are.
    """
    size = len(data.train)
    if not 1 <= count <= size:
        raise UserError(f"--train-images must be from 1 to {size}, got {count}")
    if count == size:
        return data
    order = torch.randperm(size, generator=torch.Generator().manual_seed(derive_seed(seed, "training images"))).tolist()
    by_class: dict[int, list[int]] = {}
    for index in order:
        by_class.setdefault(data.train.load(index)[1], []).append(index)
    turns = zip_longest(*(by_class[label] for label in sorted(by_class)))
    drawn = [index for turn in turns for index in turn if index is not None][:count]
    rest = sorted(set(range(size)) - set(drawn))
    return replace(
        data,
        train=Picked([(data.train, drawn[place % count]) for place in range(size)]),
        val=Picked([*((data.val, i) for i in range(len(data.val))), *((data.train, i) for i in rest)]),
    )
