"""Reading the options of ``orepa bench``; imports nothing heavy."""

from __future__ import annotations

import argparse
import importlib.util
import math
from pathlib import Path

from ..errors import UserError


def require(*packages: str, extras: str = "bench") -> None:
    """Refuse politely where a package is missing.

    Raises:
        UserError: naming the packages and the extras that bring them.
    """
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        install = f'pip install "orepa-kernels[{extras}]"'
        raise UserError(f"this command needs {', '.join(missing)}, not installed here: {install}")


def check_folders(*paths: Path | None) -> None:
    """Refuse files that could not be written after minutes of measuring.

    Raises:
        UserError: a folder does not exist.
    """
    for path in paths:
        if path and not path.parent.is_dir():
            raise UserError(f"cannot write {path}: there is no folder {path.parent}")


def names(text: str) -> list[str]:
    """``"a, b,a"`` as ``["a", "b"]``."""
    return list(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))


def count(text: str) -> int:
    """A whole number from 1 on."""
    value = int(text) if text.isdecimal() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number from 1 on, got {text!r}")
    return value


def seconds(text: str) -> float:
    """A finite number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value > 0):
        raise argparse.ArgumentTypeError(f"must be a number above 0, got {text!r}")
    return value
