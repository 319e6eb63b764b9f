"""Cached calls: only for operands of the same layout, with the same results."""

from __future__ import annotations

import pytest
import torch
from strategies import strided
from test_squeeze import every_term
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

import orepa
from orepa_kernels import Block, Dense, Operand, autograd, dispatch, guards, nested, squeeze
from orepa_kernels.backends import base

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


@pytest.mark.parametrize("make", [guards.layout_guard, guards.layout_guard_in_python])
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
    # Where it has not, all works as before, a little slower: see `layout_guard_in_python`.
    assert guards._TensorGuards is not None
    assert "in_python" not in guards.layout_guard(tensors()).__qualname__


@pytest.fixture(params=["fast", "in Python"])
def either_way(request, monkeypatch):
    monkeypatch.setattr(dispatch.calls, "_calls", {})  # none that was cached the other way
    if request.param == "in Python":
        for module in (dispatch, autograd):
            monkeypatch.setattr(module, "layout_guard", guards.layout_guard_in_python)


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


# --- cached calls -------------------------------------------------------------------------------------------------------


def flat(dtype=F32):
    """A block without another in it, and operands for it."""
    block = orepa.OREPAConv(6, 8, 3, groups=2, bias=False).plan
    return block, [torch.randn(operand.shape, dtype=dtype) for operand in block.operands]


def seen(block, operands, upstream):
    """Kernel and gradients of one call after others like it, and of what is prepared for this call alone."""
    wanted = [t for t in operands if t.requires_grad]
    for _ in range(3):  # the first prepares
        (kernel,) = squeeze([block], [operands], backend="cpu")
        found = torch.autograd.grad(kernel, wanted, upstream)
    call = autograd.Call(dispatch.get("cpu"), (block,), operands, kernel.dtype, torch.contiguous_format)
    needed = [t.requires_grad for t in operands]
    with torch.no_grad():
        alone = [*call.prepared.forward(operands), *call.backward(operands, [upstream], needed)]
    return [kernel.detach(), *found], [t for t in alone if t is not None]


@pytest.fixture
def taken(monkeypatch):
    """One entry for each time that prepared work ran backward; by tensors of the layouts that it was prepared for."""
    taken = []

    def layouts(tensors):
        assert all(type(t) in (torch.Tensor, torch.nn.Parameter) for t in tensors)
        return tuple(map(base.layout_of, tensors))

    class Checked(base.Prepared):
        def __init__(self, prepared, signature):
            self.prepared, self.signature = prepared, signature

        def forward(self, tensors):
            assert layouts(tensors) == self.signature.layouts
            return self.prepared.forward(tensors)

        def backward(self, tensors, upstream, needed):
            assert layouts(tensors) == self.signature.layouts and layouts(upstream)
            taken.append(needed)
            return self.prepared.backward(tensors, upstream, needed)

    def prepare(backend, blocks, signature):
        return Checked(nested.prepare(backend, blocks, signature), signature)

    monkeypatch.setattr(autograd, "prepare", prepare)
    monkeypatch.setattr(dispatch.calls, "_calls", {})
    return taken


def equal(found, expected):
    pairs = list(zip(found, expected, strict=True))
    return all(a.stride() == b.stride() and torch.equal(a, b) for a, b in pairs)


@pytest.mark.usefixtures("either_way")
def test_the_same_bits_again(taken):
    block, operands = flat()
    upstream = torch.randn(block.shape)
    for change in (lambda t: t, lambda t: strided(t, "channels_last"), lambda t: strided(t, "gaps")):
        for index in (None, 0, 3):
            own = [change(t.detach().clone()).requires_grad_(n != index) for n, t in enumerate(operands)]
            taken.clear()
            assert equal(*seen(block, own, upstream))
            needed = [n != index for n in range(len(operands))]
            assert [list(own) for own in taken] == [needed] * 4  # three calls, and the one prepared alone


@pytest.mark.usefixtures("either_way")
def test_gradients_of_all_looks(taken):
    block, operands = flat()
    operands = [t.clone().requires_grad_() for t in operands]
    base = torch.randn(block.shape)
    looks = {
        "subclass": base.as_subclass(Subclass),
        "contiguous": base,
        "channels_last": strided(base, "channels_last"),
        "expanded": base[:1, :1].expand_as(base),
        "transposed": strided(base, "transposed"),
        "gaps": strided(base, "gaps"),
    }
    for name in [*looks, *reversed(looks)]:
        assert equal(*seen(block, operands, looks[name])), name
    assert len(taken) > 4


def test_hooks_on_saved_tensors_see_no_operand():
    """Else an activation checkpoint would count other tensors where it finds a kernel than where it squeezed it."""
    block, operands = flat()
    operands = [t.clone().requires_grad_() for t in operands]
    seen_by_hooks = []
    with torch.autograd.graph.saved_tensors_hooks(seen_by_hooks.append, lambda t: t):
        (kernel,) = squeeze([block], [operands], backend="cpu")
    kernel.sum().backward()
    assert not seen_by_hooks and all(t.grad is not None for t in operands)


def test_disjoint_graphs_over_one_squeeze_are_differentiated_one_by_one():
    block, operands = flat()
    both = [[t.clone().requires_grad_() for t in operands] for _ in range(2)]
    kernels = squeeze([block, block], both, backend="cpu")
    for kernel, mine, others in zip(kernels, both, reversed(both), strict=True):
        for tensor in [*mine, *others]:
            tensor.grad = None
        kernel.sum().backward()
        assert all(t.grad is not None for t in mine) and all(t.grad is None for t in others)


def test_a_changed_operand_is_noticed_backward():
    block, operands = flat()
    operands = [t.clone().requires_grad_() for t in operands]
    for _ in range(3):
        (kernel,) = squeeze([block], [operands], backend="cpu")
        with torch.no_grad():
            operands[0].add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            kernel.sum().backward()


@pytest.mark.usefixtures("either_way")
def test_double_backward_after_other_calls():
    block, operands = flat(F64)
    operands = [t.clone().requires_grad_() for t in operands]
    upstream = torch.randn(block.shape, dtype=F64)
    seen(block, operands, upstream)
    found = []
    for backend in ("cpu", "reference"):
        (kernel,) = squeeze([block], [operands], backend=backend)
        (first,) = torch.autograd.grad(kernel.square().sum(), operands[0], create_graph=True)
        found.append(torch.autograd.grad(first.square().sum(), operands, allow_unused=True))
    for mine, true in zip(*found, strict=True):
        assert (mine is None) == (true is None)
        if mine is not None:
            torch.testing.assert_close(mine, true)


@pytest.mark.parametrize("make", [guards.layout_guard, guards.layout_guard_in_python])
def test_tracers_and_modes_match_nothing(make):
    """They have to see what is computed, and a call that takes a shortcut shows nothing."""
    own = [torch.ones(2, 3), torch.ones(3)]
    matches = make(own)
    assert matches(*own)
    found = []

    def look(x):
        found.append(matches(*own) and not guards.is_watched())
        return x + 1

    torch.jit.trace(look, torch.ones(1), check_trace=False)
    make_fx(look)(torch.ones(1))
    with FlopCounterMode(display=False), torch.no_grad():
        look(torch.ones(1))
    assert found == [False] * 3
    assert matches(*own)
