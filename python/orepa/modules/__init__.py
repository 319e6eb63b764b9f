"""Modules: the linear block, `OREPAConv` and what it caches, offline blocks, the RepVGG block."""

from .orepa_conv import OREPAConv, default_topology

__all__ = ["OREPAConv", "default_topology"]
