"""Loads the authors' checkpoints exactly. Imports timm only for a whole model."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from torch import nn

from .modules.official_blocks import block_from_official as block_from_official


def load_official(
    source: Mapping[str, Any] | str | os.PathLike[str], arch: str, *, backend: str = "auto", online: bool = False
) -> nn.Module:
    """Load a checkpoint of the authors into the model of the same name, exactly.

    Those of OREPA go into the models here (`orepa.models`). Outputs, gradients and running statistics agree with theirs, to
    about 1e-8 relative per block in float64; see `block_from_official`. Those of the original RepVGG and MobileOne go into
    timm's network of that name, which trains offline; those of a ResNet with DBB blocks into timm's ResNet with `OfflineConv`.
    The keys tell them apart. Files are read without running code from them.

    Args:
        source: a file, or its content: a state dict with their keys, within ``{"state_dict": ...}`` or not, with the prefix
            ``module.`` or not. It is copied.
        arch: the model, as `timm.create_model` or the authors call it: ``"orepa_resnet18"``, ``"resnet18"``, ``"ResNet-18"``;
            of the originals any that timm has, such as ``"RepVGG-A0"`` and ``"mobileone_s0"``.
        backend: of every `OREPAConv`.
        online: return RepVGG, MobileOne and DBB with online blocks (as `block_from_official` does a DBB block, the others as
            `orepa.prepare` does with ``preserve=True``). The function is the same in eval mode. OREPA's models are online as
            they are.

    Returns:
        In train mode, with the dtype and on the device of the tensors (from a file: the CPU), and with as many classes.

    Raises:
        ImportError: without timm, the extra ``models``.
        OSError: the file cannot be read.
        TypeError: ``source`` is neither a file nor a mapping.
        ValueError: an unknown ``arch``, a file that is no checkpoint, or a checkpoint of something else; the message names the
            first missing and unexpected keys and, where a tensor has another shape, both shapes.
    """
    from .models import checkpoints

    return checkpoints.load_official(source, arch, backend=backend, online=online)
