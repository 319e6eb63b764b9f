"""Benchmarks: ``orepa bench``. They compare everything that a user could pick, in one run.

Candidates are checked (`orepa.bench.check`), then timed in turns (`orepa.bench.runner`, `orepa.timing`). Raw samples go into
one JSON file (`orepa.bench.results`), which tables read.
"""
