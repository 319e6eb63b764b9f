"""The Triton backend on a GPU: what ``test_gpu.py``, which runs every backend there is, does not ask."""

import pytest
import torch

import orepa
import orepa_kernels
from orepa import OREPAConv

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not orepa_kernels.backends()["triton"], reason=orepa_kernels.backends()["triton"].reason),
]


def randomized(*args, **kwargs):
    conv = OREPAConv(*args, bias=False, backend="triton", **kwargs)
    with torch.no_grad():
        for parameter in conv.parameters():
            parameter.normal_(std=0.2)
    return conv.cuda()


def relative(got, exact):
    return ((got.double() - exact.double()).norm() / exact.double().norm()).item()


def exact_of(conv):
    operands = [t.double() for t in conv_tensors(conv)]
    return orepa_kernels.squeeze([conv.plan], [operands], backend="reference")[0]


def conv_tensors(conv):
    named = {**dict(conv.named_parameters()), **dict(conv.named_buffers())}
    return [named[operand.name].detach() for operand in conv.plan.operands]


@pytest.mark.parametrize(("precision", "limit"), [("highest", 5e-6), ("high", 2e-3), ("medium", 2e-3)])
def test_precision_modes(precision, limit):
    conv = randomized(256, 256, 3)
    exact = exact_of(conv)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        error = relative(conv.squeeze(), exact)
    finally:
        torch.set_float32_matmul_precision(before)
    assert error <= limit
    if precision == "high":
        assert error > 5e-6  # the setting does reach the kernels


def test_the_identity_is_exact_in_every_precision():
    """At its start, a 1x1-kxk branch has ``W1 = id``: no product of the matrix units may touch ``W2``."""
    conv = OREPAConv(64, 64, 3, bias=False, backend="triton").cuda()
    exact = exact_of(conv)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        assert relative(conv.squeeze(), exact) <= 1e-6
    finally:
        torch.set_float32_matmul_precision(before)


def test_concurrent_streams_do_not_share_state():
    convs = [randomized(192, 160, 3) for _ in range(4)]
    upstream = torch.randn(convs[0].plan.shape, device="cuda")

    def run(conv):
        conv.zero_grad()
        conv.squeeze().backward(upstream)
        return [p.grad.clone() for p in conv.parameters()]

    alone = [run(conv) for conv in convs]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in convs]
    for _ in range(10):
        together = []
        for conv, stream in zip(convs, streams, strict=True):
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                together.append(run(conv))
        torch.cuda.synchronize()
        for mine, true in zip(together, alone, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(mine, true, strict=True))


def test_a_list_of_blocks_in_a_cuda_graph():
    """Address tables are part of the graph: replays follow the parameters, whatever eager calls do in between."""
    convs = [randomized(64, 64, 3), randomized(128, 64, 3), randomized(64, 96, 3)]
    plans, tensors = [conv.plan for conv in convs], [conv_tensors(conv) for conv in convs]

    def run():
        return orepa_kernels.squeeze(plans, tensors, backend="triton")

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for _ in range(3):
        for own in tensors:
            for tensor in own:
                tensor.mul_(1.25)
        expected = run()
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(captured, expected, strict=True))


@pytest.mark.parametrize("topology", orepa.topologies())
def test_half_precision_operands(topology):
    size = 1 if topology == "rep1x1" else 7 if topology.endswith("stem") else 3
    conv = randomized(48, 40, size, topology=topology)
    exact = exact_of(conv.bfloat16())
    assert relative(conv.squeeze(), exact) <= torch.finfo(torch.bfloat16).eps
