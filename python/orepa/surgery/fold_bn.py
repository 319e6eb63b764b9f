"""Folds a batch norm into the convolution before it, in float64."""

from __future__ import annotations

import torch
from torch import nn

from ..module_info import batch_norm_affine, conv2d_like
from .replace import customization

_FOLDABLE = (nn.BatchNorm2d, nn.SyncBatchNorm)


def is_foldable(norm: nn.Module) -> bool:
    """Return whether a norm is an affine map in eval mode: a batch norm with running statistics, and without hooks.

    timm's ``BatchNormAct2d`` counts: its activation stays (see `norm_placeholder`).
    """
    known = type(norm) in _FOLDABLE or (isinstance(norm, nn.BatchNorm2d) and _is_norm_act(norm))
    if not known or customization(norm):
        return False
    return getattr(norm, "running_mean", None) is not None and getattr(norm, "running_var", None) is not None


def norm_placeholder(norm: nn.Module) -> nn.Module:
    """Return the module that takes the place of a folded norm: its activation, or the identity."""
    if not _is_norm_act(norm):
        return nn.Identity().train(norm.training)
    drop, act = norm.get_submodule("drop"), norm.get_submodule("act")
    return act if isinstance(drop, nn.Identity) else nn.Sequential(drop, act).train(norm.training)


def _is_norm_act(norm: nn.Module) -> bool:
    return type(norm).__name__ == "BatchNormAct2d" and {"drop", "act"} <= set(norm._modules)


@torch.no_grad()
def fold_batch_norm(conv: nn.Conv2d, norm: nn.Module, dtype: torch.dtype | None = None) -> nn.Conv2d:
    """Return one convolution with a bias that computes ``norm(conv(x))`` in eval mode.

    It has the device, the memory format, ``requires_grad`` and by default the dtype of ``conv``, which is in float64 where the
    result shall be rounded only once.
    """
    factor, shift = batch_norm_affine(norm)
    weight = torch.empty_like(conv.weight, dtype=dtype).copy_(conv.weight.double() * factor.view(-1, 1, 1, 1))
    bias = shift if conv.bias is None else shift + conv.bias.double() * factor
    return conv2d_like(conv, weight, bias.to(weight.dtype), conv.weight.requires_grad)
