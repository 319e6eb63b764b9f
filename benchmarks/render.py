"""Render the result tables of README.md and benchmarks/NOTES.md from committed JSON, so that no number is typed by hand.

    python benchmarks/render.py           rewrite what stands between the markers
    python benchmarks/render.py --check   exit with 1 where that would change anything

``<!-- results:cpu/squeeze -->`` … ``<!-- /results:cpu/squeeze -->``, each on a line of its own, holds the table of
``benchmarks/results/cpu/squeeze.json``. Any result of ``orepa bench`` can stand there, those of ``eval_cache.py``,
``host_overhead.py``, ``branch_order.py``, ``sass_audit.py``, ``ablation/`` and ``reparam_accuracy/``, and the
``metrics.json`` of an ``orepa train``.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import sass_audit
from ablation import tables as ablation_tables
from ablation.rows import BENCHMARK as ABLATION
from reparam_accuracy import tables as reparam_tables

from orepa.bench import tables
from orepa.bench.results import SCHEMA, Results, Row, load
from orepa.bench.tables import describe, number, render
from orepa.bench.variants import PLAIN
from orepa.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = (ROOT / "README.md", ROOT / "benchmarks" / "NOTES.md")
# At the start of a line: within one, a marker is only spoken of.
SECTION = re.compile(r"^<!-- results:(\S+) -->\n.*?^<!-- /results:\1 -->", re.DOTALL | re.MULTILINE)
MARKER = re.compile(r"^<!-- /?results:\S+ -->", re.MULTILINE)


def update(text: str, folder: Path) -> str:
    """Return a document with all its result sections brought up to date.

    Args:
        text: Markdown with markers.
        folder: of the JSON files.

    Raises:
        UserError: a marker without its twin, or a result file that is missing or damaged.
    """

    def section(match: re.Match[str]) -> str:
        name = match[1]
        return f"<!-- results:{name} -->\n{table(folder / f'{name}.json')}\n<!-- /results:{name} -->"

    left = MARKER.findall(SECTION.sub("", text))
    if left:
        raise UserError(f"a marker has no twin: {left[0]}")
    return SECTION.sub(section, text)


def table(path: Path) -> str:
    """The Markdown of one result file.

    Raises:
        UserError: it cannot be read, or there is no table for what it holds.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}") from error
    if isinstance(content, dict) and content.get("schema") == SCHEMA:
        results = load(path)
        if results.benchmark in ACCURACIES:  # they have no medians to explain
            return ACCURACIES[results.benchmark](results)
        if results.benchmark not in TABLES:
            raise UserError(f"{path}: no table for the benchmark {results.benchmark!r}")
        return f"{TABLES[results.benchmark](results)}\n\n{tables.conditions(results)}"
    if isinstance(content, dict) and content.get("benchmark") == sass_audit.BENCHMARK:
        return sass_audit.markdown(content)
    if isinstance(content, dict) and "outcome" in content:
        return _training(content)
    raise UserError(f"{path} is neither a result of `orepa bench` nor a metrics.json of `orepa train`")


# --- the tables -----------------------------------------------------------------------------------------------------------


def _squeeze(results: Results) -> str:
    """Return forward plus backward of every block, a column per provider; graph replays where there are any."""
    launch = "graph" if any(row.launch == "graph" for row in results.timed) else "plain"
    modes = sorted({row.mode for row in results.timed})
    columns, rows = tables.squeeze_table(results, launch, ["both" if "both" in modes else modes[0]])
    columns[1:] = [name if name.endswith("(floor)") else f"`{name}`" for name in columns[1:]]
    return render(columns, rows, "markdown")


def _step(results: Results) -> str:
    """Return time and peak memory of one case, and their ratios to the plain model; of several cases, `step_overview`.

    Among processes, return all that the command prints: bytes too.
    """
    if any("reduced_bytes" in row.facts for row in results.timed):
        return render(*tables.step_table(results.rows), "markdown")
    works = ("model", "batch", "size", "accumulate")
    if len({tuple(row.case.get(name) for name in works) for row in results.timed}) > 1:
        return render(*step_overview(results), "markdown")
    lines = []
    for row in results.timed:
        case, base = row.case, tables.base_of(results.timed, row)
        peak, plain = (r.facts.get("peak_bytes") if r else None for r in (row, base))
        line = [f"{case['model']}, batch {case['batch']}, {case['size']} px", f"`{row.provider}`"]
        line += [tables.median(row, 1e3), tables.ratio(row, base), f"{peak / 1e6:,.0f}" if peak else ""]
        line += [f"{peak / plain:.2f}" if peak and plain else "", f"{row.facts['parameter_count'] / 1e6:.2f} M"]
        lines.append(line)
    return render(["step", "", "ms", "× plain", "peak MB", "× plain", "parameters"], lines, "markdown")


def step_overview(results: Results) -> tables.Table:
    """Return a line per case, a column per variant: the plain model's time, all others as its multiple."""
    launch = "graph" if any(row.launch == "graph" for row in results.timed) else "plain"
    rows = [row for row in results.rows if row.launch == launch and row.status != "skipped"]
    names = [name for name in tables.distinct(row.provider for row in rows) if name != PLAIN]
    several = any("accumulate" in row.case for row in rows)
    columns = ["model", "batches×batch×px" if several else "batch×px", "plain, ms"]
    columns += [*(f"{_variant_name(name)}, ×" for name in names), "spread"]
    table = []
    for line in tables.by_case(rows):
        timed = {name: row for name, row in line.items() if row.status == "ok"}
        case, base = next(iter(line.values())).case, timed.get(PLAIN)
        model = " ".join(filter(None, (case["model"], case.get("components"))))
        sizes = [case[name] for name in ("accumulate", "batch", "size") if name in case]
        cells = [model, "×".join(map(str, sizes)), f"{base.median_us / 1e3:,.1f}" if base else ""]
        cells += [tables.ratio(timed[n], base) if n in timed else line[n].status if n in line else "" for n in names]
        spreads = [100 * row.spread for row in timed.values()]
        table.append([*cells, f"±{max(spreads):.0f}%" if spreads else ""])
    return columns, table


def _reparam(results: Results) -> str:
    launch = "graph" if any(row.launch == "graph" for row in results.timed) else "plain"
    return "\n\n".join(render(*table, "markdown") for table in tables.reparam_tables(results, launch))


def _variant_name(name: str) -> str:
    kind, _, rest = name.partition("-")
    kind = {"orepa": "OREPA", "dbb": "DBB", "repvgg": "RepVGG"}.get(kind, kind)
    return f"{kind} ({rest})" if kind == "OREPA" else f"{kind} {rest}".strip()


def _eval_cache(results: Results) -> str:
    pairs: dict[str, dict[str, Row]] = {}
    for row in results.timed:
        pairs.setdefault(describe(row.case), {})[row.provider] = row
    lines = []
    for name, pair in pairs.items():
        ours, plain = pair["OREPAConv"], pair["Conv2d"]
        cells = [tables.median(ours), tables.median(plain)]
        lines.append([name, *cells, f"{ours.median_us / plain.median_us:.3f}"])
    return render(
        ["µs, eval forward, one image", "`OREPAConv`, kernel cached", "`nn.Conv2d`", "ratio"], lines, "markdown"
    )


def _host_overhead(results: Results) -> str:
    """A table for a block and one for a model: a line per backend, a column per mode, medians and the least."""
    written = []
    for model in tables.distinct(row.case.get("model", "") for row in results.timed):
        timed = [row for row in results.timed if row.case.get("model", "") == model]
        modes, lines = tables.distinct(row.mode for row in timed), dict[str, dict[str, str]]()
        for row in timed:
            name = f"{row.provider} (floor)" if row.floor else f"`{row.provider}`"
            least = number(1e6 * min(row.seconds))
            lines.setdefault(name, {})[row.mode] = f"{tables.median(row)}, least {least}"
        what = f"{model}, {timed[0].case['blocks']} blocks" if model else f"{timed[0].case['operands']} operands"
        header = [f"µs of the host, {what}; left out: {results.settings['missing']}", *modes]
        rows = [[name, *(cells.get(mode, "") for mode in modes)] for name, cells in lines.items()]
        written.append(render(header, rows, "markdown"))
    return "\n\n".join(written)


def _branch_order(results: Results) -> str:
    """Return a line per block, a column per batch of images: the branch's order relative to the squeeze; then whole models."""
    blocks = [row for row in results.timed if row.mode == "both"]
    images = tables.distinct(f"{row.case['batch']} × {row.case['image']}" for row in blocks)
    lines: dict[str, dict[str, str]] = {}
    for line in tables.by_case(blocks):
        case = line["auto"].case
        squeeze, branch = (min(line[order].seconds) for order in ("squeeze", "branch"))
        name = f"{case['topology']}, {case['in']} → {case['out']}" + (", stride 2" if case["stride"] > 1 else "")
        cell = f"**{branch / squeeze:.2f}**" if line["auto"].facts["chosen"] == "branch" else f"{branch / squeeze:.2f}"
        lines.setdefault(name, {})[f"{case['batch']} × {case['image']}"] = cell
    rows = [[name, *(cells.get(image, "") for image in images)] for name, cells in lines.items()]
    parts = [render(["branch on feature maps / all squeezed", *images], rows, "markdown")]
    steps = replace(results, rows=[row for row in results.timed if row.mode == "step"])
    if steps.rows:
        parts.append(render(*step_overview(steps), "markdown"))
    return "\n\n".join(parts)


def _training(metrics: dict[str, Any]) -> str:
    try:
        outcome, config, facts = metrics["outcome"], metrics["config"], metrics["environment"]
        columns = {name: c for name, c in outcome.items() if isinstance(c, dict)}
        cells: dict[str, Callable[[dict[str, Any]], str]] = {
            f"accuracy on {metrics['data']['val_images']} validation images": lambda c: f"{100 * c['accuracy']:.2f}%",
            "predictions that changed": lambda c: str(c["changed"]),
            "largest difference of a logit": lambda c: f"{c['max_difference']:.1e}",
            "parameters": lambda c: f"{c['parameters']:,}",
            f"inference, ms per batch of {outcome['batch_size']}": lambda c: f"{c['inference_ms']:.2f}",
            f"training, ms per batch of {outcome['batch_size']}": lambda c: (
                "" if c["training_ms"] is None else f"{c['training_ms']:.2f}"
            ),
        }
        lines = [[label, *(cell(c) for c in columns.values())] for label, cell in cells.items()]
        kind = "OREPA" if config["orepa"] else "plain"
        what = f"{config['model']}, {kind}, {config['epochs']} epochs in {metrics['training_seconds']:.0f} s"
        header = [what, *columns]
        where = f"{facts['threads']} thread(s), torch {facts['packages']['torch']}"
    except (KeyError, TypeError) as error:
        raise UserError(f"a damaged metrics.json: {type(error).__name__} {error}") from error
    return f"{render(header, lines, 'markdown')}\n\n{where}."


TABLES: dict[str, Callable[[Results], str]] = {
    "squeeze": _squeeze,
    "step": _step,
    "reparam": _reparam,
    "eval_cache": _eval_cache,
    "host_overhead": _host_overhead,
    "branch_order": _branch_order,
}
ACCURACIES: dict[str, Callable[[Results], str]] = {
    ABLATION: ablation_tables.markdown,
    reparam_tables.BENCHMARK: reparam_tables.markdown,
}


def main(argv: list[str] | None = None) -> int:
    """Render or check; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit with 1 where something would change")
    parser.add_argument(
        "--document",
        type=Path,
        action="append",
        help="may come several times; default: README.md and benchmarks/NOTES.md",
    )
    parser.add_argument(
        "--results", type=Path, default=ROOT / "benchmarks" / "results", help="folder of the JSON files"
    )
    args = parser.parse_args(argv)
    documents = args.document or DOCUMENTS
    before = {path: path.read_text(encoding="utf-8") for path in documents}
    try:
        after = {path: update(text, args.results) for path, text in before.items()}
    except UserError as error:
        print(f"render: error: {error}", file=sys.stderr)
        return 2
    changed = [path for path in before if after[path] != before[path]]
    for path in changed:
        if args.check:
            print(f"{path} is not what the results say: run python benchmarks/render.py", file=sys.stderr)
        else:
            path.write_text(after[path], encoding="utf-8")
            print(f"{path} rendered")
    return 1 if changed and args.check else 0


if __name__ == "__main__":
    sys.exit(main())
