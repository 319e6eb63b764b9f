"""Run one benchmark in several fresh processes, one after the other, and merge what they measure.

Two processes differ in what a single one cannot see: the addresses of its memory, the clock of its core. Measured in several,
that difference is part of what `orepa.timing.summary` reports.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import statistics
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

from orepa.bench.results import STATUSES, Results, Row
from orepa.bench.runner import Save, Say
from orepa.errors import UserError

#: what one process does, pickled. It calls ``save`` with all results whenever there are more, and with complete ones last.
Job = Callable[[Say, Save], object]


def run(jobs: Sequence[Job], say: Say, save: Save) -> Results:
    """Run each job in a new process.

    A process that dies is reported in ``lost``; its measurements count, and the others still run. If this process dies,
    however it does, so does the worker.

    Args:
        jobs: one per process.
        say: hears of the progress.
        save: gets all results whenever there are more; no job runs meanwhile.

    Raises:
        UserError: a job raised it, or none of them measured anything.
    """
    parts: list[Results] = []
    lost: list[str] = []
    for number, job in enumerate(jobs, start=1):
        latest: list[Results] = []
        name = f"process {number} of {len(jobs)}"
        for kind, content in _messages(job):
            if kind == "error":
                raise UserError(content)
            if kind == "step":
                say(f"{name}: {content}")
            elif kind == "results":
                latest = [content]
                save(merge([*parts, content], lost, complete=False))
            else:
                lost.append(f"{name} {content}")
        parts += latest
    if not parts:
        raise UserError(f"nothing was measured: {'; '.join(lost)}")
    results = merge(parts, lost)
    save(results)
    return results


def merge(parts: Sequence[Results], lost: Sequence[str] = (), complete: bool = True) -> Results:
    """Merge the results of several processes.

    Raw samples stay apart by process. The cores that others kept busy become their mean; the rest of the environment is that
    of the first process.
    """
    first = parts[0]
    rows: dict[tuple[Any, ...], Row] = {}
    for row in (row for part in parts for row in part.rows):
        rows[row.key] = _join(rows[row.key], row) if row.key in rows else row
    environment = dict(first.environment)
    busy = [b for part in parts if (b := part.environment.get("busy_cores_of_others")) is not None]
    if busy:
        environment["busy_cores_of_others"] = round(statistics.mean(busy), 2)
    done = complete and not lost
    return replace(first, environment=environment, rows=list(rows.values()), complete=done, lost=list(lost))


def _join(a: Row, b: Row) -> Row:
    if a.status == b.status:
        return replace(a, processes=[*a.processes, *b.processes])
    return max(a, b, key=lambda row: STATUSES.index(row.status))  # one process that finds a mistake decides


def _messages(job: Job) -> Iterator[tuple[str, Any]]:
    """Yield what a job reports from its process, as (kind, content), and ``"lost"`` if it died before it was complete."""
    context = multiprocessing.get_context("spawn")  # a fork would inherit this process's memory, which is to differ
    ours, theirs = context.Pipe()
    process = context.Process(target=_work, args=(job, theirs))
    process.start()
    theirs.close()
    ended = False
    try:
        with contextlib.suppress(EOFError, ConnectionError):  # it is dead: its exit code says more
            # Also watches the process: a child of its own may hold the other end of the pipe open.
            while ours.poll(1.0) or process.is_alive():
                if ours.poll():
                    kind, content = ours.recv()
                    ended = ended or (kind == "results" and content.complete)
                    yield kind, content
                    ours.send(None)
        process.join(10)
        if not ended:
            yield "lost", _cause_of_death(process.exitcode)
    finally:
        process.kill()
        process.join()
        ours.close()


def _cause_of_death(code: int | None) -> str:
    if code is not None and code < 0:
        with contextlib.suppress(ValueError):
            return f"was killed by {signal.Signals(-code).name}"
    return f"ended early with exit code {code}"


def _work(job: Job, connection: Connection) -> None:
    """Run a job in a worker process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all; the parent ends this one, without its traceback
    threading.Thread(target=_end_with_parent, daemon=True).start()

    def report(kind: str, content: Any) -> None:
        connection.send((kind, content))
        connection.recv()  # the parent's reaction must not disturb the next clock

    try:
        job(partial(report, "step"), partial(report, "results"))
    except UserError as error:
        report("error", str(error))


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
