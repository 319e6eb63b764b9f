"""Eval forward of an `OREPAConv`, kernel kept, against the plain `nn.Conv2d` that it converts to.

    python benchmarks/eval_cache.py [--rounds N] [--out FILE.json]

The mark is a ratio of at most 1.05 (after the first call). The convolutions are those of ResNet-18 at 224x224, one image,
and one so small that nothing but overhead is left.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from timing import environment, interleaved, summary

from orepa import OREPAConv

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


def measure(shape: tuple[int, ...], rounds: int) -> dict[str, object]:
    """Time one shape; the two are compared before they are timed."""
    i, o, k, stride, groups, size = shape
    conv = OREPAConv(i, o, k, stride, k // 2, groups=groups).eval()
    plain, x = conv.to_conv2d(), torch.randn(1, i, size, size)
    torch.testing.assert_close(conv(x), plain(x), rtol=1e-3, atol=1e-4)
    with torch.inference_mode():
        samples = interleaved({"orepa": lambda: conv(x), "conv2d": lambda: plain(x)}, rounds)
    result = {name: summary(values) for name, values in samples.items()}
    ratio = result["orepa"]["median_us"] / result["conv2d"]["median_us"]
    return {
        "shape": {"in": i, "out": o, "k": k, "stride": stride, "groups": groups, "size": size},
        **result,
        "ratio": ratio,
    }


def main() -> None:
    """Measure every shape, print a table, and write JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=200, help="samples per convolution (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="write the results here, as JSON")
    arguments = parser.parse_args()
    rows = []
    print(f"{'convolution':34} {'OREPAConv us (p20-p80)':>28} {'Conv2d us (p20-p80)':>28} {'ratio':>6}")
    for shape in SHAPES:
        row = measure(shape, arguments.rounds)
        rows.append(row)
        cells = ["{median_us:.0f} ({p20_us:.0f}-{p80_us:.0f})".format(**row[name]) for name in ("orepa", "conv2d")]
        name = "{in}->{out} {k}x{k} s{stride} g{groups} @{size}".format(**row["shape"])
        print(f"{name:34} {cells[0]:>28} {cells[1]:>28} {row['ratio']:6.3f}")
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(
            json.dumps({"benchmark": "eval_cache", "environment": environment(), "rows": rows}, indent=1)
        )


if __name__ == "__main__":
    main()
