"""What is measured: everything that a user could pick to compute a squeeze, behind one interface.

A provider turns a workload into tasks. Those that squeeze are `Squeezer`; the floors are in `orepa.bench.floors`, the
authors' own code in `orepa.bench.authors`.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import orepa_kernels
from orepa_kernels.backends.base import Request
from orepa_kernels.dispatch import NAMES, select

from ..timing import Task, nothing
from .formulation import Operands, formulation
from .workload import Workload


@dataclass(frozen=True)
class Built:
    """A provider ready for one workload, built once: a compiled function must not be compiled again for the next use.

    Args:
        tasks: what to time, by mode: ``"forward"``, ``"backward"``, ``"both"``.
        squeeze: a function from nothing to the kernel ``[O, I/g, k, k]``, with its graph; None for a floor.
        parameters: the tensors to differentiate the kernel by.
        restore: gradients by ``parameters`` to those by ``work.parameters``.
    """

    tasks: Mapping[str, Task]
    squeeze: Callable[[], Tensor] | None = None
    parameters: Sequence[Tensor] = ()
    restore: Callable[[Sequence[Tensor]], Sequence[Tensor]] = list


class Provider(ABC):
    """One way to do the work of a squeeze.

    Attributes:
        name: unique, as the user types it.
        floor: a lower bound that computes no kernel: it is drawn in, and not checked.
    """

    name: str
    floor: bool = False

    def why_not(self, work: Workload) -> str:
        """The reason why this provider does not cover a workload, or an empty string."""
        return ""

    def amount(self, work: Workload, mode: str) -> dict[str, int]:
        """The ``flops`` and ``bytes`` that its rates are computed from: by default, those that a squeeze takes at least."""
        return {"flops": work.flops(mode), "bytes": work.bytes(mode)}

    @abstractmethod
    def build(self, work: Workload) -> Built:
        """Make ready for a workload."""


class Squeezer(Provider):
    """A provider that computes kernels, differentiably."""

    @abstractmethod
    def squeezer(self, work: Workload) -> Callable[[], Tensor]:
        """A function from nothing to the kernel ``[O, I/g, k, k]`` in ``work.out_dtype``, with its graph."""

    def parameters(self, work: Workload) -> Sequence[Tensor]:
        """The tensors to differentiate by, one per entry of ``work.parameters``, in that order."""
        return work.parameters

    def restore(self, work: Workload, gradients: Sequence[Tensor]) -> Sequence[Tensor]:
        """Gradients by `parameters` in the layout of ``work.parameters``."""
        return gradients

    def build(self, work: Workload) -> Built:
        squeeze, parameters = self.squeezer(work), list(self.parameters(work))

        def backward(kernel: Tensor) -> Sequence[Tensor]:
            return torch.autograd.grad(kernel, parameters, work.grad)

        tasks = {
            "forward": Task(nothing, lambda _: squeeze()),
            "backward": Task(squeeze, backward),
            "both": Task(nothing, lambda _: backward(squeeze())),
        }
        return Built(tasks, squeeze, parameters, lambda gradients: self.restore(work, gradients))


class Eager(Squeezer):
    """The plain einsum formulation, run eagerly: the baseline of every ratio."""

    name = "eager"

    def squeezer(self, work: Workload) -> Callable[[], Tensor]:
        squeeze = formulation(work.case.topology, work.plan, work.out_dtype)
        return lambda: squeeze(work.operands)


class Compiled(Squeezer):
    """`torch.compile` of the eager formulation.

    Args:
        name: of the provider.
        mode: of ``torch.compile``.
        compiler: takes a function and ``mode``, ``fullgraph``, ``dynamic``; a stand-in in tests.
    """

    def __init__(self, name: str, mode: str, compiler: Callable[..., Callable[..., Tensor]] = torch.compile) -> None:
        self.name, self._mode, self._compiler = name, mode, compiler

    def squeezer(self, work: Workload) -> Callable[[], Tensor]:
        squeeze: Callable[[Operands], Tensor] = formulation(work.case.topology, work.plan, work.out_dtype)
        # A dictionary of tensors would be guarded key by key at each call; a list costs the caller less.
        names = list(work.operands)
        tensors = list(work.operands.values())

        def function(values: list[Tensor]) -> Tensor:
            return squeeze(dict(zip(names, values, strict=True)))

        configure_inductor()
        compiled = self._compiler(function, mode=self._mode, fullgraph=True, dynamic=False)
        return lambda: compiled(tensors)


def configure_inductor() -> None:
    """Make ``torch.compile`` fit to be measured; call it after ``torch.set_num_threads``.

    Its cache on disk does not know for how many threads CPU code was generated, unless that number is configured: code for
    two threads would be taken up, and timed, by a run with one. And autotuning prints over the progress bar. Neither has a
    public switch, so a missing one is passed over.
    """
    with contextlib.suppress(ImportError, AttributeError):
        from torch._inductor import config, select_algorithm

        config.cpp.threads = torch.get_num_threads()
        config.max_autotune_report_choices_stats = False
        select_algorithm.PRINT_AUTOTUNE = False


class Kernels(Squeezer):
    """One backend of `orepa_kernels`, through the public function."""

    def __init__(self, name: str) -> None:
        self.name = name

    def why_not(self, work: Workload) -> str:
        first = next(iter(work.operands.values()))
        try:
            select(self.name, Request(work.plan, first.device, first.dtype, work.out_dtype))
        except orepa_kernels.BackendError as error:
            return str(error).rpartition("cannot run: ")[2]
        return ""

    def squeezer(self, work: Workload) -> Callable[[], Tensor]:
        blocks, tensors = [work.plan], [list(work.operands.values())]
        return lambda: orepa_kernels.squeeze(blocks, tensors, dtype=work.out_dtype, backend=self.name)[0]


def everything() -> dict[str, Provider]:
    """Every provider of this package, by name, in the order in which tables show them."""
    from .floors import Copy, Gemms

    providers: list[Provider] = [
        Eager(),
        Compiled("compile", "default"),
        # Without its own CUDA graphs, because the harness captures every provider in one.
        Compiled("compile-max-autotune", "max-autotune-no-cudagraphs"),
        *(Kernels(name) for name in reversed(NAMES)),
        Gemms(),
        Copy(),
    ]
    return {provider.name: provider for provider in providers}
