"""A region is exact, borders included, or refused with its reason."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from rep_blocks import DropPath, MobileOne, QARepVGG, RepConv, RepMixer, conv_bn, randomize
from torch import nn

from orepa.surgery.forward_graph import trace
from orepa.surgery.linear_forward import LinearForward
from orepa.surgery.linear_map import Inexact
from orepa.surgery.linear_regions import Region, find_regions
from orepa.surgery.merge import merge_regions, to_conv2d


def found(model):
    return [region for region in find_regions(model) if not region.problem]


# --- properties ---------------------------------------------------------------------------------------------------------


class Chain(nn.Module):
    """Two sequences of convolutions, added."""

    def __init__(self, first, second):
        super().__init__()
        self.first, self.second = nn.Sequential(*first), nn.Sequential(*second)

    def forward(self, x):
        return self.first(x) - self.second(x)


sizes = st.tuples(st.integers(1, 4), st.integers(1, 4))


@st.composite
def layers(draw, channels, out_channels):
    kind = draw(st.sampled_from(["conv", "conv", "depthwise", "pool", "pad", "norm"]))
    if kind == "pad":
        return nn.ZeroPad2d(draw(st.tuples(*[st.integers(-1, 2)] * 4)))
    if kind == "norm":
        return nn.BatchNorm2d(channels)
    size = draw(sizes)
    stride = draw(st.sampled_from([1, 1, 2, (1, 2)]))
    if kind == "pool":
        padding = tuple(draw(st.integers(0, n // 2)) for n in size)
        return nn.AvgPool2d(size, stride, padding, count_include_pad=draw(st.booleans()))
    groups = channels if kind == "depthwise" else draw(st.sampled_from([1, 2]))
    padding = draw(st.tuples(st.integers(0, 2), st.integers(0, 2)))
    mode = draw(st.sampled_from(["zeros", "zeros", "zeros", "circular"]))
    dilation, bias = draw(st.integers(1, 3)), draw(st.booleans())
    return nn.Conv2d(channels, out_channels, size, stride, padding, dilation, groups, bias, mode)


@st.composite
def chains(draw):
    def branch():
        conv = nn.Conv2d(4, 4, draw(st.sampled_from([1, 3])), padding=draw(st.integers(0, 1)), bias=draw(st.booleans()))
        return [*draw(st.lists(layers(4, 4), max_size=2)), *([conv] if draw(st.booleans()) else [])]

    return Chain(branch(), branch())


@settings(max_examples=150, deadline=None)
@given(model=chains(), size=st.tuples(st.integers(14, 17), st.integers(14, 17)))
def test_what_is_not_refused_is_exact(model, size):
    randomize(model)
    x = torch.randn(1, 4, *size, dtype=torch.float64)
    for region in found(model):
        conv, error = to_conv2d(region)
        assert error < 1e-12
        if region.owner is model:
            torch.testing.assert_close(conv(x), model(x), rtol=0, atol=1e-10)


@settings(max_examples=60, deadline=None)
@given(taps=sizes, padding=st.integers(0, 2), dilation=st.integers(1, 2), bias=st.booleans())
def test_a_sequence_is_refused_only_where_its_border_differs(taps, padding, dilation, bias):
    first = nn.Conv2d(2, 3, taps, 1, padding, dilation, bias=bias)
    model = randomize(nn.Sequential(first, nn.Conv2d(3, 2, 3, padding=1, bias=False)))
    x = torch.randn(1, 2, 9, 9, dtype=torch.float64)
    # What the second one pads with zeros is in the composition what the first one makes of one pixel more of padding.
    wider = F.conv2d(x, first.weight, first.bias, 1, padding + 1, dilation)
    equal = torch.allclose(F.conv2d(wider, model[1].weight), model(x), atol=1e-12)
    forward = LinearForward(trace(model))
    source, *_, sink, _ = forward.nodes
    try:
        Region("", model, forward, source, sink).linear_map()
    except Inexact:
        assert not equal
    else:
        assert equal


# --- what a region knows ------------------------------------------------------------------------------------------------


def names(branch):
    return [f"{layer.kind} {layer.name}" for layer in branch.layers]


def test_a_region_keeps_its_branches():
    model = randomize(RepMixer())
    (region,) = found(model)
    identity, *mixed, norm = region.branches
    assert (identity.factor, identity.layers) == (1.0, ())
    assert (norm.factor, names(norm)) == (-1.0, ["norm norm", "scale mul"])
    assert [branch.factor for branch in mixed] == [1.0] * 5
    assert names(mixed[1]) == ["conv mixer.branches.0.0", "norm mixer.branches.0.1", "scale mul"]
    assert mixed[1].layers[0].module is model.mixer.branches[0][0]
    assert region.convolutions == 4 and region.owner is model and region.name == ""


def test_the_branches_add_up_to_the_kernel():
    (region,) = found(randomize(QARepVGG()))
    total = torch.zeros(4, 4, 3, 3, dtype=torch.float64)
    for branch in region.branches:
        kernel = branch.factor * torch.eye(4, dtype=torch.float64).view(4, 4, 1, 1)
        for layer in branch.layers:
            weight = layer.map.kernel.detach()
            kernel = (
                torch.einsum("omhw,mi->oihw", weight, kernel[:, :, 0, 0]) if layer.kind == "conv" else weight * kernel
            )
        total += F.pad(kernel, [(3 - kernel.shape[-1]) // 2] * 4)
    torch.testing.assert_close(total, region.linear_map().kernel)


def test_a_region_belongs_to_the_smallest_module_that_holds_it():
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.rep, self.norm = nn.ModuleDict({"a": conv_bn(4, 4, 3)}), RepConv(), nn.BatchNorm2d(4)
            self.rep.act = nn.Identity()

        def forward(self, x):
            x = torch.relu(self.inner["a"](x) + x)
            return self.norm(self.rep(x))

    model = nn.Sequential(nn.Identity(), Outer())
    assert sorted((r.name, r.convolutions) for r in found(randomize(model))) == [("1", 1), ("1.rep", 2)]


def test_the_search_leaves_the_model_as_it_was():
    class Counting(RepConv):
        calls = 0

        def forward(self, x):
            self.calls += 1
            self.last = x
            return super().forward(x)

    model = randomize(nn.Sequential(MobileOne(), Counting()))
    before = {name: dict(vars(m)) for name, m in model.named_modules()}
    state = torch.get_rng_state()
    (first, counting) = find_regions(model)
    assert not first.problem and "changes the state" in counting.problem
    assert {name: dict(vars(m)) for name, m in model.named_modules()} == before
    assert torch.equal(torch.get_rng_state(), state)


# --- refusals -----------------------------------------------------------------------------------------------------------


class Two(nn.Module):
    """A 3x3 and a 1x1 branch, to be spoilt in many ways."""

    def __init__(self, **layers):
        super().__init__()
        self.dense = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.point = nn.Conv2d(4, 4, 1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x):
        return torch.relu(self.bn1(self.dense(x)) + self.bn2(self.point(x)))


class SharedNorm(Two):
    def forward(self, x):
        return self.bn1(self.dense(x)) + self.bn1(self.point(x))


class Returned(Two):
    def forward(self, x):
        branch = self.dense(x)
        return branch + self.point(x), branch


class ReadWeight(Two):
    def forward(self, x):
        return (self.dense(x) + self.point(x)) * self.dense.weight.norm()


class CalledTwice(Two):
    def forward(self, x):
        y = torch.relu(self.dense(x))
        return self.dense(y) + self.point(y)


class InPlace(Two):
    def forward(self, x):
        x += self.dense(x)
        return x


class InPlaceAmong(Two):
    def forward(self, x):
        y = self.dense(x)
        x.relu_()
        return y + self.point(x)


class UsedAfterWrite(Two):
    def forward(self, x):
        y = self.dense(x)
        same = self.bn1(y)
        y += self.point(x)
        return same + y


class WrittenBeforeUse(Two):
    def forward(self, x):
        y = self.dense(x)
        z = self.point(x)
        y += z
        return y + self.bn1(y)


class Optional(Two):
    def forward(self, x, mask=None):
        x = self.dense(x) + self.point(x)
        return x if mask is None else x * mask


class Autocast(Two):
    def forward(self, x):
        with torch.autocast("cpu", enabled=False):
            return self.dense(x) + self.point(x)


class Frozen(Two):
    @torch.no_grad()
    def forward(self, x):
        return self.dense(x) + self.point(x)


class Auxiliary(Two):
    def forward(self, x):
        y = self.dense(x) + self.point(x)
        return (y, x) if self.training else torch.relu(y)


class Head(nn.Module):
    """A parent that cannot be traced and uses a layer of its block by itself."""

    def __init__(self):
        super().__init__()
        self.block = Two()

    def forward(self, x):
        return self.block(x) if x.sum() > 0 else self.block.dense(x)


class Penalty(nn.Module):
    def __init__(self):
        super().__init__()
        self.block = Two()

    def forward(self, x):
        return self.block(x), self.block.dense.weight.norm()


class Shared(nn.Module):
    def __init__(self):
        super().__init__()
        self.block, self.dense = Two(), None
        self.dense = self.block.dense

    def forward(self, x):
        return self.dense(self.block(x))


def hooked():
    model = Two()
    model.dense.register_forward_hook(lambda *_: None)
    return model


def watched():
    model = Two()
    model.bn2.register_full_backward_hook(lambda *_: None)
    return model


def replaced():
    model = Two()
    model.dense.forward = model.dense.forward
    return model


def parametrized():
    model = Two()
    nn.utils.parametrizations.weight_norm(model.dense)
    return model


def tied():
    model = nn.Sequential(Two(), nn.ReLU(), nn.Conv2d(4, 4, 3))
    model[2].weight = model[0].dense.weight
    return model


def trained(model, name):
    model = randomize(model)
    model.get_submodule(name).train()
    return model


class Standardized(nn.Conv2d):
    def forward(self, x):
        return F.conv2d(x, self.weight - self.weight.mean(), padding=self.padding)


REFUSED = {
    "a bias before padding": (
        lambda: Two(dense=nn.Sequential(nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 3, padding=1))),
        "comes before zero padding",
    ),
    "a norm before padding": (
        lambda: Two(dense=nn.Sequential(nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, padding=1))),
        "comes before zero padding",
    ),
    "a bias before a padding layer": (
        lambda: Two(dense=nn.Sequential(nn.Conv2d(4, 4, 1), nn.ZeroPad2d(1), nn.Conv2d(4, 4, 3))),
        "comes before zero padding",
    ),
    "padding twice": (
        lambda: Two(
            dense=nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.Conv2d(4, 4, 3, padding=1, bias=False))
        ),
        "follows a padded layer",
    ),
    "reflection of a larger layer": (
        lambda: Two(
            dense=nn.Sequential(nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3, padding=2, padding_mode="reflect", bias=False))
        ),
        "'reflect' padding follows",
    ),
    "padding modes": (
        lambda: Two(point=nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular")),
        "pad in different modes: circular, zeros",
    ),
    "a stride in one branch": (lambda: Two(point=nn.Conv2d(4, 4, 1, stride=2)), "have strides (1, 1) and (2, 2)"),
    "other sizes": (lambda: Two(point=nn.Conv2d(4, 4, 3)), "outputs of different sizes"),
    "channels that broadcast": (
        lambda: Two(point=nn.Conv2d(4, 1, 1), bn2=nn.BatchNorm2d(1)),
        "have 4 and 1 channels",
    ),
    "averages without padding": (
        lambda: Two(point=nn.AvgPool2d(3, 1, 1, count_include_pad=False)),
        "does not count the padding",
    ),
    "the cost": (
        lambda: Two(dense=nn.Conv2d(4, 4, 3, padding=1, groups=4)),
        "would take 2.8 times the multiplications",
    ),
    "train mode": (lambda: trained(Two(), "bn2"), "bn2: it is in train mode"),
    "statistics of the input": (
        lambda: Two(bn2=nn.BatchNorm2d(4, track_running_stats=False)),
        "bn2: it normalizes with the statistics of its input",
    ),
    "dropout in train mode": (lambda: trained(Two(point=nn.Dropout()), "point"), "it drops values in train mode"),
    "a shared norm": (SharedNorm, "bn1 is called 2 times"),
    "a branch that is returned": (Returned, "the value of dense goes to output, too"),
    "a weight that is read": (ReadWeight, "the forward reads the parameters of dense"),
    "a convolution of two calls": (CalledTwice, "dense is called 2 times"),
    "a write into the input": (InPlace, "writes into the input in place"),
    "a write among the branches": (InPlaceAmong, "writes in place among the branches"),
    "a write to what is used after it": (lambda: UsedAfterWrite(bn1=nn.Identity()), "is used after it"),
    "hooks": (hooked, "dense: it has hooks"),
    "hooks of the backward pass": (watched, "bn2: it has hooks"),
    "a forward of the instance": (replaced, "dense: its forward was replaced on the instance"),
    "a parametrized weight": (parametrized, "dense: its weight is parametrized"),
    "a class of its own": (
        lambda: Two(dense=Standardized(4, 4, 3, padding=1)),
        "Standardized has a forward of its own",
    ),
    "a tied weight": (tied, "dense shares its parameters"),
    "optional arguments": (Optional, "optional arguments"),
    "autocast": (Autocast, "switches gradients or autocast"),
    "a decorator": (Frozen, "switches gradients or autocast"),
    "another forward in train mode": (Auxiliary, "another one in train mode"),
    "a parent that calls a layer": (Head, "its parent may use block in another way"),
    "a parent that reads a weight": (Penalty, "the model uses its layers without a call of block"),
    "a layer of two modules": (Shared, "dense stands in another module, too"),
    "several dtypes": (lambda: Two(point=nn.Conv2d(4, 4, 1).half()), "several dtypes"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_exact_is_refused_with_its_reason(name):
    build, reason = REFUSED[name]
    model = build()
    if not any(m.training is False for m in model.modules()):
        model.eval()
        for m in model.modules():
            if isinstance(m, nn.BatchNorm2d):
                nn.init.normal_(m.bias)
    before = [t.clone() for t in model.state_dict().values()]
    rewrite = merge_regions(model)
    assert not rewrite.replacements
    assert any(reason in region.problem for region in rewrite.left), [region.problem for region in rewrite.left]
    assert all(map(torch.equal, before, model.state_dict().values()))


def test_values_that_are_no_sum_of_branches_are_not_mentioned():
    class Bottleneck(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(conv_bn(4, 4, 3), nn.ReLU(), conv_bn(4, 4, 3))
            self.down = conv_bn(4, 4, 1)

        def forward(self, x):
            return torch.relu(self.body(x) + self.down(x)) * x

    assert find_regions(randomize(nn.Sequential(Bottleneck(), Bottleneck()))) == []


def test_sums_in_place_are_read_where_nobody_else_sees_them():
    (region,) = found(randomize(WrittenBeforeUse()))
    assert region.convolutions == 2 and to_conv2d(region)[1] < 1e-12


def test_dropout_is_nothing_in_eval_mode():
    model = randomize(Two(point=nn.Sequential(nn.Conv2d(4, 4, 1), nn.Dropout(), DropPath())))
    assert len(found(model)) == 1
