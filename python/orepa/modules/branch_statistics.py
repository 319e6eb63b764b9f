"""The norm after a sum of branches: estimates its statistics from those of each branch, and sets it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

_SMALLEST_VARIANCE = 1e-12  # of a channel that is constant, or whose branches cancel


def sum_statistics(
    kernels: Sequence[Tensor], means: Sequence[Tensor], variances: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """Return the mean and the variance per channel of the sum of branches that convolve the same input.

    The mean is exact. The variance is ``sum_ij sigma_i sigma_j rho_ij``. It takes for the correlation ``rho_ij`` of two
    branches the one that they have for white noise: the cosine between their kernels. So it is exact for one branch and for
    white input; elsewhere it is an estimate.

    Args:
        kernels: of each branch, as one convolution ``[O, I/g, kh, kw]``, scales and norms included. A branch with a kernel of
            zeros has no variance.
        means, variances: of each branch's output, ``[O]``, scales and norms included.

    Returns:
        Mean and variance ``[O]`` in float64; the variance is positive.
    """
    mean = torch.stack([m.double() for m in means]).sum(0)
    total = torch.zeros_like(kernels[0], dtype=torch.float64)
    for kernel, variance in zip(kernels, variances, strict=True):
        flat = kernel.double().flatten(1)
        # The sum over i, j is the squared length of the sum of unit kernels, each times its standard deviation.
        unit = torch.nn.functional.normalize(flat, dim=1, eps=torch.finfo(torch.float64).tiny)
        total += (unit * variance.double().sqrt()[:, None]).view_as(kernel)
    return mean, total.flatten(1).square().sum(1).clamp_min(_SMALLEST_VARIANCE)


@torch.no_grad()
def set_statistics(norm: nn.BatchNorm2d, mean: Tensor, variance: Tensor, shift: Tensor) -> None:
    """Let a norm expect these statistics ``[C]`` and, in eval mode, only add a shift ``[C]``."""
    weight, bias = (variance + norm.eps).sqrt(), shift + mean
    for name, value in {"running_mean": mean, "running_var": variance, "weight": weight, "bias": bias}.items():
        getattr(norm, name).copy_(value)
