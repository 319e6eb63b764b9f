"""Whatever its class, a sum of branches of one value becomes one convolution, in a tree that needs torch alone."""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch
from rep_blocks import BLOCKS, MobileOne, RepConv, RepMixer, RepVGGDW, conv_bn, randomize
from torch import fx, nn

from orepa.surgery.merge import merge_regions
from orepa.surgery.replace import replace_modules


def count(model):
    return sum(isinstance(m, nn.Conv2d) for m in model.modules())


def merged(model):
    model = copy.deepcopy(model)
    rewrite = merge_regions(model)
    return replace_modules(model, rewrite.replacements), rewrite


def error(a, b):
    return float((a - b).detach().norm() / b.detach().norm())


@pytest.mark.parametrize("name", BLOCKS)
def test_every_block_becomes_one_convolution(name):
    build, channels, left = BLOCKS[name]
    model, x = randomize(build()), torch.randn(2, channels, 12, 13, dtype=torch.float64)
    before = {key: t.clone() for key, t in model.state_dict().items()}
    plain, rewrite = merged(model)
    assert count(plain) == left and not rewrite.left, [r.problem for r in rewrite.left]
    assert error(plain(x), model(x)) < 1e-12
    assert all(e < 1e-12 for _, _, e in rewrite.done)
    assert all(torch.equal(t, before[key]) for key, t in model.state_dict().items())
    single = merged(copy.deepcopy(model).float())[0]
    assert error(single(x.float()).double(), model(x)) < 1e-5


#: by network of timm the convolutions that are left
FAMILIES = {
    "mobileone_s0": 43,
    "repvgg_a0": 22,
    "repvit_m0_9": 103,
    "fastvit_t8": 52,
    "repghostnet_050": 95,
    "shvit_s1": 77,
}


@pytest.mark.parametrize("name", FAMILIES)
def test_no_more_convolutions_than_timm_leaves(name):
    timm = pytest.importorskip("timm")
    if not timm.list_models(name):
        pytest.skip(f"this timm has no {name}")
    model, x = randomize(timm.create_model(name, num_classes=5)), torch.randn(1, 3, 64, 64, dtype=torch.float64)
    theirs = timm.utils.reparameterize_model(model)
    plain, _ = merged(model)
    assert count(plain) == FAMILIES[name] <= count(theirs)
    with torch.no_grad():
        expected = model(x)
        assert error(plain(x), expected) < 1e-10
        if name == "repvgg_a0":  # of each kind of block above
            model, x = model.float(), x.float()
            # Some of these random nets do not reach 1e-4 in float32 as they are.
            assert error(merged(model)[0](x).double(), expected) < max(1e-4, 2 * error(model(x).double(), expected))


class Untraceable(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.blocks = RepConv(3, 4, 2), nn.ModuleList([RepConv(), RepVGGDW(), RepMixer()])

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            if x.sum() < 1e9:
                x = block(x)
        return x


def test_blocks_in_a_parent_that_cannot_be_traced():
    model, x = randomize(Untraceable()), torch.randn(2, 3, 9, 9, dtype=torch.float64)
    plain, rewrite = merged(model)
    assert count(plain) == 4 and not rewrite.left
    assert type(plain) is Untraceable and error(plain(x), model(x)) < 1e-12


def test_the_simplest_module_takes_the_place_of_a_block():
    depthwise = RepVGGDW()
    depthwise.act = nn.Identity()
    model = randomize(nn.Sequential(depthwise, RepConv(), RepMixer(), nn.Sequential(conv_bn(4, 4, 3), nn.ReLU())))
    act, last = model[1].act, model[3]
    replace_modules(model, merge_regions(model).replacements)
    assert [name for name, _ in model[1].named_children()] == ["reparam_conv", "act"] and model[1].act is act
    assert type(model[1]) is nn.Sequential and type(model[2]) is nn.Conv2d and model[3] is last
    assert model[0].dim == 4  # attributes that the parent may read
    assert not any(isinstance(m, fx.GraphModule) for m in model.modules())


def test_a_forward_that_is_no_sequence_becomes_a_graph_module():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.rep, self.gate = RepConv(), nn.Sequential(nn.Conv2d(4, 4, 1), nn.Sigmoid())
            self.rep.act = nn.Identity()

        def forward(self, x, y):
            return self.gate(y) * (self.rep(x) + x)

    model = randomize(Block())
    x, y = torch.randn(2, 2, 4, 8, 8, dtype=torch.float64)
    plain, _ = merged(model)
    assert isinstance(plain, fx.GraphModule) and type(plain).__name__ == "Block"
    assert sorted(plain.state_dict()) == ["gate.0.bias", "gate.0.weight", "reparam_conv.bias", "reparam_conv.weight"]
    assert type(plain.gate) is nn.Sequential and error(plain(x, y=y), model(x, y)) < 1e-12
    plain.train()
    assert all(m.training for m in plain.modules())


def test_a_sequence_keeps_its_places():
    rep = RepConv(6, 6)
    model = randomize(
        nn.Sequential(nn.Conv2d(3, 6, 1), nn.BatchNorm2d(6), nn.Conv2d(6, 6, 1, bias=False), rep, nn.ReLU())
    )
    plain, _ = merged(model)
    assert len(plain) == 5 and count(plain) == 2  # the bias in front of the padding stays apart
    x = torch.randn(2, 3, 9, 9, dtype=torch.float64)
    assert error(plain(x), model(x)) < 1e-12


class Stage(nn.Module):
    """A region of its own, a block with one, and the layer after that block."""

    def __init__(self):
        super().__init__()
        self.dense, self.point, self.rep = conv_bn(4, 4, 3), conv_bn(4, 4, 1), RepConv()
        self.tail = Tail()

    def forward(self, x):
        x = torch.relu(self.dense(x) + self.point(x))
        return self.tail(self.rep(x)) * x


class Tail(nn.Sequential):
    def __init__(self):
        block = MobileOne()
        block.act = nn.Sequential(nn.ReLU(), conv_bn(4, 4, 1))
        super().__init__(RepConv(), block, nn.Conv2d(4, 4, 1))


def test_regions_of_nested_modules():
    model, x = randomize(nn.Sequential(Stage(), RepConv())), torch.randn(2, 4, 9, 9, dtype=torch.float64)
    plain, rewrite = merged(model)
    assert count(plain) == 6 and len(rewrite.replacements) == 5
    assert error(plain(x), model(x)) < 1e-12
    names = [name for name, m in plain[0].named_modules() if isinstance(m, nn.Conv2d)]
    assert sorted(names) == ["rep.reparam_conv", "reparam_conv", "tail.0.reparam_conv", "tail.1.reparam_conv", "tail.2"]
    replace_modules(plain, rewrite.replacements)
    assert torch.equal(plain(x), model(x)) and plain.state_dict().keys() == model.state_dict().keys()


@pytest.fixture
def model():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(RepConv(3, 4, 2), MobileOne(), RepMixer())
            self.side = Residual()

        def forward(self, x):
            return self.side(self.body(x))

    return randomize(Net()).float()


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.rep = RepVGGDW()

    def forward(self, x):
        return torch.relu(x) * self.rep(x) + x


X = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def test_a_merged_model_loads_with_torch_alone(model, tmp_path):
    sequence, _ = merged(model.body)
    graph, _ = merged(randomize(Merging()).float())
    assert type(sequence) is nn.Sequential and isinstance(graph, fx.GraphModule)
    y = sequence(X)
    torch.save([sequence, graph, X, y, graph(y)], tmp_path / "model.pt")
    program = (
        f"import sys, torch; a, b, *values = torch.load({str(tmp_path / 'model.pt')!r}, weights_only=False); x, y, z = values; "
        "assert torch.equal(a(x), y) and torch.equal(b(y), z) and not any(name.startswith('orepa') for name in sys.modules)"
    )
    subprocess.run([sys.executable, "-I", "-c", program], check=True, timeout=300)


class Merging(nn.Module):
    def __init__(self):
        super().__init__()
        self.dense, self.point = conv_bn(4, 4, 3), conv_bn(4, 4, 1)

    def forward(self, x):
        out = self.dense(x) + self.point(x)
        return out * torch.sigmoid(out)


def test_a_merged_model_is_copied_compiled_scripted_and_exported(model):
    plain, _ = merged(model)
    expected = plain(X)
    assert error(expected, model(X)) < 1e-5
    assert torch.equal(copy.deepcopy(plain)(X), expected)
    graph, _ = merged(randomize(Merging()).float())
    assert torch.equal(torch.jit.script(graph)(expected), graph(expected))
    exported = torch.export.export(plain, (X,)).module()
    assert error(exported(X), expected) < 1e-6
    compiled = torch.compile(plain, backend="aot_eager", fullgraph=True)
    assert error(compiled(X), expected) < 1e-6


def test_the_convolution_is_placed_as_the_branches_are():
    model = RepConv().eval().half().to(memory_format=torch.channels_last).requires_grad_(False)
    conv = merged(model)[0].reparam_conv
    assert conv.weight.dtype == torch.float16 and not conv.weight.requires_grad
    assert conv.weight.is_contiguous(memory_format=torch.channels_last)
    assert merged(RepConv().eval())[0].reparam_conv.weight.requires_grad


def test_the_same_call_undoes_it(model):
    expected, names = model(X), [name for name, _ in model.named_modules()]
    rewrite = merge_regions(model)
    replace_modules(model, rewrite.replacements)
    assert count(model) == 4 and not torch.equal(model(X), expected)
    replace_modules(model, rewrite.replacements)
    assert torch.equal(model(X), expected) and names == [name for name, _ in model.named_modules()]


def test_a_second_call_finds_nothing(model):
    plain, _ = merged(model)
    assert not merge_regions(plain).replacements


def test_the_rounded_convolution_is_held_against_the_region(monkeypatch):
    from orepa.surgery import merge

    monkeypatch.setattr(merge, "region_error", lambda *_: 1e-3)
    model = RepConv().eval()
    rewrite = merge_regions(model)
    assert not rewrite.replacements and "differs by 1.0e-03" in rewrite.left[0].problem


def test_damaged_values_are_named():
    model = RepConv().eval()
    model.conv1[0].weight.data[0, 0, 0, 0] = torch.nan
    rewrite = merge_regions(model)
    assert not rewrite.replacements and "not finite" in rewrite.left[0].problem
