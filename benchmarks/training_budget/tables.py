"""Tables of training budgets: memory by part, and the paper's Table 4 beside this run."""

from __future__ import annotations

from orepa.bench.results import Results, Row
from orepa.bench.tables import Table, base_of, ratio
from training_budget.paper import TABLE_4

PARTS = ("parameters", "gradients", "optimizer", "activations", "squeeze", "buffers", "temporary", "rounding")
#: variants whose numbers the paper has, by its names
_PAPER = {"None": "plain", "RepVGG": "plain", "DBB": "dbb-offline", "OREPA": "orepa-"}


def memory_table(results: Results) -> Table:
    """Return the memory at the peak by part, in MB; it does not depend on the launch.

    "saved" is all that the forward pass saves for backward, "by squeeze" the squeeze's part of it (unknown in a compiled
    model). At the peak some of it may be freed already.
    """
    rows = list({(tuple(row.case.values()), row.provider): row for row in results.timed}.values())
    parts = [part for part in PARTS if any(row.facts["split"][part] for row in rows)]
    columns = ["step", "variant", *parts, "sum", "peak", "saved", "by squeeze"]
    table = []
    for row in rows:
        c, f = row.case, row.facts
        values = [*(f["split"][p] for p in parts), sum(f["split"].values()), f["peak_bytes"], f["saved_bytes"]]
        cells = [f"{value / 1e6:,.1f}" for value in values]
        cells.append("-" if f["squeeze_saved_bytes"] is None else f"{f['squeeze_saved_bytes'] / 1e6:,.1f}")
        what = f"{c['model']}, batch {c['batch']}, {c['size']} px {c.get('components', '')}".strip()
        table.append([what, row.provider, *cells])
    return columns, table


def paper_table(results: Results) -> Table | None:
    """Return the paper's ratios beside ours at the largest batch; None where it has no such model."""
    timed = [row for row in results.timed if "components" not in row.case]
    models = [m for m in dict.fromkeys(row.case["model"] for row in timed) if m in TABLE_4]
    if not models:
        return None
    columns = ["model", "re-param", "paper: s/batch", "×", "GB", "×", "here", "s/batch", "×", "GB", "×"]
    table = []
    for model in models:
        budgets = TABLE_4[model]
        first = next(iter(budgets.values()))
        of_model = [row for row in timed if row.case["model"] == model]
        launch = "graph" if any(row.launch == "graph" for row in of_model) else "plain"
        largest = max(row.case["batch"] for row in of_model)
        ours = [row for row in of_model if row.case["batch"] == largest and row.launch == launch]
        for kind, budget in budgets.items():
            head = [model if budget is first else "", kind]
            head += [f"{budget.seconds:.3f}", f"{budget.seconds / first.seconds:.2f}"]
            head += [f"{budget.gigabytes:.1f}", f"{budget.gigabytes / first.gigabytes:.2f}"]
            wanted = _PAPER[kind]
            of_kind = [r for r in ours if r.provider == wanted or (wanted[-1] == "-" and r.provider.startswith(wanted))]
            for row in of_kind:
                table.append([*head, row.provider, *_ours(row, base_of(ours, row))])
                head = [""] * 6
            if not of_kind:
                table.append([*head, "not measured", "", "", "", ""])
    return columns, table


def _ours(row: Row, base: Row | None) -> list[str]:
    peak = row.facts["peak_bytes"]
    cells = [f"{row.median_us / 1e6:.4f}", ratio(row, base), f"{peak / 1e9:.2f}"]
    return [*cells, f"{peak / base.facts['peak_bytes']:.2f}" if base else ""]
