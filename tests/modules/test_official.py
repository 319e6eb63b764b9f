"""Blocks of the authors' code, measured there in float64, and their conversions here."""

import copy
import functools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from orepa import OfflineConv, OREPAConv
from orepa.modules import official_blocks as official
from orepa.modules.official_blocks import block_from_official, read_block, translate
from orepa.modules.repvgg import RepVGGBlock

DATA = Path(__file__).parents[1] / "data"
OREPA = ["orepa_3x3_s2", "orepa_3x3_g2", "orepa_3x3_g6"]
STEMS = ["deep_stem7", "plain_stem7"]
REPVGG = ["repvgg_identity", "repvgg_s2"]
ALL = [*OREPA, *STEMS, *REPVGG, "rep1x1_up", "rep1x1_down"]
MEASURED = [*ALL, "dbb_3x3"]

# Their priors and averages are rounded to float32, 6e-8 at most; the blocks without such a constant agree to float64.
TOLERANCE = dict.fromkeys(ALL, 5e-8) | dict.fromkeys(["plain_stem7", "rep1x1_up", "rep1x1_down"], 1e-14)
TOLERANCE["dbb_3x3"] = 1e-13


class Golden:
    """One block measured from their code."""

    def __init__(self, name: str) -> None:
        with np.load(DATA / f"{name}.npz") as file:
            self.kwargs = json.loads(str(file["kwargs"]))
            tensors = {key: torch.from_numpy(file[key]) for key in file.files if key != "kwargs"}
        self.state_dict = self._under("sd.", tensors)
        self.gradients = self._under("grad.", tensors)
        self.after = self._under("after.", tensors)
        self.x, self.g, self.gx = tensors["x"], tensors["g"], tensors["gx"]
        self.y_train, self.y_eval, self.squeezed = tensors["y_train"], tensors["y_eval"], tensors.get("squeezed")
        self.stride, self.groups = self.kwargs.get("stride", 1), self.kwargs.get("groups", 1)

    @staticmethod
    def _under(prefix, tensors):
        return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}

    def convert(self, **changes):
        options = {"stride": self.stride, "padding": self.kwargs.get("padding", 0), "groups": self.groups}
        return block_from_official(self.state_dict, **{**options, **changes})

    def entries(self):
        return read_block(self.state_dict, stride=self.stride, groups=self.groups).entries


@functools.cache
def _golden(name):
    return Golden(name)


def golden(name: str) -> Golden:
    """A copy that a test may change."""
    return copy.deepcopy(_golden(name))


def relative_error(got, expected):
    got, expected = got.detach().double(), expected.detach().double()
    return float((got - expected).norm() / expected.norm())


def kernel(block):
    """The squeezed kernel before the norm, as theirs stores it."""
    return (block if isinstance(block, OREPAConv) else block.conv).squeeze()


# --- the same function --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MEASURED)
def test_training_step_equals_theirs(name):
    case, tolerance = golden(name), TOLERANCE[name]
    block, entries = case.convert(), case.entries()
    assert block.training
    x = case.x.requires_grad_()
    y = block(x)
    y.backward(case.g)
    assert relative_error(y, case.y_train) < tolerance
    assert relative_error(x.grad, case.gx) < tolerance

    expected = translate(entries, case.gradients)
    parameters = dict(block.named_parameters())
    assert expected.keys() == parameters.keys()
    for ours, gradient in expected.items():
        assert relative_error(parameters[ours].grad, gradient) < tolerance, ours

    expected = translate(entries, case.after)
    statistics = {n: b for n, b in block.state_dict().items() if n.endswith(("running_mean", "running_var"))}
    assert expected.keys() == statistics.keys()
    for ours, value in expected.items():
        assert relative_error(statistics[ours], value) < tolerance, ours


@pytest.mark.parametrize("name", MEASURED)
def test_eval_equals_theirs_squeezed_unsqueezed_and_deployed(name):
    case, tolerance = golden(name), TOLERANCE[name]
    case.state_dict.update(case.after)  # they measured it after the training step
    block = case.convert().eval()
    with torch.no_grad():
        assert relative_error(block(case.x), case.y_eval) < tolerance
        if isinstance(block, RepVGGBlock):
            assert relative_error(block.forward_branches(case.x), case.y_eval) < tolerance
            assert relative_error(block.deploy()(case.x), case.y_eval) < tolerance
        elif isinstance(block, OfflineConv):
            assert relative_error(block.to_conv2d()(case.x), case.y_eval) < tolerance
        else:
            assert relative_error(kernel(block), case.squeezed) < tolerance
            assert relative_error(block.norm(block.conv.forward_branches(case.x)), case.y_eval) < tolerance
            assert relative_error(block.norm(block.conv.to_conv2d()(case.x)), case.y_eval) < tolerance


@pytest.mark.parametrize("name", ALL)
def test_the_maps_are_orthogonal(name):
    """Why gradients may take the same way as weights; the unused row of a vector is no weight."""
    case = golden(name)
    entries = case.entries()
    for key, gradient in case.gradients.items():
        one, other = (torch.randn_like(gradient) for _ in range(2))
        if entries[key].spare_rows:
            one, other = one[:5], other[:5]
        mapped = entries[key].transform(one)
        assert mapped.shape == one.shape
        torch.testing.assert_close((mapped * entries[key].transform(other)).sum(), (one * other).sum())


@pytest.mark.parametrize(
    ("name", "skipped"),
    [
        ("deep_stem7", "_flip"),
        ("deep_stem7", "_mirror_prior"),
        ("plain_stem7", "_flip"),
        ("orepa_3x3_g2", "_group_rows"),
        ("orepa_3x3_g6", "_group_rows"),
    ],
)
def test_without_its_conversion_a_block_differs(name, skipped, monkeypatch):
    """Negative control: every conversion is needed, and the golden files notice its absence."""
    monkeypatch.setattr(official, skipped, lambda tensor, **_: tensor)
    case = golden(name)
    block = case.convert()
    assert relative_error(kernel(block), case.squeezed) > 1e-2
    assert relative_error(block(case.x), case.y_train) > 1e-2


def test_composing_their_stem_as_correlation_is_not_our_stem():
    """Our stem composes as feature maps do; their names mean other kernels, flipped from the second stage on."""
    case = golden("plain_stem7")
    conv = OREPAConv(3, 8, 7, stride=2, padding=3, bias=False, topology="plain_stem", dtype=torch.float64)
    with torch.no_grad():
        for stage in range(3):
            getattr(conv, f"stack_conv{stage + 1}").copy_(case.state_dict[f"weight{stage}"])
    torch.testing.assert_close(conv(case.x), conv.forward_branches(case.x))
    assert relative_error(conv.squeeze(), case.squeezed) > 1e-1


# --- kinds without a golden file ----------------------------------------------------------------------------------------


def norm_state(channels, prefix="bn"):
    norm = nn.BatchNorm2d(channels, dtype=torch.float64)
    return {f"{prefix}.{name}": value for name, value in norm.state_dict().items()}


def correlate(first, second, groups):
    """``K[o,i,p] = sum_m sum_q second[o,m,q] first[m,i,p+q]``, tap by tap: how their stem composes two stages."""
    (out, width, kh, kw), (_, per_group, h, w) = second.shape, first.shape
    result = torch.zeros(out, per_group, h + kh - 1, w + kw - 1, dtype=first.dtype)
    rows = out // groups
    for g in range(groups):
        o, m = slice(g * rows, (g + 1) * rows), slice(g * width, (g + 1) * width)
        for a in range(kh):
            for b in range(kw):
                top, left = kh - 1 - a, kw - 1 - b
                result[o, :, top : top + h, left : left + w] += torch.einsum(
                    "om,mihw->oihw", second[o, :, a, b], first[m]
                )
    return result


def test_the_tap_by_tap_formula_is_theirs():
    case = golden("plain_stem7")
    weights = [case.state_dict[f"weight{stage}"] for stage in range(3)]
    composed = correlate(correlate(weights[0], weights[1], 1), weights[2], 1)
    assert relative_error(composed, case.squeezed) < 1e-14


def test_grouped_plain_stem():
    weights = [torch.randn(4, per_group, 3, 3, dtype=torch.float64) for per_group in (3, 2)]
    state = {f"weight{s}": w for s, w in enumerate(weights)} | norm_state(4)
    block = block_from_official(state, stride=2, padding=2, groups=2)
    assert (block.conv.in_channels, block.conv.kernel_size) == (6, (5, 5))
    assert relative_error(kernel(block), correlate(*weights, 2)) < 1e-14


def test_deep_stem_of_two_stages():
    """A 5x5 stem: the first two stages of the 7x7 one."""
    case = golden("deep_stem7")
    stages = [
        {key.removeprefix(f"weight{s}."): v for key, v in case.state_dict.items() if key.startswith(f"weight{s}.")}
        for s in range(2)
    ]
    kernels = [kernel(block_from_official(stage, stride=1, padding=1)).detach() for stage in stages]
    state = {key: value for key, value in case.state_dict.items() if not key.startswith("weight2.")}
    block = block_from_official(state, stride=2, padding=2)
    assert block.conv.kernel_size == (5, 5)
    assert relative_error(kernel(block), correlate(*kernels, 1)) < 1e-12


def test_rep1x1_of_equal_channels():
    origin, first, second = (torch.randn(5, 5, 1, 1, dtype=torch.float64) for _ in range(3))
    vector = torch.randn(2, 5, dtype=torch.float64)
    state = {"weight_or1x1_origin": origin, "weight_or1x1_l2i_conv1": first, "weight_or1x1_l2i_conv2": second}
    block = block_from_official({**state, "vector": vector, **norm_state(5)}, stride=1, padding=0)
    sequence = second[:, :, 0, 0] @ first[:, :, 0, 0]
    expected = vector[0, :, None] * origin[:, :, 0, 0] + vector[1, :, None] * sequence
    assert relative_error(kernel(block)[:, :, 0, 0], expected) < 1e-14


@pytest.mark.parametrize("name", OREPA)
def test_a_weight_only_block_is_the_convolution_alone(name):
    case = golden(name)
    case.state_dict = {key: value for key, value in case.state_dict.items() if not key.startswith("bn.")}
    block = case.convert()
    assert isinstance(block, OREPAConv)
    assert relative_error(block.squeeze(), case.squeezed) < TOLERANCE[name]


def test_dilation_reaches_the_convolution():
    case = golden("orepa_3x3_s2")
    block = case.convert(dilation=2, padding=2, stride=1)
    with torch.no_grad():
        assert block.conv.dilation == (2, 2)
        assert relative_error(block.conv(case.x), block.conv.forward_branches(case.x)) < 1e-12


# --- what is loaded, and what is not ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_names_and_statistics(name):
    case = golden(name)
    key = "rbr_1x1.bn" if name in REPVGG else "bn"
    case.state_dict[f"{key}.num_batches_tracked"] = torch.tensor(17)
    block = case.convert(eps=1e-3)
    if name in REPVGG:
        assert isinstance(block, RepVGGBlock)
        norm = block.pointwise_bn
    else:
        assert [child for child, _ in block.named_children()] == ["conv", "norm"]
        norm = block.norm
    assert norm.num_batches_tracked == 17
    assert torch.equal(norm.running_var, case.state_dict[f"{key}.running_var"])
    assert {m.eps for m in block.modules() if isinstance(m, nn.BatchNorm2d)} == {1e-3}
    assert all(p.requires_grad for p in block.parameters())
    assert all(t.device.type == "cpu" for t in block.state_dict().values())


@pytest.mark.parametrize("name", ALL)
def test_derived_constants_are_neither_needed_nor_read_nor_stored(name):
    case = golden(name)
    expected = case.convert().state_dict()
    constants = [key for key in case.state_dict if key.endswith(("id_tensor", "_prior", "_avg_avg"))]
    assert not any(value.shape == (case.kwargs["out_channels"], 3, 3) for value in expected.values())
    for key in constants:
        case.state_dict[key].fill_(torch.nan)
    garbled = case.convert().state_dict()
    for key in constants:
        del case.state_dict[key]
    for state in (garbled, case.convert().state_dict()):
        assert state.keys() == expected.keys()
        assert all(torch.equal(value, expected[name]) for name, value in state.items())


def test_the_uninitialised_vector_row_is_dropped():
    case = golden("repvgg_identity")
    expected = case.convert()(case.x)
    assert case.state_dict["rbr_dense.vector"].shape == (6, 8)
    case.state_dict["rbr_dense.vector"][5] = torch.nan
    block = case.convert()
    assert block.dense.scales.shape == (5, 8)
    assert torch.equal(block(case.x), expected)
    # A later version of their code that does not allocate it loads as well.
    case.state_dict["rbr_dense.vector"] = case.state_dict["rbr_dense.vector"][:5]
    assert torch.equal(case.convert()(case.x), expected)


def test_old_checkpoints_do_not_count_batches():
    case = golden("orepa_3x3_s2")
    del case.state_dict["bn.num_batches_tracked"]
    block = case.convert()
    assert block.norm.num_batches_tracked == 0
    assert block.norm.num_batches_tracked.device.type == "cpu"


@pytest.mark.parametrize("name", ["orepa_3x3_g2", "deep_stem7", "repvgg_identity"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtype_is_kept(name, dtype):
    case = golden(name)
    case.state_dict = {k: v.to(dtype) if v.is_floating_point() else v for k, v in case.state_dict.items()}
    block = case.convert()
    assert {p.dtype for p in block.parameters()} == {dtype}
    error = relative_error(block(case.x.to(dtype)), case.y_train)
    assert error < (2e-6 if dtype == torch.float32 else 5e-2)


def test_norms_may_stay_in_float32():
    case = golden("orepa_3x3_s2")
    case.state_dict = {
        k: v.to(torch.float32 if k.startswith("bn.") else torch.float16) if v.is_floating_point() else v
        for k, v in case.state_dict.items()
    }
    block = case.convert()
    assert block.conv.origin_weight.dtype == torch.float16
    assert block.norm.weight.dtype == block.norm.running_mean.dtype == torch.float32


@pytest.mark.parametrize("name", ALL)
def test_the_state_dict_is_copied_and_no_random_number_drawn(name):
    case = golden(name)
    before = copy.deepcopy(case.state_dict)
    state = torch.get_rng_state()
    block = case.convert()
    assert torch.equal(torch.get_rng_state(), state)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.add_(1)
        block(case.x)  # moves the running statistics
    assert all(torch.equal(value, before[key]) for key, value in case.state_dict.items())


@pytest.mark.parametrize("name", ["orepa_3x3_g6", "deep_stem7", "repvgg_s2"])
def test_a_converted_block_is_an_ordinary_module(name):
    case = golden(name)
    block = case.convert()
    twin = copy.deepcopy(block)
    twin.load_state_dict(block.state_dict())
    assert torch.equal(twin(case.x), block(case.x))
    optimizer = torch.optim.SGD(block.parameters(), lr=0.1)
    optimizer.zero_grad()
    block(case.x).square().mean().backward()
    optimizer.step()
    assert not torch.equal(twin(case.x), block(case.x))


# --- defects of their code that ours does not have -------------------------------------------------------------------------


@pytest.mark.parametrize("topology", ["deep_stem", "plain_stem"])
def test_a_grouped_stem_trains_and_composes_like_feature_maps(topology):
    """Theirs crashes in the deep stem, and composes by correlation in both."""
    conv = OREPAConv(4, 6, 7, stride=2, padding=3, groups=2, bias=False, topology=topology, dtype=torch.float64)
    x = torch.randn(2, 4, 9, 8, dtype=torch.float64)
    y = conv(x)
    assert relative_error(y, conv.forward_branches(x)) < 1e-12
    assert relative_error(conv.to_conv2d()(x), y) < 1e-12
    y.sum().backward()
    assert all(p.grad is not None for p in conv.parameters())


def test_grouped_depthwise_rows_are_in_the_order_of_the_outputs():
    """One pointwise row alone reaches its own output channel; theirs lands in another."""
    case = golden("orepa_3x3_g2")
    rows = case.state_dict["weight_orepa_gconv_pw"]
    rows[1:] = 0
    rows[0] = 0
    rows[3] = 1  # theirs: ol=1, gi=1, which is output 1*6 + 1
    block = case.convert()
    assert block.conv.dws_pointwise.abs().sum((1, 2, 3)).nonzero().flatten().tolist() == [7]


@pytest.mark.parametrize("name", ["orepa_3x3_g2", "repvgg_identity"])
def test_deployed_parameters_train_and_deploying_twice_works(name):
    case = golden(name)
    block = case.convert().eval()
    deploy = block.deploy if isinstance(block, RepVGGBlock) else block.conv.to_conv2d
    first, second = deploy(), deploy()
    for one, other in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(one, other)
    first(case.x).sum().backward()
    assert all(p.requires_grad and p.grad is not None for p in first.parameters())


# --- bad input --------------------------------------------------------------------------------------------------------------


def without(*keys):
    def change(state):
        for key in keys:
            del state[key]

    return change


def put(key, value):
    return lambda state: state.update({key: value})


def slim(count):
    """Take ``count`` output channels away from every stage of a deep stem."""

    def change(state):
        out = state["bn.weight"].shape[0] - count
        for key, value in state.items():
            name = key.rpartition(".")[2]
            if key.startswith("bn.") and value.dim():
                state[key] = value[:out]
            elif name == "vector":
                state[key] = value[:, :out]
            elif name in ("weight_orepa_1x1_kxk_idconv1", "weight_orepa_gconv_dw"):
                inner = (3 if key.startswith("weight0") else out) * (8 if name.endswith("dw") else 1)
                state[key] = value[:inner, : min(value.shape[1], out)]
            elif name.startswith("weight_orepa") and value.dim() == 4:
                inner = value.shape[1] if key.startswith("weight0") else out * (8 if name.endswith("pw") else 1)
                state[key] = value[:out, :inner]

    return change


def enlarge(state):
    for key, value in state.items():
        if value.shape[-2:] == (3, 3):
            state[key] = nn.functional.pad(value, (1, 1, 1, 1))


BAD = [
    ("orepa_3x3_s2", without("weight_orepa_1x1"), {}, "no complete orepa block: missing 'weight_orepa_1x1'"),
    ("orepa_3x3_s2", without("weight_orepa_origin"), {}, "no complete orepa block: missing 'weight_orepa_origin'"),
    ("orepa_3x3_s2", without("bn.running_var"), {}, "missing 'bn.running_var'"),
    ("orepa_3x3_s2", put("conv.weight", torch.zeros(1)), {}, "unexpected 'conv.weight'"),
    ("orepa_3x3_s2", put("weight_orepa_9x9", torch.zeros(1)), {}, "unexpected 'weight_orepa_9x9'"),
    ("orepa_3x3_s2", put("weight_orepa_1x1", torch.zeros(10, 5, 1, 1)), {}, r"\[10, 6, 1, 1\], got \[10, 5, 1, 1\]"),
    ("orepa_3x3_s2", put("vector", torch.zeros(5, 10)), {}, r"'vector' must be \[6, 10\], got \[5, 10\]"),
    ("orepa_3x3_s2", put("bn.weight", torch.zeros(12)), {}, r"'bn.weight' must be \[10\], got \[12\]"),
    ("orepa_3x3_s2", put("weight_orepa_gconv_dw", torch.zeros(())), {}, r"\[48, 1, 3, 3\], got \[\]"),
    ("orepa_3x3_s2", put("weight_orepa_origin", torch.zeros(10)), {}, r"must be \[O, I/g, kh, kw\], got \[10\]"),
    ("orepa_3x3_s2", enlarge, {}, "5x5 kernel: their frequency prior is defined for 3x3 only"),
    ("repvgg_identity", enlarge, {}, "5x5 kernel: their frequency prior is defined for 3x3 only"),
    ("orepa_3x3_s2", lambda s: None, {"groups": 2}, "the shapes are those of groups=1, got groups=2"),
    ("orepa_3x3_g2", lambda s: None, {"groups": 1}, "the shapes are those of groups=2, got groups=1"),
    ("orepa_3x3_g6", lambda s: None, {"groups": 4}, "the shapes are those of groups=6, got groups=4"),
    ("plain_stem7", lambda s: None, {"groups": 2}, "the shapes are those of groups=1, got groups=2"),
    ("deep_stem7", lambda s: None, {"groups": 2}, "deep_stem blocks all have groups=1, got groups=2"),
    ("rep1x1_up", lambda s: None, {"groups": 2}, "rep1x1 blocks all have groups=1, got groups=2"),
    ("repvgg_s2", lambda s: None, {"groups": 2}, "repvgg_dense blocks all have groups=1, got groups=2"),
    ("orepa_3x3_s2", lambda s: None, {"groups": 0}, "groups must be a positive integer, got 0"),
    ("deep_stem7", slim(1), {}, "7 output channels: the flipped frequency prior"),
    ("deep_stem7", without("weight1.vector"), {}, "missing 'weight1.vector'"),
    ("plain_stem7", without("weight1"), {}, "missing 'weight1'"),
    ("plain_stem7", without("weight0"), {}, "missing 'weight0'"),
    ("plain_stem7", without("weight1", "weight2"), {}, "missing 'weight1'"),
    ("plain_stem7", put("weight1", torch.zeros(8, 8, 5, 5)), {}, r"\[8, 8, 3, 3\], got \[8, 8, 5, 5\]"),
    ("repvgg_identity", lambda s: None, {"stride": 2}, "no identity.*unexpected 'rbr_identity.weight'"),
    ("repvgg_identity", without("rbr_identity.bias"), {}, "an identity.*missing 'rbr_identity.bias'"),
    ("repvgg_identity", lambda s: None, {"dilation": 2}, "always trains with dilation=1, got dilation=2"),
    ("repvgg_identity", put("se.down.weight", torch.zeros(1)), {}, "unexpected 'se.down.weight'"),
    ("repvgg_s2", put("rbr_dense.vector", torch.zeros(7, 10)), {}, r"\[5, 10\] or \[6, 10\], got \[7, 10\]"),
    ("orepa_3x3_s2", lambda s: None, {"eps": float("nan")}, "eps must be finite and not negative, got nan"),
    ("orepa_3x3_s2", lambda s: None, {"padding": -1}, "padding must not be negative"),
    ("orepa_3x3_s2", lambda s: None, {"stride": 0}, "stride must be"),
    ("orepa_3x3_s2", put("vector", torch.zeros(6, 10)), {}, "'vector' is torch.float32.*is torch.float64"),
    ("orepa_3x3_s2", put("vector", torch.zeros(6, 10, device="meta")), {}, "'vector' is on meta"),
]


@pytest.mark.parametrize(("name", "change", "arguments", "message"), BAD)
def test_bad_input_is_named(name, change, arguments, message):
    case = golden(name)
    change(case.state_dict)
    with pytest.raises(ValueError, match=message):
        case.convert(**arguments)


def test_an_even_width_next_to_the_refused_one_converts():
    """The stem that `slim` makes is a good one but for its odd width."""
    case = golden("deep_stem7")
    slim(2)(case.state_dict)
    assert case.convert().conv.out_channels == 6


@pytest.mark.parametrize(
    ("state_dict", "error", "message"),
    [
        ("checkpoint.pth", TypeError, "state_dict must be a mapping of names to tensors, got str"),
        ({"state_dict": {}}, TypeError, r"state_dict\['state_dict'\] must be a tensor, got dict"),
        ({}, ValueError, "one block of theirs.*got no keys"),
        (
            {"stage1.0.conv1.weight_orepa_origin": torch.zeros(1)},
            ValueError,
            "no prefix, got 'stage1.0.conv1.weight_or",
        ),
        ({"orepa_reparam.weight": torch.zeros(1)}, ValueError, r"deployed already \('orepa_reparam.weight'\)"),
        ({"square_conv.weight": torch.zeros(1)}, ValueError, "one block of theirs"),
    ],
)
def test_something_else_than_a_block(state_dict, error, message):
    with pytest.raises(error, match=message):
        block_from_official(state_dict, stride=1, padding=1)


def test_integer_weights_are_refused():
    case = golden("rep1x1_up")
    case.state_dict["vector"] = case.state_dict["vector"].long()
    with pytest.raises(TypeError, match=r"'vector' must be floating-point, got torch.int64"):
        case.convert()
