"""What others have set on a layer, and layers that are like no other: carried over to the new one, or a reason to leave it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import orepa
from orepa import OREPAConv
from orepa.surgery.replace import carry_over


def net(bias=True):
    return nn.Sequential(nn.Conv2d(3, 4, 3, bias=bias), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))


def left(model):
    return {layer.name: layer.detail for layer in orepa.report(model).left}


@pytest.mark.parametrize("policy", [None, {"*": {"topology": "dbb", "offline": True}}])
def test_attributes_of_detector_graphs_stay(policy):
    model = net()
    for index, module in enumerate(model):
        module.f, module.i, module.type, module.np = -1, index, "Conv", sum(p.numel() for p in module.parameters())
    prepared = orepa.prepare(model, policy)
    assert len(orepa.report(prepared).swapped) == 2
    for old, new in zip(model, prepared, strict=True):
        assert (new.f, new.i, new.type, new.np) == (old.f, old.i, old.type, old.np)
    assert type(prepared[1]) is (nn.BatchNorm2d if policy is None else nn.Identity)


@pytest.mark.parametrize("build", [OREPAConv, orepa.OfflineConv, orepa.RepVGGBlock, nn.Conv2d])
def test_a_plain_layer_gets_what_was_set_and_nothing_of_the_old_class(build):
    block, plain = build(4, 4, 3, padding=1).eval(), nn.Conv2d(4, 4, 3, padding=1)
    own = set(vars(plain))
    block(torch.ones(1, 4, 5, 5))  # a cached kernel must not stay
    block.f, block.i = [-1, 3], 5
    carry_over(block, plain)
    assert set(vars(plain)) - own == {"f", "i"} and plain.i == 5 and not plain.training


def test_an_attribute_with_another_meaning_leaves_the_layer():
    model = net()
    model[0].scaling, model[2].squeeze = 0.5, True
    assert left(orepa.prepare(model)) == {
        "0": "its attribute 'scaling' has another meaning on OREPAConv",
        "2": "its attribute 'squeeze' has another meaning on OREPAConv",
    }


def test_pruned_blocks_keep_attributes():
    model = nn.Sequential(OREPAConv(3, 4, 3), nn.BatchNorm2d(4))
    model[0].i = 7
    pruned = orepa.prune_branches(model, branches={"0": ["avg"]}, tolerance=float("inf"))
    assert pruned[0].i == 7 and not hasattr(pruned[0], "avg_weight")
    assert orepa.prune_branches(model[0], branches={"": ["avg"]}, tolerance=float("inf"), inplace=True) is model[0]
    assert not hasattr(model[0], "avg_weight")


@pytest.mark.parametrize("preserve", [False, True])
def test_a_frozen_bias_keeps_its_value_and_stays_frozen(preserve):
    model = net()
    model[0].bias.requires_grad_(False)
    prepared = orepa.prepare(model, preserve=preserve)
    assert torch.equal(prepared[0].bias, model[0].bias) and not prepared[0].bias.requires_grad
    assert prepared[0].scales.requires_grad and prepared[2].bias.requires_grad
    assert torch.equal(prepared[2].bias, model[2].bias) is preserve
    offline = orepa.prepare(model, {"*": {"topology": "dbb", "offline": True}})
    assert left(offline) == {"0": "an offline block cannot keep a frozen bias"}


def test_what_optimizers_read_from_a_parameter_stays():
    model = net()
    model[0].weight.lr_factor, model[0].bias.lr_factor = 0.1, 2.0
    for name, parameter in orepa.prepare(model)[0].named_parameters():
        assert parameter.lr_factor == (2.0 if name == "bias" else 0.1)


def test_backward_hooks_go_along_and_their_handles_work():
    block, calls = OREPAConv(3, 4, 3), []
    handles = [
        block.register_full_backward_hook(lambda *_: calls.append("after")),
        block.register_full_backward_pre_hook(lambda *_: calls.append("before")),
    ]
    plain = nn.Conv2d(3, 4, 3)
    carry_over(block, plain)
    x = torch.randn(1, 3, 5, 5, requires_grad=True)
    plain(x).sum().backward()
    assert calls == ["before", "after"]
    for handle in handles:
        handle.remove()
    plain(x).sum().backward()
    assert calls == ["before", "after"]


def buffer(conv):
    conv.register_buffer("mask", torch.ones(4))


def parameter(conv):
    conv.gain = nn.Parameter(torch.ones(1))


def child(conv):
    conv.adapter = nn.Linear(2, 2)


def weight_hook(conv):
    conv.weight.register_hook(lambda grad: grad * 0)


def bias_hook(conv):
    conv.bias.register_post_accumulate_grad_hook(lambda p: None)


def state_hook(conv):
    conv.register_state_dict_post_hook(lambda *_: None)


def load_hook(conv):
    conv.register_load_state_dict_pre_hook(lambda *_: None)


def backward_hook(conv):
    conv.register_full_backward_hook(lambda *_: None)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (buffer, "mask was registered on it"),
        (parameter, "gain was registered on it"),
        (child, "adapter was registered on it"),
        (weight_hook, "its parameters have hooks"),
        (bias_hook, "its parameters have hooks"),
        (state_hook, "it has hooks of its state_dict"),
        (load_hook, "it has hooks of its state_dict"),
        (backward_hook, "it has hooks"),
    ],
)
def test_what_a_new_layer_would_lose_leaves_the_layer(change, reason):
    model = net()
    change(model[0])
    for inplace in (False, True):
        prepared = orepa.prepare(model, inplace=inplace)
        assert list(left(prepared)) == ["0"] and left(prepared)["0"].startswith(reason)


@pytest.mark.parametrize("change", [buffer, parameter, state_hook, load_hook])
@pytest.mark.parametrize("at", [0, 1])
def test_what_a_fold_would_lose_prevents_it(change, at):
    model = net()
    change(model[at])
    assert [layer.name for layer in orepa.report(orepa.convert(model.eval())).select("folded")] == ["2"]


# --- numbers that the blocks do not compute with -----------------------------------------------------------------------------


class Mixed(nn.Module):
    """Complex, 8-bit and ordinary convolutions side by side, each with a norm after it."""

    def __init__(self):
        super().__init__()
        self.plain, self.plain_bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.complex, self.complex_bn = nn.Conv2d(4, 4, 1, dtype=torch.complex64), nn.BatchNorm2d(4)
        self.small, self.small_bn = nn.Conv2d(4, 4, 1).to(torch.float8_e4m3fn), nn.BatchNorm2d(4)

    def forward(self, x):
        x = self.complex_bn(self.complex(self.plain_bn(self.plain(x))))
        return self.small_bn(self.small(x))


@pytest.mark.parametrize("policy", [None, {"*": {"topology": "orepa", "offline": True}}])
@pytest.mark.parametrize("preserve", [False, True])
def test_layers_in_other_dtypes_are_left(policy, preserve):
    prepared = orepa.prepare(Mixed(), None if preserve else policy, preserve=preserve)
    assert left(prepared) == {
        "complex": "its weight is of Parameter, torch.complex64",
        "small": "its weight is of Parameter, torch.float8_e4m3fn",
    }
    assert prepared.complex.weight.dtype == torch.complex64


def test_other_kinds_of_parameters_are_left():
    class Quantized(nn.Parameter):
        pass

    model = net()
    model[0].weight = Quantized(model[0].weight.detach())
    assert left(orepa.prepare(model, inplace=True)) == {"0": "its weight is of Quantized, torch.float32"}


# --- norms by type --------------------------------------------------------------------------------------------------------


class Affine(nn.Module):
    """A frozen norm: by default none."""

    def __init__(self, channels):
        super().__init__()
        self.register_buffer("scale", torch.ones(channels))

    def forward(self, x):
        return x * self.scale.view(1, -1, 1, 1)


def test_types_may_be_told_to_count_as_norms():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), Affine(4), nn.Conv2d(4, 4, 1), nn.ReLU())
    assert set(left(orepa.prepare(model))) == {"0", "2"}
    assert set(left(orepa.prepare(model, norm_types=(Affine,)))) == {"2"}
    assert set(left(orepa.prepare(model, norm_types=(nn.ReLU, Affine)))) == set()
