"""The mathematics of the squeeze in plain PyTorch: the ground truth that every other backend is held against.

Differentiable to any order, and exact in float64. Every function takes and returns kernels in the layout of
``torch.nn.functional.conv2d`` weights, ``[O, I/g, kh, kw]``.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from .plan import Average, Block, Composed, Dense, Operand, PointwiseFilter, Size, Term, check_alignment


def squeeze_block(block: Block, tensors: Mapping[str, Tensor]) -> Tensor:
    """Squeeze one block: the sum of its scaled, centre-aligned terms (paper Eq. 4).

    Args:
        block: the plan.
        tensors: one per operand of ``block``, by name, all of the dtype to compute in.

    Returns:
        ``[O, I/g, kh, kw]`` in that dtype.
    """
    total: Tensor | None = None
    for term in block.terms:
        kernel = term_kernel(block, term, tensors)
        if term.scale is not None and block.scales is not None:
            kernel = kernel * tensors[block.scales.name][term.scale].view(-1, 1, 1, 1)
        kernel = align(kernel, block.kernel_size)
        total = kernel if total is None else total + kernel
    assert total is not None  # a Block has at least one term
    return total


def term_kernel(block: Block, term: Term, tensors: Mapping[str, Tensor]) -> Tensor:
    """The kernel of one term, ``[O, I/g, kh, kw]`` of the term's own size, unscaled."""

    def value(source: Operand | Block) -> Tensor:
        return squeeze_block(source, tensors) if isinstance(source, Block) else tensors[source.name]

    per_group = block.in_channels // block.groups
    if isinstance(term, Dense):
        return value(term.weight)
    if isinstance(term, PointwiseFilter):
        if term.pointwise is None:
            pointwise = identity(block.out_channels, per_group, next(iter(tensors.values()), None))
        else:
            pointwise = value(term.pointwise)
        if isinstance(term.filter, Average):
            return average(pointwise, term.filter.kernel_size)
        return pointwise * value(term.filter).unsqueeze(1)
    if isinstance(term, Composed):
        first = value(term.first)
        if term.identity:
            first = first + identity(first.shape[0], per_group, first)
        return compose(first, value(term.second), block.groups)
    depthwise = value(term.depthwise)
    if term.pointwise is None:
        return expand_depthwise(depthwise, block.in_channels, block.groups)
    return separable(depthwise, value(term.pointwise), block.in_channels, block.groups)


def align(kernel: Tensor, kernel_size: Size) -> Tensor:
    """Zero-pad ``kernel`` so that it sits at the centre of a ``kernel_size`` one.

    Raises:
        ValueError: the difference is odd or negative in some dimension.
    """
    kh, kw = kernel.shape[-2:]
    if (kh, kw) == tuple(kernel_size):
        return kernel
    check_alignment((kh, kw), kernel_size)
    ph, pw = (kernel_size[0] - kh) // 2, (kernel_size[1] - kw) // 2
    return F.pad(kernel, (pw, pw, ph, ph))


def compose(first: Tensor, second: Tensor, groups: int = 1) -> Tensor:
    """``(second o first)[o,i,p] = sum_m sum_q second[o,m,q] * first[m,i,p-q]`` (paper Eq. 3), fully padded.

    A true convolution: one factor is flipped against the cross-correlation of ``conv2d``. Groups compose
    block-diagonally. Written with matrix products, so that ``torch.get_float32_matmul_precision()`` governs it.

    Args:
        first: ``[M, I/g, kh1, kw1]``, the layer nearer to the input.
        second: ``[O, M/g, kh2, kw2]``.

    Returns:
        ``[O, I/g, kh1+kh2-1, kw1+kw2-1]``.
    """
    (internal, per_group, h1, w1), (out, _, h2, w2) = first.shape, second.shape
    h, w = h1 + h2 - 1, w1 + w2 - 1
    a = first.reshape(groups, internal // groups, per_group, h1, w1)
    b = second.reshape(groups, out // groups, internal // groups, h2, w2)
    if (h1, w1) == (1, 1):
        kernel = torch.einsum("gomhw,gmi->goihw", b, a[..., 0, 0])
    elif (h2, w2) == (1, 1):
        kernel = torch.einsum("gom,gmihw->goihw", b[..., 0, 0], a)
    else:
        # Every output tap p gathers the taps of `first` that a flipped `second`, centred on it, covers.
        padded = F.pad(first.transpose(0, 1), (w2 - 1, w2 - 1, h2 - 1, h2 - 1))
        taps = F.unfold(padded, (h2, w2)).reshape(per_group, groups, (internal // groups) * h2 * w2, h * w)
        kernel = torch.einsum("gom,igmp->goip", b.flip((3, 4)).flatten(2), taps)
    return kernel.reshape(out, per_group, h, w)


def separable(depthwise: Tensor, pointwise: Tensor, in_channels: int, groups: int = 1) -> Tensor:
    """``K[o,i,p] = sum_e pointwise[o, i*E+e] * depthwise[i*E+e, p]``, with ``i`` local to its group.

    Args:
        depthwise: ``[I*E, 1, kh, kw]``.
        pointwise: ``[O, I/g*E, 1, 1]``.

    Returns:
        ``[O, I/g, kh, kw]``.
    """
    expanded, _, kh, kw = depthwise.shape
    out, per_group, expand = pointwise.shape[0], in_channels // groups, expanded // in_channels
    dw = depthwise.reshape(groups, per_group, expand, kh * kw)
    pw = pointwise.reshape(groups, out // groups, per_group, expand)
    return torch.einsum("goie,giep->goip", pw, dw).reshape(out, per_group, kh, kw)


def expand_depthwise(depthwise: Tensor, in_channels: int, groups: int = 1) -> Tensor:
    """A depthwise kernel ``[I*E, 1, kh, kw]`` written as a (grouped) one, ``[I*E, I/g, kh, kw]``."""
    per_group = in_channels // groups
    select = torch.eye(per_group, dtype=depthwise.dtype, device=depthwise.device)
    select = select.repeat_interleave(depthwise.shape[0] // in_channels, 0).repeat(groups, 1)
    return select[:, :, None, None] * depthwise


def average(pointwise: Tensor, kernel_size: Size) -> Tensor:
    """Average pooling after (or before) a pointwise convolution: ``[O, I/g, 1, 1]`` to ``[O, I/g, kh, kw]``."""
    if tuple(kernel_size) == (1, 1):
        return pointwise
    kh, kw = kernel_size
    return (pointwise / (kh * kw)).expand(-1, -1, kh, kw)


def identity(out_channels: int, in_per_group: int, like: Tensor | None = None) -> Tensor:
    """``id[o, o mod I/g] = 1``: the 1x1 identity, stacked where there are more output channels. ``[O, I/g, 1, 1]``."""
    dtype, device = (None, None) if like is None else (like.dtype, like.device)
    eye = torch.eye(in_per_group, dtype=dtype, device=device)
    return eye.repeat(out_channels // in_per_group, 1)[:, :, None, None]
