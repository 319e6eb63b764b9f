"""Two processes of a gloo group, forked: they start at once, with all that is imported."""

import datetime
import os
import pickle
import signal
import tempfile
import traceback
from pathlib import Path

import torch
import torch.distributed as dist

SECONDS = 240


def run_in_two(functions):
    """Call functions of the rank, one after the other, in both of two processes.

    Returns:
        By name of the function, what it returned in each process; the text of an exception instead; None after the process
        has ended.
    """
    with tempfile.TemporaryDirectory() as folder:
        children = [_fork(rank, Path(folder), functions) for rank in range(2)]
        for child in children:
            os.waitpid(child, 0)
        results = [[pickle.loads(p.read_bytes()) for p in sorted(Path(folder).glob(f"{rank}-*"))] for rank in range(2)]
    for done in results:
        done += [None] * (len(functions) - len(done))
    return {function.__name__: both for function, *both in zip(functions, *results, strict=True)}


def _fork(rank, folder, functions):
    child = os.fork()
    if child:
        return child
    try:
        signal.alarm(SECONDS)  # ends this process, whatever hangs
        torch.set_num_threads(1)
        timeout = datetime.timedelta(seconds=SECONDS / 2)
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2, timeout=timeout)
        for number, function in enumerate(functions):
            try:
                result = function(rank)
            except BaseException:
                result = traceback.format_exc()
            part = folder / f"part-{rank}"
            part.write_bytes(pickle.dumps(result))
            part.rename(folder / f"{rank}-{number:02}")
    finally:
        os._exit(0)
