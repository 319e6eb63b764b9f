"""`orepa_kernels.squeeze` and the reference mathematics, held against loops that follow the formulas literally."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck

from orepa_kernels import Average, Block, Composed, Dense, Operand, PointwiseFilter, Separable, reference, squeeze

F64 = torch.float64


def randn(*shape, dtype=F64, grad=False):
    return torch.randn(*shape, dtype=dtype, requires_grad=grad)


# --- the four term kinds, literally -------------------------------------------------------------------------------------


def loop_compose(first, second, groups):
    """(W2 o W1)[o,i,p] = sum_m sum_q W2[o,m,q] W1[m,i,p-q]."""
    (m_all, ig, h1, w1), (o_all, mg, h2, w2) = first.shape, second.shape
    out = np.zeros((o_all, ig, h1 + h2 - 1, w1 + w2 - 1))
    for o, m in itertools.product(range(o_all), range(mg)):
        row = (o // (o_all // groups)) * mg + m
        for qh, qw, ph, pw in itertools.product(range(h2), range(w2), range(h1), range(w1)):
            out[o, :, qh + ph, qw + pw] += second[o, m, qh, qw] * first[row, :, ph, pw]
    assert m_all == mg * groups
    return out


def loop_separable(dw, pw, in_channels, groups):
    """K[o,i,p] = sum_e pw[o, i_local*E+e] dw[i*E+e, p]."""
    expand, per_group = dw.shape[0] // in_channels, in_channels // groups
    out = np.zeros((pw.shape[0], per_group, *dw.shape[2:]))
    for o, i, e in itertools.product(range(pw.shape[0]), range(per_group), range(expand)):
        absolute = (o // (pw.shape[0] // groups)) * per_group + i
        out[o, i] += pw[o, i * expand + e, 0, 0] * dw[absolute * expand + e, 0]
    return out


sizes = st.tuples(st.sampled_from([1, 2, 3, 5]), st.sampled_from([1, 2, 3, 4]))


@given(st.sampled_from([1, 2, 3]), st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), sizes, sizes)
def test_compose_is_the_formula(groups, ig, mg, og, k1, k2):
    first, second = randn(groups * mg, ig, *k1), randn(groups * og, mg, *k2)
    expected = loop_compose(first.numpy(), second.numpy(), groups)
    np.testing.assert_allclose(reference.compose(first, second, groups).numpy(), expected, rtol=1e-12, atol=1e-12)


def test_compose_is_what_two_convolutions_do_and_correlation_is_not():
    """The authors compose the stem by correlation (one flip missing): that must not pass for a convolution in sequence."""
    first, second, x = randn(6, 2, 3, 3), randn(4, 3, 3, 3), randn(2, 4, 9, 11)
    conv = torch.nn.functional.conv2d
    expected = conv(conv(x, first, groups=2), second, groups=2)
    composed = reference.compose(first, second, 2)
    torch.testing.assert_close(conv(x, composed, groups=2), expected, rtol=1e-12, atol=1e-12)
    correlated = reference.compose(first, second.flip((2, 3)), 2)
    assert not torch.allclose(conv(x, correlated, groups=2), expected, rtol=1e-2, atol=1e-2)


@given(st.sampled_from([1, 2, 3]), st.integers(1, 3), st.integers(1, 3), st.integers(1, 4), sizes)
def test_separable_is_the_formula(groups, ig, og, expand, k):
    in_channels, out = groups * ig, groups * og
    dw, pw = randn(in_channels * expand, 1, *k), randn(out, ig * expand, 1, 1)
    expected = loop_separable(dw.numpy(), pw.numpy(), in_channels, groups)
    got = reference.separable(dw, pw, in_channels, groups).numpy()
    np.testing.assert_allclose(got, expected, rtol=1e-12, atol=1e-12)
    alone = reference.expand_depthwise(dw, in_channels, groups)
    x = randn(1, in_channels, 7, 7)
    conv = torch.nn.functional.conv2d
    torch.testing.assert_close(conv(x, alone, groups=groups), conv(x, dw, groups=in_channels), rtol=1e-12, atol=1e-12)


def test_pointwise_filter_average_and_identity():
    p, f = randn(4, 3, 1, 1), randn(4, 3, 5)
    block = Block(4, 3, (3, 5), (PointwiseFilter(Operand("p", (4, 3, 1, 1)), Operand("f", (4, 3, 5))),))
    torch.testing.assert_close(squeeze([block], [[p, f]])[0], torch.einsum("oi,ohw->oihw", p[:, :, 0, 0], f))
    block = Block(4, 3, (3, 5), (PointwiseFilter(Operand("p", (4, 3, 1, 1)), Average((3, 5))),))
    torch.testing.assert_close(squeeze([block], [[p]])[0], (p / 15).expand(4, 3, 3, 5))
    x = randn(1, 4, 5, 5)
    block = Block(4, 4, (3, 3), (PointwiseFilter(None, Average((1, 1)), 0),), groups=2, scales=Operand("s", (1, 4)))
    (kernel,) = squeeze([block], [[torch.ones(1, 4, dtype=F64)]])
    torch.testing.assert_close(torch.nn.functional.conv2d(x, kernel, padding=1, groups=2), x)


def test_align_centres_and_refuses():
    kernel = randn(2, 2, 1, 3)
    aligned = reference.align(kernel, (3, 5))
    assert torch.equal(aligned[:, :, 1:2, 1:4], kernel) and aligned.count_nonzero() == kernel.count_nonzero()
    with pytest.raises(ValueError, match="cannot be centred"):
        reference.align(kernel, (2, 3))


# --- whole blocks ---------------------------------------------------------------------------------------------------------


def every_term(groups=1, dtype=F64, grad=False):
    """A 3x3 block that holds every kind of term, grouped, and its tensors."""
    o, i = 4 * groups, 2 * groups
    ig, t = 2, 4 * groups

    def operand(name, *shape):
        return Operand(name, shape)

    stage = Block(4 * groups, i, (1, 3), (Dense(operand("stage.w", 4 * groups, ig, 1, 3)),), groups)
    terms = (
        Dense(operand("origin", o, ig, 3, 3), 0),
        Dense(operand("narrow", o, ig, 1, 3), 1),
        PointwiseFilter(operand("avg", o, ig, 1, 1), Average((3, 3)), 2),
        PointwiseFilter(operand("prior", o, ig, 1, 1), operand("filter", o, 3, 3), 3),
        PointwiseFilter(None, Average((1, 1)), 4),
        Composed(operand("c1", t, ig, 1, 1), operand("c2", o, 4, 3, 3), True, 5),
        Composed(stage, operand("c3", o, 4, 3, 1), False, None),
        Separable(operand("dw", 3 * i, 1, 3, 3), operand("pw", o, 3 * ig, 1, 1), 6),
    )
    block = Block(o, i, (3, 3), terms, groups, operand("scales", 7, o))
    return block, [randn(*x.shape, dtype=dtype, grad=grad) for x in block.operands]


@pytest.mark.parametrize("groups", [1, 2])
def test_gradients_of_every_term_first_and_second_order(groups):
    block, tensors = every_term(groups, grad=True)
    assert gradcheck(lambda *t: squeeze([block], [t])[0], tensors)
    assert gradgradcheck(lambda *t: squeeze([block], [t])[0], tensors)


def test_blocks_of_a_list_are_independent():
    one, a = every_term(1)
    two, b = every_term(2)
    together = squeeze([one, two, one], [a, b, a])
    alone = [squeeze([one], [a])[0], squeeze([two], [b])[0]]
    assert (
        torch.equal(together[0], alone[0]) and torch.equal(together[1], alone[1]) and torch.equal(together[2], alone[0])
    )
    assert squeeze([], []) == []


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_strided_operands_and_memory_format(memory_format):
    block, tensors = every_term(2)
    (expected,) = squeeze([block], [tensors])
    strided = [torch.stack([t, torch.full_like(t, float("nan"))], -1)[..., 0] for t in tensors]
    assert not any(t.is_contiguous() for t in strided if t.numel() > 1)
    (got,) = squeeze([block], [strided], memory_format=memory_format)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    assert got.is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_one_rounding_of_the_float32_result(dtype):
    block, tensors = every_term(2, dtype)
    (got,) = squeeze([block], [tensors])
    (wide,) = squeeze([block], [[t.float() for t in tensors]])
    assert got.dtype == dtype and torch.equal(got, wide.to(dtype))
    (emitted,) = squeeze([block], [[t.float() for t in tensors]], dtype=dtype)
    assert torch.equal(emitted, got)


def test_float32_error_and_gradients_against_float64():
    block, tensors = every_term(2, torch.float32, grad=True)
    wide = [t.detach().double().requires_grad_() for t in tensors]
    (got,), (exact,) = squeeze([block], [tensors]), squeeze([block], [wide])
    assert (got.double() - exact).norm() <= 5e-6 * exact.norm()
    upstream = torch.randn_like(exact)
    narrow_grads = torch.autograd.grad(got, tensors, upstream.float())
    for operand, a, b in zip(block.operands, narrow_grads, torch.autograd.grad(exact, wide, upstream), strict=True):
        assert (a.double() - b).norm() <= 5e-6 * b.norm(), operand.name


def test_autocast_does_not_reach_the_composition():
    block, tensors = every_term(1, torch.float32)
    (expected,) = squeeze([block], [tensors])
    with torch.autocast("cpu", torch.bfloat16):
        (got,) = squeeze([block], [tensors])
    assert torch.equal(got, expected)


def test_bitwise_repeatable_and_the_comparison_can_fail():
    block, tensors = every_term(2, torch.float32)
    runs = [squeeze([block], [tensors])[0] for _ in range(3)]
    assert torch.equal(runs[0], runs[1]) and torch.equal(runs[0], runs[2])
    tensors[0] = tensors[0] * (1 + 2**-22)
    assert not torch.equal(runs[0], squeeze([block], [tensors])[0])


# --- bad input --------------------------------------------------------------------------------------------------------------


def test_bad_input_is_named():
    block, tensors = every_term(1)

    def changed(index, tensor):
        return [*tensors[:index], tensor, *tensors[index + 1 :]]

    with pytest.raises(ValueError, match="one entry per block: got 2 for 1 blocks"):
        squeeze([block], [tensors, tensors])
    with pytest.raises(ValueError, match=r"blocks\[0\] needs 12 tensors, got 11"):
        squeeze([block], [tensors[:-1]])
    with pytest.raises(ValueError, match=r"operand 'origin' must be \[4, 2, 3, 3\], got \[4, 2, 3\]"):
        squeeze([block], [changed(0, randn(4, 2, 3))])
    with pytest.raises(TypeError, match="operand 'narrow' must be one of float64, .*got torch.int64"):
        squeeze([block], [changed(1, torch.ones(4, 2, 1, 3, dtype=torch.int64))])
    with pytest.raises(ValueError, match="operand 'narrow' is torch.float32, 'origin' is torch.float64"):
        squeeze([block], [changed(1, torch.ones(4, 2, 1, 3))])
    with pytest.raises(ValueError, match="operand 'narrow' is on meta, 'origin' on cpu"):
        squeeze([block], [changed(1, torch.ones(4, 2, 1, 3, dtype=F64, device="meta"))])
    with pytest.raises(TypeError, match="dtype must be one of"):
        squeeze([block], [tensors], dtype=torch.int8)
    with pytest.raises(ValueError, match="memory_format must be"):
        squeeze([block], [tensors], memory_format=torch.preserve_format)
    with pytest.raises(ValueError, match="backend must be one of auto, cuda"):
        squeeze([block], [tensors], backend="fast")
    nothing = Block(4, 4, (3, 3), (PointwiseFilter(None, Average((1, 1))),))
    with pytest.raises(ValueError, match="has no operands"):
        squeeze([nothing], [[]])


def test_meta_tensors_give_shapes():
    block, tensors = every_term(2)
    (kernel,) = squeeze([block], [[t.to("meta") for t in tensors]])
    assert kernel.is_meta and tuple(kernel.shape) == block.shape
