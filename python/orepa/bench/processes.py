"""Measure steps of several processes that train together: ``orepa bench step --processes``."""

from __future__ import annotations

import argparse
import math
import tempfile
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

from torch import distributed
from torch.multiprocessing import spawn
from torch.multiprocessing.spawn import ProcessException

from ..errors import UserError
from ..timing import CpuStopwatch, Task
from . import step
from .results import Results, load
from .runner import BenchConfig


def run(
    args: argparse.Namespace, configure: Callable[[argparse.Namespace], BenchConfig], say: Callable[[str], None]
) -> Results:
    """Run `orepa.bench.step.run` in each process; return the results of the first. A UserError where one of them fails."""
    with tempfile.TemporaryDirectory() as folder:
        out = args.out or Path(folder, "step.json")
        try:
            spawn(_work, (args, folder, out, configure, say), nprocs=args.processes)
        except ProcessException as error:
            raise UserError(f"a process failed: {str(error).strip().splitlines()[-1]}") from error
        return load(out)


def _work(
    rank: int,
    args: argparse.Namespace,
    folder: str,
    out: Path,
    configure: Callable[[argparse.Namespace], BenchConfig],
    say: Callable[[str], None],
) -> None:
    where, patience = f"file://{folder}/processes", timedelta(minutes=5)
    distributed.init_process_group("gloo", where, patience, args.processes, rank)
    # All of them stop after as many rounds, whatever their clocks say.
    config = replace(configure(args), seconds=math.inf, out=None if rank else out)
    step.run(config, (lambda _text: None) if rank else say, _Together())
    distributed.destroy_process_group()


class _Together(CpuStopwatch):
    """Begins in all processes at once."""

    def sample(self, task: Task, calls: int) -> float:
        distributed.barrier()
        return super().sample(task, calls)

    def calls(self, task: Task) -> int:
        self.sample(task, 1)
        return 1
