"""From `OREPAConv.forward` to a raw kernel: few files, one cache, nothing prepared twice."""

from __future__ import annotations

import contextlib
import os
import sys
import traceback
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import orepa
import orepa_kernels
from orepa import OREPAConv
from orepa_kernels import backends, dispatch, squeeze
from orepa_kernels.autograd import Call
from orepa_kernels.backends import cuda, native

PACKAGES = {Path(package.__file__).parent for package in (orepa, orepa_kernels)}

#: the longest way that CONTRIBUTING promises
MOST_FILES = 5


def files_above(frame):
    """Files of this project on the stack, nearest last, each once."""
    paths = [entry.filename for entry in traceback.extract_stack(frame)]
    return list(dict.fromkeys(path for path in paths if not PACKAGES.isdisjoint(Path(path).parents)))


@contextlib.contextmanager
def raw_cpu(stacks):
    def cpu_forward(*arguments):
        stacks.append(files_above(sys._getframe(1)))
        return native_module.cpu_forward(*arguments)

    native_module = native.module()
    with pytest.MonkeyPatch.context() as patch:
        names = {name: getattr(native_module, name) for name in dir(native_module) if not name.startswith("__")}
        patch.setattr(native, "_C", SimpleNamespace(**{**names, "cpu_forward": cpu_forward}))
        patch.setattr(dispatch.calls, "_calls", {})
        yield


@contextlib.contextmanager
def raw_cuda(stacks):
    """A compiled module that launches nothing, for CPU tensors."""
    module = SimpleNamespace(
        cuda_forward=lambda *_: stacks.append(files_above(sys._getframe(1))),
        Plan=lambda *_: None,
        max_terms=64,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "_C", module)
        patch.setattr(cuda, "_where", lambda device: (0, 0, 0))
        patch.setattr(cuda.CudaBackend, "supports", lambda *_: dispatch.Support(True))
        patch.setattr(dispatch, "_REASONS", {"cuda": ""})
        patch.setattr(dispatch.calls, "_calls", {})
        yield


@contextlib.contextmanager
def raw_triton(stacks):
    pytest.importorskip("triton", reason="needs triton, which this torch does not bring")
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        pytest.skip("the interpreter compiles nothing")
    from triton_stub import pretend

    with pretend(lambda *_: stacks.append(files_above(sys._getframe(1)))):
        yield


@pytest.mark.parametrize(("backend", "raw"), [("cpu", raw_cpu), ("cuda", raw_cuda), ("triton", raw_triton)])
def test_few_files_from_the_layer_to_the_kernel(backend, raw):
    if backend == "cpu" and not backends()["cpu"]:
        pytest.skip(backends()["cpu"].reason)
    stacks = []
    with raw(stacks):
        conv = OREPAConv(4, 6, 3, padding=1, topology="plain", backend=backend)
        for _ in range(3):
            conv(torch.zeros(1, 4, 5, 5))
    assert len(stacks) == 3
    assert Path(stacks[-1][0]).name == "orepa_conv.py"
    assert 3 <= len(stacks[-1]) <= MOST_FILES, stacks[-1]


def test_one_cache_on_the_way(monkeypatch):
    """What is in the cache runs as it is; without the cache, all is prepared anew."""
    made = []
    real = Call.__init__
    monkeypatch.setattr(Call, "__init__", lambda self, *arguments: (made.append(1), real(self, *arguments))[1])
    monkeypatch.setattr(dispatch.calls, "_calls", {})
    conv = OREPAConv(4, 6, 3)
    for _ in range(3):
        conv.squeeze().sum().backward()
    assert len(made) == 1
    dispatch.calls.clear()
    conv.squeeze()
    assert len(made) == 2


def test_the_cache_is_bounded(monkeypatch):
    cache = dispatch.CallCache(most_keys=3, most_layouts=2)
    monkeypatch.setattr(sys.modules["orepa_kernels.api"], "calls", cache)
    convs = [OREPAConv(2, channels, 3) for channels in range(1, 6)]
    for conv in convs:
        conv.squeeze()
    blocks = [key[-1] for key in cache._calls]
    assert blocks == [conv.plan for conv in convs[-3:]]
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        own = [t.detach().to(dtype) for t in convs[-1].operands()]
        (kernel,) = squeeze([convs[-1].plan], [own])
        assert kernel.dtype == dtype
    assert [len(layouts) for layouts in cache._calls.values()] == [1, 1, 2]


def test_a_list_of_blocks_is_one_call():
    """Blocks of different backends too, and the results in the order that was asked for."""
    convs = [
        OREPAConv(4, 6, 3, groups=groups, bias=False).to(dtype)
        for groups, dtype in ((1, torch.float32), (2, torch.bfloat16), (2, torch.float32))
    ]
    blocks, operands = [conv.plan for conv in convs], [conv.operands() for conv in convs]
    for _ in range(2):
        kernels = squeeze(blocks, operands)
        for conv, kernel in zip(convs, kernels, strict=True):
            assert torch.equal(kernel, conv.squeeze()) and kernel.requires_grad
    sum(kernel.float().sum() for kernel in kernels).backward()
    for conv in convs:
        together = [parameter.grad.clone() for parameter in conv.parameters()]
        conv.zero_grad()
        conv.squeeze().float().sum().backward()
        for mine, alone in zip(together, conv.parameters(), strict=True):
            assert torch.equal(mine, alone.grad)
    with pytest.raises(ValueError, match=r"blocks\[0\] needs"):
        squeeze(blocks, [[*operands[0], operands[1][0]], operands[1][1:], operands[2]])
