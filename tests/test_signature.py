"""Calls that were seen before take a shortcut: only for operands that look the same, with the same results."""

from __future__ import annotations

import sys

import pytest
import torch
from strategies import strided
from test_squeeze import every_term

import orepa
from orepa_kernels import Block, Dense, Operand, signature, squeeze

F64, F32, BF16 = torch.float64, torch.float32, torch.bfloat16


class Subclass(torch.Tensor):
    pass


def tensors():
    return [torch.zeros(4, 6, 3, 3), torch.zeros(6, 6, 1, 1, requires_grad=True), torch.zeros(4, 3, 3)]


CHANGES = {
    "shape": lambda t: torch.zeros(4, 6, 1, 3),
    "strides": lambda t: t.to(memory_format=torch.channels_last),
    "gaps": lambda t: strided(t, "gaps"),
    "dtype": lambda t: t.to(BF16),
    "device": lambda t: t.to("meta"),
    "requires_grad": lambda t: t.clone().requires_grad_(),
    "type": lambda t: t.as_subclass(Subclass),
    "parameter": lambda t: torch.nn.Parameter(t, requires_grad=False),
}


@pytest.mark.parametrize("make", [signature.signature, signature.in_python])
def test_what_matches(make):
    matches = make(tensors())
    assert matches(*tensors())
    for what, change in CHANGES.items():
        first, *rest = tensors()
        assert not matches(change(first), *rest), what

    def inside(x):
        assert not matches(x, *tensors()[1:])
        return x.sum()

    torch.func.grad(inside)(tensors()[0])


def test_torch_still_has_the_fast_way():
    # Where it has not, all works as before, a little slower: see `in_python`.
    assert signature._TensorGuards is not None
    assert "in_python" not in signature.signature(tensors()).__qualname__


@pytest.fixture(params=["fast", "in Python"])
def either_way(request, monkeypatch):
    backends = sys.modules["orepa_kernels.backends"]
    monkeypatch.setattr(backends, "_SHORTCUTS", {})  # none that was kept in the other way
    if request.param == "in Python":
        monkeypatch.setattr(backends, "signature", signature.in_python)


@pytest.mark.usefixtures("either_way")
def test_calls_in_any_order_give_what_each_gives_alone():
    block, operands = every_term(2, F32)
    grads = [t.clone().requires_grad_() for t in operands]
    kinds = {
        "plain": (operands, {}),
        "again": (operands, {}),
        "channels_last": ([strided(t, "channels_last") for t in operands], {}),
        "transposed": ([strided(t, "transposed") for t in operands], {}),
        "wide": ([t.double() for t in operands], {}),
        "grads": (grads, {}),
        "bf16": (grads, {"dtype": BF16}),
        "out": (operands, {"memory_format": torch.channels_last}),
        "fold": (operands, {"folds": [torch.full((block.out_channels,), 2.0)]}),
    }
    alone = {name: squeeze([block], [own], backend="reference", **how)[0] for name, (own, how) in kinds.items()}
    for name in [*kinds, *reversed(kinds), *kinds]:
        own, how = kinds[name]
        (kernel,) = squeeze([block], [own], backend="cpu", **how)
        assert (kernel.dtype, kernel.stride()) == (alone[name].dtype, alone[name].stride()), name
        assert kernel.requires_grad == alone[name].requires_grad, name
        tolerance = {"rtol": 1e-2, "atol": 1e-2} if kernel.dtype == BF16 else {"rtol": 1e-4, "atol": 1e-5}
        torch.testing.assert_close(kernel, alone[name], msg=name, **tolerance)
        with torch.no_grad():
            assert not squeeze([block], [own], backend="cpu", **how)[0].requires_grad


def test_a_parameter_may_change_under_its_layer():
    conv = orepa.OREPAConv(6, 8, 3, bias=False, backend="cpu")
    for change in (
        lambda m: m,
        lambda m: m.to(memory_format=torch.channels_last),
        lambda m: m.double(),
        lambda m: m.to(BF16),
        lambda m: m.float().to(memory_format=torch.contiguous_format),
        lambda m: m.requires_grad_(False),
    ):
        conv = change(conv)
        for _ in range(3):
            (expected,) = squeeze([conv.plan], [conv.operands()], backend="reference")
            kernel = conv.squeeze()
            assert kernel.dtype == expected.dtype and kernel.requires_grad == expected.requires_grad
            torch.testing.assert_close(kernel, expected, rtol=1e-2, atol=1e-3)


@pytest.mark.usefixtures("either_way")
def test_bad_operands_are_refused_after_good_ones():
    block = Block(4, 4, (3, 3), (Dense(Operand("w", (4, 4, 3, 3))),))
    for _ in range(2):
        squeeze([block], [[torch.zeros(4, 4, 3, 3)]])
    with pytest.raises(ValueError, match="operand 'w' must be"):
        squeeze([block], [[torch.zeros(4, 4, 3, 1)]])
    with pytest.raises(ValueError, match="needs 1 tensors, got 2"):
        squeeze([block], [[torch.zeros(4, 4, 3, 3)] * 2])
    with pytest.raises(ValueError, match="backend must be one of"):
        squeeze([block], [[torch.zeros(4, 4, 3, 3)]], backend="fortran")
