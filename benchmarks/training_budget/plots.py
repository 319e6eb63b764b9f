"""Training budgets as pictures: per variant, or per number of components."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from plots import bars, finish

from orepa.bench.results import Results, Row
from training_budget.tables import PARTS


def plot(results: Results, path: Path) -> None:
    """Draw times and memory, as PNG: lines over the components of a sweep, else bars per variant.

    Raises:
        UserError: the file system refuses.
    """
    from matplotlib.figure import Figure

    sweep = any("components" in row.case for row in results.timed)
    panels: dict[tuple[Any, ...], list[Row]] = {}
    for row in results.timed:
        same = {k: v for k, v in row.case.items() if k != "components"}
        panels.setdefault((*same.values(), row.launch), []).append(row)
    lines = max(1, len(panels))
    figure = Figure(figsize=(11, 3.8 * lines + 0.5), layout="constrained")
    axes = figure.subplots(lines, 2, squeeze=False)
    for pair, rows in zip(axes, panels.values(), strict=False):
        if sweep:
            _lines(pair, rows)
        else:
            bars(pair[0], rows)
            _memory(pair[1], rows)
        c = rows[0].case
        graph = ", CUDA graph" if rows[0].launch == "graph" else ""
        pair[0].set_title(f"{c['model']}, batch {c['batch']}, {c['size']} px, autocast {c['autocast']}{graph}")
    finish(figure, results, path)


def _lines(axes: Any, rows: list[Row]) -> None:
    """Draw time and memory over the components, the plain model in grey."""
    ticks = list(dict.fromkeys(row.case["components"] for row in rows))
    for index, name in enumerate(dict.fromkeys(row.provider for row in rows)):
        chosen = [row for row in rows if row.provider == name]
        x = [ticks.index(row.case["components"]) for row in chosen]
        style: dict[str, Any] = {"color": f"C{index}", "marker": "o"}
        if name == "plain":
            style = {"color": "0.5", "linestyle": "--"}
        axes[0].plot(x, [row.median_us / 1e3 for row in chosen], label=name, **style)
        axes[1].plot(x, [row.facts["peak_bytes"] / 1e6 for row in chosen], label=name, **style)
    for panel, label in zip(axes, ("ms per step", "peak memory, MB"), strict=True):
        panel.set_xticks(range(len(ticks)), ticks, rotation=30, ha="right", fontsize="small")
        panel.set(ylabel=label, ylim=(0, None))
        panel.grid(True, alpha=0.2)
        panel.legend(fontsize="small")


def _memory(axes: Any, rows: list[Row]) -> None:
    """Draw a bar per variant, by part."""
    left = [0.0] * len(rows)
    for index, part in enumerate(PARTS):
        widths = [row.facts["split"][part] / 1e6 for row in rows]
        if any(widths):
            axes.barh([row.provider for row in rows], widths, left=left, label=part, color=f"C{index}")
        left = [a + b for a, b in zip(left, widths, strict=True)]
    axes.set_xlabel("MB at the peak")
    axes.legend(fontsize="x-small")
    axes.invert_yaxis()
