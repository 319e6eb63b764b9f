"""Offline blocks: the authors' DBB to the last bit, and in eval mode one convolution everywhere, borders included."""

import copy
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from strategies import geometries, image
from torch import nn
from torch.autograd import gradcheck

import orepa
import orepa.modules.offline_conv
from orepa import OfflineConv, OREPAConv
from orepa.topology import AvgPool, Branch, Conv, Depthwise, Filter, Identity, Nested, Norm, Topology

F64 = torch.float64
NORMED = ["acnet", "dbb", "mobileone", "repvgg"]


def randomize(module):
    """Every parameter and statistic its own value, none of the zeros and ones that would hide a mistake."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_()
        for name, buffer in module.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_()
            elif name.endswith("running_var"):
                buffer.uniform_(0.3, 2)
    return module


def make(*args, **options):
    return randomize(OfflineConv(*args, dtype=F64, **options)).eval()


def relative_error(got, expected):
    return float(((got - expected).norm() / expected.norm()).detach())


# --- the authors' DBB ---------------------------------------------------------------------------------------------------

GOLDEN = Path(__file__).parents[1] / "data" / "dbb_3x3.npz"
THEIRS = {
    "dbb_origin.conv.weight": "origin_weight",
    "dbb_origin.bn": "origin_bn",
    "dbb_avg.conv.weight": "avg_weight",
    "dbb_avg.bn.bn": "avg_bn1",
    "dbb_avg.avgbn": "avg_bn2",
    "dbb_1x1.conv.weight": "conv1x1_weight",
    "dbb_1x1.bn": "conv1x1_bn",
    "dbb_1x1_kxk.idconv1.weight": "conv1x1_kxk_conv1",
    "dbb_1x1_kxk.bn1.bn": "conv1x1_kxk_bn1",
    "dbb_1x1_kxk.conv2.weight": "conv1x1_kxk_conv2",
    "dbb_1x1_kxk.bn2": "conv1x1_kxk_bn2",
}


def our_name(theirs):
    if theirs in THEIRS:
        return THEIRS[theirs]
    owner, name = theirs.rsplit(".", 1)
    return f"{THEIRS[owner]}.{name}"


def golden(part):
    with np.load(GOLDEN) as file:
        return {our_name(key.removeprefix(part)): torch.from_numpy(file[key]) for key in file if key.startswith(part)}


@pytest.fixture
def case():
    """The authors' block with our names, after one training step on their input."""
    with np.load(GOLDEN) as file:
        data = {key: torch.from_numpy(file[key]) for key in ("x", "g", "y_train", "gx", "y_eval")}
        block = OfflineConv(**json.loads(str(file["kwargs"])), topology="dbb", dtype=F64)
    block.load_state_dict(golden("sd."))
    data["x"].requires_grad_()
    data["got"] = block(data["x"])
    data["got"].backward(data["g"])
    return block, data


def test_training_step_of_the_authors_dbb(case):
    block, data = case
    # No constant of theirs is rounded here, so not 1e-8 but the noise of float64.
    assert relative_error(data["got"], data["y_train"]) < 1e-13
    assert relative_error(data["x"].grad, data["gx"]) < 1e-13
    gradients = {name: p.grad for name, p in block.named_parameters()}
    assert set(gradients) == set(golden("grad."))
    for name, expected in golden("grad.").items():
        assert relative_error(gradients[name], expected) < 1e-11, name
    statistics = dict(block.named_buffers())
    for name, expected in golden("after.").items():
        assert relative_error(statistics[name], expected) < 1e-13, name


def test_evaluation_of_the_authors_dbb(case):
    block, data = case
    block.eval()
    assert relative_error(block(data["x"]), data["y_eval"]) < 1e-13
    assert relative_error(block.to_conv2d()(data["x"]), data["y_eval"]) < 1e-13


# --- in eval mode one convolution -----------------------------------------------------------------------------------------


def edge(channels, kernel_size):
    return torch.tensor([[[1.0, 2, 0], [0, 3, -1], [5, 0, 0]]], dtype=F64)


#: norms where no published block has them
ODD = {
    "two 1x1 before": lambda spec: Topology(
        a=Branch(Conv(1), Norm(), Conv(1, 2 * spec.out_channels), Norm(), Conv(spec.kernel_size), Norm()),
        b=Branch(Conv(1), Norm(), Conv(1)),
    ),
    "norm first": lambda spec: Topology(
        a=Branch(Norm(), Conv(spec.kernel_size)), b=Branch(Conv(1), Norm(), Norm(), AvgPool(spec.kernel_size))
    ),
    "separable": lambda spec: Topology(
        a=Branch(Depthwise(1, 2), Norm(), Depthwise(spec.kernel_size, 2), Norm(), Conv(1), Norm()),
        b=Branch(Conv(1), Norm(), Identity(), AvgPool(1), Norm()),
    ),
    "nested": lambda spec: Topology(
        a=Branch(
            Nested(orepa.topology.catalogue.rep1x1, 1),
            Norm(),
            Nested(orepa.topology.catalogue.repvgg_dense, spec.kernel_size),
        )
    ),
    "stack": lambda spec: Topology(
        a=Branch(Conv(1), Norm(), Conv(3), Norm(), Depthwise(3), Norm(), Filter(edge, 3), Norm(), scale=2.0),
        b=Branch(Filter(edge, 3), Conv(5), Norm()),
        c=Branch(Conv(1), Norm(), Conv(3), Norm()),
        d=Branch(AvgPool(3), Conv(1)),
    ),
}
TOPOLOGIES = {**{name: name for name in orepa.topologies()}, **ODD}


@pytest.mark.parametrize("topology", TOPOLOGIES)
@given(
    geometry=geometries(bias=(None, True, False)),
    scaling=st.sampled_from(["vector", "scalar", "none"]),
    extra=st.tuples(*[st.integers(0, 3)] * 2),
)
def test_eval_mode_is_one_convolution(topology, geometry, scaling, extra):
    if topology == "ecb":
        geometry["kernel_size"] = tuple(max(k, 3) for k in geometry["kernel_size"])
    elif topology == "stack":
        geometry["kernel_size"] = (7, 7)
    block = make(**geometry, topology=TOPOLOGIES[topology], scaling=scaling)
    x = image(block, *extra)
    plain = block.to_conv2d()
    y, one = block(x), plain(x)
    assert (plain.bias is None) == (block.squeeze()[1] is None)
    assert y.shape == one.shape
    assert (y - one).norm() <= 1e-10 * one.norm()


def test_sizes_that_have_no_centre():
    for topology, size, options in (
        ("dbb", (1, 3), {"padding": 2}),
        ("dbb", (3, 5), {"padding": "same", "dilation": 2}),
        ("repvgg_dense", (2, 4), {"padding": "same"}),
        ("acnet", 3, {"padding": "valid"}),
        (lambda spec: Topology(a=Branch(Conv(1), Norm(), Conv(4), Norm())), 4, {"padding": "same"}),
    ):
        block = make(4, 6, size, topology=topology, **options)
        x = torch.randn(4, 9, 13, dtype=F64)  # and no batch
        torch.testing.assert_close(block(x), block.to_conv2d()(x), rtol=1e-10, atol=1e-10)


pad = orepa.modules.offline_conv.pad


def with_zeros(x, margins, mode="zeros", value=None):
    return pad(x, margins, mode)


@pytest.mark.parametrize(("topology", "padding"), [("dbb", 1), ("dbb", 2), ("norm first", 1), ("stack", 3)])
def test_padding_with_zeros_is_noticed(monkeypatch, topology, padding):
    """Negative control: the border, and nothing else, is wrong where the value of a padded layer is forgotten."""
    block = make(4, 6, 7 if topology == "stack" else 3, padding=padding, topology=TOPOLOGIES[topology])
    x = torch.randn(2, 4, 12, 11, dtype=F64)
    good = block.to_conv2d()(x)
    torch.testing.assert_close(block(x), good, rtol=1e-10, atol=1e-10)
    monkeypatch.setattr(orepa.modules.offline_conv, "pad", with_zeros)
    inside = (..., slice(padding, -padding), slice(padding, -padding))
    torch.testing.assert_close(block(x)[inside], good[inside], rtol=1e-10, atol=1e-10)
    assert relative_error(block(x), good) > 1e-2


def test_padding_with_zeros_is_noticed_by_the_golden_block(monkeypatch, case):
    block, data = case
    monkeypatch.setattr(orepa.modules.offline_conv, "pad", with_zeros)
    assert relative_error(block.eval()(data["x"]), data["y_eval"]) > 1e-3
    block.load_state_dict(golden("sd."))
    assert relative_error(block.train()(data["x"]), data["y_train"]) > 1e-3


def test_squeeze_has_the_gradients_of_the_forward_in_eval_mode():
    for topology in ("dbb", "mobileone", "ecb"):
        block = make(4, 4, 3, padding=1, topology=topology)
        x, g = torch.randn(2, 4, 6, 5, dtype=F64), torch.randn(2, 4, 6, 5, dtype=F64)
        weight, bias = block.squeeze()
        parameters = list(block.parameters())
        squeezed = torch.autograd.grad(F.conv2d(x, weight, bias, padding=1), parameters, g)
        branches = torch.autograd.grad(block(x), parameters, g)
        for (name, _), a, b in zip(block.named_parameters(), squeezed, branches, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10, msg=name)


# --- in training: several convolutions and norms --------------------------------------------------------------------------


class Pair(nn.Module):
    """Conv and norm, as every paper writes it."""

    def __init__(self, block, branch, padding):
        super().__init__()
        weight = getattr(block, f"{branch}_weight").detach().clone()
        self.weight, self.stride, self.padding, self.groups = nn.Parameter(weight), block.stride, padding, block.groups
        self.norm = copy.deepcopy(getattr(block, f"{branch}_bn"))

    def forward(self, x):
        return self.norm(F.conv2d(x, self.weight, None, self.stride, self.padding, 1, self.groups))


@pytest.mark.parametrize(("stride", "groups"), [(1, 1), (2, 2)])
def test_training_is_convolutions_and_norms_side_by_side(stride, groups):
    paddings = {
        "acnet": {"origin": (2, 1), "vertical": (2, 0), "horizontal": (0, 1)},
        "repvgg": {"origin": (2, 1), "conv1x1": (0, 0)},
        "mobileone": {**{f"conv{i}": (2, 1) for i in (1, 2, 3, 4)}, "conv1x1": (0, 0)},
    }
    for topology, branches in paddings.items():
        block = make(6, 6, (5, 3), stride, (2, 1), 1, groups, topology=topology).train()
        twins = {name: Pair(block, name, padding) for name, padding in branches.items()}
        if stride == 1 and topology != "acnet":
            twins["identity"] = copy.deepcopy(block.identity_bn)
        x = torch.randn(3, 6, 9, 8, dtype=F64)
        for _ in range(2):
            torch.testing.assert_close(block(x), sum(twin(x) for twin in twins.values()))
        norms = {name for name, _ in block.named_children()}
        assert norms == {f"{name}_bn" for name in twins}
        for name, twin in twins.items():
            theirs = getattr(twin, "norm", twin)
            torch.testing.assert_close(getattr(block, f"{name}_bn").running_var, theirs.running_var)


@pytest.mark.parametrize("topology", ["orepa", "ecb", "expandnet"])
def test_without_norms_it_is_the_unsqueezed_online_block(topology):
    online = randomize(OREPAConv(4, 4, 3, padding=1, topology=topology, dtype=F64))
    block = OfflineConv(4, 4, 3, padding=1, topology=topology, dtype=F64)
    block.load_state_dict(online.state_dict())
    x = torch.randn(2, 4, 6, 5, dtype=F64)
    torch.testing.assert_close(block(x), online.forward_branches(x), rtol=1e-12, atol=1e-12)
    assert not block.ends_in_norms


def test_parameters_are_those_of_the_online_block():
    for topology in NORMED:
        online = {name for name, _ in OREPAConv(4, 4, 3, topology=topology, bias=False).named_parameters()}
        block = OfflineConv(4, 4, 3, topology=topology)
        own = {name for name, _ in block.named_parameters() if "." not in name}
        assert own == online - {"scales"}
        assert block.bias is None and block.ends_in_norms
    state = OfflineConv(4, 6, 3).state_dict()
    assert {"avg_bn1.running_mean", "avg_bn2.weight", "origin_bn.num_batches_tracked"} <= set(state)
    assert state["conv1x1_kxk_bn1.weight"].shape == (4,) and state["conv1x1_kxk_bn2.weight"].shape == (6,)


@pytest.mark.parametrize("topology", ["dbb", "acnet", "ecb"])
def test_gradcheck(topology):
    # Padding follows running statistics, which carry no gradient in train mode, as in the authors' code: so none there.
    for training, padding in ((False, 1), (True, 0)):
        block = make(2, 2, 3, padding=padding, groups=2, topology=topology, momentum=0.0).train(training)
        names = [name for name, _ in block.named_parameters()]
        x = torch.randn(2, 2, 3, 4, dtype=F64, requires_grad=True)

        def run(x, *values, block=block, names=names):
            return torch.func.functional_call(block, dict(zip(names, values, strict=True)), (x,))

        assert gradcheck(run, (x, *block.parameters()))


def test_statistics_of_inner_norms_do_not_see_the_padding():
    block = OfflineConv(3, 5, 3, padding=1, topology="dbb", momentum=1.0, eps=1e-3, dtype=F64)
    assert {(norm.momentum, norm.eps) for norm in block.children()} == {(1.0, 1e-3)}
    x = torch.randn(2, 3, 4, 4, dtype=F64) + 5
    block(x)
    inner = F.conv2d(x, block.avg_weight)
    torch.testing.assert_close(block.avg_bn1.running_mean, inner.mean((0, 2, 3)))


# --- a good module --------------------------------------------------------------------------------------------------------


def test_copies_and_state_dict():
    block, x = make(4, 6, 3, padding=1), torch.randn(2, 4, 7, 7, dtype=F64)
    other = OfflineConv(4, 6, 3, padding=1, dtype=F64).eval()
    assert not torch.allclose(other(x), block(x))
    other.load_state_dict(block.state_dict())
    for twin in (other, copy.deepcopy(block), pickle.loads(pickle.dumps(block))):
        assert torch.equal(twin(x), block(x))
    block.reset_parameters()
    assert (block.avg_bn1.weight == 1).all() and (block.avg_bn1.running_mean == 0).all()
    meta = OfflineConv(4, 6, 3, padding=1, device="meta").to_empty(device="cpu").to(F64)
    meta.load_state_dict(other.state_dict())
    assert torch.equal(meta.eval()(x), other(x))


def test_to_conv2d_keeps_what_a_convolution_has():
    block = make(4, 6, 3, stride=2, padding=1, groups=2, topology="dbb").to(memory_format=torch.channels_last).float()
    plain = block.to_conv2d()
    assert plain.weight.is_contiguous(memory_format=torch.channels_last) and plain.weight.dtype == torch.float32
    assert (plain.stride, plain.groups, plain.training, plain.weight.requires_grad) == ((2, 2), 2, False, True)
    assert not block.requires_grad_(False).to_conv2d().bias.requires_grad
    assert block.to_conv2d(F64).weight.dtype == F64
    x = torch.randn(2, 4, 8, 8).to(memory_format=torch.channels_last)
    assert block(x).is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(plain(x), block(x), rtol=1e-4, atol=1e-4)
    assert "4, 6, kernel_size=(3, 3), stride=(2, 2), padding=(1, 1), groups=2, bias=False, topology=dbb" in repr(block)


def test_reduced_precision_and_compile():
    block, x = make(4, 4, 3, padding=1, topology="dbb").float(), torch.randn(2, 4, 9, 9)
    exact = block(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert relative_error(block(x).float(), exact) < 2e-2
    assert relative_error(copy.deepcopy(block).bfloat16()(x.bfloat16()).float(), exact) < 4e-2
    for training in (True, False):
        twin = copy.deepcopy(block.train(training))
        compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")
        for _ in range(2):  # the second padding depends on the statistics of the first call
            torch.testing.assert_close(compiled(x), block(x))


def test_synchronized_norms():
    block = nn.SyncBatchNorm.convert_sync_batchnorm(make(4, 4, 3, padding=1))
    assert all(isinstance(norm, nn.SyncBatchNorm) for norm in block.children())
    x = torch.randn(1, 4, 5, 5, dtype=F64)
    torch.testing.assert_close(block(x), block.to_conv2d()(x), rtol=1e-10, atol=1e-10)


def test_bad_arguments():
    for options, message in (
        ({"topology": "dbbb"}, "topology must be one of"),
        ({"groups": 3}, "groups=3 must divide in_channels=4"),
        ({"padding": -1}, "padding must not be negative"),
        ({"padding_mode": "mirror"}, "padding_mode must be one of"),
        ({"kernel_size": 4}, "branch 'conv1x1': a 1x1 kernel cannot be centred in the block's 4x4"),
        (
            {"topology": lambda spec: Topology(a=Branch(Nested(orepa.topology.catalogue.dbb, 3), Norm()))},
            "branch 'a' nests a block with branch-wise norms",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            OfflineConv(**{"in_channels": 4, "out_channels": 4, "kernel_size": 3, **options})
    with pytest.raises(TypeError, match="dtype must be"):
        OfflineConv(4, 4, 3, dtype=torch.int8)
    with pytest.raises(TypeError, match="branches"):
        OfflineConv(4, 4, 3, branches=2)


# --- prepare and convert --------------------------------------------------------------------------------------------------

OFFLINE = {"topology": "dbb", "offline": True}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8, eps=1e-3, momentum=0.2)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8)
        self.shared = nn.Conv2d(8, 8, 3, padding=1)
        self.group = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.GroupNorm(2, 8))
        self.head = nn.Conv2d(8, 5, 1)

    def forward(self, x):
        x = torch.relu(self.bn1(self.conv1(x)))
        x = torch.relu(self.bn2(self.conv2(x)))
        x = torch.relu(self.bn2(self.shared(x))) + x  # the second use of a norm
        return self.head(torch.relu(self.group(x))).mean((2, 3))


def details(model, action):
    return {layer.name: layer.detail for layer in orepa.report(model).select(action)}


def test_prepare_moves_the_norm_into_the_branches():
    model = orepa.prepare(Net(), {"conv1": OFFLINE, nn.Conv2d: OFFLINE})
    assert details(model, "swapped") == {"conv1": "dbb offline, in place of norm bn1"}
    assert isinstance(model.conv1, OfflineConv) and type(model.bn1) is nn.Identity
    assert (model.conv1.avg_bn2.eps, model.conv1.avg_bn2.momentum) == (1e-3, 0.2)
    unproven = "dbb offline: norm {} cannot be proven to be this convolution's batch norm alone"
    left = details(model, "left")
    assert left["conv2"] == left["shared"] == unproven.format("bn2")
    assert left["group.0"] == unproven.format("group.1")
    assert left["head"].startswith("no norm follows")
    assert type(model.bn2) is nn.BatchNorm2d and type(model.conv2) is nn.Conv2d
    again = orepa.prepare(model, "orepa")
    assert isinstance(again.conv1, OfflineConv) and isinstance(again.conv2, OREPAConv)

    kept = orepa.prepare(Net(), {"conv*": {"topology": "ecb", "offline": True}})
    assert details(kept, "swapped") == {"conv1": "ecb offline", "conv2": "ecb offline"}
    assert type(kept.bn1) is nn.BatchNorm2d, "a block without norms needs the one after it"
    assert kept.conv1.bias is None and kept.conv2.bias is not None

    preserved = orepa.prepare(Net(), {"conv1": OFFLINE}, preserve=True)
    assert "cannot start from the model's function" in details(preserved, "left")["conv1"]
    with pytest.raises(ValueError, match="topology must be one of"):
        orepa.prepare(Net(), {"conv1": {"topology": "dbbb", "offline": True}})
    assert not details(orepa.prepare(Net(), {"conv1": {"topology": "dbb", "offline": False}}), "swapped")[
        "conv1"
    ].endswith("norm bn1")


@pytest.mark.parametrize("topology", NORMED)
def test_prepare_train_convert(topology):
    model = orepa.prepare(Net(), {"conv1": {"topology": topology, "offline": True}, "conv2": "orepa"})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    x, target = torch.randn(16, 3, 10, 9), torch.randint(5, (16,))
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.conv1.parameters())
    plain = orepa.convert(model.eval(), example_inputs=x)
    assert details(plain, "converted")["conv1"] == f"{topology} trained offline"
    assert type(plain.conv1) is nn.Conv2d and plain.conv1.bias is not None
    torch.testing.assert_close(plain(x), model(x), rtol=1e-4, atol=1e-5)


def test_convert_folds_a_norm_that_follows():
    for dtype, tolerance in ((F64, 1e-10), (torch.float32, 1e-5)):
        model = nn.Sequential(make(4, 6, 3, padding=1).to(dtype), randomize(nn.BatchNorm2d(6, dtype=dtype))).eval()
        # Large means that cancel: rounding the block's bias before folding would show.
        with torch.no_grad():
            model[0].origin_bn.bias.add_(3e4)
            model[1].running_mean.add_(3e4)
        plain = orepa.convert(model)
        assert details(plain, "converted") == {"0": "dbb trained offline + 1"}
        assert type(plain[1]) is nn.Identity and plain[0].weight.dtype == dtype
        assert orepa.report(plain).max_error < tolerance
        assert orepa.convert(plain)[0].weight is not None


def test_convert_refuses_a_damaged_block():
    model = nn.Sequential(make(4, 6, 3, padding=1)).eval()
    model[0].origin_bn.running_var[2] = float("nan")
    with pytest.raises(orepa.ConversionError, match="non-finite"):
        orepa.convert(model)
    with pytest.raises(orepa.ConversionError, match="train mode"):
        orepa.convert(model.train())


def test_timm_resnet_trained_offline():
    timm = pytest.importorskip("timm")
    model = timm.create_model("resnet10t", num_classes=7)

    def dbb(name, conv):  # the published DBB-ResNet: k = 3 only
        return OFFLINE if conv.kernel_size == (3, 3) else None

    prepared = orepa.prepare(model, dbb)
    swapped = details(prepared, "swapped")
    assert len(swapped) == sum(isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3) for m in model.modules())
    assert all("in place of norm" in detail for detail in swapped.values())
    prepared.train()(torch.randn(2, 3, 40, 33)).sum().backward()
    x = torch.randn(2, 3, 40, 33)
    plain = orepa.convert(prepared.eval(), example_inputs=x)
    assert sum(isinstance(m, OfflineConv) for m in plain.modules()) == 0
    assert orepa.report(plain).error < 1e-4


def test_an_activation_that_a_norm_carries_stays():
    timm = pytest.importorskip("timm")
    norm = timm.layers.BatchNormAct2d(6)
    model = orepa.prepare(nn.Sequential(nn.Conv2d(4, 6, 3), norm), {"0": OFFLINE})
    assert isinstance(model[0], OfflineConv) and isinstance(model[1], nn.ReLU)
    assert (model(torch.randn(2, 4, 6, 6)) >= 0).all()
