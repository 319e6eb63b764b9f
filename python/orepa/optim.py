"""Parameter groups for an optimizer: which parameters have weight decay, and another learning rate for the deep stem."""

from __future__ import annotations

import itertools
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
    """Group the parameters of a model for any `torch.optim` optimizer, by the paper's recipe (section 4.1).

    Norms, biases and the branch scalings have no weight decay, nor do the parameters that the model's ``no_weight_decay()``
    names. Frozen parameters are left out.

    After pre-training, the weights of a linear deep stem are distributed unlike those of a single 7x7 kernel. The authors
    therefore advise to tune the learning rate of the stem when such a model is fine-tuned for detection or segmentation; they
    name no value.

    Args:
        model: prepared, or any other.
        lr: of everything but the stem.
        weight_decay: of kernels and linear layers.
        stem_lr_scale: the stem's learning rate as a multiple of ``lr``; 0 freezes it.
        stem: names of the modules that make up the stem (shell patterns such as ``"backbone.conv1*"``), everything in them
            included. By default every `OREPAConv` of the topologies ``"deep_stem"`` and ``"plain_stem"``.
        decay_scales: whether the branch scalings have weight decay, too.

    Returns:
        Up to four groups with the keys ``params``, ``lr``, ``weight_decay`` and ``name``; empty ones are left out.

    Raises:
        ValueError: a negative number, or no such stem in the model although ``stem`` or ``stem_lr_scale`` asks for one.
    """
    for name, value in (("lr", lr), ("weight_decay", weight_decay), ("stem_lr_scale", stem_lr_scale)):
        if not value >= 0:
            raise ValueError(f"{name} must be at least 0, got {value}")
    stems = _stem_parameters(model, stem)
    if not stems and (stem is not None or stem_lr_scale != 1):
        missing = (
            f"module matches stem={stem!r}" if stem is not None else f"convolution has one of the topologies {_STEMS}"
        )
        raise ValueError(f"the model has no stem for another learning rate: no {missing}")
    undecayed = set(without_weight_decay(model, scales=not decay_scales))

    groups: dict[tuple[bool, bool], dict[str, Any]] = {}
    for of_stem, decays in itertools.product((False, True), (False, True)):
        groups[of_stem, decays] = {
            "params": [],
            "lr": lr * stem_lr_scale if of_stem else lr,
            "weight_decay": weight_decay if decays else 0.0,
            "name": f"{'stem' if of_stem else 'model'}{'' if decays else ', no decay'}",
        }
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decays = parameter.dim() > 1 and name not in undecayed
            groups[id(parameter) in stems, decays]["params"].append(parameter)
    return [group for group in groups.values() if group["params"]]


def without_weight_decay(model: nn.Module, *, scales: bool = True) -> list[str]:
    """Return the names of parameters without weight decay beyond the vectors, such as norms and biases.

    Args:
        model: prepared, or any other.
        scales: whether the branch scalings are among them. They act like a norm's gain, but are matrices ``[branches, O]``.
    """
    blocks = [name for name, module in model.named_modules() if isinstance(module, LinearBlock)] if scales else []
    no_weight_decay = getattr(model, "no_weight_decay", None)
    named = no_weight_decay() if callable(no_weight_decay) else ()
    return [*(f"{name}.scales".lstrip(".") for name in blocks), *named]


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
