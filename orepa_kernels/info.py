"""``python -m orepa_kernels.info``: what is built, what runs here, and why not the rest."""

from __future__ import annotations

import argparse
import json
import os
import platform
from typing import Any

import torch

from .backends import native
from .dispatch import ENVIRONMENT_VARIABLE, backends
from .guards import float32_precision
from .version import __version__


def collect() -> dict[str, Any]:
    """The facts as plain data: versions, devices, and every backend with its reason."""
    devices = []
    if torch.cuda.is_available():
        devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "orepa_kernels": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cuda_devices": devices,
        "cpu_threads": torch.get_num_threads(),
        "float32_matmul_precision": float32_precision(),
        ENVIRONMENT_VARIABLE: os.environ.get(ENVIRONMENT_VARIABLE),
        "compiled": native.build(),
        "backends": {name: {"runs": v.ok, "reason": v.reason} for name, v in backends().items()},
    }


def main(argv: list[str] | None = None) -> None:
    """Print the facts, as text or with ``--json``."""
    parser = argparse.ArgumentParser(prog="python -m orepa_kernels.info", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    facts = collect()
    if parser.parse_args(argv).json:
        print(json.dumps(facts, indent=2))
        return
    table, compiled = facts.pop("backends"), facts.pop("compiled")
    for key, value in (*facts.items(), *((f"compiled: {key}", value) for key, value in compiled.items())):
        print(f"{key:34} {value if value not in (None, '', []) else '-'}")
    print("\nbackend      runs here   why not")
    for name, entry in table.items():
        print(f"{name:12} {'yes' if entry['runs'] else 'no':11} {entry['reason']}".rstrip())


if __name__ == "__main__":
    main()
