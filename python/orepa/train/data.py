"""Data whose every batch is a pure function of (seed, epoch, position), so that a run can be resumed anywhere."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy
import torch
from PIL import UnidentifiedImageError
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from ..errors import UserError
from .config import CIFAR10, CIFAR100, DIGITS, FOLDER, SHARDS, Config
from .images import ImageData, Source
from .signals import ignore_stops
from .skipped import Broken, Skipped

Batch = tuple[Tensor, Tensor]

_ATTEMPTS = 32  # images tried in place of one that cannot be read


def mix(*parts: object) -> int:
    """A 63-bit seed from any values: unrelated streams for neighbouring arguments, the same on every machine."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def seed_everything(seed: int, device: torch.device | None = None) -> None:
    """Set the global generators of Python, NumPy and PyTorch (of the CPU, and of ``device``)."""
    random.seed(seed)
    numpy.random.seed(seed % 2**32)
    if device is None or device.type == "cpu":
        torch.default_generator.manual_seed(seed)
    else:
        torch.manual_seed(seed)


class _Sample(NamedTuple):
    image: Tensor | None
    label: int
    broken: list[Broken]


class _Loaded(NamedTuple):
    """What a worker hands over: ``size`` images, or fewer with those in ``broken`` left out."""

    images: Tensor
    labels: Tensor
    broken: list[Broken]
    size: int


class Images(Dataset[Any]):
    """Source and transform together. With ``seed``, keys are ``(epoch, index)`` and the transform's randomness is theirs.

    In training, an image that cannot be read is replaced by another one, drawn from (seed, epoch, index): so batches keep
    their size, the processes stay in step, and the same happens again after a resume. In validation it is left out.
    """

    def __init__(self, source: Source, transform: Callable[[Any], Tensor], seed: int | None = None) -> None:
        self.source, self.transform, self.seed = source, transform, seed

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: Any) -> _Sample:
        epoch, index = (0, key) if self.seed is None else key
        broken: list[Broken] = []
        for attempt in range(1 if self.seed is None else _ATTEMPTS):
            at = index if attempt == 0 else mix(self.seed, "instead", epoch, index, attempt) % len(self.source)
            try:
                image, label = self.source.load(at)
            except Exception as error:  # decoders raise OSError, SyntaxError, ValueError, struct.error, ...
                broken.append(Broken(self.source.name(at), _reason(error)))
                continue
            if self.seed is not None:
                seed_everything(mix(self.seed, "augment", epoch, index))
            return _Sample(self.transform(image), label, broken)
        return _Sample(None, -1, broken)


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "not an image in a known format"  # PIL's message has an address in it
    text = (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__
    return text.splitlines()[0]


def _collate(samples: Sequence[_Sample]) -> _Loaded:
    read = [(sample.image, sample.label) for sample in samples if sample.image is not None]
    return _Loaded(
        images=torch.stack([image for image, _ in read]) if read else torch.zeros(0),
        labels=torch.tensor([label for _, label in read]),
        broken=[image for sample in samples for image in sample.broken],
        size=len(samples),
    )


class EpochOrder(Sampler[list[tuple[int, int]]]):
    """Batches of ``(epoch, index)``: a permutation drawn from (seed, epoch), from any batch on, cut into shares of the ranks.

    The last, incomplete batch of an epoch is dropped, unless it is the only one.
    """

    def __init__(self, size: int, batch_size: int, seed: int, rank: int = 0, world_size: int = 1) -> None:
        self.size, self.batch_size, self.seed = size, min(batch_size, size), seed
        self.rank, self.world_size = rank, world_size
        self.epoch = self.first = 0

    def __len__(self) -> int:
        return self.size // self.batch_size

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        generator = torch.Generator().manual_seed(mix(self.seed, "order", self.epoch))
        order = torch.randperm(self.size, generator=generator).tolist()
        for batch in range(self.first, len(self)):
            indices = order[batch * self.batch_size : (batch + 1) * self.batch_size]
            yield [(self.epoch, index) for index in indices[self.rank :: self.world_size]]


class Loaders:
    """Batches for training, from any position, and for validation.

    Args:
        data: the images.
        config: of the run.
        workers: processes that load images; 0 loads in this one.
        rank, world_size: this process among those that share a batch.
        max_broken: images that may be unreadable, None for the default of `Skipped`.
    """

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
        self.skipped = Skipped(len(data.train) + len(data.val), max_broken)
        self._order = EpochOrder(len(data.train), config.batch_size, config.seed, rank, world_size)
        self.steps = len(self._order)
        share = range(rank, len(data.val), world_size)
        common: dict[str, Any] = {"num_workers": workers, "collate_fn": _collate, "worker_init_fn": ignore_stops}
        common |= {"persistent_workers": workers > 0, "pin_memory": torch.cuda.is_available()}
        self._train = DataLoader(Images(data.train, data.augment, config.seed), batch_sampler=self._order, **common)
        size = -(-config.batch_size // world_size)
        self._val = DataLoader(Images(data.val, data.transform), size, sampler=list(share), **common)
        self.val_steps = -(-len(range(0, len(data.val), world_size)) // size)  # of the process that has most

    def train(self, epoch: int, first: int = 0) -> Iterator[Batch]:
        """The batches of an epoch, from batch number ``first`` on.

        Raises:
            UserError: image after image cannot be read.
        """
        self._order.epoch, self._order.first = epoch, first
        for loaded in self._train:
            self.skipped.note(loaded.broken)
            if len(loaded.labels) < loaded.size:
                name, reason = loaded.broken[-1]
                raise UserError(f"{_ATTEMPTS} images in a row cannot be read, the last being {name}: {reason}")
            yield loaded.images, loaded.labels

    def val(self) -> Iterator[Batch]:
        """This rank's share of the validation images, always in the same order."""
        return self._readable(self._val)

    def val_all(self) -> Iterator[Batch]:
        """All validation images, whatever the rank, loaded in this process."""
        images = Images(self.data.val, self.data.transform)
        return self._readable(DataLoader(images, self.batch_size, collate_fn=_collate))

    def _readable(self, loader: DataLoader[Any]) -> Iterator[Batch]:
        for loaded in loader:
            self.skipped.note(loaded.broken)
            if len(loaded.labels):
                yield loaded.images, loaded.labels

    def close(self) -> None:
        """End the workers. They ignore the signals by which Python would end them at exit, and it would wait forever."""
        for loader in (self._train, self._val):
            iterator: Any = loader._iterator
            if iterator is not None:
                iterator._shutdown_workers()
                for worker in iterator._workers:
                    worker.kill()


def kind_of_data(path: str | None) -> str:
    """What a path holds: one of the values of `Config.data`. What is nothing else is taken for an image folder."""
    if path in (None, DIGITS):
        return DIGITS
    from .cifar import which_cifar
    from .shards import has_shards

    place = Path(path)
    return which_cifar(place) or (SHARDS if has_shards(place) else FOLDER)


def load_data(config: Config, path: str | None, cfg: dict[str, Any]) -> ImageData:
    """The data of a run.

    Args:
        config: of the run.
        path: of the folder, None for the digits.
        cfg: timm's facts about the model, for mean, std and interpolation.

    Raises:
        UserError: the folder or what it holds is not what it should be.
    """
    from .cifar import load_cifar
    from .digits import load_digits
    from .folder import load_folder
    from .shards import load_shards

    if config.data == DIGITS:
        return load_digits(config.img_size, config.limit, config.crops_and_flips)
    assert path is not None
    if config.data == SHARDS:
        return load_shards(path, config.img_size, config.limit, cfg)
    if config.data in (CIFAR10, CIFAR100):
        return load_cifar(config.data, path, config.img_size, config.limit, cfg)
    return load_folder(path, config.img_size, config.limit, cfg)
