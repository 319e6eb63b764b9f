"""The Triton kernels in Triton's interpreter, on CPU tensors. Not collected by itself: ``test_triton.py`` runs it in a child
process, because Triton decides at its import whether to interpret. To run it alone::

    TRITON_INTERPRET=1 pytest tests/kernels/triton_interpreter/cases.py
"""

import math
from dataclasses import replace

import pytest
import torch
from fast_interpreter import speed_up
from tensor_cores import emulate_rounding
from torch.autograd import grad

import orepa
from orepa import OREPAConv
from orepa_kernels import (
    IMPULSE,
    Average,
    Block,
    Composed,
    Dense,
    Operand,
    PointwiseFilter,
    Separable,
    dispatch,
    squeeze,
)
from orepa_kernels.backends.base import Signature
from orepa_kernels.backends.triton import autotune as tuning
from orepa_kernels.backends.triton import configs, device, spec
from orepa_kernels.backends.triton import launcher as launch

speed_up()
emulate_rounding()

F32, F64 = torch.float32, torch.float64
LIMIT = 5e-6


def operand(name, *shape):
    return Operand(name, shape)


def relative(got, exact):
    return ((got.double() - exact.double()).norm() / exact.double().norm().clamp_min(1e-30)).item()


def tensors_of(block):
    return [torch.randn(x.shape) for x in block.operands]


def reference(block, tensors, upstream):
    """Kernel and gradients in float64."""
    wide = [t.detach().double().requires_grad_() for t in tensors]
    (kernel,) = squeeze([block], [wide], backend="reference")
    return kernel.detach(), grad(kernel, wide, upstream.double(), allow_unused=True)


def check(block, tensors, upstream_dtype=F32, limit=LIMIT, **options):
    """Kernel and every gradient against float64, and the gradients' strides."""
    leaves = [t.detach().requires_grad_() for t in tensors]
    (kernel,) = squeeze([block], [leaves], backend="triton", **options)
    upstream = torch.randn(block.shape).to(kernel.dtype).to(upstream_dtype if kernel.dtype == F32 else kernel.dtype)
    exact, gradients = reference(block, tensors, upstream)
    rounding = 0 if kernel.dtype == F32 else torch.finfo(kernel.dtype).eps
    assert relative(kernel, exact) <= limit + rounding
    got = grad(kernel, leaves, upstream.to(kernel.dtype))
    for name, tensor, mine, true in zip(block.operands, tensors, got, gradients, strict=True):
        rounding = 0 if mine.dtype == F32 else torch.finfo(mine.dtype).eps
        assert relative(mine, true) <= limit + rounding, name
        assert mine.dtype == tensor.dtype and mine.stride() == torch.empty_like(tensor).stride(), name
    return kernel.detach()


def every_term(groups=1, o=5, i=3, t=6, scaling="vector"):
    """A 3x3 block with every kind of term, several of each that multiplies, on odd sizes."""
    out, inputs, internal = o * groups, i * groups, t * groups
    stage = Block(internal, inputs, (1, 3), (Dense(operand("stage", internal, i, 1, 3)),), groups)
    terms = [
        Dense(operand("origin", out, i, 3, 3), 0),
        Dense(operand("narrow", out, i, 1, 3), 1),
        PointwiseFilter(operand("avg", out, i, 1, 1), Average((3, 3)), 2),
        PointwiseFilter(operand("prior", out, i, 1, 1), operand("filter", out, 3, 3), 3),
        PointwiseFilter(operand("sobel", out, i, 1, 1), operand("shared", 1, 3, 1), 4),
        PointwiseFilter(operand("one", out, i, 1, 1), IMPULSE, 5),
        Composed(operand("c1", internal, i, 1, 1), operand("c2", out, t, 3, 3), True, 6),
        Composed(stage, operand("c3", out, t, 3, 1), False, None),
        Composed(operand("d1", internal, i, 3, 3), operand("d2", out, t, 1, 1), False, 7),
        Separable(operand("dw", 3 * inputs, 1, 3, 3), operand("pw", out, 3 * i, 1, 1), 8),
        Separable(operand("dw2", 2 * inputs, 1, 1, 3), operand("pw2", out, 2 * i, 1, 1), 9),
    ]
    scales = operand("scales", 10, 1 if scaling == "scalar" else out)
    return Block(out, inputs, (3, 3), tuple(terms), groups, scales)


def one_of_each(groups=1, o=5, i=3, t=6):
    """A 3x3 block with one term of each kind, less work for the interpreter."""
    terms = (
        Dense(operand("origin", groups * o, i, 3, 3), 0),
        PointwiseFilter(operand("prior", groups * o, i, 1, 1), operand("filter", groups * o, 3, 3), 1),
        Composed(operand("c1", groups * t, i, 1, 1), operand("c2", groups * o, t, 3, 3), True, 2),
        Separable(operand("dw", 2 * groups * i, 1, 3, 3), operand("pw", groups * o, 2 * i, 1, 1), 3),
    )
    return Block(groups * o, groups * i, (3, 3), terms, groups, operand("scales", 4, groups * o))


# --- every term -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("scaling", ["vector", "scalar"])
def test_every_term(groups, scaling):
    block = every_term(groups, scaling=scaling)
    check(block, tensors_of(block))


def test_several_tiles_each_way():
    block = one_of_each(1, o=18, i=35, t=70)
    check(block, tensors_of(block))


@pytest.mark.slow
@pytest.mark.parametrize(("arch", "precision"), [(80, "rounded"), (90, "rounded"), (90, "tf32x3")])
def test_large_tiles(arch, precision, monkeypatch):
    monkeypatch.setattr(configs, "_FILLED", 0)
    choices = configs.forward_choices, configs.backward_choices
    monkeypatch.setattr(configs, "forward_choices", lambda own, *_: choices[0](own, arch, precision))
    monkeypatch.setattr(configs, "backward_choices", lambda own, *_: choices[1](own, arch, precision))
    monkeypatch.setattr(dispatch.calls, "_calls", {})
    block = one_of_each(1, o=67, i=33, t=66)
    check(block, tensors_of(block))


@pytest.mark.parametrize("fastest", ["first", "last"])
def test_tuned_launches_write_what_others_do(fastest, launches, monkeypatch, tmp_path):
    """Every candidate runs on the tensors of the call, and then the one that was chosen."""
    choices = {}

    def several(tile):
        choices[type(tile)] = (replace(tile, num_stages=1), replace(tile, num_stages=2), tile)
        return choices[type(tile)]

    def measure(run):
        run()
        times.append(len(times) if fastest == "first" else -len(times))
        return times[-1]

    times, taken = [], []
    arguments = launch.kernel_arguments
    monkeypatch.setattr(
        launch, "kernel_arguments", lambda config, *rest: (taken.append(config), arguments(config, *rest))[1]
    )
    monkeypatch.setattr(configs, "forward_choices", lambda *_: several(configs.FORWARD_SMALL))
    monkeypatch.setattr(configs, "backward_choices", lambda *_: several(configs.BACKWARD_SMALL))
    monkeypatch.setattr(dispatch.calls, "_calls", {})
    monkeypatch.setattr(tuning, "can_time", lambda _: True)
    monkeypatch.setattr(tuning, "device_name", lambda _: f"the interpreter, {fastest} first")
    monkeypatch.setattr(tuning, "measure", measure)
    monkeypatch.setenv("OREPA_AUTOTUNE_CACHE", str(tmp_path))
    block = one_of_each()
    tensors = tensors_of(block)
    before = run_list([block], [tensors])
    assert not times and not list(tmp_path.iterdir())
    monkeypatch.setenv("OREPA_AUTOTUNE", "1")
    launches.clear()
    taken.clear()
    monkeypatch.setattr(dispatch.calls, "_calls", {})
    after = run_list([block], [tensors])
    assert launches == ["squeeze_forward"] * 4 + ["squeeze_backward", "add_parts"] * 4
    assert [taken[3], taken[7]] == [own[0 if fastest == "first" else -1] for own in choices.values()]
    assert all(torch.equal(a, b) for a, b in zip((*before[0], *before[1]), (*after[0], *after[1]), strict=True))


def identities(groups):
    """Terms without a pointwise factor, whose filters are learnt too, and an identity that is stacked."""
    inputs, out = 3 * groups, 6 * groups
    terms = (
        PointwiseFilter(None, IMPULSE, 0),
        PointwiseFilter(None, operand("rows", out, 3, 3), 1),
        PointwiseFilter(None, operand("shared", 1, 3, 3), 2),
        Separable(operand("dw", 2 * inputs, 1, 3, 3), None, 3),
    )
    return Block(out, inputs, (3, 3), terms, groups, operand("scales", 4, out))


@pytest.mark.parametrize("groups", [1, 3])
def test_identities_and_lone_filters(groups):
    block = identities(groups)
    check(block, tensors_of(block))


@pytest.mark.parametrize(
    ("first", "second", "size"),
    [
        ((3, 3), (3, 3), (5, 5)),
        ((3, 3), (3, 3), (7, 5)),
        ((1, 3), (3, 1), (3, 3)),
        ((2, 3), (4, 2), (5, 4)),
        ((5, 5), (3, 3), (7, 7)),
        ((1, 1), (1, 1), (1, 1)),
        ((1, 1), (1, 1), (3, 3)),
        ((1, 1), (2, 2), (2, 2)),
        ((1, 1), (1, 5), (1, 5)),
        ((4, 2), (1, 1), (4, 2)),
    ],
)
def test_sequences_of_any_sizes(first, second, size):
    groups, (o, t, i) = 2, (5, 7, 3)
    term = Composed(operand("a", groups * t, i, *first), operand("b", groups * o, t, *second), False, 0)
    block = Block(groups * o, groups * i, size, (term,), groups, operand("s", 1, groups * o))
    check(block, tensors_of(block))


@pytest.mark.parametrize("size", [(1, 5), (5, 1), (2, 4), (7, 7)])
def test_rectangular_and_even_kernels(size):
    o, i = 6, 4
    small = tuple(n - 2 if n > 2 else n for n in size)
    terms = (
        Dense(operand("w", o, i, *size), 0),
        Dense(operand("small", o, i, *small)),
        PointwiseFilter(operand("p", o, i, 1, 1), Average(size), 1),
        PointwiseFilter(operand("q", o, i, 1, 1), operand("f", o, *small), 2),
        Composed(operand("c1", 2 * i, i, 1, 1), operand("c2", o, 2 * i, *size), True, 3),
        Separable(operand("dw", 2 * i, 1, *size), operand("pw", o, 2 * i, 1, 1), 4),
    )
    block = Block(o, i, size, terms, 1, operand("s", 5, o))
    check(block, tensors_of(block))


@pytest.mark.parametrize(  # groups are a matter of terms, of which orepa has all kinds
    ("topology", "groups"), [*((name, 1) for name in orepa.topologies()), ("orepa", 2), ("deep_stem", 2)]
)
def test_topologies(topology, groups):
    size = 1 if topology == "rep1x1" else 5 if topology.endswith("stem") or topology == "expandnet_ck" else 3
    conv = OREPAConv(3 * groups, 5 * groups, size, groups=groups, topology=topology, bias=False, backend="triton")
    exact = OREPAConv(3 * groups, 5 * groups, size, groups=groups, topology=topology, bias=False, backend="reference")
    with torch.no_grad():
        for parameter in conv.parameters():
            parameter.normal_()
    exact.load_state_dict(conv.state_dict())
    exact.double()
    upstream = torch.randn(conv.plan.shape)
    kernel, truth = conv.squeeze(), exact.squeeze()
    assert relative(kernel, truth) <= LIMIT
    kernel.backward(upstream)
    truth.backward(upstream.double())
    for (name, mine), true in zip(conv.named_parameters(), exact.parameters(), strict=True):
        assert relative(mine.grad, true.grad) <= LIMIT, name


# --- memory -----------------------------------------------------------------------------------------------------------------


def channels_last(tensor):
    return tensor.to(memory_format=torch.channels_last) if tensor.dim() == 4 else tensor


def strided(tensor):
    return torch.stack([tensor, torch.full_like(tensor, math.nan)], -1)[..., 0]


def transposed(tensor):
    return tensor.transpose(0, 1).contiguous().transpose(0, 1)


def misaligned(tensor):
    return torch.cat([tensor.new_full((1,), math.nan), tensor.flatten()])[1:].view(tensor.shape)


@pytest.mark.parametrize(
    ("layout", "memory_format"),
    [
        (channels_last, torch.channels_last),
        (strided, torch.contiguous_format),
        (transposed, torch.contiguous_format),
        (misaligned, torch.channels_last),
    ],
)
def test_strides(layout, memory_format):
    block = one_of_each()
    kernel = check(block, [layout(t) for t in tensors_of(block)], memory_format=memory_format)
    assert kernel.is_contiguous(memory_format=memory_format)


def test_upstream_of_any_strides():
    block = one_of_each()
    tensors = tensors_of(block)
    leaves = [t.clone().requires_grad_() for t in tensors]
    for layout in (channels_last, strided, transposed, lambda t: t[:1].expand_as(t)):
        upstream = layout(torch.randn(block.shape))
        _, gradients = reference(block, tensors, upstream)
        (kernel,) = squeeze([block], [leaves], backend="triton")
        for mine, true in zip(grad(kernel, leaves, upstream), gradients, strict=True):
            assert relative(mine, true) <= LIMIT


def test_offsets_of_64_bits_give_the_same(monkeypatch):
    block = one_of_each()
    tensors = tensors_of(block)
    narrow = check(block, tensors)
    monkeypatch.setattr(spec, "_INT32", 0)
    monkeypatch.setattr(dispatch.calls, "_calls", {})
    assert torch.equal(check(block, tensors), narrow)


# --- dtypes -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_one_rounding_of_the_float32_result(dtype):
    block = one_of_each()
    tensors = [t.to(dtype) if t.dim() != 3 else t for t in tensors_of(block)]  # filters may stay wide
    with torch.no_grad():
        (wide,) = squeeze([block], [[t.float() for t in tensors]], backend="triton")
        (narrow,) = squeeze([block], [tensors], backend="triton")
        (emitted,) = squeeze([block], [[t.float() for t in tensors]], dtype=dtype, backend="triton")
    assert torch.equal(narrow, wide.to(dtype)) and torch.equal(emitted, wide.to(dtype))
    check(block, tensors)
    check(block, [t.float() for t in tensors], dtype=dtype)


@pytest.fixture
def tensor_cores(monkeypatch):
    """Products are those of a GPU of NVIDIA; its precision can be set, instead of chosen."""

    def use(precision=None):
        gpu = device.Device("cuda", 90)
        if precision:
            object.__setattr__(gpu, "precision", lambda half: precision)
        monkeypatch.setattr(launch, "device_of", lambda _: gpu)
        monkeypatch.setattr(dispatch.calls, "_calls", {})

    use()
    return use


def composition(identity=False):
    """Only products: what they lose is the whole error."""
    o, i, t = 16, 32, 64
    term = Composed(operand("c1", t, i, 1, 1), operand("c2", o, t, 3, 3), identity, 0)
    return Block(o, i, (3, 3), (term,), 1, operand("scales", 1, o))


def errors_of_halves(dtype):
    """The kernel's error in units of one rounding, and the largest relative error of a gradient, from the same ``dW``."""
    block = composition()
    leaves = [t.requires_grad_() for t in tensors_of(block)]
    upstream = torch.randn(block.shape).to(dtype)
    exact, gradients = reference(block, leaves, upstream)
    (kernel,) = squeeze([block], [leaves], dtype=dtype, backend="triton")
    unit = relative(exact.to(dtype), exact)
    return relative(kernel, exact) / unit, max(map(relative, grad(kernel, leaves, upstream), gradients))


@pytest.mark.parametrize("setting", ["highest", "high"])
@pytest.mark.parametrize(("dtype", "units"), [(torch.bfloat16, 1.25), (torch.float16, 2)])
def test_halves_take_one_product_of_rounded_factors(dtype, units, setting, tensor_cores, monkeypatch):
    monkeypatch.setattr(device, "float32_precision", lambda: setting)
    torch.manual_seed(1)
    kernel, gradient = errors_of_halves(dtype)
    assert kernel <= units and gradient <= 2**-10
    torch.manual_seed(1)
    tensor_cores("tf32x3")
    exact_kernel, exact_gradient = errors_of_halves(dtype)
    assert exact_kernel < kernel and exact_gradient < gradient / 100  # this was one product
    torch.manual_seed(1)
    tensor_cores("tf32")
    truncated_kernel, truncated_gradient = errors_of_halves(dtype)
    assert truncated_gradient > 1.5 * gradient and (dtype == torch.bfloat16 or truncated_kernel > units)


@pytest.mark.parametrize(("setting", "least", "most"), [("highest", 0, 1.5e-6), ("high", 1e-5, 2**-11)])
def test_float32_takes_what_the_setting_says(setting, least, most, tensor_cores, monkeypatch):
    monkeypatch.setattr(device, "float32_precision", lambda: setting)
    block = composition()
    leaves = [t.requires_grad_() for t in tensors_of(block)]
    upstream = torch.randn(block.shape)
    exact, gradients = reference(block, leaves, upstream)
    (kernel,) = squeeze([block], [leaves], backend="triton")
    for mine, true in zip((kernel, *grad(kernel, leaves, upstream)), (exact, *gradients), strict=True):
        assert least < relative(mine, true) <= most


def test_rounded_factors_keep_the_identity_and_what_is_not_finite(tensor_cores):
    block = composition(identity=True)
    block = replace(block, in_channels=64, terms=(replace(block.terms[0], first=operand("c1", 64, 64, 1, 1)),))
    w1, w2, scales = tensors_of(block)
    (kernel,) = squeeze([block], [[torch.zeros_like(w1), w2, scales]], dtype=torch.float16, backend="triton")
    assert torch.equal(kernel, (w2 * scales.view(-1, 1, 1, 1)).half())
    not_a_number = torch.tensor([2**31 - 1, -1], dtype=torch.int32).view(F32)  # all bits set, as GPUs write it
    w1[0, 0], w1[1, 1], w1[2, 2] = not_a_number[0], not_a_number[1], math.inf
    (kernel,) = squeeze([block], [[w1, w2.abs() + 1, scales.abs()]], dtype=torch.float16, backend="triton")
    assert kernel[:, :2].isnan().all() and (kernel[:, 2] == math.inf).all() and kernel[:, 3:].isfinite().all()


# --- many blocks ------------------------------------------------------------------------------------------------------------


def run_list(blocks, tensors):
    leaves = [[t.clone().requires_grad_() for t in own] for own in tensors]
    kernels = squeeze(blocks, leaves, backend="triton")
    upstream = [torch.randn(b.shape, generator=torch.Generator().manual_seed(n)) for n, b in enumerate(blocks)]
    return kernels, grad(kernels, [t for own in leaves for t in own], upstream), upstream


@pytest.fixture
def launches(monkeypatch):
    """The names of the kernels launched, but for the one that fills tables of addresses."""
    names = []
    call = launch.CompiledKernel.__call__

    def counted(self, *arguments):
        if self._function.__name__ != "write_words":
            names.append(self._function.__name__)
        call(self, *arguments)

    monkeypatch.setattr(launch.CompiledKernel, "__call__", counted)
    return names


def test_blocks_of_one_structure_share_launches(launches):
    sizes = [(5, 3), (9, 7), (17, 3)]
    plans = [OREPAConv(i, o, 3, topology="orepa", bias=False).plan for o, i in sizes]
    tensors = [tensors_of(plan) for plan in plans]
    kernels, gradients, upstream = run_list(plans, tensors)
    assert launches == ["squeeze_forward", "squeeze_backward", "add_parts"]
    exact = [reference(b, t, u) for b, t, u in zip(plans, tensors, upstream, strict=True)]
    for kernel, (true, _) in zip(kernels, exact, strict=True):
        assert relative(kernel, true) <= LIMIT
    for mine, true in zip(gradients, [g for _, own in exact for g in own], strict=True):
        assert relative(mine, true) <= LIMIT


def test_blocks_of_different_structures(launches):
    blocks = [one_of_each(1), one_of_each(2), identities(1), one_of_each(1)]
    tensors = [tensors_of(block) for block in blocks]
    kernels, gradients, upstream = run_list(blocks, tensors)
    exact = [reference(b, t, u) for b, t, u in zip(blocks, tensors, upstream, strict=True)]
    for kernel, (true, _) in zip(kernels, exact, strict=True):
        assert relative(kernel, true) <= LIMIT
    for mine, true in zip(gradients, [g for _, own in exact for g in own], strict=True):
        assert relative(mine, true) <= LIMIT
    assert torch.equal(run_list(blocks, tensors)[0][2], kernels[2])


def test_the_deep_stem_takes_three_launches_each_way(launches):
    conv = OREPAConv(2, 2, 7, topology="deep_stem", bias=False, backend="triton")
    conv.squeeze().sum().backward()
    assert launches[:3] == ["squeeze_forward"] * 3  # three blocks at once; 5x5; 7x7
    assert launches[5:] == ["squeeze_backward", "add_parts"] * 3  # after the 5x5 is computed again, and its blocks
    assert launches[3:5] == ["squeeze_forward"] * 2


# --- autograd ---------------------------------------------------------------------------------------------------------------


def test_only_the_gradients_asked_for(launches):
    block = one_of_each()
    tensors = tensors_of(block)
    upstream = torch.randn(block.shape)
    _, gradients = reference(block, tensors, upstream)
    for index in range(len(tensors)):
        leaves = [t.clone().requires_grad_(n == index) for n, t in enumerate(tensors)]
        (kernel,) = squeeze([block], [leaves], backend="triton")
        (mine,) = grad(kernel, [leaves[index]], upstream)
        assert relative(mine, gradients[index]) <= LIMIT, block.operands[index]


def test_bitwise_repeatable_and_the_comparison_can_fail():
    block = one_of_each(2)
    tensors = tensors_of(block)
    runs = [run_list([block], [tensors]) for _ in range(2)]
    assert torch.equal(runs[0][0][0], runs[1][0][0])
    assert all(torch.equal(a, b) for a, b in zip(runs[0][1], runs[1][1], strict=True))
    tensors[0] = tensors[0] * (1 + 2**-22)
    changed = run_list([block], [tensors])
    assert not torch.equal(runs[0][0][0], changed[0][0])
    assert not all(torch.equal(a, b) for a, b in zip(runs[0][1], changed[1], strict=True))


@pytest.mark.parametrize("layout", [lambda t: t, misaligned, strided])
def test_calls_made_again_give_the_bits_of_the_first(layout):
    block = one_of_each()
    operands, upstream = [layout(t) for t in tensors_of(block)], torch.randn(block.shape)
    needed = [index != 3 for index in range(len(operands))]
    signature = Signature.of(operands, F32, torch.contiguous_format)
    first = launch.PreparedLaunches([block], signature)
    (kernel,), gradients = first.forward(operands), first.backward(operands, [upstream], needed)
    prepared = launch.PreparedLaunches([block], signature)
    for _ in range(2):
        assert torch.equal(prepared.forward(operands)[0], kernel)
        for again, first in zip(prepared.backward(operands, [upstream], needed), gradients, strict=True):
            assert (again is None) == (first is None)
            assert again is None or (torch.equal(again, first) and again.stride() == first.stride())
    other = [t + 1 for t in operands]
    assert not torch.equal(prepared.forward(other)[0], kernel)


def test_a_block_larger_than_a_term_keeps_out_what_is_not_its_own():
    """An infinite factor of a small branch reaches its own taps only."""
    terms = (Dense(operand("w", 4, 4, 3, 3)), PointwiseFilter(operand("p", 4, 4, 1, 1), IMPULSE))
    block = Block(4, 4, (3, 3), terms)
    w, p = torch.randn(4, 4, 3, 3), torch.full((4, 4, 1, 1), math.inf)
    (kernel,) = squeeze([block], [[w, p]], backend="triton")
    finite = torch.isfinite(kernel)
    assert finite.sum() == 4 * 4 * 8 and not finite[:, :, 1, 1].any()


def test_operators_under_opcheck_and_compile():
    terms = (Dense(operand("w", 3, 2, 3, 3), 0), Composed(operand("a", 4, 2, 1, 1), operand("b", 3, 4, 3, 3), True))
    block = Block(3, 2, (3, 3), terms, 1, operand("scales", 1, 3))
    tensors = [t.requires_grad_() for t in tensors_of(block)]
    torch.library.opcheck(
        torch.ops.orepa_kernels.squeeze, (tensors, [block.text], "triton", F32, False), raise_exception=True
    )

    def total(*own):
        return squeeze([block], [own], backend="triton")[0].square().sum()

    compiled = torch.compile(total, fullgraph=True, backend="aot_eager")
    expected = grad(total(*tensors), tensors)
    got = grad(compiled(*tensors), tensors)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_double_backward_goes_through_the_reference():
    block = Block(3, 2, (3, 3), (Composed(operand("a", 4, 2, 1, 1), operand("b", 3, 4, 3, 3), True),))
    a, b = (t.requires_grad_() for t in tensors_of(block))
    (kernel,) = squeeze([block], [[a, b]], backend="triton")
    (first,) = grad(kernel.square().sum(), a, create_graph=True)
    (second,) = grad(first.sum(), b)
    assert torch.isfinite(second).all() and second.abs().sum() > 0
