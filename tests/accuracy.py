"""How a fused backend is held against the float64 reference (SPEC section 5): one comparison for all backends and tests."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from orepa_kernels import Block, squeeze
from orepa_kernels.backends.base import Signature

#: so many roundings, of the compute dtype or of the result's where that is coarser, are noise, whatever the plain
#: formulation's error happens to be
FLOOR = 4


def distance(got: Tensor, exact: Tensor) -> float:
    """Norm of the error; a NaN anywhere gives NaN, which no bound admits."""
    return (got.double() - exact).norm().item()


def run(block, tensors, upstream, backend, **options):
    """Kernel and gradients of all operands."""
    leaves = [t.detach().requires_grad_() for t in tensors]
    (kernel,) = squeeze([block], [leaves], backend=backend, **options)
    gradients = torch.autograd.grad(kernel, leaves, upstream.to(kernel.dtype))
    return kernel.detach(), gradients


def check(
    backend: str,
    block: Block,
    tensors: Sequence[Tensor],
    *,
    dtype: torch.dtype | None = None,
    memory_format: torch.memory_format = torch.contiguous_format,
    upstream: Tensor | None = None,
    bound: float | None = None,
) -> None:
    """Hold kernel and every gradient of a backend against float64: error at most twice that of the plain formulation.

    The noise floor is relative to what the result would be if nothing cancelled, which is what roundings are relative to.

    Args:
        backend: under test.
        block: the plan.
        tensors: its operands.
        dtype: of the kernel.
        memory_format: of the kernel.
        upstream: gradient of the kernel; random where None.
        bound: on the error relative to the norm of the truth, besides: for sizes where sums do not cancel by chance.
    """
    if upstream is None:
        upstream = torch.randn(block.shape, device=tensors[0].device)
    upstream = upstream.to(dtype or tensors[0].dtype)
    options = {"dtype": dtype, "memory_format": memory_format}
    kernel, gradients = run(block, tensors, upstream, backend, **options)
    plain_kernel, plain_gradients = run(block, tensors, upstream, "reference", **options)
    exact_kernel, exact_gradients = run(block, [t.double() for t in tensors], upstream, "reference")

    magnitudes = run(block, [t.double().abs() for t in tensors], upstream.double().abs(), "reference")

    rounding = torch.finfo(
        Signature.of(tensors, kernel.dtype, memory_format).compute_dtype
    ).eps  # a float64 kernel of half-precision operands has these, too
    assert kernel.dtype == plain_kernel.dtype and kernel.shape == plain_kernel.shape
    assert kernel.is_contiguous(memory_format=memory_format)
    names = ["kernel", *(operand.name for operand in block.operands)]
    for name, got, plain, exact, size in zip(
        names,
        [kernel, *gradients],
        [plain_kernel, *plain_gradients],
        [exact_kernel, *exact_gradients],
        [magnitudes[0], *magnitudes[1]],
        strict=True,
    ):
        assert got.dtype == plain.dtype
        error = distance(got, exact)
        allowed = 2 * distance(plain, exact) + FLOOR * max(torch.finfo(got.dtype).eps, rounding) * size.norm().item()
        assert error <= allowed, f"{name}: error {error:.2e}, allowed {allowed:.2e}"
        if bound is not None:
            assert error <= bound * exact.norm().item(), f"{name}: relative error {error / exact.norm().item():.2e}"
    for operand, tensor, gradient in zip(block.operands, tensors, gradients, strict=True):
        assert gradient.stride() == torch.empty_like(tensor).stride(), operand.name
