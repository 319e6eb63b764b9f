"""Fixed filters of the catalogue's blocks, as functions ``(channels, (kh, kw)) -> [channels or 1, kh, kw]`` in float64."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .language import Size


def frequency_prior(channels: int, kernel_size: Size) -> Tensor:
    """Return the frequency prior filters of the authors' release, for every kernel size (paper section 3.5).

    Channel ``i`` of the first half holds ``cos(pi (h+1/2) (i+1) / kh)``, of the second the same along the width. It
    repeats over channels and holds all-zero filters; `dct2d_prior` does not.

    Returns:
        ``[channels, kh, kw]``, float64.
    """
    kh, kw = kernel_size
    half = channels / 2
    i = torch.arange(channels, dtype=torch.float64)
    h = torch.arange(kh, dtype=torch.float64)
    w = torch.arange(kw, dtype=torch.float64)
    rows = torch.cos(math.pi / kh * (h + 0.5) * (i + 1)[:, None])[:, :, None].expand(-1, -1, kw)
    columns = torch.cos(math.pi / kw * (w + 0.5) * (i + 1 - half)[:, None])[:, None, :].expand(-1, kh, -1)
    return torch.where((i < half)[:, None, None], rows, columns).contiguous()


def dct2d_prior(channels: int, kernel_size: Size) -> Tensor:
    """Return distinct 2-D DCT-II bases, cycled over channels, lowest frequencies first.

    Returns:
        ``[channels, kh, kw]``, float64.
    """
    kh, kw = kernel_size
    h = torch.arange(kh, dtype=torch.float64)
    w = torch.arange(kw, dtype=torch.float64)
    frequencies = sorted(((u, v) for u in range(kh) for v in range(kw)), key=lambda f: (f[0] + f[1], f))
    bases = [
        torch.cos(math.pi / kh * (h + 0.5) * u)[:, None] * torch.cos(math.pi / kw * (w + 0.5) * v)[None, :]
        for u, v in frequencies
    ]
    return torch.stack([bases[c % len(bases)] for c in range(channels)])


_SOBEL_X = ((1.0, 0.0, -1.0), (2.0, 0.0, -2.0), (1.0, 0.0, -1.0))
_LAPLACIAN = ((0.0, 1.0, 0.0), (1.0, -4.0, 1.0), (0.0, 1.0, 0.0))


def sobel_x(channels: int, kernel_size: Size) -> Tensor:
    """Return the horizontal Sobel filter, ``[1, 3, 3]``."""
    return torch.tensor([_SOBEL_X], dtype=torch.float64)


def sobel_y(channels: int, kernel_size: Size) -> Tensor:
    """Return the vertical Sobel filter, ``[1, 3, 3]``."""
    return sobel_x(channels, kernel_size).mT


def laplacian(channels: int, kernel_size: Size) -> Tensor:
    """Return the Laplacian filter, ``[1, 3, 3]``."""
    return torch.tensor([_LAPLACIAN], dtype=torch.float64)
