"""The OREPA-VGG block: one convolution computes what its three branches do in eval mode, everywhere."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from orepa.modules.repvgg import RepVGGBlock


def randomize(block: RepVGGBlock, seed: int = 0) -> RepVGGBlock:
    """Every parameter and statistic its own value, none of the zeros and ones that would hide a mistake."""
    generator = torch.Generator().manual_seed(seed)

    def draw(tensor):
        return torch.randn(tensor.shape, generator=generator, dtype=torch.float64).to(tensor)

    with torch.no_grad():
        for parameter in block.parameters():
            parameter.copy_(draw(parameter))
        for norm in block.modules():
            if isinstance(norm, nn.BatchNorm2d):
                norm.running_mean.copy_(draw(norm.running_mean))
                norm.running_var.copy_(draw(norm.running_var).abs() + 0.3)
    return block


def make(*args, seed=0, dtype=torch.float64, **options) -> RepVGGBlock:
    return randomize(RepVGGBlock(*args, dtype=dtype, **options), seed)


def relative_error(got, expected):
    got, expected = got.detach().double(), expected.detach().double()
    return float((got - expected).norm() / expected.norm().clamp_min(1e-12))  # a ReLU may leave nothing


def branch_by_branch(block: RepVGGBlock, x):
    """The block's definition: every branch a full-size kernel on the input, padded once."""
    dense = block.dense
    out, per_group, (kh, kw) = dense.out_channels, dense.in_channels // dense.groups, dense.kernel_size
    mode = "constant" if dense.padding_mode == "zeros" else dense.padding_mode
    padded = F.pad(x, dense.borders, mode=mode)

    pointwise = torch.zeros(out, per_group, kh, kw, dtype=x.dtype)
    pointwise[:, :, kh // 2, kw // 2] = block.pointwise.weight.detach()[:, :, 0, 0]
    kernels = [(dense.squeeze(), block.dense_bn), (pointwise, block.pointwise_bn)]
    if block.identity_bn is not None:
        same = torch.zeros_like(pointwise)
        for o in range(out):
            same[o, o % per_group, kh // 2, kw // 2] = 1
        kernels.append((same, block.identity_bn))
    return block.act(
        sum(norm(F.conv2d(padded, k, None, dense.stride, 0, dense.dilation, dense.groups)) for k, norm in kernels)
    )


@st.composite
def blocks(draw):
    groups = draw(st.sampled_from([1, 1, 2, 5]))
    in_channels = groups * draw(st.integers(1, 2))
    out_channels = draw(st.sampled_from([in_channels, groups, 3 * groups]))
    stride = draw(st.sampled_from([1, 1, 2, (2, 1)]))
    paddings = [None, 0, 1, (3, 0), "valid"] + (["same"] if stride == 1 else [])
    return {
        "in_channels": in_channels,
        "out_channels": out_channels,
        "kernel_size": draw(st.sampled_from([3, 5, (1, 3), (5, 3)])),
        "stride": stride,
        "padding": draw(st.sampled_from(paddings)),
        "dilation": draw(st.sampled_from([1, 2, (1, 3)])),
        "groups": groups,
        "padding_mode": draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"])),
        "act": draw(st.sampled_from([None, None, nn.ReLU, nn.PReLU, nn.GELU()])),
        "seed": draw(st.integers(0, 99)),
    }


@settings(max_examples=60, deadline=None)
@given(blocks())
def test_one_convolution_computes_the_three_branches(options):
    block = make(**options)
    generator = torch.Generator().manual_seed(options["seed"])
    x = torch.randn(2, block.dense.in_channels, 13, 14, generator=generator, dtype=torch.float64)

    # In train mode the norms take the statistics of the batch: the forward, squeezed or not, is the block's definition.
    with torch.no_grad():
        expected = branch_by_branch(copy.deepcopy(block), x)
        assert relative_error(copy.deepcopy(block)(x), expected) < 1e-10
        assert relative_error(copy.deepcopy(block).forward_branches(x), expected) < 1e-10

    block.eval()
    with torch.no_grad():
        expected = branch_by_branch(block, x)
        weight, bias = block.squeeze()
        conv = block.to_conv2d()
        assert weight.shape == conv.weight.shape
        assert relative_error(block(x), expected) < 1e-10
        assert relative_error(block.forward_branches(x), expected) < 1e-10
        assert relative_error(block.act(conv(x)), expected) < 1e-10
        assert relative_error(block.deploy()(x), expected) < 1e-10
        assert relative_error(weight, conv.weight) < 1e-12
        assert relative_error(bias, conv.bias) < 1e-12


def test_padding_every_branch_for_itself_would_be_wrong():
    """Negative control: a 1x1 convolution that pads with zeros sees other borders than the kernel it is folded into."""
    block = make(3, 3, padding=2, padding_mode="reflect", act=None).eval()
    x = torch.randn(1, 3, 6, 6, dtype=torch.float64)
    own = F.pad(x, (1, 1, 1, 1))
    naive = block.dense_bn(block.dense(x)) + block.pointwise_bn(block.pointwise(own)) + block.identity_bn(own)
    expected = branch_by_branch(block, x)
    assert relative_error(naive[..., 1:-1, 1:-1], expected[..., 1:-1, 1:-1]) < 1e-12
    assert relative_error(naive, expected) > 1e-3


def test_folding_with_batch_statistics_would_be_wrong():
    block = make(4, 4)
    x = torch.randn(2, 4, 6, 6, dtype=torch.float64)
    folded = block.deploy()(x)
    assert relative_error(copy.deepcopy(block)(x), folded) > 1e-2
    assert relative_error(block.eval()(x), folded) < 1e-12


@pytest.mark.parametrize(
    ("in_channels", "out_channels", "stride", "expected"),
    [(4, 4, 1, True), (4, 8, 1, False), (4, 4, 2, False), (4, 4, (1, 2), False)],
)
def test_the_identity_branch_exists_where_it_fits(in_channels, out_channels, stride, expected):
    assert (RepVGGBlock(in_channels, out_channels, stride=stride).identity_bn is not None) == expected


def test_squeeze_is_differentiable_in_every_parameter():
    block = make(2, 2, expand=1)

    class Squeeze(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = block

        def forward(self):
            return self.block.squeeze()

    names = [name for name, _ in block.named_parameters()]
    values = [p.detach().clone().requires_grad_() for p in block.parameters()]

    def squeeze(*parameters):
        given = {f"block.{name}": p for name, p in zip(names, parameters, strict=True)}
        return torch.func.functional_call(Squeeze(), given, ())

    assert torch.autograd.gradcheck(squeeze, values)


def test_the_default_padding_keeps_the_size():
    for kernel_size, dilation in ((3, 1), (5, 2), ((3, 7), (2, 1))):
        block = RepVGGBlock(2, 2, kernel_size, dilation=dilation)
        assert block(torch.randn(1, 2, 9, 8)).shape == (1, 2, 9, 8)


def test_grouped_and_dilated_blocks_train():
    """The authors' block crashes with groups > 1 and ignores dilation in training."""
    block = RepVGGBlock(6, 6, groups=3, dilation=2, dtype=torch.float64)
    x = torch.zeros(2, 6, 9, 9, dtype=torch.float64)
    x[:, 0, 4, 4] = 1
    reached = block.dense(x)[0].abs().sum(0) > 0
    assert reached[2, 2]  # two steps from the centre
    assert not reached[3, 3]  # between the dilated taps
    assert (block.dense(x)[:, 2:] == 0).all()  # another group
    optimizer = torch.optim.SGD(block.parameters(), lr=0.1)
    data = torch.randn(4, 6, 9, 9, dtype=torch.float64)
    before = [p.detach().clone() for p in block.parameters()]
    block(data).pow(2).mean().backward()
    # The prior waits behind a scale of zero, which itself moves.
    still = {name for name, p in block.named_parameters() if p.grad is None or not p.grad.any()}
    assert still <= {"dense.prior_weight"}
    optimizer.step()
    assert sum(not torch.equal(a, b) for a, b in zip(before, block.parameters(), strict=True)) >= len(before) - 1


def test_deployed_parameters_train_and_the_block_stays():
    """Theirs are detached on conversion, and a second conversion crashes."""
    block = make(4, 4, dtype=torch.float32).eval()
    state = copy.deepcopy(block.state_dict())
    first, second = block.deploy(), block.deploy()
    assert [type(m) for m in first] == [nn.Conv2d, nn.ReLU]
    assert torch.equal(first.conv.weight, second.conv.weight)
    first(torch.randn(2, 4, 6, 6)).sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in first.parameters())
    torch.optim.SGD(first.parameters(), lr=1.0).step()
    assert not torch.equal(first.conv.weight, second.conv.weight)
    assert all(torch.equal(value, state[name]) for name, value in block.state_dict().items())


def test_deploy_copies_a_learnable_activation():
    block = make(4, 4, act=nn.PReLU).eval()
    deployed = block.deploy()
    assert deployed.act is not block.act
    assert torch.equal(deployed.act.weight, block.act.weight)


def test_without_activation_the_deployed_block_is_one_convolution():
    assert type(RepVGGBlock(4, 4, act=None).deploy()) is nn.Conv2d


def test_to_conv2d_keeps_mode_gradients_dtype_and_memory_format():
    block = make(4, 6, dtype=torch.float32)
    assert block.to_conv2d().training
    assert not block.eval().to_conv2d().training
    assert not block.deploy().training
    assert all(p.requires_grad for p in block.to_conv2d().parameters())
    # One trainable parameter anywhere in the block suffices.
    block.requires_grad_(False).dense_bn.weight.requires_grad_(True)
    assert all(p.requires_grad for p in block.to_conv2d().parameters())
    block.dense_bn.weight.requires_grad_(False)
    assert not any(p.requires_grad for p in block.to_conv2d().parameters())
    conv = block.to(memory_format=torch.channels_last).to_conv2d()
    assert conv.weight.is_contiguous(memory_format=torch.channels_last)
    for dtype in (torch.bfloat16, torch.float16):
        conv = block.to(dtype).to_conv2d()
        assert {p.dtype for p in conv.parameters()} == {dtype}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_composed_in_float32_and_rounded_once(dtype):
    block = make(4, 4, dtype=dtype)
    weight, bias = block.squeeze()
    assert weight.dtype == bias.dtype == dtype
    exact_weight, exact_bias = block.double().squeeze()
    for rounded, exact in ((weight, exact_weight), (bias, exact_bias)):
        error = (rounded.double() - exact).abs()
        assert (error <= 0.51 * torch.finfo(dtype).eps * exact.abs() + 1e-5).all()


def test_conversion_rounds_once():
    """Composed in float64, the deployed weight is the float64 block's, rounded."""
    # Without a prior, the one constant that a float32 block holds in float32.
    block = make(4, 4, dtype=torch.float32, topology="acnet")
    conv, exact = block.to_conv2d(), copy.deepcopy(block).double().to_conv2d()
    assert torch.equal(conv.weight, exact.weight.float())
    assert torch.equal(conv.bias, exact.bias.float())


def test_state_dict_round_trip_holds_no_constants():
    block = make(4, 4)
    state = block.state_dict()
    assert not any("filter" in name for name in state)
    assert set(state) == {name for name, _ in block.named_parameters()} | {"dense._extra_state"} | {
        f"{norm}.{name}"
        for norm in ("dense_bn", "pointwise_bn", "identity_bn")
        for name in ("running_mean", "running_var", "num_batches_tracked")
    }
    other = RepVGGBlock(4, 4, dtype=torch.float64)
    other.load_state_dict(state)
    x = torch.randn(2, 4, 6, 6, dtype=torch.float64)
    assert torch.equal(other.eval()(x), block.eval()(x))


def test_deepcopy_and_pickle():
    block = make(4, 4).eval()
    x = torch.randn(2, 4, 6, 6, dtype=torch.float64)
    with torch.no_grad():
        expected = block(x)  # fills the eval cache
        for twin in (copy.deepcopy(block), pickle.loads(pickle.dumps(block))):
            assert torch.equal(twin(x), expected)
    twin = copy.deepcopy(block.train())
    twin(x)
    assert torch.equal(block.dense_bn.num_batches_tracked, torch.tensor(0))


def test_meta_construction():
    block = RepVGGBlock(4, 4, device="meta")
    assert {p.device.type for p in block.parameters()} == {"meta"}
    block.to_empty(device="cpu")
    block.reset_parameters()
    assert torch.isfinite(block.eval()(torch.randn(1, 4, 5, 5))).all()


def test_autocast():
    block = make(4, 4, dtype=torch.float32).eval()
    x = torch.randn(2, 4, 6, 6)
    with torch.autocast("cpu", torch.bfloat16):
        y = block(x)
    assert relative_error(y, block(x)) < 2e-2


def test_a_factory_makes_its_activation_where_the_block_lives():
    block = RepVGGBlock(4, 4, act=nn.PReLU, dtype=torch.float64, device="meta")
    assert (block.act.weight.dtype, block.act.weight.device.type) == (torch.float64, "meta")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kernel_size": 4}, "kernel_size must be odd.*got 4"),
        ({"kernel_size": (3, 2)}, r"kernel_size must be odd.*got \(3, 2\)"),
        ({"groups": 3}, "groups=3 must divide in_channels=4"),
        ({"padding": -1}, "padding must not be negative, got -1"),
        ({"padding": "same", "stride": 2}, "padding='same' needs stride=1"),
        ({"padding_mode": "mirror"}, "padding_mode must be one of"),
        ({"topology": "unknown"}, "topology must be one of"),
        ({"stride": 0}, "stride must be"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        RepVGGBlock(4, 4, **arguments)
