"""The launches of a whole model's training step: one forward, two backward for each structure of blocks."""

from __future__ import annotations

import os
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import orepa
from orepa.modules.step import squeeze_alone_in
from orepa_kernels import dispatch
from orepa_kernels.backends import cuda, native

WIDTHS = (64, 64, 128)
BLOCKS = 2 * (len(WIDTHS) - 1)


def model(backend):
    """Blocks of two structures, 3x3 and 1x1, each in two sizes."""
    layers = []
    for before, after in pairwise(WIDTHS):
        layers += [nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after)]
        layers += [nn.Conv2d(after, after, 1), nn.BatchNorm2d(after)]
    return orepa.prepare(nn.Sequential(*layers), backend=backend).train()


def launches_of_a_step(net, launched):
    x, counts = torch.zeros(2, WIDTHS[0], 6, 6), []
    launched.clear()
    y = net(x)
    counts.append(len(launched))
    launched.clear()
    y.sum().backward()
    return [*counts, len(launched)]


def test_triton():
    pytest.importorskip("triton", reason="needs triton, which this torch does not bring")
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        pytest.skip("the interpreter compiles nothing")
    from triton_stub import fills_table, pretend

    launched: list[int] = []
    with pretend(lambda *arguments: None if fills_table(arguments) else launched.append(1)):
        net = model("triton")
        assert launches_of_a_step(net, launched) == [2, 4]
        squeeze_alone_in(net)
        assert launches_of_a_step(net, launched) == [BLOCKS, 2 * BLOCKS]


def test_cuda(monkeypatch):
    launched: list[int] = []
    module = SimpleNamespace(
        cuda_forward=lambda *_: launched.append(1),
        cuda_backward=lambda *_: launched.append(1),
        cuda_memory_needs=lambda *_: (1, 1),
        Plan=lambda *_: None,
        max_terms=64,
    )
    monkeypatch.setattr(native, "_C", module)
    monkeypatch.setattr(cuda, "_where", lambda device: (0, 0, 0))
    monkeypatch.setattr(cuda.CudaBackend, "supports", lambda *_: dispatch.Support(True))
    monkeypatch.setattr(cuda.CudaBackend, "_zeros", lambda *_: torch.zeros(1, dtype=torch.uint8))
    monkeypatch.setattr(dispatch, "_REASONS", {"cuda": ""})
    monkeypatch.setattr(dispatch.calls, "_calls", {})
    net = model("cuda")
    assert launches_of_a_step(net, launched) == [1, 1]
    squeeze_alone_in(net)
    assert launches_of_a_step(net, launched) == [BLOCKS, BLOCKS]
