"""What a Triton kernel is specialised on: the structure of a block, without its sizes and addresses.

Blocks of one `Spec` share a launch. The compiler knows everything in a `Spec`, and drops the branches that a block lacks;
sizes, strides and addresses are read from tables (see `orepa_kernels.backends.triton.tile_map`).
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from ... import plan
from ...plan import Block, Operand

#: largest offset that 32-bit arithmetic reaches
_INT32 = 2**31 - 1

DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float64: "float64"}

#: the slot of a tensor that does not exist
ABSENT = -1


@dataclass(frozen=True)
class View:
    """What the compiler knows of one tensor, whose dimensions are (row, column, y, x).

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
    """One branch of paper Eq. 4. A slot is a tensor's index in `Spec.views`.

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
        d_weight, ...: slots of their gradients.
        filter_rows: whether each output channel has a filter; else one serves all.
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
    filter_rows: bool = True


@dataclass(frozen=True)
class Spec:
    """The structure of a block and of its tensors: the constant that every kernel is specialised on.

    Args:
        height, width: of the kernel.
        terms: the branches.
        views: the tensor of each slot: the operands in plan order, then the kernel (forward), or the upstream gradient and the
            gradients (backward).
        in_multiple: a power of two, at most 16, that divides ``I/g``.
        wide: whether offsets within a tensor need 64 bits.
        scalar: whether ``scales`` is ``[B, 1]``.
        scales, d_scales, kernel, upstream: slots.
        batched: whether addresses come from a table (several blocks) or as arguments (one).
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
    upstream: int
    batched: bool = False

    def needs_scale_gradient(self, term: Term) -> bool:
        """Return whether a term has a scale whose gradient is asked for."""
        return self.d_scales != ABSENT and term.scale != ABSENT

    def needs_gradient(self, term: Term) -> bool:
        """Return whether the gradient of any factor of a term, or of its scale, is asked for."""
        slots = (term.d_weight, term.d_pointwise, term.d_filter, term.d_first, term.d_second, term.d_depthwise)
        return self.needs_scale_gradient(term) or any(slot != ABSENT for slot in slots)

    @property
    def half(self) -> bool:
        """Whether the kernel, or its upstream gradient, is in half precision."""
        return self.views[max(self.kernel, self.upstream)].dtype in ("bfloat16", "float16")

    @functools.cached_property
    def digest(self) -> str:
        """A name that is the same in every process, for Triton's caches and symbols."""
        values = tuple(getattr(self, field.name) for field in fields(self))
        return hashlib.sha256(repr(values).encode()).hexdigest()[:16]

    def __repr__(self) -> str:
        return f"Spec_{self.digest}"


def forward_spec(block: Block, operands: Sequence[Tensor], kernel: Tensor) -> Spec:
    """Return the structure of a forward launch."""
    return _spec(block, [*operands, kernel], {}, kernel=len(operands))


def backward_spec(
    block: Block, operands: Sequence[Tensor], upstream: Tensor, gradients: Sequence[Tensor | None]
) -> Spec:
    """Return the structure of a backward launch; ``gradients`` has None for each operand whose gradient is not asked for."""
    tensors, slots = [*operands, upstream], {}
    for operand, gradient in zip(block.operands, gradients, strict=True):
        if gradient is not None:
            slots[operand.name] = len(tensors)
            tensors.append(gradient)
    return _spec(block, tensors, slots, upstream=len(operands))


def strides(tensor: Tensor) -> tuple[int, int, int, int]:
    """Return a tensor's strides over (row, column, y, x); 0 for a dimension of size 1."""
    steps = [0 if size == 1 else stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)]
    if len(steps) == 3:  # a filter has no columns
        steps.insert(1, 0)
    a, b, c, d = (*steps, 0, 0, 0)[:4]
    return a, b, c, d


def multiple(*values: int) -> int:
    """Return the largest of 16, 8, 4 and 1 that divides all values."""
    return next(m for m in (16, 8, 4, 1) if all(value % m == 0 for value in values))


def _view(tensor: Tensor) -> View:
    steps = strides(tensor)
    unit = steps.index(1) if 1 in steps else -1
    others = [step for dim, step in enumerate(steps) if dim != unit]
    return View(DTYPES[tensor.dtype], unit, multiple(*others), tensor.data_ptr() % 16 == 0)


def _span(tensor: Tensor) -> int:
    return sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def _spec(
    block: Block, tensors: Sequence[Tensor], gradients: dict[str, int], *, kernel: int = ABSENT, upstream: int = ABSENT
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
        upstream=upstream,
    )


def _term(block: Block, term: plan.Term, slots: dict[str, int], gradients: dict[str, int]) -> Term:
    height, width = plan.term_kernel_size(term)
    values: dict[str, Any] = {
        "scale": ABSENT if term.scale is None else term.scale,
        "height": height,
        "width": width,
        "top": (block.kernel_size[0] - height) // 2,
        "left": (block.kernel_size[1] - width) // 2,
    }
    factors: dict[str, object]
    if isinstance(term, plan.Dense):
        kind, factors = "dense", {"weight": term.weight}
    elif isinstance(term, plan.PointwiseFilter):
        kind, factors = "pointwise", {"pointwise": term.pointwise, "filter": term.filter}
        values["filter_rows"] = isinstance(term.filter, plan.Average) or term.filter.shape[0] > 1
    elif isinstance(term, plan.Composed):
        kind, factors = "composed", {"first": term.first, "second": term.second}
        internal, per_group = term.first.shape[0] // block.groups, block.in_channels // block.groups
        values["height1"], values["width1"] = plan.kernel_size_of(term.first)
        values["height2"], values["width2"] = plan.kernel_size_of(term.second)
        values["internal_multiple"] = multiple(internal)
        values["repeats"] = internal // per_group if term.identity else 0
    else:
        assert isinstance(term, plan.Separable)
        values["expand"] = term.depthwise.shape[0] // block.in_channels
        if term.pointwise is None:  # one filter per output channel, on one input channel: a filter without a pointwise
            kind, factors = "pointwise", {"filter": term.depthwise}
        else:
            kind, factors = "separable", {"depthwise": term.depthwise, "pointwise": term.pointwise}
    for name, factor in factors.items():
        if isinstance(factor, Operand):
            values |= {name: slots[factor.name], f"d_{name}": gradients.get(factor.name, ABSENT)}
    return Term(kind, **values)
