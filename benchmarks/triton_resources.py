"""What the Triton kernels need of a GPU: registers, spills and shared memory of every tile, compiled ahead of time.

    python benchmarks/triton_resources.py --targets sm_80 sm_90 --blocks orepa:3 rep1x1:1

Needs Triton, no GPU. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from triton_aot import TARGETS, kernels_of, structures


def main() -> None:
    """Compile and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=["sm_80", "sm_90"])
    parser.add_argument("--blocks", nargs="+", default=["orepa:3", "rep1x1:1"], help="topology:kernel size")
    parser.add_argument("--precisions", nargs="+", default=["tf32x3", "tf32"])
    args = parser.parse_args()
    print("| block | GPU | precision | kernel | tile | registers | spilled bytes | shared KiB |")
    print("|---|---|---|---|---|---|---|---|")
    for name in args.blocks:
        topology, size = name.split(":")
        for forward, backward in structures(topology, int(size)):
            for target in args.targets:
                for precision in args.precisions:
                    for kernel, tile, need in kernels_of(forward, backward, target, precision):
                        text = " ".join(f"{key}={value}" for key, value in tile.items() if key != "enable_fp_fusion")
                        row = (
                            name,
                            target,
                            precision,
                            kernel,
                            text,
                            need.registers,
                            need.spills,
                            f"{need.shared / 1024:.0f}",
                        )
                        print("|", " | ".join(map(str, row)), "|", flush=True)


if __name__ == "__main__":
    main()
