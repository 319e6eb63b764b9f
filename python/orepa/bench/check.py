"""Right before fast: every provider's kernel and gradients against the float64 reference.

The rule of the project's tests: an error is at most twice that of the plain formulation in the same dtype, plus rounding
noise. Errors are relative, in the Frobenius norm.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from orepa_kernels.reference import squeeze_block

from .providers import Built, Eager
from .workload import Workload

#: what nobody is blamed for, by device: rounding in float32; and the precision of products on tensor cores, whose error is
#: 5e-7 to 7e-7 however short a sum is, where plain float32 gives 5e-8 (what is promised is 5e-6)
NOISE = {"cpu": 4 * torch.finfo(torch.float32).eps, "cuda": 2.0**-20}


@dataclass(frozen=True)
class Errors:
    """Relative errors: of the kernel, and of each parameter's gradient by its name."""

    weight: float
    gradients: dict[str, float]

    @property
    def gradient(self) -> float:
        """The worst of the gradients; NaN if any is."""
        values = list(self.gradients.values())
        return math.nan if any(math.isnan(v) for v in values) else max(values, default=0.0)


class Truth:
    """The float64 result of one workload, and how far the plain formulation in its own dtype is from it."""

    def __init__(self, work: Workload) -> None:
        self._work = work
        operands = {n: t.detach().double().requires_grad_(t.requires_grad) for n, t in work.operands.items()}
        kernel = squeeze_block(work.plan, operands)
        self._names = [name for name, t in operands.items() if t.requires_grad]
        self._gradients = torch.autograd.grad(kernel, [operands[n] for n in self._names], work.grad.double())
        self._weight = kernel.detach()
        self.eager = self.errors(Eager().build(work))

    def errors(self, built: Built) -> Errors:
        """Run a provider, forward and backward, once.

        Raises:
            ValueError: the kernel or a gradient has a wrong shape or dtype.
        """
        assert built.squeeze is not None  # a floor computes no kernel
        kernel = built.squeeze()
        _expect("the kernel", kernel, self._weight.shape, self._work.out_dtype)
        found = built.restore(torch.autograd.grad(kernel, list(built.parameters), self._work.grad))
        for name, gradient, parameter in zip(self._names, found, self._work.parameters, strict=True):
            _expect(f"the gradient of {name}", gradient, parameter.shape, parameter.dtype)
        pairs = zip(self._names, found, self._gradients, strict=True)
        return Errors(_relative(kernel.detach(), self._weight), {n: _relative(g, truth) for n, g, truth in pairs})

    def verdict(self, errors: Errors) -> str:
        """What is wrong, in a sentence, or an empty string."""
        named = [("the kernel", errors.weight, self.eager.weight)]
        named += [(f"the gradient of {n}", e, self.eager.gradients[n]) for n, e in errors.gradients.items()]
        noise = NOISE[self._weight.device.type]
        for what, error, eager in named:
            allowed = 2 * eager + noise
            if not error <= allowed:  # NaN is not
                return f"{what} is off by {error:.1e} relative to float64, where {allowed:.1e} is allowed"
        return ""


def _expect(what: str, tensor: Tensor, shape: torch.Size, dtype: torch.dtype) -> None:
    if tensor.shape != shape or tensor.dtype != dtype:
        raise ValueError(f"{what} is {list(tensor.shape)} {tensor.dtype}, expected {list(shape)} {dtype}")


def _relative(value: Tensor, truth: Tensor) -> float:
    return float((value.double() - truth).norm() / truth.norm().clamp_min(1e-300))
