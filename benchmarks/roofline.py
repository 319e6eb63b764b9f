"""Count the least work that a block takes: its matrix products, its arithmetic, and the bytes that must move."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from orepa_kernels import Block, Composed, Dense, Separable

#: arithmetic of each mode in forward passes: the gradients of one product are two products
PASSES = {"forward": 1, "backward": 2, "both": 3}
MODES = tuple(PASSES)


@dataclass(frozen=True)
class Product:
    """``batch`` matrix products ``[m, k] x [k, n]``."""

    batch: int
    m: int
    k: int
    n: int

    @property
    def flops(self) -> int:
        return 2 * self.batch * self.m * self.k * self.n


def products(block: Block) -> list[Product]:
    """Return one product per pair of composed layers, nested blocks included.

    Rows are (output channel, tap of the second layer), columns (input channel, tap of the first): the layout in which the
    composition is one product, for a 1x1 first layer exactly the kernel itself.
    """
    pairs = []
    for term in (term for nested in _blocks(block) for term in nested.terms if isinstance(term, Composed)):
        first, second, groups = term.first.shape, term.second.shape, block.groups
        rows, columns = second[0] // groups * math.prod(second[2:]), math.prod(first[1:])
        pairs.append(Product(groups, rows, first[0] // groups, columns))
    return pairs


def flops(block: Block, mode: str) -> int:
    """Return the arithmetic of the matrix products and the depthwise separable branches in one of `MODES`."""
    total = sum(product.flops for product in products(block))
    for term in (term for nested in _blocks(block) for term in nested.terms):
        if isinstance(term, Separable) and term.pointwise is not None:
            # Every element of the pointwise kernel meets every tap once.
            total += 2 * math.prod(term.pointwise.shape) * math.prod(term.depthwise.shape[2:])
    return PASSES[mode] * total


def minimum_bytes(
    block: Block, constants: frozenset[str], mode: str, dtype: torch.dtype, out_dtype: torch.dtype
) -> int:
    """Return the bytes that any implementation has to read and write once.

    Forward reads the operands and writes the kernel; backward reads its gradient and the operands, and writes one gradient
    per parameter.

    Args:
        block: the plan.
        constants: names of the operands that have no gradient.
        mode: one of `MODES`.
        dtype: of the operands.
        out_dtype: of the kernel.
    """
    size = dtype.itemsize
    operands = size * sum(math.prod(o.shape) for o in block.operands)
    gradients = size * sum(math.prod(o.shape) for o in block.operands if o.name not in constants)
    kernel = out_dtype.itemsize * math.prod(block.shape)
    forward, backward = operands + kernel, kernel + operands + gradients
    return {"forward": forward, "backward": backward, "both": forward + backward}[mode]


def _blocks(block: Block) -> Iterator[Block]:
    """The block and all blocks nested in it."""
    yield block
    for term in block.terms:
        if isinstance(term, Composed):
            parts = [term.first, term.second]
        elif isinstance(term, Dense):
            parts = [term.weight]
        else:
            continue
        for part in parts:
            if isinstance(part, Block):
                yield from _blocks(part)
