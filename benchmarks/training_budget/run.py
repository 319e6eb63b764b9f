"""Run ``orepa bench step``, and measure where the memory goes, with the paper's Table 4 beside it.

    python benchmarks/training_budget/run.py [options of orepa bench step]
    python benchmarks/training_budget/run.py --sweep components

Peak memory is split by what is alive at the peak. A sweep adds the branches of the block one by one, online against offline.
The file is one of ``orepa bench step`` with more facts.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from orepa.bench import tables
from orepa.bench.cli import add_step_options, check_folders, finish, require, say, step_config
from orepa.errors import UserError


def main(argv: list[str] | None = None) -> int:
    """Measure, print tables, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sweep", choices=("components",), help="branches one by one, online against offline")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw times and memory")
    add_step_options(parser)
    args = parser.parse_args(argv)
    try:
        return _run(args)
    except UserError as error:
        print(f"training_budget: error: {error}", file=sys.stderr)
        return 2


def _run(args: argparse.Namespace) -> int:
    from orepa.bench import step
    from training_budget import memory, plots
    from training_budget.components import sweep
    from training_budget.tables import memory_table, paper_table

    if args.sweep and args.variants is not None:
        raise UserError("--sweep has variants of its own; leave out --variants")
    if args.processes > 1 or args.grad_accum != [1]:
        raise UserError("memory is that of one batch in one process: leave out --processes and --grad-accum")
    require(*(("matplotlib",) if args.plot else ()))
    check_folders(args.plot)
    config = step_config(args)
    one_batch = [(case, [variant for variant in variants if not variant.once]) for case, variants in config.cases]
    config = replace(config, cases=one_batch)
    if args.sweep:
        config = replace(config, cases=[pair for case, _ in config.cases for pair in sweep(case)], timed=None)
    results = step.run(config, say, probe=memory.probe)
    if args.plot:
        plots.plot(results, args.plot)
    code = finish(results, args.out, args.plot)
    if results.timed:
        print(f"\nmemory at the peak, MB\n\n{tables.render(*memory_table(results), text=2)}")
    paper = paper_table(results)
    if paper is not None:
        print("\nthe paper's Table 4 (4 x V100, batch 256) and this run, at its largest batch; × of the first row\n")
        print(tables.render(*paper, text=2))
    return code


if __name__ == "__main__":
    sys.exit(main())
