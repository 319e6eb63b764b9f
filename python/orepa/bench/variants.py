"""Who takes part in ``orepa bench step``: the ways in which a user could train a model, each made from the same plain one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

import orepa_kernels
from orepa_kernels.backends.base import Request
from orepa_kernels.dispatch import NAMES, select

from ..modules.linear_block import LinearBlock
from ..modules.orepa_conv import OREPAConv
from ..surgery.prepare import Choice, prepare

#: the names that ratios and equal outputs refer to
PLAIN, OREPA = "plain", "orepa-reference"


@dataclass(frozen=True)
class Contestant:
    """One way to train a model.

    Args:
        name: unique, as the user types it.
        build: a new model from the plain one, which stays as it is.
        twin: the contestant whose weights this one gets, and whose outputs and gradients it therefore must have; its own
            name where there is none.
        compiled: whether `torch.compile` runs over the whole model.
        backend: of the squeeze, where it has one.
    """

    name: str
    build: Callable[[nn.Module], nn.Module]
    twin: str
    compiled: bool = False
    backend: str = ""

    def why_not(self, model: nn.Module, dtype: torch.dtype | None) -> str:
        """The reason why it cannot train a model that it built, or an empty string.

        Args:
            model: on its device.
            dtype: of autocast, or None.
        """
        if self.twin != PLAIN and not any(isinstance(m, LinearBlock) for m in model.modules()):
            return "nothing to swap: no convolution of its kind with a norm after it"
        for conv in squeezing(model) if self.backend else ():
            like = conv.operands()[0]
            try:
                select(self.backend, Request(conv.plan, like.device, like.dtype, dtype or like.dtype))
            except orepa_kernels.BackendError as error:
                return str(error).rpartition("cannot run: ")[2]
        return ""


def squeezing(model: nn.Module) -> list[OREPAConv]:
    """The layers of a model that squeeze at every step."""
    return [module for module in model.modules() if isinstance(module, OREPAConv)]


def perturb(model: nn.Module, generator: torch.Generator) -> None:
    """Move all parameters of re-parameterised blocks off their initial values, whose zeros could hide a mistake."""
    with torch.no_grad():
        for block in model.modules():
            if isinstance(block, LinearBlock):
                for name, p in block.named_parameters(recurse=False):
                    fan_in = 1 if name in ("scales", "bias") else p[0].numel()
                    p.add_(0.1 * fan_in**-0.5 * torch.randn(p.shape, generator=generator).to(p))


def everyone() -> dict[str, Contestant]:
    """All of them by name, in the order in which tables show them.

    DBB and RepVGG, offline, stand in place of the 3x3 convolutions. OREPA also takes the stem and the 1x1 ones, as its paper
    does. Models are compiled whole.
    """
    return {c.name: c for c in [*_online(), *(offline(f"{name}-offline", name) for name in ("dbb", "repvgg"))]}


def _online() -> list[Contestant]:
    backends = [name for name in reversed(NAMES) if name != "reference"]
    return [
        Contestant(PLAIN, copy_of, PLAIN),
        Contestant("plain-compile", copy_of, PLAIN, compiled=True),
        Contestant(OREPA, partial(_prepared, backend="reference"), OREPA, backend="reference"),
        Contestant("orepa-compile", partial(_prepared, backend="reference"), OREPA, compiled=True, backend="reference"),
        *(Contestant(f"orepa-{n}", partial(_prepared, backend=n), OREPA, backend=n) for n in backends),
    ]


def online(name: str, topology: str | Callable[..., Any], stem: str = "") -> Contestant:
    """OREPA with a topology of your choice on the fastest backend, on the layers that `offline` takes too."""
    return Contestant(name, partial(prepare, policy=_on_3x3({"topology": topology}, {"topology": stem})), name)


def offline(name: str, topology: str | Callable[..., Any], stem: str = "") -> Contestant:
    """Blocks trained offline, every layer on feature maps.

    Args:
        name: of the contestant.
        topology: of the 3x3 convolutions.
        stem: of those from 7x7 on, which otherwise stay.
    """
    policy = _on_3x3({"topology": topology, "offline": True}, {"topology": stem, "offline": True})
    return Contestant(name, partial(prepare, policy=policy), name)


def choose(names: Sequence[str], among: dict[str, Contestant]) -> list[Contestant]:
    """The contestants of these names, in the order of ``among``, twins of theirs included."""
    wanted = {twin for name in names for twin in (name, among[name].twin)}
    return [contestant for name, contestant in among.items() if name in wanted]


def copy_of(model: nn.Module) -> nn.Module:
    """A model of the same values that shares nothing."""
    return prepare(model, lambda _name, _conv: None)


def _prepared(model: nn.Module, backend: str) -> nn.Module:
    return prepare(model, backend=backend)


def _on_3x3(choice: dict[str, Any], stem: dict[str, Any]) -> Callable[[str, nn.Conv2d], Choice]:
    def policy(_name: str, conv: nn.Conv2d) -> Choice:
        if tuple(conv.kernel_size) == (3, 3):
            return choice
        return stem if stem["topology"] and max(conv.kernel_size) >= 7 else None

    return policy
