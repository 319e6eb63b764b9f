"""Images that could not be read: told once each, counted, and too many of them end the run."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import NamedTuple

import torch.distributed as dist
from tqdm.auto import tqdm

from ..errors import SharedError

_LEAST, _SHARE = 10, 100  # by default more than 1% of the images, and more than ten, are too many


class Broken(NamedTuple):
    """An image that could not be read.

    Args:
        name: of the file.
        reason: in one line.
    """

    name: str
    reason: str


class Skipped:
    """The broken images that this run has met, the same in all of its processes after each `agree`.

    Args:
        images: size of the data set, for the default of ``allowed``.
        allowed: how many may be skipped, None for 1% of the images but at least ten.
    """

    def __init__(self, images: int, allowed: int | None = None) -> None:
        self.allowed = max(_LEAST, images // _SHARE) if allowed is None else allowed
        self.known: dict[str, str] = {}
        self._new: dict[str, str] = {}

    def note(self, broken: Iterable[Broken]) -> None:
        """Remember what this process could not read, for the next `agree`."""
        self._new.update((image.name, image.reason) for image in broken if image.name not in self.known)

    @property
    def pending(self) -> bool:
        """Whether this process has something to tell."""
        return bool(self._new)

    def agree(self) -> None:
        """Join what the processes have noted; all of them have to call this together. The first one tells the user.

        Raises:
            SharedError: there are too many. Those that are, are forgotten: they may be mended before the run goes on.
        """
        parts, alone = [self._new], not (dist.is_available() and dist.is_initialized())
        if not alone:
            parts = [{} for _ in range(dist.get_world_size())]
            dist.all_gather_object(parts, self._new)
        found = {name: part[name] for part in parts for name in sorted(part) if name not in self.known}
        self._new = {}
        if found and len(self.known) + len(found) > self.allowed:
            name, reason = next(iter(found.items()))
            many = f"more than {self.allowed} images cannot be read (see --max-broken): " if self.allowed else ""
            raise SharedError(f"{many}cannot read the image {name}: {reason}")
        self.known.update(found)
        if alone or dist.get_rank() == 0:
            for name, reason in found.items():
                tqdm.write(f"orepa: skipped an image, cannot read {name}: {reason}", file=sys.stderr)
