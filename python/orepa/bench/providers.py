"""Provide every way to squeeze that a user could pick, behind one interface."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import orepa_kernels
from orepa_kernels.backends.base import Request
from orepa_kernels.dispatch import NAMES, select
from orepa_kernels.reference import identity, squeeze_block

from ..timing import Task, function
from .problem import Problem

Operands = Mapping[str, Tensor]
#: the tasks of every provider
MODES = ("forward", "backward", "both")


@dataclass(frozen=True)
class Built:
    """A provider ready for one problem; built once, so that nothing is compiled twice."""

    tasks: Mapping[str, Task]  # by mode
    squeeze: Callable[[], Tensor] | None = None  # returns the kernel with its graph; None for a floor
    parameters: Sequence[Tensor] = ()  # to differentiate by, one per entry of `problem.parameters`
    restore: Callable[[Sequence[Tensor]], Sequence[Tensor]] = list  # to gradients by `problem.parameters`


class Provider:
    """One way to do the work of a squeeze: implements `squeezer`, or `build` where that is not enough."""

    name: str  # unique, as the user types it
    floor: bool = False  # a lower bound, which computes no kernel and is not checked

    def why_not(self, problem: Problem) -> str:
        """Return why this provider does not support a problem, or an empty string."""
        return ""

    def squeezer(self, problem: Problem) -> Callable[[], Tensor]:
        """Return a function that computes the kernel ``[O, I/g, k, k]`` in ``problem.out_dtype``, with its graph."""
        raise NotImplementedError

    def build(self, problem: Problem) -> Built:
        """Get ready for a problem."""
        return build_squeezer(self.squeezer(problem), problem.parameters, problem.grad)


def build_squeezer(squeeze: Callable[[], Tensor], parameters: Sequence[Tensor], grad: Tensor, **more: Any) -> Built:
    """Return the tasks of a differentiable squeeze; ``more`` goes to `Built`."""

    def backward(kernel: Tensor) -> Sequence[Tensor]:
        return torch.autograd.grad(kernel, parameters, grad)

    tasks = {
        "forward": function(squeeze),
        "backward": Task(squeeze, backward),
        "both": function(lambda: backward(squeeze())),
    }
    return Built(tasks, squeeze, parameters, **more)


def kxk(p: Operands, groups: int) -> Tensor:
    """Compose `orepa`, and `repvgg_dense` without the 1x1 branch (paper Eq. 4), one einsum per branch."""
    scales = p["scales"]
    o, per_group, kh, kw = p["origin_weight"].shape
    mean = p["origin_weight"].new_full((kh, kw), 1 / (kh * kw))

    origin = torch.einsum("oihw,o->oihw", p["origin_weight"], scales[0])
    avg = torch.einsum("oi,hw,o->oihw", p["avg_weight"].flatten(1), mean, scales[1])
    prior = torch.einsum("oi,ohw,o->oihw", p["prior_weight"].flatten(1), p["prior_filter"], scales[2])

    first, second = p["conv1x1_kxk_conv1"], p["conv1x1_kxk_conv2"]
    first = (first + identity(first.shape[0], per_group, first)).reshape(groups, -1, per_group)
    second = second.reshape(groups, o // groups, -1, kh, kw)
    sequence = torch.einsum("gti,gothw->goihw", first, second).reshape(o, per_group, kh, kw)
    sequence = torch.einsum("oihw,o->oihw", sequence, scales[3])

    dw = p["dws_depthwise"].reshape(groups, per_group, -1, kh, kw)
    pw = p["dws_pointwise"].reshape(groups, o // groups, per_group, -1)
    separable = torch.einsum("giehw,goie->goihw", dw, pw).reshape(o, per_group, kh, kw)
    separable = torch.einsum("oihw,o->oihw", separable, scales[-1])

    kernel = origin + avg + prior + sequence + separable
    if "conv1x1_weight" in p:
        point = torch.einsum("oihw,o->oihw", p["conv1x1_weight"], scales[4])
        kernel = kernel + F.pad(point, (kw // 2, kw // 2, kh // 2, kh // 2))
    return kernel


def rep1x1(p: Operands, groups: int) -> Tensor:
    """Compose the `rep1x1` block: a 1x1 and two in sequence."""
    scales = p["scales"]
    o, per_group = p["origin_weight"].shape[:2]
    first = p["conv1x1_1x1_conv1"].reshape(groups, -1, per_group)
    second = p["conv1x1_1x1_conv2"].reshape(groups, o // groups, -1)
    sequence = torch.einsum("gti,got->goi", first, second).reshape(o, per_group, 1, 1)
    origin = torch.einsum("oihw,o->oihw", p["origin_weight"], scales[0])
    return origin + torch.einsum("oihw,o->oihw", sequence, scales[1])


def formulation(problem: Problem) -> Callable[[Operands], Tensor]:
    """Return the block as a user would write it, untuned; topologies not written out above take the reference's einsums."""
    written = {"orepa": kxk, "repvgg_dense": kxk, "rep1x1": rep1x1}.get(problem.case.topology)
    plan, out_dtype = problem.plan, problem.out_dtype

    def squeeze(operands: Operands) -> Tensor:
        kernel = squeeze_block(plan, operands) if written is None else written(operands, plan.groups)
        return kernel.to(out_dtype)

    return squeeze


class Eager(Provider):
    """The plain einsum formulation, run eagerly: the baseline of every ratio."""

    name = "eager"

    def squeezer(self, problem: Problem) -> Callable[[], Tensor]:
        squeeze = formulation(problem)
        return lambda: squeeze(problem.operands)


class Compiled(Provider):
    """`torch.compile` of the eager formulation, in a mode of it."""

    def __init__(self, name: str, mode: str, compiler: Callable[..., Callable[..., Tensor]] = torch.compile) -> None:
        self.name, self._mode, self._compiler = name, mode, compiler

    def squeezer(self, problem: Problem) -> Callable[[], Tensor]:
        squeeze = formulation(problem)
        # A dictionary of tensors would be guarded key by key at each call; a list costs the caller less.
        names, tensors = list(problem.operands), list(problem.operands.values())

        def from_list(values: list[Tensor]) -> Tensor:
            return squeeze(dict(zip(names, values, strict=True)))

        configure_inductor()
        compiled = self._compiler(from_list, mode=self._mode, fullgraph=True, dynamic=False)
        return lambda: compiled(tensors)


def configure_inductor() -> None:
    """Make ``torch.compile`` fit to be measured; call it after ``torch.set_num_threads``.

    Unless the number of threads is configured, its cache on disk does not know it: a run with one thread would load, and
    time, code for two. And autotuning prints over the progress. Neither has a public switch, so a missing one is ignored.
    """
    with contextlib.suppress(ImportError, AttributeError):
        from torch._inductor import config, select_algorithm

        config.cpp.threads = torch.get_num_threads()
        config.max_autotune_report_choices_stats = False
        select_algorithm.PRINT_AUTOTUNE = False


class Kernels(Provider):
    """One backend of `orepa_kernels`, through the public function."""

    def __init__(self, name: str) -> None:
        self.name = name

    def why_not(self, problem: Problem) -> str:
        first = next(iter(problem.operands.values()))
        return backend_refusal(self.name, Request(problem.plan, first.device, first.dtype, problem.out_dtype))

    def squeezer(self, problem: Problem) -> Callable[[], Tensor]:
        blocks, tensors = [problem.plan], [list(problem.operands.values())]
        return lambda: orepa_kernels.squeeze(blocks, tensors, dtype=problem.out_dtype, backend=self.name)[0]


def backend_refusal(name: str, request: Request) -> str:
    """Return why a backend of `orepa_kernels` cannot run a request, or an empty string."""
    try:
        select(name, request)
    except orepa_kernels.BackendError as error:
        return str(error).rpartition("cannot run: ")[2]
    return ""


def all_providers() -> dict[str, Provider]:
    """Return every provider by name, in the order in which tables show them."""
    # Without CUDA graphs of its own: every provider is captured in one.
    tuned = Compiled("compile-max-autotune", "max-autotune-no-cudagraphs")
    providers = [Eager(), Compiled("compile", "default"), tuned, *(Kernels(name) for name in reversed(NAMES))]
    return {provider.name: provider for provider in providers}
