"""Do re-parameterised nets learn as well online? ``python benchmarks/reparam_accuracy/run.py``."""
