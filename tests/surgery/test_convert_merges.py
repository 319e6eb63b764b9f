"""`convert` merges the linear regions of anybody's modules, and says what it did and what had to stay."""

from __future__ import annotations

import copy
import random
import re

import pytest
import torch
from rep_blocks import MobileOne, RepConv, RepMixer, conv_bn, randomize
from torch import nn

import orepa
from orepa import OfflineConv, OREPAConv


def count(model):
    return sum(isinstance(m, nn.Conv2d) for m in model.modules())


def assert_same(actual, expected, tolerance=1e-10):
    assert (actual - expected).norm() <= tolerance * expected.norm()


class Net(nn.Module):
    def __init__(self, *blocks, channels=4):
        super().__init__()
        self.blocks, self.head = nn.Sequential(*blocks), nn.Conv2d(channels, 2, 1)

    def forward(self, x):
        return self.head(self.blocks(x).relu())


def test_every_region_is_merged_and_reported():
    model, x = randomize(Net(MobileOne(), RepConv(), RepMixer())), torch.randn(2, 4, 9, 9, dtype=torch.float64)
    plain = orepa.convert(model, example_inputs=x)
    report = orepa.report(plain)
    assert count(plain) == 4 and report.error < 1e-12
    assert [(layer.name, layer.layer, layer.action) for layer in report.layers] == [
        (f"blocks.{i}", "3x3 4->4", "merged") for i in range(3)
    ]
    assert report.layers[1].detail == "2 convolutions in 3 branches" and report.max_error < 1e-12
    assert_same(plain(x), model(x))
    assert orepa.report(orepa.convert(plain)).layers == []


def test_regions_stay_where_the_caller_wants_them():
    model, x = randomize(Net(RepConv())), torch.randn(2, 4, 9, 9, dtype=torch.float64)
    plain = orepa.convert(model, merge=False, fold_bn=False)
    assert count(plain) == count(model) and orepa.report(plain).layers == []
    assert torch.equal(plain(x), model(x))


@pytest.mark.parametrize("mode", ["zeros", "reflect"])
def test_blocks_in_a_region_are_merged_with_it(mode):
    """Online and offline blocks beside branches of others: one convolution, rounded once."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.online = OREPAConv(4, 4, 3, padding=1, bias=False, padding_mode=mode)
            self.bn1, self.bn2 = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
            self.offline = OfflineConv(4, 4, 3, padding=1, topology="dbb", padding_mode=mode)

        def forward(self, x):
            return self.bn1(self.online(x)) + self.offline(x) + self.bn2(x)

    model, x = randomize(Net(Block())), torch.randn(2, 4, 9, 9, dtype=torch.float64)
    plain = orepa.convert(model, example_inputs=x)
    assert count(plain) == 2 and [layer.action for layer in orepa.report(plain).layers] == ["merged"]
    assert_same(plain(x), model(x))


def test_a_block_with_a_hook_in_a_region_is_refused_as_ever():
    block = nn.Sequential(OREPAConv(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1))
    model = randomize(Net(block))
    block[0].register_forward_hook(lambda *_: None)
    with pytest.raises(orepa.ConversionError, match=r"blocks\.0\.0: it has forward hooks"):
        orepa.convert(model)


def test_inplace_the_block_stays_the_object_that_it_was():
    block = randomize(RepConv())
    holder = [block]
    x = torch.randn(2, 4, 9, 9, dtype=torch.float64)
    expected = block(x)
    assert orepa.convert(block, inplace=True) is block is holder[0]
    assert count(block) == 1
    assert_same(block(x), expected)


def test_a_failed_conversion_undoes_the_merging():
    model = randomize(Net(RepConv(), conv_bn(4, 4, 3)))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(orepa.ConversionError, match="differs"):
        orepa.convert(model, inplace=True, example_inputs=torch.randn(1, 4, 9, 9).double(), tolerance=0.0)
    assert type(model.blocks[0]) is RepConv and model.state_dict().keys() == before.keys()


def test_rounding_is_told_from_an_error_with_merged_regions_too():
    """A float32 net that reacts strongly to rounding is judged in float64, merged there as well."""

    class Steep(Net):
        def forward(self, x):
            return super().forward(x).mul(1e5).sin()

    model, x = randomize(Steep(RepConv(), MobileOne())).float(), torch.randn(2, 4, 9, 9)
    with pytest.raises(orepa.ConversionError):
        orepa.convert(model, example_inputs=x, tolerance=1e-4)
    plain = orepa.convert(model, example_inputs=x)
    assert count(plain) == 3 and orepa.report(plain).error < 1e-4


# --- one state of the model is not all of them ----------------------------------------------------------------------------


class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = conv_bn(4, 4, 3), conv_bn(4, 4, 1)


class Switched(Branches):
    use = True

    def forward(self, x):
        y = self.conv1(x)
        if self.use:
            y = y + self.conv2(x)
        return y


class Domains(Branches):
    domain = 0

    def __init__(self):
        super().__init__()
        self.norms = nn.ModuleList([nn.BatchNorm2d(4), nn.BatchNorm2d(4)])

    def forward(self, x):
        return self.norms[self.domain](self.conv1(x) + self.conv2(x))


class Counting(Branches):
    def __init__(self):
        super().__init__()
        self.log = []

    def forward(self, x):
        self.log.append(1)
        return self.conv1(x) + self.conv2(x)


class Drawing(Branches):
    def forward(self, x):
        return self.conv1(x) + random.random() * self.conv2(x)


STATES = {
    Switched: "its forward depends on self.use",
    Domains: r"its forward does not use norms\.1, which it might in another state",
    Counting: "its forward changes the state of the model",
    Drawing: "its forward draws random numbers",
}


@pytest.mark.parametrize("kind", STATES)
def test_what_another_state_may_change_stays(kind):
    model = randomize(Net(kind()))
    plain = orepa.convert(model)
    (line,) = (layer for layer in orepa.report(plain).left if layer.name == "blocks.0")
    assert re.search(STATES[kind], line.detail), line.detail
    assert type(plain.blocks[0]) is kind and count(plain) == 3
    if kind is Counting:
        assert model.blocks[0].log == plain.blocks[0].log == []


class Deployable(Branches):
    """The flag's other way needs a layer that is not there."""

    def __init__(self, merged=None):
        super().__init__()
        self.deploy, self.act = False, nn.ReLU()
        self.skip = None

    def forward(self, x):
        if self.deploy:
            return self.act(self.merged(x))
        act = getattr(self, "act", None)
        y = 0 if self.skip is None else self.skip(x)
        y = y + self.conv1(x) + self.conv2(x)
        if act is not None:
            y = act(y)
        return y


def test_flags_that_no_state_can_set_do_not_matter():
    model, x = randomize(Net(Deployable())), torch.randn(2, 4, 9, 9, dtype=torch.float64)
    plain = orepa.convert(model, example_inputs=x)
    assert count(plain) == 2 and not orepa.report(plain).left


class Deploys(nn.Sequential):
    """A convolution and its norm, which a method of their own would fuse without the convolution's bias."""

    def __init__(self):
        super().__init__(*conv_bn(4, 4, 3))

    def fuse(self):
        conv, norm = self
        factor = norm.weight / (norm.running_var + norm.eps).sqrt()
        fused = nn.Conv2d(4, 4, 3, padding=1, dtype=conv.weight.dtype)
        fused.weight.data = conv.weight * factor.view(-1, 1, 1, 1)
        fused.bias.data = norm.bias - norm.running_mean * factor
        return fused


def test_a_layer_that_could_deploy_itself_becomes_its_convolution():
    model, x = randomize(Net(Deploys(), nn.ReLU())), torch.randn(2, 4, 9, 9, dtype=torch.float64)
    plain = orepa.convert(model, example_inputs=x)
    assert type(plain.blocks[0]) in (nn.Conv2d, nn.Sequential) and not any(
        isinstance(m, nn.BatchNorm2d) for m in plain.modules()
    )
    assert_same(plain(x), model(x))
    kept = orepa.convert(model, fold_bn=False)
    assert type(kept.blocks[0]) is Deploys and torch.equal(kept(x), model(x))
