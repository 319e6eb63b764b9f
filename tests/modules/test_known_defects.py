"""Defects known from the authors' code, each with a test that would catch it here.

Those that belong to reading their checkpoints (permuted depthwise rows, the spare row of the VGG vector) are in
`test_official.py`; those of the training recipe (the length of the warm-up, a missing file that converts to random weights) in
`test_train*.py` and `test_cli.py`.
"""

import pytest
import torch
from torch import nn

import orepa
from orepa import OREPAConv, RepVGGBlock
from orepa.topology.filters import frequency_prior

F64 = torch.float64


def randomized(module):
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_()
    return module


@pytest.mark.parametrize("size", [1, 3, 5, 7, 11])
def test_the_prior_is_defined_for_every_size(size):
    """Theirs fills 3x3 only: uninitialised memory at 5x5, a crash at 1x1."""
    values = frequency_prior(8, (size, size))
    assert torch.isfinite(values).all() and values.abs().max() <= 1
    assert torch.equal(values, frequency_prior(8, (size, size)))
    assert len({tuple(map(tuple, v.tolist())) for v in values}) > (1 if size > 1 else 0)


@pytest.mark.parametrize("topology", ["deep_stem", "plain_stem"])
def test_the_stem_composes_by_convolution(topology):
    """Theirs composes by correlation: the squeezed kernel then is not the stack of layers that it stands for."""
    conv = randomized(OREPAConv(3, 4, 7, padding=3, topology=topology, dtype=F64))
    x = torch.randn(1, 3, 9, 9, dtype=F64)
    torch.testing.assert_close(conv(x), conv.forward_branches(x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("groups", [2, 4])
def test_groups_in_the_stem_and_in_the_vgg_block(groups):
    """Theirs crashes."""
    stem = randomized(OREPAConv(4, 8, 7, padding=3, groups=groups, dtype=F64))
    x = torch.randn(2, 4, 9, 9, dtype=F64)
    torch.testing.assert_close(stem(x), stem.forward_branches(x), rtol=1e-10, atol=1e-10)
    block = randomized(RepVGGBlock(4, 4, groups=groups, dtype=F64)).eval()
    torch.testing.assert_close(block.deploy()(x), block.forward_branches(x), rtol=1e-10, atol=1e-10)


def test_no_parameter_is_left_uninitialised():
    """Theirs allocates a row of the VGG block's vector that nothing fills; `torch.empty` is poisoned in these tests."""
    for topology in orepa.topologies():
        conv = OREPAConv(4, 4, 3, topology=topology)
        assert all(torch.isfinite(p).all() for p in conv.parameters()), topology
    assert OREPAConv(4, 4, 3, topology="repvgg_dense").scales.shape[0] == 5
    assert all(torch.isfinite(p).all() for p in RepVGGBlock(4, 4).parameters())


@pytest.mark.parametrize("dilation", [2, (1, 3)])
def test_dilation_counts_in_training_as_after_conversion(dilation):
    """Theirs ignores it in training and applies it when deployed."""
    conv = randomized(OREPAConv(4, 4, 3, padding=3, dilation=dilation, dtype=F64))
    x = torch.randn(1, 4, 9, 9, dtype=F64)
    torch.testing.assert_close(conv.train()(x), conv.to_conv2d()(x), rtol=1e-10, atol=1e-10)
    flat = nn.functional.conv2d(x, conv.squeeze(), conv.bias, padding=3)
    assert flat.shape != conv(x).shape


def test_converting_twice_is_converting_once():
    """Their second switch_to_deploy crashes."""
    model = nn.Sequential(OREPAConv(3, 4, 3), nn.BatchNorm2d(4), RepVGGBlock(4, 4)).eval()
    once = orepa.convert(model)
    twice = orepa.convert(orepa.convert(once, inplace=True), inplace=True)
    x = torch.randn(1, 3, 8, 8)
    assert twice is once and torch.equal(twice(x), orepa.convert(model)(x))


def test_deployed_parameters_can_be_trained():
    """Theirs come out frozen."""
    model = nn.Sequential(OREPAConv(3, 4, 3), nn.BatchNorm2d(4), RepVGGBlock(4, 4)).eval()
    plain = orepa.convert(model)
    plain(torch.randn(1, 3, 8, 8)).sum().backward()
    assert all(p.requires_grad and p.grad is not None for p in plain.parameters())


def test_checkpoints_hold_what_is_learned_and_nothing_else():
    """Theirs hold priors, identities and averages as well."""
    for module in (OREPAConv(4, 4, 3), OREPAConv(4, 4, 7), OREPAConv(4, 4, 1)):
        assert set(module.state_dict()) == {name for name, _ in module.named_parameters()} | {"_extra_state"}


def test_eval_mode_does_not_squeeze_again(monkeypatch):
    """Theirs composes the kernel at every forward, 52 times slower on a CPU than deployed."""
    conv, x = OREPAConv(4, 4, 3).eval(), torch.randn(1, 4, 8, 8)
    with torch.no_grad():
        first = conv(x)
        monkeypatch.setattr(OREPAConv, "_squeeze", lambda *_: pytest.fail("squeezed again"))
        assert torch.equal(conv(x), first)


def test_scales_and_norms_are_alike_for_weight_decay():
    """Theirs decays the scales but not the norms. Here scales are told by their name, so a recipe can choose."""
    model = orepa.prepare(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    assert [name for name, _ in model.named_parameters() if name.endswith("scales")] == ["0.scales"]


def test_blocks_of_two_kinds_live_side_by_side():
    """Theirs selects the block by a module-level variable."""
    first, second = OREPAConv(4, 4, 3, topology="orepa"), OREPAConv(4, 4, 3, topology="dbb")
    assert first.plan != second.plan and first.plan == OREPAConv(4, 4, 3, topology="orepa").plan
