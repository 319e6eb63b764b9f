"""`.weight` reads like that of `nn.Conv2d`, and a write to it is never lost in silence."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from detectors import fuse_conv_and_bn
from test_conv import make
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_conv_bn_weights

import orepa
from orepa import OfflineConv, OREPAConv

X = torch.randn(2, 4, 5, 5)


@pytest.fixture(params=["trained", "frozen", "no_grad", "inference"])
def conv(request):
    """A block in each state that a weight can be read in."""
    conv = make()
    if request.param == "frozen":
        conv.requires_grad_(False)
    mode = {"no_grad": torch.no_grad, "inference": torch.inference_mode}.get(request.param, torch.enable_grad)
    with mode():
        yield conv.eval()


# --- reading ----------------------------------------------------------------------------------------------------------------


def test_it_is_the_squeezed_kernel(conv):
    weight = conv.weight
    assert torch.equal(weight, conv.squeeze()) and weight.requires_grad == conv.squeeze().requires_grad
    assert (weight.shape, weight.dtype, weight.device, weight.numel()) == ((6, 4, 3, 3), torch.float32, X.device, 216)
    assert not isinstance(weight, nn.Parameter) and weight.is_contiguous()
    torch.testing.assert_close(
        F.conv2d(X, weight, conv.bias, conv.stride, conv.padding, conv.dilation, conv.groups), conv(X)
    )


def test_what_is_computed_from_it_is_plain(conv):
    weight = conv.weight
    for result in (
        weight * 2,
        weight.clone(),
        weight.sum(),
        F.conv2d(X, weight),
        weight.double(),
        torch.stack([weight]),
    ):
        assert type(result) is torch.Tensor
    result = weight.clone().detach()
    result.zero_()
    assert torch.zeros(6, 4, 3, 3).copy_(weight.detach()).abs().sum() > 0, "a copy from it is no write to it"


def test_it_is_no_parameter_and_draws_no_random_number():
    conv = make()
    state, names = torch.get_rng_state(), [name for name, _ in conv.named_parameters()]
    assert hasattr(conv, "weight")
    assert torch.equal(state, torch.get_rng_state())
    assert "weight" not in names and "weight" not in conv.state_dict()


def test_penalties_have_the_gradients_of_squeeze():
    conv = make()
    expected = torch.autograd.grad(
        conv.squeeze().square().sum(), [p for n, p in conv.named_parameters() if n != "bias"]
    )
    found = torch.autograd.grad(conv.weight.square().sum(), [p for n, p in conv.named_parameters() if n != "bias"])
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_weight_standardisation_trains():
    conv = make()
    w = conv.weight
    w = (w - w.mean((1, 2, 3), keepdim=True)) / (w.std((1, 2, 3), keepdim=True) + 1e-5)
    F.conv2d(X, w, conv.bias).sum().backward()
    assert all(p.grad is not None for p in conv.parameters())


def test_it_is_cached_with_the_kernel_and_writes_behind_its_back_stay_out():
    conv = make().eval()
    with torch.no_grad():
        y = conv(X)
        cached, weight = conv._cached, conv.weight
        assert conv._cached is cached is not None and weight.data_ptr() != cached.kernel.data_ptr()
        torch.from_dlpack(conv.weight).zero_()  # past every guard
        parameter = nn.Parameter(conv.weight)
        parameter.zero_()
        assert torch.equal(conv(X), y) and conv._cached is cached


def test_on_the_meta_device_and_compiled():
    assert OREPAConv(4, 6, 3, device="meta").weight.is_meta
    conv = make()

    @torch.compile(backend="eager", fullgraph=True)
    def norm(x):
        return conv(x).sum() + conv.weight.norm()

    torch.testing.assert_close(norm(X), conv(X).sum() + conv.weight.norm())


# --- writing ----------------------------------------------------------------------------------------------------------------

WRITES = {
    "data": lambda w: setattr(w, "data", torch.zeros(6, 4, 3, 3)),
    "data.normal_": lambda w: w.data.normal_(),
    "kaiming": nn.init.kaiming_normal_,
    "constant": lambda w: nn.init.constant_(w, 0.0),
    "orthogonal": nn.init.orthogonal_,
    "dirac": nn.init.dirac_,
    "mul_": lambda w: w.mul_(2),
    "item": lambda w: w.__setitem__(0, 1.0),
    "detach": lambda w: w.detach().zero_(),
    "view": lambda w: w.view(-1).fill_(0),
    "row": lambda w: w[0].zero_(),
    "chunk": lambda w: w.detach().chunk(2)[0].zero_(),
    "rows": lambda w: [row.zero_() for row in w],
    "keyword": lambda w: torch.reshape(input=w, shape=(-1,)).zero_(),
    "isub": lambda w: w.__isub__(1),
    "out": lambda w: torch.mul(w.detach(), 2, out=w.detach()),
    "foreach": lambda w: torch._foreach_mul_([w.detach()], 2),
    "inplace": lambda w: F.relu(w, inplace=True),
    "freeze": lambda w: w.requires_grad_(False),
    "freeze attribute": lambda w: setattr(w, "requires_grad", False),
    "gradient": lambda w: setattr(w, "grad", torch.zeros(6, 4, 3, 3)),
    "vector": lambda w: nn.utils.vector_to_parameters(torch.zeros(216), [w]),
}


@pytest.mark.parametrize("write", WRITES)
def test_a_write_to_it_raises(write, conv):
    before = conv.squeeze().clone()
    with pytest.raises(RuntimeError, match=r"write to it would be lost.*load_kernel_"):
        WRITES[write](conv.weight)
    assert torch.equal(conv.squeeze(), before)


def test_the_array_of_it_is_read_only():
    array = make().weight.detach().numpy()
    with pytest.raises(ValueError, match="read-only"):
        array.fill(0)


@pytest.mark.parametrize("block", [make, lambda: OfflineConv(4, 6, 3)])
def test_an_assignment_raises(block):
    conv = block()
    names = [name for name, _ in conv.named_parameters()]
    for value in (nn.Parameter(torch.zeros(6, 4, 3, 3)), torch.zeros(6, 4, 3, 3), None):
        with pytest.raises(AttributeError, match="load_kernel_"):
            conv.weight = value
    assert [name for name, _ in conv.named_parameters()] == names


def test_hooks_that_compute_a_weight_are_refused():
    conv = make()
    with pytest.raises(AttributeError, match="load_kernel_"):
        prune.l1_unstructured(conv, "weight", 0.5)
    for register in (parametrizations.weight_norm, parametrizations.spectral_norm):
        with pytest.raises(ValueError, match="does not have a parameter.*'weight'"):
            register(conv, "weight")
    with pytest.raises(ValueError, match="does not have a parameter.*'weight'"):
        parametrize.register_parametrization(conv, "weight", nn.Identity())
    with pytest.raises(ValueError, match="non-leaf"):
        torch.optim.SGD([conv.weight], 0.1)
    assert conv(X).shape == (2, 6, 5, 5)


def test_parameters_and_copies_of_it_are_ordinary(conv):
    with torch.enable_grad(), torch.inference_mode(False):
        for source in (conv.weight, conv.weight.data, conv.weight.detach()):
            parameter = nn.Parameter(source)
            assert type(parameter) is nn.Parameter and parameter.is_leaf and parameter.requires_grad
            if not parameter.is_inference():
                parameter.square().sum().backward()
                torch.optim.SGD([parameter], 0.1).step()
        assert type(copy.deepcopy(parameter)) is nn.Parameter
    for twin in (copy.deepcopy(conv.weight), pickle.loads(pickle.dumps(conv.weight))):
        assert type(twin) is torch.Tensor and torch.equal(twin, conv.squeeze())


def test_a_leaf_to_differentiate_with_respect_to():
    leaf = make().weight.detach().requires_grad_()
    F.conv2d(X, leaf).sum().backward()
    assert leaf.grad is not None


# --- other people's code ------------------------------------------------------------------------------------------------


def norm():
    bn = nn.BatchNorm2d(6)
    bn(torch.randn(8, 6, 4, 4) * 2 + 1)
    return bn.eval()


def test_fusers_that_build_a_new_convolution():
    """As detectors do at the end of training."""
    conv, bn = make().eval(), norm()
    fused = fuse_conv_and_bn(conv, bn)
    torch.testing.assert_close(fused(X), bn(conv(X)), rtol=1e-4, atol=1e-4)

    arguments = (bn.running_mean, bn.running_var, bn.eps, bn.weight, bn.bias)
    weight, bias = fuse_conv_bn_weights(conv.weight, conv.bias, *arguments)
    assert type(weight) is nn.Parameter
    torch.testing.assert_close(F.conv2d(X, weight, bias, padding=1), bn(conv(X)), rtol=1e-4, atol=1e-4)


def test_fusers_that_write_into_the_block():
    conv, bn = make().eval(), norm()
    with pytest.raises(AttributeError, match=r"orepa\.convert"):
        fuse_conv_bn_eval(conv, bn)
    torch.testing.assert_close(fuse_conv_bn_eval(conv.to_conv2d(), bn)(X), bn(conv(X)), rtol=1e-4, atol=1e-4)


def test_a_counter_and_a_logger():
    model = nn.Sequential(make(), nn.BatchNorm2d(6))
    assert sum(m.weight.numel() for m in model if hasattr(m, "weight")) == 216 + 6
    for module in model:
        assert torch.histc(module.weight.detach().cpu().float()).sum() == module.weight.numel()


# --- blocks without one -----------------------------------------------------------------------------------------------------


def test_an_offline_block_has_one_where_its_bias_is_all_there_is():
    plain = OfflineConv(4, 6, 3, padding=1, topology="ecb")
    torch.testing.assert_close(F.conv2d(X, plain.weight, plain.bias, padding=1), plain(X), rtol=1e-4, atol=1e-4)
    normed = OfflineConv(4, 6, 3)
    assert not hasattr(normed, "weight")
    with pytest.raises(AttributeError, match=r"has norms.*squeeze\(\)"):
        _ = normed.weight
    with pytest.raises(AttributeError, match="no attribute 'height'"):
        _ = normed.height


def test_a_sharded_block_says_so():
    distributed = pytest.importorskip("torch.distributed")
    if not distributed.is_available() or not distributed.is_gloo_available():
        pytest.skip("this torch has no gloo")
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import distribute_module

    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        conv = distribute_module(make(), init_device_mesh("cpu", (1,)))
        with pytest.raises(RuntimeError, match="sharded block"):
            _ = conv.weight
    finally:
        distributed.destroy_process_group()


def test_timm_reparameterizes_around_it():
    timm_utils = pytest.importorskip("timm.utils")
    model = orepa.prepare(nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6))).eval()
    again = timm_utils.reparameterize_model(model)
    torch.testing.assert_close(again(X), model(X))
