"""What property-based tests draw: convolutions of every geometry, and images for them."""

import torch
from hypothesis import strategies as st

from orepa_kernels import Average, Block, Composed, Dense, Operand, PointwiseFilter, Separable

#: between them, every kind of branch
MIXED_TOPOLOGIES = ["orepa", "repvgg_dense", "dbb", "acnet", "mobileone", "ecb", "rep1x1"]


def perturb(model):
    """Move every parameter off its initial value, which may be zero or an identity."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)


@st.composite
def geometries(draw, bias=(True, False)):
    """Arguments of a convolution: groups, rectangular kernels, strides, paddings, dilations, padding modes."""
    groups = draw(st.sampled_from([1, 2, 3, 6]))
    size = st.sampled_from([1, 3, 5, 7])
    return {
        "in_channels": groups * draw(st.integers(1, 3)),
        "out_channels": groups * draw(st.integers(1, 3)),
        "kernel_size": (draw(size), draw(size)),
        "stride": (draw(st.integers(1, 3)), draw(st.integers(1, 3))),
        "padding": (draw(st.integers(0, 4)), draw(st.integers(0, 4))),
        "dilation": (draw(st.integers(1, 2)), draw(st.integers(1, 2))),
        "groups": groups,
        "bias": draw(st.sampled_from(bias)),
        "padding_mode": draw(st.sampled_from(["zeros", "zeros", "reflect", "replicate", "circular"])),
    }


def image(conv, height=0, width=0):
    """Random float64 input, large enough for the kernel and for the padding mode, and so much larger."""
    extents = [d * (k - 1) + 1 for k, d in zip(conv.kernel_size, conv.dilation, strict=True)]
    size = max(extents[0], 5) + height, max(extents[1], 5) + width
    return torch.randn(2, conv.in_channels, *size, dtype=torch.float64)


@st.composite
def blocks(draw, max_terms=4, most=19):
    """Plans of any kind: every term, groups, rectangular and even kernels, smaller centred ones, scalings, one nesting."""
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    per_group, out_per_group = draw(st.integers(1, most)), draw(st.integers(1, most))
    size = draw(st.tuples(*[st.sampled_from([1, 2, 3, 4, 5])] * 2))
    o, i = groups * out_per_group, groups * per_group
    scaled = draw(st.sampled_from([None, 1, o]))
    names = iter(f"x{n}" for n in range(100))

    def operand(*shape):
        return Operand(next(names), shape)

    def smaller(of):
        return tuple(draw(st.sampled_from(range(2 - k % 2, k + 1, 2))) for k in of)

    terms = []
    for _ in range(draw(st.integers(1, max_terms))):
        kind = draw(st.sampled_from(["dense", "pointwise", "composed", "identity", "separable", "nested"]))
        scale = None if scaled is None else sum(term.scale is not None for term in terms)
        kernel = smaller(size)
        if kind == "dense":
            terms.append(Dense(operand(o, per_group, *kernel), scale))
        elif kind == "pointwise":
            fixed = Average(kernel) if draw(st.booleans()) else operand(draw(st.sampled_from([1, o])), *kernel)
            no_weights = out_per_group % per_group == 0 and terms and draw(st.booleans())
            terms.append(PointwiseFilter(None if no_weights else operand(o, per_group, 1, 1), fixed, scale))
        elif kind == "separable":
            expand = draw(st.sampled_from([1, 3, 8]))
            pointwise = operand(o, per_group * expand, 1, 1)
            terms.append(Separable(operand(i * expand, 1, *kernel), pointwise, scale))
        elif kind == "identity":
            inner = per_group * draw(st.integers(1, 2))
            first, second = operand(groups * inner, per_group, 1, 1), operand(o, inner, *kernel)
            terms.append(Composed(first, second, True, scale))
        else:
            inner = draw(st.integers(1, 7))
            first_size = tuple(draw(st.integers(1, k)) for k in kernel)
            second_size = tuple(k - f + 1 for k, f in zip(kernel, first_size, strict=True))
            first = operand(groups * inner, per_group, *first_size)
            if kind == "nested":
                parts = (Dense(first), Dense(operand(groups * inner, per_group, *smaller(first_size))))
                first = Block(groups * inner, i, first_size, parts, groups)
            terms.append(Composed(first, operand(o, inner, *second_size), False, scale))
    rows = sum(term.scale is not None for term in terms) + draw(st.integers(0, 1))  # one may scale nothing
    return Block(o, i, size, tuple(terms), groups, operand(rows, scaled) if scaled else None)


def strided(tensor, how):
    """The same values in another layout."""
    if how == "channels_last" and tensor.dim() == 4:
        return tensor.contiguous(memory_format=torch.channels_last)
    if how == "gaps":
        return torch.stack([tensor, torch.full_like(tensor, float("nan"))], -1)[..., 0]
    if how == "transposed" and tensor.dim() > 1:
        return tensor.transpose(-1, -2).contiguous().transpose(-1, -2)
    return tensor
