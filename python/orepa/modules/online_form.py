"""Turns a trained offline block into an online one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from orepa_kernels.reference import align

from ..module_info import batch_norm_affine, conv_arguments
from ..topology.language import Topology
from ..topology.lowering import ConvStage, DepthwiseStage, NormStep
from .branch_statistics import set_statistics, sum_statistics
from .conv_norm import ConvNorm
from .offline_conv import OfflineBranch, OfflineConv
from .orepa_conv import OREPAConv


@torch.no_grad()
def online_form(
    block: OfflineConv, topology: str | Callable[..., Topology], *, backend: str = "auto", **options: Any
) -> ConvNorm:
    """Return an offline block whose branches end in norms as one convolution and one norm, with the same function in eval mode.

    The factor of a branch's last norm becomes its scaling, that of a norm before goes into the weight before it; all shifts
    go into the norm after the sum. Its statistics are those of the sum, the mean exactly, the variance as `sum_statistics`
    estimates it.

    Args:
        block: the offline block; the result has its mode, dtypes and device, and no tensor of it.
        topology, options: that it was built with.
        backend: of the `OREPAConv`.

    Returns:
        An `OREPAConv` and a `BatchNorm2d`.
    """
    like = next(block.parameters())
    # On the meta device: nothing is drawn from the random generator only to be overwritten.
    conv = OREPAConv(**conv_arguments(block), bias=False, topology=topology, backend=backend, device="meta", **options)
    assert block.bias is None  # it has norms
    state: dict[str, Tensor] = {}
    scales, kernels, means, variances, shifts = [], [], [], [], []
    for branch in block._branches:
        kernel, shift = block._squeeze_branch(branch)
        weights, norm = _weights(block, branch)
        factor, _ = batch_norm_affine(norm, kernel)
        assert shift is not None and norm.running_var is not None
        state |= weights
        scales.append(factor)
        kernels.append(align(kernel, block.kernel_size))
        means.append(norm.bias - shift)  # the mean of a norm's output is its bias
        variances.append(factor.square() * norm.running_var)
        shifts.append(shift)
    state["scales"] = torch.stack(scales)
    conv.load_state_dict({name: value.to(like.dtype, copy=True) for name, value in state.items()}, assign=True)

    mean, variance = sum_statistics(kernels, means, variances)
    after = nn.BatchNorm2d(block.out_channels, norm.eps, norm.momentum, device=like.device, dtype=norm.weight.dtype)
    set_statistics(after, mean, variance, torch.stack(shifts).sum(0))
    after.get_buffer("num_batches_tracked").copy_(norm.get_buffer("num_batches_tracked"))
    return ConvNorm(conv, after).train(block.training)


def _weights(block: OfflineConv, branch: OfflineBranch) -> tuple[dict[str, Tensor], nn.BatchNorm2d]:
    """Return a branch's weights, each times the factor of the norm after it but for the last norm, and that norm."""
    *steps, last = branch.steps
    weights = {}
    for step, after in zip(steps, branch.steps[1:], strict=True):
        if not isinstance(step, ConvStage | DepthwiseStage):
            continue
        weight: Tensor = getattr(block, step.weight.name).double()
        if isinstance(after, NormStep) and after is not last:
            factor = batch_norm_affine(getattr(block, after.name), weight)[0].view(-1, 1, 1, 1)
            added = block._stage_weight(step, 0, weight)[0] - weight  # the identity of a layer that starts from it
            weight = factor * (weight + added) - added
        weights[step.weight.name] = weight
    assert isinstance(last, NormStep)
    norm = getattr(block, last.name)
    assert isinstance(norm, nn.BatchNorm2d)
    return weights, norm
