"""Files that are either complete or absent, and checkpoints that are checked before they are believed."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import torch

from ..errors import UserError

CHECKPOINT_FORMAT = "orepa.checkpoint"
DEPLOY_FORMAT = "orepa.deploy"
VERSION = 1
_ENTRIES = {"version", "config", "model_spec", "data", "environment", "model", "optimizer", "precision", "progress"}


def write_atomically(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Write a file so that ``path`` holds the old content or the whole new one, whatever happens, power cuts included.

    Args:
        path: in an existing folder.
        write: gets a binary file.

    Raises:
        UserError: the file system refuses. ``path`` is then as it was.
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
        # torch.save reports a full disk as RuntimeError.
        if isinstance(error, OSError | RuntimeError):
            raise UserError(f"cannot write {path}: {_reason(error)}") from error
        raise


def _sync_folder(folder: Path) -> None:
    with contextlib.suppress(OSError):  # not every system can open a folder
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def save(path: Path, content: dict[str, Any]) -> None:
    """`torch.save`, atomically."""
    write_atomically(path, lambda file: torch.save(content, file))


def make_folder(path: Path) -> None:
    """Create a folder to write into.

    Raises:
        UserError: it cannot be created or written to.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / ".orepa-write-test"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"cannot write to the folder {path}: {_reason(error)}") from error


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint of ``orepa train``, tensors on the CPU.

    Raises:
        UserError: it is missing, damaged, or something else.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(f"cannot read the checkpoint {path}: {_reason(error)}") from error
    except Exception as error:  # torch.load lets through whatever the bytes provoke in zip and pickle readers
        raise UserError(f"{path} is not a readable checkpoint: it is damaged, or not a PyTorch file") from error
    found = content.get("format") if isinstance(content, dict) else None
    if found == DEPLOY_FORMAT:
        raise UserError(f"{path} is a converted model already, not a checkpoint of `orepa train`")
    if found != CHECKPOINT_FORMAT:
        raise UserError(f"{path} is a PyTorch file, but not a checkpoint of `orepa train`")
    missing = _ENTRIES - content.keys()
    if missing:
        raise UserError(f"{path} is a damaged checkpoint: it has no {', '.join(sorted(missing))}")
    if content.get("version") != VERSION:
        raise UserError(
            f"{path} has checkpoint version {content.get('version')}, this orepa reads {VERSION}: install the one that wrote it"
        )
    return content


def _reason(error: BaseException) -> str:
    text = (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__
    return text.splitlines()[0]
