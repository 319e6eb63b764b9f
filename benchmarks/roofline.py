"""Count the least work that a block takes, and print the rates of result files of ``orepa bench squeeze``.

    python benchmarks/roofline.py FILE.json

Counted are the matrix products, the arithmetic, and the bytes that must move.
"""

from __future__ import annotations

import argparse
import functools
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from orepa.bench.problem import Problem, Shape, SqueezeCase
from orepa.bench.results import Results, load
from orepa.bench.tables import Table, describe, render
from orepa.errors import UserError
from orepa_kernels import Block, Composed, Dense, Separable

#: arithmetic of each mode in forward passes: the gradients of one product are two products
PASSES = {"forward": 1, "backward": 2, "both": 3}


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
    """Return the arithmetic of the matrix products and the depthwise separable branches in one of `PASSES`."""
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
        mode: one of `PASSES`.
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


# --- rates ----------------------------------------------------------------------------------------------------------------


def amount(provider: str, problem: Problem, mode: str) -> dict[str, int]:
    """Return the ``flops`` and ``bytes`` that a provider's rates refer to: the least that its work takes."""
    size = minimum_bytes(problem.plan, problem.constants, mode, torch.float32, problem.out_dtype)
    if provider == "gemms":
        return {"flops": PASSES[mode] * sum(product.flops for product in products(problem.plan))}
    return {"bytes": size} if provider == "copy" else {"flops": flops(problem.plan, mode), "bytes": size}


def rates_table(results: Results) -> Table:
    """Return the bytes and the arithmetic per second of the squeezes in a result file."""
    table = []
    for row in results.timed:
        c, seconds = row.case, row.median_us * 1e-6
        shape = Shape(c["out"], c["in"], c["k"], c["groups"])
        amounts = amount(row.provider, _problem(SqueezeCase(shape, c["topology"], c["dtype"])), row.mode)
        cells = [f"{amounts[what] / seconds / 1e9:,.1f}" if what in amounts else "" for what in ("bytes", "flops")]
        table.append([describe(c), row.provider, row.mode, row.launch, *cells])
    return ["block", "provider", "mode", "launch", "GB/s", "GFLOP/s"], table


@functools.lru_cache(maxsize=1)
def _problem(case: SqueezeCase) -> Problem:
    return Problem(case)


def main(argv: list[str] | None = None) -> int:
    """Print the rates of a file; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, metavar="FILE.json")
    try:
        results = load(parser.parse_args(argv).results)
        if results.benchmark != "squeeze":
            raise UserError(f"rates are those of squeezes, not of the benchmark {results.benchmark!r}")
        print(render(*rates_table(results), text=4))
    except UserError as error:
        print(f"roofline: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
