"""Draw the ablation: every run as a dot, and the differences to the plain net."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from orepa.bench.results import Results
from orepa.bench.variants import PLAIN
from orepa.train.files import write_atomically

from .rows import TRAIN
from .tables import Estimate, VariantRuns, difference, estimate


def plot(results: Results, path: Path) -> None:
    """Draw accuracies and their differences to the plain net, as PNG.

    Args:
        results: of an ablation.
        path: to write, atomically.

    Raises:
        UserError: the file system refuses.
    """
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(row.provider for row in results.rows if row.mode == TRAIN))
    variants = {name: VariantRuns(results, name) for name in names}
    figure = Figure(figsize=(11, 0.36 * len(names) + 1.6), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for place, variant in enumerate(variants.values()):
        if variant.diverged:  # in words: far from all others, the rest of its runs would squeeze them into a line
            rest = ", ".join(f"{value:.0f}%" for value in sorted(variant.accuracy.values()))
            words = f"{variant.diverged} of {variant.runs} diverged{f', the others: {rest}' if rest else ''}"
            style = {"transform": left.get_yaxis_transform(), "va": "center", "fontsize": "small", "color": "C3"}
            left.text(0.02, place, words, **style)
            continue
        left.plot(list(variant.accuracy.values()), [place] * len(variant.accuracy), ".", color="0.6")
        _bar(left, estimate(list(variant.accuracy.values())), place, interval=False)
        if PLAIN in variants and variant is not variants[PLAIN]:
            _bar(right, difference(variant, variants[PLAIN]), place, interval=True)
    left.set_yticks(range(len(names)), names, fontsize="small")
    left.set_ylim(len(names) - 0.5, -0.5)  # the first on top
    left.set_xlabel("test accuracy, %: each seed, mean ± standard deviation")
    right.axvline(0, color="0.5", linestyle="--")
    right.set_xlabel("minus plain, paired by seed, 95% interval (black: without zero)")
    for panel in (left, right):
        panel.grid(True, axis="x", alpha=0.2)
    p, e = results.settings["protocol"], results.environment
    figure.suptitle(
        f"{p['model']} on digits · {p['train_images']} training images, {p['test_images']} to test on · torch {e.get('torch')}"
        f" · {e.get('commit')}",
        fontsize="medium",
    )
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=120)
    write_atomically(path, lambda file: file.write(drawn.getvalue()))


def _bar(axes: Any, value: Estimate | None, place: int, interval: bool) -> None:
    """Draw a mean with its standard deviation, or with its interval."""
    if value is None:
        return
    reach = value.std or 0.0
    if interval and value.interval is not None:
        reach = value.interval[1] - value.mean
    color = "C0" if not interval else "black" if value.is_a_difference else "0.6"
    axes.errorbar(value.mean, place, xerr=reach, fmt="o", color=color, capsize=3)
