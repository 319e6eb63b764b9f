"""``orepa bench squeeze`` as a script: see ``python benchmarks/squeeze.py --help``."""

import sys

from orepa.cli import main

if __name__ == "__main__":
    sys.exit(main(["bench", "squeeze", *sys.argv[1:]]))
