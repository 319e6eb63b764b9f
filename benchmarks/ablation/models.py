"""The models of the ablation, each made from the same plain one."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from ..surgery.consumer_graph import consumers
from ..surgery.prepare import Choice, prepare
from ..surgery.replace import replace_modules
from ..topology.language import Declaration
from .ablation_rows import FULL
from .contestants import PLAIN, copy_of, offline, online
from .step_sweep import BRANCHES, branches

#: DBB's own branches, with the initial values of the authors' released OREPA models; those after it are added one by one
DBB_BRANCHES = BRANCHES[:4]


def variants() -> dict[str, Callable[[nn.Module], nn.Module]]:
    """How each variant is made from the plain model, which stays as it is. In the order of the tables."""
    added = {"prior": BRANCHES[:5], "dws": BRANCHES[:6]}
    return {
        PLAIN: copy_of,
        "dbb-offline": offline("", "dbb").build,
        "dbb-no-branch-norm": partial(prepare, policy=_on_3x3(topology="dbb", scaling="none")),
        "repvgg-offline": offline("", "repvgg").build,
        "repvgg-no-branch-norm": partial(prepare, policy=_on_3x3(topology="repvgg", scaling="none")),
        "dbb-online": online("", branches(DBB_BRANCHES)).build,
        **{name: online("", _block(names)).build for name, names in added.items()},
        "stem": online("", _block(BRANCHES), stem="deep_stem").build,
        FULL: prepare,
        "scalar": partial(prepare, scaling="scalar"),
        "no-scaling": partial(prepare, scaling="none"),
        "no-norm": lambda model: without_norms(prepare(model)),
        "plain-no-norm": lambda model: without_norms(copy_of(model)),
    }


def without_norms(model: nn.Module) -> nn.Module:
    """Take the norms after convolutions away, in place. Nothing comes instead of them, their bias included."""
    norms = {consumer.norm for consumer in consumers(model).values() if consumer.norm}
    return replace_modules(model, {model.get_submodule(name): nn.Identity() for name in norms})


def _block(names: tuple[str, ...]) -> Declaration | str:
    return "orepa" if set(names) == set(BRANCHES) else branches(names)


def _on_3x3(**choice: Any) -> Callable[[str, nn.Conv2d], Choice]:
    """The layers that the offline blocks take."""

    def policy(_name: str, conv: nn.Conv2d) -> Choice:
        return choice if tuple(conv.kernel_size) == (3, 3) else None

    return policy
