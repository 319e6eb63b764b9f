"""Changes models: prepare, convert, prune, and the analysis of the graph that they rely on."""
