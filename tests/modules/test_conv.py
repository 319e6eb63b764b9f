"""`OREPAConv` as a citizen of PyTorch: everything that people do to an `nn.Conv2d`."""

import copy
import inspect
import io
import pickle

import pytest
import torch
from torch import nn

import orepa_kernels
from orepa import OREPAConv
from orepa.topology.filters import frequency_prior

F64 = torch.float64


def make(*args, topology=None, **kwargs):
    """A convolution with every parameter away from its initial value."""
    conv = OREPAConv(*(args or (4, 6, 3)), **{"padding": 1, "topology": topology, **kwargs})
    with torch.no_grad():
        for parameter in conv.parameters():
            parameter.normal_(std=0.5)
    return conv


@pytest.fixture
def squeezes(monkeypatch):
    """Counts the squeezes that are computed."""
    calls = []
    real = orepa_kernels.squeeze

    def counting(*args, **kwargs):
        calls.append(args)
        return real(*args, **kwargs)

    monkeypatch.setattr(orepa_kernels, "squeeze", counting)
    return calls


# --- nn.Conv2d's face -------------------------------------------------------------------------------------------------------


def test_signature_begins_as_conv2d():
    ours = list(inspect.signature(OREPAConv).parameters.values())
    theirs = list(inspect.signature(nn.Conv2d).parameters.values())
    assert [(p.name, p.default) for p in ours[: len(theirs)]] == [(p.name, p.default) for p in theirs]


@pytest.mark.parametrize(
    "arguments",
    [
        {"stride": 2, "padding": 1},
        {"padding": "same", "dilation": 2, "kernel_size": 4, "topology": "repvgg_dense"},
        {"padding": "valid", "groups": 2, "bias": False},
        {"padding": (0, 2), "padding_mode": "circular", "kernel_size": (1, 3)},
    ],
)
def test_converts_to_a_conv2d_of_the_same_geometry(arguments):
    arguments = {"kernel_size": 3, "dtype": F64, **arguments}
    conv = make(4, 6, **arguments)
    plain = conv.to_conv2d()
    geometry = {k: v for k, v in arguments.items() if k != "topology"}
    twin = nn.Conv2d(4, 6, **geometry)
    assert repr(plain) == repr(twin)
    assert repr(twin)[len("Conv2d(") : -1] in repr(conv)
    for x in (torch.randn(2, 4, 9, 8, dtype=F64), torch.randn(4, 9, 8, dtype=F64)):
        torch.testing.assert_close(plain(x), conv(x))
        torch.testing.assert_close(conv.forward_branches(x), conv(x))
    assert type(plain) is nn.Conv2d and plain.weight.requires_grad and plain.training


def test_converting_twice_and_keeping_flags():
    conv = make().eval()
    for parameter in conv.parameters():
        parameter.requires_grad_(False)
    first, second = conv.to_conv2d(), conv.to_conv2d()
    assert torch.equal(first.weight, second.weight) and not first.weight.requires_grad and not first.training
    assert not first.bias.requires_grad
    conv = conv.to(memory_format=torch.channels_last)
    assert conv.to_conv2d().weight.is_contiguous(memory_format=torch.channels_last)
    bf16 = make().bfloat16()
    assert bf16.to_conv2d().weight.dtype == torch.bfloat16


def test_repr_names_what_matters():
    assert repr(make(4, 6, 3, padding=0)) == "OREPAConv(4, 6, kernel_size=(3, 3), stride=(1, 1), topology=orepa)"
    text = repr(OREPAConv(4, 8, 1, groups=2, bias=False, scaling="scalar", backend="reference", padding_mode="reflect"))
    assert "groups=2, padding_mode=reflect, bias=False, topology=rep1x1, scaling=scalar, backend=reference" in text


def test_bias_is_one_vector_for_the_block():
    conv = make(dtype=F64)
    x = torch.randn(2, 4, 5, 5, dtype=F64)
    before = conv(x)
    with torch.no_grad():
        conv.bias += 1
    torch.testing.assert_close(conv(x), before + 1)
    assert make(bias=False).bias is None


BAD = [
    ({"in_channels": 0}, "in_channels must be a positive integer, got 0"),
    ({"groups": 3}, "groups=3 must divide in_channels=4"),
    ({"out_channels": 5, "groups": 2}, "groups=2 must divide out_channels=5"),
    ({"kernel_size": (3, 0)}, r"kernel_size must be a positive integer or two of them, got \(3, 0\)"),
    ({"stride": 0}, "stride must be a positive integer"),
    ({"padding": -1}, "padding must not be negative"),
    ({"padding": "full"}, "padding must be a number, two numbers, 'same' or 'valid', got 'full'"),
    ({"padding": "same", "stride": 2}, "padding='same' needs stride=1"),
    ({"padding_mode": "mirror"}, "padding_mode must be one of zeros, reflect, replicate, circular, got 'mirror'"),
    ({"scaling": "matrix"}, "scaling must be one of vector, scalar, none, got 'matrix'"),
    ({"backend": "fast"}, "backend must be one of auto, .*got 'fast'"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        OREPAConv(**{"in_channels": 4, "out_channels": 6, "kernel_size": 3, **arguments})


def test_bad_dtype_and_options():
    with pytest.raises(TypeError, match="dtype must be float64, float32, bfloat16 or float16, got torch.int32"):
        OREPAConv(4, 6, 3, dtype=torch.int32)
    with pytest.raises(TypeError, match="priro"):
        OREPAConv(4, 6, 3, priro="dct2d")


# --- the eval cache ---------------------------------------------------------------------------------------------------------


def test_eval_squeezes_once_and_training_every_time(squeezes):
    conv, x = make(), torch.randn(1, 4, 5, 5)
    conv(x), conv(x)
    assert len(squeezes) == 2
    conv.eval()
    with torch.no_grad():
        for _ in range(3):
            conv(x)
    assert len(squeezes) == 3
    conv(x)  # gradients are on: eval mode does not mean that nobody fine-tunes
    assert len(squeezes) == 4 and conv(x).requires_grad


def _in_place(conv):
    with torch.no_grad():
        conv.scales.mul_(2)


def _optimizer(conv):
    for parameter in conv.parameters():
        parameter.grad = torch.ones_like(parameter)
    torch.optim.SGD(conv.parameters(), 0.1).step()


def _load(conv):
    conv.load_state_dict({k: v * 2 for k, v in conv.state_dict().items()})


def _assign(conv):
    conv.load_state_dict({k: v * 2 for k, v in conv.state_dict().items()}, assign=True)


def _replace(conv):
    conv.origin_weight = nn.Parameter(conv.origin_weight.detach() * 2)


def _data(conv):
    conv.origin_weight.data = conv.origin_weight.data * 2


def _data_in_place_between_modes(conv):
    conv.train()
    conv.origin_weight.data.mul_(2)
    conv.eval()


def _ema(conv):
    with torch.no_grad():
        for value in conv.state_dict().values():
            value.mul_(0.9)


def _data_and_clear(conv):
    conv.origin_weight.data.mul_(2)
    conv.clear_cache()


CHANGES = [_in_place, _optimizer, _load, _assign, _replace, _data, _data_in_place_between_modes, _ema, _data_and_clear]


@pytest.mark.parametrize("change", CHANGES)
def test_the_cache_follows_every_change(change):
    conv, x = make().eval(), torch.randn(1, 4, 5, 5)
    with torch.no_grad():
        old = conv(x)
        assert torch.equal(conv(x), old)
    change(conv)
    with torch.no_grad():
        new, truth = conv(x), conv.forward_branches(x)
    assert not torch.allclose(new, old, rtol=1e-3)
    torch.testing.assert_close(new, truth, rtol=1e-4, atol=1e-4)


def test_the_cache_knows_dtype_and_autocast():
    conv, x = make().eval(), torch.randn(1, 4, 5, 5)
    with torch.no_grad():
        wide = conv(x)
        with torch.autocast("cpu", torch.bfloat16):
            assert conv(x).dtype == torch.bfloat16
        assert torch.equal(conv(x), wide)
        conv.double()
        torch.testing.assert_close(conv(x.double()), wide.double(), rtol=1e-4, atol=1e-4)


def test_the_cache_is_private_to_a_module_and_carries_no_graph():
    conv, x = make().eval(), torch.randn(1, 4, 5, 5)
    with torch.no_grad():
        old = conv(x)
    assert conv._cached is not None and not conv._cached.kernel.requires_grad
    for twin in (copy.deepcopy(conv), pickle.loads(pickle.dumps(conv))):
        assert twin._cached is None
        with torch.no_grad():
            assert torch.equal(twin(x), old)
            twin.scales.mul_(2)
            assert not torch.allclose(twin(x), old, rtol=1e-3)
            assert torch.equal(conv(x), old)
    assert len(pickle.dumps(conv)) < len(pickle.dumps(make(topology="orepa").eval())) + 200


def test_copies_after_a_training_step_and_ema():
    """yolov5 #9623: an EMA deepcopies a model in use, which fails on tensors that carry a graph."""
    conv, x = make(), torch.randn(1, 4, 5, 5)
    conv(x).sum().backward()
    ema = copy.deepcopy(conv).eval()
    with torch.no_grad():
        for a, b in zip(ema.parameters(), conv.parameters(), strict=True):
            a.lerp_(b, 0.5)
        torch.testing.assert_close(ema(x), conv(x))
    averaged = torch.optim.swa_utils.AveragedModel(conv, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9))
    averaged.update_parameters(conv)
    torch.testing.assert_close(averaged.eval()(x), conv(x))


def test_inference_mode_works_and_is_not_cached_for_training():
    x = torch.randn(1, 4, 5, 5)
    conv = make().eval()
    with torch.inference_mode():
        y = conv(x)
        assert torch.equal(conv(x), y)
        born_inside = make().eval()
        born_inside(x)
    conv.train()
    conv(x).sum().backward()
    assert conv.origin_weight.grad is not None
    conv.eval()
    with torch.inference_mode():
        conv(x)
    with torch.no_grad():
        assert torch.equal(conv(x), y)
    x.requires_grad_()
    for parameter in conv.parameters():
        parameter.requires_grad_(False)
    conv(x).sum().backward()
    assert x.grad is not None


# --- saving, moving, casting ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("topology", ["orepa", "deep_stem", "rep1x1"])
def test_state_dict_round_trip(topology):
    size = {"orepa": 3, "deep_stem": 7, "rep1x1": 1}[topology]
    a, b = make(4, 6, size, topology=topology), make(4, 6, size, topology=topology)
    buffer = io.BytesIO()
    torch.save(a.state_dict(), buffer)
    buffer.seek(0)
    b.load_state_dict(torch.load(buffer, weights_only=True))
    x = torch.randn(1, 4, 9, 9)
    assert torch.equal(a(x), b(x))
    assert set(a.state_dict()) == {name for name, _ in a.named_parameters()} | {"_extra_state"}


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("size", [3, 7])
def test_meta_construction(assign, size):
    source = make(4, 6, size)
    conv = OREPAConv(4, 6, size, padding=1, device="meta")
    assert all(t.is_meta for t in conv.parameters())
    assert conv(torch.empty(1, 4, 9, 9, device="meta")).shape == (1, 6, 11 - size + 1, 11 - size + 1)
    if not assign:
        conv = conv.to_empty(device="cpu")
    conv.load_state_dict(source.state_dict(), assign=assign)
    x = torch.randn(1, 4, 9, 9)
    assert torch.equal(conv(x), source(x)), "constants must be computed again, not left as memory was"


def test_reset_parameters_after_to_empty():
    conv = OREPAConv(4, 6, 3, device="meta").to_empty(device="cpu")
    conv.reset_parameters()
    assert all(torch.isfinite(p).all() for p in conv.parameters())
    assert torch.equal(conv.prior_filter, frequency_prior(6, (3, 3)).float())
    assert conv.scales[:, 0].tolist() == [0.25, 0.25, 0.0, 0.5, 1.0, 0.5]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_models_round_the_kernel_once(dtype):
    conv = make().to(dtype)
    assert torch.equal(conv.squeeze(), copy.deepcopy(conv).float().squeeze().to(dtype))
    y = conv(torch.randn(1, 4, 5, 5, dtype=dtype))
    y.sum().backward()
    assert y.dtype == dtype and all(p.grad.dtype == dtype for p in conv.parameters())
    assert torch.isfinite(conv.eval()(torch.randn(1, 4, 5, 5, dtype=dtype))).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_composes_wide_and_emits_narrow(dtype):
    conv, x = make(), torch.randn(2, 4, 6, 6)
    with torch.autocast("cpu", dtype):
        y = conv(x)
        expected = torch.nn.functional.conv2d(x, conv.squeeze().to(dtype), conv.bias, padding=1)
    assert y.dtype == dtype and torch.equal(y, expected)
    y.float().pow(2).sum().backward()
    assert all(p.grad.dtype == torch.float32 and torch.isfinite(p.grad).all() for p in conv.parameters())
    wide = make(dtype=F64)
    with torch.autocast("cpu", dtype):
        assert wide(x.double()).dtype == F64


def test_channels_last():
    conv, x = make(8, 8, 3), torch.randn(2, 8, 6, 6)
    expected = conv(x)
    conv = conv.to(memory_format=torch.channels_last)
    y = conv(x.to(memory_format=torch.channels_last))
    assert y.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(y, expected)
    assert conv.squeeze(memory_format=torch.channels_last).is_contiguous(memory_format=torch.channels_last)


# --- compilers and transforms -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("backend", "size"), [("aot_eager", 3), ("aot_eager", 7), ("aot_eager", 1), ("inductor", 3)])
def test_compile_fullgraph_forward_and_backward(backend, size):
    torch.compiler.reset()
    conv, x = make(4, 6, size), torch.randn(2, 4, 9, 9)
    compiled = torch.compile(conv, fullgraph=True, backend=backend)
    compiled(x).pow(2).sum().backward()
    got = {name: p.grad.clone() for name, p in conv.named_parameters()}
    conv.zero_grad()
    conv(x).pow(2).sum().backward()
    for name, parameter in conv.named_parameters():
        torch.testing.assert_close(got[name], parameter.grad, rtol=1e-3, atol=1e-3, msg=name)
    conv.eval()
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), conv(x), rtol=1e-4, atol=1e-4)
        next(conv.parameters()).mul_(2)
        torch.testing.assert_close(compiled(x), conv(x), rtol=1e-4, atol=1e-4)


def test_functional_call_vmap_and_double_backward():
    conv, x = make(dtype=F64).eval(), torch.randn(2, 4, 5, 5, dtype=F64)
    stacked = {name: torch.stack([p.detach(), 2 * p.detach()]) for name, p in conv.named_parameters()}
    with torch.no_grad():
        conv(x)
        both = torch.func.vmap(lambda values: torch.func.functional_call(conv, values, (x,)))(stacked)
        torch.testing.assert_close(both[0], conv(x))
        assert not torch.allclose(both[1], conv(x))
    (first,) = torch.autograd.grad(conv(x).pow(3).sum(), conv.scales, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), conv.origin_weight)
    assert second.abs().sum() > 0


def test_deterministic_algorithms_and_bitwise_repeat():
    torch.use_deterministic_algorithms(True)
    try:
        runs = []
        for seed in (0, 0, 1):
            torch.manual_seed(seed)
            conv, x = make(8, 8, 3), torch.randn(2, 8, 6, 6)
            conv(x).pow(2).sum().backward()
            runs.append([p.grad.clone() for p in conv.parameters()])
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(runs[0], runs[1], strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(runs[0], runs[2], strict=True))


# --- starting from a given kernel -------------------------------------------------------------------------------------------


HOLDERS = ["orepa", "repvgg_dense", "rep1x1", "dbb", "repvgg", "acnet", "mobileone", "ecb", "plain"]


@pytest.mark.parametrize("scaling", ["vector", "scalar", "none"])
@pytest.mark.parametrize("topology", HOLDERS)
def test_load_kernel(topology, scaling):
    size = 1 if topology == "rep1x1" else 3
    conv = make(4, 4, size, topology=topology, scaling=scaling, groups=2)
    target = torch.randn(4, 2, size, size)
    conv.load_kernel_(target)
    torch.testing.assert_close(conv.squeeze(), target, rtol=1e-5, atol=1e-5)
    conv(torch.randn(2, 4, 6, 6)).pow(2).sum().backward()
    if conv.scales is not None:
        assert (conv.scales.grad.abs().sum(1) > 0).all(), "every branch must be able to wake up"


def test_load_kernel_refuses():
    with pytest.raises(ValueError, match="'deep_stem' has no full-size convolution"):
        make(4, 4, 7).load_kernel_(torch.zeros(4, 4, 7, 7))
    with pytest.raises(ValueError, match=r"weight must be \[6, 4, 3, 3\], got \[4, 6, 3, 3\]"):
        make().load_kernel_(torch.zeros(4, 6, 3, 3))
