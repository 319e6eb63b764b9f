"""Ahead-of-time compilation of the Triton kernels: what they need of a GPU that is not there.

A helper of the tests and of ``benchmarks/triton_resources.py``; needs Triton, and neither a GPU nor a driver.
"""

from __future__ import annotations

import inspect
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

import orepa
from orepa_kernels.backends.triton import configs, launch
from orepa_kernels.backends.triton.backward import squeeze_backward
from orepa_kernels.backends.triton.forward import squeeze_forward
from orepa_kernels.backends.triton.spec import Spec, backward_spec, forward_spec
from orepa_kernels.backends.triton.sums import add_parts
from orepa_kernels.plan import Block
from orepa_kernels.stages import program

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}

#: shared memory that one program can have, bytes
LARGEST_SHARED = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}

#: arguments of the kernels that are addresses, in order; the rest are constants
ADDRESSES = {
    "squeeze_forward": ("table", "tiles"),
    "squeeze_backward": ("table", "tiles", "workspace"),
    "add_parts": ("jobs", "tiles", "workspace"),
}


@dataclass(frozen=True)
class Resources:
    """What a compiled kernel needs: registers per thread, bytes spilled and read back, bytes of shared memory."""

    registers: int
    spills: int
    shared: int


def compile_kernel(
    function: Any, target: str, spec: Spec, constants: dict[str, Any], options: dict[str, int]
) -> Resources:
    """Compile a kernel as a launcher would ask for it, all addresses aligned."""
    compiled = triton.compile(source_of(function, spec, constants), target=TARGETS[target], options=options)
    asm = compiled.asm
    read = _nvidia(asm["ptx"], TARGETS[target].arch) if "ptx" in asm else _amd(asm["amdgcn"])
    return Resources(*read, compiled.metadata.shared)


def source_of(function: Any, spec: Spec, constants: dict[str, Any]) -> ASTSource:
    """A kernel with the types of its arguments."""
    slots = len(spec.views)
    signature: dict[str, Any] = {"addresses": "i64" if spec.listed else ("i64",) * slots}
    attributes: dict[tuple[int, ...], list[list[object]]] = {}
    for slot in [()] if spec.listed else [(slot,) for slot in range(slots)]:
        attributes[(0, *slot)] = [["tt.divisibility", 16]]
    for position, name in enumerate(ADDRESSES[function.__name__], start=1):
        signature[name] = "i64"
        attributes[(position,)] = [["tt.divisibility", 16]]
    values: dict[tuple[int, ...], Any] = {}
    for position, (name, value) in enumerate(constants.items(), start=len(signature)):
        signature[name] = "constexpr"
        values[(position,)] = value
    return ASTSource(function, signature, constexprs=values, attrs=attributes)


def _amd(assembly: str) -> tuple[int, int]:
    registers = [int(n) for n in re.findall(r"\.vgpr_count:\s+(\d+)", assembly)]
    return max(registers), 4 * sum(int(n) for n in re.findall(r"\.vgpr_spill_count:\s+(\d+)", assembly))


def _nvidia(ptx: str, arch: int) -> tuple[int, int]:
    ptxas = get_ptxas(*[arch][: len(inspect.signature(get_ptxas).parameters)]).path  # Triton 3.5 has one for all
    name = re.search(r"^\.target (\w+)", ptx, re.MULTILINE)
    assert name is not None
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        command = [ptxas, "-v", f"--gpu-name={name[1]}", file.name, "-o", "/dev/null"]
        log = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log)
    registers = re.search(r"Used (\d+) registers", log)
    assert spills is not None and registers is not None, log
    return int(registers[1]), int(spills[1]) + int(spills[2])


def structures(
    topology: str,
    size: int,
    *,
    groups: int = 1,
    listed: bool = False,
    contiguous: bool = False,
    half: bool = False,
) -> Iterator[tuple[Spec, Spec]]:
    """Forward and backward structures of a block of the catalogue and of those nested in it, 512 channels wide."""
    conv = orepa.OREPAConv(512, 512, size, groups=groups, topology=topology, bias=False, device="meta")
    constants = {name for name, _ in conv.named_buffers()}
    plan = program((conv.plan,))
    seen = set()
    for step in (*(step for level in plan.inner for step in level), *plan.last):
        own = [name in constants for _, name in step.inputs]
        forward, backward = _structure(step.block, own, contiguous, torch.bfloat16 if half else torch.float32)
        if forward not in seen:
            seen.add(forward)
            yield replace(forward, listed=listed), replace(backward, listed=listed)


def _structure(block: Block, constant: list[bool], contiguous: bool, dtype: torch.dtype) -> tuple[Spec, Spec]:
    memory_format = torch.contiguous_format if contiguous else torch.channels_last
    tensors = [torch.empty(operand.shape, dtype=dtype) for operand in block.operands]
    tensors = [t.to(memory_format=memory_format) if t.dim() == 4 else t.float() if t.dim() == 3 else t for t in tensors]
    kernel = torch.empty(block.shape, dtype=dtype, memory_format=memory_format)
    wanted = [None if fixed else torch.empty_like(t) for fixed, t in zip(constant, tensors, strict=True)]
    return forward_spec(block, tensors, kernel, None), backward_spec(block, tensors, kernel, wanted)


def kernels_of(
    forward: Spec, backward: Spec, target: str, precision: str
) -> Iterator[tuple[str, dict[str, Any], Resources]]:
    """Compile all that a launcher may: (kernel, its tile, what it needs)."""
    arch = 0 if target == "gfx942" else TARGETS[target].arch
    for function, spec, choices in (
        (squeeze_forward, forward, configs.forward_choices(forward, arch)),
        (squeeze_backward, backward, configs.backward_choices(backward, arch)),
    ):
        for config in dict.fromkeys(choices):
            constants, options = launch.split(config, SPEC=spec, PRECISION=precision)
            tile = {**{k: v for k, v in constants.items() if k not in ("SPEC", "PRECISION")}, **options}
            yield function.__name__, tile, compile_kernel(function, target, spec, constants, options)
    constants = {"SPEC": backward, "PARTS": launch.SUM_PARTS, "COUNT": launch.SUM_COUNT}
    yield add_parts.__name__, {}, compile_kernel(add_parts, target, backward, constants, launch.SUM_OPTIONS)
