"""Nested plans taken apart: what a fused kernel computes in one go, and in which order.

A factor of a block may itself be a block (the deep stem is three of them, composed). A fused kernel reads tensors only, so
each nested block becomes a step of its own, whose result the outer block takes as an operand. Steps of one level do not
depend on each other and share a launch.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeAlias

from .plan import Average, Block, Composed, Dense, Operand, Separable, Term

#: a tensor of a program: the number of its block, and its name there
Key: TypeAlias = tuple[int, str]


@dataclass(frozen=True)
class Step:
    """One flat block: every factor of its terms is an operand, and no two factors share one.

    Args:
        block: the plan.
        inputs: where each of ``block.operands`` comes from.
        output: where its kernel goes.
        level: -1 for a constant (no inputs), 0 where it needs operands and constants only, and so on.
    """

    block: Block
    inputs: tuple[Key, ...]
    output: Key
    level: int


@dataclass(frozen=True)
class Program:
    """How to squeeze several blocks at once.

    Args:
        inputs: the operands of all blocks, in order.
        constants: nested blocks without an operand, such as an average.
        inner: the other nested blocks, level by level.
        last: one step per block: the kernels asked for.
        flat: where one launch does it all and takes the operands as they come, the blocks of ``last``; else None.
    """

    inputs: tuple[Key, ...]
    constants: tuple[Step, ...]
    inner: tuple[tuple[Step, ...], ...]
    last: tuple[Step, ...]
    flat: tuple[Block, ...] | None


@functools.lru_cache(maxsize=4096)
def program(blocks: tuple[Block, ...]) -> Program:
    """The steps of several blocks, as few levels deep as they depend on each other."""
    steps = [_steps(index, block) for index, block in enumerate(blocks)]
    nested = [step for own in steps for step in own[:-1]]
    depth = max((step.level for step in nested), default=-1) + 1
    inputs = tuple((index, operand.name) for index, block in enumerate(blocks) for operand in block.operands)
    last = tuple(own[-1] for own in steps)
    as_they_come = not nested and inputs == tuple(key for step in last for key in step.inputs)
    return Program(
        inputs=inputs,
        constants=tuple(step for step in nested if step.level < 0),
        inner=tuple(tuple(step for step in nested if step.level == level) for level in range(depth)),
        last=last,
        flat=tuple(step.block for step in last) if as_they_come else None,
    )


def _steps(index: int, block: Block) -> list[Step]:
    """The steps of one block, each after those it needs; the last is the block itself."""
    steps: list[Step] = []
    results: dict[Block, Operand] = {}
    levels: dict[str, int] = {}

    def step(nested: Block) -> Operand:
        """The operand that stands for a block's kernel."""
        if nested in results:
            return results[nested]
        keys: dict[str, str] = {}

        def own(factor: Operand | Block) -> Operand:
            operand = step(factor) if isinstance(factor, Block) else factor
            name = operand.name
            while name in keys:  # a second use: a backward kernel writes one gradient per factor
                name += "'"
            keys[name] = operand.name
            return replace(operand, name=name)

        flat = replace(nested, terms=tuple(_flat(term, own) for term in nested.terms))
        names = [keys.get(operand.name, operand.name) for operand in flat.operands]
        level = max((levels.get(name, -1) + 1 for name in names), default=-1)
        result = Operand(f"#{len(steps)}", nested.shape)  # no parameter can be called that
        levels[result.name] = level
        steps.append(Step(flat, tuple((index, name) for name in names), (index, result.name), level))
        results[nested] = result
        return result

    step(block)
    return steps


def _flat(term: Term, own: Callable[[Operand | Block], Operand]) -> Term:
    if isinstance(term, Dense):
        return replace(term, weight=own(term.weight))
    if isinstance(term, Composed):
        return replace(term, first=own(term.first), second=own(term.second))
    if isinstance(term, Separable):
        pointwise = None if term.pointwise is None else own(term.pointwise)
        return replace(term, depthwise=own(term.depthwise), pointwise=pointwise)
    return replace(
        term,
        pointwise=None if term.pointwise is None else own(term.pointwise),
        filter=term.filter if isinstance(term.filter, Average) else own(term.filter),
    )
