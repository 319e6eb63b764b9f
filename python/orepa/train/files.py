"""Files that are either complete or absent, and checkpoints that are validated when read."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import torch

from ..errors import UserError, reason

CHECKPOINT_FORMAT = "orepa.checkpoint"
DEPLOY_FORMAT = "orepa.deploy"
VERSION = 1
_ENTRIES = {"version", "config", "model_spec", "data", "environment", "model", "optimizer", "precision", "progress"}


def write_atomically(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Call ``write`` with a binary file such that ``path`` holds the old or all of the new content, even after a power cut.

    Raises:
        UserError: the file system refuses. ``path`` is unchanged then.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError | RuntimeError):
            refusal: BaseException = error
            while refusal.__context__ is not None and not isinstance(refusal, OSError):
                refusal = refusal.__context__  # torch.save ends in a RuntimeError about its file format
            raise UserError(f"cannot write {path}: {reason(refusal)}") from error
        raise


def _sync_folder(folder: Path) -> None:
    with contextlib.suppress(OSError):  # not every system can open a folder
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def save(path: Path, content: dict[str, Any]) -> None:
    """Call `torch.save`, atomically."""
    write_atomically(path, lambda file: torch.save(content, file))


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write plain data as JSON, atomically."""
    text = json.dumps(content, indent=2, allow_nan=False) + "\n"
    write_atomically(path, lambda file: file.write(text.encode()))


def make_folder(path: Path) -> None:
    """Create a folder, if it is missing; raise a `UserError` where that fails or the folder is not writable."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / ".orepa-write-test"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"cannot write to the folder {path}: {reason(error)}") from error


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint of ``orepa train``, with its tensors on the CPU.

    Raises:
        UserError: it is missing, damaged, or another kind of file.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(f"cannot read the checkpoint {path}: {reason(error)}") from error
    except Exception as error:  # torch.load lets through whatever the bytes provoke in zip and pickle readers
        raise UserError(f"{path} is not a readable checkpoint: it is damaged, or not a PyTorch file") from error
    kind = content.get("format") if isinstance(content, dict) else None
    if kind == DEPLOY_FORMAT:
        raise UserError(f"{path} is a converted model already, not a checkpoint of `orepa train`")
    if kind != CHECKPOINT_FORMAT:
        raise UserError(f"{path} is a PyTorch file, but not a checkpoint of `orepa train`")
    missing = ", ".join(sorted(_ENTRIES - content.keys()))
    if missing:
        raise UserError(f"{path} is a damaged checkpoint: it has no {missing}")
    version = content["version"]
    if version != VERSION:
        raise UserError(f"{path} has checkpoint version {version}, not {VERSION}: install the orepa that wrote it")
    return content
