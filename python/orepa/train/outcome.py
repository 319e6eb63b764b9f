"""After training: convert, verify, measure, and say so."""

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

_ROUNDS, _SECONDS = 25, 4.0  # of each timing, whichever ends first (but see `bench.timing.LEAST_ROUNDS`)


@dataclass(frozen=True)
class Column:
    """One form of the trained model.

    Args:
        correct, images: predictions on the validation images.
        changed: predictions that differ from the trained model's.
        max_difference: largest absolute difference of any logit from the trained model's.
        parameters: their number.
        inference_ms: median time of a forward pass in eval mode, for one batch.
        training_ms: median time of forward and backward, for one batch; None where the model is not one to train.
    """

    correct: int
    images: int
    changed: int
    max_difference: float
    parameters: int
    inference_ms: float
    training_ms: float | None

    @property
    def accuracy(self) -> float:
        return self.correct / self.images


@dataclass
class Outcome:
    """The trained model beside its converted forms.

    Args:
        columns: by name: ``"trained"``, ``"converted"`` (plain convolutions, the layout of timm's model) and ``"folded"``
            (batch norms folded in as well).
        batch_size: of the timings.
        largest_logit: for scale.
        converted: the model of the second column.
    """

    columns: dict[str, Column]
    batch_size: int
    largest_logit: float
    converted: nn.Module

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        columns = {name: {"accuracy": c.accuracy, **asdict(c)} for name, c in self.columns.items()}
        return {"batch_size": self.batch_size, "largest_logit": self.largest_logit, **columns}

    def __str__(self) -> str:
        def row(label: str, cell: Callable[[Column], str]) -> str:
            return f"{label:32}" + "".join(f"{cell(column):>14}" for column in self.columns.values())

        images, batch = self.columns["trained"].images, self.batch_size
        return "\n".join(
            [
                f"{'':32}" + "".join(f"{name:>14}" for name in self.columns),
                row("validation accuracy", lambda c: f"{100 * c.accuracy:.2f}%"),
                row(f"correct, of {images}", lambda c: str(c.correct)),
                row("predictions that changed", lambda c: str(c.changed)),
                row("largest difference of a logit", lambda c: f"{c.max_difference:.1e}"),
                row("parameters", lambda c: f"{c.parameters:,}"),
                row(f"inference, ms per batch of {batch}", lambda c: f"{c.inference_ms:.2f}"),
                row(
                    f"training, ms per batch of {batch}",
                    lambda c: "-" if c.training_ms is None else f"{c.training_ms:.2f}",
                ),
            ]
        )


def conclude(model: nn.Module, batches: Callable[[], Iterator[Batch]], device: torch.device) -> Outcome:
    """Convert a trained model and hold the result against it, on all validation images.

    Args:
        model: trained; put into eval mode, otherwise left as it is.
        batches: gives the validation images, anew at each call.
        device: of the model.

    Raises:
        UserError: the converted model is not the same function.
    """
    model.eval()
    images, labels = (tensor.to(device) for tensor in next(batches()))
    forms = {"trained": model}
    try:
        for name, fold in (("converted", False), ("folded", True)):
            forms[name] = convert(model, fold_bn=fold, example_inputs=images)
    except ConversionError as error:
        raise UserError(f"the conversion failed its check, nothing was written: {error}") from error

    logits = {name: [] for name in forms}  # type: dict[str, list[Tensor]]
    answers = []
    with torch.no_grad():
        for batch, truth in batches():
            answers.append(truth)
            for name, form in forms.items():
                logits[name].append(form(batch.to(device)).float().cpu())
    outputs, truth = {name: torch.cat(parts) for name, parts in logits.items()}, torch.cat(answers)

    inference = _milliseconds({name: _inference(form, images) for name, form in forms.items()}, device)
    trainable = {name: _training(forms[name], images, labels) for name in ("trained", "converted")}
    training = _milliseconds(trainable, device)

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
    return Outcome(columns, len(images), float(reference.abs().max()), forms["converted"])


def _inference(model: nn.Module, images: Tensor) -> Callable[[], None]:
    def run() -> None:
        with torch.no_grad():
            model(images)

    return run


def _training(model: nn.Module, images: Tensor, labels: Tensor) -> Callable[[], None]:
    """Forward and backward of a copy: statistics and gradients of the model itself stay as they are."""
    twin = copy.deepcopy(model).train()

    def run() -> None:
        twin.zero_grad(set_to_none=True)
        F.cross_entropy(twin(images), labels).backward()

    return run


def _milliseconds(runs: dict[str, Callable[[], None]], device: torch.device) -> dict[str, float]:
    """Median time of each, until the device is done."""

    def task(run: Callable[[], None]) -> Task:
        def call() -> None:
            run()
            _synchronize(device)

        return function(call)

    samples = interleaved({name: task(run) for name, run in runs.items()}, _ROUNDS, _SECONDS)
    return {name: round(1000 * statistics.median(values), 3) for name, values in samples.items()}


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
