"""Training steps on a terminal: time, memory, and the paper's Table 4 beside them."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from .contestants import PLAIN
from .paper import TABLE_4
from .results import Results, Row
from .tables import problems, spread_of, terminal

PARTS = ("parameters", "gradients", "optimizer", "activations", "squeeze", "buffers", "temporary", "rounding")
_GROUPS = ("model", "size", "autocast", "layout", "device")
#: contestants whose numbers the paper has, by its names
_PAPER = {"None": "plain", "RepVGG": "plain", "DBB": "dbb-offline", "OREPA": "orepa-"}


def show(results: Results, console: Console | None = None) -> None:
    """Print times, memory, the paper's numbers, and why something is missing."""
    console = console or terminal()
    for launch in dict.fromkeys(row.launch for row in results.rows):
        for group in dict.fromkeys(_group(row) for row in results.rows):
            rows = [row for row in results.rows if row.launch == launch and _group(row) == group]
            if any(row.status != "skipped" for row in rows):
                console.print(_times(results, rows, launch))
    for group in dict.fromkeys(_group(row) for row in results.timed):
        # Memory does not depend on the launch: it is measured once, with plain launches.
        rows = [row for row in results.timed if _group(row) == group]
        console.print(_memory(list({(_name(row), row.provider): row for row in rows}.values())))
    table = _paper(results)
    if table is not None:
        console.print(table)
    for line in problems(results):
        console.print(line, style="bold red" if ": wrong: " in line else "yellow", markup=False, soft_wrap=True)


def base_of(rows: list[Row], row: Row) -> Row | None:
    """The plain model on the same work."""
    return next((r for r in rows if r.where == row.where and r.provider == PLAIN and r.status == "ok"), None)


def _times(results: Results, rows: list[Row], launch: str) -> Table:
    e = results.environment
    where = e.get("gpu") if e.get("device") == "cuda" else f"{e.get('processor')}, {e.get('threads')} thread(s)"
    kind = {"plain": "", "graph": ", replayed from a CUDA graph"}[launch]
    table = Table(
        title=f"training step: {_title(rows[0])}{kind}",
        caption=f"median ± {spread_of(results)}; × times the plain model's. {where}, torch {e.get('torch')}, "
        f"commit {e.get('commit')}",
    )
    for name in ("batch", "contestant"):
        table.add_column(name, no_wrap=True)
    for name in ("ms per step", "× plain", "images/s", "peak MB", "× plain", "parameters", "difference"):
        table.add_column(name, justify="right")
    before = None
    for row in (row for row in rows if row.status != "skipped"):
        if before not in (None, _name(row)):
            table.add_section()
        name = "" if before == _name(row) else _name(row)
        before = _name(row)
        if row.status != "ok":
            table.add_row(name, row.provider, f"[bold red]{row.status.upper()}[/]")
            continue
        base, f = base_of(rows, row), row.facts
        table.add_row(
            name,
            row.provider,
            f"{row.median_us / 1e3:,.2f} ±{100 * row.spread:.0f}%",
            f"{row.median_us / base.median_us:.2f}" if base else "",
            f"{row.case['batch'] / row.median_us * 1e6:,.0f}",
            f"{f['peak_bytes'] / 1e6:,.1f}",
            f"{f['peak_bytes'] / base.facts['peak_bytes']:.2f}" if base else "",
            f"{f['parameter_count'] / 1e6:,.2f} M",
            f"{f['logits_error']:.0e}" if "logits_error" in f else "",
        )
    return table


def _memory(rows: list[Row]) -> Table:
    table = Table(
        title=f"memory at the peak, MB: {_title(rows[0])}",
        caption="saved: all that the forward pass keeps for backward (of it by the squeeze; in a compiled model the two "
        "cannot be told apart). At the peak part of it may be freed already.",
    )
    for name in ("batch", "contestant"):
        table.add_column(name, no_wrap=True)
    parts = [part for part in PARTS if any(row.facts["split"][part] for row in rows)]
    for name in (*parts, "sum", "peak", "saved", "by squeeze"):
        table.add_column(name, justify="right")
    before = None
    for row in rows:
        if before not in (None, _name(row)):
            table.add_section()
        f = row.facts
        values = [*(f["split"][p] for p in parts), sum(f["split"].values()), f["peak_bytes"], f["saved_bytes"]]
        by_squeeze = f["squeeze_saved_bytes"]
        cells = [f"{value / 1e6:,.1f}" for value in values] + [
            "-" if by_squeeze is None else f"{by_squeeze / 1e6:,.1f}"
        ]
        table.add_row("" if before == _name(row) else _name(row), row.provider, *cells)
        before = _name(row)
    return table


def _paper(results: Results) -> Table | None:
    """The paper's ratios beside ours at the largest batch; None where it has no such model."""
    timed = [row for row in results.timed if "components" not in row.case]
    models = [m for m in dict.fromkeys(row.case["model"] for row in timed) if m in TABLE_4]
    if not models:
        return None
    table = Table(
        title="the paper's Table 4 (4 x V100, batch 256) and this run, at its largest batch",
        caption="× of the first row of each model",
    )
    for name in ("model", "re-param"):
        table.add_column(name, no_wrap=True)
    for name in ("paper: s/batch", "×", "GB", "×"):
        table.add_column(name, justify="right")
    table.add_column("here")
    for name in ("s/batch", "×", "GB", "×"):
        table.add_column(name, justify="right")
    for model in models:
        budgets = TABLE_4[model]
        first = next(iter(budgets.values()))
        of_model = [row for row in timed if row.case["model"] == model]
        launch = "graph" if any(row.launch == "graph" for row in of_model) else "plain"
        largest = max(row.case["batch"] for row in of_model)
        ours = [row for row in of_model if row.case["batch"] == largest and row.launch == launch]
        table.add_section()
        for kind, budget in budgets.items():
            theirs = (
                *(f"{budget.seconds:.3f}", f"{budget.seconds / first.seconds:.2f}"),
                *(f"{budget.gigabytes:.1f}", f"{budget.gigabytes / first.gigabytes:.2f}"),
            )
            head = [model if budget is first else "", kind, *theirs]
            wanted = _PAPER[kind]
            for row in [
                r for r in ours if r.provider == wanted or (wanted[-1] == "-" and r.provider.startswith(wanted))
            ]:
                table.add_row(*head, row.provider, *_ours(row, base_of(ours, row)))
                head = [""] * 6
            if head[1]:
                table.add_row(*head, "not measured")
    return table


def _ours(row: Row, base: Row | None) -> list[str]:
    peak = row.facts["peak_bytes"]
    return [
        f"{row.median_us / 1e6:.4f}",
        f"{row.median_us / base.median_us:.2f}" if base else "",
        f"{peak / 1e9:.2f}",
        f"{peak / base.facts['peak_bytes']:.2f}" if base else "",
    ]


def _group(row: Row) -> tuple[Any, ...]:
    return tuple(row.case[name] for name in _GROUPS)


def _name(row: Row) -> str:
    return " ".join(str(part) for part in (row.case["batch"], row.case.get("components", "")) if part)


def _title(row: Row) -> str:
    c = row.case
    extra = [f"autocast {c['autocast']}"] if c["autocast"] != "none" else ["float32"]
    return ", ".join([c["model"], f"{c['size']} px", *extra, *(["channels last"] if "last" in c["layout"] else [])])
