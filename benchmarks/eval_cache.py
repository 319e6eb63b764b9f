"""Time the eval forward of an `OREPAConv`, kernel cached, against the plain `nn.Conv2d` that it converts to.

    python benchmarks/eval_cache.py [--rounds N] [--threads N] [--out FILE.json]

The goal is a ratio of at most 1.03 (after the first call). The convolutions are those of ResNet-18 at 224x224, one image,
and one so small that nothing but overhead is left.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from orepa import OREPAConv
from orepa.bench.machine import OtherWork, environment
from orepa.bench.results import Results, Row
from orepa.bench.tables import describe, median
from orepa.timing import function, interleaved

#: in, out, kernel, stride, groups, height of the (square) input
SHAPES = [
    (3, 64, 7, 2, 1, 224),
    (64, 64, 3, 1, 1, 56),
    (64, 128, 3, 2, 1, 56),
    (128, 128, 3, 1, 1, 28),
    (256, 256, 3, 1, 1, 14),
    (512, 512, 3, 1, 1, 7),
    (256, 64, 1, 1, 1, 56),
    (128, 128, 3, 1, 32, 56),
    (8, 8, 3, 1, 1, 8),
]


def measure(shape: tuple[int, ...], rounds: int) -> list[Row]:
    """Time one shape; the two are compared before they are timed."""
    i, o, k, stride, groups, size = shape
    conv = OREPAConv(i, o, k, stride, k // 2, groups=groups).eval()
    plain, x = conv.to_conv2d(), torch.randn(1, i, size, size)
    torch.testing.assert_close(conv(x), plain(x), rtol=1e-3, atol=1e-4)
    tasks = {"OREPAConv": function(lambda: conv(x)), "Conv2d": function(lambda: plain(x))}
    with torch.inference_mode():
        samples = interleaved(tasks, rounds)
    case = {"out": o, "in": i, "k": k, "stride": stride, "groups": groups, "size": size}
    return [Row(case, name, "eval", processes=[values]) for name, values in samples.items()]


def main() -> None:
    """Measure every shape, print a table, and write JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=200, help="samples per convolution (default: %(default)s)")
    parser.add_argument("--threads", type=int, help="default: PyTorch's choice")
    parser.add_argument("--out", type=Path, help="write the results here, as JSON")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    results = Results("eval_cache", environment(), {"rounds": arguments.rounds})
    print(f"{'convolution':24} {'OREPAConv us':>16} {'Conv2d us':>16} {'ratio':>6}")
    others = OtherWork()
    for shape in SHAPES:
        with others:
            rows = measure(shape, arguments.rounds)
        results.rows += rows
        cells = [median(row) for row in rows]
        ratio = rows[0].median_us / rows[1].median_us
        print(f"{describe(rows[0].case):24} {cells[0]:>16} {cells[1]:>16} {ratio:6.3f}")
        sys.stdout.flush()
    results.environment["busy_cores_of_others"] = others.cores
    results.complete = True
    if arguments.out:
        results.save(arguments.out)


if __name__ == "__main__":
    main()
