"""Results on a terminal."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from .compare import Comparison
from .results import Results, Row

#: the baseline of ratios, where it was measured
BASELINE = "eager"


class ProgressBar:
    """A listener of `orepa.bench.squeeze.run`: a bar over the cases, on stderr, with what happens now."""

    def __init__(self, progress: Progress, cases: int) -> None:
        self._progress = progress
        self._task = progress.add_task("", total=cases)

    def step(self, text: str) -> None:
        self._progress.update(self._task, description=text)

    def done(self) -> None:
        self._progress.advance(self._task)


@contextlib.contextmanager
def progress(cases: int) -> Iterator[ProgressBar]:
    """Show progress while the block runs; it disappears afterwards."""
    columns = (
        BarColumn(20),
        TextColumn("{task.completed}/{task.total}"),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
    )
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        yield ProgressBar(bar, cases)


def terminal() -> Console:
    """stdout; as wide as a table needs where it is a file or a pipe."""
    return Console() if sys.stdout.isatty() else Console(width=200)


def show(results: Results, console: Console | None = None) -> None:
    """Print one table of medians per kind of launch, one of the details, and why something is missing."""
    console = console or terminal()
    for launch in _distinct(row.launch for row in results.rows):
        console.print(_medians(results, launch))
    console.print(_details(results))
    busy = results.environment.get("busy_cores_of_others")
    if busy and busy + results.environment["threads"] > results.environment["cores"] + 0.1:
        note = f"note: other programs kept {busy} of {results.environment['cores']} cores busy: times on the CPU are too long"
        console.print(note, style="yellow", markup=False, soft_wrap=True)
    for line in problems(results):
        loud = line.startswith("lost: ") or ": wrong: " in line
        console.print(line, style="bold red" if loud else "yellow", markup=False, soft_wrap=True)


def _medians(results: Results, launch: str) -> Table:
    rows = [row for row in results.rows if row.launch == launch]
    common = _common(rows)
    timed = {row.provider for row in rows if row.status == "ok"}
    wrong = {row.provider for row in rows if row.status in ("wrong", "failed")}
    order = results.settings.get("providers") or _distinct(row.provider for row in rows)
    providers = [p for p in order if p in timed | wrong]
    kind = {"plain": "", "graph": ", replayed from a CUDA graph"}[launch]
    table = Table(
        title=f"{results.benchmark}{_words(common)}: median µs per call{kind}",
        caption=f"±: {spread_of(results)}; ×: times {BASELINE}'s speed. {_machine(results)}",
    )
    table.add_column("block", no_wrap=True)
    table.add_column("mode", no_wrap=True)
    floors = {row.provider for row in rows if row.floor}
    for provider in providers:
        table.add_column(f"{provider} (floor)" if provider in floors else provider, justify="right")
    by_where: dict[Any, dict[str, Row]] = {}
    for row in rows:
        by_where.setdefault(row.where, {})[row.provider] = row
    before = None
    for entries in by_where.values():
        first = next(iter(entries.values()))
        base = entries.get(BASELINE)
        if before not in (None, first.case):
            table.add_section()
        name = "" if before == first.case else describe(first.case, common)
        table.add_row(name, first.mode, *(_cell(entries.get(p), base) for p in providers))
        before = first.case
    return table


def _cell(row: Row | None, base: Row | None) -> str:
    if row is None:
        return ""
    if row.status != "ok":
        return {"wrong": "[bold red]WRONG[/]", "failed": "[yellow]failed[/]", "skipped": "-"}[row.status]
    text = f"{row.median_us:,.{0 if row.median_us >= 100 else 1}f} ±{100 * row.spread:.0f}%"
    if base not in (None, row) and base.status == "ok" and not row.floor:
        text += f" [dim]{base.median_us / row.median_us:.2f}×[/]"
    return text


def _details(results: Results) -> Table:
    """Rates, memory and errors, of the longest mode that was measured."""
    modes = _distinct(row.mode for row in results.timed)
    mode = "both" if "both" in modes else (modes[-1] if modes else "")
    top = results.ceilings
    on_gpu = any("launches" in row.facts for row in results.timed)
    table = Table(
        title=f"{mode}: rates (% of what this machine does on large data), memory, errors against float64",
        caption="saved: kept for the backward pass, parameters themselves not counted"
        + ("; host: of one call enqueued after another, nothing waited for" if on_gpu else ""),
    )
    common = _common(results.rows)
    for name in ("block", *(["launch"] if on_gpu else []), "provider"):
        table.add_column(name, no_wrap=True)
    for name in (
        "GB/s",
        "GFLOP/s",
        *(["launches", "host µs"] if on_gpu else []),
        "saved MB",
        "error of W",
        "of gradients",
    ):
        table.add_column(name, justify="right")
    before = None
    for row in results.timed:
        if row.mode != mode:
            continue
        if before not in (None, row.case):
            table.add_section()
        f, seconds = row.facts, row.median_us * 1e-6
        cells = [
            _rate(f.get("bytes"), seconds, top.get("copy_bytes_per_second")),
            _rate(f.get("flops"), seconds, top.get("gemm_flops_per_second")),
            *([str(f.get("launches", "")), f"{f['host_us']:.1f}" if "host_us" in f else ""] if on_gpu else []),
            f"{f['saved_bytes'] / 1e6:.2f}" if "saved_bytes" in f else "",
            f"{f['weight_error']:.1e}" if "weight_error" in f else "",
            f"{f['gradient_error']:.1e}" if "gradient_error" in f else "",
        ]
        name = "" if before == row.case else describe(row.case, common)
        table.add_row(name, *([row.launch] if on_gpu else []), row.provider, *cells)
        before = row.case
    return table


def _rate(amount: float | None, seconds: float, ceiling: float | None) -> str:
    if amount is None:
        return ""
    rate = amount / seconds
    return f"{rate / 1e9:,.1f}" + (f" ({100 * rate / ceiling:.0f}%)" if ceiling else "")


def spread_of(results: Results) -> str:
    """What stands after ± in a table of these results."""
    if results.processes < 2:
        return "half of p20 to p80, within one process"
    return f"half of what p20 to p80 and a 95% interval from the medians of {results.processes} processes span"


def problems(results: Results) -> list[str]:
    """One line per process that was lost, and per provider and reason that kept it from being timed."""
    everywhere = len({describe(row.case) for row in results.rows})
    found: dict[str, set[str]] = {}
    for row in results.rows:
        if row.status != "ok":
            found.setdefault(f"{row.provider}: {row.status}: {row.reason}", set()).add(describe(row.case))
    return [f"lost: {line}" for line in results.lost] + [
        what if len(cases) == everywhere else f"{what} [{', '.join(sorted(cases))}]" for what, cases in found.items()
    ]


def show_comparison(comparison: Comparison, console: Console | None = None) -> None:
    """Print the ratios of two runs."""
    console = console or terminal()
    for note in comparison.notes:
        console.print(f"note: {note}", style="yellow", markup=False, soft_wrap=True)
    table = Table(
        title="B against A: ratio of median times",
        caption="spread: the least and the largest ratio within the spreads of both runs",
    )
    for name in ("block", "mode", "launch", "provider"):
        table.add_column(name)
    for name in ("A µs", "B µs", "B/A", "spread"):
        table.add_column(name, justify="right")
    table.add_column("")
    styles = {"slower": "red", "faster": "green", "no difference": "dim"}
    for pair in comparison.pairs:
        a, b = pair.before, pair.after
        table.add_row(
            describe(a.case),
            a.mode,
            a.launch,
            a.provider,
            f"{a.median_us:,.1f}",
            f"{b.median_us:,.1f}",
            f"{pair.ratio:.3f}",
            "{:.3f} to {:.3f}".format(*pair.bounds),
            f"[{styles[pair.verdict]}]{pair.verdict}[/]",
        )
    console.print(table)
    console.print(comparison.conclusion, markup=False, soft_wrap=True)


def describe(case: dict[str, Any], common: dict[str, Any] | None = None) -> str:
    """A case in few characters.

    Args:
        case: of a row.
        common: what need not be said.
    """
    case = {k: v for k, v in case.items() if k not in (common or {})}
    words = []
    if {"out", "in", "k"} <= case.keys():
        words.append(f"{case.pop('in')}->{case.pop('out')} {case['k']}x{case.pop('k')}")
    for name, form in (("stride", "s{}"), ("groups", "g{}"), ("size", "@{}")):
        value = case.pop(name, None)
        if value not in (None, 1):
            words.append(form.format(value))
    return " ".join([*words, *map(str, case.values())])


def _common(rows: Sequence[Row]) -> dict[str, Any]:
    """What all cases share, geometry apart."""
    first = rows[0].case if rows else {}
    geometry = ("out", "in", "k", "groups", "stride", "size")
    return {k: v for k, v in first.items() if k not in geometry and all(r.case.get(k) == v for r in rows)}


def _words(common: dict[str, Any]) -> str:
    return "".join(f", {value}" for value in common.values())


def _machine(results: Results) -> str:
    e = results.environment
    where = e.get("gpu") if e.get("device") == "cuda" else f"{e.get('processor')}, {e.get('threads')} thread(s)"
    return f"{where}, torch {e.get('torch')}, commit {e.get('commit')}"


def _distinct(values: Any) -> list[str]:
    return list(dict.fromkeys(values))
