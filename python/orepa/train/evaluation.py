"""After training: convert, verify, measure."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import UserError
from ..module_info import count_parameters
from ..surgery.convert import ConversionError, convert
from ..timing import Task, function, interleaved
from .data import Batch

_ROUNDS, _SECONDS = 25, 4.0  # of each timing, whichever ends first


@dataclass(frozen=True)
class Column:
    """One form of the trained model.

    Args:
        correct, images: predictions on the validation images.
        changed: predictions that differ from the trained model's.
        max_difference: largest absolute difference of any logit from the trained model's.
        parameters: their number.
        inference_ms: median time of a forward pass in eval mode, for one batch.
        training_ms: median time of forward and backward, for one batch; None for a form that is not trainable.
    """

    correct: int
    images: int
    changed: int
    max_difference: float
    parameters: int
    inference_ms: float
    training_ms: float | None


@dataclass
class Evaluation:
    """The trained model beside its converted forms.

    Args:
        columns: by name: ``"trained"``, ``"converted"`` (plain convolutions, the layout of timm's model) and ``"folded"``
            (batch norms folded as well).
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
        rows: dict[str, Callable[[Column], str]] = {
            "validation accuracy": lambda c: f"{100 * c.correct / c.images:.2f}%",
            f"correct, of {self.columns['trained'].images}": lambda c: str(c.correct),
            "predictions that changed": lambda c: str(c.changed),
            "largest difference of a logit": lambda c: f"{c.max_difference:.1e}",
            "parameters": lambda c: f"{c.parameters:,}",
            f"inference, ms per batch of {self.batch_size}": lambda c: f"{c.inference_ms:.2f}",
            f"training, ms per batch of {self.batch_size}": lambda c: f"{c.training_ms:.2f}" if c.training_ms else "-",
        }
        table = {
            "": list(self.columns),
            **{name: [cell(c) for c in self.columns.values()] for name, cell in rows.items()},
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


def evaluate_conversion(model: nn.Module, batches: Callable[[], Iterator[Batch]], device: torch.device) -> Evaluation:
    """Convert a trained model and compare the result with it, on all validation images.

    Args:
        model: trained; put into eval mode, otherwise unchanged.
        batches: yields the validation images, from the start at each call.
        device: of the model.

    Raises:
        UserError: the converted model computes another function.
    """
    model.eval()
    images, labels = (tensor.to(device) for tensor in next(batches()))
    forms = {"trained": model}
    try:
        for name, fold in (("converted", False), ("folded", True)):
            forms[name] = convert(model, fold_bn=fold, example_inputs=images)
    except ConversionError as error:
        raise UserError(f"the conversion failed its check, nothing was written: {error}") from error

    logits: dict[str, list[Tensor]] = {name: [] for name in forms}
    truths = []
    with torch.no_grad():
        for inputs, truth in batches():
            truths.append(truth)
            for name, form in forms.items():
                logits[name].append(form(inputs.to(device)).float().cpu())
    outputs, truth = {name: torch.cat(parts) for name, parts in logits.items()}, torch.cat(truths)

    def forward(form: nn.Module) -> Task:
        return _timed(lambda: form(images), device)

    def forward_backward(form: nn.Module) -> Task:
        twin = copy.deepcopy(form).train()  # statistics and gradients of the model itself stay as they are

        def step() -> None:
            twin.zero_grad(set_to_none=True)
            F.cross_entropy(twin(images), labels).backward()

        return _timed(step, device)

    with torch.no_grad():
        inference = _milliseconds({name: forward(form) for name, form in forms.items()})
    training = _milliseconds({name: forward_backward(forms[name]) for name in ("trained", "converted")})

    columns, reference = {}, outputs["trained"]
    for name, output in outputs.items():
        columns[name] = Column(
            correct=int((output.argmax(1) == truth).sum()),
            images=len(truth),
            changed=int((output.argmax(1) != reference.argmax(1)).sum()),
            max_difference=float((output - reference).abs().max()),
            parameters=count_parameters(forms[name]),
            inference_ms=inference[name],
            training_ms=training.get(name),
        )
    return Evaluation(columns, len(images), float(reference.abs().max()), forms["converted"])


def _timed(call: Callable[[], object], device: torch.device) -> Task:
    def run() -> None:
        call()
        if device.type != "cpu":
            torch.accelerator.synchronize(device)

    return function(run)


def _milliseconds(tasks: dict[str, Task]) -> dict[str, float]:
    """Return the median time of each."""
    samples = interleaved(tasks, _ROUNDS, _SECONDS)
    return {name: round(1000 * statistics.median(times), 3) for name, times in samples.items()}
