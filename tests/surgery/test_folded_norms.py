"""Which norms are folded, frozen ones included, and what is left in their place."""

import copy
import io
from collections import OrderedDict

import pytest
import torch
from torch import nn
from trained import trained

import orepa
from orepa import ConversionError, OfflineConv, RepVGGBlock


class FrozenBatchNorm2d(nn.Module):
    """detectron2's: buffers only, and two ways to compute."""

    def __init__(self, channels, eps=1e-5):
        super().__init__()
        self.num_features, self.eps = channels, eps
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.ones(channels))

    def forward(self, x):
        if x.requires_grad:
            scale = self.weight * (self.running_var + self.eps).rsqrt()
            bias = self.bias - self.running_mean * scale
            return x * scale.reshape(1, -1, 1, 1) + bias.reshape(1, -1, 1, 1)
        return nn.functional.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, training=False, eps=self.eps
        )


class FrozenWithoutEps(FrozenBatchNorm2d):
    """DETR's: eps is a constant in the code, not an attribute."""

    def __init__(self, channels):
        super().__init__(channels)
        del self.eps

    def forward(self, x):
        w, b, m, v = (getattr(self, n).reshape(1, -1, 1, 1) for n in ("weight", "bias", "running_mean", "running_var"))
        scale = w * (v + 1e-2).rsqrt()
        return x * scale + b - m * scale


class FrozenClamped(FrozenBatchNorm2d):
    """It looks like a frozen norm, and is no affine map."""

    def forward(self, x):
        return super().forward(x).clamp(max=20.0)


def assert_same(actual, expected, tolerance=1e-5):
    assert (actual - expected).norm() <= tolerance * expected.norm()


def torchvision_frozen(channels):
    ops = pytest.importorskip("torchvision.ops", reason="torchvision is not installed (the [models] extra)")
    return ops.FrozenBatchNorm2d(channels)


def timm_norm(name):
    def build(channels):
        layers = pytest.importorskip("timm.layers", reason="timm is not installed (the [models] extra)")
        if name == "SyncBatchNormAct":
            return layers.convert_sync_batchnorm(layers.BatchNormAct2d(channels, act_layer=nn.PReLU))
        return getattr(layers, name)(channels, act_layer=nn.SiLU if "Frozen" in name else nn.PReLU)

    return build


FROZEN = [FrozenBatchNorm2d, FrozenWithoutEps, torchvision_frozen]
WITH_ACTIVATION = [timm_norm(name) for name in ("BatchNormAct2d", "SyncBatchNormAct", "FrozenBatchNormAct2d")]


@pytest.mark.parametrize("build", [*FROZEN, *WITH_ACTIVATION])
@pytest.mark.parametrize("inside", [False, True])
def test_affine_norms_are_folded(build, inside):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm, self.last = nn.Conv2d(3, 4, 3), build(4), nn.Conv2d(4, 4, 1)

        def forward(self, x):
            return self.last(self.norm(self.conv(x)).relu())

    model, x = trained(Net() if inside else nn.Sequential(nn.Conv2d(3, 4, 3), build(4))), 5 * torch.randn(2, 3, 8, 8)
    plain = orepa.convert(model)
    (layer,) = orepa.report(plain).layers
    assert layer.action == "folded" and layer.error < 1e-6
    assert_same(plain(x), model(x))
    assert not any(type(m).__name__ == type(build(4)).__name__ for m in plain.modules())
    assert orepa.report(orepa.convert(plain)).layers == []


def test_what_only_looks_like_a_frozen_norm_stays():
    model, x = trained(nn.Sequential(nn.Conv2d(3, 4, 3), FrozenClamped(4))), 50 * torch.randn(2, 3, 8, 8)
    plain = orepa.convert(model, example_inputs=x)
    assert isinstance(plain[1], FrozenClamped) and torch.equal(plain(x), model(x))


def test_a_frozen_norm_leaves_a_frozen_bias():
    model = trained(nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), FrozenBatchNorm2d(4)))
    plain = orepa.convert(model)
    assert plain[0].weight.requires_grad and not plain[0].bias.requires_grad


# --- norms of blocks, replaced by their user -------------------------------------------------------------------------------

BLOCKS = {
    "offline": lambda: OfflineConv(4, 4, 3, padding=1, topology="dbb"),
    "repvgg": lambda: RepVGGBlock(4, 4),
}


def with_norms(block, build):
    for name, child in list(block.named_children()):
        if isinstance(child, nn.BatchNorm2d):
            setattr(block, name, build(child.num_features))
    return trained(block)


@pytest.mark.parametrize("kind", BLOCKS)
@pytest.mark.parametrize("build", [*FROZEN, lambda channels: nn.Identity(), nn.SyncBatchNorm])
def test_blocks_with_other_affine_norms_are_converted(kind, build):
    model, x = nn.Sequential(with_norms(BLOCKS[kind](), build)), torch.randn(2, 4, 6, 6)
    assert_same(orepa.convert(model.eval(), example_inputs=x)(x), model(x))


@pytest.mark.parametrize("kind", BLOCKS)
@pytest.mark.parametrize(
    "build", [lambda c: nn.GroupNorm(2, c), nn.InstanceNorm2d, lambda c: nn.BatchNorm2d(c, track_running_stats=False)]
)
def test_blocks_with_norms_that_are_no_affine_map_are_refused_by_name(kind, build):
    block = with_norms(BLOCKS[kind](), build)
    name = type(build(4)).__name__
    with pytest.raises(ConversionError, match=rf"^features\.0: {name} is no affine map"):
        orepa.convert(nn.Sequential(OrderedDict(features=nn.Sequential(block))).eval())
    with pytest.raises(TypeError, match=f"{name} is no affine map"):
        block.squeeze()


# --- what is left in the place of a norm -----------------------------------------------------------------------------------


@pytest.fixture
def pair():
    return trained(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, momentum=0.3), nn.ReLU()))


def test_the_placeholder_reads_like_a_norm_that_changes_nothing(pair):
    plain = orepa.convert(pair.double())
    norm = plain[1]
    assert type(norm) is nn.Identity
    assert torch.equal(norm.weight / torch.sqrt(norm.running_var + norm.eps), torch.ones(4, dtype=torch.float64))
    assert torch.equal(norm.bias - norm.running_mean, torch.zeros(4, dtype=torch.float64))
    assert (norm.num_features, norm.momentum, norm.affine, norm.track_running_stats) == (4, 0.3, True, True)
    assert [key for key in plain.state_dict() if key.startswith("1.")] == []
    assert not list(norm.parameters())
    half = copy.deepcopy(plain).half()
    assert half[1].weight.dtype == torch.float16
    assert orepa.report(orepa.convert(plain)).layers == []
    conv = nn.Sequential(nn.Conv2d(3, 4, 1), norm, nn.BatchNorm2d(4)).double().eval()
    assert [layer.action for layer in orepa.report(orepa.convert(conv)).layers] == ["folded"], "it is an identity"


def test_penalties_on_a_folded_norm_run(pair):
    plain = orepa.convert(pair).train()
    penalty = plain[0].weight.norm() + plain[1].weight.abs().sum()
    (plain(torch.randn(2, 3, 6, 6)).sum() + penalty).backward()
    assert plain[0].weight.grad is not None


def test_the_activation_of_a_norm_keeps_its_keys():
    model = trained(nn.Sequential(nn.Conv2d(3, 4, 3), timm_norm("BatchNormAct2d")(4)))
    plain = orepa.convert(model)
    assert type(plain[1]) is nn.Sequential and isinstance(plain[1].act, nn.PReLU) and hasattr(plain[1], "drop")
    assert set(plain.state_dict()) == {"0.weight", "0.bias", "1.act.weight"} <= {*model.state_dict()} | {"0.bias"}
    assert plain[1].eps == 0.0 and plain[1].weight.shape == (4,)


def test_an_activation_without_state_stands_alone_and_still_reads_like_a_norm():
    layers = pytest.importorskip("timm.layers", reason="timm is not installed (the [models] extra)")
    model, x = trained(nn.Sequential(nn.Conv2d(3, 4, 3), layers.BatchNormAct2d(4))), torch.randn(2, 3, 8, 8)
    plain = orepa.convert(model)
    assert type(plain[1]) is nn.ReLU and set(plain.state_dict()) == {"0.weight", "0.bias"}
    assert_same(nn.functional.relu(nn.utils.fuse_conv_bn_eval(plain[0], plain[1])(x)), model(x))
    assert type(model[1]) is layers.BatchNormAct2d and not hasattr(model[1].act, "weight")


@pytest.mark.parametrize("leave", ["script", "trace", "export", "onnx", "fx"])
def test_models_with_placeholders_leave_pytorch(pair, leave):
    model = nn.Sequential(*pair, nn.Conv2d(4, 4, 3), timm_norm("BatchNormAct2d")(4))
    model, x = trained(model), torch.randn(2, 3, 9, 9)
    plain = orepa.convert(model, example_inputs=x)
    expected = model(x)
    if leave == "script":
        result = torch.jit.freeze(torch.jit.script(plain))(x)
    elif leave == "trace":
        result = torch.jit.trace(plain, x)(x)
    elif leave == "export":
        result = torch.export.export(plain, (x,)).module()(x)
    elif leave == "fx":
        result = torch.fx.symbolic_trace(plain)(x)
    else:
        ort = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed (the [export] extra)")
        pytest.importorskip("onnxscript", reason="onnxscript is not installed (the [export] extra)")
        file = io.BytesIO()
        torch.onnx.export(plain, (x,), file, dynamo=True, verbose=False)
        session = ort.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
        (name,) = [i.name for i in session.get_inputs()]
        result = torch.from_numpy(session.run(None, {name: x.numpy()})[0])
    assert_same(result, expected)


class NormThenActivation(nn.BatchNorm2d):
    """As timm's ``BatchNormAct2d``, whose activation stays when it is folded."""

    def __init__(self, channels):
        super().__init__(channels)
        self.drop, self.act = nn.Identity(), nn.SiLU()

    def forward(self, x):
        return self.act(self.drop(super().forward(x)))


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, NormThenActivation])
def test_what_a_folded_norm_leaves_is_no_norm(norm):
    """Training without one diverges (paper Table 3)."""
    plain = orepa.convert(trained(nn.Sequential(nn.Conv2d(3, 4, 3), norm(4), nn.Conv2d(4, 4, 3), norm(4))))
    assert [layer.action for layer in orepa.report(plain).layers] == ["folded", "folded"]
    assert [layer.action for layer in orepa.report(orepa.prepare(plain)).layers] == ["left", "left"]
