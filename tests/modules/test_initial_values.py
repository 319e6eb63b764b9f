"""Every block starts about as loud as `nn.Conv2d`; the shapes of the released models start from the authors' values."""

import math

import pytest
import torch
from torch import nn

import orepa
from orepa import OfflineConv, OREPAConv
from orepa.modules import default_topology
from orepa.topology import Branch, Kaiming, Nested, Topology

NAMES = orepa.topologies()
PLAIN = math.sqrt(1 / 3)  # nn.Conv2d: the output's standard deviation for white noise of unit variance, without borders
SIZES = [1, 3, 5, 7, 13, 31, (1, 7), (15, 3)]
CHANNELS = {  # I, O, g
    "dense": (8, 8, 1),
    "dense, wider": (3, 24, 1),
    "dense, narrower": (24, 4, 1),
    "grouped": (16, 16, 4),
    "grouped, wider": (16, 32, 8),
    "grouped, narrower": (32, 16, 4),
    "depthwise": (32, 32, 32),
    "depthwise, wider": (16, 32, 16),
}


def fits(topology, size):
    height, width = size if isinstance(size, tuple) else (size, size)
    if topology == "doconv":
        return height * width <= 169  # it has the square of that for every input channel
    return topology != "ecb" or min(height, width) >= 3


def is_released(channels, size):
    """Whether the authors' models have such an `orepa` block: their values are the contract, whatever their deviation."""
    in_channels, _, groups = CHANNELS[channels]
    return size == 3 and groups < in_channels


@torch.no_grad()
def deviation(conv):
    """The standard deviation of the output for white noise without borders, over all channels."""
    return conv.squeeze().square().sum((1, 2, 3)).mean().sqrt().item()


@pytest.mark.parametrize("topology", NAMES)
@pytest.mark.parametrize("channels", CHANNELS)
def test_starts_within_a_factor_of_3_of_conv2d(topology, channels):
    in_channels, out_channels, groups = CHANNELS[channels]
    for size in SIZES:
        if not fits(topology, size):
            continue
        conv = OREPAConv(in_channels, out_channels, size, groups=groups, topology=topology)
        ratio = deviation(conv) / PLAIN
        if topology == "orepa" and is_released(channels, size):
            assert 2.9 < ratio < 3.8, (size, ratio)  # the one exception: 3.31 in expectation
        else:
            assert 1 / 3 < ratio < 3, (size, ratio)


@pytest.mark.parametrize("topology", [None, *NAMES])
def test_a_large_depthwise_kernel_on_feature_maps(topology):
    """With borders, which cost a kernel of evenly spread taps the most."""
    x, size = torch.randn(1, 32, 32, 32), 31 if fits(topology, 31) else 7
    conv = OREPAConv(32, 32, size, padding=size // 2, groups=32, topology=topology)
    plain = nn.Conv2d(32, 32, size, padding=size // 2, groups=32)
    with torch.no_grad():
        assert 1 / 3 < conv(x).std() / plain(x).std() < 3
        with torch.autocast("cpu", torch.float16):
            assert conv(x[:, :, :16, :16]).isfinite().all()
        assert conv.half().squeeze().isfinite().all()


@pytest.mark.parametrize("topology", NAMES)
@pytest.mark.parametrize("size", [3, 9])
def test_offline_blocks_start_finite(topology, size):
    """Where norms end the branches, these set the deviation."""
    conv = OfflineConv(8, 8, size, padding=size // 2, groups=8, topology=topology)
    x = torch.randn(2, 8, 16, 16)
    assert conv(x).isfinite().all() and conv.eval()(x).isfinite().all()


# --- the authors' values ------------------------------------------------------------------------------------------------

DENSE = ["origin_weight", "avg_weight", "prior_weight", "conv1x1_kxk_conv2"]
SEPARABLE = ["dws_depthwise", "dws_pointwise"]
DRAWN = {  # topology, size: slope, and the parameters in the order of their draws
    ("orepa", 3): (0.0, [*DENSE, "conv1x1_weight", *SEPARABLE]),
    ("repvgg_dense", 3): (1.0, [*DENSE, *SEPARABLE]),
    ("rep1x1", 1): (1.0, ["origin_weight", "conv1x1_1x1_conv2"]),
}


@pytest.mark.parametrize(("topology", "size"), DRAWN)
@pytest.mark.parametrize("groups", [1, 4])
def test_released_shapes_start_from_the_authors_draws(topology, size, groups):
    slope, names = DRAWN[topology, size]
    torch.manual_seed(5)
    conv = OREPAConv(16, 32, size, groups=groups, topology=topology)
    torch.manual_seed(5)
    for name in names:
        expected = nn.init.kaiming_uniform_(torch.empty_like(getattr(conv, name)), a=slope)
        assert torch.equal(getattr(conv, name), expected), name


def test_a_deep_stem_starts_as_the_authors_up_to_a_factor():
    """The norm after the stem takes the factor out."""

    def theirs(spec):
        return Topology(stack=Branch(*[Nested(orepa.topology.catalogue.orepa, 3)] * 3, scale=None))

    torch.manual_seed(5)
    reference = OREPAConv(3, 64, 7, topology=theirs)
    torch.manual_seed(5)
    stem = OREPAConv(3, 64, 7)
    for (name, value), expected in zip(stem.named_parameters(), reference.parameters(), strict=True):
        assert torch.equal(value, expected) or name.endswith("scales"), name
    kernels = [conv.squeeze().detach() for conv in (stem, reference)]
    torch.testing.assert_close(*(kernel / kernel.norm() for kernel in kernels), rtol=1e-5, atol=1e-6)
    assert 11 < deviation(reference) / deviation(stem) < 13


# --- defaults and draws -------------------------------------------------------------------------------------------------


def test_a_stack_is_the_default_for_dense_kernels_from_7_to_11_only():
    for size in (7, 11, (1, 7), (11, 3)):
        assert OREPAConv(4, 4, size).topology == "deep_stem"
    for size, groups in ((13, 1), (31, 1), ((1, 31), 1), (7, 4), (7, 2), (31, 4), (5, 4)):
        assert OREPAConv(4, 4, size, groups=groups).topology == "orepa"
    assert default_topology((7, 7)) == "deep_stem" and default_topology((7, 7), groups=4) == "orepa"
    assert default_topology((8, 8), groups=4) == "repvgg_dense" and default_topology((1, 1), groups=4) == "rep1x1"


@pytest.mark.parametrize(("size", "groups"), [(13, 1), (31, 8), (7, 8)])
def test_the_defaults_that_are_no_stack_hold_any_kernel(size, groups):
    conv = OREPAConv(8, 8, size, groups=groups)
    target = torch.randn(conv.squeeze().shape)
    conv.load_kernel_(target)
    torch.testing.assert_close(conv.squeeze(), target, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("slope", [0.0, math.sqrt(5)])
def test_exact_kaiming_keeps_the_draws_and_sets_the_norm_of_every_output_channel(slope):
    weight, drawn = torch.empty(16, 3, 3, 3), torch.empty(16, 3, 3, 3)
    torch.manual_seed(7)
    Kaiming(slope, exact=True)(weight)
    torch.manual_seed(7)
    Kaiming(slope)(drawn)
    ratio = weight / drawn
    torch.testing.assert_close(ratio, ratio[:, :1, :1, :1].expand_as(ratio))
    torch.testing.assert_close(weight.square().sum((1, 2, 3)), torch.full((16,), 2 / (1 + slope**2)))


def test_exact_kaiming_of_one_number_per_channel_in_half_precision(monkeypatch):
    """Which may draw a zero."""
    weight = torch.empty(20_000, 1, 1, 1, dtype=torch.float16)
    Kaiming(1.0, exact=True)(weight)
    assert weight.isfinite().all() and weight.abs().max() < 1.01
    monkeypatch.setattr(torch.nn.init, "kaiming_uniform_", lambda weight, a: weight.data.zero_())
    Kaiming(1.0, exact=True)(weight)
    assert (weight == 0).all()
