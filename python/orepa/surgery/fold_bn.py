"""Folds a batch norm into the convolution before it, in float64."""

from __future__ import annotations

import copy
from collections import OrderedDict

import torch
from torch import Tensor, nn

from ..module_info import batch_norm_affine, conv2d_like, is_frozen_norm
from .replace import customization

_FOLDABLE = (nn.BatchNorm2d, nn.SyncBatchNorm)


def is_foldable(norm: nn.Module) -> bool:
    """Return whether a norm is an affine map in eval mode, and without hooks: a batch norm with running statistics.

    Frozen ones count, and those with an activation, such as timm's ``BatchNormAct2d``: the activation stays.
    """
    if customization(norm) or any(getattr(norm, name, None) is None for name in ("running_mean", "running_var")):
        return False
    return type(norm) in _FOLDABLE or ((_is_norm_act(norm) or is_frozen_norm(norm)) and _computes_affine(norm))


def _is_norm_act(norm: nn.Module) -> bool:
    return isinstance(norm, _FOLDABLE) and set(norm._modules) == {"drop", "act"}


@torch.no_grad()
def _computes_affine(norm: nn.Module) -> bool:
    """Return whether a norm that is known by its attributes only equals an affine map and its activation."""
    exact = copy.deepcopy(norm).double().eval()
    mean, deviation = exact.get_buffer("running_mean"), exact.get_buffer("running_var").sqrt()
    noise = torch.randn(8, len(mean), 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = noise.to(mean.device) * 10 * deviation.view(-1, 1, 1) + mean.view(-1, 1, 1)
    factor, shift = (t.view(-1, 1, 1) for t in batch_norm_affine(exact, mean))
    expected = norm_placeholder(exact)(factor * x + shift)
    return torch.allclose(exact(x).double(), expected, rtol=1e-6, atol=1e-6 * float(expected.std()), equal_nan=True)


def norm_placeholder(norm: nn.Module) -> nn.Module:
    """Return the module that takes the place of a folded norm: its activation, or the identity.

    It is plain torch and adds nothing to the ``state_dict``. To code outside that reads a convolution's norm, such as a
    detector's ``fuse``, it looks like a norm that changes nothing.
    """
    active = [child for child in norm.children() if type(child) is not nn.Identity]
    if not active:
        new: nn.Module = nn.Identity()
    elif len(active) == 1 and not active[0].state_dict():
        new = copy.deepcopy(active[0])
    else:
        new = nn.Sequential(OrderedDict(norm.named_children()))
    mean = norm.get_buffer("running_mean")
    for name, value in (("weight", 1.0), ("bias", 0.0), ("running_mean", 0.0), ("running_var", 1.0)):
        new.register_buffer(name, torch.full_like(mean, value), persistent=False)
    settings = {"num_features": len(mean), "eps": 0.0, "momentum": getattr(norm, "momentum", None)}
    vars(new).update(settings, affine=True, track_running_stats=True, training=norm.training)
    return new


@torch.no_grad()
def fold_batch_norm(conv: nn.Conv2d, norm: nn.Module, dtype: torch.dtype | None = None) -> nn.Conv2d:
    """Return one convolution with a bias that computes ``norm(conv(x))`` in eval mode.

    It has the device, the memory format, ``requires_grad`` and by default the dtype of ``conv``, which is in float64 where the
    result shall be rounded only once.
    """
    factor, shift = batch_norm_affine(norm, conv.weight)
    weight = torch.empty_like(conv.weight, dtype=dtype).copy_(conv.weight.double() * factor.view(-1, 1, 1, 1))
    bias = shift if conv.bias is None else shift + conv.bias.double() * factor
    new = conv2d_like(conv, weight, bias.to(weight.dtype), conv.weight.requires_grad)
    old = norm.bias if conv.bias is None else conv.bias
    new.get_parameter("bias").requires_grad_(isinstance(old, Tensor) and old.requires_grad)
    return new
