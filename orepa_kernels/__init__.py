"""The squeeze of Online Convolutional Re-parameterization (OREPA, CVPR 2022), standing alone.

Squeezing turns a linear block of many branches and layers into one convolution kernel, at every training step::

    block = Block(64, 32, (3, 3), (
        Dense(Operand("origin", (64, 32, 3, 3)), scale=0),
        PointwiseFilter(Operand("avg", (64, 32, 1, 1)), Average((3, 3)), scale=1),
    ), scales=Operand("scales", (2, 64)))
    (weight,) = squeeze([block], [[origin, avg, scales]])
"""

from . import ops as ops
from .api import DTYPES, squeeze
from .autocast import autocast_dtype
from .backends.base import BackendError, Verdict
from .dispatch import backends
from .plan import IMPULSE, Average, Block, Composed, Dense, Operand, PointwiseFilter, Separable, Term

__version__ = "0.1.0"

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
    "Term",
    "Verdict",
    "__version__",
    "autocast_dtype",
    "backends",
    "squeeze",
]
