"""Turn results into tables, for a terminal and for Markdown."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any, Literal

from .results import Results, Row
from .variants import PLAIN

Style = Literal["terminal", "markdown"]
#: columns and rows of a table
Table = tuple[list[str], list[list[str]]]
#: the baseline of the squeeze's ratios
BASELINE = "eager"
_NOT_TIMED = {"wrong": "WRONG", "failed": "failed", "skipped": "-"}
#: facts of a squeeze to show: their columns, units and formats
_FACTS = {
    "launches": ("launches", 1, "{:.0f}"),
    "host_us": ("host µs", 1, "{:.1f}"),
    "saved_bytes": ("saved MB", 1e6, "{:.2f}"),
    "weight_error": ("error of W", 1, "{:.1e}"),
    "gradient_error": ("of gradients", 1, "{:.1e}"),
}


def render(columns: Sequence[str], rows: Iterable[Sequence[str]], style: Style = "terminal", text: int = 1) -> str:
    """Return a table as text; on a terminal, the leading ``text`` columns are left-aligned, all others hold numbers."""
    lines = [list(columns), *map(list, rows)]
    if style == "markdown":
        lines.insert(1, ["---", *["---:"] * (len(columns) - 1)])
        return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    widths = [max(map(len, cells)) for cells in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    formats = [f"{{:{'<' if i < text else '>'}{width}}}" for i, width in enumerate(widths)]
    return "\n".join("  ".join(formats).format(*cells) for cells in lines)


def order_advice(rows: Iterable[Row], order: Sequence[str]) -> str:
    """Return what measured squeezes say of the order in which the automatic choice asks ``cuda`` and ``triton``.

    Args:
        rows: of a squeeze.
        order: of `orepa_kernels.names_on`. Empty advice where it or the rows lack one of the two.
    """
    both = "cuda", "triton"
    pairs = [
        {name: line[name] for name in both if name in line}
        for line in by_case([row for row in rows if row.status == "ok"])
    ]
    ratios = [pair["cuda"].median_us / pair["triton"].median_us for pair in pairs if len(pair) == 2]
    ranks = [name for name in order if name in both]
    if not ratios or len(ranks) < 2:
        return ""
    middle = math.exp(sum(map(math.log, ratios)) / len(ratios))
    faster = both[middle > 1]
    verdict = "as it should be" if ranks[0] == faster else "change TRITON_FIRST in orepa_kernels/dispatch.py"
    numbers = (
        f"cuda / triton: {middle:.2f} (geometric mean of {len(ratios)} rows, {min(ratios):.2f} to {max(ratios):.2f})"
    )
    return f"{numbers}; backend='auto' asks {ranks[0]} first: {verdict}"


def number(value: float) -> str:
    """Return three digits or more."""
    return f"{value:,.{0 if value >= 100 else 1}f}"


def median(row: Row, unit: float = 1.0) -> str:
    """Return the median and spread of a row, in ``unit`` microseconds."""
    value = row.median_us / unit
    return f"{number(value) if unit == 1 else f'{value:,.1f}'} ±{100 * row.spread:.0f}%"


def describe(case: dict[str, Any]) -> str:
    """Return a case in few characters, without its device."""
    case = {k: v for k, v in case.items() if k != "device"}
    words = []
    if {"out", "in", "k"} <= case.keys():
        words.append(f"{case.pop('in')}->{case.pop('out')} {case['k']}x{case.pop('k')}")
    for name, form in (("stride", "s{}"), ("groups", "g{}"), ("size", "@{}")):
        value = case.pop(name, None)
        if value not in (None, 1):
            words.append(form.format(value))
    return " ".join([*words, *map(str, case.values())])


def by_case(rows: Sequence[Row]) -> list[dict[str, Row]]:
    """Group rows that may be compared, by provider."""
    groups: dict[Any, dict[str, Row]] = {}
    for row in rows:
        groups.setdefault(row.where, {})[row.provider] = row
    return list(groups.values())


def base_of(rows: Sequence[Row], row: Row) -> Row | None:
    """Return the plain model on the same work."""
    return next((r for r in rows if r.where == row.where and r.provider == PLAIN and r.status == "ok"), None)


def ratio(row: Row, base: Row | None) -> str:
    """Return how many times the base's time a row takes."""
    return f"{row.median_us / base.median_us:.2f}" if base else ""


def distinct(values: Iterable[str]) -> list[str]:
    """Return each value once, in the order of the first."""
    return list(dict.fromkeys(values))


def squeeze_table(results: Results, launch: str, modes: Sequence[str]) -> Table:
    """Return the medians of every block, a column per provider, with ratios to `BASELINE`."""
    rows = [row for row in results.rows if row.launch == launch and row.mode in modes]
    shown = {row.provider: row.floor for row in rows if row.status != "skipped"}
    names = [name for name in results.settings.get("providers", shown) if name in shown]
    several = len(modes) > 1
    columns = ["µs", "mode"] if several else [f"µs, {'forward + backward' if modes[0] == 'both' else modes[0]}"]
    columns += [f"{name} (floor)" if shown[name] else name for name in names]
    table = []
    for line in by_case(rows):
        first, base = next(iter(line.values())), line.get(BASELINE)
        cells = [describe(first.case), *[first.mode] * several]
        table.append(cells + [_cell(line[name], base) if name in line else "" for name in names])
    return columns, table


def _cell(row: Row, base: Row | None) -> str:
    if row.status != "ok":
        return _NOT_TIMED[row.status]
    if base is None or base is row or base.status != "ok" or row.floor:
        return median(row)
    return f"{median(row)} ({base.median_us / row.median_us:.2f}×)"


def details_table(results: Results) -> Table:
    """Return launches and host time where they were measured, memory saved for the backward pass, and errors."""
    modes = distinct(row.mode for row in results.timed)
    mode = "both" if "both" in modes else modes[-1]
    rows = [row for row in results.timed if row.mode == mode and _FACTS.keys() & row.facts.keys()]
    shown = {name: how for name, how in _FACTS.items() if any(name in row.facts for row in rows)}
    table = []
    for row in rows:
        cells = [form.format(row.facts[n] / unit) if n in row.facts else "" for n, (_, unit, form) in shown.items()]
        table.append([describe(row.case), row.provider, row.launch, *cells])
    return ["block", "provider", "launch", *(head for head, _, _ in shown.values())], table


def step_table(rows: Sequence[Row]) -> Table:
    """Return a line per case and variant, with ratios to the plain model; "difference" is that of logits from the twin's."""
    columns = ["step", "variant", "ms", "× plain", "images/s", "parameters", "difference"]
    columns += ["reduced MB"] * any("reduced_bytes" in row.facts for row in rows)
    table = []
    for row in rows:
        c, f, base = row.case, row.facts, base_of(rows, row)
        cells = [_case_words(c), row.provider, row.status.upper(), *[""] * (len(columns) - 3)]
        if row.status == "ok":
            images = c["batch"] * c.get("accumulate", 1) * c.get("processes", 1)
            cells[2:] = [median(row, 1e3), ratio(row, base), f"{images / row.median_us * 1e6:,.0f}"]
            cells += [f"{f['parameter_count'] / 1e6:.2f} M", f"{f['logits_error']:.0e}" if "logits_error" in f else ""]
            cells += [f"{f['reduced_bytes'] / 1e6:.1f}"] if "reduced_bytes" in f else []
        if row.status != "skipped":
            table.append(cells)
    return columns, table


def _case_words(case: dict[str, Any]) -> str:
    batch = f"{case['accumulate']} batches of {case['batch']}" if "accumulate" in case else f"batch {case['batch']}"
    words = [case["model"], batch, f"{case['size']} px", case.get("components")]
    words += [f"{case['processes']} processes" if "processes" in case else ""]
    words += [f"autocast {case['autocast']}" if case["autocast"] != "none" else ""]
    return ", ".join(filter(None, [*words, case["layout"].replace("contiguous", "")]))


def reparam_tables(results: Results, launch: str) -> list[Table]:
    """Return two tables, a line per net and a column per form: training steps, and images per second at inference.

    The header holds what all lines have in common.
    Ratios of steps are times of the first form and of the online one, divided by those of the next column.
    """
    tables = []
    for mode, first in (("step", "training step: ms, peak MB"), ("inference", "inference: images/s")):
        rows = [row for row in results.rows if (row.mode, row.launch) == (mode, launch)]
        names = distinct(row.provider for row in rows)
        pairs = list(pairwise(names)) if mode == "step" else []
        works = distinct(_case_words(row.case).removeprefix(row.case["model"]) for row in rows)
        common = works[0] if len(works) == 1 else ""
        lines = []
        for line in by_case(rows):
            base = line[names[0]]
            case = _case_words(base.case).removesuffix(common)
            cells = [case, *(_reparam_cell(row, base) for row in line.values())]
            timed = [[line[name] for name in pair if line[name].status == "ok"] for pair in pairs]
            lines.append(cells + [ratio(*pair) if len(pair) == 2 else "" for pair in timed])
        tables.append(([first + common, *names, *map(" / ".join, pairs)], lines))
    return tables


def _reparam_cell(row: Row, base: Row) -> str:
    if row.status != "ok":
        return _NOT_TIMED[row.status]
    if row.mode == "step":
        return f"{median(row, 1e3)}, {number(row.facts['peak_bytes'] / 1e6)}"
    text = f"{number(row.case['batch'] / row.median_us * 1e6)} ±{100 * row.spread:.0f}%"
    return text if row is base or base.status != "ok" else f"{text} ({ratio(base, row)}×)"


def show(results: Results) -> None:
    """Print the tables of a result file, how it was measured, and why something is missing."""
    for launch in distinct(row.launch for row in results.rows):
        rows = [row for row in results.rows if row.launch == launch]
        modes = distinct(row.mode for row in rows)
        print(f"{results.benchmark}{', replayed from a CUDA graph' * (launch == 'graph')}: medians ± spread\n")
        if results.benchmark == "reparam":
            tables, text = reparam_tables(results, launch), 1
        elif results.benchmark == "step":
            tables, text = [step_table(rows)], 2
        else:
            tables, text = [squeeze_table(results, launch, modes)], 2 if len(modes) > 1 else 1
        for table in tables:
            print(render(*table, text=text), end="\n\n")
    if results.benchmark == "squeeze" and results.timed:
        print("memory saved for the backward pass, errors against float64\n")
        print(render(*details_table(results), text=3), end="\n\n")
    print(conditions(results))
    e = results.environment
    busy = e.get("busy_cores_of_others")
    if busy and busy + e["threads"] > e["cores"] + 0.1:
        print(f"note: other programs kept {busy} of {e['cores']} cores busy: times on the CPU are too long")
    for line in problems(results):
        print(line)


def conditions(results: Results) -> str:
    """Return how and where results were measured, in a line."""
    e = results.environment
    device = e.get("gpu") or f"{e.get('processor')}, {e.get('threads')} thread(s)"
    words = [device, f"torch {e.get('torch')}", f"commit {e.get('commit')}", str(e.get("date"))[:10]]
    if e.get("busy_cores_of_others"):
        words.append(f"{e['busy_cores_of_others']} cores busy with other programs")
    spread = "half the distance from the 20th to the 80th percentile"
    if results.processes > 1:
        spread = "half of what the 20th to 80th percentile and a 95% confidence interval from the medians of "
        spread += f"{results.processes} processes span"
    return f"{', '.join(words)}. Medians, ± {spread}."


def problems(results: Results) -> list[str]:
    """Return a line per process that was lost, and per provider and reason that kept it from being timed."""
    count = len({describe(row.case) for row in results.rows})
    cases: dict[str, set[str]] = {}
    for row in results.rows:
        if row.status != "ok":
            cases.setdefault(f"{row.provider}: {row.status}: {row.reason}", set()).add(describe(row.case))
    return [f"lost: {line}" for line in results.lost] + [
        what if len(where) == count else f"{what} [{', '.join(sorted(where))}]" for what, where in cases.items()
    ]
