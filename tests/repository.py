"""The repository as tests see it: its files, and commands that must succeed."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = {"orepa_kernels": ROOT / "orepa_kernels", "orepa": ROOT / "python" / "orepa"}


def run(*command: str | Path, cwd: Path = ROOT, **environment: str) -> str:
    variables = {**os.environ, **environment}
    done = subprocess.run([str(part) for part in command], cwd=cwd, env=variables, capture_output=True, text=True)
    assert done.returncode == 0, f"{command} failed:\n{done.stdout}\n{done.stderr}"
    return done.stdout


def git_files() -> list[Path]:
    """Every file of the project, absolute."""
    git = shutil.which("git")
    if git is None or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listed = run(git, "ls-files", "-z", "--cached", "--others", "--exclude-standard").split("\0")
    return [ROOT / name for name in listed if name and (ROOT / name).is_file()]
