"""How much work a block is at least: its matrix products, its arithmetic, and the bytes that must move."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from orepa_kernels import Block, Composed, Dense, Operand, Separable

#: arithmetic of each mode in forward passes: two products give the gradients of one
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
    """One product per pair of composed layers, nested blocks included.

    Rows are (output channel, tap of the second layer), columns (input channel, tap of the first): the layout in which the
    composition is one product, for a 1x1 first layer exactly the kernel itself.
    """
    found = []
    for term in block.terms:
        if isinstance(term, Composed):
            first, second, g = term.first.shape, term.second.shape, block.groups
            rows, columns = second[0] // g * math.prod(second[2:]), math.prod(first[1:])
            found.append(Product(g, rows, first[0] // g, columns))
    return found + [product for nested in _nested(block) for product in products(nested)]


def flops(block: Block, mode: str) -> int:
    """Arithmetic of the matrix products and of the depthwise separable branches; a backward pass costs twice the forward.

    Args:
        block: the plan.
        mode: one of `MODES`.
    """
    return PASSES[mode] * _forward_flops(block)


def minimum_bytes(
    block: Block, constants: frozenset[str], mode: str, dtype: torch.dtype, out_dtype: torch.dtype
) -> int:
    """What any implementation has to read and write once.

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


def _forward_flops(block: Block) -> int:
    total = sum(product.flops for product in products(block))
    for inner in (block, *_descend(block)):
        for term in inner.terms:
            if isinstance(term, Separable) and term.pointwise is not None:
                # Every element of the pointwise kernel meets every tap once.
                total += 2 * math.prod(term.pointwise.shape) * math.prod(term.depthwise.shape[2:])
    return total


def _nested(block: Block) -> Iterator[Block]:
    for term in block.terms:
        if isinstance(term, Composed):
            yield from (s for s in (term.first, term.second) if isinstance(s, Block))
        elif isinstance(term, Dense) and not isinstance(term.weight, Operand):
            yield term.weight


def _descend(block: Block) -> Iterator[Block]:
    for nested in _nested(block):
        yield nested
        yield from _descend(nested)
