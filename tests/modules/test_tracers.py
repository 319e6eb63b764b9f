"""Tracers of other people: fx takes blocks as leaves, TorchScript traces them, and refuses to compile them in one line."""

import copy
import importlib

import pytest
import torch
from torch import fx, nn

import orepa
from orepa import OfflineConv, OREPAConv, RepVGGBlock

# TorchScript and the quantization in torch are deprecated, and a trace warns of checks of shapes.
pytestmark = [
    pytest.mark.filterwarnings(f"ignore::{kind}")
    for kind in ("DeprecationWarning", "UserWarning", "torch.jit.TracerWarning")
]

BLOCKS = {
    "online": lambda: OREPAConv(3, 6, 3, padding=1),
    "stem": lambda: OREPAConv(3, 6, 7, padding=3),
    "reflect": lambda: OREPAConv(3, 6, 3, padding=1, padding_mode="reflect"),
    "offline": lambda: OfflineConv(3, 6, 3, padding=1),
    "vgg": lambda: RepVGGBlock(3, 6),
}
X = torch.randn(2, 3, 8, 8)


class Net(nn.Module):
    """A block that is called, and once by its ``forward``."""

    def __init__(self, block):
        super().__init__()
        self.stem = nn.ModuleDict({"block": block})
        self.bn, self.act = nn.BatchNorm2d(6), nn.ReLU()

    def forward(self, x):
        return self.act(self.bn(self.stem["block"](x))) + self.stem["block"].forward(x).relu()


@pytest.fixture(params=BLOCKS)
def net(request):
    return Net(BLOCKS[request.param]()).eval()


def test_fx_takes_a_block_as_a_leaf(net):
    traced = fx.symbolic_trace(net)
    leaves = [node.target for node in traced.graph.nodes if node.op == "call_module"]
    assert leaves.count("stem.block") == 2
    torch.testing.assert_close(traced(X), net(X))
    traced.train()(X).sum().backward()
    assert all(p.grad is not None for p in traced.stem.block.parameters())


def test_a_trace_of_a_block_alone_says_what_to_do():
    for block in (OREPAConv(3, 6, 3), OfflineConv(3, 6, 3), RepVGGBlock(3, 6)):
        with pytest.raises(RuntimeError, match=f"fx cannot trace an? {type(block).__name__} by itself.*convert"):
            fx.symbolic_trace(block)


def test_torchvision_extracts_features(net):
    extraction = pytest.importorskip("torchvision.models.feature_extraction")
    assert "stem.block" in extraction.get_graph_node_names(net)[1]
    features = extraction.create_feature_extractor(net, {"stem.block": "kernel", "act": "out"})(X)
    torch.testing.assert_close(features["kernel"], net.stem["block"](X))


def test_fx_fuses_what_is_around(net):
    optimization = pytest.importorskip("torch.fx.experimental.optimization")
    fused = optimization.fuse(net)
    torch.testing.assert_close(fused(X), net(X))


def quantize_fx(net, leaves=None):
    mapping = torch.ao.quantization.get_default_qconfig_mapping("x86").set_object_type(leaves, None)
    return importlib.import_module("torch.ao.quantization.quantize_fx").prepare_fx(net, mapping, (X,))


def quantize_eagerly(net, leaves=None):
    for module in net.modules():
        if type(module) is leaves:
            module.qconfig = None
    net.qconfig = torch.ao.quantization.get_default_qat_qconfig("x86")
    return torch.ao.quantization.prepare_qat(net.train()).eval()


@pytest.mark.parametrize("prepare", [quantize_fx, quantize_eagerly])
def test_quantization_does_not_leave_a_block_silently(net, prepare):
    pytest.importorskip("torch.ao.quantization.quantize_fx")
    block = net.stem["block"]
    with pytest.raises(RuntimeError, match="orepa.convert the model before torch.ao.quantization prepares it"):
        prepare(copy.deepcopy(net))
    prepared = prepare(orepa.convert(nn.Sequential(block, nn.BatchNorm2d(6), nn.ReLU()).eval()))
    names = {type(module).__name__ for module in prepared.modules()}
    assert any("FakeQuantize" in name or "Observer" in name for name in names)
    assert prepared(X).shape == net(X).shape


@pytest.mark.parametrize("prepare", [quantize_fx, quantize_eagerly])
def test_quantization_leaves_a_block_where_it_is_told_to(net, prepare):
    pytest.importorskip("torch.ao.quantization.quantize_fx")
    leaves = OfflineConv if isinstance(net.stem["block"], OfflineConv) else OREPAConv  # a RepVGGBlock has one inside
    prepared = prepare(copy.deepcopy(net), leaves=leaves)
    blocks = [module for module in prepared.modules() if isinstance(module, leaves)]
    assert len(blocks) == 1 and blocks[0].qconfig is None
    if prepare is quantize_fx:  # observers change nothing, fake quantization does
        torch.testing.assert_close(prepared(X), net(X))


def test_script_says_convert_first_and_a_converted_model_scripts(net):
    for whole in (net, fx.symbolic_trace(net), nn.Sequential(net)):
        with pytest.raises(RuntimeError) as error:
            torch.jit.script(whole)
        assert "convert the model first (orepa.convert(model.eval()))" in str(error.value)
        assert len(str(error.value).splitlines()) == 1
    assert not isinstance(net.stem["block"], nn.Conv2d), "the model stays as it was"
    plain = orepa.convert(nn.Sequential(net.stem["block"], nn.BatchNorm2d(6)).eval())
    torch.testing.assert_close(torch.jit.script(plain)(X), plain(X))


@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize("grad", [False, True])
def test_torchscript_traces_a_block_and_follows_its_parameters(net, warm, grad):
    with torch.set_grad_enabled(grad):
        if warm:
            net(X)
        traced = torch.jit.trace(net, X)
        torch.testing.assert_close(traced(X), net(X), rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(1.5)
        traced.load_state_dict({k: v for k, v in net.state_dict().items() if "_extra_state" not in k}, strict=False)
        torch.testing.assert_close(traced(X), net(X), rtol=1e-4, atol=1e-4)
