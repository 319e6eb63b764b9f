"""Benchmarks: ``orepa bench``. Everything measured beside everything that a user could pick instead.

A *provider* (`orepa.bench.providers`) computes a *workload* (`orepa.bench.workload`), is first held against the float64
reference (`orepa.bench.check`), then timed in turns with the others (`orepa.timing`), squeezes in several processes
(`orepa.bench.processes`); what was measured goes with its raw samples into one JSON file (`orepa.bench.results`), which
tables, plots and comparisons read.
"""
