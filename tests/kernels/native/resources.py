"""Compile the CUDA kernels and print their resources: registers, spills, shared memory. Needs no GPU.

    python tests/kernels/native/resources.py [--archs 80 90]

Exits with 1 if a kernel spills registers on an architecture that it is tuned for, or if no kernel is found.
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

SOURCES = Path(__file__).resolve().parents[3] / "csrc" / "cuda"
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
    shared: int  # bytes per thread block, requested at launch and so missing from the compiler's report


def find_nvcc() -> str:
    """Return the path of nvcc from CUDACXX, CUDA_HOME, PATH or /usr/local/cuda."""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    for candidate in (os.environ.get("CUDACXX", ""), f"{home}/bin/nvcc", "nvcc"):
        path = shutil.which(candidate) if candidate else None
        if path:
            return path
    sys.exit("no nvcc: looked at CUDACXX, CUDA_HOME, PATH and /usr/local/cuda")


def tile_of(mangled: str) -> str:
    """Return a kernel's tile, given its mangled name."""
    return "large" if "large_shape" in mangled else "small"


def kernel_name(mangled: str) -> str:
    """Return a readable name such as ``squeeze_gradients large tile, one product, 32 KB of parameters``."""
    name = "squeeze_gradients" if "squeeze_gradients" in mangled else "squeeze"
    parameters = re.search(r"KernelParamsILi(\d+)E", mangled)
    products = "one product" if re.search(r"ProductsE1E", mangled) else "three products"
    size = round(int(parameters[1]) / 1024) if parameters else "?"
    return f"{name:<18}{tile_of(mangled)} tile, {products:<14}, {size:>2} KB of parameters"


def shared_bytes(nvcc: str) -> dict[str, int]:
    """Return the shared memory of a thread block, in bytes, by tile: compile-time constants of csrc/cuda/tile.cuh."""
    tiles = ("large", "small")
    names = [f"__device__ extern const int {tile} = orepa::cuda::{tile.title()}Tile::shared_bytes;" for tile in tiles]
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "shared.cu")
        source.write_text("\n".join(['#include "tile.cuh"', *names]))
        command = [nvcc, "-std=c++17", "-ptx", "-I", str(SOURCES), str(source), "-o", "/dev/stdout"]
        done = subprocess.run(command, capture_output=True, text=True)
    sizes = dict(re.findall(r"\b(large|small) = (\d+);", done.stdout))
    if set(sizes) != set(tiles):
        sys.exit(f"the sizes of shared memory were not found: {done.stderr}{done.stdout}")
    return {tile: int(size) for tile, size in sizes.items()}


def measure(nvcc: str, source: str, arch: int, shared: dict[str, int]) -> list[Kernel]:
    """Return the resources of every kernel in one source file, from ptxas' report."""
    with tempfile.TemporaryDirectory() as folder:
        code = f"arch=compute_{arch},code=sm_{arch}"
        command = [nvcc, "-std=c++17", "-O3", "-gencode", code, "-Xptxas", "-v", "-cubin", str(SOURCES / source)]
        done = subprocess.run([*command, "-o", f"{folder}/kernels.cubin"], capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    kernels = re.findall(
        r"Compiling entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
        r".*?Used (\d+) registers",
        done.stderr,
        re.DOTALL,
    )
    if not kernels:
        sys.exit(f"no kernel was found in the compiler's report:\n{done.stderr}")
    return [Kernel(arch, kernel_name(m), *map(int, (r, s, st, ld)), shared[tile_of(m)]) for m, s, st, ld, r in kernels]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--archs", type=int, nargs="+", default=ALL, metavar="CC", help=f"default: {ALL}")
    arguments = parser.parse_args()
    nvcc, spills = find_nvcc(), 0
    shared = shared_bytes(nvcc)
    jobs = [(source, arch) for arch in arguments.archs for source in KERNELS]
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        results = threads.map(lambda job: measure(nvcc, *job, shared), jobs)
        for (source, arch), kernels in zip(jobs, results, strict=True):
            print(f"sm_{arch} {source}")
            for k in kernels:
                print(
                    f"  {k.name}  {k.registers:>3} registers, {k.stack:>3} B stack, "
                    f"{k.spill_stores}/{k.spill_loads} B spilled, {k.shared / 1024:.1f} KB shared"
                )
                spills += arch in TUNED and k.spill_stores + k.spill_loads > 0
    if spills:
        print(f"{spills} kernels spill where they are tuned (sm_{', sm_'.join(map(str, TUNED))})")
    return 1 if spills else 0


if __name__ == "__main__":
    sys.exit(main())
