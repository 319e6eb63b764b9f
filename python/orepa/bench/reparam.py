"""Measure re-parameterised nets of others, in training and at inference: ``orepa bench reparam``."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial

import torch
from timm.utils import reparameterize_model
from torch import nn

from ..module_info import count_parameters
from ..modules.linear_block import LinearBlock
from ..surgery.convert import convert
from ..surgery.linear_regions import Region
from ..surgery.merge import rewrite_regions, to_conv2d
from ..surgery.prepare import prepare
from ..surgery.replace import copy_model, replace_modules
from ..surgery.report import relative_error
from ..timing import Stopwatch, cpu_peak, function
from . import runner
from .check import ALLOWED
from .machine import environment
from .results import Results
from .runner import BenchConfig, Build, Candidate, Say
from .step import AUTOCAST, StepCase, TrainingStep

#: makes a net of the same function from one in eval mode, which stays as it is
Form = Callable[[nn.Module], nn.Module]


def online(net: nn.Module) -> nn.Module:
    """Make every linear region one `OREPAConv` of its branches and a norm, and leave all other convolutions."""
    blocks = {name for name, module in net.named_modules() if any(module.children())}
    return prepare(net, lambda name, _conv: {} if name in blocks else None, preserve=True)


def plain_twin(net: nn.Module) -> nn.Module:
    """Put one convolution and a norm in the place of every linear region."""
    twin = copy_model(net)
    return replace_modules(twin, rewrite_regions(twin, _conv_and_norm).replacements)


@torch.no_grad()
def _conv_and_norm(region: Region) -> tuple[nn.Module, float]:
    conv, error = to_conv2d(region)
    norm = nn.BatchNorm2d(conv.out_channels)
    norm.running_var.fill_(1 - norm.eps)  # type: ignore[union-attr]
    if conv.bias is not None:
        norm.bias.copy_(conv.bias)
    conv.bias = None
    layer = nn.Sequential()
    layer.add_module("conv", conv)
    layer.add_module("bn", norm)
    return layer, error


AS_IT_COMES = "as it comes"
#: by mode what is compared, by the names of the columns
FORMS: dict[str, dict[str, Form]] = {
    "step": {AS_IT_COMES: copy_model, "online": online, "plain twin": plain_twin},
    "inference": {AS_IT_COMES: copy_model, "reparameterize_model": reparameterize_model, "orepa.convert": convert},
}


def run(config: BenchConfig, say: Say = lambda _text: None, stopwatch: Stopwatch | None = None) -> Results:
    """Check and time all `FORMS` of the net of every `StepCase`: see `orepa.bench.runner.run`."""

    def candidates_of(case: StepCase) -> Iterator[tuple[Candidate, Build]]:
        builder = _Builder(case)
        for mode in config.modes:
            for name, form in FORMS[mode].items():
                say(f"{case}: building and checking {name}")
                yield Candidate(name, modes=(mode,)), partial(builder.build, mode, form)

    results = Results("reparam", environment(config.device), dict(config.settings))
    return runner.run(results, config, candidates_of, say, stopwatch)


class _Builder:
    """One case: its batch, the net as it comes, and the outputs that every form of it must have."""

    def __init__(self, case: StepCase) -> None:
        self._case = case
        self._net, self._images, self._labels = case.create()
        randomize(self._net, self._images.cpu())
        self._net.eval()
        self._outputs = self._evaluate(case.place(copy_model(self._net)))

    def build(self, mode: str, form: Form, candidate: Candidate) -> tuple[str, str]:
        """Build and check one form."""
        model = form(self._net)
        count = _convolutions(model)
        if candidate.name != AS_IT_COMES and count == _convolutions(self._net):
            return "skipped", "this net has nothing to merge"
        model = self._case.place(model)
        error = relative_error(self._outputs, self._evaluate(model))
        candidate.facts = {"parameter_count": count_parameters(model), "convolutions": count, "error": error}
        if not error <= ALLOWED["logits"]:  # NaN is above everything
            return "wrong", f"in eval mode its outputs differ by {error:.1e}, where {ALLOWED['logits']:.0e} is allowed"
        step = TrainingStep(model, self._images, self._labels, AUTOCAST[self._case.autocast])
        if mode == "inference":
            candidate.tasks = {mode: function(torch.no_grad()(step.logits))}
            return "ok", ""
        model.train()
        loss = float(step())  # gives the optimizer its state
        if not math.isfinite(loss):
            return "wrong", f"its loss is {loss}"
        candidate.facts["peak_bytes"] = peak_bytes(step)
        candidate.tasks = {mode: function(step)}
        return "ok", ""

    def _evaluate(self, model: nn.Module) -> torch.Tensor:
        with torch.no_grad(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            return model.eval()(self._images)


@torch.no_grad()
def randomize(net: nn.Module, images: torch.Tensor) -> None:
    """Move values per channel (of norms, layer scales) off those that hide a mistake; norms get statistics of the images.

    With the statistics of a fresh net, outputs can vanish or explode, and the check would see one branch or none.
    """
    norms = [module for module in net.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for module in net.modules():
        for value in () if isinstance(module, nn.Linear) else module.parameters(recurse=False):
            if value.numel() == max(value.shape, default=1):
                value.add_(0.4 * torch.rand_like(value) - 0.2)
    for norm in norms:
        norm.momentum = 1.0
    net.train()(images)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum


def _convolutions(model: nn.Module) -> int:
    return sum(isinstance(module, nn.Conv2d | LinearBlock) for module in model.modules())


def peak_bytes(step: TrainingStep) -> int:
    """Return the bytes allocated at the peak of a step that has run before; those of model, momentum and batch count."""
    step.clear()
    state = [value for values in step.optimizer.state.values() for value in values.values()]
    tensors = [*step.model.parameters(), *step.model.buffers(), *state, step.images, step.labels]
    storages = (t.untyped_storage() for t in tensors if isinstance(t, torch.Tensor))
    fixed = sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
    if step.images.is_cuda:
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        return fixed + torch.cuda.max_memory_allocated() - before
    return fixed + cpu_peak(step)
