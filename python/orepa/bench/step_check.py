"""Right before fast, for whole steps: a finite loss, and the logits and gradients of the twin with the same weights."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .training_step import TrainingStep

#: relative differences (Frobenius norm) that float32 may have: of the logits, and of all gradients together. Roundings add up
#: over the layers and flip an activation here and there; a wrong kernel is off by far more.
ALLOWED = {"logits": 1e-3, "gradients": 1e-2}


@dataclass(frozen=True)
class Observed:
    """The loss, logits ``[N, classes]`` and gradients by parameter of one pass, on the CPU."""

    loss: float
    logits: Tensor
    gradients: dict[str, Tensor]


@dataclass(frozen=True)
class Twin:
    """What others must agree with, and how far they may be off."""

    observed: Observed
    allowed: dict[str, float]


def observe(step: TrainingStep) -> Observed:
    """Run forward and backward once, without an update."""
    step.clear()
    logits = step.logits()
    loss = step.loss(logits)
    loss.backward()
    gradients = {name: p.grad.cpu() for name, p in step.model.named_parameters() if p.grad is not None}
    found = Observed(float(loss.detach()), logits.detach().float().cpu(), gradients)
    step.clear()
    return found


def as_twin(observed: Observed, exact: Observed | None) -> Twin:
    """A twin that others are held against.

    Args:
        observed: under the precision that is measured.
        exact: the same in float32, where that is more. Its distance says what the lower precision costs: others may be
            twice as far from the twin.
    """
    errors = differences(observed, exact) if exact else dict.fromkeys(ALLOWED, 0.0)
    return Twin(observed, {what: ALLOWED[what] + 2 * error for what, error in errors.items()})


def differences(observed: Observed, other: Observed) -> dict[str, float]:
    """Relative distance of logits and of gradients."""
    names = list(other.gradients)
    return {
        "logits": _relative([observed.logits], [other.logits]),
        "gradients": _relative([observed.gradients[n] for n in names], [other.gradients[n] for n in names]),
    }


def verdict(observed: Observed, twin: Twin | None, facts: dict[str, Any]) -> str:
    """What is wrong, in a sentence, or an empty string.

    Args:
        observed: of the contestant.
        twin: what it must agree with, or None.
        facts: gets the differences, ``logits_error`` and ``gradients_error``.
    """
    if not math.isfinite(observed.loss):
        return f"its loss is {observed.loss}"
    if twin is None:
        return ""
    if observed.gradients.keys() != twin.observed.gradients.keys():
        missing = sorted(observed.gradients.keys() ^ twin.observed.gradients.keys())
        return f"only one of the two has gradients of {', '.join(missing[:3])}"
    errors = differences(observed, twin.observed)
    facts |= {f"{what}_error": error for what, error in errors.items()}
    for what, error in errors.items():
        allowed = twin.allowed[what]
        if not error <= allowed:  # NaN is not
            return f"its {what} differ by {error:.1e} from those of the same weights, where {allowed:.0e} is allowed"
    return ""


def _relative(values: list[Tensor], truth: list[Tensor]) -> float:
    difference = sum(float((v.double() - t.double()).square().sum()) for v, t in zip(values, truth, strict=True))
    size = sum(float(t.double().square().sum()) for t in truth)
    return math.sqrt(difference / max(size, 1e-300))
