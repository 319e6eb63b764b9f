"""The order of a block: a branch on feature maps computes what the squeezed one does, and shapes alone decide."""

import copy
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import geometries, image
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils import parametrize

import orepa
import orepa_kernels
from orepa import OREPAConv
from orepa.modules.branch_order import RATES, Rates, _prefers_branch
from orepa.topology import AvgPool, Branch, Conv, Depthwise, Topology

F64 = torch.float64
ROOT = Path(__file__).resolve().parents[2]
#: the topologies of the catalogue with a sequence of plain convolutions beside other branches
SPLITTABLE = ["dbb", "ecb", "orepa", "rep1x1", "repvgg_dense"]


def make(*args, order="branch", dtype=F64, **kwargs):
    """A block with every parameter away from its initial value."""
    defaults = dict(zip(("in_channels", "out_channels", "kernel_size"), args or (4, 6, 3), strict=True))
    conv = OREPAConv(**{**defaults, "padding": 1, "topology": "dbb", **kwargs}, order=order, dtype=dtype)
    with torch.no_grad():
        for parameter in conv.parameters():
            parameter.normal_(std=0.5)
    return conv


def in_order(conv, order):
    other = copy.deepcopy(conv)
    other.order = order
    return other


def step(conv, x):
    """The output, and the gradients of the input and of every parameter that has one."""
    x = x.detach().clone().requires_grad_()
    y = conv(x)
    y.backward(torch.cos(torch.arange(y.numel(), dtype=y.dtype)).view(y.shape))
    return [y.detach(), x.grad, *(p.grad for p in conv.parameters() if p.grad is not None)]


def assert_same_step(conv, x, tolerance=1e-11):
    assert conv.order == "branch"
    ours, theirs = step(conv, x), step(in_order(conv, "squeeze"), x)
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        assert (a - b).norm() <= tolerance * (b.norm() + 1)


@pytest.fixture
def plans(monkeypatch):
    """Records the plans that are squeezed."""
    squeezed = []
    real = orepa_kernels.squeeze

    def recording(blocks, *args, **kwargs):
        squeezed.extend(blocks)
        return real(blocks, *args, **kwargs)

    monkeypatch.setattr(orepa_kernels, "squeeze", recording)
    return squeezed


# --- the same function ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("topology", SPLITTABLE)
@given(
    geometry=geometries(),
    scaling=st.sampled_from(["vector", "scalar", "none"]),
    extra=st.tuples(*[st.integers(0, 3)] * 2),
)
def test_output_and_gradients_are_those_of_the_squeeze(topology, geometry, scaling, extra):
    if topology == "ecb" and min(geometry["kernel_size"]) < 3:
        geometry["kernel_size"] = (3, 5)
    conv = make(**geometry, topology=topology, scaling=scaling)
    assert_same_step(conv, image(conv, *extra))


def test_every_other_topology_has_no_such_branch():
    for topology in set(orepa.topologies()) - set(SPLITTABLE):
        with pytest.raises(ValueError, match=f"topology '{topology}' has none"):
            make(topology=topology)
        assert make(topology=topology, order="auto")._split is None


CHAINS = {
    "two of several taps": (Conv((3, 1), 5), Conv((1, 3))),
    "one tap last": (Conv(3, 8), Conv(1)),
    "three, one tap outside": (Conv(1, 5), Conv(3, 7), Conv(1)),
    "several taps, then one": (Conv((1, 3), 5), Conv((3, 1), 7), Conv(1)),
    "dilated": (Conv(1, 5), Conv(2, dilation=2)),
    "dilated twice": (Conv((1, 2), 5, dilation=2), Conv((2, 1), dilation=(2, 1))),
    "smaller than the block": (Conv(1, identity=True), Conv((1, 3))),
    "one tap in all": (Conv(1, 8, identity=True), Conv(1)),
}


@pytest.mark.parametrize("chain", CHAINS)
@pytest.mark.parametrize(
    "geometry",
    [
        {"padding": 0},
        {"padding": (0, 2), "stride": (2, 1)},
        {"padding": "same", "dilation": 2},
        {"padding": 2, "padding_mode": "reflect", "dilation": (1, 2)},
        {"padding": 1, "padding_mode": "circular", "stride": 2},
    ],
)
def test_sequences_of_any_kind(chain, geometry):
    def declared(spec):
        return Topology(chain=Branch(*CHAINS[chain]), origin=Branch(Conv(3)))

    conv = make(4, 8, 3, topology=declared, **geometry)
    assert_same_step(conv, torch.randn(2, 4, 8, 7, dtype=F64))


@pytest.mark.parametrize("pixels", [2, 20])  # fewer than the weights of an output channel, and more
def test_scales_act_on_whichever_is_smaller(pixels):
    assert_same_step(make(), torch.randn(1, 4, pixels, pixels, dtype=F64))


@pytest.mark.parametrize(("kernel_size", "padding"), [(4, "same"), ((2, 4), (0, 3))])
def test_even_kernels_and_uneven_borders(kernel_size, padding):
    conv = make(4, 6, kernel_size, topology="repvgg_dense", padding=padding, dilation=(1, 3))
    assert_same_step(conv, torch.randn(2, 4, 12, 13, dtype=F64))


@pytest.mark.parametrize("mode", ["zeros", "reflect", "circular"])
def test_a_single_image(mode):
    conv, x = make(padding_mode=mode), torch.randn(4, 7, 8, dtype=F64)
    assert_same_step(conv, x)
    assert torch.equal(conv(x), conv(x[None])[0])


def test_channels_last_stays():
    x = torch.randn(2, 4, 7, 8, dtype=F64).contiguous(memory_format=torch.channels_last)
    conv = make()
    assert_same_step(conv, x)
    assert conv(x).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("pixels", [2, 20])
def test_autocast(pixels):
    conv, x = make(16, 8, 3, dtype=torch.float32), torch.randn(2, 16, pixels, pixels)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert conv(x).dtype == torch.bfloat16
        assert_same_step(conv, x, tolerance=2e-2)


@pytest.mark.parametrize("frozen", ["conv1x1_kxk_conv1", "conv1x1_kxk_conv2", "scales", "origin_weight", "bias"])
def test_frozen_parameters_get_no_gradient(frozen):
    conv = make()
    getattr(conv, frozen).requires_grad_(False)
    assert_same_step(conv, torch.randn(2, 4, 7, 8, dtype=F64))
    assert getattr(conv, frozen).grad is None


def test_a_computed_weight_is_read_once_a_step():
    class Counts(nn.Module):
        reads = 0

        def forward(self, weight):
            self.reads += 1
            return 2 * weight

    conv, counts = make(), [Counts(), Counts()]
    for name, count in zip(("conv1x1_kxk_conv1", "origin_weight"), counts, strict=True):
        parametrize.register_parametrization(conv, name, count)
        count.reads = 0  # it has been tried
    assert_same_step(conv, torch.randn(2, 4, 7, 8, dtype=F64))
    assert [count.reads for count in counts] == [1, 1]


def test_bitwise_repeatable():
    conv, x = make(16, 16, 3, dtype=torch.float32), torch.randn(4, 16, 9, 9)
    steps = [step(copy.deepcopy(conv), x) for _ in range(2)]
    assert all(map(torch.equal, *steps))


def test_per_sample_gradients():
    conv = make()
    parameters = {name: p.detach() for name, p in conv.named_parameters()}

    def loss(parameters, x, conv):
        return torch.func.functional_call(conv, parameters, (x,)).square().sum()

    def per_sample(conv):
        return torch.func.vmap(torch.func.grad(loss), (None, 0, None))(parameters, xs, conv)

    xs = torch.randn(3, 4, 5, 6, dtype=F64)
    ours, theirs = per_sample(conv), per_sample(in_order(conv, "squeeze"))
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name])


# --- where it applies -----------------------------------------------------------------------------------------------------


def test_which_branch():
    def several(spec):
        return Topology(
            small=Branch(Conv(1, 2), Conv(3)),
            large=Branch(Conv(1, 16), Conv(3)),
            separable=Branch(Depthwise(3, 64), Conv(1)),
            average=Branch(Conv(1), AvgPool(3)),
        )

    conv = make(topology=several)
    assert conv._split.name == "large"
    assert conv._split.rest.operands == tuple(o for o in conv.plan.operands if "large" not in o.name)


def test_training_squeezes_the_other_branches_and_eval_caches_the_whole_kernel(plans):
    conv, x = make(), torch.randn(2, 4, 7, 8, dtype=F64)
    y = conv(x)
    with torch.no_grad():
        assert torch.equal(conv(x), y)  # as a checkpoint runs it
    assert plans == [conv._split.rest] * 2
    plans.clear()
    conv.eval()
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(conv(x), y)
    assert plans == [conv.plan]
    plans.clear()
    conv.train().requires_grad_(False)
    conv(x), conv(x)
    assert plans == [conv.plan]


def test_the_weight_and_the_conversion_are_those_of_the_whole_block():
    model = nn.Sequential(make(), nn.BatchNorm2d(6, dtype=F64)).train()
    x = torch.randn(2, 4, 7, 8, dtype=F64)
    model(x)
    model.eval()
    torch.testing.assert_close(orepa.convert(model)(x), model(x))
    torch.testing.assert_close(nn.functional.conv2d(x, model[0].weight, model[0].bias, padding=1), model[0](x))


def test_the_option_is_no_state():
    conv = make()
    assert conv.state_dict().keys() == in_order(conv, "squeeze").state_dict().keys()
    in_order(conv, "auto").load_state_dict(conv.state_dict())
    x = torch.randn(1, 4, 5, 5, dtype=F64)
    for other in (copy.deepcopy(conv), pickle.loads(pickle.dumps(conv))):
        assert other.order == "branch"
        assert torch.equal(other(x), conv(x))


def test_the_option_is_checked_and_shown():
    with pytest.raises(ValueError, match="order must be one of auto, squeeze, branch, got 'fast'"):
        make(order="fast")
    conv = make(order="auto")
    with pytest.raises(ValueError, match="order must be one of"):
        conv.order = "fast"
    assert (conv.order, "order" in repr(conv)) == ("auto", False)
    assert ", order=branch" in repr(make())
    assert ", order=squeeze" in repr(make(order="squeeze"))


# --- the cheaper order ----------------------------------------------------------------------------------------------------


def choice(conv, *shape, uses=1, device="cpu", half=False):
    """What auto does with the branch for an input of a shape, without running it."""
    return _prefers_branch(conv._split, shape, conv.stride, conv.dilation, conv.borders, half, device, uses)


@pytest.mark.parametrize(("channels", "size", "branch"), [(512, 2, True), (64, 16, False)])
def test_auto_runs_the_branch_where_it_is_cheaper(plans, channels, size, branch):
    conv = make(channels, channels, 3, order="auto", dtype=torch.float32)
    x = torch.randn(2, channels, size, size)
    y = conv(x)
    assert plans == [conv._split.rest if branch else conv.plan]
    assert choice(conv, *x.shape) == branch
    assert torch.equal(y, in_order(conv, "branch" if branch else "squeeze")(x))


@given(
    topology=st.sampled_from(SPLITTABLE),
    channels=st.tuples(*[st.sampled_from([8, 64, 256, 1024])] * 2),
    size=st.integers(3, 64),
    stride=st.integers(1, 2),
    device=st.sampled_from(["cpu", "cuda"]),
    half=st.booleans(),
    more=st.tuples(*[st.integers(0, 64)] * 3),
    uses=st.integers(1, 4),
)
def test_more_pixels_and_more_uses_never_turn_it_to_the_branch(
    topology, channels, size, stride, device, half, more, uses
):
    kernel = 1 if topology == "rep1x1" else 3
    conv = OREPAConv(*channels, kernel, stride, kernel // 2, topology=topology, device="meta")
    here = choice(conv, 1, channels[0], size, size, device=device, half=half)
    there = choice(conv, 1 + more[0], channels[0], size + more[1], size + more[2], uses=uses, device=device, half=half)
    assert here or not there


def test_the_rates_are_those_that_were_fitted():
    results = json.loads((ROOT / "benchmarks" / "results" / "cpu" / "branch_order.json").read_text())
    assert Rates(**results["settings"]["rates"]) == RATES["cpu", False]
    chosen = {}
    for row in results["rows"]:
        if row["provider"] == "auto":
            case = row["case"]
            conv = OREPAConv(
                case["in"],
                case["out"],
                case["k"],
                case["stride"],
                case["k"] // 2,
                topology=case["topology"],
                device="meta",
            )
            branch = choice(conv, case["batch"], case["in"], case["size"], case["size"])
            chosen[row["facts"]["chosen"], "branch" if branch else "squeeze"] = case
    assert chosen.keys() == {("branch", "branch"), ("squeeze", "squeeze")}


def test_another_process_answers_alike():
    """What a ResNet-18 asks at 8x64 px, with other threads and another seed of hashes."""
    code = """
import torch
from orepa import OREPAConv

def answers():
    for channels in (64, 128, 256, 512):
        conv = OREPAConv(channels, channels, 3, padding=1, topology="dbb")
        yield conv._tensors_to_split(torch.randn(8, channels, 1024 // channels, 1024 // channels)) is not None
"""
    here: dict = {}
    exec(code, here)
    command = [sys.executable, "-c", f"{code}\nprint(list(answers()))"]
    env = {**os.environ, "OMP_NUM_THREADS": "2", "PYTHONHASHSEED": "1"}
    there = subprocess.run(command, capture_output=True, text=True, check=True, env=env).stdout
    assert list(here["answers"]()) == [False, False, False, True]
    assert there == "[False, False, False, True]\n"


def small(order):
    """A block and an input for which auto takes the branch."""
    return make(256, 256, 3, order=order), torch.randn(1, 256, 2, 2, dtype=F64)


def test_compiled_and_traced_auto_squeezes(plans):
    conv, x = small("auto")
    conv(x)
    assert plans == [conv._split.rest]
    plans.clear()
    torch.compile(conv, fullgraph=True, backend="eager")(x)
    torch.jit.trace(conv, x, check_trace=False)
    assert set(plans) == {conv.plan}


def test_the_branch_compiles():
    conv, x = small("branch")
    compiled = torch.compile(conv, fullgraph=True, backend="aot_eager", dynamic=True)
    torch.testing.assert_close(compiled(x), conv(x))
    other = torch.randn(3, 256, 9, 7, dtype=F64)
    torch.testing.assert_close(compiled(other), conv(other))
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert conv(torch.empty(2, 256, 3, 3, dtype=F64)).shape == (2, 256, 3, 3)


def test_symbolic_sizes_squeeze():
    conv, x = small("auto")
    parameters = {name: parameter.detach() for name, parameter in conv.named_parameters()}

    def run(parameters, x):
        return torch.func.functional_call(conv, parameters, (x,))

    graph = make_fx(run, tracing_mode="symbolic")(parameters, x)
    torch.testing.assert_close(graph(parameters, x), conv(x))


def test_prepare_passes_it_on():
    model = nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))
    prepared = orepa.prepare(model, {"0": {"order": "branch"}, "2": "dbb"}, order="squeeze")
    assert [prepared[0].order, prepared[2].order] == ["branch", "squeeze"]
    with pytest.raises(ValueError, match="order must be one of auto, squeeze, branch, got 'fast'"):
        orepa.prepare(model, order="fast")
