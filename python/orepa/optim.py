"""Parameter groups for an optimizer, and whether an optimizer holds the parameters of a model."""

from __future__ import annotations

import functools
import itertools
import warnings
from collections.abc import Iterable, Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Any, NamedTuple
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook
from torch.utils.weak import WeakTensorKeyDictionary

from .modules.linear_block import LinearBlock
from .modules.orepa_conv import OREPAConv

_STEMS = ("deep_stem", "plain_stem")
_NAMES_SHOWN = 4  # in a message
_MAKE_ANEW = "make the optimizer after orepa.prepare, from the model that it returns"


def parameter_groups(
    model: nn.Module,
    lr: float,
    *,
    weight_decay: float = 1e-4,
    stem_lr_scale: float = 1.0,
    stem: str | Iterable[str] | None = None,
    decay_scales: bool = False,
    exclude: Optimizer | Iterable[Optimizer] = (),
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
        exclude: optimizers whose parameters are left out: the groups are then what these optimizers miss, for
            `torch.optim.Optimizer.add_param_group`.

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
    excluded = {id(parameter) for parameter, _ in _held(exclude)}

    groups: dict[tuple[bool, bool], dict[str, Any]] = {}
    for of_stem, decays in itertools.product((False, True), (False, True)):
        groups[of_stem, decays] = {
            "params": [],
            "lr": lr * stem_lr_scale if of_stem else lr,
            "weight_decay": weight_decay if decays else 0.0,
            "name": f"{'stem' if of_stem else 'model'}{'' if decays else ', no decay'}",
        }
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and id(parameter) not in excluded:
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


# --- does an optimizer hold what the model has? ---------------------------------------------------------------------------

#: parameters that a model had before prepare, convert or prune_branches, while something refers to them, and their names
_replaced = WeakTensorKeyDictionary()
_checked: WeakSet[Optimizer] = WeakSet()  # since the last change of a model


class OptimizerCheck(NamedTuple):
    """What `check_optimizer` found. Both lists are empty where the optimizer fits the model.

    Args:
        missing: names of the trainable parameters that no group holds.
        stale: names of the tensors in the groups that are not the model's; where none is known, their place.
    """

    missing: list[str]
    stale: list[str]


def check_optimizer(
    model: nn.Module, optimizer: Optimizer | Iterable[Optimizer], *, strict: bool = True
) -> OptimizerCheck:
    """Check that an optimizer holds all trainable parameters of a model, and no others.

    An optimizer made before `prepare` holds the parameters that `prepare` has replaced, and trains nothing. A loop that
    collects the ``weight`` and ``bias`` of every module misses most parameters of a block.

    Args:
        model: wrapped (DDP, FSDP, `torch.compile`) or not. Where the optimizer trains something else too, such as a loss with
            parameters, an `nn.ModuleList` of everything.
        optimizer: one, or all that share the model's parameters.
        strict: raise on a mismatch. Otherwise the result tells.

    Raises:
        ValueError: with ``strict``, a parameter is missing or stale; the message counts and names them.
    """
    parameters = dict(model.named_parameters())
    own = {id(parameter) for parameter in parameters.values()}
    held = {id(parameter): (parameter, place) for parameter, place in _held(optimizer)}
    missing = [name for name, parameter in parameters.items() if parameter.requires_grad and id(parameter) not in held]
    stale = [_replaced.get(parameter, place) for key, (parameter, place) in held.items() if key not in own]
    if strict and (missing or stale):
        problems = [f"it misses {len(missing)} trainable parameter(s) ({_shorten(missing)})"] if missing else []
        advice = "orepa.parameter_groups(model, lr, exclude=optimizer) returns them"
        if stale:
            problems.append(f"it holds {len(stale)} that are not the model's ({_shorten(stale)})")
            advice = _MAKE_ANEW
        raise ValueError(f"the optimizer does not fit the model: {', and '.join(problems)}; {advice}")
    return OptimizerCheck(missing, stale)


def watch_replaced(before: Mapping[str, Tensor], model: nn.Module) -> None:
    """Warn at the next step of an optimizer that goes on with parameters which a model no longer has.

    It warns where none of them has a gradient after the step: the old model may well be trained beside the new one.

    Args:
        before: parameters of the model before the change, by name.
        model: after it.
    """
    for name, parameter in before.items():
        _replaced[parameter] = name
    for parameter in model.parameters():
        _replaced.pop(parameter, None)
    _checked.clear()
    _start_watching()


@functools.cache
def _start_watching() -> None:
    # After the step: some optimizers compute the gradients in the step, by a closure.
    register_optimizer_step_post_hook(_warn_of_stale)


def _warn_of_stale(optimizer: Optimizer, _args: Any, _kwargs: Any) -> None:
    if torch.compiler.is_compiling() or optimizer in _checked:
        return
    _checked.add(optimizer)
    stale = [parameter for parameter, _ in _held(optimizer) if parameter.requires_grad and parameter in _replaced]
    if stale and all(parameter.grad is None for parameter in stale):
        names = _shorten([_replaced[parameter] for parameter in stale])
        warnings.warn(
            f"an optimizer holds {len(stale)} parameter(s) that orepa has replaced ({names}), and none has a gradient; "
            f"{_MAKE_ANEW}; orepa.check_optimizer(model, optimizer) tells whether they fit",
            stacklevel=3,
        )


def _held(optimizer: Optimizer | Iterable[Optimizer]) -> Iterator[tuple[Tensor, str]]:
    """Yield the parameters of one or several optimizers, each with its place in words."""
    # Not by type: wrappers such as Lightning's only look like optimizers.
    for one in [optimizer] if hasattr(optimizer, "param_groups") else optimizer:
        for number, group in enumerate(one.param_groups):
            for position, parameter in enumerate(group["params"]):
                yield parameter, f"parameter {position} of group {number}"


def _shorten(names: list[str]) -> str:
    return ", ".join(names[:_NAMES_SHOWN]) + (", ..." if len(names) > _NAMES_SHOWN else "")
