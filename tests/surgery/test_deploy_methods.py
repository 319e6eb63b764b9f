"""Deployment code that a model brings along works on the converted model, and gives the same outputs."""

import copy

import pytest
import torch
from detectors import fuse_conv_and_bn
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from trained import trained

import orepa


def fuse_without_bias(conv, bn):
    """As most re-parameterised blocks have it: a convolution before a norm has no bias."""
    std = (bn.running_var + bn.eps).sqrt()
    t = (bn.weight / std).reshape(-1, 1, 1, 1)
    return conv.weight * t, bn.bias - bn.running_mean * bn.weight / std


class Conv(nn.Module):
    """The unit of detectors."""

    def __init__(self, i, o, k=3):
        super().__init__()
        self.conv, self.bn, self.act = nn.Conv2d(i, o, k, padding=k // 2, bias=False), nn.BatchNorm2d(o), nn.SiLU()

    def forward(self, x):
        return self.act(self.bn(self.conv(x)))


class ConvWithSecondForward(Conv):
    """Here another method calls the convolution without its norm, so that nothing is folded."""

    def forward_fuse(self, x):
        return self.act(self.conv(x))


class RepConv(nn.Module):
    """Two branches in training, one convolution after `fuse_convs`, which ignores the biases of the branches."""

    def __init__(self, i, o):
        super().__init__()
        self.conv1, self.conv2, self.act = Conv(i, o, 3), Conv(i, o, 1), nn.SiLU()
        self.conv1.act = self.conv2.act = nn.Identity()

    def forward(self, x):
        return self.act(self.conv1(x) + self.conv2(x))

    def forward_fuse(self, x):
        return self.act(self.conv(x))

    def get_equivalent_kernel_bias(self):
        k3, b3 = self._fuse_bn_tensor(self.conv1)
        k1, b1 = self._fuse_bn_tensor(self.conv2)
        return k3 + nn.functional.pad(k1, [1, 1, 1, 1]), b3 + b1

    def _fuse_bn_tensor(self, branch):
        return fuse_without_bias(branch.conv, branch.bn)

    def fuse_convs(self):
        kernel, bias = self.get_equivalent_kernel_bias()
        self.conv = nn.Conv2d(kernel.shape[1], kernel.shape[0], 3, padding=1).requires_grad_(False)
        self.conv.weight.data, self.conv.bias.data = kernel.detach(), bias.detach()
        del self.conv1, self.conv2


class Detector(nn.Module):
    def __init__(self, *layers):
        super().__init__()
        self.model = nn.Sequential(*layers)

    def forward(self, x):
        return self.model(x)

    @torch.no_grad()
    def fuse(self):
        print("Fusing layers...")
        for m in self.modules():
            if isinstance(m, Conv) and hasattr(m, "bn") and hasattr(m.bn, "running_var"):
                m.conv = fuse_conv_and_bn(m.conv, m.bn)
                if hasattr(m, "forward_fuse"):
                    del m.bn
                    m.forward = m.forward_fuse
                else:
                    m.bn = nn.Identity()
            if isinstance(m, RepConv) and hasattr(m, "conv1"):
                m.fuse_convs()
                m.forward = m.forward_fuse
        return self


def assert_same(actual, expected):
    assert (actual - expected).norm() <= 1e-4 * expected.norm()


def actions(model):
    return {layer.name: layer.action for layer in orepa.report(model).layers}


@pytest.mark.parametrize("prepare", [False, True])
def test_a_detector_fuses_after_conversion_and_folds_where_its_code_allows(prepare, capsys):
    model = Detector(Conv(3, 8), RepConv(8, 8), Conv(8, 4, 1))
    one_by_one = orepa.prepare(model, lambda name, _: None if name == "model.1" else "orepa") if prepare else model
    model, x = trained(one_by_one), torch.randn(2, 3, 9, 9)
    expected = model(x)
    merged = orepa.convert(model)
    assert [type(m) for m in merged.model[1].children()] == [nn.Conv2d, nn.SiLU]
    assert_same(merged(x), expected)
    assert_same(copy.deepcopy(merged).fuse()(x), expected)
    capsys.readouterr()
    plain = orepa.convert(model, merge=False)
    assert capsys.readouterr().out == "", "trials of other people's code are silent"
    assert isinstance(plain.model[0].bn, nn.Identity) and isinstance(plain.model[2].bn, nn.Identity)
    assert isinstance(plain.model[1].conv1.bn, nn.BatchNorm2d)
    details = {layer.name: layer.detail for layer in orepa.report(plain).layers}
    assert "norm model.1.conv1.bn left: RepConv.get_equivalent_kernel_bias reads it" in details["model.1.conv1.conv"]
    assert_same(plain(x), expected)
    assert_same(copy.deepcopy(plain).fuse()(x), expected)
    again = orepa.convert(plain, merge=False)
    assert actions(again) == {"model.1.conv1.conv": "left", "model.1.conv2.conv": "left"}


@pytest.mark.parametrize("prepare", [False, True])
def test_a_detector_with_a_second_forward_fuses_after_conversion(prepare):
    model = Detector(ConvWithSecondForward(3, 8), ConvWithSecondForward(8, 4, 1))
    model, x = trained(orepa.prepare(model) if prepare else model), torch.randn(2, 3, 9, 9)
    assert_same(orepa.convert(model).fuse()(x), model(x))


def test_all_folds_everything():
    model, x = trained(Detector(Conv(3, 8), RepConv(8, 8))), torch.randn(2, 3, 9, 9)
    plain = orepa.convert(model, fold_bn="all", merge=False)
    assert set(actions(plain).values()) == {"folded"} and len(actions(plain)) == 3
    assert_same(plain(x), model(x))
    with pytest.raises(ValueError, match="fold_bn must be"):
        orepa.convert(model, fold_bn="some")


class Deploying(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 3, 3, bias=False), nn.BatchNorm2d(3)

    def forward(self, x):
        return self.bn(self.conv(x))


class Ignores(Deploying):
    def switch_to_deploy(self):
        weight, bias = fuse_without_bias(self.conv, self.bn)
        self.conv = nn.Conv2d(3, 3, 3)
        self.conv.weight.data, self.conv.bias.data = weight.detach(), bias.detach()
        self.bn = nn.Identity()


class Returns(Deploying):
    def fuse(self):
        result = nn.Conv2d(3, 3, 3)
        result.weight.data, result.bias.data = fuse_without_bias(self.conv, self.bn)
        return result


class ReturnsTensors(Deploying):
    def get_equivalent_kernel_bias(self):
        return fuse_without_bias(self.conv, self.bn)


class OnlyHelper(Deploying):
    def _fuse_bn_tensor(self, conv, bn):
        return fuse_without_bias(conv, bn)


class ChecksType(Deploying):
    def fuse_model(self, is_qat=None):
        assert isinstance(self.bn, nn.BatchNorm2d)
        self.bn = nn.Identity()


class InPlace(Deploying):
    @torch.no_grad()
    def merge_bn(self):
        weight, bias = fuse_without_bias(self.conv, self.bn)
        self.conv.weight.copy_(weight)
        self.bn.reset_running_stats()
        self.bn.eps = 0.0
        self.bn.weight.fill_(1.0)
        self.bn.bias.copy_(bias)


@pytest.mark.parametrize("build", [Ignores, Returns, ReturnsTensors, OnlyHelper, ChecksType, InPlace])
def test_norms_that_a_deploy_method_would_misread_stay(build):
    for model in (trained(build()), trained(nn.Sequential(nn.Sequential(build()), nn.ReLU()))):
        plain = orepa.convert(model)
        (layer,) = orepa.report(plain).layers
        if build is Returns and len(list(model.modules())) > 3:  # a caller would put that convolution in its place
            assert layer.action == "merged" and not any(isinstance(m, Returns) for m in plain.modules())
            continue
        assert layer.action == "left" and f"left: {build.__name__}." in layer.detail
        assert orepa.convert(model, fold_bn=False).state_dict().keys() == plain.state_dict().keys()


class HandlesBias(Deploying):
    def reparameterize(self):
        self.conv = fuse_conv_bn_eval(self.conv, self.bn)
        self.bn = nn.Identity()


class OtherMeaning(Deploying):
    """Two more words of the field with another meaning, and a method that builds at random."""

    def fuse(self, low, high):
        return low + high

    def reparameterize(self, mean, variance):
        return mean + torch.randn_like(mean) * variance.sqrt()

    def fuse_layers(self):
        return nn.ModuleList([nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1)])


@pytest.mark.parametrize("build", [HandlesBias, OtherMeaning])
def test_norms_that_no_deploy_method_misreads_are_folded(build):
    model, x = trained(build()), torch.randn(2, 3, 9, 9)
    state, random = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    plain = orepa.convert(model)
    assert actions(plain) == {"conv": "folded"}
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    if build is HandlesBias:
        plain.reparameterize()
        assert_same(plain(x), model(x))


@pytest.mark.parametrize("name", ["repvgg_a0", "levit_128s", "repghostnet_050"])
def test_timm_reparameterizes_a_converted_model(name):
    timm = pytest.importorskip("timm", reason="timm is not installed (the [models] extra)")
    from timm.utils import reparameterize_model

    model = trained(timm.create_model(name))
    x = torch.randn(1, 3, *([224] * 2 if "levit" in name else [32] * 2))
    with torch.no_grad():
        plain = orepa.convert(model)
        assert_same(reparameterize_model(plain)(x), model(x))


def test_torch_fuses_a_folded_pair():
    model, x = trained(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))), torch.randn(2, 3, 9, 9)
    plain = orepa.convert(model)
    assert_same(fuse_conv_bn_eval(plain[0], plain[1])(x), model(x))
