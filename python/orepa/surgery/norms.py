"""Tells norms from other layers."""

from __future__ import annotations

import re
from typing import TypeAlias

from torch import nn

from ..module_info import is_frozen_norm, saved_buffers

NormTypes: TypeAlias = tuple[type[nn.Module], ...]

_KNOWN = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)
#: "BatchNorm2d", "InstanceNormalization", "RMSNormAct"; not "NormalHead", "L2Norm", "LayerNormedAct"
_NAMES = re.compile(
    r"(batch|instance|group|layer|rms|filter_?response|evo|simple|switchable)_?norm(?!ed|al(?!iz))", re.I
)
_SETTINGS = {"eps", "epsilon", "variance_epsilon", "num_features", "num_channels", "normalized_shape"}


def is_norm(module: nn.Module, norm_types: NormTypes = ()) -> bool:
    """Return whether a module normalizes with statistics of its input: a batch, instance, group, layer or RMS norm.

    Torch's classes, what derives from them, and ``norm_types`` count. Another class must be called like a norm or have running
    statistics, and be built like one: with parameters, or the settings of a norm, of its own, and no layers with parameters
    except norms. Frozen batch norms do not count (`is_frozen_norm`).
    """
    if isinstance(module, (*_KNOWN, *norm_types)):
        return True
    if is_frozen_norm(module) or not (_NAMES.search(type(module).__name__) or "running_var" in saved_buffers(module)):
        return False
    if not all(is_norm(child) for child in module.children() if any(True for _ in child.parameters())):
        return False
    return any(True for _ in module.parameters()) or bool(_SETTINGS & vars(module).keys())
