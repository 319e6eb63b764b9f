"""A trace is one state of a model: no norm is folded that another flag, method, mode or draw would change."""

import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._pytree import tree_leaves

import orepa
from orepa.surgery.consumer_graph import Evidence, consumers


def batch_norm():
    norm = nn.BatchNorm2d(3)
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.2, 3.0)
    nn.init.uniform_(norm.weight, 0.5, 2.0)
    nn.init.normal_(norm.bias)
    return norm


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.alt = nn.Conv2d(3, 3, 3, padding=1), batch_norm(), None
        self.flag, self.index = False, 0
        self.build()

    def build(self):
        pass

    def forward(self, x):
        return self.bn(self.conv(x))


# --- flags -----------------------------------------------------------------------------------------------------------------


class Alternative(Net):
    def build(self):
        self.alt = batch_norm()

    def forward(self, x):
        norm = self.alt if self.flag else self.bn
        return norm(self.conv(x))


class DomainNorms(Net):
    def build(self):
        self.bn, self.norms = None, nn.ModuleList([batch_norm(), batch_norm()])

    def forward(self, x):
        return self.norms[int(self.flag)](self.conv(x))


class DomainNorm(nn.Module):
    def __init__(self, chooser):
        super().__init__()
        self.norms, self.chooser = nn.ModuleDict({"a": batch_norm(), "b": batch_norm()}), [chooser]

    def forward(self, x):
        return self.norms["b" if self.chooser[0].flag else "a"](x)


class DomainModule(Net):
    def build(self):
        self.bn = DomainNorm(nn.Identity())
        object.__setattr__(self.bn, "chooser", [self])


class NormSets(Net):
    """The convolution lies in another module than the sets of norms."""

    def build(self):
        self.body = nn.ModuleList([self.conv])
        self.sets = nn.ModuleList([nn.ModuleDict({"first": batch_norm()}) for _ in range(2)])

    def forward(self, x):
        return self.sets[int(self.flag)]["first"](self.body[0](x))


class Wrapped(Net):
    def build(self):
        self.alt = nn.Sequential(batch_norm(), nn.ReLU())

    def forward(self, x):
        x = self.conv(x)
        return self.alt(x) if self.flag else self.bn(x)


class Skipped(Net):
    def forward(self, x):
        x = self.conv(x)
        if not self.flag:
            x = self.bn(x)
        return x


class SkippedInline(Net):
    def forward(self, x):
        x = self.conv(x)
        return x if self.flag else self.bn(x)


class EarlyReturn(Net):
    def forward(self, x):
        x = self.conv(x)
        if self.flag:
            return x
        return self.bn(x)


class ConvSkipped(Net):
    def forward(self, x):
        if not self.flag:
            x = self.conv(x)
        return self.bn(x)


class OtherArm(Net):
    """The other branch uses the convolution once more, without a norm."""

    def forward(self, x):
        if self.flag:
            return torch.relu(self.conv(x))
        return self.bn(self.conv(x))


class LaterArm(Net):
    def forward(self, x):
        y = self.bn(self.conv(x))
        if self.flag:
            y = y + self.conv(x)
        return y


class Looped(Net):
    def build(self):
        self.layers = nn.ModuleList([self.conv, self.bn])

    def forward(self, x):
        for i, layer in enumerate(self.layers):
            if self.flag and i:
                break
            x = layer(x)
        return x


class Sliced(Net):
    def build(self):
        self.layers, self.end = nn.ModuleList([self.conv, self.bn]), None

    def forward(self, x):
        for layer in self.layers[: 1 if self.flag else None]:
            x = layer(x)
        return x


class Maybe(nn.Module):
    def __init__(self, norm, chooser):
        super().__init__()
        self.norm, self.chooser = norm, [chooser]

    def forward(self, x):
        return x if self.chooser[0].flag else self.norm(x)


class Nested(Net):
    def build(self):
        self.bn = Maybe(batch_norm(), nn.Identity())
        object.__setattr__(self.bn, "chooser", [self])


class Noise(nn.Module):
    def __init__(self):
        super().__init__()
        self.amount = 0.0

    def forward(self, x):
        return x if self.amount == 0.0 else x * (1 + self.amount)


class Between(Net):
    def build(self):
        self.noise = Noise()

    def forward(self, x):
        return self.bn(self.noise(self.conv(x)))

    def set_flag(self):
        self.noise.amount = 0.5


class Returned(Net):
    def forward(self, x):
        y = self.conv(x)
        z = self.bn(y)
        return y if self.flag else z


class Added(Net):
    def forward(self, x):
        y = self.conv(x)
        z = self.bn(y)
        if self.flag:
            z = z + y
        return z


FLAGS = [Alternative, DomainNorms, DomainModule, NormSets, Wrapped, Skipped, SkippedInline, EarlyReturn, ConvSkipped]
FLAGS += [OtherArm, LaterArm, Looped, Sliced, Nested, Returned, Added]


def untraceable(build):
    class Dynamic(build):
        def forward(self, x):
            return super().forward(x) if x.sum() < 1e9 else x

    return Dynamic


@pytest.mark.parametrize("prepared", [False, True])
@pytest.mark.parametrize("build", [*FLAGS, Between, *map(untraceable, FLAGS)])
def test_flags_decide_about_norms_after_conversion_too(build, prepared):
    x = torch.randn(2, 3, 6, 6)
    model = build().eval()
    if prepared:
        model = orepa.prepare(model, "orepa").eval()
        assert orepa.report(model).swapped or "Dynamic" in str(build), "a norm still counts as following"
    converted = orepa.convert(model, example_inputs=x)
    for net in (model, converted):
        net.flag = True
        getattr(net, "set_flag", lambda: None)()
    with torch.no_grad():
        torch.testing.assert_close(converted(x), model(x), rtol=1e-4, atol=1e-4)


class Tap(Net):
    def build(self):
        self.taps = []

    def forward(self, x):
        self.taps.append(self.conv(x))
        return self.bn(self.taps[-1])


class NamedTap(Net):
    def forward(self, x):
        y = self.conv(x)
        self.taps = {"conv": [y]}
        return self.bn(y)


@pytest.mark.parametrize("build", [Tap, NamedTap, untraceable(Tap), untraceable(NamedTap)])
def test_what_a_forward_stores_is_the_same_after_conversion(build):
    x = torch.randn(2, 3, 6, 6)
    model = build().eval()
    converted = orepa.convert(model, example_inputs=x)
    for net in (model, converted):
        net(x)
    stored = [tree_leaves(net.taps)[-1] for net in (converted, model)]
    torch.testing.assert_close(*stored, rtol=1e-4, atol=1e-4)


# --- other methods -----------------------------------------------------------------------------------------------------------


class Bare(Net):
    def features(self, x):
        return self.conv(x)


class OtherOrder(Net):
    def features(self, x):
        y = self.conv(x)
        return self.bn(y) + y


class Functional(Net):
    def features(self, x):
        return F.conv2d(x, self.conv.weight, self.conv.bias, padding=1)


class OnlyNorm(Net):
    def features(self, x):
        return self.bn(x)


class UpTo(Net):
    def build(self):
        self.layers = nn.Sequential(self.conv, self.bn)

    def forward(self, x):
        return self.layers(x)

    def features(self, x, end=1):
        return self.layers[:end](x)


class Listed(UpTo):
    def features(self, x):
        for layer in list(self.layers)[:1]:
            x = layer(x)
        return x


class Cut(Net):
    def features(self, x):
        return nn.Sequential(*list(self.children())[:1])(x)


class Through(Net):
    """An ancestor reaches into a child."""

    def build(self):
        self.net = Bare()

    def forward(self, x):
        return self.net(x)

    def features(self, x):
        return self.net.conv(x)


class ByName(Net):
    def features(self, x):
        return getattr(self, "co" + "nv")(x)


METHODS = [Bare, OtherOrder, Functional, OnlyNorm, UpTo, Listed, Cut, Through, ByName]


@pytest.mark.parametrize("build", METHODS)
def test_other_methods_compute_the_same_after_conversion(build):
    x = torch.randn(2, 3, 6, 6)
    model = build().eval()
    converted = orepa.convert(model, example_inputs=x)
    with torch.no_grad():
        torch.testing.assert_close(converted.features(x), model.features(x), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(converted(x), model(x), rtol=1e-4, atol=1e-4)


# --- what changes nothing ----------------------------------------------------------------------------------------------------


class Consistent(Net):
    def features(self, x):
        x = self.conv(x)
        x = self.bn(x)
        return x if self.flag else torch.relu(self.bn(self.conv(x)))

    def init_weights(self):
        for module in self.modules():
            nn.init.ones_(module.weight)
        nn.init.zeros_(self.conv.weight)

    def reset(self):
        self.bn.reset_running_stats()
        self.alt = self.conv

    def layers(self):
        return [self.conv, self.bn]

    def fuse(self):
        return torch.nn.utils.fuse_conv_bn_eval(self.conv, self.bn)


class Present(Net):
    """A layer may be absent, and the mode is traced both ways."""

    def build(self):
        self.drop = None

    def forward(self, x):
        x = self.conv(x)
        if self.drop is not None:
            x = self.drop(x)
        if self.bn is not None:
            x = self.bn(x)
        return F.dropout(x, training=self.training) if self.flag else x


class IdleBranch(Net):
    """Layers that are not called, with their own convolution, take nobody's place."""

    def build(self):
        self.head = nn.Sequential(nn.Conv2d(3, 3, 1), batch_norm())


@pytest.mark.parametrize("build", [Consistent, Present, IdleBranch])
def test_flags_and_methods_that_change_nothing_are_no_obstacle(build):
    consumer = consumers(build())["conv"]
    assert (consumer.norm, consumer.direct, consumer.evidence) == ("bn", True, Evidence.GRAPH)
    assert isinstance(orepa.convert(build().eval()).bn, nn.Identity)


# --- modes and random numbers ----------------------------------------------------------------------------------------------


class Auxiliary(Net):
    def build(self):
        self.head = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), batch_norm())

    def forward(self, x):
        x = self.bn(self.conv(x))
        return (x, self.head(x)) if self.training else x


@pytest.mark.parametrize("training", [False, True])
def test_heads_of_one_mode_are_found_in_both(training):
    model = Auxiliary().train(training)
    assert {name for name, c in consumers(model).items() if c.norm} == {"conv", "head.0"}
    assert model.training is model.head.training is training


class EvalOnly(Net):
    def forward(self, x):
        y = self.conv(x)
        return self.bn(y) if self.training else torch.relu(y)


def test_proofs_hold_in_both_modes():
    consumer = consumers(EvalOnly())["conv"]
    assert not (consumer.norm and consumer.direct)


class Targets(Auxiliary):
    """Cannot be traced in train mode."""

    def forward(self, x):
        if self.training and x.sum() > 0:
            return self.head(x)
        return self.bn(self.conv(x))


def test_convolutions_of_a_mode_that_cannot_be_traced_are_looked_up_inside():
    found = consumers(Targets())
    assert found["conv"].direct and found["conv"].is_proven
    assert found["head.0"].norm == "head.1" and not found["head.0"].is_proven


def block():
    return nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), batch_norm())


class LayerDrop(nn.Module):
    def __init__(self, draw, always=False):
        super().__init__()
        self.blocks, self.draw, self.always = nn.ModuleList([block() for _ in range(6)]), draw, always

    def forward(self, x):
        for layer in self.blocks:
            if (self.training or self.always) and self.draw() < 0.5:
                continue
            x = layer(x)
        return x


OWN, OWN_TORCH = random.Random(0), torch.Generator()
DRAWS = [
    random.random,
    np.random.rand,
    lambda: torch.rand(1).item(),
    lambda: float(torch.rand(())),
    lambda: OWN.random(),
]
DRAWS += [
    np.random.default_rng(0).random,
    lambda: torch.rand(1, generator=OWN_TORCH).item(),
]


def all_states():
    return str((random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist(), OWN.getstate()))


@pytest.mark.parametrize("always", [False, True])
@pytest.mark.parametrize("draw", DRAWS)
def test_layer_drop_swaps_all_layers_on_every_rank(draw, always):
    for rank in range(3):
        random.seed(rank), np.random.seed(rank), torch.manual_seed(rank), OWN.seed(rank)
        model, states = LayerDrop(draw, always), all_states()
        found = consumers(model)
        assert all_states() == states
        assert [c.norm for c in found.values()] == [f"blocks.{i}.1" for i in range(6)]
        assert len(orepa.report(orepa.prepare(model, "orepa")).swapped) == 6


def test_random_choices_of_norms_are_no_proof():
    class Chooses(Net):
        def build(self):
            self.alt = batch_norm()

        def forward(self, x):
            y = self.conv(x)
            return self.alt(y) if random.random() < 1e-9 else self.bn(y)

    consumer = consumers(Chooses())["conv"]
    assert not (consumer.direct and consumer.is_proven)
