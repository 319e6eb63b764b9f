"""The CPU backend, held against the float64 reference: kernels, every gradient, layouts, threads, and what it keeps."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from accuracy import check, run
from hypothesis import given
from hypothesis import strategies as st
from strategies import blocks, strided
from test_squeeze import every_term
from torch.autograd import gradcheck, gradgradcheck

import orepa
from orepa.timing import saved_bytes
from orepa_kernels import (
    Average,
    BackendError,
    Block,
    Composed,
    Dense,
    Operand,
    PointwiseFilter,
    Separable,
    backends,
    squeeze,
)
from orepa_kernels.backends import native

if not backends()["cpu"]:
    pytest.skip(backends()["cpu"].reason, allow_module_level=True)

F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
LAYOUTS = ["contiguous", "channels_last", "gaps", "transposed"]
FORMATS = [torch.contiguous_format, torch.channels_last]


def drawn(block, dtype=F32):
    return [torch.randn(operand.shape, dtype=dtype) for operand in block.operands]


# --- right ----------------------------------------------------------------------------------------------------------------


@given(blocks(), st.sampled_from(LAYOUTS), st.sampled_from(LAYOUTS), st.sampled_from(FORMATS))
def test_any_plan_in_any_layout(block, layout, upstream_layout, memory_format):
    tensors = [strided(t, layout) for t in drawn(block)]
    upstream = strided(torch.randn(block.shape), upstream_layout)
    check("cpu", block, tensors, memory_format=memory_format, upstream=upstream)


@given(blocks(), st.sampled_from([F64, BF16, F16]), st.sampled_from([F32, F64, BF16, F16]), st.sampled_from(LAYOUTS))
def test_any_plan_in_any_dtype(block, dtype, out_dtype, layout):
    check("cpu", block, [strided(t, layout) for t in drawn(block, dtype)], dtype=out_dtype)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("topology", orepa.topologies())
def test_every_topology(topology, groups):
    size = 1 if topology == "rep1x1" else 7 if topology.endswith("stem") else 3
    conv = orepa.OREPAConv(34 * groups, 18 * groups, size, groups=groups, topology=topology, bias=False)
    tensors = [torch.randn_like(t) if t.dim() != 3 else t.detach() for t in conv.operands()]
    check("cpu", conv.plan, tensors, bound=5e-6)


@pytest.mark.parametrize(("out_channels", "in_channels", "groups"), [(260, 520, 1), (700, 1400, 2), (2048, 4096, 512)])
def test_blocks_that_are_worked_on_in_pieces(out_channels, in_channels, groups):
    conv = orepa.OREPAConv(in_channels, out_channels, 3, groups=groups, bias=False)
    check("cpu", conv.plan, [torch.randn_like(t) for t in conv.operands()], bound=5e-6)


@pytest.mark.parametrize(("out_channels", "in_channels", "first_size"), [(512, 64, 1), (64, 512, 3)])
def test_long_sums_are_as_exact_as_those_of_blas(out_channels, in_channels, first_size):
    """Errors of one chain of additions grow with its length: here 4,608 products make up one number."""
    first = Operand("a", (64, in_channels, first_size, first_size))
    second = Operand("b", (out_channels, 64, 4 - first_size, 4 - first_size))
    block = Block(out_channels, in_channels, (3, 3), (Composed(first, second),))
    tensors, upstream = [1 + t for t in drawn(block)], 1 + torch.randn(block.shape)
    _, exact = run(block, [t.double() for t in tensors], upstream, "reference")
    _, plain = run(block, tensors, upstream, "reference")
    _, got = run(block, tensors, upstream, "cpu")
    for operand, truth, theirs, ours in zip(block.operands, exact, plain, got, strict=True):
        allowed = 2 * (theirs - truth).norm() + 4 * torch.finfo(F32).eps * truth.norm()
        assert (ours - truth).norm() <= allowed, operand.name


@pytest.mark.parametrize("groups", [1, 2])
def test_gradients_of_every_term_first_and_second_order(groups):
    block, tensors = every_term(groups, grad=True)
    assert gradcheck(lambda *t: squeeze([block], [t], backend="cpu")[0], tensors)
    assert gradgradcheck(lambda *t: squeeze([block], [t], backend="cpu")[0], tensors)


def test_half_precision_is_one_rounding_of_the_float32_result():
    block, tensors = every_term(2, F32)
    (wide,) = squeeze([block], [tensors], backend="cpu")
    for dtype in (BF16, F16):
        (narrow,) = squeeze([block], [tensors], dtype=dtype, backend="cpu")
        assert torch.equal(narrow, wide.to(dtype))


def test_special_values_survive_rounding():
    block = Block(6, 1, (1, 1), (Dense(Operand("w", (6, 1, 1, 1))),))
    values = torch.tensor([float("nan"), float("inf"), -float("inf"), 65520.0, 1e-8, 3.3895e38])
    for dtype in (BF16, F16):
        (got,) = squeeze([block], [[values.view(6, 1, 1, 1)]], dtype=dtype, backend="cpu")
        torch.testing.assert_close(got.flatten(), values.to(dtype), equal_nan=True, rtol=0, atol=0)


@pytest.mark.parametrize("block_groups", [1, 3])
def test_only_the_gradients_asked_for(block_groups):
    block, tensors = every_term(block_groups, F32)
    upstream = torch.randn(block.shape)
    _, everything = run(block, tensors, upstream, "cpu")
    for index in range(len(tensors)):
        leaves = [t.requires_grad_(i == index) for i, t in enumerate(t.detach() for t in tensors)]
        (kernel,) = squeeze([block], [leaves], backend="cpu")
        (alone,) = torch.autograd.grad(kernel, [leaves[index]], upstream)
        # Not the same bits: without the other gradients to write, sums may run in another order.
        torch.testing.assert_close(alone, everything[index], rtol=1e-5, atol=1e-5, msg=block.operands[index].name)


def test_one_operand_in_two_places_gets_the_sum_of_both_gradients():
    w = Operand("w", (4, 4, 1, 1))
    block = Block(4, 4, (3, 3), (Dense(w), PointwiseFilter(w, Average((3, 3)))))
    check("cpu", block, [torch.randn(4, 4, 1, 1)])


def test_a_filter_may_be_learned():
    terms = (
        PointwiseFilter(Operand("p", (6, 5, 1, 1)), Operand("shared", (1, 3, 3)), 0),
        PointwiseFilter(Operand("q", (6, 5, 1, 1)), Operand("own", (6, 3, 3)), 1),
    )
    block = Block(6, 5, (3, 3), terms, scales=Operand("s", (2, 6)))
    check("cpu", block, drawn(block))


def test_depthwise_alone_and_identity():
    terms = (Separable(Operand("dw", (12, 1, 3, 3)), None, 0), PointwiseFilter(None, Average((3, 3)), 1))
    block = Block(12, 6, (3, 3), terms, groups=3, scales=Operand("s", (2, 12)))
    check("cpu", block, drawn(block))


# --- repeatable -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    "shape", [(64, 64, 1, 3), (96, 200, 2, 3), (320, 384, 1, 3), (700, 130, 1, 1), (290, 70, 1, 5)]
)
def test_the_same_bits_every_time_for_any_number_of_threads(threads, shape):
    out_channels, in_channels, groups, size = shape
    conv = orepa.OREPAConv(in_channels, out_channels, size, groups=groups, bias=False, topology="orepa")
    tensors, upstream = [torch.randn_like(t) for t in conv.operands()], torch.randn(conv.plan.shape)
    threads(1)
    kernel, gradients = run(conv.plan, tensors, upstream, "cpu")
    for count in (1, 2, 3, 4):
        threads(count)
        again, others = run(conv.plan, tensors, upstream, "cpu")
        assert torch.equal(again, kernel)
        for operand, one, other in zip(conv.plan.operands, gradients, others, strict=True):
            assert torch.equal(one, other), f"{operand.name}, {count} threads"
    tensors[0] = tensors[0] * (1 + 2**-22)  # the comparison can fail
    assert not torch.equal(run(conv.plan, tensors, upstream, "cpu")[0], kernel)


# --- for any processor --------------------------------------------------------------------------------------------------------


def with_instruction_set(name, *arguments):
    environment = {**os.environ, "OREPA_CPU_ISA": name}
    command = [sys.executable, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["baseline", "avx2"])
def test_other_instruction_sets(name):
    """The processor that runs the tests would otherwise be the only one whose kernels are tested."""
    script = "from orepa_kernels.backends import native; print(native.build()['cpu_instruction_set'])"
    if with_instruction_set(name, "-c", script).stdout.strip() != name:
        pytest.skip(f"this processor or this build has no {name} kernels")
    if native.build()["cpu_instruction_set"] == name:
        pytest.skip(f"all other tests of this file ran with {name}")
    which = "long_sums or any_plan or every_topology or in_pieces or same_bits or half_precision"
    done = with_instruction_set(name, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", which)
    assert done.returncode == 0, done.stdout + done.stderr


def test_an_unknown_instruction_set_is_said():
    done = with_instruction_set("sse9", "-c", "from orepa_kernels.backends import native; native.build()")
    assert "OREPA_CPU_ISA must be baseline, avx2 or avx512, got sse9" in done.stderr


# --- fits in ----------------------------------------------------------------------------------------------------------------


def test_nothing_is_kept_for_the_backward_pass():
    block, tensors = every_term(2, F32, grad=True)
    assert saved_bytes(lambda: squeeze([block], [tensors], backend="cpu")[0], tensors) == 0
    assert saved_bytes(lambda: squeeze([block], [tensors], backend="reference")[0], tensors) > 0


def test_auto_takes_it_and_layers_without_a_name_too():
    conv = orepa.OREPAConv(8, 8, 3)
    assert torch.equal(conv.squeeze(), squeeze([conv.plan], [conv.operands()], backend="cpu")[0])


def test_registered_operator_passes_opcheck():
    block, tensors = every_term(2, F32, grad=True)
    for channels_last in (False, True):
        arguments = (tensors, [block.text], "cpu", F32, channels_last)
        torch.library.opcheck(torch.ops.orepa_kernels.squeeze.default, arguments)


@pytest.mark.slow
def test_compiled_step_holds_one_operator_each_way_and_equals_eager():
    from torch._dynamo.testing import CompileCounterWithBackend

    conv = orepa.OREPAConv(
        6, 12, 3, padding=1, backend="cpu", dtype=F64
    )  # the convolution's own rounding is not the matter
    x = torch.randn(2, 6, 9, 9, dtype=F64)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(conv, fullgraph=True, backend=counter)  # test_conv.py has Inductor
    torch.testing.assert_close(compiled(x), conv(x))
    calls = [str(node.target) for graph in counter.graphs for node in graph.graph.nodes]
    assert sum("orepa_kernels.squeeze" in call for call in calls) == 1
    compiled(x).square().sum().backward()
    got = {name: p.grad.clone() for name, p in conv.named_parameters()}
    conv.zero_grad()
    conv(x).square().sum().backward()
    for name, parameter in conv.named_parameters():
        torch.testing.assert_close(got[name], parameter.grad, msg=name)


def test_autocast_does_not_reach_the_products():
    block, tensors = every_term(1, F32, grad=True)
    expected, gradients = run(block, tensors, torch.ones(block.shape), "cpu")
    with torch.autocast("cpu", BF16):
        got, narrow = run(block, tensors, torch.ones(block.shape), "cpu")
    assert torch.equal(got, expected)
    assert all(torch.equal(a, b) for a, b in zip(narrow, gradients, strict=True))


def test_functional_transforms_and_subclasses_go_to_the_reference():
    conv = orepa.OREPAConv(4, 4, 3, bias=False, dtype=F64)
    parameters = dict(conv.named_parameters())

    def loss(values):
        return torch.func.functional_call(conv, values, (torch.ones(1, 4, 5, 5, dtype=F64),)).square().sum()

    gradients = torch.func.grad(loss)(parameters)
    loss(parameters).backward()
    for name, parameter in conv.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad)
    conv.backend = "cpu"
    with pytest.raises(BackendError, match="torch.func"):
        torch.func.grad(loss)(parameters)


def test_what_it_cannot_do_is_said():
    many = Block(2, 2, (1, 1), tuple(Dense(Operand(f"w{i}", (2, 2, 1, 1))) for i in range(13)))
    with pytest.raises(BackendError, match="13 terms, more than 12"):
        squeeze([many], [drawn(many)], backend="cpu")
    squeeze([many], [drawn(many)])  # which auto leaves to the reference
