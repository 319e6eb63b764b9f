"""The options of ``orepa bench step``. Imports nothing heavy: the command does, when it runs."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..errors import UserError
from .options import check_folders, count, names, require, seconds


def add_command(commands: Any) -> None:
    """Add ``step`` to the commands of ``orepa bench``."""
    parser = commands.add_parser(
        "step",
        help="a whole training step: time, and where the memory goes",
        description="Time forward, loss, backward and SGD of whole models: plain, with OREPA on every backend that runs here, "
        "compiled, and with DBB and RepVGG blocks trained offline. Contestants with the same weights must give the same "
        "logits and gradients; one that does not is reported and not timed. Compilation is never timed. Peak memory is "
        "split by what is alive at the peak.",
    )
    parser.set_defaults(run=_run)
    what = parser.add_argument_group("what")
    what.add_argument("--models", default="resnet18", metavar="NAMES", help="timm's names (default: resnet18)")
    what.add_argument("--batch-sizes", metavar="LIST", help="default: 8 on the CPU, 64,256 on CUDA")
    what.add_argument("--img-size", type=count, metavar="PX", help="default: 64 on the CPU, 224 on CUDA")
    what.add_argument("--contestants", metavar="LIST", help="default: all; a list of nothing shows them")
    what.add_argument("--sweep", choices=("components",), help="branches one by one, online against offline")

    how = parser.add_argument_group("how")
    how.add_argument("--autocast", choices=("none", "bf16", "fp16"), default="none", help="default: none")
    how.add_argument("--channels-last", action="store_true", help="memory format of model and images")
    how.add_argument(
        "--cuda-graph", choices=("off", "on", "both"), help="the step as a CUDA graph (default: both, on CUDA)"
    )
    how.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: cuda, or else cpu")
    how.add_argument("--threads", type=count, metavar="N", help="of the CPU (default: PyTorch's choice)")
    how.add_argument("--rounds", type=count, default=20, metavar="N", help="samples of each at most (default: 20)")
    how.add_argument(
        "--seconds", type=seconds, default=60.0, metavar="X", help="of timing; all else comes on top (default: 60)"
    )

    files = parser.add_argument_group("files")
    files.add_argument("--out", type=Path, metavar="FILE.json", help="results with raw samples, written as they come")
    files.add_argument("--plot", type=Path, metavar="FILE.png", help="times and memory")


def _run(args: argparse.Namespace) -> int:
    require("rich", "timm", *(("matplotlib",) if args.plot else ()), extras="bench,models")
    import torch

    from . import step, step_tables, tables
    from .contestants import choose, everyone
    from .step_sweep import sweep

    check_folders(args.out, args.plot)
    everybody = everyone()
    asked = list(everybody) if args.contestants is None else names(args.contestants)
    if not asked or any(name not in everybody for name in asked):
        raise UserError(f"--contestants must be among {', '.join(everybody)}, got {args.contestants!r}")
    if args.sweep and args.contestants is not None:
        raise UserError("--sweep has contestants of its own; leave out --contestants")
    if args.threads:
        torch.set_num_threads(args.threads)
    device = ("cuda" if torch.cuda.is_available() else "cpu") if args.device == "auto" else args.device
    batches = names(args.batch_sizes or {"cpu": "8", "cuda": "64,256"}[device])
    if not all(b.isdecimal() and int(b) > 1 for b in batches):
        raise UserError(f"--batch-sizes must be whole numbers from 2 on, got {args.batch_sizes!r}")
    size = args.img_size or {"cpu": 64, "cuda": 224}[device]
    layout = "channels_last" if args.channels_last else "contiguous"
    cases = [
        step.Case(model, int(batch), size, args.autocast, layout, device)
        for model in names(args.models)
        for batch in batches
    ]
    if not cases:
        raise UserError("--models and --batch-sizes must name at least one of each")
    chosen = choose(asked, everybody)
    planned = [p for c in cases for p in (sweep(c) if args.sweep else [(c, chosen)])]
    graphs = args.cuda_graph or ("both" if device == "cuda" else "off")
    launches = {"on": ("graph",), "off": ("plain",), "both": ("graph", "plain")}[graphs]
    request = step.Request(planned, launches, args.rounds, args.seconds, args.out)
    settings = {k: v for k, v in vars(args).items() if isinstance(v, (str, int, float, bool)) and k != "command"}
    with tables.progress(len(planned)) as bar:
        results = step.run(request, settings, bar)
    step_tables.show(results)
    if args.plot:
        from .step_plots import plot

        plot(results, args.plot)
    for path in filter(None, (args.out, args.plot)):
        print(f"written to {path}")
    return 1 if any(row.status == "wrong" for row in results.rows) else 0
