"""The reports of `prepare`, `convert` and `prune_branches`, layer by layer: plain data that prints as a table."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..module_info import text_table

_ATTRIBUTE = "_orepa_report"


@dataclass(frozen=True)
class LayerReport:
    """One convolution.

    Args:
        name: qualified name in the model.
        layer: its geometry, such as ``"3x3 64->128 s2"``.
        action: ``"swapped"`` or ``"left"`` by prepare; ``"converted"``, ``"folded"`` or ``"left"`` by convert; ``"pruned"`` or
            ``"left"`` by prune_branches.
        detail: the topology, the norm that was folded in, or the reason why it was left.
        error: relative error (Frobenius norm) of the new layer against the old one, where it was measured.
    """

    name: str
    layer: str
    action: str
    detail: str
    error: float | None = None


@dataclass
class Report:
    """All layers of one `prepare`, `convert` or `prune_branches`; ``str()`` is a table.

    Args:
        operation: ``"prepare"``, ``"convert"`` or ``"prune"``.
        layers: one entry per convolution, in the model's order.
        parameters: number of parameters before and after.
        error: relative error of the whole model's output on the example inputs, where given; of its copy in float64 where the
            model's own rounding hides it.
        note: what to know about the whole, or an empty string.
    """

    operation: str
    layers: list[LayerReport] = field(default_factory=list)
    parameters: tuple[int, int] = (0, 0)
    error: float | None = None
    note: str = ""

    def select(self, *actions: str) -> list[LayerReport]:
        """Return the layers with one of these actions."""
        return [layer for layer in self.layers if layer.action in actions]

    @property
    def swapped(self) -> list[LayerReport]:
        """The layers that `prepare` swapped."""
        return self.select("swapped")

    @property
    def left(self) -> list[LayerReport]:
        """The layers that were left alone; their ``detail`` says why."""
        return self.select("left")

    @property
    def max_error(self) -> float:
        """The largest error of any layer, 0.0 where none was measured."""
        return max((layer.error for layer in self.layers if layer.error is not None), default=0.0)

    def as_dict(self) -> dict[str, Any]:
        """Return plain data, for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        rows = [("layer", "convolution", "action", "error", "detail")]
        for layer in self.layers:
            error = "" if layer.error is None else f"{layer.error:.1e}"
            rows.append((layer.name, layer.layer, layer.action, error, layer.detail))
        counts = Counter(layer.action for layer in self.layers)
        summary = ", ".join(f"{count} {action}" for action, count in counts.items()) or "no convolutions"
        before, after = self.parameters
        lines = [*text_table(rows), f"{self.operation}: {summary}; parameters {before:,} -> {after:,}"]
        if self.error is not None:
            lines.append(f"whole model on the example inputs: relative error {self.error:.1e}")
        if self.note:
            lines.append(self.note)
        return "\n".join(lines)


def report(model: nn.Module) -> Report:
    """Return what the last `prepare`, `convert` or `prune_branches` did to this model.

    Raises:
        ValueError: none of them has been called on it.
    """
    data = model.__dict__.get(_ATTRIBUTE)
    if data is None:
        raise ValueError(
            "this model has no report: none of orepa.prepare, orepa.convert and orepa.prune_branches returned it"
        )
    if isinstance(data, Report):  # in older pickles
        return data
    return Report(**{**data, "layers": [LayerReport(**layer) for layer in data["layers"]]})


def attach(model: nn.Module, result: Report) -> None:
    """Attach a report to the model, as plain data: it survives ``deepcopy``, and a pickle loads without this package."""
    model.__dict__[_ATTRIBUTE] = result.as_dict()


def relative_error(expected: Tensor, actual: Tensor) -> float:
    """Return the Frobenius norm of a difference, relative to that of ``expected``, in float64."""
    expected, actual = expected.detach().double(), actual.detach().double()
    return float((actual - expected).norm() / expected.norm().clamp_min(torch.finfo(torch.float64).tiny))


def rounding_limit(dtype: torch.dtype) -> float:
    """Return the largest relative error, compared in float64, of a layer whose weights were rounded once to a dtype.

    There is room for sums that cancel, and for the noise of float64 itself.
    """
    return 8 * torch.finfo(dtype).eps + 1e-11
