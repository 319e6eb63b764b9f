"""The compiled module `orepa_kernels._C`: whether it is here, and how plans and tensors reach it."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor

from ..plan import Average, Block, Composed, Dense, Operand, PointwiseFilter, Term, kernel_size_of, term_kernel_size
from .base import YES, Verdict

_import_error = ""
try:
    from .. import _C  # type: ignore[attr-defined]
except ImportError as error:
    _C, _import_error = None, str(error)

#: whether this package is imported from a clone, where it hides an installed one
IN_SOURCE_TREE = (Path(__file__).resolve().parents[2] / "csrc").is_dir()

#: numbers of the element types, as in csrc/squeeze.h
TYPES = {torch.float64: 0, torch.float32: 1, torch.bfloat16: 2, torch.float16: 3}

#: five numbers per tensor: address, type, strides of rows, columns and taps
Views = list[int]

_ABSENT = (0, 1, 0, 0, 0)
_FIELDS = len(_ABSENT)


def module() -> ModuleType:
    """The compiled module.

    Raises:
        RuntimeError: it is not here; see `why_missing`.
    """
    if _C is None:
        raise RuntimeError(why_missing())
    return _C


def why_missing() -> str:
    """Why there is no compiled module, or an empty string where there is one."""
    if _C is not None:
        return ""
    report = Path(__file__).parents[1] / "_build.json"
    missing = json.loads(report.read_text())["missing"] if report.is_file() else ""
    if missing:
        return f"the compiled kernels were left out when this package was built: {missing}"
    if _import_error and "_C" not in _import_error:  # not "cannot import name '_C'", which is to be expected
        return f"the compiled kernels cannot be loaded: {_import_error}"
    if IN_SOURCE_TREE:
        return (
            f"{Path(__file__).parents[1]} is a source folder without compiled kernels: run `pip install -e .` there, or start "
            "Python elsewhere to use an installed package"
        )
    return "the compiled kernels are not built: run `pip install .` (or `pip install -e .`) in the source folder"


def covers(block: Block) -> Verdict:
    """Whether csrc/squeeze.h can describe a block."""
    most = module().max_terms
    if block.most_terms <= most:
        return YES
    return Verdict(False, f"the block has {block.most_terms} terms, more than {most}")


def build() -> dict[str, Any]:
    """How the compiled module was built and what it uses here; or, under ``missing``, why it is not here."""
    if _C is None:
        return {"missing": why_missing()}
    facts = {**_C.build(), "cpu_instruction_set": _C.cpu_instruction_set()}
    if hasattr(_C, "cuda_architectures"):
        facts["cuda_architectures"] = sorted(_C.cuda_architectures())
    return facts


@functools.lru_cache(maxsize=4096)
def plan(block: Block) -> Any:
    """A flat block (see `orepa_kernels.nested`) as the compiled module's ``Plan``."""
    places = {operand.name: index for index, operand in enumerate(block.operands)}

    def place(factor: Operand | Block | Average | None) -> int:
        return places[factor.name] if isinstance(factor, Operand) else -1

    terms = []
    for term in block.terms:
        kind, a, b, first_size, inner = _parts(block, term)
        identity = isinstance(term, Composed) and term.identity
        scale = -1 if term.scale is None else term.scale
        terms.append((kind, scale, term_kernel_size(term), first_size, inner, identity, place(a), place(b)))
    return module().Plan(
        block.out_channels,
        block.in_channels // block.groups,
        block.groups,
        block.kernel_size,
        terms,
        place(block.scales),
        len(block.operands),
    )


_Factor: TypeAlias = "Operand | Block | Average | None"


def _parts(block: Block, term: Term) -> tuple[int, _Factor, _Factor, tuple[int, int], int]:
    """Kind, factors a and b, size of the first, and inner channels, as csrc/squeeze.h has them."""
    if isinstance(term, Dense):
        return 0, term.weight, None, (1, 1), 0
    if isinstance(term, PointwiseFilter):
        return 1, term.pointwise, term.filter, (1, 1), 0
    if isinstance(term, Composed):
        return 2, term.first, term.second, kernel_size_of(term.first), term.first.shape[0] // block.groups
    return 3, term.depthwise, term.pointwise, (1, 1), term.depthwise.shape[0] // block.in_channels


def is_collapsed(tensor: Tensor) -> bool:
    """Whether the taps are evenly spaced in memory, which a `view` needs."""
    strides = tensor.stride()
    if len(strides) < 3:
        return True
    height, width = tensor.shape[-2:]
    return height == 1 or width == 1 or strides[-2] == width * strides[-1]


def collapsed(tensor: Tensor) -> Tensor:
    """The tensor itself, or a contiguous copy where no `view` could describe it."""
    return tensor if is_collapsed(tensor) else tensor.contiguous()


def described(block: Block, tensors: Sequence[Tensor]) -> tuple[Sequence[Tensor], Views]:
    """The operands of a block, collapsed, and their views, one after the other."""
    return _with_views(block, tensors, collapsed)


def described_again(
    block: Block, tensors: Sequence[Tensor]
) -> Callable[[Sequence[Tensor]], tuple[Sequence[Tensor], Views]]:
    """`described` for operands that look like these (`orepa_kernels.guards`)."""
    used, template = described(block, tensors)
    if used is not tensors:
        return lambda own: described(block, own)
    return lambda own: (own, _at_addresses(template, own))


def places(
    block: Block, gradients: Sequence[Tensor | None], compute: torch.dtype
) -> tuple[Sequence[Tensor | None], Views]:
    """Where kernels that compose in ``compute`` write the gradients of a block's operands, and the views of those places.

    `hand_over` brings what they wrote to the gradients.
    """
    scales = block.scales
    if scales is not None and scales.shape[1] != block.out_channels and gradients[-1] is not None:
        # Scalar scaling; scales are the last operand. Kernels write a column per output channel, to be added up.
        per_channel = torch.empty(scales.shape[0], block.out_channels, dtype=compute, device=gradients[-1].device)
        gradients = [*gradients[:-1], per_channel]
    return _with_views(block, gradients, writable)


def writable(gradient: Tensor) -> Tensor:
    """The tensor itself, or new contiguous memory to be copied from where no `view` could describe it."""
    if is_collapsed(gradient):
        return gradient
    return torch.empty(gradient.shape, dtype=gradient.dtype, device=gradient.device)


#: views without their addresses, of operands and gradients that `view` can describe as they are
_templates: dict[tuple[Any, ...], Views] = {}
_MOST_TEMPLATES = 1 << 14

_MaybeTensor = TypeVar("_MaybeTensor", Tensor, "Tensor | None")


def _with_views(
    block: Block, tensors: Sequence[_MaybeTensor], described_as: Callable[[Tensor], Tensor]
) -> tuple[Sequence[_MaybeTensor], Views]:
    """`views` of ``described_as`` of the tensors. From step to step only addresses change, the rest is kept."""
    key = (
        block,
        described_as,
        tuple([None if tensor is None else tensor.stride() for tensor in tensors]),
        tuple([None if tensor is None else tensor.dtype for tensor in tensors]),
    )
    template = _templates.get(key)
    if template is not None:
        return tensors, _at_addresses(template, tensors)
    used = [None if tensor is None else described_as(tensor) for tensor in tensors]
    numbers = views(used)
    if all(mine is given for mine, given in zip(used, tensors, strict=True)):
        if len(_templates) >= _MOST_TEMPLATES:
            _templates.clear()
        _templates[key] = numbers.copy()
    return used, numbers


def _at_addresses(template: Views, tensors: Sequence[Tensor | None]) -> Views:
    numbers = template.copy()
    numbers[::_FIELDS] = [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
    return numbers


def hand_over(gradients: Sequence[Tensor | None], written: Sequence[Tensor | None]) -> None:
    """Copy what the kernels wrote to where it belongs, the other half of `places`."""
    for gradient, buffer in zip(gradients, written, strict=True):
        if gradient is not None and buffer is not None and gradient is not buffer:
            gradient.copy_(buffer if buffer.shape == gradient.shape else buffer.sum(1, keepdim=True))


def view(tensor: Tensor | None) -> Sequence[int]:
    """A collapsed tensor as five numbers: a kernel, a filter ``[1|O, kh, kw]``, scales ``[B, 1|O]`` or a vector ``[O]``.

    A dimension of one that stands for all has the stride 0.
    """
    if tensor is None:
        return _ABSENT
    strides = tensor.stride()
    rank = len(strides)
    row, column, tap = strides[0], 0, 0
    if rank == 4:
        column, tap = strides[1], strides[2] if tensor.shape[3] == 1 else strides[3]
    elif rank == 3:
        rows, _, width = tensor.shape
        row, tap = row if rows > 1 else 0, strides[1] if width == 1 else strides[2]
    elif rank == 2:
        column = strides[1] if tensor.shape[1] > 1 else 0
    return tensor.data_ptr(), TYPES[tensor.dtype], row, column, tap


def views(tensors: Iterable[Tensor | None]) -> Views:
    """All of them, one after the other."""
    numbers: Views = []
    for tensor in tensors:
        numbers += view(tensor)
    return numbers
