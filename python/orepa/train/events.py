"""TensorBoard's log of a run, which must not be what ends it."""

from __future__ import annotations

import sys
import threading
from collections.abc import Mapping
from typing import Any

from lightning.fabric import Fabric
from tqdm.auto import tqdm


class Events:
    """Scalars for TensorBoard. Where they cannot be written any more, it says so once, and the run goes on without them.

    TensorBoard writes in a thread of its own and raises what went wrong at the next call; while entered, that thread does not
    print its traceback as well.

    Args:
        fabric: launched, with a TensorBoard logger.
    """

    def __init__(self, fabric: Fabric) -> None:
        self._fabric, self._lost = fabric, False
        self._hook: Any = None

    def __enter__(self) -> Events:
        self._hook, threading.excepthook = threading.excepthook, self._thread_failed
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._fabric.logger.finalize("success")
        except OSError as error:
            self._give_up(error)
        threading.excepthook = self._hook

    def log(self, scalars: Mapping[str, float | None], step: int) -> None:
        """Write those that are not None."""
        if self._lost:
            return
        try:
            self._fabric.log_dict({name: value for name, value in scalars.items() if value is not None}, step)
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        if not self._lost:
            tqdm.write(f"orepa: cannot write for TensorBoard any more: {error.strerror or error}", file=sys.stderr)
        self._lost = True

    def _thread_failed(self, args: Any) -> None:
        if not isinstance(args.exc_value, OSError):
            self._hook(args)
