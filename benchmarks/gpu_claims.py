"""Holds a GPU against the claims of ``benchmarks/sass_audit.py``: one line per claim, confirmed or not.

    python benchmarks/gpu_claims.py                        times, then counters where ncu is and may be used
    python benchmarks/gpu_claims.py --once triton fp32     what ncu watches: one squeeze forward and backward

A bound is confirmed where no measured time is below it; how far above tells what else the kernels wait for. Which of the two
backends is faster should be the one with the lower bound.
"""

from __future__ import annotations

import argparse
import csv
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from sass_audit import CHANNELS, PATHS, RESULTS

from orepa.bench.problem import Problem, Shape, SqueezeCase
from orepa_kernels import squeeze
from orepa_kernels.dispatch import names_on

#: the paths of the audit that are measured, those in channels_last, with the kernel's dtype
DTYPES = {path: dtype for path, (dtype, contiguous, _) in PATHS.items() if not contiguous}
#: of ncu, with the words for them
METRICS = {
    "smsp__issue_active.avg.pct_of_peak_sustained_active": "% of cycles issue",
    "smsp__average_warps_issue_stalled_long_scoreboard_per_issue_active.ratio": "warps wait for memory per issue",
    "launch__occupancy_limit_registers": "blocks per SM by registers",
    "launch__occupancy_limit_shared_mem": "by shared memory",
    "launch__registers_per_thread": "registers",
    "smsp__inst_executed_op_local_ld.sum": "local loads",
}

Row = dict[str, Any]


def calls(backend: str, path: str, channels: int) -> dict[str, Any]:
    """Return what runs the forward, and the backward, of a 3x3 block in channels_last on the GPU."""
    case = SqueezeCase(Shape(channels, channels, 3), "orepa", DTYPES[path], "cuda")
    problem = Problem(case)
    layout = torch.channels_last
    operands = [t.detach().to(memory_format=layout) if t.dim() == 4 else t.detach() for t in problem.operands.values()]
    leaves = [
        t.requires_grad_(name not in problem.constants) for name, t in zip(problem.operands, operands, strict=True)
    ]
    run = partial(squeeze, [problem.plan], [leaves], dtype=problem.out_dtype, memory_format=layout, backend=backend)
    (kernel,) = run()
    gradient, wanted = problem.grad.to(memory_format=layout), [t for t in leaves if t.requires_grad]
    return {"forward": run, "backward": partial(torch.autograd.grad, kernel, wanted, gradient, retain_graph=True)}


def times(backends: list[str]) -> Iterator[Row]:
    """Yield microseconds of the GPU, its cache cleared before each run, as Triton's `do_bench` measures them."""
    from triton.testing import do_bench

    torch.set_float32_matmul_precision("highest")
    for path in DTYPES:
        for channels in CHANNELS:
            for backend in backends:
                for mode, call in calls(backend, path, channels).items():
                    microseconds = 1e3 * float(do_bench(call, warmup=10, rep=50, return_mode="median"))
                    what = f"3x3, {channels} channels"
                    yield {"path": path, "what": what, "mode": mode, "provider": backend, "us": microseconds}


def verdicts(measured: list[Row], bounds: list[Row]) -> list[str]:
    """Return a line per time and bound, then whether the faster backend is the one with the lower bounds."""
    names = ("path", "what", "mode")
    claims = {tuple(row[name] for name in names): row for row in bounds}
    lines, sums = [], {}
    for row in measured:
        claim = claims.get(tuple(row[name] for name in names), {})
        if row["provider"] not in claim:
            continue
        bound = max(claim[name] for name in (row["provider"], "tensor"))
        total = sums.setdefault(row["provider"], [0.0, 0.0])
        total[0] += row["us"]
        total[1] += bound
        word = "confirmed" if row["us"] >= 0.95 * bound else "REFUTED"
        about = f"{row['provider']} {row['path']} {row['what']} {row['mode']}"
        lines.append(f"{word}: {about}: {row['us']:.1f} us, bound {bound:.1f}, memory {claim['floor']:.1f}")
    if {"cuda", "triton"} <= sums.keys():
        faster, lower = (min(("cuda", "triton"), key=lambda name: sums[name][n]) for n in (0, 1))
        lines.append(
            f"{'confirmed' if faster == lower else 'REFUTED'}: {lower} has the lower bounds, {faster} is faster"
        )
    return lines


def counters(text: str) -> list[str]:
    """Return a line per kernel of ncu's CSV, raw page: what it counted in words."""
    table = list(csv.reader(line for line in text.splitlines() if line.startswith('"')))
    if len(table) < 3:
        return []
    head, _, *rows = table  # the second line has the units
    lines = []
    for row in rows:
        values = dict(zip(head, row, strict=False))
        found = [f"{words} {values[name]}" for name, words in METRICS.items() if values.get(name)]
        lines.append(f"{values.get('Kernel Name', '?')[:40]}: {', '.join(found)}")
    return lines


def main(argv: list[str] | None = None) -> int:
    """Print the claims; return 1 where one is refuted, 0 also where there is no GPU."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--once", nargs=2, metavar=("BACKEND", "PATH"), help="run one block of 512 channels")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("no GPU: nothing to compare")
        return 0
    if args.once:
        for call in calls(*args.once, 512).values():
            call()
        torch.cuda.synchronize()
        return 0
    audit = json.loads(RESULTS.read_text(encoding="utf-8"))
    gpu = "sm_{}{}".format(*torch.cuda.get_device_capability())
    backends = [name for name in names_on(torch.device("cuda")) if name in ("cuda", "triton")]
    lines = verdicts([*times(backends)], [row for row in audit["bounds"] if row["gpu"] == gpu])
    print("\n".join(lines) or f"the audit has no bounds for {gpu}", flush=True)
    ncu = shutil.which("ncu")
    for backend, path in [(b, p) for b in backends for p in DTYPES] if ncu else ():
        command = [ncu, "--csv", "--page", "raw", "--metrics", ",".join(METRICS), "--kernel-name", "regex:squeeze"]
        done = subprocess.run(
            [*command, sys.executable, __file__, "--once", backend, path], capture_output=True, text=True, timeout=120
        )
        print("\n".join(f"{path} {line}" for line in counters(done.stdout)) or f"ncu: {done.stdout[-200:]}", flush=True)
    return int(any(line.startswith("REFUTED") for line in lines))


if __name__ == "__main__":
    raise SystemExit(main())
