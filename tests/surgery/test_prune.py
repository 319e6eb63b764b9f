"""`orepa.prune_branches`: fewer branches, the same function within a tolerance, and a block that still trains."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from strategies import MIXED_TOPOLOGIES, geometries, image, perturb
from torch import nn
from torch.nn.utils import parametrizations

import orepa
from orepa.surgery import prune
from orepa.topology import Branch, Conv, ConvSpec, Nested, Topology

pytestmark = pytest.mark.usefixtures("one_thread")


def names(conv: orepa.OREPAConv) -> list[str]:
    return [branch.name for branch in orepa.analyze(conv).layers[0].branches]


def inner(spec: ConvSpec) -> Topology:
    return Topology(a=Branch(Conv(3)), centre=Branch(Conv(1), scale=0.5))


def outer(spec: ConvSpec) -> Topology:
    """Blocks in a block in a block, beside two branches."""
    return Topology(
        a=Branch(Conv(5)),
        stack=Branch(Nested(inner, 3, 9), Nested(middle, 3)),
        last=Branch(Conv(1), scale=None),
    )


def middle(spec: ConvSpec) -> Topology:
    return Topology(deep=Branch(Nested(inner, 3)), centre=Branch(Conv(1)))


# --- any block --------------------------------------------------------------------------------------------------------------


@settings(max_examples=30)
@given(
    geometry=geometries(),
    topology=st.sampled_from(MIXED_TOPOLOGIES),
    scaling=st.sampled_from(["vector", "scalar", "none"]),
    exponents=st.lists(st.integers(0, 6), min_size=6, max_size=6),
    tolerance=st.sampled_from([0.0, 1e-5, 1e-3, 0.1, 0.7, math.inf]),
)
def test_any_block(
    geometry: dict[str, Any], topology: str, scaling: str, exponents: list[int], tolerance: float
) -> None:
    try:
        conv = orepa.OREPAConv(**geometry, topology=topology, scaling=scaling, dtype=torch.float64)
    except ValueError:
        assume(False)
    perturb(conv)
    with torch.no_grad():
        for exponent, row in zip(exponents, () if conv.scales is None else conv.scales, strict=False):
            row.mul_(0.0 if exponent == 6 else 10.0**-exponent)
    expected = orepa.analyze(conv, tolerance)
    going = set(expected.prunable.get("", ()))
    pruned = orepa.prune_branches(conv, tolerance)
    assert isinstance(pruned, orepa.OREPAConv)

    # the branches that the analysis named, no others, and never all
    remaining = [name for name in names(conv) if name not in going]
    assert names(pruned) == remaining != []
    assert math.isinf(tolerance) <= (len(remaining) == 1)
    assert len(pruned.plan.terms) == len(remaining)

    # the function
    x = image(conv)
    whole, rest = conv.squeeze().detach(), pruned.squeeze().detach()
    if not math.isinf(tolerance):
        assert float((whole - rest).norm()) <= tolerance * float(whole.norm()) + 1e-12 * float(whole.norm())
    outputs: dict[str, torch.Tensor] = {}
    conv.run_branches(conv.pad(x), conv.stride, conv.dilation, outputs.__setitem__)
    y = sum(outputs[name] for name in remaining) + (0 if conv.bias is None else conv.bias.view(1, -1, 1, 1))
    torch.testing.assert_close(pruned(x), y, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(pruned.forward_branches(x), y, rtol=1e-9, atol=1e-9)

    # what `report` tells
    (layer,) = orepa.report(pruned).layers
    assert layer.action == ("pruned" if going else "left")
    if going:
        assert all(name in layer.detail for name in going) and layer.error is not None
        assert layer.error == pytest.approx(expected.layers[0].change, abs=1e-10)
        assert orepa.report(pruned).parameters[1] < orepa.report(pruned).parameters[0] or scaling == "none"

    # it trains
    pruned(x).square().sum().backward()
    assert all(p.grad is not None and bool(torch.isfinite(p.grad).all()) for p in pruned.parameters())


@pytest.mark.parametrize("topology", ["orepa", "ecb", outer])
@pytest.mark.parametrize("scaling", ["vector", "scalar", "none"])
def test_a_pruned_block_is_a_block_like_any_other(topology: Any, scaling: str) -> None:
    size = 5 if topology is outer else 3
    conv = orepa.OREPAConv(6, 6, size, padding=1, groups=3, topology=topology, scaling=scaling, dtype=torch.float64)
    perturb(conv)
    first, *_, last = names(conv)
    pruned = orepa.prune_branches(conv, math.inf, branches={"": [last, first]}).eval()
    x = torch.randn(2, 6, 9, 8, dtype=torch.float64)
    with torch.no_grad():
        y = pruned(x)
        assert pruned._cached is not None and torch.equal(pruned(x), y)
        for twin in (copy.deepcopy(pruned), pickle.loads(pickle.dumps(pruned))):
            assert torch.equal(twin(x), y) and names(twin) == names(pruned)
            assert orepa.report(twin).operation == "prune"
        torch.testing.assert_close(orepa.convert(pruned)(x), y)
        torch.testing.assert_close(pruned.forward_branches(x), y)

        # a state dict for a model that is built anew and pruned alike
        fresh = orepa.OREPAConv(
            6, 6, size, padding=1, groups=3, topology=topology, scaling=scaling, dtype=torch.float64
        )
        fresh = orepa.prune_branches(fresh, math.inf, branches={"": [first, last]}).eval()
        assert not torch.equal(fresh(x), y)
        fresh.load_state_dict(pruned.state_dict())
        assert torch.equal(fresh(x), y)

        # the cache notices a change, and new initial values can be drawn
        pruned.reset_parameters()
        assert not torch.equal(pruned(x), y)

    optimizer = torch.optim.SGD(pruned.train().parameters(), 1e-3)
    losses = []
    for _ in range(3):
        loss = pruned(x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[2] < losses[1] < losses[0]


def test_initial_values_of_what_stays_are_those_of_the_topology() -> None:
    conv = orepa.OREPAConv(6, 6, 3, dtype=torch.float64)
    pruned = orepa.prune_branches(conv, math.inf, branches={"": ["origin", "prior"]})
    perturb(pruned)
    pruned.reset_parameters()
    assert pruned.scales[:, 0].tolist() == [0.25, 0.5, 1.0, 0.5]
    assert not bool(pruned.conv1x1_kxk_conv1.any()) and 0 < pruned.avg_weight.abs().max().item() <= 1


def test_zeros_go_without_any_change() -> None:
    conv = orepa.OREPAConv(6, 4, 3, groups=2, dtype=torch.float64)
    perturb(conv)
    with torch.no_grad():
        conv.scales[[0, 2, 5]] = 0
    pruned = orepa.prune_branches(conv, 0)
    (layer,) = orepa.report(pruned).layers
    assert names(pruned) == ["avg", "conv1x1_kxk", "conv1x1"] and layer.error == 0
    assert torch.equal(pruned.squeeze(), conv.squeeze())
    assert torch.equal(pruned.scales, conv.scales[[1, 3, 4]])


def test_a_block_of_zeros_keeps_its_first_branch() -> None:
    conv = orepa.OREPAConv(6, 4, 3)
    nn.init.zeros_(conv.scales)
    pruned = orepa.prune_branches(conv)
    assert names(pruned) == ["origin"] and not bool(pruned.squeeze().any())


def test_again_and_the_name_of_the_topology() -> None:
    conv = orepa.OREPAConv(6, 6, 3)
    once = orepa.prune_branches(conv)
    assert once.topology == "orepa[origin+avg+conv1x1_kxk+conv1x1+dws]"
    assert once.topology in repr(once)
    assert (
        orepa.report(orepa.prune_branches(once)).left[0].detail == "every branch changes the kernel by more than 0.001"
    )
    twice = orepa.prune_branches(once, math.inf, branches={"": ["dws", "avg"]})
    assert twice.topology == "orepa[origin+conv1x1_kxk+conv1x1]"


def test_what_a_block_keeps() -> None:
    conv = orepa.OREPAConv(6, 6, 3, stride=2, padding=2, dilation=2, padding_mode="reflect", backend="reference")
    conv = conv.to(torch.bfloat16, memory_format=torch.channels_last).eval()
    pruned = orepa.prune_branches(conv)
    for name in ("stride", "padding", "dilation", "padding_mode", "backend", "scaling", "training"):
        assert getattr(pruned, name) == getattr(conv, name), name
    assert pruned.origin_weight.dtype == pruned.scales.dtype == torch.bfloat16
    assert pruned.origin_weight.is_contiguous(memory_format=torch.channels_last)
    assert pruned.scales.requires_grad and pruned.scales.grad_fn is None
    x = torch.randn(1, 6, 9, 9, dtype=torch.bfloat16)
    assert torch.equal(pruned(x), conv(x))
    priors = orepa.prune_branches(conv, math.inf, branches={"": ["origin", "avg", "dws"]})
    assert torch.equal(priors.prior_filter, conv.prior_filter) and priors.prior_filter.dtype == torch.float32


# --- models -----------------------------------------------------------------------------------------------------------------


class Net(nn.Module):
    """A module used twice, a RepVGG block, a stem of nested blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = orepa.OREPAConv(3, 4, 7, padding=3, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.block = orepa.RepVGGBlock(4, 4)
        self.twice = orepa.OREPAConv(4, 4, 3, padding=1)
        self.again = self.twice

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.again(self.twice(self.block(self.norm(self.stem(x)))))


def test_a_model() -> None:
    model = Net().double().eval()
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    expected, random = model(x), torch.get_rng_state()
    state = copy.deepcopy(model.state_dict())
    pruned = orepa.prune_branches(model)
    report = orepa.report(pruned)
    assert torch.equal(random, torch.get_rng_state())
    assert [(layer.name, layer.action) for layer in report.layers] == [
        ("stem", "left"),
        ("block.dense", "pruned"),
        ("twice", "pruned"),
    ]
    assert report.layers[0].detail == "it has one branch only"
    assert report.layers[1].detail == "prior (keeps origin, avg, conv1x1_kxk, dws)"
    assert "prune: 1 left, 2 pruned; parameters" in str(report)
    assert pruned.again is pruned.twice and torch.equal(pruned(x), expected)
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())  # a copy was pruned
    assert names(model.twice) == names(Net().twice)
    torch.testing.assert_close(orepa.convert(pruned, example_inputs=x)(x), expected)

    choice = orepa.analyze(model).prunable
    fresh = orepa.prune_branches(Net().double(), math.inf, branches=choice)
    fresh.load_state_dict(pruned.state_dict())
    assert torch.equal(fresh.eval()(x), expected)


def test_in_place() -> None:
    model = Net()
    before = dict(model.named_parameters())
    assert orepa.prune_branches(model, inplace=True) is model
    after = dict(model.named_parameters())
    assert before.keys() - after.keys() == {"twice.prior_weight", "block.dense.prior_weight"}
    assert {name for name in after if after[name] is not before[name]} == {"twice.scales", "block.dense.scales"}


def test_on_the_meta_device() -> None:
    with pytest.raises(ValueError, match="meta device"):
        orepa.prune_branches(orepa.OREPAConv(3, 4, 3, device="meta"))


# --- what is left alone -----------------------------------------------------------------------------------------------------


class Custom(orepa.OREPAConv):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x).relu()


def _custom() -> nn.Module:
    return nn.Sequential(Custom(4, 4, 3))


def _hooked() -> nn.Module:
    model = nn.Sequential(orepa.OREPAConv(4, 4, 3))
    model[0].register_forward_hook(lambda *_: None)
    return model


def _patched() -> nn.Module:
    model = nn.Sequential(orepa.OREPAConv(4, 4, 3))
    model[0].forward = model[0].forward_branches
    return model


def _frozen() -> nn.Module:
    model = nn.Sequential(orepa.OREPAConv(4, 4, 3))
    model[0].avg_weight.requires_grad_(False)
    return model


def _shared() -> nn.Module:
    model = nn.Sequential(orepa.OREPAConv(4, 4, 3), nn.Conv2d(4, 4, 3))
    model[1].weight = model[0].origin_weight
    return model


def _parametrized() -> nn.Module:
    model = nn.Sequential(orepa.OREPAConv(4, 4, 3))
    parametrizations.weight_norm(model[0], "origin_weight")
    return model


def _added() -> nn.Module:
    model = nn.Sequential(orepa.OREPAConv(4, 4, 3))
    model[0].adapter = nn.Linear(2, 2)
    return model


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (_custom, "Custom may compute something else"),
        (_hooked, "it has hooks"),
        (_patched, "its forward was replaced"),
        (_frozen, "frozen"),
        (_shared, "shares a parameter"),
        (_parametrized, "parametrized"),
        (_added, "something was added"),
    ],
)
def test_layers_left_alone(build: Any, reason: str) -> None:
    model = build()
    (layer,) = orepa.report(orepa.prune_branches(model)).layers
    assert layer.action == "left" and reason in layer.detail and layer.error is None
    with pytest.raises(ValueError, match="branches: '0' cannot be pruned: "):
        orepa.prune_branches(model, branches={"0": ["prior"]})


# --- mistakes, and results that are wrong -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("branches", "message"),
    [
        ({"1": ["prior"]}, "the model has no OREPAConv '1'"),
        ({"0": ["prior", "posterior"]}, "'0' has origin, avg, prior, conv1x1_kxk, conv1x1, dws; got posterior"),
        ({"0": "prior"}, "got prior"),
        ({"0": ["origin", "avg", "prior", "conv1x1_kxk", "conv1x1", "dws"]}, "one branch of '0' must stay"),
    ],
)
def test_branches_that_cannot_be_taken_out(branches: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        orepa.prune_branches(nn.Sequential(orepa.OREPAConv(4, 4, 3)), branches=branches)


@pytest.mark.parametrize("tolerance", [-1.0, math.nan])
def test_bad_tolerances(tolerance: float) -> None:
    with pytest.raises(ValueError, match="tolerance must be a number from 0 on"):
        orepa.prune_branches(nn.Sequential(), tolerance)


def test_damaged_parameters() -> None:
    model = nn.Sequential(orepa.OREPAConv(4, 4, 3), orepa.OREPAConv(4, 4, 3))
    nn.init.constant_(model[1].scales, math.inf)
    first = model[0]
    with pytest.raises(ValueError, match="1: the kernel of branch 'origin' is not finite"):
        orepa.prune_branches(model, inplace=True)
    assert model[0] is first


def test_branches_that_matter() -> None:
    model = nn.Sequential(orepa.OREPAConv(4, 4, 3), orepa.OREPAConv(4, 4, 3))
    first, second = model
    with pytest.raises(orepa.ConversionError, match="1: without origin the kernel changes by .* allowed is"):
        orepa.prune_branches(model, inplace=True, branches={"0": ["prior"], "1": ["origin"]})
    assert model[0] is first and model[1] is second
    pruned = orepa.prune_branches(model, inplace=True, branches={"0": ["prior"], "1": []})
    assert [layer.detail for layer in orepa.report(pruned).left] == ["not asked for"]


def test_a_wrong_result_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    build = prune._without

    def wrong(conv: orepa.OREPAConv, going: Any) -> orepa.OREPAConv:
        new = build(conv, going)
        with torch.no_grad():
            new.scales = nn.Parameter(new.scales * (1 + 1e-6))
        return new

    model = nn.Sequential(orepa.OREPAConv(4, 4, 3))
    monkeypatch.setattr(prune, "_without", wrong)
    with pytest.raises(orepa.ConversionError, match="0: the pruned block is not the old one without prior"):
        orepa.prune_branches(model, inplace=True)
    monkeypatch.setattr(prune, "_without", build)
    monkeypatch.setattr(prune, "select_prunable", lambda *_: [0, 1])  # a choice that ignores the tolerance
    with pytest.raises(orepa.ConversionError, match="without origin, avg the kernel changes by"):
        orepa.prune_branches(model, inplace=True)
    assert names(model[0])[0] == "origin"
