"""Measure a whole training step, in every way in which a user could train: ``orepa bench step``."""

from __future__ import annotations

import functools
import gc
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..module_info import count_parameters
from ..timing import Stopwatch, function
from ..train.model import create_plain, model_arguments
from . import runner
from .check import StepOutput
from .machine import environment
from .providers import configure_inductor
from .results import Results
from .runner import BenchConfig, Build, Candidate, Say
from .variants import Variant, perturb

AUTOCAST = {"none": None, "bf16": torch.bfloat16, "fp16": torch.float16}
CLASSES = 1000
#: small enough for any block to stay finite on the one batch that it is trained on
LEARNING_RATE = 1e-4


@dataclass(frozen=True)
class StepCase:
    """What is trained."""

    model: str  # timm's name
    batch: int
    size: int  # of the images, in pixels
    autocast: str = "none"  # a key of `AUTOCAST`
    layout: str = "contiguous"  # or "channels_last"
    device: str = "cpu"

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        return f"{self.model}, {self.batch} x {self.size} px"

    def create(self) -> tuple[nn.Module, Tensor, Tensor]:
        """Return the model as timm builds it, on the CPU, and a batch of images and labels on the device."""
        torch.manual_seed(0)
        model = create_plain(self.model, model_arguments(self.model, CLASSES, 3, self.size), self.size)
        images = torch.randn(self.batch, 3, self.size, self.size)
        labels = torch.randint(CLASSES, (self.batch,))
        return model, images.to(self.device, memory_format=self._format), labels.to(self.device)

    def place(self, model: nn.Module) -> nn.Module:
        """Move a model to the device and into the memory format."""
        return model.to(self.device, memory_format=self._format)  # type: ignore[call-overload]

    @property
    def _format(self) -> torch.memory_format:
        return torch.channels_last if self.layout == "channels_last" else torch.contiguous_format


class TrainingStep:
    """Forward, loss, backward and SGD with momentum of a model in train mode, on one fixed batch.

    Gradients of float16 are not scaled, as that does not depend on the model. ``compiler`` turns the model into what is called.
    """

    def __init__(
        self,
        model: nn.Module,
        images: Tensor,
        labels: Tensor,
        autocast: torch.dtype | None = None,
        compiler: Callable[[nn.Module], Callable[[Tensor], Tensor]] | None = None,
    ) -> None:
        self.model, self.images, self.labels, self.autocast = model, images, labels, autocast
        self._call = compiler(model) if compiler else model
        self.optimizer = torch.optim.SGD(model.parameters(), LEARNING_RATE, momentum=0.9)

    def __call__(self) -> Tensor:
        """Run a whole step; return the loss before it, a scalar without a graph."""
        self.clear()
        loss = self.loss(self.logits())
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def logits(self) -> Tensor:
        """Return ``[N, classes]``."""
        with torch.autocast(self.images.device.type, dtype=self.autocast, enabled=self.autocast is not None):
            return self._call(self.images)

    def loss(self, logits: Tensor) -> Tensor:
        return F.cross_entropy(logits.float(), self.labels)

    def clear(self) -> None:
        """Free the gradients."""
        self.optimizer.zero_grad(set_to_none=True)

    def output(self) -> StepOutput:
        """Run forward and backward once, without an update."""
        self.clear()
        logits = self.logits()
        loss = self.loss(logits)
        loss.backward()
        gradients = {name: p.grad.cpu() for name, p in self.model.named_parameters() if p.grad is not None}
        self.clear()
        return StepOutput(float(loss.detach()), logits.detach().float().cpu(), gradients)


#: Called on the device before a model is built; the function that it returns gets the step, and whether it is eager, and
#: returns facts for the row: how experiments measure more than time.
Probe = Callable[[str], Callable[[TrainingStep, bool], dict[str, Any]]]


def run(
    config: BenchConfig,
    say: Say = lambda _text: None,
    stopwatch: Stopwatch | None = None,
    compiler: Callable[[nn.Module], Any] | None = None,
    probe: Probe = lambda _device: lambda _step, _eager: {},
) -> Results:
    """Check and time every variant of every case: see `orepa.bench.runner.run`.

    ``compiler`` is that of models, by default `torch.compile`; ``probe`` measures more facts. A UserError for a model that
    timm cannot build, or a file that cannot be written.
    """
    variants = dict(config.cases)
    compiler = compiler or functools.partial(torch.compile, dynamic=False)

    def candidates_of(case: StepCase) -> Iterator[tuple[Candidate, Build]]:
        configure_inductor()
        builder = _Builder(case, compiler, probe)
        for variant in variants[case]:
            say(f"{case}: building and checking {variant.name}")
            yield Candidate(variant.name), functools.partial(builder.build, variant)

    results = Results("step", environment(config.device), dict(config.settings))
    return runner.run(results, replace(config, cases=list(variants)), candidates_of, say, stopwatch)


class _Builder:
    """One case: its batch, its plain model, and the weights and outputs of the twins built so far."""

    def __init__(self, case: StepCase, compiler: Callable[[nn.Module], Any], probe: Probe) -> None:
        self._case, self._compiler, self._probe = case, compiler, probe
        self._plain, self._images, self._labels = case.create()
        self._twins: dict[str, tuple[dict[str, Tensor], StepOutput, StepOutput | None]] = {}

    def build(self, variant: Variant, candidate: Candidate) -> tuple[str, str]:
        """Build and check a variant; whatever compiles does so here."""
        autocast = AUTOCAST[self._case.autocast]
        gc.collect()
        probe = self._probe(self._case.device)
        torch.manual_seed(0)
        model = variant.build(self._plain).train()
        perturb(model, torch.Generator().manual_seed(0))
        twin = self._twins.get(variant.twin)
        if twin:
            model.load_state_dict(twin[0])
        elif variant.twin != variant.name:
            return "skipped", f"{variant.twin}, which it is checked against, did not run"
        model = self._case.place(model)
        reason = variant.why_not(model, autocast)
        if reason:
            return "skipped", reason
        weights = {name: value.detach().clone().cpu() for name, value in model.state_dict().items()}
        step = TrainingStep(model, self._images, self._labels, autocast, self._compiler if variant.compiled else None)
        output = step.output()
        candidate.facts = {"parameter_count": count_parameters(model), "loss": output.loss}
        if not math.isfinite(output.loss):
            return "wrong", f"its loss is {output.loss}"
        if twin:
            errors, mistake = output.compare(*twin[1:])
            candidate.facts |= {f"{what}_error": error for what, error in errors.items()}
            if mistake:
                return "wrong", mistake
        else:
            exact = TrainingStep(model, self._images, self._labels).output() if autocast else None
            self._twins[variant.name] = weights, output, exact
        step()  # gives the optimizer its state
        candidate.facts |= probe(step, not variant.compiled)
        candidate.tasks = {"step": function(step)}
        return "ok", ""
