"""Reads the machine code of compiled kernels: which loops have tensor-core instructions, and what else is in them.

A helper of the tests and of ``benchmarks/sass_audit.py``. Needs ``cuobjdump``, of the CUDA toolkit or of Triton, and no GPU.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

#: multiply-adds of one warp's instruction in TF32, by its shape; four warps issue a Hopper one together
_MMA = re.compile(r"^HMMA\.168(\d)\..*TF32|^HGMMA\.(\d+)x(\d+)x(\d+)\..*TF32")
_TENSOR = re.compile(r"^([HIQ]|HG|IG|QG|UT[A-Z]*)MMA\b")
_WIDTH = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16}
_LINE = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?) ?;", re.MULTILINE)


@dataclass(frozen=True)
class Part:
    """A loop, or all that is in none of the main loops.

    Args:
        slots: instructions, each an issue slot of every warp; loops are taken once.
        tensor: tensor-core instructions.
        macs: multiply-adds of one warp in TF32; 0 where the instruction does not say (Blackwell's asynchronous ones).
        loads: global loads by bytes per thread, asynchronous copies included.
        in_flight: the most of them that are issued before one is waited for.
        local: loads and stores of local memory, that is spilled registers.
    """

    slots: int
    tensor: int
    macs: int
    loads: dict[int, int]
    in_flight: int
    local: int


@dataclass(frozen=True)
class Kernel:
    """A kernel: its name, its innermost loops with tensor-core instructions, and the rest of it."""

    name: str
    loops: tuple[Part, ...]
    rest: Part


@functools.cache
def tool(name: str = "cuobjdump") -> str:
    """Return the path of a program of the CUDA toolkit, or of Triton's copy.

    Raises:
        FileNotFoundError: there is neither.
    """
    homes = [Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin")]
    triton = importlib.util.find_spec("triton")
    if triton is not None and triton.origin:
        homes.insert(0, Path(triton.origin).parent / "backends" / "nvidia" / "bin")
    for candidate in (*(str(home / name) for home in homes), name):
        path = shutil.which(candidate)
        if path:
            return path
    raise FileNotFoundError(f"no {name}: neither in Triton, CUDA_HOME nor PATH")


def kernels(cubin: bytes) -> list[Kernel]:
    """Disassemble a compiled file and return its kernels."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "code.cubin")
        path.write_bytes(cubin)
        done = subprocess.run([tool(), "-sass", str(path)], capture_output=True, text=True, check=True)
    parts = re.split(r"^\s+Function : (\S+)$", done.stdout, flags=re.MULTILINE)
    return [read(name, text) for name, text in zip(parts[1::2], parts[2::2], strict=True)]


def read(name: str, text: str) -> Kernel:
    """Return what is in the code of one kernel, as ``cuobjdump -sass`` prints it."""
    code = [(int(address, 16), line) for address, line in _LINE.findall(text)]
    bodies = []
    for address, line in code:
        target = re.search(r"\bBRA\b.*?\b0x([0-9a-f]+)", line)
        if target and int(target[1], 16) < address:
            body = [own for at, own in code if int(target[1], 16) <= at <= address]
            if any(_TENSOR.match(operation(own)) for own in body):
                bodies.append((int(target[1], 16), address, body))
    inner = [
        (begin, end, body)
        for begin, end, body in bodies
        if not any((b, e) != (begin, end) and begin <= b and e <= end for b, e, _ in bodies)
    ]
    rest = [line for at, line in code if not any(begin <= at <= end for begin, end, _ in inner)]
    return Kernel(name, tuple(part(body) for _, _, body in inner), part(rest))


def operation(line: str) -> str:
    """Return an instruction's operation, without its predicate."""
    return re.sub(r"^@!?U?P\w+\s+", "", line).split(" ", 1)[0]


def part(code: Sequence[str]) -> Part:
    """Count what is in a piece of code."""
    operations = Counter(map(operation, code))
    tensor = {name: count for name, count in operations.items() if _TENSOR.match(name)}
    loads = Counter[int]()
    for name, count in operations.items():
        if _loads(name):
            loads[_width(name)] += count
    return Part(
        slots=len(code),
        tensor=sum(tensor.values()),
        macs=sum(count * _macs(name) for name, count in tensor.items()),
        loads=dict(sorted(loads.items())),
        in_flight=max(_in_flight(code), default=0),
        local=sum(count for name, count in operations.items() if name.startswith(("LDL", "STL"))),
    )


def _macs(name: str) -> int:
    shape = _MMA.match(name)
    if shape is None:
        return 0
    return 16 * 8 * int(shape[1]) if shape[1] else int(shape[2]) * int(shape[3]) * int(shape[4]) // 4


def _loads(name: str) -> bool:
    return name.startswith(("LDG.", "LDGSTS", "LD.")) or name == "LDG"


def _width(name: str) -> int:
    return next((_WIDTH[field] for field in name.split(".") if field in _WIDTH), 4)


def _in_flight(code: Sequence[str]) -> Iterator[int]:
    """Yield how many loads are under way after each load; asynchronous copies until the next wait for any of them."""
    waiting: list[set[str]] = []
    copies = 0
    for line in code:
        name = operation(line)
        operands = re.findall(r"\bU?R\d+\b", line.split(" ", 1)[-1] if name else line)
        if waiting and any(register in one for one in waiting for register in operands):
            waiting = []
        if name.startswith(("DEPBAR", "LDGDEPBAR")):
            copies = copies if name.startswith("LDG") else 0
        elif name.startswith("LDGSTS"):
            copies += 1
            yield copies
        elif _loads(name):
            first = int(operands[0].removeprefix("U").removeprefix("R")) if operands else 0
            waiting.append({f"R{first + n}" for n in range(max(1, _width(name) // 4))})
            yield len(waiting)
