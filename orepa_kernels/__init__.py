"""The squeeze of Online Convolutional Re-parameterization (OREPA, CVPR 2022), standing alone.

Squeezing turns a linear block of many branches and layers into one convolution kernel, at every training step::

    block = Block(64, 32, (3, 3), (
        Dense(Operand("origin", (64, 32, 3, 3)), scale=0),
        PointwiseFilter(Operand("avg", (64, 32, 1, 1)), Average((3, 3)), scale=1),
    ), scales=Operand("scales", (2, 64)))
    (weight,) = squeeze([block], [[origin, avg, scales]])
"""

from . import ops as ops  # registers the operators
from .api import DTYPES, squeeze
from .backends.base import BackendError, Support
from .dispatch import backends
from .guards import autocast_dtype
from .plan import IMPULSE, Average, Block, Composed, Dense, Operand, PointwiseFilter, Separable, Term
from .version import __version__

__all__ = [
    "DTYPES",
    "IMPULSE",
    "Average",
    "BackendError",
    "Block",
    "Composed",
    "Dense",
    "Operand",
    "PointwiseFilter",
    "Separable",
    "Support",
    "Term",
    "__version__",
    "autocast_dtype",
    "backends",
    "squeeze",
]
