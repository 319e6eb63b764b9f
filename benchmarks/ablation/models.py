"""Build the models of the ablation, each from the same plain one."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import nn
from training_budget.components import BRANCHES, branches

from orepa.bench.variants import PLAIN, copy_of, on_3x3
from orepa.surgery.consumer_graph import consumers
from orepa.surgery.prepare import prepare
from orepa.surgery.replace import replace_modules
from orepa.topology.language import Declaration

from .rows import FULL

#: DBB's own branches, with the initial values of the authors' released OREPA models; those after it are added one by one
DBB_BRANCHES = BRANCHES[:4]


def variants() -> dict[str, Callable[[nn.Module], nn.Module]]:
    """Return functions that build each variant from the plain model, which stays as it is; in the order of the tables."""
    added = {"prior": BRANCHES[:5], "dws": BRANCHES[:6]}
    return {
        PLAIN: copy_of,
        "dbb-offline": on_3x3("", topology="dbb", offline=True).build,
        "dbb-no-branch-norm": on_3x3("", topology="dbb", scaling="none").build,
        "repvgg-offline": on_3x3("", topology="repvgg", offline=True).build,
        "repvgg-no-branch-norm": on_3x3("", topology="repvgg", scaling="none").build,
        "dbb-online": on_3x3("", topology=branches(DBB_BRANCHES)).build,
        **{name: on_3x3("", topology=_block(names)).build for name, names in added.items()},
        "stem": on_3x3("", "deep_stem", topology=_block(BRANCHES)).build,
        FULL: prepare,
        "scalar": partial(prepare, scaling="scalar"),
        "no-scaling": partial(prepare, scaling="none"),
        "no-norm": lambda model: without_norms(prepare(model)),
        "plain-no-norm": lambda model: without_norms(copy_of(model)),
    }


def without_norms(model: nn.Module) -> nn.Module:
    """Remove the norms after convolutions in place, with their bias and without a replacement."""
    norms = {consumer.norm for consumer in consumers(model).values() if consumer.norm}
    return replace_modules(model, {model.get_submodule(name): nn.Identity() for name in norms})


def _block(names: tuple[str, ...]) -> Declaration | str:
    return "orepa" if set(names) == set(BRANCHES) else branches(names)
