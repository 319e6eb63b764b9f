"""Changes to models: prepare, convert, prune, and how they find what feeds what."""
