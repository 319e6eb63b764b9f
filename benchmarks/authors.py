"""The authors' own code as a provider, from a checkout that the user names: imported where it lies, never copied.

Known differences are made up for: their depthwise rows of a grouped block lie in another order. Where their block is not the
same function (the deep stem composes by cross-correlation, priors beyond 3x3 are uninitialised), it is skipped and says so.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn

from ..errors import UserError
from .providers import Squeezer
from .workload import Workload

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


class Authors(Squeezer):
    """``weight_gen()`` of the authors' modules, holding the values of the workload.

    Args:
        folder: a checkout of their repository, the folder of ``blocks.py``.

    Raises:
        UserError: the folder is none, or its code does not import here.
    """

    name = "authors"

    def __init__(self, folder: Path) -> None:
        self._blocks = _import(folder)
        self._held: tuple[Workload, nn.Module] | None = None  # of the workload in use; earlier ones may go

    def why_not(self, work: Workload) -> str:
        case = work.case
        if case.topology not in _CLASSES:
            return f"no code for the topology {case.topology} that computes the same function"
        if case.topology == "orepa" and case.shape.kernel_size != 3:
            return "the prior filters are defined for 3x3 only"
        if case.topology == "rep1x1" and case.shape.groups != 1:
            return "its 1x1 block has no groups"
        return ""

    def squeezer(self, work: Workload) -> Callable[[], Tensor]:
        module = self._module(work)
        generate: Callable[[], Tensor] = module.weight_gen  # type: ignore[assignment]
        return lambda: generate().to(work.out_dtype)

    def parameters(self, work: Workload) -> Sequence[Tensor]:
        names, module = _CLASSES[work.case.topology][1], self._module(work)
        return [getattr(module, names[name]) for name, t in work.operands.items() if t.requires_grad]

    def restore(self, work: Workload, gradients: Sequence[Tensor]) -> Sequence[Tensor]:
        trainable = (name for name, t in work.operands.items() if t.requires_grad)
        groups = work.case.shape.groups
        return [
            _rows(gradient, groups, back=True) if name == "dws_pointwise" else gradient
            for name, gradient in zip(trainable, gradients, strict=True)
        ]

    def _module(self, work: Workload) -> nn.Module:
        if self._held is None or self._held[0] is not work:
            self._held = (work, self._build(work))
        return self._held[1]

    def _build(self, work: Workload) -> nn.Module:
        shape = work.case.shape
        cls, names = _CLASSES[work.case.topology]
        module: nn.Module = getattr(self._blocks, cls)(
            shape.in_channels,
            shape.out_channels,
            shape.kernel_size,
            padding=shape.kernel_size // 2,
            groups=shape.groups,
        ).to(work.case.device)
        with torch.no_grad():
            for ours, theirs in names.items():
                value = work.operands[ours]
                getattr(module, theirs).copy_(_rows(value, shape.groups) if ours == "dws_pointwise" else value)
        return module


def _rows(pointwise: Tensor, groups: int, back: bool = False) -> Tensor:
    """Rows of a depthwise separable branch, in our order (group, channel) and theirs (channel, group)."""
    order = (-1, groups) if back else (groups, -1)
    return pointwise.reshape(*order, *pointwise.shape[1:]).transpose(0, 1).reshape(pointwise.shape)


def _import(folder: Path) -> ModuleType:
    folder = folder.resolve()
    if not (folder / "blocks.py").is_file():
        raise UserError(f"--against {folder}: no blocks.py there; name a checkout of the authors' repository")
    # Their modules import one another by top-level names: those must neither hide nor be hidden by what is loaded.
    hidden = {name: sys.modules.pop(name) for name in _names(folder) if name in sys.modules}
    sys.path.insert(0, str(folder))
    try:
        module = importlib.import_module("blocks")
    except Exception as error:  # foreign code may raise anything
        raise UserError(f"--against {folder}: importing it failed: {type(error).__name__}: {error}") from error
    finally:
        sys.path.remove(str(folder))
        for name in _names(folder):
            sys.modules.pop(name, None)
        sys.modules.update(hidden)
    missing = [cls for cls, _ in _CLASSES.values() if not hasattr(module, cls)]
    if missing:
        raise UserError(f"--against {folder}: its blocks.py has no class {', '.join(missing)}")
    return module


def _names(folder: Path) -> list[str]:
    return [path.stem for path in folder.glob("*.py")]
