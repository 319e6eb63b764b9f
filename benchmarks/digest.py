"""Print one line per block and mode of any number of result files.

python benchmarks/digest.py FILE.json...
"""

from __future__ import annotations

import sys
from pathlib import Path

from orepa.bench.results import Results, load
from orepa.bench.tables import by_case, describe
from orepa.errors import UserError


def lines(results: Results) -> list[str]:
    """Return medians in microseconds, providers side by side."""
    state = "" if results.complete else ", INCOMPLETE"
    text = [f"{results.benchmark}, commit {results.environment.get('commit')}{state}"]
    for rows in (list(group.values()) for group in by_case(results.rows)):
        first = rows[0]
        cells = [f"{r.provider} {r.median_us:.1f}" if r.status == "ok" else f"{r.provider} {r.status}" for r in rows]
        text.append(f"  {describe(first.case):28.28} {first.mode:8} {first.launch:5} {'  '.join(cells)}"[:200])
    return text


def main(paths: list[str]) -> int:
    """Print the digest of each file; 2 where one cannot be read."""
    code = 0
    for path in paths:
        try:
            print(f"{path}: " + "\n".join(lines(load(Path(path)))))
        except UserError as error:
            print(f"orepa: error: {error}", file=sys.stderr)
            code = 2
    return code


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
