"""Tables of ``reparam_accuracy``: each form after equal epochs, and after equal processor time."""

from __future__ import annotations

import statistics
from collections.abc import Mapping

from ablation.tables import Estimate, estimate, paired, show_accuracy, show_difference

from orepa.bench.results import Results, Row
from orepa.bench.tables import Table, render
from orepa.bench.variants import PLAIN

BENCHMARK = "reparam_accuracy"
ONLINE, OFFLINE = "online", "as-it-comes"
#: by name how a table calls it
FORMS = {
    PLAIN: "plain twin, PyTorch's initial values",
    "plain-timm-init": "plain twin, timm's initial values",
    ONLINE: "online",
    "online-preserved": "online, from timm's initial values (`preserve=True`)",
    OFFLINE: "as it comes",
    "as-it-comes-torch-init": "as it comes, PyTorch's initial values",
}
#: processor times that differ by less count as equal
_EQUAL_TIME = 1.25


class Runs:
    """The runs of one form that differ in their seeds only."""

    def __init__(self, rows: list[Row]) -> None:
        self.count = len(rows)
        rows = [row for row in rows if row.status == "ok"]
        self.diverged = self.count - len(rows)
        #: percent of the test images, by seed
        self.accuracy = {row.case["seed"]: 100 * row.facts["correct"] / row.facts["images"] for row in rows}
        self.seconds = statistics.fmean(sum(row.seconds) for row in rows) if rows else 0.0

    @property
    def mean(self) -> float:
        """The mean accuracy; none where a run diverged."""
        return -1.0 if self.diverged else statistics.fmean(self.accuracy.values())

    def cell(self) -> str:
        """Return the accuracy as a table shows it."""
        diverged = f" ({self.diverged} of {self.count} diverged)" if self.diverged else ""
        return show_accuracy(estimate(list(self.accuracy.values()))) + diverged


Rates = dict[float, Runs]  # by learning rate
Forms = dict[str, Rates]  # by form


def grouped(results: Results) -> dict[tuple[str, int], Forms]:
    """Return the runs by net and epochs, form, and learning rate."""
    found: dict[tuple[str, int], dict[str, dict[float, list[Row]]]] = {}
    for row in results.rows:
        forms = found.setdefault((row.case["model"], row.case["epochs"]), {})
        forms.setdefault(row.provider, {}).setdefault(row.case["lr"], []).append(row)
    return {
        key: {form: {lr: Runs(rows) for lr, rows in rates.items()} for form, rates in forms.items()}
        for key, forms in found.items()
    }


def difference(ours: Runs | None, base: Runs | None) -> Estimate | None:
    """Return the paired difference; None where a run diverged or is missing."""
    if ours is None or base is None or ours.diverged or base.diverged:
        return None
    return paired(ours.accuracy, base.accuracy)


def markdown(results: Results) -> str:
    """Return the tables and how to read them."""
    groups = grouped(results)
    parts = [f"**Equal epochs**\n\n{render(*_equal_epochs(groups), 'markdown')}"]
    equal_time = _equal_time(groups)
    if equal_time[1]:
        parts.append(f"**Equal processor time**\n\n{render(*equal_time, 'markdown')}")
    return "\n\n".join([*parts, _reading(results)])


def best(rates: Mapping[float, Runs]) -> Runs:
    """Return the runs at the learning rate with the highest mean accuracy, among those with most seeds."""
    return max(rates.values(), key=lambda runs: (runs.count, runs.mean))


def _equal_epochs(groups: Mapping[tuple[str, int], Forms]) -> Table:
    lines = []
    for (model, epochs), forms in groups.items():
        rates = sorted({lr for by_rate in forms.values() for lr in by_rate}, reverse=True)
        choices = {f"{lr:g}": {form: forms[form][lr] for form in forms if lr in forms[form]} for lr in rates}
        bests = {form: best(by_rate) for form, by_rate in forms.items()}
        if bests not in choices.values():
            choices["each its best"] = bests
        for name, chosen in choices.items():
            where = [model, str(epochs), name]
            for form in filter(chosen.get, FORMS):
                runs = chosen[form]
                minus = "" if form == ONLINE else show_difference(difference(chosen.get(ONLINE), runs))
                lines.append([*where, FORMS[form], str(runs.count), runs.cell(), minus, f"{runs.seconds:.0f}"])
                where = [""] * 3
    return ["net", "epochs", "learning rate", "form", "seeds", "accuracy, %", "online minus it", "s"], lines


def _equal_time(groups: Mapping[tuple[str, int], Forms]) -> Table:
    """Compare online with other forms of the same net trained for other epochs; each at its best learning rate."""
    lines = []
    for (model, epochs), forms in groups.items():
        for (other, other_epochs), other_forms in groups.items():
            if other != model or other_epochs == epochs or ONLINE not in forms or OFFLINE not in other_forms:
                continue
            ours, base = best(forms[ONLINE]), best(other_forms[OFFLINE])
            if 1 / _EQUAL_TIME < ours.seconds / (base.seconds or 1) < _EQUAL_TIME:
                cells = [_with_time(epochs, ours), _with_time(other_epochs, base)]
                lines.append([model, *cells, show_difference(difference(ours, base))])
    return ["net", "online", "as it comes", "difference"], lines


def _with_time(epochs: int, runs: Runs) -> str:
    return f"{epochs} epochs, {runs.seconds:.0f} s: {runs.cell()}"


def _reading(results: Results) -> str:
    p, e = results.settings["protocol"], results.environment
    return (
        f"{p['data']}: {p['train_images']} training images, {p['test_images']} to test on (one is "
        f"{100 / p['test_images']:.2f}%), batch {p['recipe']['batch_size']}. Percent right after the last epoch: mean ± sample "
        "standard deviation over the seeds. Differences are means over equal seeds with their 95% interval (Student's t), "
        "where no run diverged; bold: zero is outside. Seconds are processor time of training alone, with one thread. "
        f"{e['processor']}, torch {e['torch']}, commit {e['commit']}, {str(e['date'])[:10]}."
    )
