"""Declares the blocks of the field in the language of `orepa.topology`.

The OREPA blocks start from the values of the authors' released models. The others (DBB, RepVGG, ACNet, ...) are declared
as published, with their branch-wise norms; a linear block trains without them, each branch scaled by a vector, mostly of ones.

For white noise of unit variance, `nn.Conv2d` starts with an output variance of 1/3. Every block starts within a factor of 3 of
its standard deviation, but for `orepa` in the shapes that the authors released: it keeps their values, 3.3 times as large.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial

from .filters import dct2d_prior, frequency_prior, laplacian, sobel_x, sobel_y
from .language import (
    AvgPool,
    Branch,
    Constant,
    Conv,
    ConvSpec,
    Depthwise,
    Eye,
    Filter,
    Identity,
    Kaiming,
    Nested,
    Norm,
    Size,
    TapEye,
    Topology,
    register_topology,
)

PRIORS = {"paper": frequency_prior, "dct2d": dct2d_prior}
DEFAULT_KAIMING = Kaiming(math.sqrt(5))  # as nn.Conv2d starts: variance 1/3
# The standard deviation after an `orepa` block of the authors' values, its small average branch aside: Kaiming(0.0) doubles
# the variance, twice in the depthwise separable branch, and the scales are those of origin, 1x1-kxk, 1x1, dws.
_OREPA_STD = math.sqrt(2 * (0.25**2 + 0.5**2 + 1.0**2) + 4 * 0.5**2)


def _dense_branches(spec: ConvSpec, prior: str, expand: int, init: Kaiming) -> dict[str, Branch]:
    """Return the branches that the ResNet and the VGG block of the paper share."""
    if prior not in PRIORS:
        raise ValueError(f"prior must be one of {', '.join(PRIORS)}, got {prior!r}")
    k = spec.kernel_size
    # Few channels per group leave the sequence little room: the authors double its width beyond four groups.
    internal = spec.in_channels if spec.groups <= 4 else 2 * spec.in_channels
    return {
        "origin": Branch(Conv(k, init=init), scale=0.25),
        "avg": Branch(Conv(1, init=init), AvgPool(k), scale=0.25),
        "prior": Branch(Conv(1, init=init), Filter(PRIORS[prior], k), scale=0.0),
        "conv1x1_kxk": Branch(Conv(1, internal, identity=True, init=Constant(0.0)), Conv(k, init=init), scale=0.5),
        "dws": Branch(Depthwise(k, expand, init), Conv(1, init=init), scale=0.5),
    }


@register_topology("orepa")
def orepa(spec: ConvSpec, prior: str = "paper", expand: int = 8) -> Topology:
    """The OREPA-ResNet block (paper section 3.5, Fig. 6): origin, avg, prior, 1x1-kxk, 1x1, depthwise separable.

    Args:
        spec: a convolution with odd kernel sizes.
        prior: ``"paper"``, the authors' frequency filters, or ``"dct2d"``, distinct 2-D DCT bases.
        expand: expansion of the depthwise separable branch.
    """
    # The authors' models have dense and grouped 3x3 convolutions; others start each branch as nn.Conv2d does.
    depthwise = 1 < spec.groups == spec.in_channels
    released = spec.kernel_size == (3, 3) and not depthwise
    return _orepa(spec, prior, expand, Kaiming(0.0) if released else DEFAULT_KAIMING)


def _orepa(spec: ConvSpec, prior: str, expand: int, init: Kaiming) -> Topology:
    branches = _dense_branches(spec, prior, expand, init)
    dws = branches.pop("dws")
    return Topology(**branches, conv1x1=Branch(Conv(1, init=init), scale=1.0), dws=dws)


@register_topology("repvgg_dense")
def repvgg_dense(spec: ConvSpec, prior: str = "paper", expand: int = 8) -> Topology:
    """The kxk branch of an OREPA-VGG block (paper section 4.5): `orepa` without its 1x1. Takes even kernel sizes too."""
    return Topology(**_dense_branches(spec, prior, expand, Kaiming(1.0)))


@register_topology("rep1x1")
def rep1x1(spec: ConvSpec) -> Topology:
    """Rep-1x1 (paper section 3.5): a 1x1 convolution plus two in sequence, the square one starting from the identity."""
    init = Kaiming(1.0)
    if spec.out_channels > spec.in_channels:
        sequence = (Conv(1, spec.in_channels, init=Eye()), Conv(1, init=init))
    else:
        sequence = (Conv(1, init=init), Conv(1, init=Eye()))
    return Topology(origin=Branch(Conv(1, init=init), scale=1.0), conv1x1_1x1=Branch(*sequence, scale=0.5))


def _stack(kernel_size: Size) -> list[Size]:
    """Split a kernel size into sizes of at most 3 that compose to it: (3, 7) gives (3, 3), (1, 3), (1, 3)."""
    for size in kernel_size:
        if size % 2 == 0:
            raise ValueError(f"a stack of 3x3 convolutions needs odd kernel sizes, got {kernel_size}")
    height, width = ((size - 1) // 2 for size in kernel_size)
    return [(3 if i < height else 1, 3 if i < width else 1) for i in range(max(height, width, 1))]


def _stage_variance(stages: int) -> float:
    """Return the variance after one of so many equal stages that start, in sequence, with the variance of `nn.Conv2d`."""
    return (1 / 3) ** (1 / stages)


def _stage_init(spec: ConvSpec, stages: int) -> Kaiming:
    # Deviations of the stages multiply as well. Only several channels per group average them out.
    exact = stages > 1 and spec.out_channels == spec.groups
    return Kaiming(math.sqrt(2 / _stage_variance(stages) - 1), exact)


@register_topology("deep_stem")
def deep_stem(spec: ConvSpec, prior: str = "paper", expand: int = 8) -> Topology:
    """Linear deep stem (paper section 3.5): a large kernel as a stack of 3x3 `orepa` blocks of the block's width.

    The weights are the authors', the scales smaller. So a stem starts as theirs up to a factor, which the norm after it takes
    out. Theirs has 12 times the standard deviation of `nn.Conv2d` at 7x7, and would have 28,000 times at 31x31.
    """
    sizes = _stack(spec.kernel_size)
    init = replace(_stage_init(spec, len(sizes)), a=0.0)
    gain = math.sqrt(_stage_variance(len(sizes))) / _OREPA_STD
    stage = partial(_stem_stage, prior=prior, expand=expand, init=init, gain=gain)
    return Topology(stack=Branch(*(Nested(stage, k) for k in sizes), scale=None))


def _stem_stage(spec: ConvSpec, prior: str, expand: int, init: Kaiming, gain: float) -> Topology:
    branches = _orepa(spec, prior, expand, init)
    return Topology(**{name: Branch(*b.layers, scale=b.scale and gain * b.scale) for name, b in branches})


@register_topology("plain_stem")
def plain_stem(spec: ConvSpec) -> Topology:
    """The deep stem without branches: a large kernel as a stack of bare 3x3 ones."""
    sizes = _stack(spec.kernel_size)
    init = _stage_init(spec, len(sizes))
    return Topology(stack=Branch(*(Conv(k, init=init) for k in sizes), scale=None))


# --- blocks of other papers ---------------------------------------------------------------------------------------------


@register_topology("plain")
def plain(spec: ConvSpec) -> Topology:
    """One convolution, no scaling: what `nn.Conv2d` computes. The baseline of ablations."""
    return Topology(origin=Branch(Conv(spec.kernel_size, init=DEFAULT_KAIMING), scale=None))


@register_topology("dbb")
def dbb(spec: ConvSpec) -> Topology:
    """Diverse Branch Block (Ding et al., CVPR 2021): kxk, 1x1, 1x1-kxk, 1x1-average."""
    k, init = spec.kernel_size, DEFAULT_KAIMING
    return Topology(
        origin=Branch(Conv(k, init=init), Norm()),
        avg=Branch(Conv(1, init=init), Norm(), AvgPool(k), Norm()),
        conv1x1=Branch(Conv(1, init=init), Norm()),
        conv1x1_kxk=Branch(
            Conv(1, spec.in_channels, identity=True, init=Constant(0.0)), Norm(), Conv(k, init=init), Norm()
        ),
    )


@register_topology("repvgg")
def repvgg(spec: ConvSpec) -> Topology:
    """RepVGG (Ding et al., CVPR 2021), all branches in one kernel: kxk, 1x1, identity where the shape allows it."""
    return mobileone(spec, branches=1)


@register_topology("mobileone")
def mobileone(spec: ConvSpec, branches: int = 4) -> Topology:
    """MobileOne (Vasu et al., CVPR 2023): several kxk branches, a 1x1, and the identity where the shape allows it."""
    k, init = spec.kernel_size, DEFAULT_KAIMING
    square = Branch(Conv(k, init=init), Norm(), scale=branches**-0.5)  # together, they start like one
    parts = {f"conv{i + 1}" if branches > 1 else "origin": square for i in range(branches)}
    if k != (1, 1):
        parts["conv1x1"] = Branch(Conv(1, init=init), Norm())
    if spec.keeps_shape:
        parts["identity"] = Branch(Identity(), Norm(), scale=3**-0.5)  # no louder than a convolution, as behind norms
    return Topology(**parts)


@register_topology("acnet")
def acnet(spec: ConvSpec) -> Topology:
    """Asymmetric Convolution Block (Ding et al., ICCV 2019): kxk, kx1, 1xk."""
    (kh, kw), init = spec.kernel_size, DEFAULT_KAIMING
    return Topology(
        origin=Branch(Conv((kh, kw), init=init), Norm()),
        vertical=Branch(Conv((kh, 1), init=init), Norm()),
        horizontal=Branch(Conv((1, kw), init=init), Norm()),
    )


@register_topology("expandnet")
def expandnet(spec: ConvSpec, expand: int = 4) -> Topology:
    """ExpandNet-CL (Guo et al., NeurIPS 2020): 1x1 to ``expand`` times the channels, kxk, 1x1 back."""
    wide_in, wide_out, init = expand * spec.in_channels, expand * spec.out_channels, _stage_init(spec, 3)
    layers = (Conv(1, wide_in, init=init), Conv(spec.kernel_size, wide_out, init=init), Conv(1, init=init))
    return Topology(sequence=Branch(*layers, scale=None))


@register_topology("expandnet_ck")
def expandnet_ck(spec: ConvSpec, expand: int = 4) -> Topology:
    """ExpandNet-CK (Guo et al., NeurIPS 2020): a kxk kernel as a stack of wide 3x3 ones."""
    sizes = _stack(spec.kernel_size)
    widths = [expand * spec.out_channels] * (len(sizes) - 1) + [spec.out_channels]
    init = _stage_init(spec, len(sizes))
    layers = (Conv(k, width, init=init) for k, width in zip(sizes, widths, strict=True))
    return Topology(sequence=Branch(*layers, scale=None))


@register_topology("doconv")
def doconv(spec: ConvSpec, multiplier: int | None = None) -> Topology:
    """DO-Conv (Cao et al., 2020): ``K[o,i,:] = sum_d W[o,i,d] D[i,:,d]``, with ``D`` starting from the identity.

    Args:
        spec: the convolution.
        multiplier: depth ``d`` of ``D``, at least and by default ``kh*kw``.
    """
    taps = spec.kernel_size[0] * spec.kernel_size[1]
    depth = taps if multiplier is None else multiplier
    if depth < taps:
        raise ValueError(f"multiplier must be at least kh*kw={taps}, got {depth}")
    layers = (Depthwise(spec.kernel_size, depth, TapEye()), Conv(1, init=DEFAULT_KAIMING))
    return Topology(over=Branch(*layers, scale=None))


@register_topology("ecb", norm_free=True)
def ecb(spec: ConvSpec, expand: int = 2) -> Topology:
    """Edge-oriented Convolution Block (Zhang et al., ACM MM 2021): kxk, 1x1-kxk, and 1x1 with each 3x3 edge filter."""
    k, init = spec.kernel_size, DEFAULT_KAIMING
    parts = {
        "origin": Branch(Conv(k, init=init)),
        "conv1x1_kxk": Branch(Conv(1, expand * spec.out_channels, init=init), Conv(k, init=init)),
        "sobel_x": Branch(Conv(1, init=init), Filter(sobel_x, 3), scale=1e-3),
        "sobel_y": Branch(Conv(1, init=init), Filter(sobel_y, 3), scale=1e-3),
        "laplacian": Branch(Conv(1, init=init), Filter(laplacian, 3), scale=1e-3),
    }
    if spec.keeps_shape:
        parts["identity"] = Branch(Identity(), scale=1.0)
    return Topology(**parts)


@register_topology("replknet")
def replknet(spec: ConvSpec, small: int = 5) -> Topology:
    """RepLKNet (Ding et al., CVPR 2022): a large kernel, and a ``small`` one where that is smaller."""
    k, init = spec.kernel_size, DEFAULT_KAIMING
    smaller = (min(small, k[0]), min(small, k[1]))
    parts = {"origin": Branch(Conv(k, init=init), Norm())}
    if smaller != k:
        parts["small"] = Branch(Conv(smaller, init=init), Norm())
    return Topology(**parts)


#: the taps of UniRepLKNet's branches by their dilation, by the smallest kernel size that has them
_DILATED = {
    17: {1: 5, 2: 9, 4: 3, 5: 3, 7: 3},
    15: {1: 5, 2: 7, 3: 3, 5: 3, 7: 3},
    13: {1: 5, 2: 7, 3: 3, 4: 3, 5: 3},
    11: {1: 5, 2: 5, 3: 3, 4: 3, 5: 3},
    9: {1: 5, 2: 5, 3: 3, 4: 3},
    7: {1: 5, 2: 3, 3: 3},
    5: {1: 3, 2: 3},
}


@register_topology("unireplknet")
def unireplknet(spec: ConvSpec) -> Topology:
    """UniRepLKNet's Dilated Reparam Block (Ding et al., CVPR 2024): a large kernel and small ones, dilated, from 5x5 on.

    The authors list square kernels up to 17x17. Larger ones get the branches of that; the longer side of a rectangular
    kernel chooses, and the shorter one has as many taps as fit.
    """
    k, init = spec.kernel_size, DEFAULT_KAIMING
    dilated = next((taps for size, taps in _DILATED.items() if size <= max(k)), {})
    scale = (1 + len(dilated)) ** -0.5  # together, they start like one
    parts = {"origin": Branch(Conv(k, init=init), Norm(), scale=scale)}
    for r, taps in dilated.items():
        height, width = (min(taps, 1 + (size - 1) // (2 * r) * 2) for size in k)  # odd, as every kernel here
        parts[f"dilation{r}"] = Branch(Conv((height, width), init=init, dilation=r), Norm(), scale=scale)
    return Topology(**parts)


@register_topology("repmixer")
def repmixer(spec: ConvSpec, layer_scale: float = 1e-5) -> Topology:
    """RepMixer of FastViT (Vasu et al., ICCV 2023): the input, plus ``layer_scale`` times RepVGG's branches less a norm of it.

    Where the shape allows no identity, it is RepVGG's block. Offline, the weights of the norms, which start at one, stand for
    the layer scale and the sign.
    """
    if not spec.keeps_shape:
        return repvgg(spec)
    mixer = {name: Branch(*branch.layers, scale=layer_scale) for name, branch in repvgg(spec)}
    norm = Branch(Identity(), Norm(), scale=-layer_scale)
    return Topology(skip=Branch(Identity(), scale=None), **mixer, norm=norm)


@register_topology("sesr", norm_free=True)
def sesr(spec: ConvSpec, expand: int = 16) -> Topology:
    """SESR's collapsible block (Bhardwaj et al., MLSys 2022): kxk to ``expand`` times the channels, 1x1 back; plus identity.

    The authors expand 16 channels to 256, and collapse the block at every training step, as this package does.
    """
    wide, init = expand * spec.out_channels, _stage_init(spec, 2)
    parts = {"sequence": Branch(Conv(spec.kernel_size, wide, init=init), Conv(1, init=init), scale=None)}
    if spec.keeps_shape:
        parts["identity"] = Branch(Identity(), scale=None)
    return Topology(**parts)
