"""Blocks of RepVGG, MobileOne and DBB under their authors' names: the same function offline, and in eval mode online."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from orepa import OfflineConv, OREPAConv
from orepa.modules.official_blocks import block_from_official
from orepa.modules.online_form import online_form

F64, EPS = torch.float64, 1e-3

# --- their blocks, from the formulas of their papers ------------------------------------------------------------------------


class Theirs:
    """One block as a state dict with their keys, and its forward pass. Subclasses list its tensors and add its branches."""

    def __init__(self, i, o, k=3, stride=1, groups=1, **options):
        self.i, self.o, self.k, self.stride, self.groups = i, o, k, stride, groups
        self.state, self.training, self.momentum = {}, True, 0.1
        self.has_identity = i == o and stride == 1
        self.declare(**options)
        self.geometry = {"stride": stride, "padding": k // 2, "groups": groups, "eps": EPS}

    def add_conv(self, name, o, i, k):
        self.state[f"{name}.weight"] = torch.randn(o, i // self.groups, k, k, dtype=F64)

    def add_norm(self, name, channels):
        low = {"weight": -1.0, "bias": -1.0, "running_mean": -1.0, "running_var": 0.3}
        self.state |= {f"{name}.{kind}": torch.rand(channels, dtype=F64) * 1.5 + a for kind, a in low.items()}
        self.state[f"{name}.num_batches_tracked"] = torch.tensor(7)

    def add_pair(self, name, k):
        self.add_conv(f"{name}.conv", self.o, self.i, k)
        self.add_norm(f"{name}.bn", self.o)

    def conv(self, name, x, stride=1, padding=0):
        return F.conv2d(x, self.state[f"{name}.weight"], None, stride, padding, 1, self.groups)

    def norm(self, name, x):
        mean, var, weight, bias = (self.state[f"{name}.{n}"] for n in ("running_mean", "running_var", "weight", "bias"))
        return F.batch_norm(x, mean, var, weight, bias, self.training, self.momentum, EPS)

    def pair(self, name, x, padding):
        return self.norm(f"{name}.bn", self.conv(f"{name}.conv", x, self.stride, padding))


class RepVGG(Theirs):
    def declare(self):
        self.add_pair("rbr_dense", 3)
        self.add_pair("rbr_1x1", 1)
        if self.has_identity:
            self.add_norm("rbr_identity", self.i)

    def __call__(self, x):
        y = self.pair("rbr_dense", x, 1) + self.pair("rbr_1x1", x, 0)
        return y + self.norm("rbr_identity", x) if self.has_identity else y


class MobileOne(Theirs):
    def declare(self, branches):
        self.branches = branches
        for n in range(branches):
            self.add_pair(f"rbr_conv.{n}", self.k)
        if self.k > 1:
            self.add_pair("rbr_scale", 1)
        if self.has_identity:
            self.add_norm("rbr_skip", self.i)

    def __call__(self, x):
        y = sum(self.pair(f"rbr_conv.{n}", x, self.k // 2) for n in range(self.branches))
        y = y + self.pair("rbr_scale", x, 0) if self.k > 1 else y
        return y + self.norm("rbr_skip", x) if self.has_identity else y


class DBB(Theirs):
    def declare(self, internal=None):
        depthwise = self.groups == self.o
        internal = internal or (2 * self.i if depthwise else self.i)
        self.has_1x1, self.first = not depthwise, "idconv1" if internal == self.i else "conv1"
        self.add_pair("dbb_origin", self.k)
        if self.has_1x1:
            self.add_conv("dbb_avg.conv", self.o, self.i, 1)
            self.add_norm("dbb_avg.bn.bn", self.o)
            self.add_pair("dbb_1x1", 1)
        self.add_norm("dbb_avg.avgbn", self.o)
        self.add_conv(f"dbb_1x1_kxk.{self.first}", internal, self.i, 1)
        self.add_norm("dbb_1x1_kxk.bn1.bn", internal)
        self.add_conv("dbb_1x1_kxk.conv2", self.o, internal, self.k)
        self.add_norm("dbb_1x1_kxk.bn2", self.o)

    def norm_and_pad(self, name, x):
        """The border is what zeros become by the running statistics."""
        y, training = self.norm(name, x), self.training
        self.training = False
        border = self.norm(name, x.new_zeros(1, x.shape[1], 1, 1)).detach()
        self.training = training
        inside = F.pad(torch.ones_like(y[:1, :1]), [self.k // 2] * 4)
        return F.pad(y, [self.k // 2] * 4) + border * (1 - inside)

    def __call__(self, x):
        first = x
        if self.has_1x1:
            first = self.norm_and_pad("dbb_avg.bn.bn", self.conv("dbb_avg.conv", x))
        pooled = F.avg_pool2d(first, self.k, self.stride, 0 if self.has_1x1 else self.k // 2)
        inner = self.conv(f"dbb_1x1_kxk.{self.first}", x)
        if self.first == "idconv1":
            inner = inner + x
        inner = self.conv("dbb_1x1_kxk.conv2", self.norm_and_pad("dbb_1x1_kxk.bn1.bn", inner), self.stride)
        y = self.pair("dbb_origin", x, self.k // 2) + self.norm("dbb_avg.avgbn", pooled)
        y = y + self.norm("dbb_1x1_kxk.bn2", inner)
        return y + self.pair("dbb_1x1", x, 0) if self.has_1x1 else y


CASES = {
    "repvgg": lambda: RepVGG(4, 4),
    "repvgg_s2": lambda: RepVGG(4, 6, stride=2),
    "repvgg_s2_same_width": lambda: RepVGG(4, 4, stride=2),
    "repvgg_g2": lambda: RepVGG(4, 4, groups=2),
    "mobileone_depthwise": lambda: MobileOne(5, 5, groups=5, branches=4),
    "mobileone_depthwise_s2": lambda: MobileOne(5, 5, stride=2, groups=5, branches=4),
    "mobileone_1x1": lambda: MobileOne(4, 6, k=1, branches=4),
    "mobileone_1x1_identity": lambda: MobileOne(4, 4, k=1, branches=2),
    "mobileone_one_branch": lambda: MobileOne(3, 6, stride=2, branches=1),
    "dbb": lambda: DBB(4, 6),
    "dbb_s2_g2": lambda: DBB(4, 6, stride=2, groups=2),
    "dbb_internal": lambda: DBB(4, 6, groups=2, internal=8),
    "dbb_depthwise": lambda: DBB(4, 4, groups=4),
    "dbb_depthwise_identity": lambda: DBB(4, 4, groups=4, internal=4),
    "dbb_5x5": lambda: DBB(2, 3, k=5),
}


@pytest.fixture(params=CASES)
def theirs(request):
    torch.manual_seed(0)
    return CASES[request.param]()


def image(theirs, size=7, count=2):
    return torch.randn(count, theirs.i, size, size, dtype=F64) + 0.5


def close(got, expected):
    torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-11)


# --- the same function --------------------------------------------------------------------------------------------------


def test_offline_block_trains_as_theirs(theirs):
    block = block_from_official(theirs.state, **theirs.geometry)
    assert isinstance(block, OfflineConv) and block.training
    x = image(theirs).requires_grad_()
    other = x.detach().clone().requires_grad_()
    y, expected = block(x), theirs(other)  # which moves its statistics
    close(y, expected)
    upstream = torch.randn_like(y)
    (gradient,) = torch.autograd.grad(y, x, upstream)
    close(gradient, torch.autograd.grad(expected, other, upstream)[0])
    block.eval()
    theirs.training = False
    close(block(x), theirs(x))
    close(block.to_conv2d()(x), theirs(x))


def test_online_block_is_the_same_function_in_eval_mode(theirs):
    block = block_from_official(theirs.state, **theirs.geometry, online=True)
    conv, norm = block
    assert isinstance(conv, OREPAConv) and conv.bias is None and type(norm) is nn.BatchNorm2d and block.training
    assert norm.eps == EPS and norm.num_batches_tracked == 7
    assert {p.dtype for p in block.parameters()} == {F64} and all(p.requires_grad for p in block.parameters())
    offline = block_from_official(theirs.state, **theirs.geometry)
    ours, weights = dict(conv.named_parameters()), {n: p for n, p in offline.named_parameters() if "_bn" not in n}
    assert ours.keys() == weights.keys() | {"scales"}, "the branches are those of the checkpoint"
    theirs.training, x = False, image(theirs)
    close(block.eval()(x), theirs(x))
    close(norm(conv.forward_branches(x)), theirs(x))


def test_the_norm_after_an_online_block_has_the_statistics_of_the_sum(theirs):
    """The mean to the correction that running variances take; the variance, for white input, to the size of the sample."""
    theirs.momentum, x = 1.0, torch.randn(16, theirs.i, 40, 40, dtype=F64)
    theirs(x)  # its statistics are now those of this batch
    conv, norm = block_from_official(theirs.state, **theirs.geometry, online=True)
    y = conv(x).detach()
    assert ((norm.running_mean - y.mean((0, 2, 3))).abs() / y.std((0, 2, 3)) < 1e-5).all()
    torch.testing.assert_close(norm.running_var, y.var((0, 2, 3)), rtol=0.1, atol=0)


def test_a_block_is_a_copy_that_pickles_and_costs_no_random_number(theirs):
    before = copy.deepcopy(theirs.state)
    for online in (False, True):
        seed = torch.get_rng_state()
        block = block_from_official(theirs.state, **theirs.geometry, online=online)
        assert torch.equal(torch.get_rng_state(), seed)
        x = image(theirs)
        assert torch.equal(pickle.loads(pickle.dumps(block)).eval()(x), copy.deepcopy(block).eval()(x))
        block(x)
        with torch.no_grad():
            for parameter in block.parameters():
                parameter.zero_()
    assert all(torch.equal(value, before[key]) for key, value in theirs.state.items())


def test_single_precision(theirs):
    state = {key: value.float() if value.is_floating_point() else value for key, value in theirs.state.items()}
    theirs.training, x = False, image(theirs)
    for online in (False, True):
        block = block_from_official(state, **theirs.geometry, online=online).eval()
        torch.testing.assert_close(block(x.float()), theirs(x).float(), rtol=1e-4, atol=1e-4)


def test_half_precision_weights_beside_norms_in_float32():
    theirs = DBB(4, 6)
    state = {key: value.bfloat16() if value.dim() == 4 else value.float() for key, value in theirs.state.items()}
    conv, norm = block_from_official(state, **theirs.geometry, online=True).eval()
    assert (conv.scales.dtype, norm.weight.dtype) == (torch.bfloat16, torch.float32)
    theirs.training, x = False, image(theirs)
    got, expected = norm(conv(x.bfloat16()).float()), theirs(x)
    assert (got - expected).norm() / expected.norm() < 0.02


# --- bad input ------------------------------------------------------------------------------------------------------------


def drop(key):
    return lambda state: state.pop(key)


def put(key, *shape):
    return lambda state: state.update({key: torch.zeros(shape, dtype=F64)})


@pytest.mark.parametrize(
    ("case", "change", "arguments", "message"),
    [
        ("repvgg", drop("rbr_1x1.bn.bias"), {}, r"repvgg block \(4 to .*an identity\): missing 'rbr_1x1.bn.bias'$"),
        ("repvgg", drop("rbr_dense.conv.weight"), {}, "no complete repvgg block: missing 'rbr_dense.conv.weight'"),
        ("repvgg", lambda state: None, {"stride": 2}, "no identity.*unexpected 'rbr_identity.weight'"),
        ("repvgg_s2", lambda state: None, {"stride": 2, "dilation": 2}, "repvgg block always trains with dilation=1"),
        ("repvgg", put("se.down.weight", 1, 4, 1, 1), {}, "unexpected 'se.down.weight'"),
        ("mobileone_1x1", put("rbr_scale.conv.weight", 6, 4, 1, 1), {}, "unexpected 'rbr_scale.conv.weight'"),
        ("mobileone_depthwise", drop("rbr_conv.1.bn.weight"), {}, "missing 'rbr_conv.1.bn.weight'"),
        ("mobileone_depthwise", drop("rbr_skip.running_var"), {}, "missing 'rbr_skip.running_var'"),
        ("mobileone_depthwise", put("rbr_conv.2.conv.weight", 5, 5, 3, 3), {}, r"\[5, 1, 3, 3\], got \[5, 5, 3, 3\]"),
        (
            "mobileone_depthwise",
            put("reparam_conv.weight", 5, 1, 3, 3),
            {},
            r"deployed already \('reparam_conv.weight'\)",
        ),
        ("repvgg", put("rbr_reparam.weight", 4, 4, 3, 3), {}, r"deployed already \('rbr_reparam.weight'\)"),
        ("dbb", drop("dbb_avg.bn.bn.running_mean"), {}, "no complete dbb block: missing 'dbb_avg.bn.bn.running_mean'"),
        ("dbb", drop("dbb_1x1_kxk.idconv1.weight"), {}, "missing 'dbb_1x1_kxk.idconv1.weight'"),
        ("dbb_depthwise", put("dbb_1x1.conv.weight", 4, 1, 1, 1), {}, "unexpected 'dbb_1x1.conv.weight'"),
        (
            "dbb_internal",
            lambda state: None,
            {"groups": 1},
            r"conv1.weight' must be \[8, 2, 1, 1\]|conv2.weight' must be",
        ),
        ("dbb", put("dbb_origin.conv.weight", 6), {}, r"must be \[O, I/g, kh, kw\], got \[6\]"),
    ],
)
def test_bad_input_is_named(case, change, arguments, message):
    theirs = CASES[case]()
    change(theirs.state)
    with pytest.raises(ValueError, match=message):
        block_from_official(theirs.state, **{**theirs.geometry, **arguments})


def test_the_online_form_shares_no_tensor_with_the_offline_block():
    block = block_from_official(DBB(4, 6).state, **DBB(4, 6).geometry)
    online = online_form(block, "dbb")
    ours, theirs = block.state_dict(), online.state_dict()  # both alive, as some tensors are made when asked for
    own = {tensor.data_ptr() for tensor in ours.values()}
    assert own.isdisjoint(tensor.data_ptr() for tensor in theirs.values())
