"""Modules: the linear block, `OREPAConv` with its cache, offline blocks, the RepVGG block."""

from .orepa_conv import OREPAConv, default_topology

__all__ = ["OREPAConv", "default_topology"]
