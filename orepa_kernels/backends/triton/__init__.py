"""The Triton backend: one kernel forward, two backward, for any number of blocks, on NVIDIA, AMD and Intel GPUs.

Triton itself is imported at the first use, not with this package.
"""

from .backend import TritonBackend

__all__ = ["TritonBackend"]
