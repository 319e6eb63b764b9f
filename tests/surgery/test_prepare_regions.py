"""`prepare` makes one `OREPAConv` and one norm of every block of branches, whatever its class."""

from __future__ import annotations

import pytest
import torch
from rep_blocks import BLOCKS, Frozen, MobileOne, RepConv, conv_bn, randomize
from test_merge import FAMILIES
from torch import nn
from trained import trained

import orepa
from orepa import OREPAConv


def blocks_of(model):
    return [m for m in model.modules() if isinstance(m, OREPAConv)]


def assert_same(actual, expected, tolerance=1e-10):
    assert (actual - expected).norm() <= tolerance * expected.norm()


def train(model, x, steps=5, lr=1e-2):
    optimizer = torch.optim.SGD(model.parameters(), lr)
    for _ in range(steps):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


#: by block the reason why it does not train as one
LEFT = {
    **dict.fromkeys(
        ["Conv3XC", "SESR", "Frozen", "Even"], "it holds no batch norm, so none would follow its convolution"
    ),
    "Reflected": "wide has 2 groups, the sum 1",
    **dict.fromkeys(["a strided sequence", "a sequence"], "no norm follows"),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_a_block_keeps_its_function_trains_and_becomes_one_convolution(name):
    build, channels, _ = BLOCKS[name]
    model, x = randomize(build()), torch.randn(2, channels, 12, 13, dtype=torch.float64)
    prepared = orepa.prepare(model, preserve=True)
    report = orepa.report(prepared)
    if name in LEFT:
        assert LEFT[name] in str(report) and not report.swapped
        return
    assert all(isinstance(m, nn.BatchNorm2d | OREPAConv) or not list(m.parameters(False)) for m in prepared.modules())
    assert_same(prepared(x), model(x))
    assert prepared.training is False and report.max_error < 1e-10 and not report.left
    prepared.train()
    train(prepared, x)
    assert all(p.grad is not None for p in prepared.parameters())
    prepared.eval()
    plain = orepa.convert(prepared, example_inputs=x)
    assert sum(isinstance(m, nn.Conv2d) for m in plain.modules()) == len(blocks_of(prepared))
    assert_same(plain(x), prepared(x))
    assert (prepared(x) - model(x)).norm() > 1e-3 * model(x).norm()


def test_the_report_shows_the_branches():
    prepared = orepa.prepare(nn.Sequential(MobileOne(), RepConv(4, 8, 2)))
    first, second = orepa.report(prepared).layers
    assert (first.name, first.layer, first.action) == ("0", "3x3 4->4", "swapped")
    assert first.detail.endswith("skip, branches.0.0, branches.1.0, branches.2.0, scale.0"), first.detail
    assert first.detail.startswith("identity + 3x 3x3 + 1x1: ")
    assert second.detail == "3x3 + 1x1: conv1.0, conv2.0" and second.layer == "3x3 4->8 s2"
    block = prepared[0].reparam_conv.conv
    assert dict(block.named_parameters()).keys() == {
        "branches_0_0_weight",
        "branches_1_0_weight",
        "branches_2_0_weight",
        "scale_0_weight",
        "scales",
    }
    assert block.topology == "identity + 3x 3x3 + 1x1" and block.bias is None


def test_a_new_block_starts_about_as_loud_as_a_convolution():
    torch.manual_seed(0)
    x = torch.randn(4, 32, 16, 16)
    for stride in (1, 2):
        block = blocks_of(orepa.prepare(RepConv(32, 32, stride)))[0]
        assert 0.3 < block(x).std() / nn.Conv2d(32, 32, 3, padding=1, bias=False)(x).std() < 3


def test_the_norm_expects_the_statistics_of_the_sum():
    """White input: the statistics of the branches tell those of their sum, so that the first training step changes little."""
    torch.manual_seed(0)
    model, x = randomize(RepConv(8, 8)).float(), torch.randn(64, 8, 16, 16)
    model.train()
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.momentum = 1.0
    with torch.no_grad():
        model(x)
        expected = model(x)
        prepared = orepa.prepare(model, preserve=True)
        assert prepared.training and all(m.training for m in prepared.modules())
        assert (prepared(x) - expected).norm() < 0.1 * expected.norm()


class PostNorm(nn.Module):
    """A norm after the sum knows the statistics, whatever the input."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2, self.norm = conv_bn(4, 4, 3), nn.Conv2d(4, 4, 1, bias=False), nn.BatchNorm2d(4)

    def forward(self, x):
        return 0.5 * self.norm(self.conv1(x) + self.conv2(x) + x)


def test_a_norm_after_the_sum_tells_its_statistics():
    torch.manual_seed(0)
    model, x = randomize(PostNorm()), torch.randn(8, 4, 9, 9, dtype=torch.float64).cumsum(-1)
    model.norm.momentum = 1.0
    model.conv1[1].eval()
    model.norm.train()
    with torch.no_grad():
        expected = model(x)  # the batch, which the norm now remembers
        prepared = orepa.prepare(model.eval(), preserve=True)
        assert_same(prepared(x), model(x))
        prepared.train()
        assert (prepared(x) - expected).norm() < 0.05 * expected.norm()


def test_example_inputs_tell_the_statistics():
    """Then the first step in train mode on that batch computes what eval mode does, whatever the input."""
    model, x = randomize(nn.Sequential(RepConv(), RepConv())), torch.randn(8, 4, 9, 9).double().cumsum(-1)
    with torch.no_grad():
        expected = model(x)
        for inputs in (x, (x,), {"input": x}):
            prepared = orepa.prepare(model, preserve=True, example_inputs=inputs)
            assert not prepared.training
            assert_same(prepared(x), expected)
            assert_same(prepared.train()(x), expected, 1e-4)
        assert (orepa.prepare(model, preserve=True).train()(x) - expected).norm() > 0.01 * expected.norm()
    with pytest.raises(ValueError, match="example_inputs are for preserve=True"):
        orepa.prepare(model, example_inputs=x)
    with pytest.raises(RuntimeError):
        orepa.prepare(model, preserve=True, example_inputs=x[:, :3], inplace=True)
    assert type(model[0]) is RepConv


# --- policies -------------------------------------------------------------------------------------------------------------


def test_the_policy_decides_about_regions():
    def model():
        return nn.Sequential(RepConv(), nn.Sequential(*conv_bn(4, 4, 3), nn.ReLU()))

    def topologies(policy, **options):
        prepared = orepa.prepare(model(), policy, **options)
        return [m.topology for m in blocks_of(prepared)], {r.name: r.detail for r in orepa.report(prepared).left}

    assert topologies(None) == (["3x3 + 1x1 + identity", "orepa"], {})
    assert topologies("dbb")[0] == ["dbb", "dbb"]
    assert topologies("dbb", preserve=True)[0] == ["dbb", "dbb"]
    assert topologies({"0": {"scaling": "scalar"}})[0] == ["3x3 + 1x1 + identity"]
    kept, left = topologies({"0": {"offline": True}, "1.0": "orepa"})
    assert kept == ["orepa"] and left == dict.fromkeys(
        ["0", "0.conv1.0", "0.conv2.0"], "the policy leaves it as it is, an offline block"
    )
    inner, left = topologies({"0.conv1.0": "orepa"})
    assert inner == ["orepa"] and left["0"] == "the policy leaves it"


def test_a_failure_undoes_the_regions():
    model = nn.Sequential(RepConv())
    with pytest.raises(ValueError, match="no convolution matches nothing"):
        orepa.prepare(model, {"0": "orepa", "nothing": "orepa"}, inplace=True)
    assert type(model[0]) is RepConv


@pytest.mark.parametrize("scaling", ["scalar", "none"])
def test_scalings_that_cannot_hold_the_factors_are_told(scaling):
    model, x = randomize(nn.Sequential(RepConv(), RepConv(4, 4, 2))), torch.randn(2, 4, 9, 9, dtype=torch.float64)
    prepared = orepa.prepare(model, preserve=True, scaling=scaling)
    (left,) = [r for r in orepa.report(prepared).left if r.name == "0"]
    assert left.detail.startswith(f"scaling '{scaling}' has no factor")
    assert blocks_of(prepared[1])[0].scaling == scaling
    assert_same(prepared(x), model(x))


# --- what stays -----------------------------------------------------------------------------------------------------------


def change(edit):
    model = nn.Sequential(RepConv())
    edit(model[0])
    return model


def freeze(m):
    m.conv2[0].weight.requires_grad_(False)


def drop(m):
    m.conv2.append(nn.Dropout(0.5))


def hook(m):
    m.conv1[0].weight.register_hook(lambda g: g)


def without_norms(m):
    m.conv1[1], m.conv2[1], m.bn = nn.Identity(), nn.Identity(), nn.Identity()


def layered(m):
    m.conv1[0].register_forward_hook(lambda *_: None)


def one_frozen_norm(m):
    m.bn = Frozen(4)
    m.bn.eps = 1e-5  # as its forward has it


REASONS = {
    one_frozen_norm: "bn is frozen, or no batch norm of torch",
    freeze: "a part of it is frozen",
    drop: "conv2.2 drops values in train mode",
    hook: "its parameters have hooks",
    without_norms: "it holds no batch norm",
    layered: "it has hooks",
}


@pytest.mark.parametrize("edit", REASONS, ids=lambda edit: edit.__name__)
def test_what_cannot_train_as_one_block_stays(edit):
    prepared = orepa.prepare(change(edit))
    report = orepa.report(prepared)
    assert type(prepared[0]) is RepConv
    assert any(layer.name == "0" and REASONS[edit] in layer.detail for layer in report.left), str(report)


def test_dropout_that_drops_nothing_is_no_obstacle():
    prepared = orepa.prepare(change(lambda m: m.conv2.append(nn.Dropout(0.0))))
    assert len(blocks_of(prepared)) == 1


# --- whole nets -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "regions"), [("repvgg_a0", 22), ("fastvit_t8", 20)])
def test_timm_nets_keep_their_function_train_and_deploy(name, regions):
    timm = pytest.importorskip("timm", reason="timm is not installed (the [models] extra)")
    model, x = trained(timm.create_model(name, num_classes=5)), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = model(x)
    prepared = orepa.prepare(model, preserve=True, inplace=True)
    owners = [layer.name for layer in orepa.report(prepared).swapped if ":" in layer.detail]
    assert len(owners) == regions
    with torch.no_grad():
        assert_same(prepared(x), expected, 1e-4)
    train(prepared.train(), x, lr=1e-4)
    plain = orepa.convert(prepared.eval(), example_inputs=x)
    assert sum(isinstance(m, nn.Conv2d) for m in plain.modules()) == FAMILIES[name]
    if name == "repvgg_a0":
        again = orepa.prepare(timm.create_model(name, num_classes=5)).eval()
        again.load_state_dict(prepared.state_dict())
        with torch.no_grad():
            assert torch.equal(again(x), prepared(x))
