"""`ConvNorm`: an online block and the one norm after its sum, which stand for branches with a norm each."""

from __future__ import annotations

from collections import OrderedDict

from torch import nn


class ConvNorm(nn.Sequential):
    """What an offline block or a region of branches becomes online (paper section 3.2).

    Args:
        conv: an `OREPAConv` without a bias; it is called ``conv``, as in ``model.stem.conv``.
        norm: a batch norm, called ``norm``.
    """

    def __init__(self, conv: nn.Module, norm: nn.Module) -> None:
        super().__init__(OrderedDict(conv=conv, norm=norm))
