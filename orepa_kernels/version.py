"""The version of the distribution, read from here at build time without importing torch."""

__version__ = "0.1.0"
