"""OREPA: train re-parameterised networks at almost the price of the plain ones (CVPR 2022)."""

from orepa_kernels import __version__

from . import catalogue as catalogue
from .conv import OREPAConv
from .topology import Topology, register_topology, topologies

__all__ = ["OREPAConv", "Topology", "__version__", "register_topology", "topologies"]
