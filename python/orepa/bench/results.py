"""Store results: one JSON schema for every benchmark, read strictly, written atomically."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..timing import summary
from ..train.files import write_atomically

SCHEMA, VERSION = "orepa.bench", 2
#: from the best to the worst
STATUSES = ("ok", "skipped", "failed", "wrong")


@dataclass
class Row:
    """One provider or variant on one case."""

    case: dict[str, Any]  # identifies the work
    provider: str  # or variant
    mode: str = "forward"  # which part of the work
    launch: str = "plain"  # or "graph" for the replay of a CUDA graph
    status: str = "ok"  # one of `STATUSES`; only "ok" has samples
    reason: str = ""  # why it has none
    processes: list[list[float]] = field(default_factory=list)  # raw samples of each process, seconds per call
    floor: bool = False  # whether it is a lower bound rather than a way to do the work
    facts: dict[str, Any] = field(default_factory=dict)  # flops, bytes, saved_bytes, launches, host_us, errors, ...

    @property
    def key(self) -> tuple[Any, ...]:
        """Equal keys are the same measurement."""
        return (*self.where, self.provider)

    @property
    def where(self) -> tuple[Any, ...]:
        """The key without the provider: rows that may be compared."""
        return (tuple(sorted(self.case.items())), self.mode, self.launch)

    @property
    def seconds(self) -> list[float]:
        """The samples of all processes."""
        return [s for process in self.processes for s in process]

    @property
    def summary(self) -> dict[str, float]:
        """Median and spread in microseconds: see `orepa.timing.summary`."""
        return summary(self.processes)

    @property
    def median_us(self) -> float:
        return self.summary["median_us"]

    @property
    def spread(self) -> float:
        """Half the distance from ``low_us`` to ``high_us``, relative to the median."""
        s = self.summary
        return (s["high_us"] - s["low_us"]) / 2 / s["median_us"]


@dataclass
class Results:
    """One run of a benchmark."""

    benchmark: str  # its name, such as "squeeze"
    environment: dict[str, Any]  # see `orepa.bench.machine.environment`
    settings: dict[str, Any] = field(default_factory=dict)  # the user's options
    rows: list[Row] = field(default_factory=list)
    complete: bool = False  # not in a file written while the benchmark ran, or where a process was lost
    lost: list[str] = field(default_factory=list)  # which processes died, and how; their measurements count

    @property
    def processes(self) -> int:
        """The number of processes that measured, at most."""
        return max((len(row.processes) for row in self.rows), default=0)

    @property
    def timed(self) -> list[Row]:
        """The rows that have samples."""
        return [row for row in self.rows if row.status == "ok"]

    def save(self, path: Path) -> None:
        """Write the file, atomically; a UserError where the file system refuses."""
        rows = [{**asdict(row), **({"summary": row.summary} if row.processes else {})} for row in self.rows]
        content = {"schema": SCHEMA, "version": VERSION, **asdict(self), "rows": rows}
        text = json.dumps(_plain(content), indent=1, allow_nan=False)
        # Samples on one line, so that a diff can be read.
        text = re.sub(r"\[\n([^][{}\"]*)\n *\]", lambda match: f"[{' '.join(match[1].split())}]", text)
        write_atomically(path, lambda file: file.write(f"{text}\n".encode()))


def load(path: Path) -> Results:
    """Read a result file; a UserError says whether it is missing, no JSON, or not what `Results.save` writes."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict) or content.get("schema") != SCHEMA:
        raise UserError(f"{path} is JSON, but not a result of `orepa bench`")
    if content.get("version") not in (1, VERSION):
        raise UserError(f"{path} has result version {content.get('version')}, this orepa reads 1 and {VERSION}")
    try:
        if content["version"] == 1:  # which knew one process only
            old = [{**entry, "processes": [entry["seconds"]] if entry["seconds"] else []} for entry in content["rows"]]
            content = {**content, "rows": old, "lost": []}
        rows = [_row(entry) for entry in content["rows"]]
        names = {f.name for f in fields(Results)} - {"rows"}
        results = Results(rows=rows, **{name: content[name] for name in names})
        _expect(isinstance(results.environment, dict), "environment is no object")
        _expect(isinstance(results.lost, list), "lost is no list")
        _expect(len({row.key for row in rows}) == len(rows), "two rows are the same measurement")
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        what = f"it has no {error}" if isinstance(error, KeyError) else str(error)
        raise UserError(f"{path} is a damaged result file: {what}") from error
    return results


def _row(entry: Mapping[str, Any]) -> Row:
    row = Row(**{f.name: entry[f.name] for f in fields(Row)})
    _expect(row.status in STATUSES, f"status {row.status!r} is none of {', '.join(STATUSES)}")
    _expect(isinstance(row.case, dict), "case is no object")
    lists = isinstance(row.processes, list) and all(isinstance(s, list) and s for s in row.processes)
    numbers = lists and all(isinstance(s, (int, float)) and 0 < s < math.inf for s in row.seconds)
    _expect(numbers, "samples must be positive numbers")
    count = len(row.processes)
    _expect(bool(count) == (row.status == "ok"), f"a row with status {row.status!r} has samples of {count} processes")
    return row


def _expect(condition: bool, otherwise: str) -> None:
    if not condition:
        raise ValueError(otherwise)


def _plain(value: Any) -> Any:
    """Shorten numbers to read, and replace those that JSON does not know."""
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else str(value)
    return value
