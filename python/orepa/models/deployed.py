"""Name the weights of a converted model as timm's plain model does."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .timm_models import MODELS, create_on_meta


def to_timm(spec: dict[str, Any], state: dict[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Rename a converted model of `orepa.models`, and its weights, to timm's plain model; leave others as they are.

    Args:
        spec: with ``model`` and ``model_kwargs``.
        state: of the converted model, norms not folded.

    Returns:
        Spec and weights such that ``timm.create_model(spec["model"], **spec["model_kwargs"])`` loads the weights.
    """
    registered = MODELS.get(spec["model"])
    if registered is None:
        return spec, state
    if registered.is_repvgg:
        state = _as_three_branches(create_on_meta(registered.plain, **spec["model_kwargs"]), state)
    return {**spec, "model": registered.plain}, state


def _as_three_branches(plain: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Put RepVGG's kernels into the kxk branch of timm's three-branch blocks, with a norm that only adds the bias.

    The other branches are zero; `timm.utils.reparameterize_model` removes them.
    """
    result = {}
    for key, like in plain.state_dict().items():
        fill = 1.0 if key.endswith(".running_var") else 0.0
        result[key] = state[key] if key in state else torch.full(like.shape, fill, dtype=like.dtype)
    for name, norm in plain.named_modules():
        if name.endswith(".conv_kxk.bn") and isinstance(norm, nn.BatchNorm2d):
            block = name.removesuffix(".conv_kxk.bn")
            result[f"{block}.conv_kxk.conv.weight"] = state[f"{block}.conv.weight"]
            result[f"{name}.bias"] = state[f"{block}.conv.bias"]
            result[f"{name}.weight"].fill_((1 + norm.eps) ** 0.5)
    return result
