"""Measure a whole training step, in every way in which a user could train: ``orepa bench step``."""

from __future__ import annotations

import contextlib
import functools
import gc
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from ..module_info import count_parameters
from ..modules.accumulation import squeeze_once
from ..modules.reduction import exclude_from_ddp
from ..timing import Stopwatch, function, reduced_bytes
from ..train.model import create_plain, model_arguments
from . import runner
from .check import StepOutput
from .machine import environment
from .providers import configure_inductor
from .results import STATUSES, Results
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
    accumulate: int = 1  # forward and backward passes per step, each on a batch
    processes: int = 1  # that train together

    def as_dict(self) -> dict[str, Any]:
        return {k: v for k, v in asdict(self).items() if v != 1 or k not in ("accumulate", "processes")}

    def __str__(self) -> str:
        times = f"{self.accumulate} x " if self.accumulate > 1 else ""
        return f"{self.model}, {times}{self.batch} x {self.size} px"

    def create(self) -> tuple[nn.Module, Tensor, Tensor]:
        """Return the model as timm builds it, on the CPU, and a batch of images and labels on the device.

        Each process has its own batch.
        """
        torch.manual_seed(0)
        model = create_plain(self.model, model_arguments(self.model, CLASSES, 3, self.size), self.size)
        torch.manual_seed(1 + (distributed.get_rank() if self.processes > 1 else 0))
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

    Gradients of float16 are not scaled, as that does not depend on the model. ``compiler`` turns the model into what is called,
    ``accumulate`` times per step, with ``once`` under `orepa.squeeze_once`.
    """

    def __init__(
        self,
        model: nn.Module,
        images: Tensor,
        labels: Tensor,
        autocast: torch.dtype | None = None,
        compiler: Callable[[nn.Module], Callable[[Tensor], Tensor]] | None = None,
        accumulate: int = 1,
        once: bool = False,
    ) -> None:
        self.model, self.images, self.labels, self.autocast = model, images, labels, autocast
        self._call = compiler(model) if compiler else model
        self._accumulate, self._once = accumulate, once
        self.optimizer = torch.optim.SGD(model.parameters(), LEARNING_RATE, momentum=0.9)

    def __call__(self) -> Tensor:
        """Run a whole step; return the loss before it, a scalar without a graph."""
        loss = self._gradients()
        self.optimizer.step()
        return loss

    def _gradients(self, see: Callable[[Tensor], object] = lambda _logits: None) -> Tensor:
        """Make the gradients of the mean loss; return the loss of the last batch, without a graph."""
        self.clear()
        once = squeeze_once(self.model, distributed.group.WORLD, self._accumulate) if self._once else None
        with once or contextlib.nullcontext():
            for left in reversed(range(self._accumulate)):
                # Processes exchange gradients with the last batch only.
                with getattr(self._call, "no_sync", contextlib.nullcontext)() if left else contextlib.nullcontext():
                    logits = self.logits()
                    see(logits)
                    loss = self.loss(logits)
                    del logits  # whose memory the backward pass may have
                    (loss / self._accumulate).backward()
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
        """Run a step without its update."""
        seen: list[Tensor] = []
        loss = self._gradients(seen.append)
        gradients = {name: p.grad.cpu() for name, p in self.model.named_parameters() if p.grad is not None}
        self.clear()
        return StepOutput(float(loss), seen[-1].detach().float().cpu(), gradients)


#: Called on the device before a model is built; the function that it returns gets the step, which has made gradients, and
#: whether it is eager, and returns facts for the row: how experiments measure more than time.
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
        """Build and check a variant; whatever compiles does so here. All processes agree on the outcome."""
        among = self._case.processes
        outcomes = [self._build(variant, candidate)] * among
        if among > 1:
            distributed.all_gather_object(outcomes, outcomes[0])
        return max(outcomes, key=lambda outcome: STATUSES.index(outcome[0]))

    def _build(self, variant: Variant, candidate: Candidate) -> tuple[str, str]:
        case, autocast = self._case, AUTOCAST[self._case.autocast]
        gc.collect()
        probe = self._probe(case.device)
        torch.manual_seed(0)
        model = variant.build(self._plain).train()
        perturb(model, torch.Generator().manual_seed(0))
        twin = self._twins.get(variant.twin)
        if twin:
            model.load_state_dict(twin[0])
        elif variant.twin != variant.name:
            return "skipped", f"{variant.twin}, which it is checked against, did not run"
        model = case.place(model)
        reason = variant.why_not(model, autocast, case.processes)
        if reason:
            return "skipped", reason
        if variant.once and case.processes > 1:
            exclude_from_ddp(model)
        weights = {name: value.detach().clone().cpu() for name, value in model.state_dict().items()}
        call = self._compiler if variant.compiled else DistributedDataParallel if case.processes > 1 else None
        how: dict[str, Any] = {"compiler": call, "accumulate": case.accumulate, "once": variant.once}
        exact = TrainingStep(model, self._images, self._labels, **how).output() if autocast and not twin else None
        step = TrainingStep(model, self._images, self._labels, autocast, **how)
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
            self._twins[variant.name] = weights, output, exact
        candidate.facts |= probe(step, not variant.compiled)
        if case.processes > 1:
            candidate.facts["reduced_bytes"] = reduced_bytes(step)
        candidate.tasks = {"step": function(step)}
        return "ok", ""
