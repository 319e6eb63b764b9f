"""Every topology: squeezed equals unsqueezed, gradients are right, initial values are the released models'."""

import copy
import math
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import geometries, image
from torch.autograd import gradcheck

import orepa
from orepa import OREPAConv
from orepa.topology import AvgPool, Branch, Conv, ConvSpec, Depthwise, Filter, Identity, Nested, Norm, Topology, pair
from orepa.topology.filters import dct2d_prior, frequency_prior

F64 = torch.float64
NAMES = orepa.topologies()


def randomize(conv):
    """Every parameter and scale away from its initial value: zeros and identities would hide mistakes."""
    with torch.no_grad():
        for parameter in conv.parameters():
            parameter.normal_()
    return conv


def fits(topology, geometry):
    return topology != "ecb" or min(geometry["kernel_size"]) >= 3


@pytest.mark.parametrize("topology", NAMES)
@given(
    geometry=geometries(),
    scaling=st.sampled_from(["vector", "scalar", "none"]),
    extra=st.tuples(*[st.integers(0, 3)] * 2),
)
def test_squeezed_is_unsqueezed(topology, geometry, scaling, extra):
    if not fits(topology, geometry):
        with pytest.raises(ValueError, match="is larger than the block's"):
            OREPAConv(**geometry, topology=topology)
        return
    conv = randomize(OREPAConv(**geometry, topology=topology, scaling=scaling, dtype=F64))
    x = image(conv, *extra)
    y, truth = conv(x), conv.forward_branches(x)
    assert y.shape == truth.shape
    assert (y - truth).norm() <= 1e-10 * truth.norm()
    plain = conv.to_conv2d()
    assert (plain(x) - truth).norm() <= 1e-10 * truth.norm()


@pytest.mark.parametrize("topology", NAMES)
@pytest.mark.parametrize("groups", [1, 2])
def test_gradient_of_every_parameter(topology, groups):
    conv = randomize(OREPAConv(2, 4, 3, stride=2, padding=1, groups=groups, topology=topology, dtype=F64))
    x = torch.randn(1, 2, 5, 4, dtype=F64, requires_grad=True)
    names = [name for name, _ in conv.named_parameters()]

    def run(x, *values):
        return torch.func.functional_call(conv, dict(zip(names, values, strict=True)), (x,))

    assert gradcheck(run, (x, *conv.parameters()))
    # ... and the branch-by-branch forward has the same ones.
    upstream = torch.randn_like(conv(x))
    squeezed = torch.autograd.grad(conv(x), list(conv.parameters()), upstream)
    branches = torch.autograd.grad(conv.forward_branches(x), list(conv.parameters()), upstream)
    for name, a, b in zip(names, squeezed, branches, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10, msg=name)


def test_even_and_one_dimensional_kernels():
    for topology, size in (
        ("repvgg_dense", 4),
        ("repvgg_dense", (2, 4)),
        ("dbb", (1, 3)),
        ("orepa", (1, 9)),
        ("plain", 2),
    ):
        conv = randomize(OREPAConv(4, 6, size, padding=1, topology=topology, dtype=F64))
        x = torch.randn(2, 4, 9, 13, dtype=F64)
        torch.testing.assert_close(conv(x), conv.forward_branches(x), rtol=1e-10, atol=1e-10)
    assert OREPAConv(4, 6, 4).topology == "repvgg_dense"
    with pytest.raises(ValueError, match="branch 'conv1x1': a 1x1 kernel cannot be centred in the block's 4x4"):
        OREPAConv(4, 6, 4, topology="orepa")


# --- the language -----------------------------------------------------------------------------------------------------------


def squeezed_equals_branches(topology, channels=(6, 6), size=(5, 5), groups=2):
    conv = randomize(OREPAConv(*channels, size, padding=2, groups=groups, topology=topology, dtype=F64))
    x = torch.randn(2, channels[0], 9, 8, dtype=F64)
    torch.testing.assert_close(conv(x), conv.forward_branches(x), rtol=1e-10, atol=1e-10)
    return conv


def shift(channels, kernel_size):
    values = torch.zeros(channels, *kernel_size, dtype=F64)
    values[:, 0, -1] = torch.arange(1, channels + 1)
    return values


SEQUENCES = {
    "three convolutions": (Conv(1, 8), Conv(3, 4), Conv(3)),
    "identity in the middle": (Conv(3, 8), Conv(1, 12, identity=False), Conv((1, 3))),
    "two identities": (Conv(1, 6, identity=True), Conv(1, 6, identity=True), Conv(3)),
    "identity alone": (Conv(1, 6, identity=True),),
    "depthwise alone": (Depthwise(3),),
    "inverted bottleneck": (Conv(1, 12), Depthwise(3), Conv(1)),
    "wide depthwise first": (Depthwise((3, 1), 2), Conv(3)),
    "filter first": (Filter(shift, (3, 3)), Conv(1)),
    "filter alone": (Filter(shift, 5),),
    "pool, filter, pool": (AvgPool((1, 3)), Filter(shift, (3, 1)), AvgPool((3, 1)), Conv(1)),
    "pool alone": (AvgPool(3),),
    "nested, then 1x1": (Nested(orepa.topology.catalogue.orepa, 3, 8), Conv(1)),
    "nested in nested": (Nested(orepa.topology.catalogue.deep_stem, 5), Identity()),
}


@pytest.mark.parametrize("sequence", SEQUENCES)
def test_any_sequence_lowers(sequence):
    squeezed_equals_branches(lambda spec: Topology(only=Branch(*SEQUENCES[sequence])))


def branches(name, size, groups=1, **options):
    """The taps and the dilation of each branch's first layer, in order."""
    declared = orepa.topology.declaration(name, **options)(ConvSpec(4, 4, size, groups))
    return [(pair(branch.layers[0].kernel_size), branch.layers[0].dilation) for _, branch in declared]


def test_large_kernels_have_the_branches_of_the_papers():
    assert branches("replknet", (31, 31), 4) == [((31, 31), 1), ((5, 5), 1)]
    assert branches("replknet", (3, 9)) == [((3, 9), 1), ((3, 5), 1)]
    assert branches("replknet", (7, 7), small=3) == [((7, 7), 1), ((3, 3), 1)]
    assert branches("replknet", (5, 5)) == [((5, 5), 1)]
    authors = {  # kernel_sizes and dilates of their code
        5: ([3, 3], [1, 2]),
        7: ([5, 3, 3], [1, 2, 3]),
        9: ([5, 5, 3, 3], [1, 2, 3, 4]),
        11: ([5, 5, 3, 3, 3], [1, 2, 3, 4, 5]),
        13: ([5, 7, 3, 3, 3], [1, 2, 3, 4, 5]),
        15: ([5, 7, 3, 3, 3], [1, 2, 3, 5, 7]),
        17: ([5, 9, 3, 3, 3], [1, 2, 4, 5, 7]),
    }
    for size, lists in authors.items():
        small = [((k, k), r) for k, r in zip(*lists, strict=True)]
        assert branches("unireplknet", (size, size), 4) == [((size, size), 1), *small]
    assert branches("unireplknet", (31, 31))[1:] == branches("unireplknet", (17, 17))[1:]
    assert branches("unireplknet", (3, 3)) == [((3, 3), 1)]
    assert branches("unireplknet", (3, 7))[1:] == [((3, 5), 1), ((1, 3), 2), ((1, 3), 3)]


def test_the_shortcuts_of_repmixer_and_sesr():
    delta, one = torch.zeros(6, 1, 3, 3, dtype=F64), (slice(None), slice(None), slice(1, 2), slice(1, 2))
    delta[one] = 1
    mixer = OREPAConv(6, 6, 3, groups=6, topology="repmixer", dtype=F64)
    small = delta * mixer.conv1x1_weight
    start = delta + 1e-5 * (mixer.origin_weight + small)  # the norm takes the identity of the mixer out
    torch.testing.assert_close(mixer.squeeze(), start, rtol=1e-12, atol=1e-12)
    a, b, c, d = randomize(mixer).scales.view(4, 6, 1, 1, 1).unbind()
    mixed = delta + a * mixer.origin_weight + b * delta * mixer.conv1x1_weight + (c + d) * delta
    torch.testing.assert_close(mixer.squeeze(), mixed, rtol=1e-12, atol=1e-12)
    sesr = OREPAConv(6, 6, 3, topology="sesr", dtype=F64)
    wide = torch.einsum("om,mihw->oihw", sesr.sequence_conv2[:, :, 0, 0], sesr.sequence_conv1)
    wide[one] += torch.eye(6, dtype=F64)[..., None, None]
    assert len(sesr.sequence_conv1) == 96 and sesr.scales is None
    torch.testing.assert_close(sesr.squeeze(), wide, rtol=1e-12, atol=1e-12)
    assert OREPAConv(6, 6, 3, stride=2, topology="repmixer").scales.shape[0] == 2
    assert len(OREPAConv(6, 6, 3, stride=2, topology="sesr").plan.terms) == 1


def test_user_topology_registers_in_five_lines():
    @orepa.register_topology("test_cross")
    def cross(spec, width=3):
        return Topology(
            vertical=Branch(Conv((width, 1)), Norm()),
            horizontal=Branch(Conv((1, width)), Norm(), scale=0.5),
        )

    try:
        conv = squeezed_equals_branches("test_cross")
        assert conv.topology == "test_cross" and list(conv.state_dict()) == [
            "vertical_weight",
            "horizontal_weight",
            "scales",
            "bias",
            "_extra_state",
        ]
        assert OREPAConv(2, 2, 5, topology="test_cross", width=5).horizontal_weight.shape[-1] == 5
        with pytest.raises(ValueError, match="'test_cross' is registered already"):
            orepa.register_topology("test_cross")(cross)
        with pytest.raises(TypeError, match="widht"):
            OREPAConv(2, 2, 5, topology="test_cross", widht=5)
    finally:
        del orepa.topology.language._REGISTRY["test_cross"]


def test_declarations_that_do_not_fit_are_named():
    def of(*layers):
        return lambda spec: Topology(odd=Branch(*layers))

    with pytest.raises(ValueError, match="topology must be one of acnet.*got 'orepas'"):
        OREPAConv(4, 4, 3, topology="orepas")
    with pytest.raises(ValueError, match="branch 'odd' ends with 6 channels, the block has 4"):
        OREPAConv(4, 4, 3, topology=of(Conv(3, 6)))
    with pytest.raises(ValueError, match="groups=2 must divide the 5 channels of layer 0"):
        OREPAConv(4, 4, 3, groups=2, topology=of(Conv(1, 5), Conv(3)))
    with pytest.raises(ValueError, match="plus identity must be 1x1"):
        OREPAConv(4, 4, 3, topology=of(Conv(3, 4, identity=True)))
    with pytest.raises(ValueError, match=r"filter's values must be \[1 or 4, 3, 3\], got \[2, 3, 3\]"):
        OREPAConv(4, 4, 3, topology=of(Filter(lambda c, k: torch.ones(2, *k), 3)))
    with pytest.raises(ValueError, match="at least one branch"):
        OREPAConv(4, 4, 3, topology=lambda spec: Topology())
    with pytest.raises(ValueError, match="branch 'odd' needs at least one linear layer"):
        OREPAConv(4, 4, 3, topology=of(Norm()))
    with pytest.raises(ValueError, match="prior must be one of paper, dct2d, got 'dct'"):
        OREPAConv(4, 4, 3, prior="dct")
    with pytest.raises(ValueError, match="multiplier must be at least"):
        OREPAConv(4, 4, 3, topology="doconv", multiplier=8)


# --- initial values (SPEC section 2) ------------------------------------------------------------------------------------


def test_scales_of_the_paper():
    torch.testing.assert_close(OREPAConv(4, 6, 3).scales[:, 0], torch.tensor([0.25, 0.25, 0.0, 0.5, 1.0, 0.5]))
    dense = OREPAConv(4, 6, 3, topology="repvgg_dense").scales[:, 0]
    torch.testing.assert_close(dense, torch.tensor([0.25, 0.25, 0.0, 0.5, 0.5]))
    torch.testing.assert_close(OREPAConv(4, 6, 1).scales[:, 0], torch.tensor([1.0, 0.5]))
    assert OREPAConv(4, 6, 3, scaling="scalar").scales.shape == (6, 1)
    assert OREPAConv(4, 6, 3, scaling="none").scales is None


@pytest.mark.parametrize(("topology", "a"), [("orepa", 0.0), ("repvgg_dense", 1.0)])
def test_weights_start_as_kaiming_uniform(topology, a):
    conv = OREPAConv(32, 64, 3, topology=topology)
    for name, fan_in in (("origin_weight", 288), ("avg_weight", 32), ("prior_weight", 32), ("conv1x1_kxk_conv2", 288)):
        bound = math.sqrt(6 / (1 + a**2) / fan_in)
        peak = getattr(conv, name).abs().max().item()
        assert 0.95 * bound < peak <= bound, name
    assert conv.conv1x1_kxk_conv1.abs().max() == 0
    assert conv.dws_depthwise.shape == (256, 1, 3, 3) and conv.dws_pointwise.shape == (64, 256, 1, 1)


def test_internal_channels_double_beyond_four_groups():
    assert OREPAConv(8, 8, 3, groups=4).conv1x1_kxk_conv1.shape == (8, 2, 1, 1)
    assert OREPAConv(16, 16, 3, groups=8).conv1x1_kxk_conv1.shape == (32, 2, 1, 1)
    assert OREPAConv(16, 16, 3, groups=8).conv1x1_kxk_conv2.shape == (16, 4, 3, 3)


@pytest.mark.parametrize(("channels", "eye"), [((4, 6), "conv1x1_1x1_conv1"), ((6, 4), "conv1x1_1x1_conv2")])
def test_rep1x1_starts_from_the_identity(channels, eye):
    for groups in (1, 2):
        conv = OREPAConv(*channels, 1, groups=groups)
        factor = getattr(conv, eye)[:, :, 0, 0]
        per_group = 4 // groups
        torch.testing.assert_close(factor, torch.eye(per_group).repeat(groups, 1))


def test_identity_of_the_sequence_is_exact_at_the_start():
    conv = OREPAConv(4, 6, 3, groups=2, scaling="none", topology=_sequence_only, dtype=F64)
    torch.testing.assert_close(conv.squeeze(), conv.seq_conv2, rtol=0, atol=0)


def _sequence_only(spec):
    return Topology(seq=orepa.topology.catalogue.orepa(spec).branches["conv1x1_kxk"])


def test_doconv_starts_as_its_plain_weight():
    conv = OREPAConv(4, 6, 3, groups=2, topology="doconv", dtype=F64)
    torch.testing.assert_close(conv.squeeze(), conv.over_pointwise.view(6, 2, 3, 3))


def test_default_topology_by_kernel_size():
    sizes = {1: "rep1x1", 3: "orepa", 5: "orepa", 7: "deep_stem", 11: "deep_stem", (3, 7): "deep_stem", (1, 3): "orepa"}
    sizes |= {13: "orepa", (3, 13): "orepa"}
    for size, name in sizes.items():
        assert OREPAConv(2, 2, size).topology == name


# --- priors ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(1, 1), (3, 3), (5, 5), (7, 7), (3, 5)])
@pytest.mark.parametrize("channels", [1, 5, 8])
def test_paper_prior_is_the_formula_for_every_size(size, channels):
    """The authors fill 3x3 only: 5x5 is uninitialised memory in their code, 1x1 crashes."""
    values, half = frequency_prior(channels, size), channels / 2
    for i in range(channels):
        for h in range(size[0]):
            for w in range(size[1]):
                if i < half:
                    expected = math.cos(math.pi * (h + 0.5) * (i + 1) / size[0])
                else:
                    expected = math.cos(math.pi * (w + 0.5) * (i + 1 - half) / size[1])
                assert values[i, h, w].item() == pytest.approx(expected, abs=1e-12)


def test_dct_prior_is_distinct_orthogonal_and_cycled():
    values = dct2d_prior(12, (3, 3)).flatten(1)
    gram = values[:9] @ values[:9].T
    assert (gram - torch.diag(gram.diagonal())).abs().max() < 1e-12 and gram.diagonal().min() > 0
    torch.testing.assert_close(values[9:], values[:3])
    assert not torch.allclose(values[:6], frequency_prior(6, (3, 3)).flatten(1))
    conv = OREPAConv(4, 12, 3, prior="dct2d", dtype=F64)
    torch.testing.assert_close(conv.prior_filter.flatten(1), values)


def test_constants_stay_out_of_checkpoints_and_exact():
    conv = OREPAConv(4, 6, 3)
    assert not {"prior_filter"} & set(conv.state_dict())
    exact = frequency_prior(6, (3, 3)).float()
    worn = copy.deepcopy(conv).half().float()
    assert torch.equal(worn.prior_filter, exact), "a cast to half must not wear the constants down"
    assert copy.deepcopy(conv).bfloat16().prior_filter.dtype == torch.float32
    assert torch.equal(conv.double().prior_filter, frequency_prior(6, (3, 3)))


@pytest.mark.parametrize("topology", NAMES)
def test_every_topology_pickles_and_copies(topology):
    conv = randomize(OREPAConv(4, 4, 7, padding=3, topology=topology, dtype=F64)).eval()
    x = torch.randn(1, 4, 8, 8, dtype=F64)
    for twin in (copy.deepcopy(conv), pickle.loads(pickle.dumps(conv))):
        assert torch.equal(twin(x), conv(x))


def test_declared_norms_go_and_scales_stay():
    declared = orepa.topology.catalogue.dbb(ConvSpec(4, 6, (3, 3)))
    norms = sum(isinstance(layer, Norm) for _, branch in declared for layer in branch.layers)
    assert norms == 6
    linear = declared.linearize()
    assert not any(isinstance(layer, Norm) for _, branch in linear for layer in branch.layers)
    assert [branch.scale for _, branch in linear] == [1.0] * 4


@pytest.mark.parametrize("topology", [3, {"topology": "dbb"}])
def test_what_is_no_topology(topology):
    with pytest.raises(TypeError, match="topology must be a name or a function that declares one, got"):
        orepa.OREPAConv(8, 8, 3, topology=topology)
