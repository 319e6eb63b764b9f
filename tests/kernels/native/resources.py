"""Compile the CUDA kernels and print their resources: registers, spills, shared memory. Needs no GPU.

    python tests/kernels/native/resources.py [--archs 80 90] [--keep FOLDER]

Exits with 1 if a kernel spills registers on an architecture that it is tuned for, or if no kernel is found. With --keep, the
compiled files stay in a folder, for ``benchmarks/sass_audit.py``, each with a JSON file of its kernels' resources.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

SOURCES = Path(__file__).resolve().parents[3] / "csrc" / "cuda"
KERNELS = ("forward.cu", "backward.cu")
ALL = (75, 80, 86, 89, 90, 100, 120)
TUNED = (80, 90)
#: bytes that a kernel may reload per thread: two values, once per step of 32 depths, none between its matrix instructions
ALLOWED = {"squeeze_gradients large tile, .*three products": 8}


@dataclass(frozen=True)
class Kernel:
    """One line of the table; bytes of stack and spills are per thread."""

    mangled: str
    name: str
    registers: int
    stack: int
    spill_stores: int
    spill_loads: int
    shared: int  # bytes per thread block, requested at launch and so missing from the compiler's report
    threads: int


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


def products_of(mangled: str) -> int:
    """Return how many products of tensor cores a kernel takes for one, given its mangled name."""
    return 1 if "ProductsE1E" in mangled else 3


def kernel_name(mangled: str) -> str:
    """Return a readable name such as ``squeeze_gradients large tile, 32 KB of parameters, one product``."""
    name = "squeeze_gradients" if "squeeze_gradients" in mangled else "squeeze"
    parameters = re.search(r"KernelParamsILi(\d+)E", mangled)
    products = "one product" if products_of(mangled) == 1 else "three products"
    size = round(int(parameters[1]) / 1024) if parameters else "?"
    return f"{name:<18}{tile_of(mangled)} tile, {size:>2} KB of parameters, {products}"


def tile_sizes(nvcc: str) -> dict[str, tuple[int, int]]:
    """Return by tile a thread block's shared memory, in bytes, and threads: compile-time constants of csrc/cuda/tile.cuh."""
    fields = {f"{tile}_{field}": (tile, field) for tile in ("large", "small") for field in ("shared_bytes", "threads")}
    names = [f"__device__ extern const int {n} = orepa::cuda::{t.title()}Tile::{f};" for n, (t, f) in fields.items()]
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "sizes.cu")
        source.write_text("\n".join(['#include "tile.cuh"', *names]))
        command = [nvcc, "-std=c++17", "-ptx", "-I", str(SOURCES), str(source), "-o", "/dev/stdout"]
        done = subprocess.run(command, capture_output=True, text=True)
    sizes = {name: int(size) for name, size in re.findall(r"\b(\w+) = (\d+);", done.stdout) if name in fields}
    if set(sizes) != set(fields):
        sys.exit(f"the sizes of tiles were not found: {done.stderr}{done.stdout}")
    return {tile: (sizes[f"{tile}_shared_bytes"], sizes[f"{tile}_threads"]) for tile in ("large", "small")}


def measure(nvcc: str, source: str, arch: int, sizes: dict[str, tuple[int, int]], folder: Path) -> list[Kernel]:
    """Compile one source file into a folder; return the resources of its kernels, from ptxas' report."""
    path = folder / f"sm_{arch}-{source}.cubin"
    code = f"arch=compute_{arch},code=sm_{arch}"
    command = [nvcc, "-std=c++17", "-O3", "-gencode", code, "-Xptxas", "-v", "-cubin", str(SOURCES / source)]
    done = subprocess.run([*command, "-o", str(path)], capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    found = re.findall(
        r"Compiling entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
        r".*?Used (\d+) registers",
        done.stderr,
        re.DOTALL,
    )
    if not found:
        sys.exit(f"no kernel was found in the compiler's report:\n{done.stderr}")
    kernels = [Kernel(m, kernel_name(m), *map(int, (r, s, st, ld)), *sizes[tile_of(m)]) for m, s, st, ld, r in found]
    path.with_suffix(".json").write_text(json.dumps({kernel.mangled: asdict(kernel) for kernel in kernels}))
    return kernels


def compile_all(folder: Path, archs: Sequence[int]) -> dict[tuple[int, str], list[Kernel]]:
    """Compile every source file for every architecture into a folder; return the kernels of each."""
    nvcc = find_nvcc()
    sizes, jobs = tile_sizes(nvcc), [(arch, source) for arch in archs for source in KERNELS]
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        return dict(zip(jobs, threads.map(lambda job: measure(nvcc, job[1], job[0], sizes, folder), jobs), strict=True))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--archs", type=int, nargs="+", default=ALL, metavar="CC", help=f"default: {ALL}")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="leave the compiled files there")
    arguments = parser.parse_args()
    spills = 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        compiled = compile_all(folder, arguments.archs)
    for (arch, source), kernels in compiled.items():
        print(f"sm_{arch} {source}")
        for k in kernels:
            print(
                f"  {k.name}  {k.registers:>3} registers, {k.stack:>3} B stack, "
                f"{k.spill_stores}/{k.spill_loads} B spilled, {k.shared / 1024:.1f} KB shared"
            )
            allowed = next((size for name, size in ALLOWED.items() if re.match(name, k.name)), 0)
            spills += arch in TUNED and (k.spill_loads > allowed or (k.spill_stores > 0 and not allowed))
    if spills:
        print(f"{spills} kernels spill where they are tuned (sm_{', sm_'.join(map(str, TUNED))})")
    return 1 if spills else 0


if __name__ == "__main__":
    sys.exit(main())
