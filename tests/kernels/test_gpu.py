"""On a CUDA device: what the CPU tests promise holds there too. Every backend that runs there is held to the same promises."""

import copy

import pytest
import torch
from torch import nn

import orepa
from orepa import OREPAConv, RepVGGBlock
from orepa_kernels.dispatch import names_on

pytestmark = pytest.mark.gpu

F64 = torch.float64
BACKENDS = names_on(torch.device("cuda"))


@pytest.fixture(autouse=True)
def _highest_precision():
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.set_float32_matmul_precision(before[0])
    torch.backends.cudnn.allow_tf32 = before[1]


def randomized(*args, **kwargs):
    conv = OREPAConv(*args, **kwargs)
    with torch.no_grad():
        for parameter in conv.parameters():
            parameter.normal_(std=0.2)
    return conv.cuda()


def run(conv, upstream):
    """Kernel and gradients of one squeeze."""
    conv.zero_grad()
    kernel = conv.squeeze()
    kernel.backward(upstream.to(kernel))
    return kernel.detach(), {name: p.grad.clone() for name, p in conv.named_parameters() if p.grad is not None}


def relative(got, exact):
    return ((got.double() - exact.double()).norm() / exact.double().norm().clamp_min(1e-30)).item()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("topology", orepa.topologies())
@pytest.mark.parametrize("groups", [1, 3])
def test_squeeze_and_gradients_against_float64(backend, topology, groups):
    size = 1 if topology == "rep1x1" else 7 if topology.endswith("stem") else 3
    conv = randomized(129 * groups, 65 * groups, size, groups=groups, topology=topology, backend=backend, bias=False)
    exact = copy.deepcopy(conv).double()
    exact.backend = "reference"
    upstream = torch.randn(conv.plan.shape, device="cuda", dtype=F64)
    kernel, gradients = run(conv, upstream)
    truth, true_gradients = run(exact, upstream)
    assert relative(kernel, truth) <= 5e-6
    for name, gradient in gradients.items():
        assert relative(gradient, true_gradients[name]) <= 2e-5, name


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_one_rounding(backend, dtype):
    conv = randomized(64, 64, 3, backend=backend)
    wide = conv.squeeze()
    with torch.autocast("cuda", dtype):
        narrow = conv._kernel(torch.randn(1, 64, 8, 8, device="cuda"))
    assert narrow.dtype == dtype
    assert relative(narrow, wide) <= torch.finfo(dtype).eps


@pytest.mark.parametrize("backend", BACKENDS)
def test_bitwise_repeat_beside_other_work(backend):
    conv, upstream = randomized(256, 256, 3, backend=backend), torch.randn(256, 256, 3, 3, device="cuda")
    first, first_gradients = run(conv, upstream)
    side, noise = torch.cuda.Stream(), torch.randn(2048, 2048, device="cuda")
    for _ in range(5):
        with torch.cuda.stream(side):
            noise = noise @ noise.tanh()
        again, gradients = run(conv, upstream)
        assert torch.equal(first, again)
        assert all(torch.equal(gradients[name], first_gradients[name]) for name in gradients)
    with torch.no_grad():
        conv.origin_weight.mul_(1 + 2**-20)
    assert not torch.equal(first, conv.squeeze())


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_training_step_in_a_cuda_graph(backend):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 8, 1))
    model = orepa.prepare(net, backend=backend).cuda().to(memory_format=torch.channels_last)
    x = torch.randn(4, 16, 16, 16, device="cuda").to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)

    def step():
        optimizer.zero_grad(set_to_none=False)
        loss = model(x).square().mean()
        loss.backward()
        optimizer.step()
        return loss

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step()
    losses = []
    for _ in range(5):
        graph.replay()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0]
    # Replays leave no trace in version counters: switching modes must not meet an old kernel.
    model.eval()
    with torch.no_grad():
        before = model(x)
    model.train()
    graph.replay()
    model.eval()
    with torch.no_grad():
        assert not torch.equal(model(x), before)


def test_compile_fullgraph_forward_and_backward():
    conv, x = randomized(16, 32, 3, padding=1), torch.randn(2, 16, 9, 9, device="cuda")
    compiled = torch.compile(conv, fullgraph=True)
    torch.testing.assert_close(compiled(x), conv(x), rtol=1e-4, atol=1e-4)
    compiled(x).square().mean().backward()
    assert all(torch.isfinite(p.grad).all() for p in conv.parameters())


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled_with_cuda_graphs(backend):
    """What backends keep must not come from the memory pool of torch.compile's graphs."""
    conv, x = randomized(16, 32, 3, padding=1, backend=backend), torch.randn(2, 16, 9, 9, device="cuda")
    step = torch.compile(lambda x: conv(x).square().mean(), mode="reduce-overhead", fullgraph=True)
    conv(x).square().mean().backward()
    expected = [parameter.grad.clone() for parameter in conv.parameters()]
    for _ in range(4):  # warm-up, recording, replays
        torch.compiler.cudagraph_mark_step_begin()
        conv.zero_grad()
        step(x).backward()
        for parameter, gradient in zip(conv.parameters(), expected, strict=True):
            torch.testing.assert_close(parameter.grad, gradient, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_prepare_train_convert(dtype):
    net = nn.Sequential(
        nn.Conv2d(3, 16, 7, stride=2, padding=3),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        RepVGGBlock(16, 16),
        nn.Conv2d(16, 4, 1),
    )
    model = orepa.prepare(net).cuda()
    x = torch.randn(4, 3, 33, 31, device="cuda")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for _ in range(3):
        with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
            loss = model(x).float().square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    plain = orepa.convert(model.eval(), example_inputs=x)
    assert relative(plain(x), model(x)) <= 1e-5


def test_the_second_device_is_used_where_the_tensors_are():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    conv = randomized(16, 16, 3).to("cuda:1")
    assert conv.squeeze().device == torch.device("cuda:1")
    assert conv(torch.randn(1, 16, 5, 5, device="cuda:1")).device == torch.device("cuda:1")
