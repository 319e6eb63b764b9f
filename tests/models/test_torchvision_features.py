"""torchvision's feature extraction on prepared networks: before and after `prepare`, in both modes, and after `convert`."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from narrow_models import assert_close, images, settled
from torch import Tensor, nn

import orepa

torchvision = pytest.importorskip("torchvision", reason="torchvision is not installed")
from torchvision.models import ResNet, mobilenetv3, resnet, shufflenetv2  # noqa: E402
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names  # noqa: E402


def small_mobilenet() -> nn.Module:
    config = mobilenetv3.InvertedResidualConfig
    blocks = [config(16, 3, 32, 24, False, "RE", 2, 1, 1.0), config(24, 5, 64, 32, True, "HS", 2, 1, 1.0)]
    return mobilenetv3.MobileNetV3(blocks, 64, num_classes=5)


#: networks, and two of their nodes
NETWORKS: dict[str, tuple[Any, dict[str, str]]] = {
    "resnet": (
        lambda: ResNet(resnet.BasicBlock, [1, 1, 1, 1], num_classes=5),
        {"layer1": "low", "layer3.0.relu_1": "high"},
    ),
    "resnext": (
        lambda: ResNet(resnet.Bottleneck, [1, 1, 1, 1], num_classes=5, groups=4, width_per_group=4),
        {"layer2": "low", "layer3.0.relu_2": "high"},
    ),
    "mobilenet": (small_mobilenet, {"features.1": "low", "features.2": "high"}),
    "shufflenet": (
        lambda: shufflenetv2.ShuffleNetV2([1, 1, 1], [8, 16, 16, 16, 32], num_classes=5),
        {"stage2": "low", "conv5": "high"},
    ),
}
every_network = pytest.mark.parametrize("network", NETWORKS)


def assert_all_close(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    for key, value in expected.items():
        assert_close(got[key], value)


def count_blocks(model: nn.Module) -> int:
    return sum(isinstance(module, orepa.OREPAConv) for module in model.modules())


@every_network
def test_the_names_of_the_nodes_stay(network: str) -> None:
    plain = NETWORKS[network][0]()
    prepared = orepa.prepare(plain)
    assert count_blocks(prepared) > 4
    assert get_graph_node_names(prepared) == get_graph_node_names(plain)
    converted = orepa.convert(prepared.eval(), fold_bn=False)
    assert get_graph_node_names(converted) == get_graph_node_names(plain)


@every_network
def test_an_extractor_of_a_prepared_network(network: str) -> None:
    build, nodes = NETWORKS[network]
    model = orepa.prepare(build())
    extractor = create_feature_extractor(model, nodes)
    features = extractor.train()(images())
    sum(feature.square().mean() for feature in features.values()).backward()
    trained = {key for key, parameter in extractor.named_parameters() if parameter.grad is not None}
    assert trained == dict(extractor.named_parameters()).keys() and any("scales" in key for key in trained)
    check_conversion(settled(extractor))


@every_network
def test_a_prepared_extractor(network: str) -> None:
    build, nodes = NETWORKS[network]
    plain = create_feature_extractor(build(), nodes)
    for training in (True, False):
        prepared = orepa.prepare(plain.train(training), preserve=True)
        assert prepared.training == training and {m.training for m in prepared.modules()} == {training}
    assert count_blocks(prepared) > 2
    assert_all_close(prepared(images()), plain(images()))
    sum(feature.square().mean() for feature in prepared.train()(images()).values()).backward()
    check_conversion(settled(prepared))


@torch.no_grad()
def check_conversion(extractor: nn.Module) -> None:
    expected = extractor(images())
    plain = orepa.convert(extractor, example_inputs=images())
    assert count_blocks(plain) == 0 and not any(module.training for module in plain.modules())
    actions = Counter(layer.action for layer in orepa.report(plain).layers)
    assert actions["converted"] == count_blocks(extractor)
    for deployed in (plain, torch.fx.symbolic_trace(plain), torch.jit.script(plain)):
        assert_all_close(deployed(images()), expected)
