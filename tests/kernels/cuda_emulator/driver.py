"""Run the emulated CUDA kernels from Python: csrc/squeeze.h as ctypes, blocks packed into it, and the compiled library."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from orepa_kernels.plan import Block, Composed, Dense, Operand, PointwiseFilter, term_kernel_size

ROOT = Path(__file__).resolve().parents[3]
MAX_TERMS = 12
TYPES = {torch.float64: 0, torch.float32: 1, torch.bfloat16: 2, torch.float16: 3}
FULL, TF32, BF16 = range(3)
#: extra compiler flags, such as -fsanitize=address,undefined; preload libasan then, and libstdc++ so that exceptions pass
#: through it, and set ASAN_OPTIONS=detect_leaks=0, as `.ci/run` does
FLAGS = os.environ.get("OREPA_EMULATOR_FLAGS", "").split()


# --- csrc/squeeze.h as ctypes -------------------------------------------------------------------------------------------


class _View(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("row", ctypes.c_int64),
        ("column", ctypes.c_int64),
        ("tap", ctypes.c_int64),
        ("type", ctypes.c_int32),
    ]


class _Term(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int32) for name in ("kind", "scale", "height", "width")),
        *((name, ctypes.c_int32) for name in ("first_height", "first_width", "inner")),
        ("identity", ctypes.c_bool),
        *((name, _View) for name in ("a", "b", "grad_a", "grad_b")),
    ]


class _Block(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("out_channels", "in_per_group", "groups")),
        *((name, ctypes.c_int32) for name in ("height", "width", "terms")),
        ("term", _Term * MAX_TERMS),
        *((name, _View) for name in ("scales", "grad_scales", "kernel")),
    ]


def _view(tensor: Tensor | None, taps: int = 1) -> _View:
    """Return the view of a tensor ``[rows, columns, h, w]``, ``[rows, h, w]``, ``[rows, columns]`` or ``[rows]``."""
    view = _View(None, 0, 0, 0, TYPES[torch.float32])
    if tensor is None:
        return view
    shape = {4: (0, 1, 2, 3), 3: (0, None, 1, 2), 2: (0, 1, None, None), 1: (0, None, None, None)}[tensor.dim()]
    row, column, high, wide = (0 if d is None else tensor.stride(d) for d in shape)
    tap = wide
    if taps > 1:
        height, width = tensor.shape[-2:]
        tap = high if width == 1 else wide
        assert width == 1 or height == 1 or high == width * wide, "taps must lie at one stride"
    return _View(tensor.data_ptr(), 0 if tensor.shape[0] == 1 else row, column, tap, TYPES[tensor.dtype])


def describe(
    block: Block,
    tensors: dict[str, Tensor],
    kernel: Tensor,
    gradients: dict[str, Tensor] | None = None,
    grad_scales: Tensor | None = None,
) -> _Block:
    """Pack a block and its tensors into the struct of the kernels."""
    gradients = gradients or {}
    per_group = block.in_channels // block.groups
    (kh, kw), out = block.kernel_size, block.out_channels
    result = _Block(out, per_group, block.groups, kh, kw, len(block.terms))
    result.kernel = _view(kernel, kh * kw)
    if block.scales is not None:
        scales = tensors[block.scales.name]
        result.scales = _view(scales)
        result.scales.row = scales.stride(0)
        if scales.shape[1] == 1:
            result.scales.column = 0
        result.grad_scales = _view(grad_scales)
        if grad_scales is not None:
            result.grad_scales.row = grad_scales.stride(0)
    for index, term in enumerate(block.terms):
        entry = result.term[index]
        entry.height, entry.width = term_kernel_size(term)
        taps = entry.height * entry.width
        entry.scale = -1 if term.scale is None else term.scale

        def bind(which: str, operand: Any, taps: int = 1, entry: _Term = entry) -> None:
            setattr(entry, which, _view(tensors[operand.name], taps))
            setattr(entry, f"grad_{which}", _view(gradients.get(operand.name), taps))

        if isinstance(term, Dense):
            entry.kind = 0
            bind("a", term.weight, taps)
        elif isinstance(term, PointwiseFilter):
            entry.kind = 1
            if term.pointwise is not None:
                bind("a", term.pointwise)
            if isinstance(term.filter, Operand):
                bind("b", term.filter, taps)
        elif isinstance(term, Composed):
            entry.kind, entry.identity = 2, term.identity
            entry.first_height, entry.first_width = term.first.shape[-2:]
            entry.inner = term.first.shape[0] // block.groups
            bind("a", term.first, entry.first_height * entry.first_width)
            bind("b", term.second, term.second.shape[-2] * term.second.shape[-1])
        else:
            entry.kind, entry.inner = 3, term.depthwise.shape[0] // block.in_channels
            bind("a", term.depthwise, taps)
            if term.pointwise is not None:
                bind("b", term.pointwise)
    return result


# --- the kernels ----------------------------------------------------------------------------------------------------------


class Emulated:
    """The compiled kernels, as methods."""

    def __init__(self, library: Path) -> None:
        self._library = ctypes.CDLL(str(library))
        self._library.orepa_launches.restype = ctypes.c_int64
        sizes = (ctypes.c_int * 4)()
        self._library.orepa_sizes(sizes)
        assert list(sizes) == [ctypes.sizeof(_View), ctypes.sizeof(_Term), ctypes.sizeof(_Block), MAX_TERMS]

    def _check(self, function: Any, *arguments: Any) -> None:
        error = ctypes.create_string_buffer(512)
        if function(*arguments, error, len(error)):
            raise RuntimeError(error.value.decode())

    def seed(self, seed: int) -> None:
        self._library.orepa_seed(ctypes.c_uint64(seed))

    def launches(self) -> int:
        return self._library.orepa_launches()

    def unordered_sum(self, values: Tensor, seed: int) -> float:
        self.seed(seed)
        self._library.orepa_unordered_sum.restype = ctypes.c_float
        return self._library.orepa_unordered_sum(ctypes.c_void_p(values.data_ptr()), len(values))

    def fault(self, fault: int) -> str:
        error = ctypes.create_string_buffer(512)
        self._library.orepa_fault(fault, error, len(error))
        return error.value.decode()

    def unwritten(self) -> float:
        self._library.orepa_unwritten.restype = ctypes.c_float
        return self._library.orepa_unwritten()

    def mma(self, a: Tensor, b: Tensor, c: Tensor, bfloat16: bool) -> Tensor:
        """Run one matrix instruction; arguments are ``[lane, register]``."""
        d = torch.full((32, 4), float("nan"))
        self._library.orepa_mma(int(bfloat16), *(ctypes.c_void_p(t.data_ptr()) for t in (a, b, c, d)))
        return d

    def unsupported_reason(self, block: _Block) -> str:
        reason = ctypes.create_string_buffer(512)
        self._library.orepa_unsupported_reason(ctypes.byref(block), reason, len(reason))
        return reason.value.decode()

    def unusable_reason(self, device: int, driver: int = 13000, can_load: bool = True) -> str:
        reason = ctypes.create_string_buffer(512)
        self._library.orepa_unusable_reason(device, driver, int(can_load), reason, len(reason))
        return reason.value.decode()

    def needs(self, blocks: Sequence[_Block], backward: bool) -> tuple[int, int]:
        table = (_Block * len(blocks))(*blocks)
        sizes = (ctypes.c_int64 * 2)()
        self._check(self._library.orepa_needs, table, len(blocks), int(backward), sizes)
        return sizes[0], sizes[1]

    def run(self, blocks: Sequence[_Block], backward: bool, precision: int = FULL, shorten: int = 0) -> None:
        table = (_Block * len(blocks))(*blocks)
        workspace_bytes, counter_bytes = self.needs(blocks, backward)
        workspace = torch.full((workspace_bytes // 4 + 1,), float("nan"))
        counters = torch.zeros(counter_bytes // 4 + 1, dtype=torch.int32)
        self._check(
            self._library.orepa_run,
            table,
            len(blocks),
            int(backward),
            precision,
            ctypes.c_void_p(workspace.data_ptr()),
            ctypes.c_int64(workspace_bytes - shorten),
            ctypes.c_void_p(counters.data_ptr()),
            ctypes.c_int64(counter_bytes),
        )
        assert not counters.any(), "counters must be zero again"
        assert workspace[-1].isnan(), "a write behind the workspace"


def compile_emulated(folder: Path, *flags: str) -> Path:
    """Compile the kernels into a shared library for this CPU."""
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        pytest.skip("no C++ compiler: CXX or g++")
    library = folder / "libemulated.so"
    source, include = ROOT / "tests/kernels/native/emulated.cpp", ROOT / "tests/kernels/cuda_emulator"
    command = [compiler, "-std=c++17", "-O1", "-g", "-shared", "-fPIC", "-Wno-unknown-pragmas", *FLAGS, *flags]
    command += ["-I", str(include), "-x", "c++", str(source), "-o", str(library)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return library


class EmulatedModule:
    """The part of `orepa_kernels._C` that the CUDA backend uses, with the emulated kernels on CPU memory."""

    max_terms = MAX_TERMS
    cuda_max_taps = 128
    cuda_requested_architectures = "80-real,90"

    def __init__(self, kernels: Emulated) -> None:
        self._kernels = kernels

    def cuda_unusable_reason(self, device: int) -> str:
        return self._kernels.unusable_reason(device)

    def cuda_architectures(self) -> list[int]:
        return [80, 90]

    @staticmethod
    def Plan(  # noqa: N802
        out: int, per_group: int, groups: int, size: tuple[int, int], terms: list[Any], scales: int, operands: int
    ) -> Any:
        block = _Block(out, per_group, groups, *size, len(terms))
        slots: list[tuple[str, int | None, int]] = [("scales", None, scales)]
        for index, (kind, scale, term_size, first, inner, identity, a, b) in enumerate(terms):
            entry = block.term[index]
            entry.kind, entry.scale, entry.inner, entry.identity = kind, scale, inner, identity
            (entry.height, entry.width), (entry.first_height, entry.first_width) = term_size, first
            slots += [("a", index, a), ("b", index, b)]
        return bytes(block), slots, operands

    def cuda_memory_needs(self, plans: list[Any], operands: list[list[int]], backward: bool) -> tuple[int, int]:
        return self._kernels.needs([_bind(plan, views) for plan, views in zip(plans, operands, strict=True)], backward)

    def cuda_forward(self, plans: list[Any], operands: list[Any], kernels: list[int], *context: int) -> None:
        blocks = [_bind(plan, views) for plan, views in zip(plans, operands, strict=True)]
        for index, block in enumerate(blocks):
            block.kernel = _view_at(kernels, index)
        self._kernels.run(blocks, backward=False, precision=context[2])

    def cuda_backward(
        self, plans: list[Any], operands: list[Any], upstream: list[int], gradients: list[Any], *context: int
    ) -> None:
        blocks = [_bind(plan, views, g) for plan, views, g in zip(plans, operands, gradients, strict=True)]
        for index, block in enumerate(blocks):
            block.kernel = _view_at(upstream, index)
        _, _, precision, _, workspace_bytes, _, counter_bytes = context
        needs = self._kernels.needs(blocks, True)
        assert workspace_bytes >= needs[0] and counter_bytes >= needs[1]
        self._kernels.run(blocks, backward=True, precision=precision)


def _view_at(numbers: Sequence[int], index: int) -> _View:
    address, kind, row, column, tap = numbers[5 * index : 5 * index + 5]
    return _View(address or None, row, column, tap, kind)


def _bind(plan: Any, operands: list[int], gradients: list[int] | None = None) -> _Block:
    raw, slots, count = plan
    block = _Block.from_buffer_copy(raw)
    assert len(operands) == 5 * count and (gradients is None or len(gradients) == 5 * count)
    for name, index, operand in slots:
        target = block if index is None else block.term[index]
        if operand >= 0:
            setattr(target, name, _view_at(operands, operand))
            if gradients is not None:
                setattr(target, f"grad_{name}", _view_at(gradients, operand))
    return block
