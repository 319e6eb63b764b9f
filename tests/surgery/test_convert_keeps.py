"""What others have set on a layer, and whoever holds one, survives `convert`."""

import os

import pytest
import torch
from torch import nn
from trained import trained

import orepa
from orepa import ConversionError, OfflineConv, OREPAConv, RepVGGBlock


def assert_same(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("build", [OREPAConv, OfflineConv, RepVGGBlock])
def test_a_lone_block_is_converted_in_place(build):
    block, x = trained(build(4, 4, 3)), torch.randn(2, 4, 6, 6)
    expected, holder = block(x), [block]
    assert orepa.convert(block, inplace=True) is block
    assert not isinstance(holder[0], build) and type(block) in (nn.Conv2d, nn.Sequential)
    assert_same(holder[0](x), expected)
    assert orepa.report(block).operation == "convert"


def test_a_refused_lone_block_is_as_it_was():
    block, x = trained(RepVGGBlock(4, 4)), torch.randn(2, 4, 6, 6)
    expected = block(x)
    with pytest.raises(ConversionError, match="output differs"):
        orepa.convert(block, inplace=True, example_inputs=x, tolerance=0.0)
    assert type(block) is RepVGGBlock and torch.equal(block(x), expected)


LAYERS = [lambda: nn.Conv2d(3, 3, 3), lambda: OREPAConv(3, 3, 3, bias=True), lambda: OfflineConv(3, 3, 3)]


@pytest.mark.parametrize("build", LAYERS)
def test_attributes_and_backward_hooks_stay(build):
    model, calls = trained(nn.Sequential(build(), nn.BatchNorm2d(3))), []
    model[0].f, model[0].i, model[1].np = -1, 4, 6
    handle = model[0].register_full_backward_hook(lambda module, gin, gout: calls.append(type(module)))
    plain = orepa.convert(model, inplace=True)
    assert type(plain[0]) is nn.Conv2d and isinstance(plain[1], nn.Identity)
    assert (plain[0].f, plain[0].i, plain[1].np) == (-1, 4, 6)
    plain(torch.randn(1, 3, 5, 5, requires_grad=True)).sum().backward()
    assert calls == [nn.Conv2d]
    handle.remove()
    plain(torch.randn(1, 3, 5, 5, requires_grad=True)).sum().backward()
    assert len(calls) == 1


@pytest.mark.parametrize("build", LAYERS[:2])
@pytest.mark.parametrize("fold", [True, False])
def test_a_frozen_bias_stays_frozen(build, fold):
    layer = build()
    layer.bias.requires_grad_(False)
    plain = orepa.convert(trained(nn.Sequential(layer, nn.BatchNorm2d(3))), fold_bn=fold)
    assert plain[0].weight.requires_grad and not plain[0].bias.requires_grad


def test_whoever_holds_a_folded_layer_goes_on_with_it():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3)
            self.steps = [self.conv, self.bn]

        def forward(self, x):
            for step in self.steps:
                x = step(x)
            return x

    model, x = trained(Net()), torch.randn(2, 3, 6, 6)
    plain = orepa.convert(model, example_inputs=x)
    assert [layer.action for layer in orepa.report(plain).layers] == ["folded"]
    assert plain.steps == [plain.conv, plain.bn] and type(model.bn) is nn.BatchNorm2d
    assert_same(plain(x), model(x))


def test_a_norm_is_left_where_its_method_is_held():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn, self.block = nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3), OREPAConv(3, 3, 1)
            self.reset = self.bn.reset_running_stats

        def forward(self, x):
            return self.block(self.bn(self.conv(x)).relu())

    model, x = trained(Net()), torch.randn(2, 3, 6, 6)
    plain = orepa.convert(model, example_inputs=x)
    assert type(plain.block) is nn.Conv2d and type(plain.bn) is nn.BatchNorm2d
    assert "norm bn left: reset holds its method reset_running_stats" in str(orepa.report(plain))
    model.kernel = model.block.squeeze
    with pytest.raises(ConversionError, match="block cannot be replaced: kernel holds its method squeeze"):
        orepa.convert(model, inplace=True)
    assert type(model.block) is OREPAConv


def test_a_copy_keeps_the_modes_of_a_graph_module():
    feature_extraction = pytest.importorskip("torchvision.models.feature_extraction", reason="torchvision is missing")

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.drop = nn.Conv2d(3, 3, 3), nn.Dropout(0.9)

        def forward(self, x):
            return self.drop(self.conv(x))

    extractor = feature_extraction.create_feature_extractor(Net(), {"drop": "out"}).eval()
    x = torch.randn(1, 3, 6, 6)
    assert_same(orepa.convert(extractor)(x)["out"], extractor(x)["out"])


def test_compiled_blocks_are_converted():
    model, x = trained(nn.Sequential(OREPAConv(3, 3, 3), nn.BatchNorm2d(3))), torch.randn(2, 3, 6, 6)
    expected = model(x)
    for compiled in (model[0], model[1]):
        compiled.compile(backend="eager")
    wrapped = nn.Sequential(torch.compile(model, backend="eager")).eval()
    with torch.no_grad():
        assert_same(wrapped(x), expected)
        with torch.no_grad():
            plain = orepa.convert(wrapped, example_inputs=x)
            assert not any(isinstance(m, OREPAConv) for m in plain.modules())
            next(plain.parameters()).zero_()
            assert not torch.allclose(plain(x), expected), "the compiled wrapper runs the new layers"


def test_a_wrapped_model_is_refused_with_the_order(tmp_path):
    if not torch.distributed.is_available() or os.name == "nt":
        pytest.skip("needs gloo")
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        model = nn.parallel.DistributedDataParallel(nn.Sequential(OREPAConv(3, 3, 1))).eval()
        with pytest.raises(ConversionError, match=r"DistributedDataParallel.*prepare -> wrap -> train -> unwrap"):
            orepa.convert(model)
        assert type(orepa.convert(model.module)[0]) is nn.Conv2d
    finally:
        torch.distributed.destroy_process_group()
