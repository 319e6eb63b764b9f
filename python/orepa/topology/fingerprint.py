"""Identifies what defines a block's function and is no parameter: its layers, their order, and the values of its filters.

Saved with the parameters, it is a tensor like any other: it gets averaged, scaled, cast to half precision. So it consists of
small integers, the digits of a hash and of two measures of the filters, each of which survives that, after their scale.
"""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from orepa_kernels import Average

from .lowering import ConvStage, DepthwiseStage, FilterStage, Lowered, NestedStage, Step

#: hexadecimal digits per number
_BASE, _DIGITS = 16, 8
#: by which measures of the same filters may differ, computed in other ways
_TOLERANCE = 1e-6


def fingerprint_tensor(lowered: Lowered, like: Tensor) -> Tensor:
    """Return the fingerprint ``[25]`` of a block, in the dtype and on the device of ``like``; on the CPU for meta."""
    digits = [int(digit, 16) for number in _numbers(lowered) for digit in f"{number:0{_DIGITS}x}"]
    return torch.tensor([_BASE, *digits], dtype=like.dtype, device="cpu" if like.is_meta else like.device)


def is_other_function(state: Tensor, lowered: Lowered) -> bool:
    """Return whether a tensor is a fingerprint, and not that of this block. One that noise or a constant replaced is none."""
    expected = _numbers(lowered)
    if type(state) not in (Tensor, nn.Parameter) or state.is_meta or state.shape != (1 + _DIGITS * len(expected),):
        return False
    values = state.detach().double().cpu()
    values = values[1:] * _BASE / values[0]
    digits = values.round()
    if not bool(((values - digits).abs() < 0.25).logical_and(digits >= 0).logical_and(digits < _BASE).all()):
        return False
    structure, *measures = (int("".join(f"{int(d):x}" for d in row), 16) for row in digits.view(-1, _DIGITS).tolist())
    tolerance = _TOLERANCE * _BASE**_DIGITS
    return structure != expected[0] or any(abs(a - b) > tolerance for a, b in zip(measures, expected[1:], strict=True))


def _numbers(lowered: Lowered) -> list[int]:
    """Return a hash of the layers, the size of the filters and their direction, as integers of ``_DIGITS`` digits."""
    if lowered.numbers is None:
        # The values are those on a CPU, whatever the default device is and whoever traces.
        with _disable_current_modes(), torch.device("cpu"):
            filters = torch.cat([torch.zeros(1, dtype=torch.float64), *_filters(lowered)])
            probe = torch.cos(1 + math.sqrt(2) * torch.arange(filters.numel(), dtype=torch.float64))
            norm = float(filters.norm())
            direction = float(filters @ probe / (probe.norm() * norm)) if norm else 0.0
        structure = int(hashlib.sha256(repr(_structure(lowered)).encode()).hexdigest()[:_DIGITS], 16)
        size = min(max(math.log2(norm), -127), 127) / 128 if norm else -1.0
        measures = [round((1 + measure) / 2 * (_BASE**_DIGITS - 1)) for measure in (size, direction)]
        lowered.numbers = [structure, *measures]
    return lowered.numbers


def _filters(lowered: Lowered) -> list[Tensor]:
    """Return the values of all fixed filters, in float64 and flat, nested blocks included."""
    own = [layer.values(channels, size).double().flatten() for channels, size, layer in lowered.constants.values()]
    return own + [values for child in lowered.children.values() for values in _filters(child)]


def _structure(lowered: Lowered) -> object:
    """Describe a block by numbers and the names of its parameters. A saved fingerprint has the hash of this."""
    spec = lowered.spec
    geometry = (spec.in_channels, spec.out_channels, *spec.kernel_size, spec.groups)
    return geometry, [([_describe(step) for step in branch.steps], branch.scale) for branch in lowered.branches]


def _describe(step: Step) -> object:
    if isinstance(step, ConvStage | DepthwiseStage):
        # Of a kernel without dilation nothing is said, as before there was any.
        dilation = () if step.dilation == (1, 1) else (step.dilation,)
        if isinstance(step, ConvStage):
            return "conv", step.weight.name, step.identity, *dilation
        return "depthwise", step.weight.name, *dilation
    if isinstance(step, NestedStage):
        return "block", _structure(step.lowered)
    if isinstance(step, FilterStage):
        return "average" if isinstance(step.filter, Average) else "filter", *step.kernel_size
    return "norm", step.name
