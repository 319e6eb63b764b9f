"""The compiled module `orepa_kernels._C`: whether it is here, and how plans and tensors reach it."""

from __future__ import annotations

import importlib
import json
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ..plan import Average, Block, Composed, Dense, Operand, PointwiseFilter, Term, kernel_size_of, term_kernel_size
from .base import SUPPORTED, Gradients, Layout, Support, layout_of

_C: Any = None
_import_error = ""
try:
    _C = importlib.import_module("orepa_kernels._C")
except ImportError as error:
    _import_error = str(error)

#: whether this package is imported from a clone, where it hides an installed one
IN_SOURCE_TREE = (Path(__file__).resolve().parents[2] / "csrc").is_dir()

#: numbers of the element types, as in csrc/squeeze.h
TYPES = {torch.float64: 0, torch.float32: 1, torch.bfloat16: 2, torch.float16: 3}

#: five numbers per tensor: address, type, strides of rows, columns and taps
Views: TypeAlias = list[int]

_ABSENT = [0, 1, 0, 0, 0]
_FIELDS = len(_ABSENT)


def module() -> ModuleType:
    """Return the compiled module.

    Raises:
        RuntimeError: it is not here; see `why_missing`.
    """
    if _C is None:
        raise RuntimeError(why_missing())
    return _C


def why_missing() -> str:
    """Say why there is no compiled module; an empty string where there is one."""
    if _C is not None:
        return ""
    package = Path(__file__).parents[1]
    report = package / "_build.json"
    missing = json.loads(report.read_text())["missing"] if report.is_file() else ""
    if missing:
        return f"the compiled kernels were left out when this package was built: {missing}"
    if _import_error and "_C" not in _import_error:  # not "No module named 'orepa_kernels._C'", which is to be expected
        return f"the compiled kernels cannot be loaded: {_import_error}"
    if IN_SOURCE_TREE:
        return (
            f"{package} is a source folder without compiled kernels: run `pip install -e .` there, or start "
            "Python elsewhere to use an installed package"
        )
    return "the compiled kernels are not built: run `pip install .` (or `pip install -e .`) in the source folder"


def supports_block(block: Block) -> Support:
    """Return whether csrc/squeeze.h can describe a block."""
    most = module().max_terms
    if block.most_terms <= most:
        return SUPPORTED
    return Support(False, f"the block has {block.most_terms} terms, more than {most}")


def build() -> dict[str, Any]:
    """Return how the compiled module was built and what it uses here; or, under ``missing``, why it is not here."""
    if _C is None:
        return {"missing": why_missing()}
    facts = {**_C.build(), "cpu_instruction_set": _C.cpu_instruction_set()}
    if hasattr(_C, "cuda_architectures"):
        facts["cuda_architectures"] = sorted(_C.cuda_architectures())
    return facts


def plan(block: Block) -> Any:
    """Return a flat block (see `orepa_kernels.nested`) as the compiled module's ``Plan``."""
    slots = {operand.name: index for index, operand in enumerate(block.operands)}

    def slot(factor: Operand | Block | Average | None) -> int:
        return slots[factor.name] if isinstance(factor, Operand) else -1

    terms = []
    for term in block.terms:
        kind, a, b, first_size, inner = _fields(block, term)
        identity = isinstance(term, Composed) and term.identity
        scale = -1 if term.scale is None else term.scale
        terms.append((kind, scale, term_kernel_size(term), first_size, inner, identity, slot(a), slot(b)))
    return module().Plan(
        block.out_channels,
        block.in_channels // block.groups,
        block.groups,
        block.kernel_size,
        terms,
        slot(block.scales),
        len(block.operands),
    )


_Factor: TypeAlias = "Operand | Block | Average | None"


def _fields(block: Block, term: Term) -> tuple[int, _Factor, _Factor, tuple[int, int], int]:
    """Kind, factors a and b, size of the first, and inner channels, as csrc/squeeze.h has them."""
    if isinstance(term, Dense):
        return 0, term.weight, None, (1, 1), 0
    if isinstance(term, PointwiseFilter):
        return 1, term.pointwise, term.filter, (1, 1), 0
    if isinstance(term, Composed):
        return 2, term.first, term.second, kernel_size_of(term.first), term.first.shape[0] // block.groups
    return 3, term.depthwise, term.pointwise, (1, 1), term.depthwise.shape[0] // block.in_channels


# --- tensors as views ---------------------------------------------------------------------------------------------------


class PackedOperands:
    """Packs the operands of a block as views. From call to call only addresses change.

    Args:
        layouts: of the operands.
    """

    def __init__(self, layouts: Sequence[Layout]) -> None:
        self._copied = [not _is_collapsed(layout) for layout in layouts]
        self._copies = any(self._copied)
        self._template = _template(
            [_like(layout, copied) for layout, copied in zip(layouts, self._copied, strict=True)]
        )

    def pack(self, tensors: Sequence[Tensor]) -> tuple[Sequence[Tensor], Views]:
        """Return the views, and the tensors that they point into: keep those until the call is over."""
        if self._copies:
            tensors = [t.contiguous() if copy else t for t, copy in zip(tensors, self._copied, strict=True)]
        numbers = self._template.copy()
        numbers[::_FIELDS] = map(Tensor.data_ptr, tensors)
        return tensors, numbers


class PackedGradients:
    """Packs where kernels write the gradients of a block's operands. From call to call only addresses change.

    Args:
        block: the plan.
        gradients: such as those of later calls; None for an operand whose gradient is not needed.
        compute: the dtype that kernels compose in.
    """

    def __init__(self, block: Block, gradients: Gradients, compute: torch.dtype) -> None:
        targets = [None if gradient is None else layout_of(gradient) for gradient in gradients]
        #: by operand, what the kernels write in place of a gradient that no view describes
        self._buffers = {
            index: _like(target, True) for index, target in enumerate(targets) if target and not _is_collapsed(target)
        }
        scales, last = block.scales, len(gradients) - 1
        if scales is not None and scales.shape[1] != block.out_channels and gradients[last] is not None:
            # Scalar scaling; scales are the last operand. Kernels write a column per output channel, to be added up.
            shape = (scales.shape[0], block.out_channels)
            self._buffers[last] = Layout.dense(shape, compute, torch.contiguous_format)
        self._template = _template([self._buffers.get(index, target) for index, target in enumerate(targets)])

    def pack(self, gradients: Gradients) -> tuple[dict[int, Tensor], Views]:
        """Return new buffers to `copy_back` from, and the views of what kernels write."""
        numbers = self._template.copy()
        numbers[::_FIELDS] = [0 if gradient is None else gradient.data_ptr() for gradient in gradients]
        buffers = {}
        for index, layout in self._buffers.items():
            gradient = gradients[index]
            assert gradient is not None
            buffers[index] = torch.empty(layout.shape, dtype=layout.dtype, device=gradient.device)
            numbers[_FIELDS * index] = buffers[index].data_ptr()
        return buffers, numbers

    @staticmethod
    def copy_back(gradients: Gradients, buffers: dict[int, Tensor]) -> None:
        """Bring what kernels wrote to buffers to the gradients."""
        for index, buffer in buffers.items():
            gradient = gradients[index]
            assert gradient is not None
            gradient.copy_(buffer if buffer.shape == gradient.shape else buffer.sum(1, keepdim=True))


def collapsed(tensor: Tensor) -> Tensor:
    """Return the tensor itself, or a contiguous copy where its taps are not evenly spaced."""
    return tensor if _is_collapsed(layout_of(tensor)) else tensor.contiguous()


def view(tensor: Tensor) -> Views:
    """Return one collapsed tensor as a view."""
    return [tensor.data_ptr(), *steps(layout_of(tensor))]


def _is_collapsed(layout: Layout) -> bool:
    """Whether the taps are evenly spaced in memory, which a view needs."""
    strides = layout.stride
    if len(strides) < 3:
        return True
    height, width = layout.shape[-2:]
    return height == 1 or width == 1 or strides[-2] == width * strides[-1]


def _like(layout: Layout, contiguous: bool) -> Layout:
    """The layout itself, or that of a contiguous copy."""
    if not contiguous:
        return layout
    return Layout.dense(layout.shape, layout.dtype, torch.contiguous_format)


def steps(layout: Layout) -> tuple[int, int, int, int]:
    """Return type, and strides of rows, columns and taps: of a kernel, a filter ``[1|O, kh, kw]`` or scales ``[B, 1|O]``.

    A dimension of one that stands for all has the stride 0.
    """
    shape, strides = layout.shape, layout.stride
    row, column, tap = strides[0], 0, 0
    if len(strides) == 4:
        column, tap = strides[1], strides[2] if shape[3] == 1 else strides[3]
    elif len(strides) == 3:
        row, tap = row if shape[0] > 1 else 0, strides[1] if shape[2] == 1 else strides[2]
    elif len(strides) == 2:
        column = strides[1] if shape[1] > 1 else 0
    return TYPES[layout.dtype], row, column, tap


def _template(layouts: Sequence[Layout | None]) -> Views:
    """Views without addresses."""
    numbers: Views = []
    for layout in layouts:
        numbers += _ABSENT if layout is None else (0, *steps(layout))
    return numbers
