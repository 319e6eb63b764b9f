"""Where raw memory may not be read unseen: tracers, modes and transforms have to see operations, and get right results."""

import subprocess
import sys

import pytest
import torch
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

import orepa
from orepa.topology import Branch, Conv, Filter, Topology
from orepa.topology.filters import sobel_x
from orepa_kernels import Block, Dense, Operand, PointwiseFilter, squeeze
from orepa_kernels.backends.base import BackendError
from orepa_kernels.dispatch import NAMES, backends, get

WEIGHT = Block(2, 3, (3, 3), (Dense(Operand("w", (2, 3, 3, 3))),))


def layer():
    torch.manual_seed(0)
    return orepa.OREPAConv(4, 6, 3, padding=1)


@pytest.fixture
def warm():
    """A layer whose calls have been seen before, and take the shortcut."""
    conv = layer()
    for _ in range(2):
        conv.squeeze().sum().backward()
    conv.zero_grad()
    return conv


# --- torch.compile comes first -------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["auto", *(n for n, verdict in backends().items() if verdict and n != "reference")])
def test_compiled_before_anything_has_run(backend):
    """In a process of its own: availability is asked once, and here it is the compiler that asks."""
    script = f"""
        import torch
        from orepa import OREPAConv
        conv, x = OREPAConv(4, 8, 3, padding=1, backend={backend!r}), torch.randn(2, 4, 6, 6)
        compiled = torch.compile(conv, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), conv(x))
    """
    code = "\n".join(line[8:] for line in script.splitlines())
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


# --- tracers and modes ----------------------------------------------------------------------------------------------------


def test_jit_trace(warm):
    x = torch.randn(1, 4, 5, 5)
    traced = torch.jit.trace(warm, x)
    with torch.no_grad():
        warm.origin_weight.add_(1)
    torch.testing.assert_close(traced(x), warm(x))


def test_jit_trace_of_a_backend_asked_for_by_name(warm):
    warm.backend = "cpu"
    with pytest.raises(BackendError, match=r"'cpu' was asked for but cannot run.*torch\.jit"):
        torch.jit.trace(warm, torch.randn(1, 4, 5, 5))


@pytest.mark.parametrize("mode", ["real", "fake"])
def test_make_fx(mode):
    traced = make_fx(lambda w: squeeze([WEIGHT], [[w]])[0] * 2, tracing_mode=mode)(torch.randn(2, 3, 3, 3))
    weight = torch.randn(2, 3, 3, 3)
    assert torch.equal(traced(weight), 2 * weight)


def test_make_fx_of_a_backward_pass(warm):
    parameters = tuple(p for p in warm.parameters() if p is not warm.bias)

    def step(upstream):
        return torch.autograd.grad(warm.squeeze(), parameters, upstream)

    traced = make_fx(step)(torch.zeros(6, 4, 3, 3))
    upstream = torch.randn(6, 4, 3, 3)
    torch.testing.assert_close(traced(upstream), step(upstream))


def test_a_mode_that_begins_after_the_forward_pass(warm):
    kernel = warm.squeeze()
    with FlopCounterMode(display=False) as seen:
        kernel.sum().backward()
    assert seen.get_total_flops() > 0
    gradient = warm.conv1x1_kxk_conv2.grad.clone()
    warm.zero_grad()
    warm.squeeze().sum().backward()
    torch.testing.assert_close(gradient, warm.conv1x1_kxk_conv2.grad)


def test_another_default_device(warm):
    fresh = orepa.OREPAConv(5, 7, 3)  # whose call has not been seen before
    with torch.device("meta"):
        assert warm.squeeze().device.type == fresh.squeeze().device.type == "cpu"


# --- derivatives ----------------------------------------------------------------------------------------------------------


def test_forward_mode():
    tangent = torch.randn(2, 3, 3, 3)
    for requires_grad in (False, True):
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(torch.randn(2, 3, 3, 3, requires_grad=requires_grad), tangent)
            (kernel,) = squeeze([WEIGHT], [[dual]])
            assert torch.equal(forward_ad.unpack_dual(kernel).tangent, tangent)


@pytest.mark.parametrize("create_graph", [False, True])
def test_many_gradients_at_once(warm, create_graph):
    parameters = [p for p in warm.parameters() if p is not warm.bias]
    upstream = torch.randn(5, 6, 4, 3, 3)
    how = {"create_graph": create_graph}
    batched = torch.autograd.grad(warm.squeeze(), parameters, upstream, is_grads_batched=True, **how)
    for index, one in enumerate(upstream):
        for together, alone in zip(batched, torch.autograd.grad(warm.squeeze(), parameters, one, **how), strict=True):
            torch.testing.assert_close(together[index], alone)


def test_gradients_of_gradients_do_not_round_under_autocast(warm):
    parameters = [p for p in warm.parameters() if p is not warm.bias]
    upstream = torch.randn(6, 4, 3, 3)
    exact = torch.autograd.grad(warm.squeeze(), parameters, upstream)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = torch.autograd.grad(warm.squeeze(), parameters, upstream, create_graph=True)
    for one, other in zip(found, exact, strict=True):
        torch.testing.assert_close(one, other)


# --- operands that are not what they seem -------------------------------------------------------------------------------------


@pytest.mark.parametrize("seen_before", [False, True])
def test_a_tensor_that_stands_for_its_negative(seen_before):
    if seen_before:
        for _ in range(2):
            squeeze([WEIGHT], [[torch.ones(2, 3, 3, 3, 2)[..., 0]]])
    negative = torch.complex(torch.randn(2, 3, 3, 3), torch.randn(2, 3, 3, 3)).conj().imag
    assert negative.is_neg()
    assert torch.equal(squeeze([WEIGHT], [[negative]])[0], negative.resolve_neg())


def test_taps_that_share_memory():
    overlapping = torch.randn(2 * 3 * 5).as_strided((2, 3, 3, 3), (15, 5, 1, 1))
    assert torch.equal(squeeze([WEIGHT], [[overlapping]])[0], overlapping)


def test_a_filter_that_comes_first_is_wider_in_half_precision():
    def edges(spec):
        return Topology(edge=Branch(Filter(sobel_x, 3), scale=1.0), origin=Branch(Conv(spec.kernel_size)))

    conv = orepa.OREPAConv(4, 4, 3, padding=1, topology=edges).to(torch.bfloat16)
    assert conv.squeeze().dtype == torch.bfloat16


def test_backends_are_told_of_float64_filters(monkeypatch):
    """Those without float64 would find out in their kernels."""
    block = Block(2, 3, (3, 3), (PointwiseFilter(Operand("p", (2, 3, 1, 1)), Operand("f", (1, 3, 3))),))
    tensors = [torch.randn(2, 3, 1, 1), torch.randn(1, 3, 3, dtype=torch.float64)]
    told = []
    for backend in map(get, NAMES):
        supports = backend.supports
        monkeypatch.setattr(backend, "supports", lambda request, ask=supports: told.append(request) or ask(request))
    (kernel,) = squeeze([block], [tensors])
    assert {(request.dtype, request.out_dtype) for request in told} == {(torch.float64, torch.float32)}
    assert kernel.dtype == torch.float32
    torch.testing.assert_close(kernel, (tensors[0] * tensors[1][0]).float())
