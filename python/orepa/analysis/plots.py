"""Draws an analysis: the similarity of some layers' branches, and scales and norms over the depth of the model."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import Any

from .measure import Analysis, LayerAnalysis, ScaleStatistics

_HEAT_MAPS = 4
_NAMED_LAYERS = 24  # more names than these would overlap


def draw(analysis: Analysis, title: str) -> bytes:
    """Draw similarity heat maps of a handful of layers, and the scales and effective norms of all.

    Args:
        analysis: of at least one layer.
        title: of the figure, such as the model's name.

    Returns:
        A PNG.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = pick(analysis.layers)
    figure = Figure(figsize=(14, 8.5 if shown else 5), layout="constrained")
    FigureCanvasAgg(figure)
    below: Any = figure
    if shown:
        halves: Any = figure.subfigures(2, 1, height_ratios=[1, 1.25])
        above, below = halves
        maps = above.subplots(1, len(shown), squeeze=False)[0]
        for axes, layer in zip(maps, shown, strict=True):
            image = _heat_map(axes, layer)
        above.colorbar(image, ax=list(maps), label="cosine similarity", shrink=0.8)
    scales, norms = below.subplots(1, 2)
    names = list(dict.fromkeys(branch.name for layer in analysis.layers for branch in layer.branches))
    # Branches of the same name in different topologies have a colour in common, but no line.
    lines = list(dict.fromkeys((b.name, layer.topology) for layer in analysis.layers for b in layer.branches))
    for name, topology in lines:
        number, first = names.index(name), next(line for line in lines if line[0] == name)
        style: dict[str, Any] = {"color": f"C{number % 10}", "marker": "os^vD"[number // 10 % 5], "markersize": 4}
        style["label"] = name if first == (name, topology) else None
        of_topology = [(place, layer) for place, layer in enumerate(analysis.layers) if layer.topology == topology]
        points = [(place, b) for place, layer in of_topology for b in layer.branches if b.name == name]
        _scales(scales, [(place, branch.scale) for place, branch in points if branch.scale is not None], style)
        # The axis is logarithmic: zeros have no place on it.
        norms.plot(*_columns([(place, b.relative_norm) for place, b in points if b.relative_norm]), **style)
    scales.set(title="scales: median, quartiles shaded, extremes dotted")
    norms.set(title="effective kernel norm, relative to the squeezed kernel", yscale="log")
    for axes in (scales, norms):
        places = range(0, len(analysis.layers), math.ceil(len(analysis.layers) / _NAMED_LAYERS))
        axes.set_xticks(places, [analysis.layers[place].name for place in places], rotation=90, fontsize="small")
        axes.grid(True, alpha=0.2)
    norms.legend(fontsize="small", title="branch", loc="center left", bbox_to_anchor=(1, 0.5))
    figure.suptitle(f"{title}: branches of {len(analysis.layers)} OREPA blocks")
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=110)
    return png.getvalue()


def pick(layers: Sequence[LayerAnalysis]) -> list[LayerAnalysis]:
    """Pick some layers, evenly spaced among those with the most branches; none where all have one branch."""
    most = max((len(layer.branches) for layer in layers), default=0)
    richest = [layer for layer in layers if len(layer.branches) == most] if most > 1 else []
    count = min(len(richest), _HEAT_MAPS)
    return [richest[round(i * (len(richest) - 1) / max(count - 1, 1))] for i in range(count)]


def _heat_map(axes: Any, layer: LayerAnalysis) -> Any:
    names = [branch.name for branch in layer.branches]
    values = [[math.nan if cosine is None else cosine for cosine in row] for row in layer.similarity]
    axes.set_facecolor("0.85")  # shows where there is no value
    image = axes.imshow(values, vmin=-1, vmax=1, cmap="RdBu_r")
    for y, row in enumerate(values):
        for x, value in enumerate(row):
            text, dark = ("–", False) if math.isnan(value) else (f"{round(value, 2) + 0.0:.2f}", abs(value) > 0.6)
            axes.text(x, y, text, ha="center", va="center", fontsize="x-small", color="white" if dark else "black")
    axes.set_xticks(range(len(names)), names, rotation=45, ha="right", fontsize="small")
    axes.set_yticks(range(len(names)), names, fontsize="small")
    axes.set_title(f"{layer.name}\n{layer.layer}", fontsize="medium")
    return image


def _scales(axes: Any, points: Sequence[tuple[int, ScaleStatistics]], style: dict[str, Any]) -> None:
    if not points:
        return
    places, scales = _columns(points)
    low, middle, high = zip(*(scale.quartiles for scale in scales), strict=True)
    axes.plot(places, middle, **style)
    axes.fill_between(places, low, high, color=style["color"], alpha=0.2, linewidth=0)
    extremes = [scale.minimum for scale in scales], [scale.maximum for scale in scales]
    axes.vlines(places, *extremes, color=style["color"], linestyles=":", linewidth=1)


def _columns(rows: Sequence[tuple[int, Any]]) -> tuple[list[int], list[Any]]:
    return [row[0] for row in rows], [row[1] for row in rows]
