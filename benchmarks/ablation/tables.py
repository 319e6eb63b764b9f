"""Summarize an ablation: means, standard deviations, paired differences, and Markdown tables of them."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from orepa.bench.results import Results
from orepa.bench.tables import render
from orepa.bench.variants import PLAIN
from orepa.timing import half_width_95

from .rows import STEP, TABLES, TRAIN, PaperTable


@dataclass(frozen=True)
class Estimate:
    """A mean, and how well it is known.

    Args:
        mean: of ``count`` values.
        std: their sample standard deviation; None of a single value.
        count: of the values.
        interval: holds the true mean with 95% confidence, by Student's t; None for a single value.
    """

    mean: float
    std: float | None
    count: int
    interval: tuple[float, float] | None

    @property
    def is_a_difference(self) -> bool:
        """Whether the interval excludes zero."""
        return self.interval is not None and not self.interval[0] <= 0 <= self.interval[1]


def estimate(values: Sequence[float]) -> Estimate | None:
    """Return the estimate of some values, or None of none."""
    if not values:
        return None
    mean = statistics.fmean(values)
    if len(values) == 1:
        return Estimate(mean, None, 1, None)
    half = half_width_95(values)
    return Estimate(mean, statistics.stdev(values), len(values), (mean - half, mean + half))


def paired(ours: Mapping[int, float], base: Mapping[int, float]) -> Estimate | None:
    """Return the difference of two variants over the seeds with which both finished.

    Equal seeds mean equal training images, test images, order and augmentation, whose effect on both cancels.
    """
    return estimate([ours[seed] - base[seed] for seed in sorted(ours.keys() & base.keys())])


class VariantRuns:
    """All runs of one variant in a file."""

    def __init__(self, results: Results, name: str) -> None:
        rows = [row for row in results.rows if (row.mode, row.provider) == (TRAIN, name)]
        finished = [row for row in rows if row.status == "ok"]
        #: percent of the test images, by seed
        self.accuracy = {row.case["seed"]: 100 * row.facts["correct"] / row.facts["images"] for row in finished}
        self.training_loss = [row.facts["train_loss"] for row in finished]
        self.runs, self.diverged = len(rows), len(rows) - len(finished)
        self.parameters = rows[0].facts["parameters"] if rows else 0
        timed = [row for row in results.rows if (row.mode, row.provider) == (STEP, name)]
        self.step_us = timed[0].median_us if timed else None


def difference(ours: VariantRuns, base: VariantRuns) -> Estimate | None:
    """Return the `paired` difference, or None where a run diverged: the mean of the others would be biased."""
    return None if ours.diverged or base.diverged else paired(ours.accuracy, base.accuracy)


def shown(results: Results) -> list[PaperTable]:
    """Return the tables reduced to the rows of a file, without those that another one contains."""
    have = {row.provider for row in results.rows if row.mode == TRAIN}
    tables = []
    for table in TABLES:
        rows = tuple(row for row in table.rows if row[0] in have)
        if len(rows) > 1 and table.base in have:
            tables.append(PaperTable(table.title, rows, table.base, table.cumulative))
    names = [{name for name, _ in table.rows} for table in tables]
    return [t for t, rows in zip(tables, names, strict=True) if not any(rows < others for others in names)]


def markdown(results: Results) -> str:
    """Return the tables and how to read them."""
    tables = shown(results)
    have = dict.fromkeys(row.provider for row in results.rows if row.mode == TRAIN)
    variants = {name: VariantRuns(results, name) for name in have}
    parts = [f"**{table.title}**\n\n{_table(table, variants)}" for table in tables]
    comparisons = dict.fromkeys(pair for table in tables for pair in table.pairs())
    differences = [difference(variants[a], variants[b]) for a, b in comparisons]
    return "\n\n".join([*parts, _reading(results, [d for d in differences if d is not None])])


def _table(table: PaperTable, variants: Mapping[str, VariantRuns]) -> str:
    base, plain = variants[table.base], variants.get(PLAIN)
    before_too = table.cumulative
    against = "plain" if table.base == PLAIN else f"“{dict(table.rows)[table.base].partition(':')[0]}”"
    header = ["", "accuracy, %", f"minus {against}", *(["minus the row before"] if before_too else [])]
    header += ["training loss", "diverged", "parameters", "step, × plain"]
    lines: list[list[str]] = []
    before: VariantRuns | None = None
    for name, label in table.rows:
        variant = variants[name]
        cells = [show_accuracy(estimate(list(variant.accuracy.values())))]
        cells.append("" if variant is base else show_difference(difference(variant, base)))
        if before_too:
            shown_before = before is None or before is base  # in the column before
            cells.append("" if shown_before or before is None else show_difference(difference(variant, before)))
        loss = estimate(variant.training_loss)
        cells.append("" if loss is None else f"{loss.mean:.4f}")
        cells += [f"{variant.diverged} of {variant.runs}", f"{variant.parameters:,}"]
        unit = None if plain is None else plain.step_us
        cells.append("" if variant.step_us is None or unit is None else f"{variant.step_us / unit:.2f}")
        lines.append([label, *cells])
        before = variant
    return render(header, lines, "markdown")


def show_accuracy(value: Estimate | None) -> str:
    """Return a cell: mean ± standard deviation."""
    if value is None:
        return "NaN"
    return f"{value.mean:.2f}" + ("" if value.std is None else f" ± {value.std:.2f}")


def show_difference(value: Estimate | None) -> str:
    """Return a cell: mean and interval, bold where it excludes zero."""
    if value is None:
        return ""
    text = f"{value.mean:+.2f}"
    if value.interval is not None:
        text += " [{:+.2f}, {:+.2f}]".format(*value.interval)
    text = text.replace("-", "−")
    return f"**{text}**" if value.is_a_difference else text


def _reading(results: Results, differences: Sequence[Estimate]) -> str:
    p, e = results.settings["protocol"], results.environment
    seeds = len({row.case["seed"] for row in results.rows if row.mode == TRAIN})
    sentences = [
        f"{p['model']} on digits: {p['train_images']} training images, {p['test_images']} to test on (one is "
        f"{100 / p['test_images']:.2f}%), {p['recipe']['epochs']} epochs of {p['steps_per_epoch']} steps, {seeds} seed(s). "
        "Mean ± sample standard deviation after the last epoch, of the runs that did not diverge; the loss is that of the "
        "last epoch's augmented images.",
    ]
    with_interval = [d for d in differences if d.interval is not None]
    if with_interval:
        outside = sum(d.is_a_difference for d in with_interval)
        sentences.append(
            "Differences are means over equal seeds with their 95% interval (Student's t), where no run diverged. "
            f"Bold: zero is outside, as in {outside} of {len(with_interval)} comparisons; "
            f"were there no difference at all, it would be in about {len(with_interval) / 20:.1f} of them."
        )
    machine = (
        f"{e['processor']}, {e['threads']} thread(s), torch {e['torch']}, commit {e['commit']}, {str(e['date'])[:10]}"
    )
    if any(row.mode == STEP for row in results.rows):
        busy = e.get("busy_cores_of_others")
        machine += "; steps were timed in turns" + (
            f", {busy} cores busy with other programs" if busy is not None else ""
        )
    return " ".join([*sentences, f"{machine}."])
