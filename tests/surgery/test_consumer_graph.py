"""Which norms are proven to follow a convolution: what optional arguments and untraceable callers do to a proof."""

import functools

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from trained import trained

import orepa
from orepa.surgery.consumer_graph import Consumer, Evidence, consumers
from orepa.surgery.source_usage import Usage, usage_of_children


def pair(conv=nn.Conv2d):
    return nn.Sequential(conv(3, 3, 3, padding=1), nn.BatchNorm2d(3))


class Block(nn.Module):
    def __init__(self, conv=nn.Conv2d):
        super().__init__()
        self.conv, self.bn = conv(3, 3, 3, padding=1), nn.BatchNorm2d(3)

    def forward(self, x):
        return torch.relu(self.bn(self.conv(x)))


def stays_the_same(model, *inputs):
    """Without example inputs to correct it."""
    model = trained(model)
    with torch.no_grad():
        torch.testing.assert_close(orepa.convert(model)(*inputs), model(*inputs), rtol=1e-4, atol=1e-4)


# --- optional arguments -----------------------------------------------------------------------------------------------------


class Optional(Block):
    def forward(self, x, cond=None):
        y = self.conv(x)
        if cond is not None:
            y = self.bn(y)
        return y


class OptionalReturn(Block):
    def forward(self, x, *, skip=None):
        y = self.conv(x)
        if skip is None:
            return y
        return self.bn(y) + skip


class OptionalConv(Block):
    """The norm always runs, after the convolution only in one case."""

    def forward(self, x, cond=None):
        y = self.conv(x) if cond is not None else x
        return self.bn(y)


class OneOfTwo(Block):
    """Neither all arguments nor none of them show where the norm is left out."""

    def forward(self, x, a=None, b=None):
        y = self.conv(x)
        return y if a is not None and b is None else self.bn(y)


@pytest.mark.parametrize("conv", [nn.Conv2d, orepa.OREPAConv])
@pytest.mark.parametrize(
    ("build", "given"), [(Optional, ()), (OptionalReturn, ()), (OptionalConv, ()), (OneOfTwo, (torch.ones(1),))]
)
def test_norms_that_depend_on_optional_arguments_stay(build, given, conv):
    x = torch.randn(2, 3, 8, 8)
    model = build(conv)
    stays_the_same(nn.Sequential(model) if not given else model, x, *given)
    assert not consumers(model)["conv"].direct
    assert isinstance(orepa.convert(trained(model)).bn, nn.BatchNorm2d)


def test_optional_arguments_that_change_nothing_are_no_obstacle():
    class Fine(Block):
        def forward(self, x, scale=None, flag=False, names=(), factor=2.0, *, mode="a"):
            y = self.bn(self.conv(x))
            return y * factor if scale is None else y * scale

    assert consumers(Fine())["conv"] == Consumer("bn", True, Evidence.GRAPH)


def test_weights_read_by_the_forward_are_not_folded():
    class Reads(Block):
        def forward(self, x):
            return self.bn(self.conv(x)) + x * self.conv.weight

    assert consumers(Reads()) == {"conv": Consumer("bn", False, Evidence.GRAPH)}


# --- callers that cannot be traced --------------------------------------------------------------------------------------------


class Dynamic(nn.Module):
    """Branches on data. ``a`` is what subclasses use in one way or another."""

    def __init__(self, a=None):
        super().__init__()
        self.a = pair() if a is None else a

    def forward(self, x):
        return self.use(x) if x.sum() < 1e9 else x


class OwnLayer(Dynamic):
    def use(self, x):
        return self.a[1](torch.relu(self.a(x)))


class Alone(Dynamic):
    def use(self, x):
        y = self.a[0](x)
        return y + self.a[1](y)


class Iterates(Dynamic):
    def use(self, x):
        for layer in self.a:
            x = torch.relu(layer(x))
        return x


class Enumerates(Dynamic):
    def use(self, x):
        for i, (_name, layer) in enumerate(self.a.named_children()):
            x = torch.relu(layer(x)) + i
        return x


class Alias(Dynamic):
    def use(self, x):
        a = self.a
        first, second = a[0], a[1]
        return second(torch.relu(first(x)))


class ByName(Dynamic):
    def use(self, x):
        for layer in getattr(self, "a"):  # noqa: B009
            x = torch.relu(layer(x))
        return x


class Handed(Dynamic):
    def use(self, x):
        return apart(self.a, x)


class HandedWhole(Dynamic):
    def use(self, x):
        return apart(self, x)


class OwnModules(Dynamic):
    def use(self, x):
        return apart(self._modules["a"], x)


class Listed(Dynamic):
    def __init__(self):
        super().__init__()
        self.layers = [self.a[0], self.a[1]]

    def use(self, x):
        return apart(self.layers, x)


class Cached(Dynamic):
    @functools.cached_property
    def layers(self):
        return list(self.a)

    def use(self, x):
        return apart(self.layers, x)


class Registered(Dynamic):
    def __init__(self):
        super().__init__()
        self.norm = self.a[1]

    def use(self, x):
        return self.norm(torch.relu(self.a(x)))


class Inherited(Alone):
    def use(self, x):
        return super().use(x)


class Above(Dynamic):
    """Not the parent, which does nothing but call it, but that one's parent."""

    def __init__(self):
        super().__init__(CallsWhole())

    def use(self, x):
        return self.a(x) + self.a.a[0](x)


class Methods(Dynamic):
    def __init__(self):
        super().__init__(WithMethod())

    def use(self, x):
        return self.a.features(x)


class WithMethod(Block):
    def features(self, x):
        return self.conv(x)


def apart(layers, x):
    for layer in layers if not isinstance(layers, Dynamic) else layers.a:
        x = torch.relu(layer(x))
    return x


def patched():
    model = CallsWhole()
    model.forward = lambda x: apart(model.a, x) if x.sum() < 1e9 else x
    return model


APART = [OwnLayer, Alone, Iterates, Enumerates, Alias, ByName, Handed, HandedWhole, OwnModules, Listed, Cached]
APART += [Registered, Inherited, Above, Methods, patched]


@pytest.mark.parametrize("conv", [nn.Conv2d, orepa.OREPAConv])
@pytest.mark.parametrize("build", APART)
def test_parts_that_are_called_alone_prove_nothing(build, conv):
    model = build()
    assert not any(c.direct and c.evidence != Evidence.ORDER for c in consumers(model).values())
    if conv is orepa.OREPAConv:
        model = orepa.prepare(model, "orepa")
        assert orepa.report(model).swapped, "a norm still counts as following"
    stays_the_same(model, torch.randn(2, 3, 8, 8))


class CallsWhole(Dynamic):
    def use(self, x):
        return self.a(x)


class Careful(Dynamic):
    """Much may be done with a child that is no use of its layers."""

    def use(self, x):
        if self.a is not None and hasattr(self, "a") and len(self.a) > 1 and not self.training:
            x = self.a(x) * self.factor
        layer = self.a
        return layer(x) + checkpoint(self.a, x, use_reentrant=False)

    @property
    def factor(self):
        return 2.0 if isinstance(self.a, nn.Sequential) else 1.0


class Loops(Dynamic):
    def __init__(self):
        super().__init__(nn.ModuleList([pair(), Block()]))
        self.by_name = nn.ModuleDict({"b": pair()})

    def use(self, x):
        for i, (layer, factor) in enumerate(zip(self.a[:2], (1, 2), strict=True)):
            x = layer(x) * factor + i
        return self.by_name["b"](self.a[-1](x))


class Blocks(Dynamic):
    def __init__(self):
        super().__init__(nn.Sequential(Block(), nn.Sequential(pair())))

    def use(self, x):
        for block in self.a:
            x = block(x)
        return x


@pytest.mark.parametrize(("build", "pairs"), [(CallsWhole, 1), (Careful, 1), (Loops, 3), (Blocks, 2)])
def test_parts_that_are_called_as_wholes_keep_their_proof(build, pairs):
    model = build()
    found = consumers(model)
    assert len(found) == pairs and all(c.norm and c.direct and c.evidence == Evidence.GRAPH for c in found.values()), (
        found
    )
    stays_the_same(model, torch.randn(2, 3, 8, 8))


def test_sequences_that_cannot_be_traced():
    class Step(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    layers = [nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), Step()]
    assert consumers(nn.Sequential(*layers))["0"] == Consumer("1", True, Evidence.SEQUENCE)
    assert consumers(CallsWhole(nn.Sequential(*layers)))["a.0"] == Consumer("a.1", True, Evidence.SEQUENCE)
    assert consumers(Iterates(nn.Sequential(*layers)))["a.0"] == Consumer("a.1", True, Evidence.ORDER)
    twice = nn.Sequential(*layers, layers[0], nn.BatchNorm2d(3))
    assert not consumers(twice)["0"].direct
    stays_the_same(twice, torch.randn(2, 3, 8, 8))


def test_wrappers_and_sources_that_cannot_be_read():
    assert usage_of_children(nn.DataParallel(pair())) == {"module": Usage.CALLED}
    assert usage_of_children(torch.optim.swa_utils.AveragedModel(pair())) == {"module": Usage.CALLED}
    assert consumers(torch.compile(pair(), backend="eager"))["_orig_mod.0"].evidence == Evidence.GRAPH
    assert usage_of_children(Iterates()) == {"a": Usage.ITERATED}
    assert usage_of_children(nn.Sequential(pair())) == {"0": Usage.CALLED}
    names = {"nn": nn, "pair": pair}
    exec("class Typed(nn.Module):\n  def forward(self, x):\n    return self.a(x) if x.sum() > 0 else x", names)
    typed = names["Typed"]()
    typed.a = pair()
    assert usage_of_children(typed) == {"a": Usage.UNKNOWN}
    assert consumers(typed)["a.0"].evidence == Evidence.ORDER


def test_detectors_keep_their_folds():
    torchvision = pytest.importorskip("torchvision", reason="torchvision is not installed (the [examples] extra)")
    build = torchvision.models.detection.fasterrcnn_resnet50_fpn_v2
    found = consumers(build(weights=None, weights_backbone=None).eval())
    assert sum(c.norm is not None and c.direct and c.evidence == Evidence.GRAPH for c in found.values()) == 65
