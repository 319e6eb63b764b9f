"""`evaluate_conversion`: a trained model beside its converted forms, in accuracy, logits, size and speed."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..module_info import count_parameters
from ..timing import function, interleaved
from .convert import convert

_ROUNDS, _SECONDS = 25, 4.0  # of each timing, whichever ends first


@dataclass(frozen=True)
class Column:
    """One form of the trained model: predictions on the validation images, size and speed."""

    correct: int
    images: int
    changed: int  # predictions that differ from the trained model's
    max_difference: float  # the largest of any logit from the trained model's
    parameters: int
    inference_ms: float  # median time of a forward pass in eval mode, for one batch
    training_ms: (
        float | None
    )  # median time of forward and backward, for one batch; None for a form that is not trainable


@dataclass
class Evaluation:
    """The trained model beside its converted forms.

    Args:
        columns: ``"trained"``, ``"converted"`` (plain convolutions, the layout of timm's model) and ``"folded"`` (batch norms
            folded as well).
        batch_size: of the timings.
        largest_logit: for scale.
        converted: the model of the second column.
    """

    columns: dict[str, Column]
    batch_size: int
    largest_logit: float
    converted: nn.Module

    def as_dict(self) -> dict[str, Any]:
        """Return plain data, for JSON."""
        columns = {name: {"accuracy": c.correct / c.images, **asdict(c)} for name, c in self.columns.items()}
        return {"batch_size": self.batch_size, "largest_logit": self.largest_logit, **columns}

    def __str__(self) -> str:
        columns, images = self.columns.values(), self.columns["trained"].images
        table = {
            "": list(self.columns),
            "validation accuracy": [f"{100 * c.correct / images:.2f}%" for c in columns],
            f"correct, of {images}": [str(c.correct) for c in columns],
            "predictions that changed": [str(c.changed) for c in columns],
            "largest difference of a logit": [f"{c.max_difference:.1e}" for c in columns],
            "parameters": [f"{c.parameters:,}" for c in columns],
            f"inference, ms per batch of {self.batch_size}": [f"{c.inference_ms:.2f}" for c in columns],
            f"training, ms per batch of {self.batch_size}": [
                "-" if c.training_ms is None else f"{c.training_ms:.2f}" for c in columns
            ],
        }
        return "\n".join(f"{name:32}" + "".join(f"{cell:>14}" for cell in cells) for name, cells in table.items())

    def summary(self) -> str:
        """Return the effect of the conversion in one sentence."""
        trained, *others = self.columns.values()
        if all(c.changed == 0 and c.correct == trained.correct for c in others):
            return f"Conversion changed no prediction: {trained.correct} of {trained.images} correct before and after."
        changed, difference = max(c.changed for c in others), max(c.max_difference for c in others)
        return (
            f"Conversion changed {changed} of {trained.images} predictions, by rounding: logits as large as "
            f"{self.largest_logit:.1e} differ by {difference:.1e} at most."
        )


def evaluate_conversion(
    model: nn.Module, batches: Callable[[], Iterator[tuple[Tensor, Tensor]]], device: torch.device
) -> Evaluation:
    """Convert a trained model and compare the result with it, on all validation images.

    Args:
        model: trained; put into eval mode, otherwise unchanged.
        batches: yields the validation images, from the start at each call.
        device: of the model.

    Raises:
        ConversionError: the converted model computes another function.
    """
    model.eval()
    images, labels = (tensor.to(device) for tensor in next(batches()))
    forms = {"trained": model}
    for name, fold in (("converted", False), ("folded", True)):
        forms[name] = convert(model, fold_bn=fold, example_inputs=images)

    logits: dict[str, list[Tensor]] = {name: [] for name in forms}
    truths = []
    with torch.no_grad():
        for inputs, truth in batches():
            truths.append(truth)
            for name, form in forms.items():
                logits[name].append(form(inputs.to(device)).float().cpu())
        inference = _milliseconds({name: partial(form, images) for name, form in forms.items()}, device)

    def step(twin: nn.Module) -> None:
        twin.zero_grad(set_to_none=True)
        F.cross_entropy(twin(images), labels).backward()

    # Of copies: statistics and gradients of the model itself stay as they are.
    twins = {name: copy.deepcopy(forms[name]).train() for name in ("trained", "converted")}
    training = _milliseconds({name: partial(step, twin) for name, twin in twins.items()}, device)

    truth, reference, columns = torch.cat(truths), torch.cat(logits["trained"]), {}
    for name, form in forms.items():
        output = torch.cat(logits[name])
        columns[name] = Column(
            correct=int((output.argmax(1) == truth).sum()),
            images=len(truth),
            changed=int((output.argmax(1) != reference.argmax(1)).sum()),
            max_difference=float((output - reference).abs().max()),
            parameters=count_parameters(form),
            inference_ms=inference[name],
            training_ms=training.get(name),
        )
    return Evaluation(columns, len(images), float(reference.abs().max()), forms["converted"])


def _milliseconds(calls: dict[str, Callable[[], object]], device: torch.device) -> dict[str, float]:
    """Return the median time of each call, until the device is done."""

    def finish(call: Callable[[], object]) -> None:
        call()
        if device.type != "cpu":
            torch.accelerator.synchronize(device)

    tasks = {name: function(partial(finish, call)) for name, call in calls.items()}
    samples = interleaved(tasks, _ROUNDS, _SECONDS)
    return {name: round(1000 * statistics.median(times), 3) for name, times in samples.items()}
