"""Draw a result file of ``orepa bench``: squeezes over block size with the floors, training steps as bars.

python benchmarks/plots.py FILE.json FILE.png
"""

from __future__ import annotations

import argparse
import io
import sys
from pathlib import Path
from typing import Any

from orepa.bench.cli import check_folders, require
from orepa.bench.results import Results, Row, load
from orepa.bench.tables import by_case, distinct
from orepa.errors import UserError
from orepa.train.files import write_atomically


def plot(results: Results, path: Path) -> None:
    """Draw a result file as PNG, written atomically.

    Raises:
        UserError: the file system refuses.
    """
    from matplotlib.figure import Figure

    figure = Figure(layout="constrained")
    (_steps if results.benchmark in ("step", "reparam") else _squeezes)(figure, results.timed)
    finish(figure, results, path)


def finish(figure: Any, results: Results, path: Path) -> None:
    """Title a figure with where it was measured, and write it.

    Raises:
        UserError: the file system refuses.
    """
    e = results.environment
    where = e.get("gpu") or f"{e.get('processor')}, {e.get('threads')} thread(s)"
    figure.suptitle(f"{results.benchmark} · {where} · torch {e.get('torch')} · {e.get('commit')}", fontsize="medium")
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=120)
    write_atomically(path, lambda file: file.write(png.getvalue()))


def _squeezes(figure: Any, rows: list[Row]) -> None:
    """One panel per mode and (launch, topology, dtype), on logarithmic axes."""
    modes = distinct(row.mode for row in rows) or ["forward"]
    kinds = list(dict.fromkeys(_kind(row) for row in rows)) or [("plain", "", "")]
    names = distinct(row.provider for row in rows)
    figure.set_size_inches(4.5 * len(modes) + 1.5, 3.6 * len(kinds) + 0.6)
    panels = figure.subplots(len(kinds), len(modes), squeeze=False, sharex="row", sharey="row")
    for line, kind in zip(panels, kinds, strict=True):
        for axes, mode in zip(line, modes, strict=True):
            for index, name in enumerate(names):
                chosen = [r for r in rows if (r.provider, r.mode, _kind(r)) == (name, mode, kind)]
                if chosen:
                    _curve(axes, sorted(chosen, key=_size), index)
            axes.set(xscale="log", yscale="log", title=", ".join(part for part in (mode, *kind) if part != "plain"))
            axes.grid(True, which="both", alpha=0.2)
        line[0].set_ylabel("µs per call, spread shaded")
    for axes in panels[-1]:
        axes.set_xlabel("elements of the kernel")
    panels[0][0].legend(fontsize="small", title="grey: floors")


def _curve(axes: Any, rows: list[Row], index: int) -> None:
    x, summaries = [_size(row) for row in rows], [row.summary for row in rows]
    median, low, high = ([s[key] for s in summaries] for key in ("median_us", "low_us", "high_us"))
    style = {"linestyle": ["--", ":"][index % 2], "color": "0.4"} if rows[0].floor else {"color": f"C{index % 10}"}
    axes.plot(x, median, label=rows[0].provider, marker="o", markersize=3, **style)
    axes.fill_between(x, low, high, color=style["color"], alpha=0.2, linewidth=0)


def _kind(row: Row) -> tuple[str, str, str]:
    return row.launch, str(row.case.get("topology", "")), str(row.case.get("dtype", ""))


def _size(row: Row) -> int:
    c = row.case
    return int(c["out"] * c["in"] // c.get("groups", 1) * c["k"] ** 2)


def _steps(figure: Any, rows: list[Row]) -> None:
    """One panel per case and mode, a bar per variant."""
    cases = [list(case.values()) for case in by_case(rows)]
    figure.set_size_inches(7, 1 + 1.2 * len(cases) + 0.3 * len(rows))
    panels = figure.subplots(max(1, len(cases)), 1, squeeze=False)
    for (axes,), case in zip(panels, cases, strict=False):
        bars(axes, case)
        c, graph = case[0].case, ", CUDA graph" if case[0].launch == "graph" else ""
        axes.set_title(
            f"{c['model']}, batch {c['batch']}, {c['size']} px, autocast {c['autocast']}, {case[0].mode}{graph}"
        )


def bars(axes: Any, rows: list[Row]) -> None:
    """Draw a bar per row: its time and spread."""
    summaries = [row.summary for row in rows]
    median, low, high = ([s[key] / 1e3 for s in summaries] for key in ("median_us", "low_us", "high_us"))
    reach = [[m - v for m, v in zip(median, low, strict=True)], [v - m for m, v in zip(median, high, strict=True)]]
    axes.barh([row.provider for row in rows], median, xerr=reach, color="C0")
    axes.set_xlabel("ms and their spread")
    axes.invert_yaxis()


def main(argv: list[str] | None = None) -> int:
    """Draw a file; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, metavar="FILE.json")
    parser.add_argument("picture", type=Path, metavar="FILE.png")
    args = parser.parse_args(argv)
    try:
        require("matplotlib")
        check_folders(args.picture)
        plot(load(args.results), args.picture)
    except UserError as error:
        print(f"plots: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
