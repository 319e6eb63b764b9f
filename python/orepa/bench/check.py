"""Check before timing: squeezes against float64, training steps against the variant with the same weights.

A squeeze follows the rule of the project's tests: an error is at most twice that of the plain formulation in the same dtype,
plus rounding noise. Errors are relative, in the Frobenius norm.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from orepa_kernels.reference import squeeze_block

from .problem import Problem
from .providers import Built, Eager

#: error that is always allowed, by device: rounding in float32; and the precision of products on tensor cores, whose error
#: is 5e-7 to 7e-7 however short a sum is, where plain float32 gives 5e-8 (what is promised is 5e-6)
NOISE = {"cpu": 4 * torch.finfo(torch.float32).eps, "cuda": 2.0**-20}
#: relative differences that float32 may have between two ways to train, of the logits and of all gradients together.
#: Roundings add up over the layers and flip an activation here and there; a wrong kernel is off by far more.
ALLOWED = {"logits": 1e-3, "gradients": 1e-2}


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
    """The float64 result of one problem, and how far the plain formulation in its own dtype is from it."""

    def __init__(self, problem: Problem) -> None:
        self._problem = problem
        operands = {n: t.detach().double().requires_grad_(t.requires_grad) for n, t in problem.operands.items()}
        kernel = squeeze_block(problem.plan, operands)
        self._names = [name for name, t in operands.items() if t.requires_grad]
        self._gradients = torch.autograd.grad(kernel, [operands[n] for n in self._names], problem.grad.double())
        self._weight = kernel.detach()
        self.eager = self.errors(Eager().build(problem))

    def errors(self, built: Built) -> Errors:
        """Run a provider, forward and backward, once; a ValueError for a wrong shape or dtype."""
        assert built.squeeze is not None  # a floor computes no kernel
        kernel = built.squeeze()
        _expect("the kernel", kernel, self._weight.shape, self._problem.out_dtype)
        gradients = built.restore(torch.autograd.grad(kernel, list(built.parameters), self._problem.grad))
        for name, gradient, parameter in zip(self._names, gradients, self._problem.parameters, strict=True):
            _expect(f"the gradient of {name}", gradient, parameter.shape, parameter.dtype)
        pairs = zip(self._names, gradients, self._gradients, strict=True)
        return Errors(_distance([kernel], [self._weight]), {n: _distance([g], [truth]) for n, g, truth in pairs})

    def mistake(self, errors: Errors) -> str:
        """Return what is wrong, in a sentence, or an empty string."""
        noise = NOISE[self._weight.device.type]
        named = [("the kernel", errors.weight, 2 * self.eager.weight + noise)]
        named += [(f"the gradient of {n}", e, 2 * self.eager.gradients[n] + noise) for n, e in errors.gradients.items()]
        return _excess(named, "{} is off by {:.1e} relative to float64, where {:.1e} is allowed")


@dataclass(frozen=True)
class StepOutput:
    """The loss, logits ``[N, classes]`` and gradients by parameter of one forward and backward pass, on the CPU."""

    loss: float
    logits: Tensor
    gradients: dict[str, Tensor]

    def differences(self, other: StepOutput) -> dict[str, float]:
        """Return the relative distances of the logits and of all gradients together."""
        ours, theirs = ([o.gradients[name] for name in other.gradients] for o in (self, other))
        return {"logits": _distance([self.logits], [other.logits]), "gradients": _distance(ours, theirs)}

    def compare(self, twin: StepOutput, exact: StepOutput | None) -> tuple[dict[str, float], str]:
        """Return the `differences` from the output of the same weights, and what is wrong, in a sentence, or "".

        ``exact`` is the twin in float32, where that is more precise: this output may be twice as far from the twin.
        """
        unmatched = sorted(self.gradients.keys() ^ twin.gradients.keys())
        if unmatched:
            return {}, f"only one of the two has gradients of {', '.join(unmatched[:3])}"
        costs = twin.differences(exact) if exact else dict.fromkeys(ALLOWED, 0.0)
        errors = self.differences(twin)
        named = [(what, error, ALLOWED[what] + 2 * costs[what]) for what, error in errors.items()]
        return errors, _excess(named, "its {} differ by {:.1e} from those of the same weights, where {:.0e} is allowed")


def _excess(named: Iterable[tuple[str, float, float]], sentence: str) -> str:
    """Return the sentence for the first (name, error, allowed error) that is above what is allowed."""
    return next((sentence.format(*one) for one in named if not one[1] <= one[2]), "")  # NaN is above everything


def _expect(what: str, tensor: Tensor, shape: torch.Size, dtype: torch.dtype) -> None:
    if tensor.shape != shape or tensor.dtype != dtype:
        raise ValueError(f"{what} is {list(tensor.shape)} {tensor.dtype}, expected {list(shape)} {dtype}")


def _distance(values: Sequence[Tensor], truth: Sequence[Tensor]) -> float:
    """Return the relative distance of some tensors together, in the Frobenius norm."""
    squares = [(v.detach().double() - t.double()).square().sum() for v, t in zip(values, truth, strict=True)]
    size = sum(float(t.double().square().sum()) for t in truth)
    return math.sqrt(sum(map(float, squares)) / max(size, 1e-300))
