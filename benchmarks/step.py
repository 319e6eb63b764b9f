"""``orepa bench step`` as a script: see ``python benchmarks/step.py --help``."""

import sys

from orepa.cli import main

if __name__ == "__main__":
    sys.exit(main(["bench", "step", *sys.argv[1:]]))
