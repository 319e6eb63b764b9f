"""Time the host during one eager, warm `orepa_kernels.squeeze` of one block, and during all squeezes of a ResNet-50's step.

    python benchmarks/host_overhead.py [--rounds N] [--out FILE.json]

The goal is at most 15 microseconds forward, with autograd, for the Triton backend. With a GPU, calls are enqueued one after
another and nothing is waited for. Without one, everything is done but the calls of the driver itself: Triton compiles for a
GPU that is not there, and something that does nothing is called in place of its compiled launcher
(`tests/kernels/triton_stub.py`; the output says what was left out). `autograd.Function` is what torch takes for one that
saves ten tensors and makes one: nobody can be faster.

The model has the blocks of a ResNet-50, with few channels, and convolves nothing: each block returns its kernel, and parameters
get their gradients. Its blocks squeeze alone, together in each forward, or once for a step of one or four batches. `nn.Conv2d`
is what torch takes for modules that return a plain weight in their place.

Real-time priority (``chrt -f 20``) keeps other programs out.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "kernels"))

import orepa
import orepa_kernels
from orepa import OREPAConv
from orepa.bench.machine import OtherWork, environment
from orepa.bench.results import Results, Row
from orepa.bench.tables import describe, median, number, render
from orepa.modules.step import squeeze_alone_in, squeeze_together_in
from orepa.timing import CpuStopwatch, Task, function, interleaved

#: so small that memory comes from the allocator's own, as it does on a GPU
CHANNELS = 16
MODES = ("forward", "no_grad", "backward")


class Least(torch.autograd.Function):
    """A function of operands that does nothing but what a squeeze has to: save them, and make a kernel."""

    @staticmethod
    def forward(ctx, like: Tensor, *operands: Tensor) -> Tensor:  # type: ignore[no-untyped-def, override]
        ctx.save_for_backward(*operands)
        return torch.empty_like(like)

    @staticmethod
    def backward(ctx, upstream: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[no-untyped-def, override]
        needed = ctx.needs_input_grad[1:]
        return (None, *[torch.empty_like(t) if n else None for t, n in zip(ctx.saved_tensors, needed, strict=True)])


class HostStopwatch(CpuStopwatch):
    """The wall clock on calls that only enqueue, on a device that begins idle."""

    def sample(self, task: Task, calls: int) -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return super().sample(task, calls)


def tasks_of(squeeze: Callable[[], Tensor], parameters: Sequence[Tensor], upstream: Tensor) -> dict[str, Task]:
    """What to time, by mode."""

    def without() -> Tensor:
        with torch.no_grad():
            return squeeze()

    backward = Task(squeeze, lambda kernel: torch.autograd.grad(kernel, parameters, upstream))
    return {"forward": function(squeeze), "no_grad": function(without), "backward": backward}


def measure(names: Sequence[str], device: str, rounds: int) -> list[Row]:
    """Time all backends in turns, after some calls that warm up the cache."""
    conv = OREPAConv(CHANNELS, CHANNELS, 3, bias=False).to(device)
    blocks, operands = [conv.plan], [conv.operands()]
    like = torch.empty(conv.plan.shape, device=device)
    squeezes = {n: lambda n=n: orepa_kernels.squeeze(blocks, operands, backend=n)[0] for n in names}
    least = super(torch.autograd.Function, Least).apply  # without its Python half, as the package does
    squeezes["autograd.Function"] = lambda: least(like, *operands[0])
    by_mode: dict[str, dict[str, Task]] = {mode: {} for mode in MODES}
    for name, squeeze in squeezes.items():
        for mode, task in tasks_of(squeeze, list(conv.parameters()), torch.ones_like(like)).items():
            for _ in range(5):
                task.run(task.prepare())
            if mode != "no_grad" or name in names:
                by_mode[mode][name] = task
    case = {"out": CHANNELS, "in": CHANNELS, "k": 3, "operands": len(operands[0])}
    rows = []
    for mode, tasks in by_mode.items():
        for name, samples in interleaved(tasks, rounds, stopwatch=HostStopwatch()).items():
            rows.append(Row(case, name, mode, processes=[samples], floor=name not in names))
    return rows


class End(torch.autograd.Function):
    """Stands for all that follows the kernels, up to the loss."""

    @staticmethod
    def forward(ctx, *kernels: Tensor) -> Tensor:  # type: ignore[no-untyped-def, override]
        ctx.save_for_backward(*kernels)
        return kernels[0].new_empty(())

    @staticmethod
    def backward(ctx, _: Tensor) -> tuple[Tensor, ...]:  # type: ignore[no-untyped-def, override]
        return tuple(map(torch.empty_like, ctx.saved_tensors))


class Kernels(nn.Module):
    """The blocks of a ResNet-50, which return their kernels; or plain weights of the same shapes."""

    def __init__(self, plain: bool) -> None:
        super().__init__()
        make = nn.Conv2d if plain else OREPAConv
        self.blocks = nn.ModuleList(make(i, o, k, bias=False) for o, i, k in resnet50(CHANNELS))
        for block in self.blocks:
            block.order = "squeeze"

    def forward(self, x: Tensor) -> Tensor:
        return End.apply(*[block(x) for block in self.blocks])


def resnet50(width: int) -> Iterator[tuple[int, int, int]]:
    """Yield output and input channels and kernel size of every convolution; the original has a width of 64."""
    yield width, 3, 7
    before = width
    for stage, count in enumerate((3, 4, 6, 3)):
        inner = width * 2**stage
        for index in range(count):
            yield from ((inner, before, 1), (inner, inner, 3), (4 * inner, inner, 1))
            if index == 0:
                yield 4 * inner, before, 1
            before = 4 * inner


def model_tasks(model: nn.Module, x: Tensor, once: bool) -> dict[str, Task]:
    """What to time of a model, by mode; ``once`` leaves the modes that are no whole step."""
    parameters = list(model.parameters())

    def step(batches: int) -> None:
        with orepa.squeeze_once(model) if once else contextlib.nullcontext():
            for _ in range(batches):
                model(x).backward()

    def clear() -> None:
        model.zero_grad()

    tasks = {f"step of {n}": Task(clear, lambda _, n=n: step(n)) for n in (1, 4)}
    if once:
        return tasks
    backward = Task(lambda: model(x), lambda end: torch.autograd.grad(end, parameters))
    return {"forward": function(lambda: model(x)), "backward": backward, **tasks}


def measure_model(names: Sequence[str], device: str, rounds: int) -> list[Row]:
    """Time the squeezes of a whole model, in all ways to squeeze."""
    by_mode: dict[str, dict[str, Task]] = {}
    x = torch.empty(1, 1, 1, 1, device=device)

    def add(name: str, model: nn.Module, once: bool = False) -> None:
        for mode, task in model_tasks(model, x, once).items():
            for _ in range(5):
                task.run(task.prepare())
            by_mode.setdefault(mode, {})[name] = task

    alone, plain = Kernels(plain=False).to(device), Kernels(plain=True).to(device)
    operands = sum(len(block.operands()) for block in alone.blocks)
    case = {"model": "resnet50", "blocks": len(alone.blocks), "operands": operands}
    with (
        mock.patch.object(OREPAConv, "_convolve", lambda _self, _x, kernel, _bias: kernel),
        mock.patch.object(nn.Conv2d, "forward", lambda self, _x: self.weight),
    ):
        for name in names:
            for block in alone.blocks:
                block.backend = name
            models = {way: copy.deepcopy(alone) for way in ("alone", "together", "once")}
            for way, model in models.items():
                (squeeze_together_in if way == "together" else squeeze_alone_in)(model)
                add(f"{name}, {way}", model, way == "once")
        add("nn.Conv2d", plain)
        rows = []
        for mode, tasks in by_mode.items():
            for name, samples in interleaved(tasks, rounds, stopwatch=SingleStopwatch()).items():
                rows.append(Row(case, name, mode, processes=[samples], floor=name == "nn.Conv2d"))
    return rows


class SingleStopwatch(HostStopwatch):
    """One call per sample, before which gradients are cleared."""

    def calls(self, task: Task) -> int:
        self.sample(task, 1)
        return 1


def main() -> None:
    """Measure, print a table, and write JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=300, help="samples per backend and mode (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="write the results here, as JSON")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    gpu = torch.cuda.is_available()
    device, names, missing = ("cuda" if gpu else "cpu"), ["triton"], "nothing"
    with contextlib.ExitStack() as stack:
        if gpu:
            names = [name for name in ("triton", "cuda") if orepa_kernels.backends()[name]]
        else:
            from triton_stub import pretend

            stack.enter_context(pretend())
            missing = "the compiled launcher and all calls of the driver"
        results = Results("host_overhead", environment(device), {"rounds": arguments.rounds, "missing": missing})
        with OtherWork() as others:
            results.rows = measure(names, device, arguments.rounds) + measure_model(names, device, arguments.rounds)
    results.environment["busy_cores_of_others"] = others.cores
    results.complete = True
    print(f"{device}; left out: {missing}")
    rows = [[describe(r.case), r.provider, r.mode, median(r), number(1e6 * min(r.seconds))] for r in results.rows]
    print(render(["blocks, operands", "", "mode", "median us", "least us"], rows, text=3))
    if arguments.out:
        results.save(arguments.out)


if __name__ == "__main__":
    main()
