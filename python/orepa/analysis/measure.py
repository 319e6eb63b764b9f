"""`analyze`: measures similarity, scales and effective norms of the branches of every block, as plain data."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from orepa_kernels.reference import align, term_kernel

from ..module_info import describe, text_table, walk
from ..modules.linear_block import LinearBlock
from ..modules.orepa_conv import OREPAConv

#: a scale counts as near zero up to this absolute value
NEAR_ZERO = 1e-3


@dataclass(frozen=True)
class ScaleStatistics:
    """The scaling of one branch, over its channels (one value with scalar scaling).

    Args:
        mean, std: the standard deviation is that of the values themselves, not an estimate.
        minimum, maximum: the extremes.
        quartiles: the values below which a quarter, half, and three quarters lie.
        near_zero: fraction of the values ``s`` with ``|s| <= NEAR_ZERO``.
    """

    mean: float
    std: float
    minimum: float
    maximum: float
    quartiles: tuple[float, float, float]
    near_zero: float


@dataclass(frozen=True)
class BranchAnalysis:
    """One branch.

    Args:
        name: as the topology declares it.
        norm: Frobenius norm of the branch's squeezed kernel, scaled: its effective kernel.
        relative_norm: the same, over the norm of the block's squeezed kernel; None where only that one is zero.
        scale: None for a branch without scaling.
    """

    name: str
    norm: float
    relative_norm: float | None
    scale: ScaleStatistics | None


@dataclass(frozen=True)
class LayerAnalysis:
    """One block.

    Args:
        name: qualified name in the model.
        layer: its geometry, such as ``"3x3 64->128 s2"``.
        topology: its name; for a block nested in another, that of the outer one.
        norm: Frobenius norm of the squeezed kernel.
        branches: in the order of the topology.
        similarity: cosine similarity of the branches' squeezed kernels, scaled and centre-aligned: symmetric, ones on the
            diagonal. None where a branch is zero, which points nowhere.
        prunable: branches that can go, all of them together, by the smallest norm first. Empty for a nested block, whose
            change the stages around it would amplify.
        change: of the squeezed kernel when they go: Frobenius norm, relative to the kernel's. 0.0 where none can go; None
            where the kernel was zero and then is not.
    """

    name: str
    layer: str
    topology: str
    norm: float
    branches: tuple[BranchAnalysis, ...]
    similarity: tuple[tuple[float | None, ...], ...]
    prunable: tuple[str, ...]
    change: float | None


@dataclass(frozen=True)
class Analysis:
    """All blocks of a model, in its order; ``str()`` is a table.

    Args:
        tolerance: that the prunable branches were chosen for.
        layers: one entry per block.
    """

    tolerance: float
    layers: tuple[LayerAnalysis, ...]

    @property
    def prunable(self) -> dict[str, tuple[str, ...]]:
        """Branches that can go, by layer; layers that keep all are absent. `orepa.prune_branches` takes it."""
        return {layer.name: layer.prunable for layer in self.layers if layer.prunable}

    def as_dict(self) -> dict[str, Any]:
        """Return plain data, for JSON. All numbers are finite, but for a tolerance of infinity."""
        return asdict(self)

    def __str__(self) -> str:
        rows = [("layer", "convolution", "norm", "relative norm of each branch", "prunable")]
        for layer in self.layers:
            parts = "  ".join(f"{b.name} {_short(b.relative_norm)}" for b in layer.branches)
            rows.append((layer.name, layer.layer, f"{layer.norm:.3g}", parts, ", ".join(layer.prunable)))
        total, prunable = sum(len(layer.branches) for layer in self.layers), sum(map(len, self.prunable.values()))
        summary = f"{prunable} of {total} branches could go within a relative change of {self.tolerance:g} per kernel"
        return "\n".join([*text_table(rows), summary])


def analyze(model: nn.Module, tolerance: float = 1e-3) -> Analysis:
    """Measure the branches of every `OREPAConv` of a model, the kxk part of every `RepVGGBlock` included.

    The paper uses similarity to show that the scalings make the branches diverse. Everything is computed in float64 from the
    mathematics of the squeeze (paper section 3.3), whatever the dtype of the parameters. A block nested in another, such as a
    stage of a deep stem, is a separate layer. The model does not change.

    Args:
        model: any module tree, in either mode.
        tolerance: largest change of a squeezed kernel, relative to its Frobenius norm, that pruning may cause.

    Raises:
        ValueError: a tolerance that is negative or no number; parameters that are not finite, or on the meta device.
    """
    check_tolerance(tolerance)
    return Analysis(tolerance, tuple(_layers(model, tolerance)))


def check_tolerance(tolerance: float) -> None:
    """Raise ValueError for a tolerance that is negative or no number."""
    if not tolerance >= 0:
        raise ValueError(f"tolerance must be a number from 0 on, got {tolerance!r}")


def _layers(model: nn.Module, tolerance: float) -> Iterator[LayerAnalysis]:
    for name, conv in walk(model, (LinearBlock,)):
        if isinstance(conv, OREPAConv):
            yield _measure(name, describe(conv), conv.topology, conv, tolerance)
            for path, block in conv.named_modules(prefix=name):
                if isinstance(block, LinearBlock) and block is not conv:
                    yield _measure(path, describe(block._lowered.spec), conv.topology, block, None)


def _measure(name: str, geometry: str, topology: str, block: LinearBlock, tolerance: float | None) -> LayerAnalysis:
    kernels, names = branch_kernels(block, name), branch_names(block)
    norm = float(sum_kernels(kernels).norm())
    branches = []
    for branch, kernel, term in zip(names, kernels, block.plan.terms, strict=True):
        scale = None if term.scale is None or block.scales is None else _statistics(block.scales[term.scale])
        branch_norm = float(kernel.norm())
        branches.append(BranchAnalysis(branch, branch_norm, relative(branch_norm, norm), scale))
    prunable = [] if tolerance is None else select_prunable(kernels, tolerance)
    change = float(sum_kernels([kernels[i] for i in prunable]).norm()) if prunable else 0.0
    return LayerAnalysis(
        name,
        geometry,
        topology,
        norm,
        tuple(branches),
        _similarity(kernels),
        tuple(names[i] for i in prunable),
        relative(change, norm),
    )


# --- kernels --------------------------------------------------------------------------------------------------------------


def branch_names(block: LinearBlock) -> list[str]:
    """Return the names of a block's branches, in the order of the terms of its plan."""
    return [branch.name for branch in block._lowered.branches]


@torch.no_grad()
def branch_kernels(block: LinearBlock, name: str = "the block") -> list[Tensor]:
    """Return each branch squeezed, scaled and centre-aligned: ``[O, I/g, kh, kw]`` in float64 on the CPU.

    Raises:
        ValueError: parameters that are not finite, or on the meta device; the message has the block's ``name``.
    """
    plan, operands = block.plan, block.operands()
    if any(tensor.is_meta for tensor in operands):
        raise ValueError(f"{name} has parameters on the meta device: without values there is nothing to measure")
    # The CPU has float64 everywhere; some accelerators do not.
    values = {o.name: t.detach().to("cpu", torch.float64) for o, t in zip(plan.operands, operands, strict=True)}
    kernels = []
    for branch, term in zip(branch_names(block), plan.terms, strict=True):
        kernel = term_kernel(plan, term, values)
        if term.scale is not None and plan.scales is not None:
            kernel = kernel * values[plan.scales.name][term.scale].view(-1, 1, 1, 1)
        if not bool(torch.isfinite(kernel).all()):
            raise ValueError(f"{name}: the kernel of branch {branch!r} is not finite; its parameters are damaged")
        kernels.append(align(kernel, plan.kernel_size))
    return kernels


def sum_kernels(kernels: Sequence[Tensor]) -> Tensor:
    """Sum kernels in order, as the squeeze does."""
    return torch.stack(list(kernels)).sum(0)


def relative(part: float, total: float) -> float | None:
    """Return ``part / total``; 0.0 where the part is zero, None where only the total is."""
    if part == 0:
        return 0.0
    return part / total if total > 0 else None


def select_prunable(kernels: Sequence[Tensor], tolerance: float) -> list[int]:
    """Select branches that can go together: greedily, smallest norm first, while the loss stays within the tolerance.

    The loss is the Frobenius norm of the sum of the selected kernels, relative to that of all kernels, so that small branches
    cannot add up beyond the tolerance. One branch always stays; of branches of equal norm, the one declared later goes first.
    """
    # Infinity allows everything, of a kernel of norm zero as well.
    limit = math.inf if math.isinf(tolerance) else tolerance * float(sum_kernels(kernels).norm())
    missing = torch.zeros_like(kernels[0])
    selected: list[int] = []
    for index in sorted(range(len(kernels)), key=lambda i: (float(kernels[i].norm()), -i)):
        if len(selected) == len(kernels) - 1:
            break
        more = missing + kernels[index]
        if float(more.norm()) <= limit:
            missing = more
            selected.append(index)
    return selected


def _similarity(kernels: Sequence[Tensor]) -> tuple[tuple[float | None, ...], ...]:
    norms = [float(kernel.norm()) for kernel in kernels]
    units = [kernel / norm if norm > 0 else kernel for kernel, norm in zip(kernels, norms, strict=True)]

    def cosine(a: int, b: int) -> float | None:
        if a == b:
            return 1.0
        if 0.0 in (norms[a], norms[b]):
            return None
        low, high = sorted((a, b))  # the same rounding on either side of the diagonal
        return max(-1.0, min(1.0, float((units[low] * units[high]).sum())))

    indices = range(len(kernels))
    return tuple(tuple(cosine(a, b) for b in indices) for a in indices)


def _statistics(scale: Tensor) -> ScaleStatistics:
    values = scale.detach().to("cpu", torch.float64)
    low, middle, high = (float(q) for q in values.quantile(values.new_tensor([0.25, 0.5, 0.75])))
    return ScaleStatistics(
        float(values.mean()),
        float(values.std(correction=0)),
        float(values.min()),
        float(values.max()),
        (low, middle, high),
        float((values.abs() <= NEAR_ZERO).double().mean()),
    )


def _short(number: float | None) -> str:
    return "-" if number is None else f"{number:.2g}"
