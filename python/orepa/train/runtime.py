"""Settings of the process while it trains: signals, threads, default dtype, determinism. All are restored afterwards."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

import torch

_SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))


class Stopped(Exception):
    """Training stopped on the signal ``number``, after saving."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


class StopRequest:
    """While entered, store SIGINT, SIGTERM and SIGHUP in ``number`` instead of ending the process.

    A second SIGINT raises KeyboardInterrupt at once. Signals that the parent ignores (``nohup``) stay ignored.
    """

    def __init__(self) -> None:
        self.number = 0
        self._previous: dict[int, Any] = {}

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.number:
            raise KeyboardInterrupt
        self.number = number

    def __enter__(self) -> StopRequest:
        # Python allows handlers in the main thread only; elsewhere the host program decides.
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                if signal.getsignal(number) != signal.SIG_IGN:
                    self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, previous in self._previous.items():
            signal.signal(number, previous if previous is not None else signal.SIG_DFL)
        self._previous = {}


def ignore_signals(_worker: int = 0) -> None:
    """Ignore, in a data worker, what stops the process group: the last step still needs its data."""
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)


@contextlib.contextmanager
def settings(threads: int | None, precision: str = "32-true") -> Iterator[None]:
    """Set the number of CPU threads, and float64 as default dtype for ``"64-true"``: Fabric would round outputs to float32."""
    before, dtype = torch.get_num_threads(), torch.get_default_dtype()
    torch.set_num_threads(threads or before)
    torch.set_default_dtype(torch.float64 if precision == "64-true" else dtype)
    try:
        yield
    finally:
        torch.set_num_threads(before)
        torch.set_default_dtype(dtype)


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    """Use deterministic kernels, also on a GPU: otherwise a resumed run would differ from an uninterrupted one."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    utils: Any = torch.utils.deterministic
    cudnn = torch.backends.cudnn
    before = torch.get_deterministic_debug_mode(), utils.fill_uninitialized_memory, cudnn.benchmark
    torch.use_deterministic_algorithms(True, warn_only=True)
    utils.fill_uninitialized_memory, cudnn.benchmark = False, False  # filling helps to debug, and costs time
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(before[0])
        _, utils.fill_uninitialized_memory, cudnn.benchmark = before
