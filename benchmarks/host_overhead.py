"""Time the host during one eager, warm `orepa_kernels.squeeze` of one block with ten operands.

    python benchmarks/host_overhead.py [--rounds N] [--out FILE.json]

The goal is at most 15 microseconds forward, with autograd, for the Triton backend. With a GPU, calls are enqueued one after
another and nothing is waited for. Without one, everything is done but the calls of the driver itself: Triton compiles for a
GPU that is not there, and something that does nothing is called in place of its compiled launcher
(`tests/kernels/triton_stub.py`; the output says what was left out). `autograd.Function` is what torch takes for one that
saves ten tensors and makes one: nobody can be faster. Real-time priority (``chrt -f 20``) keeps other programs out.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "kernels"))

import orepa_kernels
from orepa import OREPAConv
from orepa.bench.machine import OtherWork, environment
from orepa.bench.results import Results, Row
from orepa.bench.tables import median, render
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
            results.rows = measure(names, device, arguments.rounds)
    results.environment["busy_cores_of_others"] = others.cores
    results.complete = True
    print(f"{results.rows[0].case['operands']} operands, {device}; left out: {missing}")
    rows = [[row.provider, row.mode, median(row), f"{1e6 * min(row.seconds):.1f}"] for row in results.rows]
    print(render(["", "mode", "median us", "least us"], rows, text=2))
    if arguments.out:
        results.save(arguments.out)


if __name__ == "__main__":
    main()
