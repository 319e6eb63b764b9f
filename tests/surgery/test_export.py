"""Converted models leave PyTorch: `torch.export` and ONNX, the latter checked by running it elsewhere."""

import io

import numpy as np
import pytest
import torch
from torch import nn

import orepa
from orepa import RepVGGBlock


@pytest.fixture
def model():
    net = nn.Sequential(
        nn.Conv2d(3, 8, 7, stride=2, padding=3, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=2, dilation=2, groups=4),
        nn.BatchNorm2d(8),
        RepVGGBlock(8, 12, stride=2),
        nn.Conv2d(12, 5, 1, bias=False),
        nn.BatchNorm2d(5),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )
    prepared = orepa.prepare(net)
    for _ in range(3):
        prepared(torch.randn(4, 3, 20, 18))
    return prepared.eval()


def test_torch_export_of_the_converted_model(model):
    x = torch.randn(2, 3, 20, 18)
    plain = orepa.convert(model)
    exported = torch.export.export(plain, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=2, max=64)},))
    convolutions = [node for node in exported.graph.nodes if "conv2d" in str(node.target)]
    assert len(convolutions) == 4 and not any("batch_norm" in str(node.target) for node in exported.graph.nodes)
    buffer = io.BytesIO()
    torch.export.save(exported, buffer)
    buffer.seek(0)
    y = torch.randn(5, 3, 20, 18)
    with torch.no_grad():
        torch.testing.assert_close(torch.export.load(buffer).module()(y), model(y), rtol=1e-4, atol=1e-5)


def test_onnx_runs_the_same(model, tmp_path):
    ort = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed (the [export] extra)")
    pytest.importorskip("onnxscript", reason="onnxscript is not installed (the [export] extra)")
    x = torch.randn(2, 3, 20, 18)
    path = tmp_path / "model.onnx"
    torch.onnx.export(orepa.convert(model), (x,), path, dynamo=True, verbose=False)
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    (got,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    with torch.no_grad():
        np.testing.assert_allclose(got, model(x).numpy(), rtol=1e-4, atol=1e-5)


def test_inductor_compiles_the_converted_model(model):
    x = torch.randn(2, 3, 20, 18)
    with torch.no_grad():
        compiled = torch.compile(orepa.convert(model), fullgraph=True)
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)
