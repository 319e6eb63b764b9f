"""What a Triton kernel is compiled for: the structure of a block, without its sizes and addresses.

Blocks of one `Spec` share a launch. Everything in a `Spec` is known to the compiler, which so drops the branches that a
block lacks; sizes, strides and addresses are read from a table (see `orepa_kernels.backends.triton.tile_map`).
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from ...plan import (
    Average,
    Block,
    Composed,
    Dense,
    Operand,
    PointwiseFilter,
    Separable,
    kernel_size_of,
    term_kernel_size,
)
from ...plan import Term as PlanTerm

#: offsets beyond this need 64-bit arithmetic
_INT32 = 2**31 - 1

DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float64: "float64"}

#: the slot of a tensor that is not there
ABSENT = -1


@dataclass(frozen=True)
class View:
    """One tensor, as far as the compiler should know it. Its dimensions are (row, column, y, x).

    Args:
        dtype: name in ``triton.language``.
        unit: the dimension whose stride is one, or -1.
        multiple: a power of two, at most 16, that divides all other strides.
        aligned: whether its address is a multiple of 16 bytes.
    """

    dtype: str
    unit: int
    multiple: int
    aligned: bool


@dataclass(frozen=True)
class Term:
    """One branch of paper Eq. 4. Tensors are slots, numbers of a `Spec`'s views; a name with ``d_`` is a gradient's slot.

    Args:
        kind: ``"dense"``, ``"pointwise"`` (times a filter), ``"composed"`` or ``"separable"``.
        scale: row of the block's scales, or -1.
        height, width: of the term's kernel.
        top, left: where it begins in the block's.
        expand: depthwise rows per input channel. Where ``pointwise`` is absent, output channel ``o`` of its group has one
            input, ``o // expand mod I/g``: the identity, or a depthwise convolution alone.
        repeats: how often the identity fits into the internal channels that it is added to; 0 for no identity.
        height1, width1, height2, width2: of the factors of ``"composed"``.
        internal_multiple: a power of two, at most 16, that divides the internal channels per group.
        weight, pointwise, filter, first, second, depthwise: slots of the factors.
    """

    kind: str
    scale: int
    height: int
    width: int
    top: int
    left: int
    expand: int = 1
    repeats: int = 0
    height1: int = 1
    width1: int = 1
    height2: int = 1
    width2: int = 1
    internal_multiple: int = 1
    weight: int = ABSENT
    pointwise: int = ABSENT
    filter: int = ABSENT
    first: int = ABSENT
    second: int = ABSENT
    depthwise: int = ABSENT
    d_weight: int = ABSENT
    d_pointwise: int = ABSENT
    d_filter: int = ABSENT
    d_first: int = ABSENT
    d_second: int = ABSENT
    d_depthwise: int = ABSENT
    filter_rows: bool = True  # one filter per output channel; else one for all

    @property
    def wanted(self) -> bool:
        """Whether the gradient of any factor is asked for."""
        slots = (self.d_weight, self.d_pointwise, self.d_filter, self.d_first, self.d_second, self.d_depthwise)
        return any(slot != ABSENT for slot in slots)


@dataclass(frozen=True)
class Spec:
    """The structure of a block and of its tensors; the constant that every kernel is specialised on.

    Args:
        height, width: of the kernel.
        terms: the branches.
        views: per slot one tensor: the operands in plan order, then the kernel and the fold (forward), or the upstream
            gradient and the gradients (backward).
        in_multiple: a power of two, at most 16, that divides ``I/g``.
        wide: whether offsets within a tensor need 64 bits.
        scalar: whether ``scales`` is ``[B, 1]``.
        scales, d_scales, kernel, fold, upstream: slots.
        listed: whether addresses come from a table (several blocks) or as arguments (one).
    """

    height: int
    width: int
    terms: tuple[Term, ...]
    views: tuple[View, ...]
    in_multiple: int
    wide: bool
    scalar: bool
    scales: int
    d_scales: int
    kernel: int
    fold: int
    upstream: int
    listed: bool = False

    @functools.cached_property
    def digest(self) -> str:
        """A name that is the same in every process: Triton's caches and symbols are named by it."""
        values = tuple(getattr(self, field.name) for field in fields(self))
        return hashlib.sha256(repr(values).encode()).hexdigest()[:16]

    def __repr__(self) -> str:
        return f"Spec_{self.digest}"


def forward_spec(block: Block, operands: Sequence[Tensor], kernel: Tensor, fold: Tensor | None) -> Spec:
    """The structure of a forward launch."""
    tensors = [*operands, kernel] if fold is None else [*operands, kernel, fold]
    count = len(operands)
    return _spec(block, tensors, {}, kernel=count, fold=ABSENT if fold is None else count + 1)


def backward_spec(
    block: Block, operands: Sequence[Tensor], upstream: Tensor, gradients: Sequence[Tensor | None]
) -> Spec:
    """The structure of a backward launch; ``gradients`` has None for each operand whose gradient is not asked for."""
    tensors, slots = [*operands, upstream], {}
    for operand, gradient in zip(block.operands, gradients, strict=True):
        if gradient is not None:
            slots[operand.name] = len(tensors)
            tensors.append(gradient)
    return _spec(block, tensors, slots, upstream=len(operands))


def strides(tensor: Tensor) -> tuple[int, int, int, int]:
    """Strides over (row, column, y, x); 0 where there is nothing to step over."""
    steps = [0 if size == 1 else stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)]
    if len(steps) == 3:  # a filter has no columns
        steps.insert(1, 0)
    a, b, c, d = (*steps, 0, 0, 0)[:4]
    return a, b, c, d


def multiple(*values: int) -> int:
    """The largest of 16, 8, 4 and 1 that divides all values."""
    return next(m for m in (16, 8, 4, 1) if all(value % m == 0 for value in values))


def _view(tensor: Tensor) -> View:
    steps = strides(tensor)
    unit = steps.index(1) if 1 in steps else -1
    others = [step for dim, step in enumerate(steps) if dim != unit]
    return View(DTYPES[tensor.dtype], unit, multiple(*others), tensor.data_ptr() % 16 == 0)


def _span(tensor: Tensor) -> int:
    return sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def _spec(
    block: Block,
    tensors: Sequence[Tensor],
    gradients: dict[str, int],
    kernel: int = ABSENT,
    fold: int = ABSENT,
    upstream: int = ABSENT,
) -> Spec:
    slots = {operand.name: slot for slot, operand in enumerate(block.operands)}
    scales = block.scales
    return Spec(
        height=block.kernel_size[0],
        width=block.kernel_size[1],
        terms=tuple(_term(block, term, slots, gradients) for term in block.terms),
        views=tuple(_view(tensor) for tensor in tensors),
        in_multiple=multiple(block.in_channels // block.groups),
        wide=any(_span(tensor) > _INT32 for tensor in tensors),
        scalar=scales is not None and scales.shape[1] == 1,
        scales=ABSENT if scales is None else slots[scales.name],
        d_scales=ABSENT if scales is None else gradients.get(scales.name, ABSENT),
        kernel=kernel,
        fold=fold,
        upstream=upstream,
    )


def _term(block: Block, term: PlanTerm, slots: dict[str, int], gradients: dict[str, int]) -> Term:
    def slot(name: str, factor: object) -> dict[str, Any]:
        if not isinstance(factor, Operand):
            return {}
        return {name: slots[factor.name], f"d_{name}": gradients.get(factor.name, ABSENT)}

    height, width = term_kernel_size(term)
    scale = ABSENT if term.scale is None else term.scale
    top, left = (block.kernel_size[0] - height) // 2, (block.kernel_size[1] - width) // 2
    place = (scale, height, width, top, left)
    if isinstance(term, Dense):
        return Term("dense", *place, **slot("weight", term.weight))
    if isinstance(term, PointwiseFilter):
        rows = isinstance(term.filter, Average) or term.filter.shape[0] > 1
        factors = {**slot("pointwise", term.pointwise), **slot("filter", term.filter)}
        return Term("pointwise", *place, filter_rows=rows, **factors)
    if isinstance(term, Composed):
        (height1, width1), (height2, width2) = kernel_size_of(term.first), kernel_size_of(term.second)
        internal, per_group = term.first.shape[0] // block.groups, block.in_channels // block.groups
        return Term(
            "composed",
            *place,
            repeats=internal // per_group if term.identity else 0,
            height1=height1,
            width1=width1,
            height2=height2,
            width2=width2,
            internal_multiple=multiple(internal),
            **{**slot("first", term.first), **slot("second", term.second)},
        )
    assert isinstance(term, Separable)
    expand = term.depthwise.shape[0] // block.in_channels
    if (
        term.pointwise is None
    ):  # one filter per output channel, on one input channel: a pointwise term without a pointwise
        return Term("pointwise", *place, expand=expand, **slot("filter", term.depthwise))
    return Term(
        "separable",
        *place,
        expand=expand,
        **{**slot("depthwise", term.depthwise), **slot("pointwise", term.pointwise)},
    )
