"""What property-based tests draw: convolutions of every geometry, and images for them."""

import torch
from hypothesis import strategies as st


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
