"""Provide the variants of ``orepa bench step``: the ways in which a user could train a model, each made from the plain one."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from orepa_kernels.backends.base import Request
from orepa_kernels.dispatch import NAMES

from ..modules.linear_block import LinearBlock
from ..modules.orepa_conv import OREPAConv
from ..surgery.prepare import Choice, prepare
from .providers import backend_refusal

#: the names that ratios and equal outputs refer to
PLAIN, OREPA = "plain", "orepa-reference"


@dataclass(frozen=True)
class Variant:
    """One way to train a model."""

    name: str  # unique, as the user types it
    build: Callable[[nn.Module], nn.Module]  # makes a new model from the plain one, which stays as it is
    twin: (
        str  # variant whose weights it gets, and whose outputs and gradients it must have; its name where there is none
    )
    compiled: bool = False  # whether `torch.compile` runs over the whole model
    backend: str = ""  # of the squeeze, where it has one
    once: bool = False  # whether a step is under `orepa.squeeze_once`

    def why_not(self, model: nn.Module, dtype: torch.dtype | None, processes: int = 1) -> str:
        """Return why it cannot train a model that it built, under autocast to ``dtype``, or an empty string."""
        if processes > 1 and self.compiled:
            return "among several processes, nothing compiled is measured"
        if self.twin != PLAIN and not any(isinstance(m, LinearBlock) for m in model.modules()):
            return "nothing to swap: no convolution of its kind with a norm after it"
        for conv in squeezing(model) if self.backend else ():
            like = conv.operands()[0]
            reason = backend_refusal(self.backend, Request(conv.plan, like.device, like.dtype, dtype or like.dtype))
            if reason:
                return reason
        return ""


def squeezing(model: nn.Module) -> list[OREPAConv]:
    """Return the layers of a model that squeeze at every step."""
    return [module for module in model.modules() if isinstance(module, OREPAConv)]


def perturb(model: nn.Module, generator: torch.Generator) -> None:
    """Move all parameters of re-parameterised blocks off their initial values, whose zeros could hide a mistake."""
    with torch.no_grad():
        for block in model.modules():
            if isinstance(block, LinearBlock):
                for name, p in block.named_parameters(recurse=False):
                    fan_in = 1 if name in ("scales", "bias") else p[0].numel()
                    p.add_(0.1 * fan_in**-0.5 * torch.randn(p.shape, generator=generator).to(p))


def all_variants() -> dict[str, Variant]:
    """Return all variants by name, in the order in which tables show them.

    OREPA squeezes all blocks together in each forward, as `orepa.prepare` has it; "once" for all forwards of a step; "alone"
    each block by itself. DBB and RepVGG replace the 3x3 convolutions only, OREPA also the stem and the 1x1 ones, as in its
    paper.
    """
    backends = [name for name in reversed(NAMES) if name != "reference"]
    variants = [
        Variant(PLAIN, copy_of, PLAIN),
        Variant("plain-compile", copy_of, PLAIN, compiled=True),
        Variant(OREPA, partial(prepare, backend="reference"), OREPA, backend="reference"),
        Variant("orepa-compile", partial(prepare, backend="reference"), OREPA, compiled=True, backend="reference"),
        *(variant for name in backends for variant in _on_backend(name)),
        *(on_3x3(f"{name}-offline", topology=name, offline=True) for name in ("dbb", "repvgg")),
    ]
    return {variant.name: variant for variant in variants}


def _on_backend(backend: str) -> list[Variant]:
    together = Variant(f"orepa-{backend}", partial(prepare, backend=backend), OREPA, backend=backend)
    alone = partial(prepare, backend=backend, together=False)
    once = replace(together, name=f"{together.name}-once", once=True)
    return [together, once, replace(together, name=f"{together.name}-alone", build=alone)]


def in_orders(variants: dict[str, Variant], orders: Sequence[str]) -> dict[str, Variant]:
    """Return variants with those that squeeze on a backend of their own once for each order, named after it but for "auto"."""
    found: dict[str, Variant] = {}
    for variant in variants.values():
        own = variant.backend and not variant.compiled and variant.twin != variant.name
        for order in orders if own else ():
            name = variant.name if order == "auto" else f"{variant.name}-{order}"
            found[name] = replace(variant, name=name, build=partial(_built_in_order, variant.build, order))
        if not own:
            found[variant.name] = variant
    return found


def _built_in_order(build: Callable[[nn.Module], nn.Module], order: str, model: nn.Module) -> nn.Module:
    return in_order(build(model), order)


def in_order(model: nn.Module, order: str) -> nn.Module:
    """Set the order of all blocks of a model that have several, and return it."""
    for block in squeezing(model):
        with contextlib.suppress(ValueError):  # it has one order only
            block.order = order
    return model


def on_3x3(name: str, stem: str | Callable[..., Any] = "", **choice: Any) -> Variant:
    """Return a variant that swaps the 3x3 convolutions: ``choice`` is that of `orepa.prepare`.

    ``stem`` is the topology of the convolutions from 7x7 on, which otherwise stay.
    """

    def policy(_name: str, conv: nn.Conv2d) -> Choice:
        if tuple(conv.kernel_size) == (3, 3):
            return choice
        return {**choice, "topology": stem} if stem and max(conv.kernel_size) >= 7 else None

    return Variant(name, partial(prepare, policy=policy), name)


def choose(names: Sequence[str], among: dict[str, Variant]) -> list[Variant]:
    """Return the variants of these names and their twins, in the order of ``among``."""
    wanted = {twin for name in names for twin in (name, among[name].twin)}
    return [variant for name, variant in among.items() if name in wanted]


def copy_of(model: nn.Module) -> nn.Module:
    """Return a model of the same values that shares nothing."""
    return prepare(model, lambda _name, _conv: None)
