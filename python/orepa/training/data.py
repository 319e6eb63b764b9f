"""Data whose every batch is a pure function of (seed, epoch, position), so that a run can be resumed anywhere."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from .config import DIGITS, Config
from .errors import UserError
from .images import ImageData, Source
from .signals import ignore_stops

Batch = tuple[Tensor, Tensor]


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


@dataclass
class Broken:
    """A batch that could not be read. An exception from a worker would lose its type and gain a traceback."""

    message: str


class Images(Dataset[Any]):
    """Source and transform together. With ``seed``, keys are ``(epoch, index)`` and the transform's randomness is theirs."""

    def __init__(self, source: Source, transform: Callable[[Any], Tensor], seed: int | None = None) -> None:
        self.source, self.transform, self.seed = source, transform, seed

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: Any) -> tuple[Tensor, int] | Broken:
        epoch, index = (0, key) if self.seed is None else key
        try:
            image, label = self.source.load(index)
        except Exception as error:  # decoders raise OSError, SyntaxError, ValueError, struct.error, ...
            reason = (str(error) or type(error).__name__).splitlines()[0]
            return Broken(f"cannot read the image {self.source.name(index)}: {reason}")
        if self.seed is not None:
            seed_everything(mix(self.seed, "augment", epoch, index))
        return self.transform(image), label


def _collate(samples: Sequence[tuple[Tensor, int] | Broken]) -> Batch | Broken:
    for sample in samples:
        if isinstance(sample, Broken):
            return sample
    images, labels = zip(*samples, strict=True)
    return torch.stack(images), torch.tensor(labels)


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
    """

    def __init__(self, data: ImageData, config: Config, workers: int = 0, rank: int = 0, world_size: int = 1) -> None:
        self.data, self.batch_size = data, config.batch_size
        self._order = EpochOrder(len(data.train), config.batch_size, config.seed, rank, world_size)
        self.steps = len(self._order)
        share = range(rank, len(data.val), world_size)
        common: dict[str, Any] = {"num_workers": workers, "collate_fn": _collate, "worker_init_fn": ignore_stops}
        common |= {"persistent_workers": workers > 0, "pin_memory": torch.cuda.is_available()}
        self._train = DataLoader(Images(data.train, data.augment, config.seed), batch_sampler=self._order, **common)
        size = -(-config.batch_size // world_size)
        self._val = DataLoader(Images(data.val, data.transform), size, sampler=list(share), **common)

    def train(self, epoch: int, first: int = 0) -> Iterator[Batch]:
        """The batches of an epoch, from batch number ``first`` on.

        Raises:
            UserError: an image cannot be read.
        """
        self._order.epoch, self._order.first = epoch, first
        return _checked(self._train)

    def val(self) -> Iterator[Batch]:
        """This rank's share of the validation images, always in the same order.

        Raises:
            UserError: an image cannot be read.
        """
        return _checked(self._val)

    def val_all(self) -> Iterator[Batch]:
        """All validation images, whatever the rank, loaded in this process."""
        return _checked(DataLoader(Images(self.data.val, self.data.transform), self.batch_size, collate_fn=_collate))

    def close(self) -> None:
        """End the workers. They ignore the signals by which Python would end them at exit, and it would wait forever."""
        for loader in (self._train, self._val):
            iterator: Any = loader._iterator
            if iterator is not None:
                iterator._shutdown_workers()
                for worker in iterator._workers:
                    worker.kill()


def _checked(loader: DataLoader[Any]) -> Iterator[Batch]:
    for batch in loader:
        if isinstance(batch, Broken):
            raise UserError(batch.message)
        yield batch


def load_data(config: Config, path: str | None, cfg: dict[str, Any]) -> ImageData:
    """The data of a run.

    Args:
        config: of the run.
        path: of the image folder, None for the digits.
        cfg: timm's facts about the model, for mean, std and interpolation.

    Raises:
        UserError: the folder is not what it should be.
    """
    from .digits import load_digits
    from .folder import load_folder

    if config.data == DIGITS:
        return load_digits(config.img_size, config.limit)
    assert path is not None
    return load_folder(path, config.img_size, config.limit, cfg)
