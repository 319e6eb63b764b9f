"""References to a swapped layer beside the tree of modules: what uses them runs the new layer, or the layer is left."""

from __future__ import annotations

import functools
import gc
import weakref
from collections import OrderedDict, deque, namedtuple
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn
from trained import perturbed

import orepa
from orepa import OREPAConv
from orepa.surgery.references import find_references
from orepa.surgery.replace import copy_model, replace_modules

Pair = namedtuple("Pair", "conv bn")


@dataclass
class Step:
    layer: nn.Module

    def __call__(self, x):
        return self.layer(x)


@dataclass(frozen=True)
class FrozenStep:
    layer: nn.Module

    def __call__(self, x):
        return self.layer(x)


class Slotted:
    __slots__ = ("empty", "layer")

    def __init__(self, layer):
        self.layer = layer

    def __call__(self, x):
        return self.layer(x)


def call(layer, x):
    return layer(x)


def call_weak(reference, x):
    return reference()(x)


def closure(layer):
    def run(x):
        return layer(x) if x is not None else unbound  # a cell that stays empty

    if layer is None:
        unbound = None
    return run


def one_closure(conv, bn):
    layers = [conv, bn]
    return [lambda x: layers[0](x), lambda x: layers[1](x)]


def recursive(conv, bn):
    layers = [conv, bn]

    def run(x, index=0):
        return x if index == len(layers) else run(layers[index](x), index + 1)

    return [run]


#: containers of callables
HOLDERS = {
    "list": lambda conv, bn: [conv, bn],
    "tuple": lambda conv, bn: (conv, bn),
    "named tuple": Pair,
    "deque": lambda conv, bn: deque([conv, bn]),
    "dict keys": lambda conv, bn: OrderedDict([(conv, 0), (bn, 1)]),
    "partial": lambda conv, bn: [functools.partial(conv), functools.partial(call, bn)],
    "partial keyword": lambda conv, bn: [functools.partial(lambda x, layer: layer(x), layer=m) for m in (conv, bn)],
    "call": lambda conv, bn: [conv.__call__, bn.__call__],
    "forward": lambda conv, bn: [conv.forward, bn.forward],
    "forward in partial": lambda conv, bn: (functools.partial(conv.forward), Slotted(bn.forward)),
    "forward in closure": lambda conv, bn: [closure(conv.forward), lambda x, f=bn.forward: f(x)],
    "forward as key": lambda conv, bn: {conv.forward: 0, bn.forward: 1},
    "forward in deque": lambda conv, bn: deque([conv.forward, functools.partial(call, bn.forward)]),
    "closure": lambda conv, bn: [closure(conv), closure(bn)],
    "one closure": one_closure,
    "recursive": recursive,
    "closure in closure": lambda conv, bn: [closure(closure(conv)), closure(functools.partial(bn))],
    "default": lambda conv, bn: [lambda x, layer=conv: layer(x), lambda x, *, layer=bn: layer(x)],
    "dataclass": lambda conv, bn: [Step(conv), Step(bn)],
    "frozen dataclass": lambda conv, bn: (FrozenStep(conv), FrozenStep(bn)),
    "slots": lambda conv, bn: [Slotted(conv), Slotted(bn)],
    "weak": lambda conv, bn: [functools.partial(call_weak, weakref.ref(m)) for m in (conv, bn)],
    "method of a holder": lambda conv, bn: [Step(conv).__call__, functools.partial(Slotted.__call__, Slotted(bn))],
}


class Net(nn.Module):
    def __init__(self, hold: Any):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.tail = nn.Sequential(nn.Conv2d(6, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6))
        self.steps = hold(self.conv1, self.bn1)

    def forward(self, x):
        if x.sum() > 1e9:  # cannot be traced
            return x
        for step in self.steps:
            x = step(x)
        return self.tail(torch.relu(x)).mean((2, 3))


def names(model):
    return {layer.name for layer in orepa.report(model).swapped}


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("holder", HOLDERS)
def test_what_holds_a_layer_goes_on_with_the_new_one(holder, inplace):
    net, x = perturbed(Net(HOLDERS[holder])).train(), torch.randn(4, 3, 8, 8)
    expected = net.eval()(x).detach()
    prepared = orepa.prepare(net, preserve=True, inplace=inplace)
    assert (prepared is net) is inplace and names(prepared) == {"conv1", "tail.0"}
    torch.testing.assert_close(prepared(x), expected, rtol=1e-4, atol=1e-5)
    (prepared.train()(x) ** 2).sum().backward()
    assert all(p.grad is not None for p in prepared.parameters())
    if not inplace:
        assert all(p.grad is None for p in net.parameters()), "the copy ran layers of the model"
        assert torch.equal(net.eval()(x), expected)
    perturbed(prepared)
    expected = prepared(x).detach()
    plain = orepa.convert(prepared, inplace=inplace)
    assert not any(isinstance(m, OREPAConv) for m in plain.modules())
    torch.testing.assert_close(plain(x), expected, rtol=1e-4, atol=1e-5)
    if inplace:
        gc.collect()
        with torch.no_grad():
            plain.conv1.weight.zero_()
            assert not torch.allclose(plain(x), expected), "what runs is not what is registered"


class Aliased(nn.Module):
    """Several names, a list of modules and a dictionary for one layer."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.alias, self.layers = self.conv, nn.ModuleList([self.conv, self.bn])
        self.by_name, self.seen = {"conv": self.conv}, {self.conv, self.bn}

    def forward(self, x):
        return self.bn(self.by_name["conv"](x))


def test_all_names_of_a_layer_stay_one_layer():
    prepared = orepa.prepare(Aliased())
    conv = prepared.conv
    assert isinstance(conv, OREPAConv) and len(orepa.report(prepared).layers) == 1
    assert prepared.alias is prepared.layers[0] is prepared.by_name["conv"] is conv and conv in prepared.seen


def test_hooks_of_other_modules_see_the_new_layer():
    net = Net(lambda conv, bn: [conv, bn])
    calls = []
    net.tail.register_forward_hook(lambda *_, conv=net.conv1: calls.append(type(conv)))
    net.tail.register_forward_pre_hook(functools.partial(lambda net, *_: calls.append(type(net.conv1)), net))
    orepa.prepare(net)(torch.randn(2, 3, 8, 8))
    assert calls == [OREPAConv, OREPAConv], "of the copy"


# --- what cannot follow ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("attribute", "reason"),
    [
        (lambda net: [net.conv1.weight], "extra holds its weight"),
        (lambda net: {"conv1.bias": net.conv1.bias}, "extra holds its bias"),
        (lambda net: [{"params": (net.conv1.weight,)}], "extra holds its weight"),
        (lambda net: torch.optim.SGD(net.conv1.parameters(), lr=0.1), "extra holds its weight"),
        (lambda net: net.conv1._conv_forward, "extra holds its method _conv_forward"),
        (lambda net: functools.partial(net.conv1._conv_forward), "extra holds its method _conv_forward"),
        (lambda net: Slotted(net.conv1.reset_parameters), "extra holds its method reset_parameters"),
    ],
)
@pytest.mark.parametrize("inplace", [False, True])
def test_a_layer_whose_parts_are_held_is_left(attribute, reason, inplace):
    net = Net(lambda conv, bn: [conv, bn])
    net.tail.extra = attribute(net)
    prepared = orepa.prepare(net, inplace=inplace)
    left = {layer.name: layer.detail for layer in orepa.report(prepared).left}
    assert left == {"conv1": f"tail.{reason}"} and names(prepared) == {"tail.0"}


def test_registered_and_foreign_parameters_are_not_held():
    net = Net(lambda conv, bn: [conv, bn])
    net.extra = [nn.Parameter(torch.ones(1)), net.bn1.weight, net.conv1.weight.shape]
    net.parts = nn.ParameterList([nn.Parameter(torch.ones(2))])
    assert names(orepa.prepare(net)) == {"conv1", "tail.0"}


def test_a_replacement_is_refused_by_name_and_nothing_changes():
    net = orepa.prepare(Net(lambda conv, bn: [conv, bn]))
    net.extra = [net.tail[0].squeeze]
    plain = {module: module.to_conv2d() for module in (net.conv1, net.tail[0])}
    with pytest.raises(ValueError, match=r"tail\.0 cannot be replaced: extra holds its method squeeze"):
        replace_modules(net, plain)
    assert isinstance(net.conv1, OREPAConv) and isinstance(net.tail[0], OREPAConv)


class SlottedConv(nn.Conv2d):
    __slots__ = ("extra",)


class Sealed(dict):
    def __setitem__(self, key, value):
        raise TypeError("sealed")


def test_a_failing_replacement_leaves_the_model_as_it_was():
    net = perturbed(Net(lambda conv, bn: Sealed({0: conv.forward, 1: bn.forward})))
    net.first, net.forward_of = nn.Conv2d(3, 3, 1), [net.conv1.forward]
    expected = net.conv1(x := torch.randn(2, 3, 8, 8))
    with pytest.raises(ValueError, match="cannot be replaced: sealed"):
        replace_modules(net, {net.first: nn.Identity(), net.conv1: orepa.OREPAConv(3, 6, 3, padding=1)})
    assert type(net.first) is type(net.conv1) is nn.Conv2d
    assert torch.equal(net.conv1(x), expected) and torch.equal(net.forward_of[0](x), expected)


def test_a_class_with_slots_is_left():
    prepared = orepa.prepare(nn.Sequential(SlottedConv(3, 4, 3), nn.BatchNorm2d(4)))
    assert "__slots__" in orepa.report(prepared).left[0].detail


# --- replacements -------------------------------------------------------------------------------------------------------


class Selfish(nn.Module):
    """Knows itself, as modules do that keep a method, a weak reference or a hook with a module."""

    def __init__(self):
        super().__init__()
        self.factor = 2
        self.run, self.me = self.double, weakref.ref(self)
        self._register_load_state_dict_pre_hook(self.note, with_module=True)
        self.loaded = None

    def note(self, module, *_):
        module.loaded = [self]

    def double(self, x):
        return x * self.factor

    def forward(self, x):
        return self.run(x)


def test_a_replacement_knows_itself_as_the_module_in_the_model():
    net = nn.Sequential(nn.ReLU(), nn.Identity())
    relu = net[0]
    replace_modules(net, {relu: Selfish()})
    gc.collect()
    assert net[0] is relu and type(relu) is Selfish and relu.me() is relu
    relu.factor = 3
    assert net(torch.ones(1)) == 3
    net.load_state_dict(net.state_dict())
    assert relu.loaded == [relu]


def test_the_same_call_again_undoes_it():
    net = perturbed(Net(lambda conv, bn: [conv.forward, bn]))
    x = torch.randn(2, 3, 8, 8)
    expected, conv = net(x), net.conv1
    replacements = {conv: nn.Conv2d(3, 6, 1), net.bn1: nn.Identity()}
    changed = replace_modules(net, replacements)(x)
    assert not torch.equal(changed, expected) and isinstance(net.bn1, nn.Identity)
    assert torch.equal(replace_modules(net, replacements)(x), expected) and net.conv1 is conv
    assert torch.equal(replace_modules(net, replacements)(x), changed)


@pytest.mark.parametrize("build", [OREPAConv, orepa.OfflineConv, orepa.RepVGGBlock])
def test_conversion_in_place_changes_the_callers_object(build):
    block, x = perturbed(build(4, 4, 3, padding=1)), torch.randn(2, 4, 6, 6)
    expected = block(x)
    plain = orepa.convert(block, inplace=True)
    assert plain is block and type(block) is (nn.Sequential if build is orepa.RepVGGBlock else nn.Conv2d)
    torch.testing.assert_close(block(x), expected, rtol=1e-4, atol=1e-5)
    assert orepa.report(block).select("converted")


def test_the_search_finds_where_something_is_held():
    net = Net(lambda conv, bn: [conv, bn])
    net.tail.note = {"deep": [(net.conv1.weight,)]}
    convs = [net.conv1, net.tail[0]]
    assert find_references(net, convs) == {net.conv1: "tail.note holds its weight"}
    assert find_references(net, convs, parameters=False) == {}


# --- copies ---------------------------------------------------------------------------------------------------------------


def test_a_part_that_cannot_be_copied_is_named():
    net = Net(lambda conv, bn: [conv, bn])
    net.tail[0].stream = (number for number in range(3))
    with pytest.raises(ValueError, match=r"tail\.0 cannot be copied \(.*generator.*\); pass inplace=True"):
        orepa.prepare(net)
    assert orepa.prepare(net, inplace=True) is net


def test_a_copys_closures_and_weak_references_are_its_own():
    net = Net(lambda conv, bn: [conv, bn])
    outside = []
    net.log = lambda: outside.append(net.conv1)
    net.parent, net.lost = weakref.ref(net), weakref.ref(nn.ReLU())
    net.tools = {"relu": torch.relu, "plain": call, "outside": lambda: outside}
    twin = copy_model(net)
    twin.log()
    assert outside == [twin.conv1] and twin.parent() is twin and twin.lost() is None
    assert twin.tools == net.tools, "what does not lead to the model is shared, as in copy.deepcopy"


def test_functions_that_share_a_variable_share_it_in_a_copy():
    class Counter(nn.Module):
        def __init__(self):
            super().__init__()
            count, own = 0, [self]

            def add():
                nonlocal count
                own.append(count := count + 1)

            self.add, self.read = add, lambda: own

    model = Counter()
    twin = copy_model(model)
    twin.add()
    assert twin.read() == [twin, 1] and model.read() == [model]


def test_a_copys_parameters_keep_attributes_and_hooks():
    """A pruning mask on the gradient, and an optimizer that steps as soon as a gradient is there."""
    net = Net(lambda conv, bn: [conv, bn])
    weight, bias = net.bn1.weight, net.bn1.bias
    weight.register_hook(lambda grad: grad * 0)
    weight.tags = [net]
    steps = {bias: torch.optim.SGD([bias], lr=1.0)}
    bias.register_post_accumulate_grad_hook(lambda p: steps[p].step())
    twin = copy_model(net)
    (twin(torch.randn(2, 3, 8, 8)) ** 2).sum().backward()
    assert not twin.bn1.weight.grad.any() and twin.bn1.weight.tags == [twin]
    assert twin.bn1.bias.any() and not bias.any()


def features(model):
    extraction = pytest.importorskip("torchvision.models.feature_extraction", reason="torchvision is not installed")
    return extraction.create_feature_extractor(model, {"layer.0.bn": "out"})


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)
        self.drop = nn.Dropout(0.5)

    def forward(self, x):
        x = self.drop(self.bn(self.conv(x)))
        return x + 1 if self.training else x


class Body(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Sequential(Residual(), nn.ReLU())

    def forward(self, x):
        return self.layer(x)


@pytest.mark.parametrize("wrap", [features, torch.fx.symbolic_trace, nn.Sequential])
@pytest.mark.parametrize("training", [False, True])
def test_a_copy_keeps_every_modules_mode(wrap, training):
    model = wrap(perturbed(Body())).train(training)
    frozen = next(m for m in model.modules() if isinstance(m, nn.BatchNorm2d))
    frozen.train(not training)
    inner = nn.Sequential(model)
    x = torch.randn(2, 3, 6, 6)
    torch.manual_seed(0)
    expected = inner(x)
    modes = [m.training for m in inner.modules()]
    for twin in (copy_model(inner), orepa.prepare(inner, preserve=True)):
        named = dict(twin.named_modules())
        assert [named[name].training for name, _ in inner.named_modules()] == modes
        torch.manual_seed(0)
        torch.testing.assert_close(twin(x), expected, rtol=1e-4, atol=1e-5)


def test_a_copy_of_a_graph_module_keeps_hooks_attributes_and_children():
    model = torch.fx.symbolic_trace(Body())
    model.num_features, model.spare = 3, nn.Linear(2, 2)
    calls = []
    model.register_forward_hook(lambda module, *_: calls.append(module))
    model.register_buffer("extra", torch.ones(1))
    twin = orepa.prepare(model)
    twin(torch.randn(2, 3, 6, 6))
    assert calls == [twin] and twin.num_features == 3 and torch.equal(twin.extra, model.extra)
    assert twin.spare is not model.spare and list(twin.state_dict()) == list(orepa.prepare(model).state_dict())
