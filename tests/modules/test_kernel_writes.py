"""Every write to a parameter is seen by the cached kernel, whoever makes it; reading is none, and costs no memory."""

import copy
import io
import pickle
import threading

import pytest
import torch
from test_conv import make
from torch import nn

from orepa import OREPAConv
from orepa.modules import writes

X = torch.randn(2, 4, 5, 5)


def run(conv):
    with torch.no_grad():
        return conv(X)


def assert_fresh(conv):
    with torch.no_grad():
        torch.testing.assert_close(conv(X), conv.forward_branches(X), rtol=1e-4, atol=1e-4)


def cached(conv):
    """Return what a forward has cached, which has to be there."""
    assert_fresh(conv)
    assert conv._cached is not None
    return conv._cached


# --- writes -----------------------------------------------------------------------------------------------------------------


def mean_teacher(conv):
    student = make()
    for teacher, s in zip(conv.parameters(), student.parameters(), strict=True):
        teacher.data.mul_(0.9).add_(s.data, alpha=0.1)


def every(write):
    def change(conv):
        for parameter in conv.parameters():
            write(parameter)

    return change


def optimizer(kind, **options):
    def change(conv):
        for parameter in conv.parameters():
            parameter.grad = torch.ones_like(parameter)
        getattr(torch.optim, kind)(conv.parameters(), 0.1, **options).step()

    return change


def swap(conv):
    one, other = conv.conv1x1_weight, conv.avg_weight
    one.data, other.data = other.data, one.data


WRITES = {
    "mean teacher": mean_teacher,
    "copy_": every(lambda p: p.data.copy_(torch.randn_like(p))),
    "item": every(lambda p: p.data.__setitem__(..., torch.randn_like(p))),
    "one element": lambda conv: conv.scales.data.view(-1)[3:4].fill_(7.0),
    "detach": every(lambda p: p.detach().mul_(1.5)),
    "foreach": lambda conv: torch._foreach_mul_([p.data for p in conv.parameters()], 1.5),
    "lerp": every(lambda p: p.data.lerp_(torch.randn_like(p), 0.5)),
    "out": every(lambda p: torch.mul(p.detach(), 1.5, out=p.data)),
    "init": every(lambda p: nn.init.normal_(p)),
    "numpy": every(lambda p: p.detach().numpy().__imul__(1.5)),
    "dlpack": every(lambda p: torch.from_dlpack(p.detach()).mul_(1.5)),
    "storage": every(lambda p: p.untyped_storage().copy_(torch.randn_like(p).untyped_storage())),
    "data": every(lambda p: setattr(p, "data", p.data * 1.5)),
    "set_": every(lambda p: p.set_(torch.randn_like(p))),
    "swapped": swap,
    "transposed": lambda conv: setattr(conv.origin_weight, "data", conv.origin_weight.data.transpose(2, 3)),
    "parameter": lambda conv: setattr(
        conv, "scales", nn.Parameter(conv.scales.detach() * 1.5, conv.scales.requires_grad)
    ),
    "state dict": lambda conv: [value.mul_(1.5) for value in conv.state_dict().values()],
    "uncounted": every(lambda p: uncounted(p)),
    "load_kernel_": lambda conv: conv.load_kernel_(torch.randn(6, 4, 3, 3)),
    "a filter": lambda conv: conv.prior_filter.mul_(1.5),
    "SGD": optimizer("SGD", foreach=False),
    "SGD foreach": optimizer("SGD", foreach=True),
    "SGD fused": optimizer("SGD", fused=True),
    "Adam fused": optimizer("Adam", fused=True),
    "AdamW fused": optimizer("AdamW", fused=True),
    "Adagrad fused": optimizer("Adagrad", fused=True),
}


def uncounted(parameter):
    with torch.no_grad(), torch.autograd._unsafe_preserve_version_counter(parameter):
        parameter.mul_(1.5)


@pytest.mark.parametrize("mode", ["eval", "train"])  # in train mode, of a frozen block
@pytest.mark.parametrize("write", WRITES)
def test_a_write_is_seen(write, mode):
    conv = make().train(mode == "train").requires_grad_(mode == "eval")
    with torch.no_grad():
        conv.scales.add_(1.0)  # the prior counts
    kept, old = cached(conv), run(conv)
    assert cached(conv) is kept
    with torch.no_grad():
        WRITES[write](conv)
    assert not torch.allclose(run(conv), old, rtol=1e-3)
    kept = cached(conv)
    assert cached(conv) is kept, "a write costs one squeeze"


def test_a_flat_buffer_behind_the_parameters():
    conv = make().eval()
    flat = nn.utils.parameters_to_vector(conv.parameters()).detach()
    nn.utils.vector_to_parameters(flat, conv.parameters())
    kept, old = cached(conv), run(conv)
    flat.copy_(flat * 1.5)
    assert not torch.allclose(run(conv), old, rtol=1e-3) and cached(conv) is not kept
    old = run(conv)
    swap(conv)  # two parts of one storage
    assert not torch.allclose(run(conv), old, rtol=1e-3)
    assert_fresh(conv)


def test_tied_blocks_do_not_hide_writes_from_each_other():
    """A second block that caches begins to watch anew what the first one watches."""
    one, other = make().eval(), OREPAConv(4, 6, 3, padding=1).eval()
    for name, parameter in one.named_parameters():
        setattr(other, name, parameter)
    for first, second in ((one, other), (other, one), (one, other)):
        cached(first), cached(second)
        one.scales.data.mul_(1.5)
        for conv in (second, first, second):
            assert_fresh(conv)
    kept = cached(one)
    other.clear_cache()
    cached(other)
    assert cached(one) is kept, "blocks that read the same tensors do not disturb each other"
    other.clear_cache()
    one.scales.data.mul_(1.5)
    assert_fresh(one)


def test_a_compiled_optimizer_is_seen():
    conv = make().eval()
    cached(conv)
    step = torch.compile(lambda: [p.data.mul_(1.5) for p in conv.parameters()], backend="eager")
    old = run(conv)
    step()
    assert not torch.allclose(run(conv), old, rtol=1e-3)
    assert_fresh(conv)


def test_a_write_by_another_thread_while_the_kernel_is_squeezed(monkeypatch):
    conv, real = make().eval(), OREPAConv._squeeze

    def interrupted(self, *arguments, **keywords):
        kernel = real(self, *arguments, **keywords)
        uncounted(self.scales)
        return kernel

    monkeypatch.setattr(OREPAConv, "_squeeze", interrupted)
    run(conv)
    monkeypatch.undo()
    assert_fresh(conv)


def test_threads_that_read_and_threads_that_write():
    conv = make().eval()

    def read():
        for _ in range(50):
            run(conv)

    def write():
        for _ in range(50):
            every(lambda p: p.data.mul_(1.01))(conv)

    threads = [threading.Thread(target=target) for target in (read, read, write, write)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert_fresh(conv)


def test_the_known_hole_needs_clear_cache():
    """NumPy and PyTorch both write through an array that was taken before; only PyTorch tells."""
    conv = make().eval()
    array = conv.scales.detach().numpy()
    kept = cached(conv)
    array *= 1.5
    assert run(conv) is not None and conv._cached is kept
    conv.clear_cache()
    assert_fresh(conv)


# --- what cannot be watched ---------------------------------------------------------------------------------------------------


def shared(conv):
    conv.share_memory()


def from_numpy(conv):
    every(lambda p: setattr(p, "data", torch.from_numpy(p.detach().numpy().copy())))(conv)


def mapped(conv, path="weights.pt"):
    torch.save(conv.state_dict(), path)
    conv.load_state_dict(torch.load(path, mmap=True), assign=True)


@pytest.mark.parametrize("move", [shared, from_numpy, mapped])
def test_memory_that_is_not_pytorchs_own_is_not_cached(move, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    conv = make().eval()
    cached(conv)
    move(conv)
    assert_fresh(conv)
    assert conv._cached is None


def test_a_pytorch_that_does_not_tell_is_not_cached(monkeypatch):
    writes.detects_writes.cache_clear()
    monkeypatch.setattr(writes, "_is_marked", lambda tensor: True)
    conv = make().eval()
    assert_fresh(conv)
    assert conv._cached is None
    writes.detects_writes.cache_clear()


# --- reading and memory -------------------------------------------------------------------------------------------------------


def test_reading_keeps_the_kernel():
    conv = make().eval()
    kept = cached(conv)
    copy.deepcopy(conv), conv.state_dict(), repr(conv.scales), conv.scales.tolist()
    float(sum(p.norm() for p in conv.parameters()))
    assert cached(conv) is kept
    pickle.dumps(conv), torch.save(conv.state_dict(), io.BytesIO())  # these take addresses, so the kernel may go
    assert_fresh(conv)


def test_caching_moves_no_parameter_and_steps_copy_none():
    conv = make().eval()
    addresses = [p.data_ptr() for p in conv.parameters()]
    cached(conv)
    optimizer("SGD", fused=True)(conv)
    assert_fresh(conv)
    assert [p.data_ptr() for p in conv.parameters()] == addresses


def test_workers_of_a_loader():
    conv = make().eval()
    kept = cached(conv)

    class Features(torch.utils.data.Dataset):
        def __len__(self):
            return 2

        def __getitem__(self, index):
            return run(conv)

    for features in torch.utils.data.DataLoader(Features(), num_workers=1):
        torch.testing.assert_close(features[0], run(conv))
    assert conv._cached is kept


# --- one rule: cached where the block does not train ------------------------------------------------------------------------


@pytest.mark.parametrize("attribute", ["_fsdp_flattened", "ds_id"])
def test_parameters_that_are_freed_between_forwards_are_not_cached(attribute):
    """As FSDP1 and DeepSpeed mark them."""
    conv = make().eval()
    setattr(conv.scales, attribute, 1)
    run(conv)
    assert conv._cached is None


def test_a_block_in_training_caches_nothing_with_gradients_off():
    """Checkpoints with reentrant autograd run so before every step."""
    conv = make().train()
    run(conv)
    assert conv._cached is None


@pytest.mark.parametrize("train", [False, True])
def test_a_frozen_block_squeezes_once_with_gradients_on(train):
    conv, x = make().train(train).requires_grad_(False), X.clone().requires_grad_()
    conv(x).sum().backward()
    kept = conv._cached
    assert kept is not None and x.grad is not None
    for _ in range(3):
        conv(x).sum().backward()
    assert conv._cached is kept
    conv.scales.requires_grad_(True)
    conv(x).sum().backward()
    assert conv.scales.grad is not None, "a thawed block gets its gradient"


def test_a_kernel_of_inference_mode_serves_a_backward_pass():
    conv = make().requires_grad_(False).eval()
    with torch.inference_mode():
        conv(X)
    kept, x = conv._cached, X.clone().requires_grad_()
    conv(x).sum().backward()
    assert conv._cached is kept is not None and x.grad is not None


def test_functional_transforms_of_a_frozen_block():
    conv = make().requires_grad_(False).eval()
    for _ in range(2):
        y = torch.vmap(conv)(torch.stack([X, X]))
        torch.testing.assert_close(y[1], run(conv))
        _, tangent = torch.func.jvp(conv, (X,), (torch.ones_like(X),))
        torch.testing.assert_close(tangent, run(conv) * 0 + conv(X + 1) - conv(X), rtol=1e-3, atol=1e-3)
