"""What the Triton kernels need of a GPU: registers, spills and shared memory of every tile, compiled ahead of time.

    python benchmarks/triton_resources.py                                  the whole catalogue, in every memory layout
    python benchmarks/triton_resources.py --checked --out benchmarks/results/triton      what the tests look at
    python benchmarks/triton_resources.py --blocks orepa:3 --memory channels_last --table

Needs Triton, no GPU. Prints a summary, or with --table a Markdown table of everything; with --out, writes a JSON file named
after the version of Triton, too. Exits with 1 where a main loop spills registers, or a kernel spills more elsewhere or wants
more shared memory than there is.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "kernels"))

import triton
from triton_aot import LARGEST_SHARED, MEMORY, MOST_SPILLED, PRECISIONS, catalogue, checked, kernels_of, structures

from orepa.bench.machine import environment

Row = dict[str, Any]


def rows_of(topology: str, size: int, memory: str, target: str, precision: str) -> list[Row]:
    """All kernels of one block, one GPU, one precision."""
    about = {"block": f"{topology} {size}x{size}", "memory": memory, "gpu": target, "precision": precision}
    return [
        about | {"kernel": kernel, "tile": text_of(tile), **asdict(need)}
        for forward, backward in structures(topology, size, **MEMORY[memory])
        for kernel, tile, need in kernels_of(forward, backward, target, precision, {})
    ]


def text_of(tile: dict[str, Any]) -> str:
    """``BO=32 BI=64 ...``."""
    return " ".join(f"{key}={value}" for key, value in tile.items() if key != "enable_fp_fusion")


def compact(rows: list[Row], about: dict[str, Any]) -> str:
    """JSON, a line per different kernel: values in the order of ``columns``, with a number for the tile.

    The tests compile what is not in it (``tests/kernels/test_triton_aot.py``).
    """
    different: dict[str, Row] = {}
    for row in rows:
        different.setdefault(row["digest"], row)
    rows, columns = [*different.values()], [*rows[0]]
    tiles = list(dict.fromkeys(row["tile"] for row in rows))
    lines = [[tiles.index(row[name]) if name == "tile" else row[name] for name in columns] for row in rows]
    head = {"environment": about, "tiles": tiles, "columns": columns}
    return json.dumps(head, indent=1)[:-2] + ',\n "rows": [\n' + ",\n".join(map(json.dumps, lines)) + "\n]}\n"


def table(rows: Iterable[Row]) -> str:
    """Markdown, a line per kernel."""
    columns = ("block", "memory", "gpu", "precision", "kernel", "tile", "registers", "spills", "shared", "in_loops")
    lines = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    return "\n".join([*lines, *(f"| {' | '.join(str(row[name]) for name in columns)} |" for row in rows)])


def summary(rows: list[Row]) -> str:
    """Markdown, a line per GPU and kernel: how many, and the most that any of them needs."""
    lines = ["| GPU | kernel | tile | compiled | most registers | spilled bytes | most shared KiB |", "|" + "---|" * 7]
    for (gpu, kernel, tile), group in itertools.groupby(sorted(rows, key=_kind), _kind):
        same = list(group)
        most = {name: max(row[name] for row in same) for name in ("registers", "spills", "shared")}
        numbers = f"{len(same)} | {most['registers']} | {most['spills']} | {most['shared'] / 1024:.0f}"
        lines.append(f"| {gpu} | {kernel} | {tile} | {numbers} |")
    return "\n".join(lines)


def _kind(row: Row) -> tuple[str, str, str]:
    return row["gpu"], row["kernel"], row["tile"]


def main() -> int:
    """Compile, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", nargs="+", choices=("sm_80", "sm_90", "sm_100"), default=["sm_80", "sm_90"])
    blocks = [f"{topology}:{size}" for topology, size in catalogue()]
    parser.add_argument("--blocks", nargs="+", default=blocks, metavar="TOPOLOGY:SIZE", help="default: the catalogue")
    parser.add_argument(
        "--memory", nargs="+", choices=MEMORY, default=[*MEMORY], help="layouts of the tensors; default: all"
    )
    parser.add_argument("--checked", action="store_true", help="only what the tests look at")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="default: as many as cores")
    parser.add_argument("--table", action="store_true", help="print every kernel")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="write a JSON file there")
    args = parser.parse_args()
    sizes = [(name, int(size)) for name, size in (block.split(":") for block in args.blocks)]
    jobs = [(*b, m, t, p) for m in args.memory for b in sizes for t in args.targets for p in PRECISIONS]
    if args.checked:
        jobs = [job for job in checked() if job in jobs]
    rows: list[Row] = []
    with ProcessPoolExecutor(args.processes, mp_context=get_context("spawn")) as pool:
        for done, (job, measured) in enumerate(zip(jobs, pool.map(rows_of, *zip(*jobs, strict=True)), strict=True), 1):
            print(f"{done}/{len(jobs)}: {' '.join(map(str, job))}", file=sys.stderr, flush=True)
            rows += measured
    print(table(rows) if args.table else summary(rows))
    wrong = [row for row in rows if row["in_loops"] or row["spills"] > MOST_SPILLED]
    wrong += [row for row in rows if row["shared"] > LARGEST_SHARED[row["gpu"]]]
    different = len({row["digest"] for row in rows})
    print(f"\n{len(rows)} kernels, {different} of them different; {len(wrong)} spill or do not fit.")
    if wrong and not args.table:
        print("\n" + table(wrong))
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        about = {"triton": triton.__version__}
        about |= {name: value for name, value in environment().items() if name in ("date", "commit", "torch")}
        path = args.out / f"resources_{triton.__version__}.json"
        path.write_text(compact(rows, about), encoding="utf-8")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
