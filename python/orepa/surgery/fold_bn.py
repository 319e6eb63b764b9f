"""Folding a batch norm into the convolution before it, in float64."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..module_info import batch_norm_affine, conv_arguments
from .replace import own_call

_FOLDABLE = (nn.BatchNorm2d, nn.SyncBatchNorm)


def is_foldable(norm: nn.Module) -> bool:
    """Whether a norm is an affine map in eval mode: a batch norm with running statistics, and without hooks.

    timm's ``BatchNormAct2d`` counts: what it does after normalizing is kept (see `remainder`).
    """
    known = type(norm) in _FOLDABLE or (isinstance(norm, nn.BatchNorm2d) and _is_norm_act(norm))
    if not known or own_call(norm):
        return False
    return getattr(norm, "running_mean", None) is not None and getattr(norm, "running_var", None) is not None


def remainder(norm: nn.Module) -> nn.Module:
    """What is left of a norm once its affine map is folded away: the identity, or its activation."""
    if not _is_norm_act(norm):
        return nn.Identity().train(norm.training)
    drop, act = norm.get_submodule("drop"), norm.get_submodule("act")
    return act if isinstance(drop, nn.Identity) else nn.Sequential(drop, act).train(norm.training)


def _is_norm_act(norm: nn.Module) -> bool:
    return type(norm).__name__ == "BatchNormAct2d" and {"drop", "act"} <= set(norm._modules)


@torch.no_grad()
def fold_batch_norm(conv: nn.Conv2d, norm: nn.Module, weight: Tensor | None = None) -> nn.Conv2d:
    """One convolution that computes ``norm(conv(x))`` in eval mode.

    Args:
        conv: ``[O, I/g, kh, kw]``, with or without bias.
        norm: a batch norm with running statistics over ``O`` channels.
        weight: a more precise version of the convolution's weight, to round only once.

    Returns:
        A new convolution with a bias; device, dtype, memory format and ``requires_grad`` are those of ``conv``.
    """
    factor, shift = batch_norm_affine(norm)
    exact = conv.weight.double() if weight is None else weight.double()
    bias = shift if conv.bias is None else shift + conv.bias.double() * factor
    folded = nn.Conv2d(**conv_arguments(conv), bias=True, device="meta")
    trainable = conv.weight.requires_grad
    new_weight = torch.empty_like(conv.weight).copy_(exact * factor.view(-1, 1, 1, 1))
    folded.weight = nn.Parameter(new_weight, requires_grad=trainable)
    folded.bias = nn.Parameter(bias.to(conv.weight.dtype), requires_grad=trainable)
    return folded.train(conv.training)
