# mypy: disable-error-code="import-untyped, import-not-found"
"""Timing the tiles, for those who ask for it: ``OREPA_AUTOTUNE=1``. Without it nothing here runs, and no disk is touched.

The first launch of a structure with given sizes times every tile that the tables have for it, on the device, and takes the
fastest. The choice is kept in this process and in a JSON file, one per kind of GPU and versions of Triton and of this
package, in the folder ``OREPA_AUTOTUNE_CACHE`` (default: ``orepa_kernels`` in the user's cache folder). Processes may share
it: a file is replaced as a whole, with what others wrote since merged in; what two write at the same moment, the last one
wins, and the other's choices are timed again some day. A file that cannot be read is ignored and replaced, one that cannot
be written costs a warning.

Every candidate is right, but two tiles may differ in the last bits. With tuning on, "same inputs, same bits" therefore holds
within one process, and between processes that find all their choices in the file; not between two that time for themselves.

Nothing is timed in Triton's interpreter, nor while a CUDA graph is captured: what is not known then gets the tiles of the
heuristics, and that launch keeps them for the life of the process. Warm up before capturing.
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
from typing import Any, TypeVar

import torch
from torch import Tensor

from ...plan import Block
from ...version import __version__
from .configs import Backward, Forward
from .device import capturing, device_of
from .spec import Spec

log = logging.getLogger("orepa_kernels")

ENVIRONMENT_VARIABLE = "OREPA_AUTOTUNE"
FOLDER_VARIABLE = "OREPA_AUTOTUNE_CACHE"

#: milliseconds of warm-up and of timed runs per candidate
_WARM_UP, _RUNS = 5, 20

Config = TypeVar("Config", Forward, Backward)

#: one at a time: two that ran together would time each other, and write the same file
_lock = threading.Lock()


def enabled() -> bool:
    """Whether tuning is asked for; read whenever a launch is made for the first time.

    Raises:
        ValueError: the variable is neither empty, ``"0"`` nor ``"1"``.
    """
    value = os.environ.get(ENVIRONMENT_VARIABLE, "")
    if value not in ("", "0", "1"):
        raise ValueError(f"{ENVIRONMENT_VARIABLE} must be 0 or 1, got {value!r}")
    return value == "1"


def key_of(
    direction: str, spec: Spec, blocks: Sequence[Block], tensors: Sequence[Sequence[Tensor]], precision: str
) -> str:
    """What a choice is good for: the structure, the sizes of all blocks and their tensors, the precision of products."""
    sizes = [block.groups for block in blocks], [[tuple(tensor.shape) for tensor in own] for own in tensors]
    digest = hashlib.sha256(repr((spec.digest, sizes)).encode()).hexdigest()[:32]
    return f"{direction} {precision} {digest}"


def choose(
    choices: Sequence[Config],
    default: Config,
    key: str,
    device: torch.device,
    run_of: Callable[[Config], Callable[[], object]],
) -> Config:
    """The fastest of ``choices``, from the file or by timing; ``default`` where neither says.

    Args:
        choices: the candidates.
        default: what the heuristics would take; also where candidates are equally fast.
        key: see `key_of`.
        device: the current one.
        run_of: gives what launches a candidate. It runs many times, and must leave nothing behind but its outputs.
    """
    if len(choices) < 2 or not has_clock(device):
        return default
    with _lock:
        store = _store(_folder(), kind_of(device))
        config = store.find(key, choices)
        if config is None and not capturing(device):
            config = _fastest(choices, default, run_of)
            if config is not None:
                store.add(key, config)
    return default if config is None else config


def has_clock(device: torch.device) -> bool:
    """Whether launches can be timed on a device: not in the interpreter, which runs on the CPU."""
    return device.type in ("cuda", "xpu")


def kind_of(device: torch.device) -> str:
    """What all choices of one file are good for."""
    import triton

    own = device_of(device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else torch.xpu.get_device_name(device)
    return f"triton {triton.__version__}, orepa_kernels {__version__}, {name}, {own.kind} {own.name or own.arch}"


def measure(run: Callable[[], object]) -> float:
    """Median milliseconds of a run by the device's events, with its L2 cache cleared before each, as a step finds it.

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
    choices: Sequence[Config], default: Config, run_of: Callable[[Config], Callable[[], object]]
) -> Config | None:
    """The candidate of least time; None where that cannot be found out."""
    try:
        times = {config: measure(run_of(config)) for config in choices}
    except torch.OutOfMemoryError:
        log.warning("no memory left to time tiles in: these launches use those of the heuristics")
        return None
    best = min(times, key=lambda config: (times[config], config != default))
    return best if times[best] < math.inf else None


# --- the file -----------------------------------------------------------------------------------------------------------


class _Store:
    """The choices made so far for one kind of device: in memory, and in a file."""

    def __init__(self, path: Path, kind: str) -> None:
        self._path, self._kind = path, kind
        self._writable = True
        self._tiles = self._read()

    def find(self, key: str, choices: Sequence[Config]) -> Config | None:
        """The choice of ``key``, if it still is one of the tables'."""
        known = self._tiles.get(key)
        return next((config for config in choices if asdict(config) == known), None)

    def add(self, key: str, config: Forward | Backward) -> None:
        """Keep a choice, on disk too where that is possible."""
        self._tiles[key] = asdict(config)
        if self._writable:
            self._tiles = {**self._read(), **self._tiles}
            self._write()

    def _read(self) -> dict[str, Any]:
        try:
            content = json.loads(self._path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, RecursionError) as error:
            log.warning("ignoring %s, which cannot be read: %s", self._path, error)
            return {}
        tiles = content.get("tiles") if isinstance(content, dict) else None
        if not isinstance(tiles, dict) or content.get("for") != self._kind:
            log.warning("ignoring %s, which holds no tiles for %s", self._path, self._kind)
            return {}
        return tiles

    def _write(self) -> None:
        """Replace the file as a whole. Not synced: what a power cut leaves behind is ignored when read."""
        temporary = self._path.with_name(f".{uuid.uuid4().hex}.tmp")
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            text = json.dumps({"for": self._kind, "tiles": self._tiles}, indent=1, sort_keys=True)
            temporary.write_text(text + "\n", encoding="utf-8")
            os.replace(temporary, self._path)
        except OSError as error:
            self._writable = False
            log.warning("cannot write %s, tiles are remembered in this process only: %s", self._path, error)
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)


@functools.cache
def _store(folder: Path, kind: str) -> _Store:
    return _Store(folder / (re.sub(r"[^\w.]+", "-", kind) + ".json"), kind)


def _folder() -> Path:
    own = os.environ.get(FOLDER_VARIABLE)
    if own:
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "orepa_kernels")
