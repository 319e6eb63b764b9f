"""`convert`: plain convolutions, batch norms folded where that is provable, and nothing changed or lost."""

import copy

import pytest
import torch
from torch import nn

import orepa
from orepa import ConversionError, OREPAConv, RepVGGBlock


class ConvNorm(nn.Module):
    def __init__(self, i, o, k=3, **kwargs):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(i, o, k, padding=k // 2, bias=False, **kwargs), nn.BatchNorm2d(o)

    def forward(self, x):
        return torch.relu(self.bn(self.conv(x)))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.body = ConvNorm(3, 8, 7, stride=2), ConvNorm(8, 8, groups=4)
        self.vgg = RepVGGBlock(8, 8)
        self.head = nn.Sequential(nn.Conv2d(8, 4, 1), nn.BatchNorm2d(4))

    def forward(self, x):
        return self.head(self.vgg(self.body(self.stem(x)))).mean((2, 3))


def trained(model):
    """Parameters and running statistics as a training leaves them: nothing at its initial value."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
            if "bn" in name and name.endswith("weight"):
                parameter.abs_()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_()
                module.running_var.uniform_(0.2, 3.0)
    return model.eval()


@pytest.fixture
def model():
    return trained(orepa.prepare(Net()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_function_stays_and_everything_is_plain(model, dtype):
    model, x = model.to(dtype), torch.randn(2, 3, 20, 18, dtype=dtype)
    expected = model(x)
    plain = orepa.convert(model, example_inputs=x)
    kinds = {type(m) for m in plain.modules()}
    assert not kinds & {OREPAConv, RepVGGBlock, nn.BatchNorm2d} and nn.Conv2d in kinds
    error = (plain(x) - expected).norm() / expected.norm()
    assert error <= {torch.float32: 1e-5, torch.float64: 1e-12}[dtype]
    report = orepa.report(plain)
    assert [layer.action for layer in report.layers] == ["converted"] * 4
    assert report.max_error <= 8 * torch.finfo(dtype).eps and report.error == pytest.approx(error.item(), abs=1e-9)
    assert report.parameters[1] == sum(p.numel() for p in plain.parameters()) < report.parameters[0]
    assert isinstance(model.stem.conv, OREPAConv), "a copy is converted by default"
    assert torch.equal(model(x), expected)


def test_again_changes_nothing_and_inplace_is_in_place(model):
    x = torch.randn(2, 3, 20, 18)
    once = orepa.convert(model)
    twice = orepa.convert(once)
    assert torch.equal(twice(x), once(x)) and orepa.report(twice).layers == []
    assert orepa.convert(model, inplace=True) is model and type(model.stem.conv) is nn.Conv2d


def test_train_mode_is_refused(model):
    with pytest.raises(ConversionError, match=r"eval mode \(call model.eval\(\) first\)"):
        orepa.convert(model.train())
    model.eval().body.bn.train()
    with pytest.raises(ConversionError, match="body.bn"):
        orepa.convert(model)


def test_bn_folding_is_optional(model):
    x = torch.randn(2, 3, 20, 18)
    plain = orepa.convert(model, fold_bn=False)
    assert isinstance(plain.stem.bn, nn.BatchNorm2d) and type(plain.stem.conv) is nn.Conv2d
    torch.testing.assert_close(plain(x), model(x), rtol=1e-4, atol=1e-5)


def test_flags_and_formats_stay():
    model = trained(orepa.prepare(Net())).to(memory_format=torch.channels_last)
    for parameter in model.stem.parameters():
        parameter.requires_grad_(False)
    plain = orepa.convert(model)
    assert not plain.stem.conv.weight.requires_grad and not plain.stem.conv.bias.requires_grad
    assert plain.body.conv.weight.requires_grad and plain.body.conv.bias.requires_grad
    assert plain.body.conv.weight.is_contiguous(memory_format=torch.channels_last)
    plain.train()(torch.randn(2, 3, 16, 16)).sum().backward()
    assert plain.body.conv.weight.grad is not None, "a deployed model can be trained on"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_models_convert_with_one_rounding(dtype):
    model = trained(orepa.prepare(Net())).to(dtype)
    plain = orepa.convert(model)
    assert all(p.dtype == dtype for p in plain.parameters())
    x = torch.randn(2, 3, 20, 18, dtype=dtype)
    exact = copy.deepcopy(model).double()(x.double())
    error = (plain(x).double() - exact).norm() / exact.norm()
    assert error <= 2 * (model(x).double() - exact).norm() / exact.norm() + torch.finfo(dtype).eps


# --- what may be folded -----------------------------------------------------------------------------------------------------


class Shared(nn.Module):
    """The norm takes the convolution's output, but is not alone in it: folding would change the sum."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)

    def forward(self, x):
        y = self.conv(x)
        return self.bn(y) + y


class Untraceable(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)
        self.sequence = nn.Sequential(nn.Conv2d(3, 3, 1), nn.Identity(), nn.BatchNorm2d(3), _DataDependent())

    def forward(self, x):
        return self.sequence(self.bn(self.conv(x))) if x.sum() < 1e9 else x


class _DataDependent(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.bn = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)

    def forward(self, x):
        return self.bn(self.b(self.bn(self.a(x))))


def folded(model):
    return [layer.name for layer in orepa.report(model).select("folded")]


def test_only_provable_norms_are_folded():
    x = torch.randn(2, 3, 8, 8)
    for build in (Shared, Twice):
        model = trained(build())
        plain = orepa.convert(model, example_inputs=x, merge=False)
        assert folded(plain) == [] and torch.equal(plain(x), model(x))
    by_place = trained(Untraceable())
    assert folded(orepa.convert(by_place)) == ["sequence.0"], "an nn.Sequential is proof, a place is not"
    checked = orepa.convert(by_place, example_inputs=x)
    assert folded(checked) == ["conv", "sequence.0"]
    torch.testing.assert_close(checked(x), by_place(x), rtol=1e-4, atol=1e-5)


def test_norms_without_running_statistics_stay():
    model = nn.Sequential(nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3, track_running_stats=False)).eval()
    assert isinstance(orepa.convert(model)[1], nn.BatchNorm2d)
    model = trained(nn.Sequential(nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3, affine=False)))
    x = torch.randn(2, 3, 8, 8)
    plain = orepa.convert(model, example_inputs=x)
    assert isinstance(plain[1], nn.Identity)


@pytest.mark.parametrize("mode", ["zeros", "reflect", "circular"])
def test_padding_modes_fold(mode):
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, padding_mode=mode), nn.BatchNorm2d(4), nn.ReLU())
    model, x = trained(orepa.prepare(model)), torch.randn(2, 3, 8, 8)
    assert isinstance(orepa.convert(model, example_inputs=x)[1], nn.Identity)


def test_norm_with_activation_keeps_the_activation():
    layers = pytest.importorskip("timm.layers", reason="timm is not installed (the [models] extra)")
    model = nn.Sequential(nn.Conv2d(3, 4, 3), layers.BatchNormAct2d(4), nn.Conv2d(4, 4, 1))
    model, x = trained(orepa.prepare(model)), torch.randn(2, 3, 8, 8)
    plain = orepa.convert(model, example_inputs=x)
    assert isinstance(plain[1], nn.ReLU)


# --- a call that is more than the class's forward ----------------------------------------------------------------------------


class Doubled(OREPAConv):
    def forward(self, x):
        return super().forward(x) * 2


class DoubledKernel(OREPAConv):
    """Its forward is OREPAConv's, what that calls is not: only a call shows it."""

    def _convolve(self, x, weight, bias):
        return super()._convolve(x, weight * 2, bias)


def hook(module):
    module.register_forward_hook(lambda _module, _inputs, output: output * 2)


def pre_hook(module):
    module.register_forward_pre_hook(lambda _module, inputs: (inputs[0] * 2,))


def patch(module):
    forward = module.forward
    module.forward = lambda x: forward(x) * 2


@pytest.mark.parametrize("change", [hook, pre_hook, patch])
@pytest.mark.parametrize("build", [OREPAConv, RepVGGBlock, orepa.OfflineConv])
def test_blocks_whose_call_is_more_than_their_forward_are_refused(build, change):
    model = trained(nn.Sequential(build(3, 3, 3, padding=1), nn.BatchNorm2d(3)))
    change(model[0])
    with pytest.raises(ConversionError, match="^0: it"):
        orepa.convert(model, inplace=True)
    assert type(model[0]) is build


@pytest.mark.parametrize(
    ("build", "message"),
    [(Doubled, "Doubled may compute something else"), (DoubledKernel, "the converted layer differs")],
)
def test_subclasses_that_compute_something_else_are_refused(build, message):
    with pytest.raises(ConversionError, match=f"^0: {message}"):
        orepa.convert(trained(nn.Sequential(build(3, 3, 3), nn.BatchNorm2d(3))))


def test_hooks_inside_a_block_are_refused_and_those_of_its_activation_stay():
    x = torch.randn(2, 3, 6, 6)
    for block, inner in [
        (RepVGGBlock(3, 3), "pointwise_bn"),
        (orepa.OfflineConv(3, 3, 3, topology="dbb"), "origin_bn"),
    ]:
        model = trained(nn.Sequential(block))
        hook(model[0].get_submodule(inner))
        with pytest.raises(ConversionError, match=rf"^0\.{inner}: it has forward hooks"):
            orepa.convert(model)
    model = trained(nn.Sequential(RepVGGBlock(3, 3)))
    hook(model[0].act)
    torch.testing.assert_close(orepa.convert(model)(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("change", [hook, pre_hook, patch])
@pytest.mark.parametrize("at", [0, 1, 2])
def test_what_stands_beside_a_fold_keeps_its_hooks(at, change):
    """A plain convolution, the norm after it and what lies between them: with a hook on any of them, nothing is folded."""
    model = trained(nn.Sequential(nn.Conv2d(3, 3, 3), nn.Identity(), nn.BatchNorm2d(3), OREPAConv(3, 3, 1)))
    change(model[at])
    x = torch.randn(2, 3, 6, 6)
    plain = orepa.convert(model, example_inputs=x)
    assert folded(plain) == [] and type(plain[3]) is nn.Conv2d
    torch.testing.assert_close(plain(x), model(x), rtol=1e-4, atol=1e-5)


# --- damage is reported ---------------------------------------------------------------------------------------------------


def test_non_finite_layers_are_named(model):
    with torch.no_grad():
        model.body.bn.running_var[0] = float("nan")
    with pytest.raises(ConversionError, match=r"body.conv: .*non-finite"):
        orepa.convert(model, inplace=True)
    assert isinstance(model.stem.conv, OREPAConv)


def test_a_planted_mistake_is_caught(model, monkeypatch):
    """The verification compares with the unsqueezed branches, so a wrong squeeze cannot hide from it."""
    real = OREPAConv._compose

    def wrong(self, dtype):
        kernel = real(self, dtype)
        return kernel.flip(3) if kernel.shape[-1] == 7 else kernel

    monkeypatch.setattr(OREPAConv, "_compose", wrong)
    with pytest.raises(ConversionError, match=r"stem.conv: the converted layer differs by"):
        orepa.convert(model)


def test_outputs_that_change_are_caught(model):
    x = torch.randn(2, 3, 20, 18)
    with pytest.raises(ConversionError, match="allowed is 1.0e-12"):
        orepa.convert(model, example_inputs=x, tolerance=1e-12)
    assert isinstance(model.stem.conv, OREPAConv)

    class Many(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = model

        def forward(self, image, scale):
            return {"out": self.net(image) * scale, "n": 3}

    many = Many().eval()
    assert orepa.report(orepa.convert(many, example_inputs=(x, 2.0))).error < 1e-5
    assert orepa.report(orepa.convert(many, example_inputs={"image": x, "scale": 2.0})).error < 1e-5


def test_one_module_and_dataparallel_like_wrappers():
    conv = trained(OREPAConv(3, 4, 3))
    assert type(orepa.convert(conv)) is nn.Conv2d and type(conv) is OREPAConv
    block = trained(RepVGGBlock(4, 4))
    plain = orepa.convert(block)
    assert [type(m) for m in plain] == [nn.Conv2d, nn.ReLU]
    x = torch.randn(2, 4, 6, 6)
    torch.testing.assert_close(plain(x), block(x), rtol=1e-4, atol=1e-5)
