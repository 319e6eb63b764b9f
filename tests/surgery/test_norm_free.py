"""Convolutions that no norm follows: left by default, swapped where the policy or ``norm`` asks for it."""

import functools

import pytest
import torch
from torch import nn

import orepa
from orepa import OREPAConv
from orepa.topology import catalogue
from orepa.topology.language import Branch, Conv, Topology, is_norm_free


class SuperResolution(nn.Module):
    """Two times as large, as such nets are built: no norms, a shortcut, pixels out of channels."""

    def __init__(self, width=8):
        super().__init__()
        self.head = nn.Conv2d(3, width, 3, padding=1)
        self.body = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1), nn.PReLU(), nn.Conv2d(width, width, 3, padding=1)
        )
        self.tail = nn.Sequential(nn.Conv2d(width, 12, 3, padding=1), nn.PixelShuffle(2))

    def forward(self, x):
        x = self.head(x)
        return self.tail(self.body(x) + x)


def swapped(model):
    return [layer.name for layer in orepa.report(model).swapped]


ALL = ["head", "body.0", "body.2", "tail.0"]


@pytest.mark.parametrize(
    ("policy", "norm", "expected"),
    [
        (None, "auto", []),
        (None, "any", ALL),
        ("orepa", "auto", []),
        ("orepa", "required", []),
        ("orepa", "any", ALL),
        ("ecb", "auto", ALL),
        ("ecb", "required", []),
        ({"*": "ecb"}, "auto", ALL),
        ({"body.*": "sesr", "*": "dbb"}, "auto", ["body.0", "body.2"]),
        ({"head": {"topology": functools.partial(catalogue.ecb, expand=1)}}, "auto", ["head"]),
        ({"head": {"scaling": "none"}}, "auto", []),
        (lambda name, _conv: "ecb" if name == "tail.0" else None, "auto", ["tail.0"]),
        ({"body.*": {"topology": "ecb", "offline": True}}, "auto", ["body.0", "body.2"]),
    ],
)
def test_who_is_swapped(policy, norm, expected):
    model = orepa.prepare(SuperResolution(), policy, norm=norm)
    assert swapped(model) == expected
    assert all(
        "(no norm follows)" in layer.detail or "offline" in layer.detail for layer in orepa.report(model).swapped
    )
    left = [layer for layer in orepa.report(model).left if layer.detail.startswith("no norm follows")]
    assert bool(orepa.report(model).note) == (bool(left) and norm == "auto" and policy is not None)
    if orepa.report(model).note:
        assert str(orepa.report(model)).endswith('norm="any" swaps them, too.')
        assert orepa.report(model).note.startswith(f"{len(left)} left")


@pytest.mark.parametrize("policy", ["ecb", "orepa", "dbb"])
def test_the_function_stays_through_training_and_conversion(policy):
    torch.manual_seed(0)
    model, x = SuperResolution().double(), torch.randn(2, 3, 9, 10, dtype=torch.float64)
    prepared = orepa.prepare(model, policy, preserve=True, norm="any")
    assert swapped(prepared) == ALL
    torch.testing.assert_close(prepared(x), model(x), rtol=1e-10, atol=1e-10)
    optimizer = torch.optim.SGD(prepared.parameters(), lr=1e-2)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = prepared(x).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    plain = orepa.convert(prepared.eval(), example_inputs=x)
    assert not any(isinstance(module, OREPAConv) for module in plain.modules())
    torch.testing.assert_close(plain(x), prepared(x), rtol=1e-10, atol=1e-10)


def test_topologies_of_ones_own():
    def declare(spec):
        return Topology(origin=Branch(Conv(spec.kernel_size)), point=Branch(Conv(1)))

    assert not is_norm_free(declare)
    assert swapped(orepa.prepare(SuperResolution(), {"*": declare})) == []
    orepa.register_topology("norm_free_of_a_test", norm_free=True)(declare)
    for policy in ({"*": declare}, "norm_free_of_a_test"):
        assert swapped(orepa.prepare(SuperResolution(), policy)) == ALL


def test_a_layer_that_is_not_called_stays():
    model = SuperResolution()
    model.spare = nn.Conv2d(3, 3, 3)
    prepared = orepa.prepare(model, "ecb")
    assert swapped(prepared) == ALL
    assert [layer.name for layer in orepa.report(prepared).left] == ["spare"] and not orepa.report(prepared).note


def test_another_value_is_refused():
    with pytest.raises(ValueError, match="norm must be one of auto, required, any, got 'none'"):
        orepa.prepare(SuperResolution(), norm="none")
