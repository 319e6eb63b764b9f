"""Compare two result files of the same benchmark: ratios, and whether they are more than noise.

python benchmarks/compare.py A.json B.json
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

from orepa.bench.results import Results, Row, load
from orepa.bench.tables import describe, render
from orepa.errors import UserError

_WATCHED = ("processor", "gpu", "device", "threads", "torch", "python", "float32_matmul_precision")


@dataclass(frozen=True)
class Pair:
    """The same measurement in two runs."""

    before: Row
    after: Row

    @property
    def ratio(self) -> float:
        """Of the medians, after to before: above 1 is slower."""
        return self.after.median_us / self.before.median_us

    @property
    def bounds(self) -> tuple[float, float]:
        """The least and the largest ratio within the spreads of both runs."""
        a, b = self.before.summary, self.after.summary
        return b["low_us"] / a["high_us"], b["high_us"] / a["low_us"]

    @property
    def verdict(self) -> str:
        """``"slower"`` or ``"faster"`` where the spreads of the two have nothing in common, else ``"no difference"``."""
        low, high = self.bounds
        if low <= 1 <= high:
            return "no difference"
        return "slower" if low > 1 else "faster"


@dataclass(frozen=True)
class Comparison:
    """Everything that two runs have in common, and what speaks against comparing them."""

    pairs: list[Pair]
    notes: list[str]

    @property
    def conclusion(self) -> str:
        """All verdicts in a line."""
        counts = {v: sum(p.verdict == v for p in self.pairs) for v in ("slower", "faster", "no difference")}
        if counts["no difference"] == len(self.pairs):
            return f"no difference in any of {len(self.pairs)} measurements"
        return f"of {len(self.pairs)} measurements: " + ", ".join(f"{n} {v}" for v, n in counts.items())


def compare(before: Results, after: Results) -> Comparison:
    """Match the measurements of two runs.

    Raises:
        UserError: the runs are of different benchmarks, or have nothing in common.
    """
    if before.benchmark != after.benchmark:
        raise UserError(f"cannot compare {before.benchmark!r} with {after.benchmark!r}: different benchmarks")
    old, new = ({row.key: row for row in run.rows} for run in (before, after))
    pairs = [
        Pair(old[key], row) for key, row in new.items() if row.status == "ok" and key in old and old[key].status == "ok"
    ]
    if not pairs:
        raise UserError("the two files have no timed measurement in common")
    a, b = before.environment, after.environment
    notes = [f"{name} differs: {a.get(name)} and {b.get(name)}" for name in _WATCHED if a.get(name) != b.get(name)]
    for key in old.keys() | new.keys():
        states = [run[key].status if key in run else "absent" for run in (old, new)]
        if states[0] != states[1]:
            row = new.get(key) or old[key]
            notes.append(f"{row.provider}, {row.mode}: {states[0]} in A, {states[1]} in B")
    runs = (("A", before), ("B", after))
    for name, run in runs:
        if run.processes == 1:
            notes.append(f"{name} was measured in one process: what differs between processes is not in its spread")
        if not run.complete:
            notes += [f"{name} is partial: {why}" for why in run.lost or ["its run did not end"]]
    return Comparison(pairs, list(dict.fromkeys(notes)))


def show(comparison: Comparison) -> None:
    """Print the ratios of two runs."""
    for note in comparison.notes:
        print(f"note: {note}")
    columns = ["block", "mode", "launch", "provider", "A µs", "B µs", "B/A", "least to largest", ""]
    rows = []
    for pair in comparison.pairs:
        a, b = pair.before, pair.after
        cells = [describe(a.case), a.mode, a.launch, a.provider, f"{a.median_us:,.1f}", f"{b.median_us:,.1f}"]
        rows.append([*cells, f"{pair.ratio:.3f}", "{:.3f} to {:.3f}".format(*pair.bounds), pair.verdict])
    print(f"\n{render(columns, rows, text=4)}\n\n{comparison.conclusion}")


def main(argv: list[str] | None = None) -> int:
    """Compare two files; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path, metavar="A.json")
    parser.add_argument("after", type=Path, metavar="B.json")
    args = parser.parse_args(argv)
    try:
        show(compare(load(args.before), load(args.after)))
    except UserError as error:
        print(f"compare: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
