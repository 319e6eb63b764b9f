"""Name the weights of a converted model as timm's plain model does."""

from __future__ import annotations

from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..surgery.linear_map import LinearMap
from ..surgery.linear_regions import Region, find_regions
from .timm_models import MODELS, create_on_meta


def to_timm(spec: dict[str, Any], state: dict[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Rename a converted model, and its weights, to timm's plain model.

    Where timm's model has a block of branches (RepVGG, MobileOne, ...), the merged convolution goes into one branch, and the
    others add nothing; `timm.utils.reparameterize_model` removes them.

    Args:
        spec: with ``model`` and ``model_kwargs``.
        state: of the converted model, norms not folded.

    Returns:
        Spec and weights such that ``timm.create_model(spec["model"], **spec["model_kwargs"])`` loads the weights.

    Raises:
        ValueError: a merged convolution does not fit into any branch of timm's block.
    """
    registered = MODELS.get(spec["model"])
    if registered is not None:
        spec = {**spec, "model": registered.plain}
    if create_on_meta(spec["model"], **spec["model_kwargs"]).state_dict().keys() == state.keys():
        return spec, state
    with torch.random.fork_rng(devices=[]):
        plain = timm.create_model(spec["model"], **spec["model_kwargs"]).eval()
    return spec, _as_branches(plain, state)


@torch.no_grad()
def _as_branches(plain: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    own = plain.state_dict()
    merged: list[str] = []
    for region in (region for region in find_regions(plain) if not region.problem):
        numbered = (f"{region.name}.reparam_conv{suffix}" for suffix in ("", *(f"_{i}" for i in range(2, 9))))
        for name in (f"{region.name}.conv", *numbered, region.name):
            if f"{name}.weight" in state and f"{name}.weight" not in own and name not in merged:
                merged.append(name)
                _fill(region, state[f"{name}.weight"].double(), state[f"{name}.bias"].double())
                break
    used = own.keys() & state.keys()
    lost = state.keys() - used - {f"{name}.{tensor}" for name in merged for tensor in ("weight", "bias")}
    if lost:
        raise ValueError(f"timm's model has no place for {min(lost)}")
    return {name: state.get(name, tensor) for name, tensor in plain.state_dict().items()}


def _fill(region: Region, weight: Tensor, bias: Tensor) -> None:
    """Set the parameters of a region so that it computes one given convolution."""
    carrier = None
    gain = weight.new_ones(len(weight))
    rest = torch.zeros_like(weight)
    whole = region.linear_map("meta").symmetric()
    for layer in region.layers:
        norm = layer.module
        if isinstance(norm, _BatchNorm):
            norm.reset_running_stats()
            norm.weight.fill_((1 + norm.eps) ** 0.5)
            norm.bias.zero_()
        elif layer.kind == "conv":
            for tensor in layer.tensors:
                tensor.zero_()
    for branch in region.branches:
        kinds = [layer.kind for layer in branch.layers if layer.kind != "pad"]
        norms = [layer.module for layer in branch.layers if isinstance(layer.module, _BatchNorm)]
        factor = branch.factor * weight.new_ones(len(weight))
        for layer in branch.layers:
            if layer.kind == "scale":
                factor = factor * layer.map.kernel.flatten().double()
        if "conv" not in kinds:
            own = [
                norm for norm in norms if sum(norm is layer.module for b in region.branches for layer in b.layers) == 1
            ]
            if own:
                own[0].weight.zero_()
            else:
                identity = LinearMap(torch.ones(1, 1, 1, 1), torch.zeros(1)).on(len(weight), "cpu")
                rest += identity.aligned(whole) * factor.view(-1, 1, 1, 1)
        elif kinds.count("conv") == 1 and "pool" not in kinds and norms and bool((factor != 0).all()):
            conv = next(layer.module for layer in branch.layers if layer.kind == "conv")
            if carrier is None and conv is not None and conv.get_parameter("weight").shape == weight.shape:
                carrier, shifted, gain = conv, norms[0], factor
    if carrier is None:
        raise ValueError(f"no branch of {region.name} in timm's model can hold a kernel {list(weight.shape)}")
    carrier.get_parameter("weight").copy_((weight - rest) / gain.view(-1, 1, 1, 1))
    shifted.bias.copy_(bias / gain)
