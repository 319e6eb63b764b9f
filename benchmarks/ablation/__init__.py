"""Tables 1 to 3 of the paper on scikit-learn's digits: ``python benchmarks/ablation/run.py``."""
