"""The kernel that eval mode caches is never a stale one: not after writes that nothing counts, nor among threads."""

import contextlib
import subprocess
import sys
import threading

import pytest
import test_conv
import torch
from torch import nn

from orepa import OREPAConv, convert
from orepa.modules import kernel_store as cache
from orepa.topology import AvgPool, Branch, Conv, Identity, Topology


def make(**arguments):
    """A convolution in eval mode with every parameter away from its initial value."""
    return test_conv.make(**arguments).eval()


@contextlib.contextmanager
def uncounted(module):
    """Writes inside leave the version counters as they were, like those of collectives and fused optimizers."""
    with torch.no_grad(), torch.autograd._unsafe_preserve_version_counter(tuple(module.parameters())):
        yield


def scale(module):
    with uncounted(module):
        for parameter in module.parameters():
            parameter.mul_(1.5)


def assert_fresh(conv, x):
    with torch.no_grad():
        torch.testing.assert_close(conv(x), conv.forward_branches(x), rtol=1e-4, atol=1e-4)


@pytest.fixture
def x():
    return torch.randn(2, 4, 5, 5)


# --- writes that are not counted --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("validates_before_the_step", [False, True])
@pytest.mark.parametrize("kind", ["SGD", "Adam", "AdamW", "Adagrad"])
def test_fine_tuning_in_eval_mode_with_a_fused_optimizer(kind, validates_before_the_step, x):
    """As with frozen norms. Fused optimizers write without counting."""
    conv = make()
    optimizer = getattr(torch.optim, kind)(conv.parameters(), 0.01, fused=True)
    for _ in range(3):
        assert_fresh(conv, x)
        optimizer.zero_grad()
        conv(x).square().mean().backward()
        if validates_before_the_step:
            assert_fresh(conv, x)
        optimizer.step()
    assert_fresh(conv, x)


@pytest.mark.parametrize("compiles", [False, True])
def test_a_forward_to_be_trained_through_leaves_no_stale_kernel(compiles, x):
    conv = make()
    forward = torch.compile(conv, fullgraph=True, backend="eager") if compiles else conv
    for _ in range(2):
        assert_fresh(conv, x)
        assert conv._cached is not None
        forward(x).sum().backward()
        scale(conv)
        assert_fresh(conv, x)


def test_a_forward_in_train_mode_leaves_no_stale_kernel(x):
    conv = make()
    assert_fresh(conv, x)
    conv.training = True  # train() would clear it
    with torch.no_grad():
        conv(x)
    conv.training = False
    scale(conv)
    assert_fresh(conv, x)


def test_a_frozen_block_keeps_its_kernel_where_gradients_pass_through_it(x):
    conv = make().requires_grad_(False)
    with torch.no_grad():
        conv(x)
    cached = conv._cached
    conv(x.clone().requires_grad_()).sum().backward()
    assert cached is not None and conv._cached is cached


def test_loading_clears(x):
    conv = make(topology="repvgg")
    state = {name: value * 2 for name, value in conv.state_dict().items()}
    assert_fresh(conv, x)
    with uncounted(conv):
        conv.load_state_dict(state)
    assert_fresh(conv, x)


def test_a_write_while_the_kernel_is_squeezed(x, monkeypatch):
    conv, real = make(), OREPAConv._squeeze

    def interrupted(self, *arguments, **keywords):
        kernel = real(self, *arguments, **keywords)
        self.scales.mul_(2)  # another thread's
        return kernel

    with torch.no_grad():
        monkeypatch.setattr(OREPAConv, "_squeeze", interrupted)
        conv(x)
        monkeypatch.undo()
    assert_fresh(conv, x)


FSDP2 = """
import os, torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from orepa import OREPAConv

dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
torch.set_num_threads(1)
x = torch.randn(2, 32, 6, 6)
for reshard in (True, False):
    for size in (3, 7):  # 7: the parameters lie in nested blocks
        model = nn.Sequential(*(nn.Sequential(OREPAConv(32, 32, size, padding=size // 2)) for _ in range(2))).eval()
        for part in model:
            fully_shard(part, mesh=init_device_mesh("cpu", (1,)), reshard_after_forward=reshard)
        fully_shard(model, mesh=init_device_mesh("cpu", (1,)), reshard_after_forward=reshard)
        with torch.no_grad():
            for _ in range(4):
                model(x)
                assert all(part[0]._cached is None for part in model), (reshard, size)
                for parameter in model.parameters():
                    parameter.mul_(1.1)
                y = model(x)
                model.eval()
                assert torch.equal(model(x), y), (reshard, size)
print("done", flush=True)
os._exit(0)  # threads of gloo's that outlive the group abort the interpreter's exit now and then
"""


def test_nothing_is_cached_under_fsdp2():
    """Between forwards its parameters are freed; in the next they are the same objects, of the same version."""
    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        pytest.skip("this torch has no gloo")
    run = subprocess.run([sys.executable, "-c", FSDP2], capture_output=True, text=True, timeout=120)
    assert run.stdout.strip().endswith("done"), run.stderr


# --- threads, replicas, settings --------------------------------------------------------------------------------------------


def test_another_thread_clears_or_replaces_the_kernel_in_between(x, monkeypatch):
    conv, real = make(), cache.StoredKernel.is_current
    with torch.no_grad():
        y = conv(x)

        def cleared(self, *form):
            current = real(self, *form)
            conv.eval()
            return current

        def replaced(self, *form):
            current = real(self, *form)
            monkeypatch.undo()
            with torch.autocast("cpu", torch.bfloat16):
                conv(x)
            return current

        for meanwhile in (cleared, replaced):
            conv(x)
            monkeypatch.setattr(cache.StoredKernel, "is_current", meanwhile)
            assert torch.equal(conv(x), y)
            monkeypatch.undo()


def test_threads_with_and_without_autocast(x):
    conv, wrong = make(), []

    def infer(narrow):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=narrow):
            for _ in range(200):
                if conv._kernel(x).dtype != (torch.bfloat16 if narrow else torch.float32):
                    wrong.append(narrow)

    threads = [threading.Thread(target=infer, args=(narrow,)) for narrow in (True, False)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert not wrong


def test_float64_is_cached_under_autocast(x):
    conv = make(dtype=torch.float64)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        conv(x.double())
        cached = conv._cached
        assert conv(x.double()).dtype == torch.float64 and conv._cached is cached is not None


def test_a_replica_squeezes_its_own_parameters(x):
    """`nn.DataParallel` copies modules shallowly and gives them tensors of another device, which are no parameters."""
    conv = make()
    with torch.no_grad():
        conv(x)
        cached, replica = conv._cached, conv._replicate_for_data_parallel()
        for name, parameter in conv.named_parameters():
            setattr(replica, name, parameter * 2)
        torch.testing.assert_close(replica(x), replica.forward_branches(x), rtol=1e-4, atol=1e-4)
    assert replica._cached is None and conv._cached is cached is not None


def test_a_cached_kernel_follows_the_settings_of_the_squeeze(x):
    conv, precision = make(), torch.get_float32_matmul_precision()
    with torch.no_grad():
        conv(x)
        cached = [conv._cached]
        conv.backend = "reference"
        conv(x)
        cached.append(conv._cached)
        try:
            torch.set_float32_matmul_precision("medium")
            conv(x)
        finally:
            torch.set_float32_matmul_precision(precision)
        cached.append(conv._cached)
    assert None not in cached and len(set(map(id, cached))) == 3


@pytest.fixture
def gpu(monkeypatch):
    """What PyTorch says of the GPU that these tests take the CPU for: the stream, and whether a graph is captured."""
    says = {"stream": "a", "captures": False}
    monkeypatch.setattr(cache, "_is_on_gpu", lambda x: True)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: says["stream"])
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: says["captures"])
    return says


def test_a_graph_that_is_captured_squeezes_for_itself(x, gpu):
    """A kernel made there would live in the graph's memory; one used there would be freed at the next change."""
    conv = make()
    with torch.no_grad():
        gpu["captures"] = True
        kernel = conv._kernel(x)
        assert conv._cached is None
        gpu["captures"] = False
        outside = conv._kernel(x)
        cached = conv._cached
        gpu["captures"] = True
        inside = conv._kernel(x)
        assert conv._cached is cached is not None and conv._kernel(x) is not outside
    assert torch.equal(kernel, outside) and torch.equal(inside, outside)


def test_a_kernel_is_used_on_the_stream_that_made_it(x, gpu):
    conv = make()
    with torch.no_grad():
        first = conv._kernel(x)
        assert conv._kernel(x) is first
        gpu["stream"] = "b"
        assert conv._kernel(x) is not first


# --- constants --------------------------------------------------------------------------------------------------------------


def constants(module):
    return {name: (buffer, buffer.data_ptr()) for name, buffer in module.named_buffers()}


NO_MOVES = {
    "load": lambda conv: conv.load_state_dict(conv.state_dict()),
    "to": lambda conv: conv.to("cpu"),
    "dtype": lambda conv: conv.to(next(conv.parameters()).dtype),
    "format": lambda conv: conv.to(memory_format=torch.channels_last),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("change", NO_MOVES)
def test_constants_that_need_not_move_stay(change, dtype):
    """CUDA graphs record their addresses."""
    conv = OREPAConv(4, 6, 7, dtype=dtype)  # constants of nested blocks
    before = constants(conv)
    assert before
    NO_MOVES[change](conv)
    after = constants(conv)
    assert all(after[name][0] is tensor and after[name][1] == place for name, (tensor, place) in before.items())


def test_constants_are_computed_again_where_they_were_overwritten():
    conv, truth = OREPAConv(4, 6, 3), OREPAConv(4, 6, 3).prior_filter
    conv._apply(lambda t: t.detach().zero_())
    assert torch.equal(conv.prior_filter, truth)
    assert torch.equal(conv.to_empty(device="cpu").prior_filter, truth)
    assert torch.equal(conv.half().float().prior_filter, truth)
    assert torch.equal(conv.to("meta").to_empty(device="cpu").prior_filter, truth)
    with torch.inference_mode():
        born_inside = OREPAConv(4, 6, 3)
    assert torch.equal(born_inside.double().float().prior_filter, truth)


@pytest.mark.parametrize("size", [3, 7])
def test_another_default_device(size):
    """Constants were computed on the default device, here one without values."""
    state = OREPAConv(4, 6, size).state_dict()
    empty = OREPAConv(4, 6, size, device="meta")
    with torch.device("meta"):
        conv = OREPAConv(4, 6, size, device="cpu")
        conv.load_state_dict(state)
        conv.to(torch.float64).to(torch.float32)
        empty = empty.to_empty(device="cpu")
        empty.load_state_dict(state)
    x = torch.randn(1, 4, 9, 9)
    assert torch.equal(conv(x), empty(x)) and not conv(x).is_meta


# --- unusual blocks ---------------------------------------------------------------------------------------------------------


def test_a_topology_without_parameters_is_refused():
    def idle(spec):
        return Topology(identity=Branch(Identity()), mean=Branch(AvgPool(3)))

    with pytest.raises(ValueError, match="topology 'idle' has nothing to learn"):
        OREPAConv(4, 4, 3, topology=idle, scaling="none")
    OREPAConv(4, 4, 3, padding=1, topology=idle)(torch.randn(1, 4, 5, 5)).sum().backward()


def test_weights_that_hooks_compute_are_refused_by_name():
    def single(spec):
        return Topology(only=Branch(Conv(3)))

    conv = OREPAConv(4, 6, 3, topology=single)
    with pytest.warns(FutureWarning):
        nn.utils.weight_norm(conv, "only_weight")
    with pytest.raises(RuntimeError, match=r"only_weight must be a parameter.*remove_weight_norm"):
        conv.to_conv2d()
    nn.utils.remove_weight_norm(conv, "only_weight")
    x = torch.ones(1, 4, 5, 5)
    torch.testing.assert_close(conv.to_conv2d()(x), conv(x))


def test_parametrized_weights_work_and_are_never_cached(x):
    conv = make()
    nn.utils.parametrizations.weight_norm(conv, "origin_weight")
    assert_fresh(conv, x)
    scale(conv)
    assert_fresh(conv, x)
    plain = convert(nn.Sequential(conv).eval())
    with torch.no_grad():
        torch.testing.assert_close(plain(x), conv(x), rtol=1e-4, atol=1e-4)
