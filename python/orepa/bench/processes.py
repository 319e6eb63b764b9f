"""One benchmark in several fresh processes, one after the other.

Two processes differ in what a single one cannot see: where its memory lies, which clock it got. Measured in several, that
difference is part of what `orepa.timing.summary` reports.
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
from multiprocessing.connection import Connection
from typing import Any

from ..errors import UserError
from .results import Results, Row
from .squeeze import Listener

Keep = Callable[[Results], None]
#: what one process does. It calls ``keep`` with all it has each time it has more, and at its end with complete results.
#: It is pickled.
Job = Callable[[Listener, Keep], object]

#: the later decides for a provider whose processes do not agree
_BY_WEIGHT = ("ok", "skipped", "failed", "wrong")


def run(jobs: Sequence[Job], listener: Listener, keep: Keep) -> Results:
    """Run each job in a process of its own, and merge what they find.

    A process that dies is reported in ``lost``; what it had measured is kept, and the others still run. If this process dies,
    however it does, so does the one at work.

    Args:
        jobs: one per process.
        listener: of the progress of all.
        keep: is given all there is, every time that there is more; no job goes on meanwhile.

    Raises:
        UserError: a job raised it, or none of them measured anything.
    """
    parts: list[Results] = []
    lost: list[str] = []
    for number, job in enumerate(jobs, start=1):
        found: list[Results] = []
        name = f"process {number} of {len(jobs)}"
        for kind, content in _messages(job):
            if kind == "error":
                raise UserError(content)
            if kind == "step":
                listener.step(f"{name}: {content}")
            elif kind == "done":
                listener.done()
            elif kind == "results":
                found = [content]
                keep(merge([*parts, content], lost, complete=False))
            else:
                lost.append(f"{name} {content}")
        parts += found
    if not parts:
        raise UserError(f"nothing was measured: {'; '.join(lost)}")
    results = merge(parts, lost, complete=True)
    keep(results)
    return results


def merge(parts: Sequence[Results], lost: Sequence[str] = (), complete: bool = True) -> Results:
    """The results of several processes as one.

    Raw samples stay apart by process. Of the ceilings it is the median, of the cores that others kept busy the mean; the rest
    of the environment is that of the first.

    Args:
        parts: one per process.
        lost: see `Results`.
        complete: whether these are all.
    """
    first = parts[0]
    rows: dict[tuple[Any, ...], Row] = {}
    for part in parts:
        for row in part.rows:
            rows[row.key] = _together(rows[row.key], row) if row.key in rows else row
    environment = dict(first.environment)
    busy = [b for part in parts if (b := part.environment.get("busy_cores_of_others")) is not None]
    if busy:
        environment["busy_cores_of_others"] = round(statistics.mean(busy), 2)
    ceilings = {name: statistics.median(part.ceilings[name] for part in parts) for name in first.ceilings}
    return Results(
        first.benchmark, environment, first.settings, ceilings, list(rows.values()), complete and not lost, list(lost)
    )


def _together(a: Row, b: Row) -> Row:
    if a.status == b.status:
        return replace(a, processes=[*a.processes, *b.processes])
    return max(a, b, key=lambda row: _BY_WEIGHT.index(row.status))


def _messages(job: Job) -> Iterator[tuple[str, Any]]:
    """What a job says in its process, as (kind, content), and in the end ``"lost"`` if it died before it was complete."""
    context = multiprocessing.get_context("spawn")  # a fork would inherit this process's memory, which is to differ
    ours, theirs = context.Pipe()
    process = context.Process(target=_work, args=(job, theirs))
    process.start()
    theirs.close()
    ended = False
    try:
        with contextlib.suppress(EOFError, ConnectionError):  # it is dead: its exit code says more
            # Looks after the process as well: a child of its own may hold the other end of the pipe open.
            while ours.poll(1.0) or process.is_alive():
                if ours.poll():
                    kind, content = ours.recv()
                    ended = ended or (kind == "results" and content.complete)
                    yield kind, content
                    ours.send(None)
        process.join(10)
        if not ended:
            yield "lost", _how(process.exitcode)
    finally:
        process.kill()
        process.join()
        ours.close()


def _how(code: int | None) -> str:
    if code is not None and code < 0:
        with contextlib.suppress(ValueError):
            return f"was killed by {signal.Signals(-code).name}"
    return f"ended early with exit code {code}"


def _work(job: Job, connection: Connection) -> None:
    """A worker process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all; the parent ends this one, without its traceback
    threading.Thread(target=_end_with_parent, daemon=True).start()

    def tell(kind: str, content: Any = None) -> None:
        connection.send((kind, content))
        connection.recv()  # what the parent does with it must not disturb the next clock

    try:
        job(_Teller(tell), lambda results: tell("results", results))
    except UserError as error:
        tell("error", str(error))


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


class _Teller:
    """A listener that passes on what it hears."""

    def __init__(self, tell: Callable[..., None]) -> None:
        self._tell = tell

    def step(self, text: str) -> None:
        self._tell("step", text)

    def done(self) -> None:
        self._tell("done")
