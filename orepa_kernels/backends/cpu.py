"""The CPU backend: matrix products by PyTorch's BLAS, everything else in one fused pass of compiled code each way."""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import native
from ..fused import FusedBackend, Gradients, compute_dtype
from ..plan import Block, Composed, Operand
from . import YES, Verdict


class CpuBackend(FusedBackend):
    """Composes in float64 where an operand is, else in float32. Keeps nothing for the backward pass.

    Kernels are worked on as *panels*, ``[rows, kh, kw, columns]``: the layout of a channels_last tensor, in which a composed
    term is one matrix product per group. Large blocks are worked on in pieces (see csrc/cpu/squeeze.h).
    """

    name = "cpu"

    def __init__(self) -> None:
        self._dtypes: frozenset[torch.dtype] = frozenset()

    def available(self) -> Verdict:
        missing = native.why_missing()
        if missing:
            return Verdict(False, missing)
        module = native.module()
        self._dtypes = frozenset(dtype for dtype, number in native.TYPES.items() if module.cpu_knows(number))
        return YES

    def runs_on(self, device: torch.device) -> Verdict:
        return YES if device.type == "cpu" else Verdict(False, f"the tensors are on {device.type}")

    def knows(self, dtype: torch.dtype) -> Verdict:
        if dtype in self._dtypes:
            return YES
        return Verdict(False, f"{dtype} needs a newer compiler than this build had (GCC 12, Clang 15)")

    def covers(self, block: Block) -> Verdict:
        return native.covers(block)

    def forward(
        self,
        blocks: Sequence[Block],
        tensors: Sequence[Sequence[Tensor]],
        dtype: torch.dtype,
        memory_format: torch.memory_format,
        folds: Sequence[Tensor | None],
    ) -> list[Tensor]:
        kernels = []
        for block, operands, fold in zip(blocks, tensors, folds, strict=True):
            kernel = torch.empty(block.shape, dtype=dtype, memory_format=memory_format)
            _Squeeze(block, operands).forward(kernel, fold)
            kernels.append(kernel)
        return kernels

    def backward(
        self,
        blocks: Sequence[Block],
        tensors: Sequence[Sequence[Tensor]],
        upstream: Sequence[Tensor],
        needed: Sequence[Sequence[bool]],
    ) -> list[Gradients]:
        work = zip(blocks, tensors, upstream, needed, strict=True)
        return [_Squeeze(block, operands).backward(gradient, need) for block, operands, gradient, need in work]


# --- what is known of a block before any tensor ---------------------------------------------------------------------------


@dataclass(frozen=True)
class _Product:
    """A composed term as a matrix product per group (paper Eq. 3): ``[rows * taps of b, inner] @ [inner, taps of a * I/g]``.

    Args:
        index: of the term.
        scale: of the term.
        first: place of ``a [g * inner, I/g, ...]`` among the operands.
        second: place of ``b [O, inner, ...]``.
        inner: channels between the two, per group.
        a_taps: of a.
        b_taps: of b.
        identity: whether the identity is added to a.
        gathers: whether it needs dW in another order than dW's own panels.
    """

    index: int
    scale: int | None
    first: int
    second: int
    inner: int
    a_taps: int
    b_taps: int
    identity: bool
    gathers: bool


@dataclass(frozen=True)
class _Recipe:
    plan: Any
    terms: int
    products: tuple[_Product, ...]
    pieces: tuple[tuple[int, int], ...]
    scales: int | None


@functools.lru_cache(maxsize=4096)
def _recipe(block: Block) -> _Recipe:
    plan = native.plan(block)
    places = {operand.name: index for index, operand in enumerate(block.operands)}
    products = []
    for index, term in enumerate(block.terms):
        if isinstance(term, Composed):
            assert isinstance(term.first, Operand) and isinstance(term.second, Operand)  # a flat block
            _, _, a_height, a_width = term.first.shape
            _, inner, b_height, b_width = term.second.shape
            a, b = a_height * a_width, b_height * b_width
            first, second = places[term.first.name], places[term.second.name]
            gathers = plan.cpu_needs_gather(index)
            products.append(_Product(index, term.scale, first, second, inner, a, b, term.identity, gathers))
    scales = None if block.scales is None else places[block.scales.name]
    return _Recipe(plan, len(block.terms), tuple(products), tuple(plan.cpu_pieces()), scales)


# --- one block at work -------------------------------------------------------------------------------------------------------


class _Squeeze:
    """One block and its operands, for the length of a call.

    Buffers of a piece begin with its first output channel. The compiled functions are told where they are as if they began
    with the block's, which is how they count.
    """

    def __init__(self, block: Block, tensors: Sequence[Tensor]) -> None:
        self.module, self.recipe = native.module(), _recipe(block)
        self.block, self.tensors = block, tensors
        self.operands, self.views = native.described(block, tensors)
        self.columns, self.groups = block.shape[1], block.groups
        self.group_rows = block.out_channels // block.groups
        self.compute = compute_dtype(tensors)
        self.how = native.TYPES[self.compute], torch.get_num_threads()

    def forward(self, kernel: Tensor, fold: Tensor | None) -> None:
        """Write the kernel, times ``fold [O]``."""
        recipe = self.recipe
        firsts = [self._first(product) for product in recipe.products]
        views, out = self.views, native.view(kernel)
        factor = () if fold is None else native.view(fold)
        results = [0] * recipe.terms
        for begin, end in recipe.pieces:
            for product, first in zip(recipe.products, firsts, strict=True):
                second = self._second(product, begin, end)
                shape = (*second.shape[:-1], first.shape[-1])
                result = scratch(f"product {product.index}", shape, self.compute)
                multiply(second, self._of_groups(first, begin, end), result)
                results[product.index] = result.data_ptr()
                if product.identity:  # b is read once more: as panels it needs no second transposition
                    row = product.b_taps * product.inner
                    start = second.data_ptr() - begin * row * self.compute.itemsize
                    place = 5 * product.second
                    views[place : place + 5] = start, self.how[0], row, 1, product.inner
            self.module.cpu_forward(recipe.plan, views, out, factor, results, begin, end, *self.how)

    def backward(self, upstream: Tensor, needed: Sequence[bool]) -> Gradients:
        """The gradients of the operands, given that of the kernel."""
        recipe = self.recipe
        gradients = [torch.empty_like(t) if need else None for t, need in zip(self.tensors, needed, strict=True)]
        written, targets = native.places(self.block, gradients, self.compute)
        by_scale = recipe.scales is not None and needed[recipe.scales]
        sums = [self._sum_for_first(product, written[product.first]) for product in recipe.products]

        upstream = native.collapsed(upstream)
        own = upstream.permute(0, 2, 3, 1)
        in_place = own.dtype == self.compute and own.is_contiguous()
        views, source = self.views, native.view(upstream)
        for begin, end in recipe.pieces:
            shape = (end - begin, *own.shape[1:])
            rows = own[begin:end] if in_place else scratch("rows", shape, self.compute)
            at = rows.data_ptr()
            self.module.cpu_backward(recipe.plan, views, targets, source, at, begin, end, *self.how)
            for product, total in zip(recipe.products, sums, strict=True):
                flow = self._flow(product, rows, begin, end)
                if written[product.second] is not None or (by_scale and product.scale is not None):
                    first = self._of_groups(self._first(product), begin, end)
                    result = scratch("result", (*flow.shape[:-1], product.inner), self.compute)
                    multiply(flow, first.mT, result)
                    where = product.index, at, result.data_ptr(), begin, end
                    self.module.cpu_composed_backward(recipe.plan, views, targets, *where, *self.how)
                if total is not None:
                    scaled = self._second(product, begin, end, scaled=True).mT
                    total = self._of_groups(total, begin, end)
                    multiply(scaled, flow, total, add=begin % self.group_rows != 0)

        for product, total in zip(recipe.products, sums, strict=True):
            gradient = written[product.first]
            if gradient is not None and total is not None and total.data_ptr() != gradient.data_ptr():
                size = gradient.shape[0], self.columns, product.a_taps
                self.module.cpu_unpack(total.data_ptr(), *size, native.view(gradient), *self.how)
        native.hand_over(gradients, written)
        return gradients

    # One group is one matrix, several are a batch of them: with a batch of one, small blocks would wait for views.

    def _of_groups(self, matrices: Tensor, begin: int, end: int) -> Tensor:
        """Those of the groups that a piece has a part in."""
        if self.groups == 1:
            return matrices
        return matrices[begin // self.group_rows : (end - 1) // self.group_rows + 1]

    def _matrices(self, panels: Tensor, begin: int, end: int, width: int) -> Tensor:
        """Panels of a piece as ``[rows, width]``, or one such matrix per group."""
        if self.groups == 1:
            return panels.view(-1, width)
        return panels.view((end - 1) // self.group_rows + 1 - begin // self.group_rows, -1, width)

    def _by_group(self, panels: Tensor, rows: int) -> Tensor:
        """Panels of all groups as ``[rows, width]``, or one such matrix per group."""
        return panels.view(rows, -1) if self.groups == 1 else panels.view(self.groups, rows, -1)

    def _first(self, product: _Product) -> Tensor:
        """``a`` as ``[inner, taps of a * I/g]``, per group."""
        tensor = self.operands[product.first]
        if product.a_taps == 1 and tensor.dtype == self.compute and tensor.is_contiguous():
            return self._by_group(tensor, product.inner)
        panels = tensor.permute(0, 2, 3, 1)
        if not (panels.dtype == self.compute and panels.is_contiguous()):
            shape = tuple(panels.shape)
            panels = self._pack(tensor, 0, shape[0], None, scratch(f"first {product.index}", shape, self.compute))
        return self._by_group(panels, product.inner)

    def _second(self, product: _Product, begin: int, end: int, scaled: bool = False) -> Tensor:
        """``b`` of a piece as ``[rows * taps of b, inner]``, per group, scaled or not."""
        tensor = self.operands[product.second]
        panels = tensor.permute(0, 2, 3, 1)
        factor = None
        if scaled and product.scale is not None and self.recipe.scales is not None:
            factor = self.operands[self.recipe.scales][product.scale].expand(self.groups * self.group_rows)
        if factor is None and panels.dtype == self.compute and panels.is_contiguous():
            return self._matrices(panels[begin:end], begin, end, product.inner)
        out = scratch(f"second {product.index}", (end - begin, *panels.shape[1:]), self.compute)
        return self._matrices(self._pack(tensor, begin, end, factor, out), begin, end, product.inner)

    def _flow(self, product: _Product, rows: Tensor, begin: int, end: int) -> Tensor:
        """dW of a piece as the gradient of a product, ``[rows * taps of b, taps of a * I/g]``, per group."""
        width = product.a_taps * self.columns
        if product.gathers:
            gathered = scratch("gathered", (end - begin, product.b_taps, width), self.compute)
            plan, where = self.recipe.plan, (product.index, rows.data_ptr(), gathered.data_ptr(), begin, end)
            self.module.cpu_gather(plan, *where, *self.how)
            rows = gathered
        return self._matrices(rows, begin, end, width)

    def _sum_for_first(self, product: _Product, gradient: Tensor | None) -> Tensor | None:
        """Where the gradient of ``a`` is added up, ``[inner, taps of a * I/g]`` per group: itself where its layout allows."""
        if gradient is None:
            return None
        panels = gradient.permute(0, 2, 3, 1)
        if not (panels.dtype == self.compute and panels.is_contiguous()):
            panels = scratch(f"sum {product.index}", tuple(panels.shape), self.compute)
        return self._by_group(panels, product.inner)

    def _pack(self, tensor: Tensor, begin: int, end: int, factor: Tensor | None, out: Tensor) -> Tensor:
        columns, taps = tensor.shape[1], tensor.shape[2] * tensor.shape[3]
        factors = () if factor is None else native.view(factor)
        self.module.cpu_pack(native.view(tensor), factors, begin, end, columns, taps, out.data_ptr(), *self.how)
        return out


def multiply(left: Tensor, right: Tensor, out: Tensor, add: bool = False) -> None:
    """``left @ right`` into (or onto) ``out``, by BLAS. Autocast leaves products into given memory alone."""
    if left.dim() == 2:
        if add:
            torch.addmm(out, left, right, out=out)
        else:
            torch.mm(left, right, out=out)
    elif add:
        torch.baddbmm(out, left, right, out=out)
    else:
        torch.bmm(left, right, out=out)


class _Kept(threading.local):
    def __init__(self) -> None:
        self.buffers: dict[tuple[str, torch.dtype], Tensor] = {}
        self.shaped: dict[tuple[str, tuple[int, ...], torch.dtype], Tensor] = {}


_kept = _Kept()


def scratch(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Memory that this thread keeps for its next call; a piece's size bounds it. Contents are left over.

    On a CPU, pages fresh from the operating system cost more than what is computed in them.
    """
    tensor = _kept.shaped.get((name, shape, dtype))
    if tensor is None:
        size = math.prod(shape)
        buffer = _kept.buffers.get((name, dtype))
        if buffer is None or buffer.numel() < size:
            buffer = _kept.buffers[name, dtype] = torch.empty(size, dtype=dtype)
            _kept.shaped.clear()  # some of those lie in the smaller buffer, which can go
        tensor = _kept.shaped[name, shape, dtype] = buffer[:size].view(shape)
    return tensor
