"""`prepare`: what is swapped, what is left and why, and that the function is preserved."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import orepa
from orepa import OREPAConv
from orepa.modules.orepa_conv import default_topology


class Net(nn.Module):
    """A little of everything that `prepare` has to tell apart."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 7, stride=2, padding=3, bias=False)
        self.stem_bn = nn.BatchNorm2d(8)
        self.block = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.BatchNorm2d(8), nn.ReLU())
        self.reduce = nn.Conv2d(8, 6, 1)
        self.norm = nn.GroupNorm(2, 6)
        self.no_norm = nn.Conv2d(6, 6, 3, padding=1)
        self.last = nn.Conv2d(6, 4, (1, 3), padding=(0, 1))
        self.last_norm = nn.LayerNorm(4)

    def forward(self, x):
        x = torch.relu(self.stem_bn(self.stem(x)))
        x = self.norm(self.reduce(self.block(x)))
        x = torch.relu(self.no_norm(x)) + x
        return self.last_norm(self.last(x).permute(0, 2, 3, 1)).mean((1, 2))


def swapped(model):
    return {layer.name: layer.detail for layer in orepa.report(model).swapped}


def left(model):
    return {layer.name: layer.detail for layer in orepa.report(model).left}


def test_default_policy_and_norm_check():
    model = Net()
    prepared = orepa.prepare(model)
    assert swapped(prepared) == {"stem": "deep_stem", "block.0": "orepa", "reduce": "rep1x1", "last": "orepa"}
    assert left(prepared) == {"no_norm": "no norm follows: its output goes to relu, not to a norm"}
    assert isinstance(prepared.stem, OREPAConv) and type(prepared.no_norm) is nn.Conv2d
    assert type(model.stem) is nn.Conv2d, "a copy is prepared by default"
    assert (prepared.block[0].groups, prepared.block[0].bias is not None) == (8, True)
    prepared(torch.randn(2, 3, 16, 16)).sum().backward()
    again = orepa.prepare(prepared)
    assert not orepa.report(again).swapped and isinstance(again.stem, OREPAConv)
    assert orepa.prepare(model, inplace=True) is model and isinstance(model.stem, OREPAConv)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_preserve_computes_the_same_function(dtype):
    model, x = Net().to(dtype), torch.randn(2, 3, 20, 18, dtype=dtype)
    prepared = orepa.prepare(model, preserve=True)
    assert swapped(prepared)["stem"] == "orepa", "a stack of small kernels cannot hold a given large one"
    tolerance = {torch.float32: 1e-5, torch.float64: 1e-12}[dtype]
    for mode in (True, False):
        torch.testing.assert_close(prepared.train(mode)(x), model.train(mode)(x), rtol=tolerance, atol=tolerance)
    assert all(layer.error is not None and layer.error < 1e-6 for layer in orepa.report(prepared).swapped)
    fresh = orepa.prepare(model).eval()
    assert not torch.allclose(fresh(x), model(x), rtol=1e-3), "without preserve the start is a new one"
    stem = orepa.prepare(model, {"stem": "deep_stem"}, preserve=True)
    assert left(stem)["stem"] == "topology 'deep_stem' has no full-size convolution that could hold a given kernel"


def test_policies():
    by_name = orepa.prepare(
        Net(), {"block.*": "dbb", "reduce": None, nn.Conv2d: {"topology": "plain", "scaling": "none"}}
    )
    assert swapped(by_name) == {"stem": "plain", "block.0": "dbb", "last": "plain"}
    assert by_name.stem.scaling == "none"
    first = orepa.prepare(Net(), {"reduce": None, "*": "orepa"})
    assert left(first)["reduce"] == "the policy leaves it" and "reduce" not in swapped(first)
    assert set(swapped(orepa.prepare(Net(), "dbb", scaling="scalar"))) == {"stem", "block.0", "reduce", "last"}
    called = orepa.prepare(Net(), lambda name, conv: "acnet" if conv.kernel_size == (3, 3) else None)
    assert swapped(called) == {"block.0": "acnet"}
    own = orepa.prepare(Net(), {"stem": lambda spec: orepa.Topology(a=orepa.topology.Branch(orepa.topology.Conv(7)))})
    assert isinstance(own.stem, OREPAConv)


def test_bad_policies_raise_and_change_nothing():
    model = Net()
    for arguments, message in [
        ({"policy": "orepas"}, "topology must be one of"),
        ({"policy": {"layer9.*": "orepa"}}, r"policy: no convolution matches layer9.\*"),
        ({"scaling": "matrix"}, "scaling must be one of"),
        ({"backend": "fast"}, "backend must be one of"),
    ]:
        with pytest.raises(ValueError, match=message):
            orepa.prepare(model, inplace=True, **arguments)
        assert not any(isinstance(m, OREPAConv) for m in model.modules())
    with pytest.raises(orepa.BackendError, match="'cuda' was asked for but cannot run"):
        orepa.prepare(model, backend="cuda")(torch.randn(1, 3, 16, 16))
    with pytest.raises(ValueError, match="no report"):
        orepa.report(model)


def test_what_cannot_be_swapped_is_left_with_its_reason():
    class Own(nn.Conv2d):
        def forward(self, x):
            return super().forward(x) * 2

    class Many(nn.Module):
        def __init__(self):
            super().__init__()
            self.convs = nn.Sequential()
            self.names = ["frozen", "tied", "tied_too", "parametrized", "hooked", "own", "lazy", "even", "fine"]
            self.names += ["patched", "patched_inside"]
            for name in self.names:
                conv = (Own if name == "own" else nn.Conv2d)(4, 4, 3, padding=1)
                if name == "even":
                    conv = nn.Conv2d(4, 4, 2, padding=1)
                if name == "lazy":
                    conv = nn.LazyConv2d(4, 3, padding=1)
                self.convs.add_module(name, conv)
                self.convs.add_module(f"{name}_bn", nn.BatchNorm2d(4))
            self.three_d = nn.Conv3d(1, 1, 3, padding=1)

    model = Many()
    convs = model.convs
    convs.frozen.requires_grad_(False)
    convs.tied_too.weight = convs.tied.weight
    parametrizations.weight_norm(convs.parametrized)
    convs.hooked.register_forward_hook(lambda *_: None)
    convs.patched.forward = lambda x: nn.Conv2d.forward(convs.patched, x) * 2
    convs.patched_inside._conv_forward = lambda x, weight, bias: nn.functional.conv2d(x, weight, bias, padding=1) * 2
    reasons = left(orepa.prepare(model, "orepa"))
    expected = {
        "convs.frozen": "its weight is frozen",
        "convs.tied": "it shares its weight with another module",
        "convs.tied_too": "it shares its weight with another module",
        "convs.parametrized": "its weight is parametrized",
        "convs.hooked": "it has hooks",
        "convs.patched": "its forward was replaced on the instance",
        "convs.patched_inside": "its forward was replaced on the instance",
        "convs.own": "Own computes something else than nn.Conv2d",
        "convs.lazy": "LazyConv2d: only 2-D convolutions",
        "convs.even": "branch 'conv1x1': a 1x1 kernel cannot be centred in the block's 2x2",
        "three_d": "Conv3d: only 2-D convolutions",
    }
    assert set(reasons) == set(expected)
    for name, reason in expected.items():
        assert reason in reasons[name], name


def test_a_module_used_twice_stays_one_module():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
            self.alias = self.conv

        def forward(self, x):
            return self.bn(self.alias(self.bn(self.conv(x))))

    prepared = orepa.prepare(Twice())
    assert isinstance(prepared.conv, OREPAConv) and prepared.alias is prepared.conv
    assert len(orepa.report(prepared).layers) == 1


def test_untraceable_models_are_read_from_the_parts_that_trace():
    class Dynamic(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = Net()
            self.pair = nn.ModuleList([nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)])
            self.head_conv, self.head_bn = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)
            self.lone = nn.Conv2d(3, 3, 3, padding=1)

        def forward(self, x):
            if x.sum() > 0:
                x = x + 1
            x = self.head_bn(self.head_conv(self.pair[1](self.pair[0](self.lone(x)))))
            return self.body(x)

    prepared = orepa.prepare(Dynamic())
    assert set(swapped(prepared)) == {"body.stem", "body.block.0", "body.reduce", "body.last", "pair.0", "head_conv"}
    assert "found by its place only" in swapped(prepared)["head_conv"]
    assert set(left(prepared)) == {"body.no_norm", "lone"}


def test_frozen_norms_and_bare_convolutions_count_as_no_norm():
    class FrozenBatchNorm2d(nn.Module):
        def forward(self, x):
            return x * 1.5

    model = nn.Sequential(nn.Conv2d(3, 3, 3), FrozenBatchNorm2d(), nn.Conv2d(3, 3, 3))
    prepared = orepa.prepare(model)
    assert "FrozenBatchNorm2d" in left(prepared)["0"] and "leaves the model" in left(prepared)["2"]
    alone = orepa.prepare(nn.Conv2d(3, 3, 3))
    assert type(alone) is nn.Conv2d and "nothing is known" in left(alone)[""]


def test_device_dtype_mode_and_memory_format_stay():
    model = Net().to(torch.bfloat16).to(memory_format=torch.channels_last).eval()
    prepared = orepa.prepare(model, preserve=True)
    block = prepared.no_norm
    assert all(p.dtype == torch.bfloat16 for p in prepared.parameters()) and not prepared.stem.training
    assert prepared.stem.origin_weight.is_contiguous(memory_format=torch.channels_last)
    assert block.weight.is_contiguous(memory_format=torch.channels_last)
    model = Net().to("meta")
    meta = orepa.prepare(model)
    assert all(p.is_meta for p in meta.parameters())
    with pytest.raises(ValueError, match=r"preserve=True .* but stem.weight is on the meta device"):
        orepa.prepare(model, preserve=True, inplace=True)
    assert type(model.stem) is nn.Conv2d


def test_the_report_is_plain_data_and_prints():
    prepared = orepa.prepare(Net(), preserve=True)
    report = orepa.report(prepared)
    text = str(report)
    assert "stem" in text and "7x7 3->8 s2" in text and "3x3 8->8 g8" in text
    assert text.splitlines()[-1].startswith("prepare: 4 swapped, 1 left; parameters ")
    assert orepa.report(copy.deepcopy(prepared)) == report == orepa.report(pickle.loads(pickle.dumps(prepared)))
    assert report.as_dict()["layers"][0]["name"] == "stem"
    assert report.parameters[1] == sum(p.numel() for p in prepared.parameters()) > report.parameters[0]


# --- models of timm -----------------------------------------------------------------------------------------------------------

MODELS = {
    "resnet18": 20,
    "resnet50": 53,
    "mobilenetv3_small_100": 34,
    "mobilenetv3_large_100": 46,
    "convnext_tiny": 19,
    "efficientnet_b0": 49,
}


def live_statistics(model):
    """Batch norms that do something, as after training: a conversion that loses them must not pass."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.1)
    return model


@pytest.mark.parametrize("name", MODELS)
def test_what_is_swapped_in_timm_models(name):
    timm = pytest.importorskip("timm", reason="timm is not installed (the [models] extra)")
    with torch.device("meta"):
        model = timm.create_model(name)
    assert len(orepa.report(orepa.prepare(model, inplace=True)).swapped) == MODELS[name]


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet", "test_convnext", "mobilenetv3_small_050"])
def test_timm_models_preserve_train_and_convert(name):
    """Small nets of the families above: with few channels and blocks, their kinds of layers are the same."""
    timm = pytest.importorskip("timm", reason="timm is not installed (the [models] extra)")
    model = live_statistics(timm.create_model(name, num_classes=10)).eval()
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = model(x)
    prepared = orepa.prepare(model, preserve=True, inplace=True)
    assert len(orepa.report(prepared).swapped) > 5
    with torch.no_grad():
        assert (prepared(x) - expected).norm() <= 1e-4 * expected.norm()

    optimizer = torch.optim.SGD(prepared.parameters(), lr=1e-3, momentum=0.9)
    prepared.train()
    for _ in range(3):
        loss = nn.functional.cross_entropy(prepared(torch.randn(4, 3, 64, 64)), torch.randint(10, (4,)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    prepared.eval()
    with torch.no_grad():
        trained = prepared(x)
        assert (trained - expected).norm() > 1e-3 * expected.norm(), "the steps must have changed something"
        plain = orepa.convert(prepared, example_inputs=x)
        assert (plain(x) - trained).norm() <= 1e-5 * trained.norm()
    assert not any(isinstance(m, OREPAConv) for m in plain.modules())


@pytest.mark.parametrize(
    ("name", "parameters", "keep"),
    [("resnet18", 37_756_041, "downsample"), ("resnet50", 68_579_977, None), ("resnext50_32x4d", 63_711_625, None)],
)
def test_parameter_counts_are_the_authors(name, parameters, keep):
    timm = pytest.importorskip("timm", reason="timm is not installed (the [models] extra)")

    def policy(layer, conv):
        return None if keep and keep in layer else default_topology(conv.kernel_size)

    with torch.device("meta"):
        model = timm.create_model(name)
    assert orepa.report(orepa.prepare(model, policy, inplace=True)).parameters[1] == parameters


@pytest.mark.parametrize("policy", [["orepa"], 3, False])
def test_a_policy_of_another_kind(policy):
    with pytest.raises(TypeError, match=r"policy must be a topology's name, a mapping, a function or None, got"):
        orepa.prepare(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)), policy)


@pytest.mark.parametrize("given", [False, True, 3, ["orepa"]])
@pytest.mark.parametrize("form", [lambda choice: {"*": choice}, lambda choice: lambda name, conv: choice])
def test_a_policy_that_gives_something_else(given, form):
    """False for "leave it alone" is the likeliest mistake."""
    with pytest.raises(TypeError, match=r"for 0 it gives .*or None to leave the convolution alone"):
        orepa.prepare(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)), form(given))
