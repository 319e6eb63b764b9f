"""The backends: who can squeeze what, where, and why not. `orepa_kernels.dispatch` chooses among them."""
