"""A polite stop: a signal asks, the training loop answers after the step it is in."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

_SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))


class Stopped(Exception):
    """Training stopped on a signal, after saving.

    Args:
        number: of the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


class StopRequest:
    """While entered, SIGINT, SIGTERM and SIGHUP are noted in ``number`` instead of ending the process.

    A second SIGINT raises KeyboardInterrupt at once. Signals that the parent ignores (``nohup``) stay ignored.
    """

    def __init__(self) -> None:
        self.number = 0
        self._previous: dict[int, Any] = {}

    def _note(self, number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.number:
            raise KeyboardInterrupt
        self.number = number

    def __enter__(self) -> StopRequest:
        # Python allows handlers in the main thread only; elsewhere the host program decides.
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                if signal.getsignal(number) != signal.SIG_IGN:
                    self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, previous in self._previous.items():
            signal.signal(number, previous if previous is not None else signal.SIG_DFL)
        self._previous = {}


def ignore_stops(_worker: int = 0) -> None:
    """For data workers: a Ctrl-C or a kill of the whole process group must not leave the last step without its data."""
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)
