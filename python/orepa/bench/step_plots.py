"""Training budgets as pictures: per contestant, or per number of components."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from ..train.files import write_atomically
from .results import Results, Row
from .step_tables import PARTS


def plot(results: Results, path: Path) -> None:
    """Draw times and memory, as PNG: lines over the components of a sweep, else bars per contestant.

    Args:
        results: of ``orepa bench step``.
        path: to write, atomically.

    Raises:
        UserError: the file system refuses.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    sweep = any("components" in row.case for row in results.timed)
    panels: dict[tuple[Any, ...], list[Row]] = {}
    for row in results.timed:
        same = {k: v for k, v in row.case.items() if k != "components"}
        panels.setdefault((*same.values(), row.launch), []).append(row)
    lines = max(1, len(panels))
    figure = Figure(figsize=(11, 3.8 * lines + 0.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(lines, 2, squeeze=False)
    for pair, rows in zip(axes, panels.values(), strict=False):
        (_lines if sweep else _bars)(pair, rows)
        c = rows[0].case
        graph = ", CUDA graph" if rows[0].launch == "graph" else ""
        pair[0].set_title(f"{c['model']}, batch {c['batch']}, {c['size']} px, autocast {c['autocast']}{graph}")
    e = results.environment
    where = e.get("gpu") or f"{e.get('processor')}, {e.get('threads')} thread(s)"
    figure.suptitle(f"training step · {where} · torch {e.get('torch')} · {e.get('commit')}", fontsize="medium")
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=120)
    write_atomically(path, lambda file: file.write(drawn.getvalue()))


def _lines(axes: Any, rows: list[Row]) -> None:
    """Time and memory over the components, the plain model in grey."""
    ticks = list(dict.fromkeys(row.case["components"] for row in rows))
    for number, name in enumerate(dict.fromkeys(row.provider for row in rows)):
        chosen = [row for row in rows if row.provider == name]
        x = [ticks.index(row.case["components"]) for row in chosen]
        style: dict[str, Any] = {"color": f"C{number}", "marker": "o"}
        if name == "plain":
            style = {"color": "0.5", "linestyle": "--"}
        axes[0].plot(x, [row.median_us / 1e3 for row in chosen], label=name, **style)
        axes[1].plot(x, [row.facts["peak_bytes"] / 1e6 for row in chosen], label=name, **style)
    for panel, label in zip(axes, ("ms per step", "peak memory, MB"), strict=True):
        panel.set_xticks(range(len(ticks)), ticks, rotation=30, ha="right", fontsize="small")
        panel.set(ylabel=label, ylim=(0, None))
        panel.grid(True, alpha=0.2)
        panel.legend(fontsize="small")


def _bars(axes: Any, rows: list[Row]) -> None:
    """A bar per contestant: its time, and its memory by part."""
    names = [row.provider for row in rows]
    summaries = [row.summary for row in rows]
    median = [s["median_us"] / 1e3 for s in summaries]
    spread = [
        [(s["median_us"] - s["low_us"]) / 1e3 for s in summaries],
        [(s["high_us"] - s["median_us"]) / 1e3 for s in summaries],
    ]
    axes[0].barh(names, median, xerr=spread, color="C0")
    axes[0].set_xlabel("ms per step and its spread")
    left = [0.0] * len(rows)
    for number, part in enumerate(PARTS):
        widths = [row.facts["split"][part] / 1e6 for row in rows]
        if any(widths):
            axes[1].barh(names, widths, left=left, label=part, color=f"C{number}")
        left = [a + b for a, b in zip(left, widths, strict=True)]
    axes[1].set_xlabel("MB at the peak")
    axes[1].legend(fontsize="x-small")
    for panel in axes:
        panel.invert_yaxis()
