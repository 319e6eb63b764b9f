"""Benchmarks: ``orepa bench``. They compare everything that a user could pick, in one run.

Candidates are checked (`orepa.bench.check`), then timed in turns (`orepa.bench.runner`, `orepa.timing`), squeezes in several
processes (`orepa.bench.processes`). Raw samples go into one JSON file (`orepa.bench.results`), which tables and plots read.
"""
