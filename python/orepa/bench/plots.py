"""Times over block size on logarithmic axes, with the floors drawn in."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from ..train.files import write_atomically
from .results import Results, Row


def plot(results: Results, path: Path) -> None:
    """Draw one panel per mode and (launch, topology, dtype), as PNG.

    Args:
        results: of ``orepa bench squeeze``.
        path: to write, atomically.

    Raises:
        UserError: the file system refuses.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = results.timed
    modes = list(dict.fromkeys(row.mode for row in rows)) or ["forward"]
    kinds = list(dict.fromkeys(_kind(row) for row in rows)) or [("plain", "", "")]
    names = list(dict.fromkeys(row.provider for row in rows))
    figure = Figure(figsize=(4.5 * len(modes) + 1.5, 3.6 * len(kinds) + 0.6), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(kinds), len(modes), squeeze=False, sharex="row", sharey="row")
    for line, kind in zip(panels, kinds, strict=True):
        for axes, mode in zip(line, modes, strict=True):
            for number, name in enumerate(names):
                chosen = [r for r in rows if (r.provider, r.mode, _kind(r)) == (name, mode, kind)]
                if chosen:
                    _line(axes, sorted(chosen, key=_size), number)
            axes.set(xscale="log", yscale="log", title=", ".join(part for part in (mode, *kind) if part != "plain"))
            axes.grid(True, which="both", alpha=0.2)
        line[0].set_ylabel("µs per call, spread shaded")
    for axes in panels[-1]:
        axes.set_xlabel("elements of the kernel")
    panels[0][0].legend(fontsize="small", title="grey: floors")
    e = results.environment
    where = e.get("gpu") or f"{e.get('processor')}, {e.get('threads')} thread(s)"
    figure.suptitle(f"{results.benchmark} · {where} · torch {e.get('torch')} · {e.get('commit')}", fontsize="medium")
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=120)
    write_atomically(path, lambda file: file.write(drawn.getvalue()))


def _line(axes: Any, rows: list[Row], number: int) -> None:
    x, summaries = [_size(row) for row in rows], [row.summary for row in rows]
    median, low, high = ([s[key] for s in summaries] for key in ("median_us", "low_us", "high_us"))
    style = {"linestyle": ["--", ":"][number % 2], "color": "0.4"} if rows[0].floor else {"color": f"C{number % 10}"}
    axes.plot(x, median, label=rows[0].provider, marker="o", markersize=3, **style)
    axes.fill_between(x, low, high, color=style["color"], alpha=0.2, linewidth=0)


def _kind(row: Row) -> tuple[str, str, str]:
    return row.launch, str(row.case.get("topology", "")), str(row.case.get("dtype", ""))


def _size(row: Row) -> int:
    c = row.case
    return int(c["out"] * c["in"] // c.get("groups", 1) * c["k"] ** 2)
