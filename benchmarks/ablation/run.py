"""Tables 1 to 3 of the paper on scikit-learn's digits: plain, offline DBB, online, its components, its scalings, no norm.

    python benchmarks/ablation/run.py --out runs/ablation.json --plot runs/ablation.png
    python benchmarks/ablation/run.py --quick

Net, data and recipe are those of ``orepa train`` (but see `ablation.training.NET_ARGUMENTS`). By default it learns from 100
images only, drawn anew by every seed, and is tested on all others: with all of them, everything is right 99 times in 100.
A file that holds some of the runs already is continued: killed, it loses only the run in progress; with more ``--seeds`` or
other ``--rows`` it does only what is missing.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from orepa.bench.cli import check_folders, names, require
from orepa.errors import UserError
from orepa.train.config import int_at_least
from orepa.train.runtime import Stopped


def main(argv: list[str] | None = None) -> int:
    """Train, print the tables, and write what was asked for; returns the exit code."""
    return command("ablation", lambda: _run(_parser().parse_args(argv)))


def command(name: str, run: Callable[[], int]) -> int:
    """Run an experiment that is continued; return the exit code, and tell errors and signals in one line."""
    try:
        return run()
    except UserError as error:
        print(f"{name}: error: {error}", file=sys.stderr)
        return 2
    except Stopped as stopped:
        print(f"{name}: stopped; the same command goes on with the run that it was in", file=sys.stderr)
        return 128 + stopped.number


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", metavar="LIST", help="default: all; a list of nothing shows them")
    parser.add_argument("--seeds", type=int_at_least(1), metavar="N", help="runs of each row (default: 5)")
    parser.add_argument("--epochs", type=int_at_least(1), metavar="N", help="default: that of `orepa train`")
    parser.add_argument("--train-images", metavar="N", help="to learn from, or `all` (default: 100)")
    parser.add_argument("--threads", type=int_at_least(1), default=1, metavar="N", help="default: 1")
    parser.add_argument("--rounds", type=int, metavar="N", help="samples of each step time, 0 for none (default: 20)")
    parser.add_argument(
        "--quick", action="store_true", help="does it run? one seed, one epoch, 64 images; what else is given counts"
    )
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="written after every run, and continued")
    parser.add_argument("--overwrite", action="store_true", help="start --out anew")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="accuracies, and differences to the plain net")
    return parser


def _run(args: argparse.Namespace) -> int:
    require("lightning", "timm", "sklearn", "matplotlib", extras="train")
    from ablation import training
    from ablation.models import variants
    from ablation.tables import markdown

    check_folders(args.out, args.plot)
    images = args.train_images or ("30" if args.quick else "100")
    if images != "all" and not images.isdecimal():
        raise UserError(f"--train-images must be a number or `all`, got {images!r}")
    rounds = args.rounds if args.rounds is not None else (1 if args.quick else 20)
    if rounds < 0:
        raise UserError(f"--rounds must be 0 or more, got {rounds}")
    config = training.AblationConfig(
        rows=tuple(variants() if args.rows is None else names(args.rows)),
        seeds=args.seeds or (1 if args.quick else 5),
        train_images=None if images == "all" else int(images),
        epochs=args.epochs or (1 if args.quick else None),
        threads=args.threads,
        rounds=rounds,
        limit=64 if args.quick else None,
        out=args.out,
        overwrite=args.overwrite,
    )
    results = training.run(config, lambda line: print(line, flush=True))
    print(f"\n{markdown(results)}")
    if args.plot:
        from ablation.plots import plot

        plot(results, args.plot)
    for path in filter(None, (args.out, args.plot)):
        print(f"written to {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
