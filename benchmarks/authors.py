"""Run `benchmarks/squeeze.py` with the authors' code as one more provider, imported from a checkout, never copied.

    python benchmarks/authors.py DIR [options of benchmarks/squeeze.py]

Known differences are made up for: their depthwise rows of a grouped block lie in another order. Where their block is not the
same function (the deep stem composes by cross-correlation, priors beyond 3x3 are uninitialised), it is skipped and says so.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from types import ModuleType

import squeeze
import torch
from torch import Tensor, nn

from orepa.bench.problem import Problem
from orepa.bench.providers import Built, Provider, build_squeezer
from orepa.errors import UserError

#: what their classes call our operands
_KXK = {
    "origin_weight": "weight_orepa_origin",
    "avg_weight": "weight_orepa_avg_conv",
    "prior_weight": "weight_orepa_pfir_conv",
    "conv1x1_kxk_conv1": "weight_orepa_1x1_kxk_idconv1",
    "conv1x1_kxk_conv2": "weight_orepa_1x1_kxk_conv2",
    "conv1x1_weight": "weight_orepa_1x1",
    "dws_depthwise": "weight_orepa_gconv_dw",
    "dws_pointwise": "weight_orepa_gconv_pw",
    "scales": "vector",
}
_REP1X1 = {
    "origin_weight": "weight_or1x1_origin",
    "conv1x1_1x1_conv1": "weight_or1x1_l2i_conv1",
    "conv1x1_1x1_conv2": "weight_or1x1_l2i_conv2",
    "scales": "vector",
}
_CLASSES = {"orepa": ("OREPA", _KXK), "rep1x1": ("OREPA_1x1", _REP1X1)}


class Authors(Provider):
    """``weight_gen()`` of the authors' modules, with the values of the problem.

    Args:
        folder: a checkout of their repository, the folder of ``blocks.py``.

    Raises:
        UserError: the folder is none, or its code does not import here.
    """

    name = "authors"

    def __init__(self, folder: Path) -> None:
        self._blocks = _import(folder)

    def why_not(self, problem: Problem) -> str:
        case = problem.case
        if case.topology not in _CLASSES:
            return f"no code for the topology {case.topology} that computes the same function"
        if case.topology == "orepa" and case.shape.kernel_size != 3:
            return "the prior filters are defined for 3x3 only"
        if case.topology == "rep1x1" and case.shape.groups != 1:
            return "its 1x1 block has no groups"
        return ""

    def build(self, problem: Problem) -> Built:
        shape, names = problem.case.shape, _CLASSES[problem.case.topology][1]
        module = self._module(problem)
        trainable = [name for name, t in problem.operands.items() if t.requires_grad]

        def squeeze() -> Tensor:
            return module.weight_gen().to(problem.out_dtype)  # type: ignore[operator]

        def restore(gradients: Sequence[Tensor]) -> list[Tensor]:
            pairs = zip(trainable, gradients, strict=True)
            return [_rows(g, shape.groups, back=True) if name == "dws_pointwise" else g for name, g in pairs]

        parameters = [getattr(module, names[name]) for name in trainable]
        return build_squeezer(squeeze, parameters, problem.grad, restore=restore)

    def _module(self, problem: Problem) -> nn.Module:
        shape = problem.case.shape
        cls, names = _CLASSES[problem.case.topology]
        module: nn.Module = getattr(self._blocks, cls)(
            shape.in_channels,
            shape.out_channels,
            shape.kernel_size,
            padding=shape.kernel_size // 2,
            groups=shape.groups,
        ).to(problem.case.device)
        with torch.no_grad():
            for ours, theirs in names.items():
                value = problem.operands[ours]
                getattr(module, theirs).copy_(_rows(value, shape.groups) if ours == "dws_pointwise" else value)
        return module


def _rows(pointwise: Tensor, groups: int, back: bool = False) -> Tensor:
    """Rows of a depthwise separable branch, in our order (group, channel) and theirs (channel, group)."""
    order = (-1, groups) if back else (groups, -1)
    return pointwise.reshape(*order, *pointwise.shape[1:]).transpose(0, 1).reshape(pointwise.shape)


def _import(folder: Path) -> ModuleType:
    folder = folder.resolve()
    if not (folder / "blocks.py").is_file():
        raise UserError(f"{folder}: no blocks.py there; name a checkout of the authors' repository")
    # Their modules import one another by top-level names: those must neither hide nor be hidden by what is loaded.
    hidden = {name: sys.modules.pop(name) for name in _names(folder) if name in sys.modules}
    sys.path.insert(0, str(folder))
    try:
        module = importlib.import_module("blocks")
    except Exception as error:  # foreign code may raise anything
        raise UserError(f"{folder}: importing it failed: {type(error).__name__}: {error}") from error
    finally:
        sys.path.remove(str(folder))
        for name in _names(folder):
            sys.modules.pop(name, None)
        sys.modules.update(hidden)
    missing = [cls for cls, _ in _CLASSES.values() if not hasattr(module, cls)]
    if missing:
        raise UserError(f"{folder}: its blocks.py has no class {', '.join(missing)}")
    return module


def _names(folder: Path) -> list[str]:
    return [path.stem for path in folder.glob("*.py")]


def providers(folder: Path) -> Mapping[str, Provider]:
    """Return all providers, the authors' after ours of the same formulation."""
    others = squeeze.all_providers()
    return {"eager": others.pop("eager"), "authors": Authors(folder), **others}


def main(argv: list[str] | None = None) -> int:
    """Measure, print tables, and return the exit code."""
    parser = squeeze.parser_of(__doc__)
    parser.add_argument("folder", type=Path, metavar="DIR", help="a checkout of the authors' repository")
    args = parser.parse_args(argv)
    return squeeze.run(args, partial(providers, args.folder))


if __name__ == "__main__":
    sys.exit(main())
