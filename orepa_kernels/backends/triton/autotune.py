# mypy: disable-error-code="import-untyped, import-not-found"
"""Timing the tiles, for users who ask for it: ``OREPA_AUTOTUNE=1``. Without it nothing here runs, and no disk is touched.

The first launch of a structure with given sizes times every tile that the tables have for it, on the device, and takes the
fastest. The choice is cached in this process and in a JSON file, one per kind of GPU and versions of Triton and of this
package, in the folder ``OREPA_AUTOTUNE_CACHE`` (default: ``orepa_kernels`` in the user's cache folder). Processes may share
it: a file is replaced as a whole, after merging what others wrote. When two write at the same moment, the last one wins, and
the other's choices are timed again some day. An unreadable file is ignored and replaced, an unwritable one costs a warning.

Every candidate is right, but two tiles may differ in the last bits. With tuning on, "same inputs, same bits" therefore holds
within one process, and between processes that find all their choices in the file; not between two that time for themselves.

Nothing is timed in Triton's interpreter, nor while a CUDA graph is captured: unknown launches then take the tiles of the
heuristics for the life of the process. Warm up before capturing.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import logging
import math
import os
import re
import threading
import uuid
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...plan import Block
from ...version import __version__
from .configs import Backward, Config, Forward
from .device import capturing, device_of
from .spec import Spec

log = logging.getLogger("orepa_kernels")

ENVIRONMENT_VARIABLE = "OREPA_AUTOTUNE"
FOLDER_VARIABLE = "OREPA_AUTOTUNE_CACHE"

#: milliseconds of warm-up and of timed runs per candidate
_WARM_UP, _RUNS = 5, 20

#: one at a time: concurrent timings would slow each other down, and write the same file
_lock = threading.Lock()


def enabled() -> bool:
    """Return whether tuning is asked for; read whenever a launch is prepared.

    Raises:
        ValueError: the variable is neither empty, ``"0"`` nor ``"1"``.
    """
    value = os.environ.get(ENVIRONMENT_VARIABLE, "")
    if value not in ("", "0", "1"):
        raise ValueError(f"{ENVIRONMENT_VARIABLE} must be 0 or 1, got {value!r}")
    return value == "1"


def cache_key(
    direction: str, spec: Spec, blocks: Sequence[Block], tensors: Sequence[Sequence[Tensor]], precision: str
) -> str:
    """Return the key of a choice: the structure, the sizes of all blocks and their tensors, the precision of products."""
    sizes = [block.groups for block in blocks], [[tuple(tensor.shape) for tensor in slots] for slots in tensors]
    digest = hashlib.sha256(repr((spec.digest, sizes)).encode()).hexdigest()[:32]
    return f"{direction} {precision} {digest}"


def choose(
    choices: Sequence[Config],
    default: Config,
    key: str,
    device: torch.device,
    prepare: Callable[[Config], Callable[[], object]],
) -> Config:
    """Return the fastest of ``choices``, from the cache or by timing; ``default`` where neither is possible.

    Args:
        choices: the candidates.
        default: the heuristics' choice; also taken where candidates are equally fast.
        key: see `cache_key`.
        device: the current one.
        prepare: returns what launches a candidate. It runs many times, and must leave nothing behind but its outputs.
    """
    if len(choices) < 2 or not can_time(device):
        return default
    with _lock:
        store = _store(_folder(), device_name(device))
        config = store.find(key, choices)
        if config is None and not capturing(device):
            config = _fastest(choices, default, prepare)
            if config is not None:
                store.add(key, config)
    return default if config is None else config


def can_time(device: torch.device) -> bool:
    """Return whether launches can be timed on a device: not in the interpreter, which runs on the CPU."""
    return device.type in ("cuda", "xpu")


def device_name(device: torch.device) -> str:
    """Return the name of all that the choices of one file depend on: versions and the kind of GPU."""
    import triton

    kind = device_of(device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else torch.xpu.get_device_name(device)
    return f"triton {triton.__version__}, orepa_kernels {__version__}, {name}, {kind.kind} {kind.name or kind.arch}"


def measure(run: Callable[[], object]) -> float:
    """Return the median milliseconds of a run by the device's events, its L2 cache cleared before each, as in a training step.

    Clearing also keeps the device busy until the host has launched, so that the host is not what is timed. Infinite where
    the device has too little shared memory.
    """
    from triton.runtime.errors import OutOfResources
    from triton.testing import do_bench

    try:
        return float(do_bench(run, warmup=_WARM_UP, rep=_RUNS, return_mode="median"))
    except OutOfResources:
        return math.inf


def _fastest(
    choices: Sequence[Config], default: Config, prepare: Callable[[Config], Callable[[], object]]
) -> Config | None:
    """Return the fastest candidate; None where none can be timed."""
    try:
        times = {config: measure(prepare(config)) for config in choices}
    except torch.OutOfMemoryError:
        log.warning("no memory left to time tiles in: these launches use those of the heuristics")
        return None
    best = min(times, key=lambda config: (times[config], config != default))
    return best if times[best] < math.inf else None


class _Store:
    """The choices for one kind of device: in memory, and in a file."""

    def __init__(self, path: Path, device: str) -> None:
        self._path, self._device = path, device
        self._writable = True
        self._tiles = self._read()

    def find(self, key: str, choices: Sequence[Config]) -> Config | None:
        """Return the choice of ``key``, if it still is one of the tables'."""
        return next((config for config in choices if asdict(config) == self._tiles.get(key)), None)

    def add(self, key: str, config: Forward | Backward) -> None:
        """Cache a choice, on disk too where that is possible."""
        self._tiles[key] = asdict(config)
        if self._writable:
            self._tiles = {**self._read(), **self._tiles}
            self._write()

    def _read(self) -> dict[str, Any]:
        try:
            content = json.loads(self._path.read_text(encoding="utf-8"))
            tiles = content["tiles"] if content["for"] == self._device else None
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, RecursionError, KeyError, TypeError) as error:
            log.warning("ignoring %s, which cannot be read: %r", self._path, error)
            return {}
        if not isinstance(tiles, dict):
            log.warning("ignoring %s, which holds no tiles for %s", self._path, self._device)
            return {}
        return tiles

    def _write(self) -> None:
        """Replace the file as a whole. It is not synced: what a power cut leaves behind is ignored when read."""
        temporary = self._path.with_name(f".{uuid.uuid4().hex}.tmp")
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            text = json.dumps({"for": self._device, "tiles": self._tiles}, indent=1, sort_keys=True)
            temporary.write_text(text + "\n", encoding="utf-8")
            os.replace(temporary, self._path)
        except OSError as error:
            self._writable = False
            log.warning("cannot write %s, tiles are cached in this process only: %s", self._path, error)
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)


@functools.cache
def _store(folder: Path, device: str) -> _Store:
    return _Store(folder / (re.sub(r"[^\w.]+", "-", device) + ".json"), device)


def _folder() -> Path:
    default = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "orepa_kernels")
    return Path(os.environ.get(FOLDER_VARIABLE) or default)
