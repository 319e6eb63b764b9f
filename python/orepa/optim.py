"""Parameter groups for an optimizer: who has weight decay, and a learning rate of its own for the deep stem."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from .modules.linear_block import LinearBlock
from .modules.orepa_conv import OREPAConv

_STEMS = ("deep_stem", "plain_stem")


def parameter_groups(
    model: nn.Module,
    lr: float,
    *,
    weight_decay: float = 1e-4,
    stem_lr_scale: float = 1.0,
    stem: str | Iterable[str] | None = None,
    decay_scales: bool = False,
) -> list[dict[str, Any]]:
    """The parameters of a model in groups for any `torch.optim` optimizer, by the paper's recipe (section 4.1).

    Norms, biases and the branch scalings have no weight decay, nor has what the model's own ``no_weight_decay()`` names.
    Frozen parameters are left out.

    After pre-training, the weights of a linear deep stem are distributed unlike those of a single 7x7 kernel. The authors
    therefore advise to tune the learning rate of the stem when such a model is trained on for detection or segmentation.
    They name no value.

    Args:
        model: prepared, or any other.
        lr: of everything but the stem.
        weight_decay: of kernels and linear layers.
        stem_lr_scale: the stem's learning rate as a multiple of ``lr``; 0 keeps it as it is.
        stem: names of the modules that make up the stem (shell patterns such as ``"backbone.conv1*"``), everything in them
            included. By default every `OREPAConv` of the topologies ``"deep_stem"`` and ``"plain_stem"``.
        decay_scales: whether the branch scalings have weight decay, too.

    Returns:
        Up to four groups with the keys ``params``, ``lr``, ``weight_decay`` and ``name``; empty ones are left out.

    Raises:
        ValueError: a negative number, or there is no such stem although it should have a learning rate of its own.
    """
    for name, value in (("lr", lr), ("weight_decay", weight_decay), ("stem_lr_scale", stem_lr_scale)):
        if not value >= 0:
            raise ValueError(f"{name} must be at least 0, got {value}")
    stems = _stem_parameters(model, stem)
    if not stems and (stem is not None or stem_lr_scale != 1):
        wanted = "module matches stem" if stem is not None else f"convolution has one of the topologies {_STEMS}"
        raise ValueError(f"the model has no stem to give a learning rate of its own: no {wanted}")
    spared = set(without_weight_decay(model, scales=not decay_scales))

    groups: dict[tuple[bool, bool], dict[str, Any]] = {}
    for of_stem in (False, True):
        for decays in (False, True):
            groups[of_stem, decays] = {
                "params": [],
                "lr": lr * stem_lr_scale if of_stem else lr,
                "weight_decay": weight_decay if decays else 0.0,
                "name": f"{'stem' if of_stem else 'model'}{'' if decays else ', no decay'}",
            }
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decays = parameter.dim() > 1 and name not in spared
            groups[id(parameter) in stems, decays]["params"].append(parameter)
    return [group for group in groups.values() if group["params"]]


def without_weight_decay(model: nn.Module, *, scales: bool = True) -> list[str]:
    """Names of the parameters that are spared although they are no vectors, as norms and biases are.

    Args:
        model: prepared, or any other.
        scales: whether the branch scalings are among them. They act like a norm's gain, but are matrices ``[branches, O]``.
    """
    own = [f"{name}.scales".lstrip(".") for name, module in model.named_modules() if isinstance(module, LinearBlock)]
    asked = getattr(model, "no_weight_decay", None)
    return [*(own if scales else ()), *(asked() if callable(asked) else ())]


def _stem_parameters(model: nn.Module, stem: str | Iterable[str] | None) -> set[int]:
    patterns = [stem] if isinstance(stem, str) else stem
    return {
        id(parameter)
        for name, module in model.named_modules()
        if (
            isinstance(module, OREPAConv) and module.topology in _STEMS
            if patterns is None
            else any(fnmatchcase(name, pattern) for pattern in patterns)
        )
        for parameter in module.parameters()
    }
