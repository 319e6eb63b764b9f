"""Compile the CUDA kernels and print what each takes: registers, spills, shared memory. No GPU needed.

    python tests/native/resources.py [--archs 80 90]

Exits with 1 where a kernel spills registers on an architecture that it is tuned for.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

SOURCES = Path(__file__).resolve().parents[2] / "csrc" / "cuda"
KERNELS = ("forward.cu", "backward.cu")
ALL = (75, 80, 86, 89, 90, 100, 120)
TUNED = (80, 90)


@dataclass(frozen=True)
class Kernel:
    """One line of the table; bytes of stack and spills are per thread."""

    arch: int
    name: str
    registers: int
    stack: int
    spill_stores: int
    spill_loads: int


def find_nvcc() -> str:
    """CUDACXX, CUDA_HOME, PATH, then the usual place."""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    for candidate in (os.environ.get("CUDACXX", ""), f"{home}/bin/nvcc", "nvcc"):
        path = shutil.which(candidate) if candidate else None
        if path:
            return path
    sys.exit("no nvcc: looked at CUDACXX, CUDA_HOME, PATH and /usr/local/cuda")


def kernel_name(mangled: str) -> str:
    """``squeeze_gradients, large tile, 32 KB`` of the compiler's name for it."""
    name = "squeeze_gradients" if "squeeze_gradients" in mangled else "squeeze"
    tile = "large" if "large_shape" in mangled else "small"
    parameters = re.search(r"TableILi(\d+)E", mangled)
    return f"{name:<18}{tile} tile, {round(int(parameters[1]) / 1024) if parameters else '?':>2} KB of parameters"


def measure(nvcc: str, source: str, arch: int) -> list[Kernel]:
    """Every kernel of one source file, from ptxas' report."""
    with tempfile.TemporaryDirectory() as folder:
        code = f"arch=compute_{arch},code=sm_{arch}"
        command = [nvcc, "-std=c++17", "-O3", "-gencode", code, "-Xptxas", "-v", "-cubin", str(SOURCES / source)]
        done = subprocess.run([*command, "-o", f"{folder}/kernels.cubin"], capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    found = re.findall(
        r"Compiling entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
        r".*?Used (\d+) registers",
        done.stderr,
        re.DOTALL,
    )
    return [Kernel(arch, kernel_name(m), int(r), int(s), int(st), int(ld)) for m, s, st, ld, r in found]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--archs", type=int, nargs="+", default=ALL, metavar="CC", help=f"default: {ALL}")
    arguments = parser.parse_args()
    nvcc, spills = find_nvcc(), 0
    jobs = [(source, arch) for arch in arguments.archs for source in KERNELS]
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        found = threads.map(lambda job: measure(nvcc, *job), jobs)
        for (source, arch), kernels in zip(jobs, found, strict=True):
            print(f"sm_{arch} {source}")
            for k in kernels:
                print(
                    f"  {k.name}  {k.registers:>3} registers, {k.stack:>3} B stack, {k.spill_stores}/{k.spill_loads} B spilled"
                )
                spills += arch in TUNED and k.spill_stores + k.spill_loads > 0
    if spills:
        print(f"{spills} kernels spill where they are tuned (sm_{', sm_'.join(map(str, TUNED))})")
    return 1 if spills else 0


if __name__ == "__main__":
    sys.exit(main())
