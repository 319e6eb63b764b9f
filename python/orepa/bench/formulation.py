"""The blocks of the paper as a user would write them: one einsum per branch. This is the baseline, so it is no tuned code."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from orepa_kernels import Block
from orepa_kernels.reference import identity, squeeze_block

Operands = Mapping[str, Tensor]


def kxk(p: Operands, groups: int) -> Tensor:
    """The `orepa` block, and `repvgg_dense`, which lacks the 1x1 branch (paper Eq. 4).

    Returns:
        ``[O, I/g, k, k]``, contiguous, of the operands' dtype.
    """
    scales = p["scales"]
    o, per_group, kh, kw = p["origin_weight"].shape
    mean = p["origin_weight"].new_full((kh, kw), 1 / (kh * kw))

    origin = torch.einsum("oihw,o->oihw", p["origin_weight"], scales[0])
    avg = torch.einsum("oi,hw,o->oihw", p["avg_weight"].flatten(1), mean, scales[1])
    prior = torch.einsum("oi,ohw,o->oihw", p["prior_weight"].flatten(1), p["prior_filter"], scales[2])

    first, second = p["conv1x1_kxk_conv1"], p["conv1x1_kxk_conv2"]
    first = (first + identity(first.shape[0], per_group, first)).reshape(groups, -1, per_group)
    second = second.reshape(groups, o // groups, -1, kh, kw)
    sequence = torch.einsum("gti,gothw->goihw", first, second).reshape(o, per_group, kh, kw)
    sequence = torch.einsum("oihw,o->oihw", sequence, scales[3])

    dw = p["dws_depthwise"].reshape(groups, per_group, -1, kh, kw)
    pw = p["dws_pointwise"].reshape(groups, o // groups, per_group, -1)
    separable = torch.einsum("giehw,goie->goihw", dw, pw).reshape(o, per_group, kh, kw)
    separable = torch.einsum("oihw,o->oihw", separable, scales[-1])

    kernel = origin + avg + prior + sequence + separable
    if "conv1x1_weight" in p:
        point = torch.einsum("oihw,o->oihw", p["conv1x1_weight"], scales[4])
        kernel = kernel + F.pad(point, (kw // 2, kw // 2, kh // 2, kh // 2))
    return kernel


def rep1x1(p: Operands, groups: int) -> Tensor:
    """The `rep1x1` block: a 1x1 and two in sequence. ``[O, I/g, 1, 1]``."""
    scales = p["scales"]
    o, per_group = p["origin_weight"].shape[:2]
    first = p["conv1x1_1x1_conv1"].reshape(groups, -1, per_group)
    second = p["conv1x1_1x1_conv2"].reshape(groups, o // groups, -1)
    sequence = torch.einsum("gti,got->goi", first, second).reshape(o, per_group, 1, 1)
    origin = torch.einsum("oihw,o->oihw", p["origin_weight"], scales[0])
    return origin + torch.einsum("oihw,o->oihw", sequence, scales[1])


_WRITTEN = {"orepa": kxk, "repvgg_dense": kxk, "rep1x1": rep1x1}


def formulation(topology: str, plan: Block, out_dtype: torch.dtype) -> Callable[[Operands], Tensor]:
    """The function from operands to kernel; topologies that are not written out above take the reference's einsums.

    Args:
        topology: name of the block.
        plan: of the block.
        out_dtype: of the kernel: composed in the operands' dtype, rounded once.
    """
    written = _WRITTEN.get(topology)

    def squeeze(operands: Operands) -> Tensor:
        kernel = squeeze_block(plan, operands) if written is None else written(operands, plan.groups)
        return kernel.to(out_dtype)

    return squeeze
