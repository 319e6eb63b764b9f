"""Ahead-of-time compilation of the Triton kernels: what they need of a GPU that is not there.

A helper of the tests and of ``benchmarks/triton_resources.py``; needs Triton, and neither a GPU nor a driver.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import sass
import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.cache import get_cache_manager

import orepa
from orepa_kernels.backends.triton import configs, kernels
from orepa_kernels.backends.triton import launcher as launch
from orepa_kernels.backends.triton import spec as spec_module
from orepa_kernels.backends.triton.kernels.backward import squeeze_backward
from orepa_kernels.backends.triton.kernels.forward import squeeze_forward
from orepa_kernels.backends.triton.kernels.sums import add_parts
from orepa_kernels.backends.triton.spec import Spec, backward_spec, forward_spec
from orepa_kernels.nested import program
from orepa_kernels.plan import Block

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}

#: shared memory that one program can have, bytes
LARGEST_SHARED = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}

#: Triton's versions (major, minor) that the tiles were chosen with: those of which there are results
RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results" / "triton"
CHOSEN_WITH = {tuple(path.stem.removeprefix("resources_").split(".")[:2]) for path in RESULTS.glob("resources_*.json")}

#: loads and stores of spilled registers in the main loops: none with those; each other version brings a compiler of its own
MOST_IN_LOOPS = 0 if tuple(triton.__version__.split(".")[:2]) in CHOSEN_WITH else 16
#: bytes that a thread may spill elsewhere
MOST_SPILLED = 256

#: of matrix products, what `device.Device.precision` can choose on NVIDIA's GPUs; the last one for halves
PRECISIONS = ("tf32x3", "rounded")

#: how the tensors of a block may lie, as options of `structures`: the first is what training on a GPU has
MEMORY: dict[str, dict[str, Any]] = {
    "channels_last": {},
    "many blocks": {"batched": True},
    "32 groups": {"groups": 32},
    "contiguous": {"contiguous": True},
    "autocast": {"autocast": True},
    "bfloat16": {"half": True},
}

#: arguments of the kernels that are addresses, in order; the rest are constants
ADDRESSES = {
    "squeeze_forward": ("table", "tiles"),
    "squeeze_backward": ("table", "tiles", "workspace"),
    "add_parts": ("jobs", "tiles", "workspace"),
}


@dataclass(frozen=True)
class Resources:
    """What a compiled kernel needs: registers per thread, bytes spilled and read back, bytes of shared memory.

    ``in_loops`` is how many instructions of main loops store or load spilled registers; ``digest`` says what was compiled, see
    `digest_of`.
    """

    registers: int
    spills: int
    shared: int
    in_loops: int
    digest: str


#: all that Python runs while Triton reads a kernel: Triton's own key of a kernel leaves out plain functions and methods
SOURCES = b"".join(
    path.read_bytes()
    for path in (*sorted(Path(kernels.__file__).parent.glob("*.py")), Path(spec_module.__file__))  # type: ignore[arg-type]
)


def digest_of(source: ASTSource, target: str, options: dict[str, int]) -> str:
    """Name all that decides what is compiled: compiler, sources, types, constants (the structure, the tile), GPU, options."""
    sources = hashlib.sha256(SOURCES).hexdigest()
    parts = (triton.__version__, sources, source.hash(), str(TARGETS[target]), sorted(options.items()))
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def recorded() -> dict[str, Resources]:
    """Return what this version of Triton made of kernels when `benchmarks/triton_resources.py` was last run, by digest."""
    path = RESULTS / f"resources_{triton.__version__}.json"
    if not path.exists():
        return {}
    content = json.loads(path.read_text(encoding="utf-8"))
    rows = [dict(zip(content["columns"], row, strict=True)) for row in content["rows"]]
    return {r["digest"]: Resources(**{field.name: r[field.name] for field in fields(Resources)}) for r in rows}


def compile_kernel(
    function: Any,
    target: str,
    spec: Spec,
    constants: dict[str, Any],
    options: dict[str, int],
    known: Mapping[str, Resources] = MappingProxyType({}),
) -> Resources:
    """Compile a kernel as a launcher would ask for it, all addresses aligned; unless it is known."""
    source = source_of(function, spec, constants)
    digest = digest_of(source, target, options)
    if digest in known:
        return known[digest]
    compiled, log = compile_with_report(source, target, options)
    if "amdgcn" in compiled.asm:
        return Resources(*_amd(compiled.asm["amdgcn"]), compiled.metadata.shared, 0, digest)
    registers, spills = usage(log)
    in_loops = 0
    if spills:
        in_loops = sum(loop.local for kernel in sass.kernels(compiled.asm["cubin"]) for loop in kernel.loops)
    return Resources(registers, spills, compiled.metadata.shared, in_loops, digest)


_LOG = "ptxas.log"


def compile_with_report(source: ASTSource, target: str, options: dict[str, int]) -> tuple[Any, str]:
    """Compile a kernel; return it, and ptxas' report, wherever it comes from.

    The report is of the very run that makes the kernel: another run might be given other options than Triton gives it. Triton
    keeps the kernel in its cache, but not this, so it is put there, for the tests of other processes too.
    """
    compiled, log = compile_and_listen(source, target, options)
    if "amdgcn" in compiled.asm:
        return compiled, log
    kept = get_cache_manager(compiled.hash)
    path = kept.get_file(_LOG)
    if path is not None:
        return compiled, Path(path).read_text()
    if not log:  # out of a cache that somebody else has filled
        compiled, log = compile_and_listen(source, target, options, always=True)
    kept.put(log, _LOG, binary=False)
    return compiled, log


def compile_and_listen(
    source: ASTSource, target: str, options: dict[str, int], always: bool = False
) -> tuple[Any, str]:
    """Compile a kernel; return it, and what ptxas printed: nothing where the kernel comes from the cache."""
    printed = io.StringIO()
    with knobs.nvidia.scope(), knobs.compilation.scope(), contextlib.redirect_stdout(printed):
        knobs.nvidia.dump_ptxas_log = True
        knobs.compilation.always_compile = knobs.compilation.always_compile or always
        return triton.compile(source, target=TARGETS[target], options=options), printed.getvalue()


def source_of(function: Any, spec: Spec, constants: dict[str, Any]) -> ASTSource:
    """Return a kernel with the types of its arguments."""
    slots = len(spec.views)
    signature: dict[str, Any] = {"addresses": "i64" if spec.batched else ("i64",) * slots}
    attributes: dict[tuple[int, ...], list[list[object]]] = {}
    for slot in [()] if spec.batched else [(slot,) for slot in range(slots)]:
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


def usage(log: str) -> tuple[int, int]:
    """Return the registers of a thread, and the bytes that it spills, from ptxas' report."""
    spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log)
    registers = re.search(r"Used (\d+) registers", log)
    assert spills is not None and registers is not None, log
    return int(registers[1]), int(spills[1]) + int(spills[2])


def catalogue() -> list[tuple[str, int]]:
    """Return every topology with its kernel size, and the paper's block with larger kernels, more than 9 taps."""
    sizes = {name: 1 if name == "rep1x1" else 7 if name.endswith("stem") else 3 for name in orepa.topologies()}
    return [*sizes.items(), ("orepa", 5)]


#: one for each kind of tile that has products: several taps at once, one tap, a composition after another
KINDS = [("orepa", 3), ("rep1x1", 1), ("expandnet", 3)]


def checked() -> list[tuple[str, int, str, str, str]]:
    """Return what the tests look at: topology, kernel size, layout, GPU, precision. The rest of the catalogue is alike."""
    both, three, one = ("sm_80", "sm_90"), *PRECISIONS
    found = [(*block, "channels_last", gpu, three) for block in catalogue() for gpu in both]
    found += [(*block, memory, gpu, one) for block in KINDS for memory in ("channels_last", "autocast") for gpu in both]
    other = [("orepa", "contiguous"), ("acnet", "contiguous"), ("ecb", "contiguous"), ("expandnet", "contiguous")]
    other += [("orepa", "bfloat16"), ("repvgg_dense", "bfloat16")]
    found += [(topology, 3, memory, gpu, three) for topology, memory in other for gpu in both]
    # Only addresses differ: once, for the generation with the larger tiles.
    return found + [("orepa", 3, memory, "sm_90", three) for memory in ("many blocks", "32 groups")]


def structures(
    topology: str,
    size: int,
    *,
    groups: int = 1,
    batched: bool = False,
    contiguous: bool = False,
    autocast: bool = False,
    half: bool = False,
) -> Iterator[tuple[Spec, Spec]]:
    """Yield the forward and backward structures of a block of the catalogue and of those nested in it, 512 channels wide."""
    conv = orepa.OREPAConv(512, 512, size, groups=groups, topology=topology, bias=False, device="meta")
    constants = {name for name, _ in conv.named_buffers()}
    plan = program((conv.plan,))
    seen = set()
    for step in (*(step for level in plan.inner for step in level), *plan.last):
        own = [name in constants for _, name in step.inputs]
        dtypes = (torch.bfloat16 if half else torch.float32, torch.bfloat16 if half or autocast else torch.float32)
        forward, backward = _structure(step.block, own, contiguous, *dtypes)
        if forward not in seen:
            seen.add(forward)
            yield replace(forward, batched=batched), replace(backward, batched=batched)


def _structure(
    block: Block, constant: list[bool], contiguous: bool, dtype: torch.dtype, kernel_dtype: torch.dtype
) -> tuple[Spec, Spec]:
    memory_format = torch.contiguous_format if contiguous else torch.channels_last
    tensors = [torch.empty(operand.shape, dtype=dtype, device="meta") for operand in block.operands]
    tensors = [t.to(memory_format=memory_format) if t.dim() == 4 else t.float() if t.dim() == 3 else t for t in tensors]
    kernel = torch.empty(block.shape, dtype=kernel_dtype, memory_format=memory_format, device="meta")
    gradients = [None if fixed else torch.empty_like(t) for fixed, t in zip(constant, tensors, strict=True)]
    return forward_spec(block, tensors, kernel), backward_spec(block, tensors, kernel, gradients)


def kernels_of(
    forward: Spec, backward: Spec, target: str, precision: str, known: Mapping[str, Resources]
) -> Iterator[tuple[str, dict[str, Any], Resources]]:
    """Compile all that a launcher may and that is not known, and yield (kernel, its tile, what it needs)."""
    arch = 0 if target == "gfx942" else TARGETS[target].arch
    if precision in PRECISIONS and not has_products(forward):
        precision = PRECISIONS[0]  # one kernel for all of them
    elif precision in PRECISIONS and forward.half:
        precision = PRECISIONS[-1]
    for function, spec, choices in (
        (squeeze_forward, forward, configs.forward_choices(forward, arch, precision)),
        (squeeze_backward, backward, configs.backward_choices(backward, arch, precision)),
    ):
        for config in dict.fromkeys(choices):
            constants, options = launch.kernel_arguments(config, spec, precision)
            tile = {**asdict(config), **options}
            yield function.__name__, tile, compile_kernel(function, target, spec, constants, options, known)
    constants = {"SPEC": backward, "PARTS": launch.SUM_PARTS, "COUNT": launch.SUM_COUNT}
    yield add_parts.__name__, {}, compile_kernel(add_parts, target, backward, constants, launch.SUM_OPTIONS, known)


def has_products(spec: Spec) -> bool:
    """Return whether its kernels have a matrix product, whose precision can be chosen."""
    return any(branch.kind == "composed" for branch in spec.terms)
