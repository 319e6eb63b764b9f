"""The shortest table that still says something: one line per block and mode, from any number of result files.

python benchmarks/digest.py FILE.json...
"""

from __future__ import annotations

import sys
from pathlib import Path

from orepa.bench.results import Results, Row, load
from orepa.bench.tables import describe
from orepa.errors import UserError


def lines(results: Results) -> list[str]:
    """Medians in microseconds, providers side by side."""
    groups: dict[object, list[Row]] = {}
    for row in results.rows:
        groups.setdefault(row.where, []).append(row)
    found = [
        f"{results.benchmark}, commit {results.environment.get('commit')}{'' if results.complete else ', INCOMPLETE'}"
    ]
    for rows in groups.values():
        first = rows[0]
        cells = [f"{r.provider} {r.median_us:.1f}" if r.status == "ok" else f"{r.provider} {r.status}" for r in rows]
        found.append(f"  {describe(first.case):28.28} {first.mode:8} {first.launch:5} {'  '.join(cells)}"[:200])
    return found


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
