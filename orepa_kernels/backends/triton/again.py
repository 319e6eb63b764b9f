"""Launching what has been prepared, and a second time without asking for most of what it was prepared for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor

from ...precision import float32_precision
from .device import asked, current


class Launcher(Protocol):
    """A launch of blocks of one structure, forward or backward."""

    #: what launches, with the addresses of one block, or that of a table of those of many
    launch: Callable[[int | tuple[int, ...]], None]

    def __call__(self, addresses: Sequence[tuple[int, ...]]) -> None:
        """Launch, with the addresses of all blocks of the call. The device is the current one."""

    def keep(self) -> None:
        """Never release this, because a graph reads its tables."""


Launch = TypeVar("Launch", bound=Launcher)


def addresses_of(tensors: Sequence[Tensor]) -> tuple[int, ...]:
    """Where ordinary tensors lie."""
    return tuple(map(Tensor.data_ptr, tensors))


def alignment(addresses: Sequence[tuple[int, ...]]) -> tuple[bool, ...] | None:
    """Which addresses are multiples of 16; None where all are, as nearly always."""
    bits = 0
    for own in addresses:
        for address in own:
            bits |= address
    return tuple(address % 16 == 0 for own in addresses for address in own) if bits % 16 else None


def run(launches: Sequence[Launcher], addresses: Sequence[tuple[int, ...]], device: torch.device) -> None:
    """Launch, on ``device``, with the addresses of all blocks of the call."""
    questions = asked(device)
    if questions.current() != questions.index:
        with current(device):
            for launch in launches:
                launch(addresses)
        return
    for launch in launches:
        launch(addresses)


class Again(Generic[Launch]):
    """The launches of one block whose tensors have one layout: by what else they depend on, precision and alignment."""

    def __init__(self, device: torch.device) -> None:
        questions = asked(device)
        self._index, self._current, self._capturing = questions.index, questions.current, questions.capturing
        self._device = device
        self._launches: dict[object, Launch] = {}
        #: the last addresses of operands that were multiples of 16: parameters stay where they are
        self._aligned: tuple[int, ...] = ()

    def run(self, operands: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
        """Launch for operands and tensors made for this call, if that has been done before.

        In as few calls as can be: the kernel of a small block takes no longer than the host does here.
        """
        if self._current() != self._index:
            with current(self._device):
                return self.run(operands, others)
        bits, addresses, made = 0, addresses_of(operands), addresses_of(others)
        if addresses != self._aligned:
            for address in addresses:
                bits |= address
            if bits % 16 == 0:
                self._aligned = addresses
        for address in made:
            bits |= address
        addresses += made
        setting = float32_precision()
        launch = self._launches.get((setting, alignment([addresses])) if bits % 16 else setting)
        if launch is None:
            return False
        if self._capturing():
            launch.keep()
        launch.launch(addresses)
        return True

    def run_first(self, launches: Sequence[Launch], addresses: Sequence[tuple[int, ...]]) -> None:
        """Launch what the whole key has found, and keep it."""
        setting, pattern = float32_precision(), alignment(addresses)
        (self._launches[setting if pattern is None else (setting, pattern)],) = launches
        run(launches, addresses, self._device)
