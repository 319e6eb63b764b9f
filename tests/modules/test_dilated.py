"""Dilated layers of a block: the function of `conv2d` with a dilation, and everything that reads the smaller parameter."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import gradcheck, gradgradcheck

import orepa
from orepa import OfflineConv, OREPAConv
from orepa.modules.writes import detects_writes
from orepa.topology import Branch, Conv, Depthwise, Nested, Norm, Topology

F64 = torch.float64


def only(*layers, scale=None):
    return lambda spec: Topology(only=Branch(*layers, scale=scale))


def mixed(spec):
    """Dilated layers of either kind, alone, in a sequence and in a nested block."""
    inner = only(Conv((1, 2), dilation=(3, 2)), scale=1.0)
    return Topology(
        origin=Branch(Conv(spec.kernel_size)),
        dense=Branch(Conv(3, dilation=(1, 2))),
        separable=Branch(Depthwise((3, 1), 2, dilation=2), Conv((1, 3), dilation=2)),
        nested=Branch(Conv(1), Nested(inner, (1, 3))),
    )


def make(*arguments, cls=OREPAConv, **options):
    conv = cls(*arguments, dtype=F64, **options)
    with torch.no_grad():
        for parameter in conv.parameters():
            parameter.normal_()
    return conv


CASES = {  # layer, arguments of the block, and what its padding is for the layer alone
    "dense": (Conv(3, dilation=2), {"kernel_size": 7, "padding": 3}, 2),
    "grouped, strided": (Conv(3, dilation=3), {"kernel_size": 9, "stride": (2, 1), "padding": 4, "groups": 2}, 3),
    "full size": (Conv(3, dilation=(2, 1)), {"kernel_size": (5, 3), "padding": 2}, 2),
    "even": (Conv((2, 4), dilation=(3, 2)), {"kernel_size": (4, 7), "padding": (1, 2), "groups": 6}, (1, 2)),
    "dilated block": (Conv(3, dilation=(1, 2)), {"kernel_size": 5, "dilation": (2, 3), "padding": 6}, (4, 6)),
    "depthwise": (Depthwise(3, dilation=2), {"kernel_size": (5, 9), "padding": 4, "groups": 6}, (4, 2)),
    "depthwise, not grouped": (Depthwise((3, 2), dilation=(1, 2)), {"kernel_size": 3, "padding": 1}, 1),
    "one tap": (Conv((1, 3), dilation=(4, 2)), {"kernel_size": (1, 5), "padding": (0, 2)}, (0, 2)),
}


@pytest.mark.parametrize("name", CASES)
def test_it_is_a_dilated_convolution(name):
    layer, arguments, padding = CASES[name]
    conv = make(6, 6, **arguments, topology=only(layer), bias=False)
    (weight,), own = conv.parameters(), orepa.topology.pair(layer.dilation)
    assert tuple(weight.shape[2:]) == orepa.topology.pair(layer.kernel_size)
    dilation = tuple(a * b for a, b in zip(own, conv.dilation, strict=True))
    x = torch.randn(2, 6, 14, 17, dtype=F64)
    truth = F.conv2d(
        x, weight, None, conv.stride, padding, dilation, 6 if isinstance(layer, Depthwise) else conv.groups
    )
    for y in (conv(x), conv.forward_branches(x), conv.to_conv2d()(x)):
        torch.testing.assert_close(y, truth, rtol=1e-12, atol=1e-12)


def test_its_kernel_has_zeros_between_the_taps():
    conv = make(4, 6, 7, groups=2, topology=only(Conv((3, 2), dilation=(2, 4))))
    kernel = torch.zeros(6, 2, 7, 7, dtype=F64)
    kernel[:, :, 1:6:2, 1:6:4] = conv.only_weight
    assert torch.equal(conv.squeeze(), kernel)


def test_dilations_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match=r"dilation must be a positive integer or two of them, got \(1, 0\)"):
        make(4, 4, 5, topology=only(Conv(3, dilation=(1, 0))))
    with pytest.raises(ValueError, match="branch 'only': a 7x7 kernel is larger than the block's 5x5"):
        make(4, 4, 5, topology=only(Conv(3, dilation=3)))
    with pytest.raises(ValueError, match="branch 'only': a 4x4 kernel cannot be centred in the block's 5x5"):
        make(4, 4, 5, topology=only(Depthwise(2, dilation=3)))


def test_gradients_of_either_order():
    conv = make(2, 2, 5, padding=2, topology=mixed)
    names, x = [name for name, _ in conv.named_parameters()], torch.randn(1, 2, 5, 4, dtype=F64)

    def run(*values):
        return torch.func.functional_call(conv, dict(zip(names, values, strict=True)), (x,))

    parameters = tuple(conv.parameters())
    assert gradcheck(run, parameters, fast_mode=True) and gradgradcheck(run, parameters, fast_mode=True)
    upstream = torch.randn_like(conv(x))
    both = [torch.autograd.grad(y, parameters, upstream) for y in (conv(x), conv.forward_branches(x))]
    for name, a, b in zip(names, *both, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10, msg=name)


@pytest.mark.parametrize("padding_mode", ["zeros", "reflect", "circular"])
def test_borders_and_groups_of_mixed_blocks(padding_mode):
    conv = make(4, 6, (7, 5), 2, (3, 4), 1, 2, topology=mixed, padding_mode=padding_mode)
    x = torch.randn(2, 4, 9, 8, dtype=F64)
    torch.testing.assert_close(conv(x), conv.forward_branches(x), rtol=1e-10, atol=1e-10)


def test_compiled_and_mapped():
    conv, x = make(4, 4, 5, padding=2, topology=mixed), torch.randn(2, 4, 6, 6, dtype=F64)
    torch.compiler.reset()
    compiled = torch.compile(conv, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), conv(x))
    stacked = {name: torch.stack([p.detach(), 2 * p.detach()]) for name, p in conv.named_parameters()}
    both = torch.func.vmap(lambda values: torch.func.functional_call(conv, values, (x,)))(stacked)
    torch.testing.assert_close(both[0], conv(x))


# --- what reads the parameter ---------------------------------------------------------------------------------------------


@pytest.mark.skipif(not detects_writes(), reason="this torch does not tell writes, and nothing is cached")
@pytest.mark.parametrize("name", ["dense_weight", "separable_depthwise", "nested_block1.only_weight"])
def test_a_write_to_a_dilated_parameter_is_seen(name):
    conv, x = make(4, 4, 5, padding=2, topology=mixed).eval(), torch.randn(1, 4, 6, 6, dtype=F64)
    with torch.no_grad():
        before = conv(x)
        cached = conv._cached
        assert torch.equal(conv(x), before) and cached is not None and conv._cached is cached
        conv.get_parameter(name).data.mul_(2)
        assert not torch.equal(conv(x), before)
        torch.testing.assert_close(conv(x), conv.forward_branches(x), rtol=1e-10, atol=1e-10)
        conv.train()(x)
        assert conv._cached is None, "an update is next, though no gradient is asked for"


@pytest.mark.parametrize("kind", [Conv, Depthwise])
@pytest.mark.parametrize("cls", [OREPAConv, OfflineConv])
def test_a_checkpoint_of_another_dilation_is_refused(kind, cls):
    one, other, same = (cls(4, 4, 5, topology=only(kind(3, dilation=d), Norm())) for d in (1, 2, (2, 2)))
    with pytest.raises(RuntimeError, match="computes something else"):
        other.load_state_dict(one.state_dict())
    same.load_state_dict(other.state_dict())
    single = [OREPAConv(4, 4, 5, topology=only(Conv((1, 3), dilation=d))) for d in ((7, 2), 2)]
    single[0].load_state_dict(single[1].state_dict())  # a single tap is the same with any


def test_a_given_kernel_is_not_loaded_into_a_dilated_one():
    def two(spec):
        return Topology(dilated=Branch(Conv(3, dilation=2)), full=Branch(Conv(5)))

    conv, kernel = make(4, 4, 5, topology=two), torch.randn(4, 4, 5, 5, dtype=F64)
    conv.load_kernel_(kernel)
    torch.testing.assert_close(conv.squeeze(), kernel)
    with pytest.raises(ValueError, match="no full-size convolution"):
        make(4, 4, 5, topology=only(Conv(3, dilation=2))).load_kernel_(kernel)


def test_analysis_and_pruning():
    net = nn.Sequential(make(4, 4, 5, padding=2, topology=mixed, bias=False))
    with torch.no_grad():
        net[0].scales[2] = 0
    (layer, _) = orepa.analyze(net).layers
    dense = layer.branches[1]
    expected = (net[0].dense_weight * net[0].scales[1].view(-1, 1, 1, 1)).norm().item()
    assert dense.name == "dense" and dense.norm == pytest.approx(expected) and layer.prunable == ("separable",)
    pruned, x = orepa.prune_branches(net), torch.randn(1, 4, 7, 7, dtype=F64)
    assert pruned[0].dense_weight.shape[2:] == (3, 3)
    torch.testing.assert_close(pruned(x), net(x), rtol=1e-10, atol=1e-10)


def test_convert_verifies_it():
    net = nn.Sequential(make(4, 4, 5, padding=2, topology="unireplknet"), nn.BatchNorm2d(4, dtype=F64)).eval()
    x = torch.randn(1, 4, 9, 9, dtype=F64)
    plain = orepa.convert(net, example_inputs=x)
    assert type(plain[0]) is nn.Conv2d
    torch.testing.assert_close(plain(x), net(x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("padding_mode", ["zeros", "reflect"])
def test_offline_with_norms_between_dilated_layers(padding_mode):
    """The border of a branch has the values that a norm turns zeros into."""

    def normed(spec):
        return Topology(
            a=Branch(Conv(1), Norm(), Conv(3, dilation=2), Norm()),
            b=Branch(Depthwise((3, 1), 2, dilation=(3, 1)), Norm(), Conv(1), Norm()),
            c=Branch(Conv(1), Norm(), Conv(2), Norm(), Depthwise(2, dilation=(1, 3))),
        )

    block = make(4, 6, (7, 5), 2, 3, groups=2, cls=OfflineConv, topology=normed, padding_mode=padding_mode)
    for _ in range(2):
        block(torch.randn(2, 4, 12, 11, dtype=F64))  # moves the statistics
    x = torch.randn(2, 4, 12, 11, dtype=F64)
    torch.testing.assert_close(block.eval()(x), block.to_conv2d()(x), rtol=1e-10, atol=1e-10)
