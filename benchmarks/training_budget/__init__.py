"""Training budgets, time and memory (paper Table 4): ``python benchmarks/training_budget/run.py``."""
