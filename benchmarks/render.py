"""Render the result tables of README.md and benchmarks/NOTES.md from committed JSON, so that no number is typed by hand.

    python benchmarks/render.py           rewrite what stands between the markers
    python benchmarks/render.py --check   exit with 1 where that would change anything

``<!-- results:cpu/squeeze -->`` … ``<!-- /results:cpu/squeeze -->``, each on a line of its own, holds the table of
``benchmarks/results/cpu/squeeze.json``. Any result of ``orepa bench`` can stand there, those of ``eval_cache.py``,
``host_overhead.py`` and ``ablation.py``, and the ``metrics.json`` of an ``orepa train``.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from orepa.bench import ablation_tables
from orepa.bench.ablation_rows import BENCHMARK as ABLATION
from orepa.bench.results import SCHEMA, Results, Row, load
from orepa.bench.step_tables import base_of
from orepa.bench.tables import BASELINE, describe
from orepa.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = (ROOT / "README.md", ROOT / "benchmarks" / "NOTES.md")
# At the start of a line: within one, a marker is only spoken of.
SECTION = re.compile(r"^<!-- results:(\S+) -->\n.*?^<!-- /results:\1 -->", re.DOTALL | re.MULTILINE)
MARKER = re.compile(r"^<!-- /?results:\S+ -->", re.MULTILINE)


def render(text: str, folder: Path) -> str:
    """A document with all its result sections brought up to date.

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
        if results.benchmark not in (*TABLES, ABLATION):
            raise UserError(f"{path}: no table for the benchmark {results.benchmark!r}")
        if results.benchmark == ABLATION:  # it has no medians to explain
            return ablation_tables.markdown(results)
        return f"{TABLES[results.benchmark](results)}\n\n{_conditions(results)}"
    if isinstance(content, dict) and "outcome" in content:
        return _training(content)
    raise UserError(f"{path} is neither a result of `orepa bench` nor a metrics.json of `orepa train`")


# --- the tables -----------------------------------------------------------------------------------------------------------


def _squeeze(results: Results) -> str:
    """Forward plus backward of every block, a column per provider; graph replays where there are any."""
    launches = {row.launch for row in results.timed}
    launch = "graph" if "graph" in launches else "plain"
    modes = {row.mode for row in results.timed}
    mode = "both" if "both" in modes else sorted(modes)[0]
    rows = [row for row in results.timed if (row.launch, row.mode) == (launch, mode)]
    measured = {row.provider: row.floor for row in rows}
    names = [name for name in results.settings["providers"] if name in measured]
    lines: dict[str, dict[str, Row]] = {}
    for row in rows:
        case = {k: v for k, v in row.case.items() if k != "device"}
        lines.setdefault(describe(case), {})[row.provider] = row
    what = "forward + backward" if mode == "both" else mode
    header = [f"µs, {what}", *(f"{name} (floor)" if measured[name] else f"`{name}`" for name in names)]
    return _markdown(header, [[block, *(_cell(cells, name) for name in names)] for block, cells in lines.items()])


def _step(results: Results) -> str:
    """Time and peak memory of a whole training step, and their ratios to the plain model."""
    lines = []
    for row in results.timed:
        base = base_of(results.timed, row)
        cells = [f"{row.median_us / 1e3:,.1f} ±{100 * row.spread:.0f}%", f"{row.facts['peak_bytes'] / 1e6:,.0f}"]
        ratios = ["", ""]
        if base is not None:
            memory = row.facts["peak_bytes"] / base.facts["peak_bytes"]
            ratios = [f"{row.median_us / base.median_us:.2f}", f"{memory:.2f}"]
        case = row.case
        what = f"{case['model']}, batch {case['batch']}, {case['size']} px"
        parameters = f"{row.facts['parameter_count'] / 1e6:.2f} M"
        lines.append([what, f"`{row.provider}`", cells[0], ratios[0], cells[1], ratios[1], parameters])
    return _markdown(["step", "", "ms", "× plain", "peak MB", "× plain", "parameters"], lines)


def _cell(cells: dict[str, Row], name: str) -> str:
    row, base = cells.get(name), cells.get(BASELINE)
    if row is None:
        return ""
    text = f"{_number(row.median_us)} ±{100 * row.spread:.0f}%"
    if base is None or base is row or row.floor:
        return text
    return f"{text} ({base.median_us / row.median_us:.2f}×)"


def _eval_cache(results: Results) -> str:
    pairs: dict[str, dict[str, Row]] = {}
    for row in results.timed:
        pairs.setdefault(describe(row.case), {})[row.provider] = row
    lines = []
    for name, pair in pairs.items():
        ours, plain = pair["OREPAConv"], pair["Conv2d"]
        cells = [f"{_number(row.median_us)} ±{100 * row.spread:.0f}%" for row in (ours, plain)]
        lines.append([name, *cells, f"{ours.median_us / plain.median_us:.3f}"])
    return _markdown(["µs, eval forward, one image", "`OREPAConv`, kernel kept", "`nn.Conv2d`", "ratio"], lines)


def _host_overhead(results: Results) -> str:
    """A line per backend, a column per mode: medians, and the least."""
    modes = list(dict.fromkeys(row.mode for row in results.timed))
    lines: dict[str, dict[str, str]] = {}
    for row in results.timed:
        name = f"{row.provider} (floor)" if row.floor else f"`{row.provider}`"
        least = _number(1e6 * min(row.seconds))
        lines.setdefault(name, {})[row.mode] = f"{_number(row.median_us)} ±{100 * row.spread:.0f}%, least {least}"
    operands = results.rows[0].case["operands"]
    header = [f"µs of the host, {operands} operands; left out: {results.settings['missing']}", *modes]
    return _markdown(header, [[name, *(cells.get(mode, "") for mode in modes)] for name, cells in lines.items()])


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
    return f"{_markdown(header, lines)}\n\n{where}."


TABLES: dict[str, Callable[[Results], str]] = {
    "squeeze": _squeeze,
    "step": _step,
    "eval_cache": _eval_cache,
    "host_overhead": _host_overhead,
}


def _conditions(results: Results) -> str:
    e = results.environment
    device = e.get("gpu") or f"{e['processor']}, {e['threads']} thread(s)"
    words = [device, f"torch {e['torch']}", f"commit {e['commit']}", str(e["date"])[:10]]
    if e.get("busy_cores_of_others"):
        words.append(f"{e['busy_cores_of_others']} cores busy with other programs")
    spread = "half the distance from the 20th to the 80th percentile"
    if results.processes > 1:
        spread = (
            "half of what the 20th to 80th percentile and a 95% confidence interval from the medians of "
            f"{results.processes} processes span"
        )
    return f"{', '.join(words)}. Medians, ± {spread}."


def _number(value: float) -> str:
    return f"{value:,.{0 if value >= 100 else 1}f}"


def _markdown(header: list[str], lines: list[list[str]]) -> str:
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, rule, *lines))


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
        after = {path: render(text, args.results) for path, text in before.items()}
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
