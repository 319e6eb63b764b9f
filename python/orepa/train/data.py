"""Batches that are a pure function of (seed, epoch, position), so that a run can be resumed anywhere."""

from __future__ import annotations

import hashlib
import random
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch
import torch.distributed as dist
from PIL import UnidentifiedImageError
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from tqdm.auto import tqdm

from ..errors import CollectiveError, UserError, reason
from .config import DIGITS, FOLDER, SHARDS, Config
from .image_files import has_shards, load_folder, load_shards
from .images import CIFAR, ImageData, Source, load_cifar, load_digits
from .runtime import ignore_signals

Batch = tuple[Tensor, Tensor]
_Bad = tuple[str, str]  # name of an image that cannot be read, and the reason
_Sample = tuple[Tensor | None, int, list[_Bad]]

_ATTEMPTS = 32  # images tried in place of one that cannot be read


def kind_of_data(path: str | None) -> str:
    """Return what a path holds, as in `Config.data`. Anything unknown counts as an image folder."""
    if path is None or path == DIGITS:
        return DIGITS
    folder = Path(path)
    for kind, dataset in CIFAR.items():
        if folder.name == dataset.base_folder or (folder / dataset.base_folder).is_dir():
            return kind
    return SHARDS if has_shards(folder) else FOLDER


def load_data(config: Config, path: str | None, cfg: dict[str, Any]) -> ImageData:
    """Open the data of a run, with mean, std and interpolation of ``cfg``, timm's configuration of the model.

    Raises:
        UserError: the folder or its content is not as expected.
    """
    if config.data == DIGITS:
        return load_digits(config.img_size, config.limit, config.crops_and_flips)
    assert path is not None
    if config.data in CIFAR:
        return load_cifar(config, Path(path), cfg)
    return (load_shards if config.data == SHARDS else load_folder)(config, Path(path), cfg)


def derive_seed(*parts: object) -> int:
    """Return a 63-bit seed from any values: unrelated for neighbouring arguments, the same on every machine."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def seed_everything(seed: int, device: torch.device | None = None) -> None:
    """Seed the global generators of Python, NumPy and PyTorch (on the CPU, and on ``device``)."""
    random.seed(seed)
    numpy.random.seed(seed % 2**32)
    if device is None or device.type == "cpu":
        torch.default_generator.manual_seed(seed)
    else:
        torch.manual_seed(seed)


class BadSamples:
    """The images that could not be read, with the reasons; ``allowed`` are, by default 1% of the images but at least ten."""

    def __init__(self, images: int, allowed: int | None = None) -> None:
        self.allowed = max(10, images // 100) if allowed is None else allowed
        self.known: dict[str, str] = {}  # after each `sync` the same in all processes
        self.new: dict[str, str] = {}  # in this process, since the last `sync`

    def add(self, samples: Iterable[_Bad]) -> None:
        """Note what this process could not read, until the next `sync`."""
        self.new.update((name, why) for name, why in samples if name not in self.known)

    def sync(self) -> None:
        """Merge what the processes have noted, and report it. A collective: all processes have to call it.

        Raises:
            CollectiveError: there are too many. The new ones are forgotten: they may be repaired before the run is resumed.
        """
        parts, single = [self.new], not (dist.is_available() and dist.is_initialized())
        if not single:
            parts = [{} for _ in range(dist.get_world_size())]
            dist.all_gather_object(parts, self.new)
        new = {name: part[name] for part in parts for name in sorted(part) if name not in self.known}
        self.new = {}
        if new and len(self.known) + len(new) > self.allowed:
            name, why = next(iter(new.items()))
            many = f"more than {self.allowed} images cannot be read (see --max-broken): " if self.allowed else ""
            raise CollectiveError(f"{many}cannot read the image {name}: {why}")
        self.known.update(new)
        if single or dist.get_rank() == 0:
            for name, why in new.items():
                tqdm.write(f"orepa: skipped an image, cannot read {name}: {why}", file=sys.stderr)


@dataclass
class Images(Dataset[_Sample]):
    """Source and transform together. With ``seed``, keys are ``(epoch, index)`` and determine the augmentation.

    In training, an image that cannot be read is replaced by another one, drawn from (seed, epoch, index): so batches keep
    their size, the processes stay in step, and a resumed run takes the same. In validation it is left out.
    """

    source: Source
    transform: Callable[[Any], Tensor]
    seed: int | None = None

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: Any) -> _Sample:
        epoch, index = (0, key) if self.seed is None else key
        bad: list[_Bad] = []
        for attempt in range(1 if self.seed is None else _ATTEMPTS):
            at = index if attempt == 0 else derive_seed(self.seed, "instead", epoch, index, attempt) % len(self.source)
            try:
                image, label = self.source.load(at)
            except Exception as error:  # decoders raise OSError, SyntaxError, ValueError, struct.error, ...
                unknown = isinstance(error, UnidentifiedImageError)  # its message has an address in it
                bad.append((self.source.name(at), "not an image in a known format" if unknown else reason(error)))
                continue
            if self.seed is not None:
                seed_everything(derive_seed(self.seed, "augment", epoch, index))
            return self.transform(image), label, bad
        return None, -1, bad


def _collate(samples: Sequence[_Sample]) -> tuple[Tensor, Tensor, list[_Bad], int]:
    """Return images, labels, the images that could not be read, and the number of samples with and without an image."""
    images = [image for image, _, _ in samples if image is not None]
    labels = [label for image, label, _ in samples if image is not None]
    bad = [image for sample in samples for image in sample[2]]
    return torch.stack(images) if images else torch.zeros(0), torch.tensor(labels), bad, len(samples)


class EpochOrder(Sampler[list[tuple[int, int]]]):
    """Batches of ``(epoch, index)``: a permutation drawn from (seed, epoch), from any batch on, shared out to the ranks.

    The last, incomplete batch of an epoch is dropped, unless it is the only one.
    """

    def __init__(self, size: int, batch_size: int, seed: int, rank: int = 0, world_size: int = 1) -> None:
        self.size, self.batch_size, self.seed = size, min(batch_size, size), seed
        self.rank, self.world_size = rank, world_size
        self.epoch = self.first = 0

    def __len__(self) -> int:
        return self.size // self.batch_size

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        generator = torch.Generator().manual_seed(derive_seed(self.seed, "order", self.epoch))
        order = torch.randperm(self.size, generator=generator).tolist()
        for batch in range(self.first, len(self)):
            indices = order[batch * self.batch_size : (batch + 1) * self.batch_size]
            yield [(self.epoch, index) for index in indices[self.rank :: self.world_size]]


class Loaders:
    """Batches for training, from any position, and for validation; the share of one rank, loaded by ``workers`` processes."""

    def __init__(
        self,
        data: ImageData,
        config: Config,
        workers: int = 0,
        rank: int = 0,
        world_size: int = 1,
        max_broken: int | None = None,
    ) -> None:
        self.data, self.batch_size = data, config.batch_size
        self.bad_samples = BadSamples(len(data.train) + len(data.val), max_broken)
        self._order = EpochOrder(len(data.train), config.batch_size, config.seed, rank, world_size)
        self.steps, self.images_per_step = len(self._order), self._order.batch_size
        common: dict[str, Any] = {"num_workers": workers, "collate_fn": _collate, "worker_init_fn": ignore_signals}
        common |= {"persistent_workers": workers > 0, "pin_memory": torch.cuda.is_available()}
        self._train = DataLoader(Images(data.train, data.augment, config.seed), batch_sampler=self._order, **common)
        size = -(-config.batch_size // world_size)
        share = list(range(rank, len(data.val), world_size))
        self._val = DataLoader(Images(data.val, data.transform), size, sampler=share, **common)
        self.val_steps = -(-len(range(0, len(data.val), world_size)) // size)  # of the rank with most images

    def train(self, epoch: int, first: int = 0) -> Iterator[Batch]:
        """Yield the batches of an epoch, from batch number ``first`` on."""
        self._order.epoch, self._order.first = epoch, first
        for images, labels, bad, size in self._train:
            self.bad_samples.add(bad)
            if len(labels) < size:
                name, why = bad[-1]
                raise UserError(f"{_ATTEMPTS} images in a row cannot be read, the last being {name}: {why}")
            yield images, labels

    def val(self) -> Iterator[Batch]:
        """Yield this rank's share of the validation images, in a fixed order."""
        return self._readable(self._val)

    def val_all(self) -> Iterator[Batch]:
        """Yield all validation images, on any rank, loaded in this process."""
        images = Images(self.data.val, self.data.transform)
        return self._readable(DataLoader(images, self.batch_size, collate_fn=_collate))

    def _readable(self, loader: DataLoader[Any]) -> Iterator[Batch]:
        for images, labels, bad, _ in loader:
            self.bad_samples.add(bad)
            if len(labels):
                yield images, labels

    def close(self) -> None:
        """Kill the workers: they ignore SIGTERM, by which Python would end them at exit, and it would wait forever."""
        for loader in (self._train, self._val):
            iterator: Any = loader._iterator
            if iterator is not None:
                iterator._shutdown_workers()
                for worker in iterator._workers:
                    worker.kill()
