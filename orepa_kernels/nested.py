"""Nested blocks: which flat blocks they take, in which order, and one `Prepared` per level.

A factor of a block may itself be a block (the deep stem is three of them, composed). A fused kernel reads tensors only, so
each nested block becomes a step, whose kernel the outer block takes as an operand. Steps of one level do not depend on each
other and share a launch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
from torch import Tensor

from . import reference
from .backends.base import Backend, Gradients, Layout, Prepared, Signature
from .plan import Average, Block, Composed, Dense, Operand, Separable, Term, sources

#: a tensor of a program: the number of its block, and its name there
Key: TypeAlias = tuple[int, str]


@dataclass(frozen=True)
class Step:
    """One flat block: every factor of its terms is an operand, and no two factors share one."""

    block: Block
    inputs: tuple[Key, ...]  # where each of ``block.operands`` comes from
    output: Key  # where its kernel goes
    level: int  # -1 for a constant (no inputs), 0 where it needs operands and constants only, and so on


@dataclass(frozen=True)
class Program:
    """How to squeeze several blocks at once."""

    inputs: tuple[Key, ...]  # the operands of all blocks, in order
    constants: tuple[Step, ...]  # nested blocks without an operand, such as an average
    inner: tuple[tuple[Step, ...], ...]  # the other nested blocks, level by level
    last: tuple[Step, ...]  # one step per block: the kernels to return


def program(blocks: Sequence[Block]) -> Program:
    """Return the steps of several blocks, as few levels deep as they depend on each other."""
    steps = [_steps(index, block) for index, block in enumerate(blocks)]
    nested = [step for by_block in steps for step in by_block[:-1]]
    depth = max((step.level for step in nested), default=-1) + 1
    return Program(
        inputs=tuple((index, operand.name) for index, block in enumerate(blocks) for operand in block.operands),
        constants=tuple(step for step in nested if step.level < 0),
        inner=tuple(tuple(step for step in nested if step.level == level) for level in range(depth)),
        last=tuple(by_block[-1] for by_block in steps),
    )


def _is_flat(block: Block) -> bool:
    """Whether every factor is an operand of one use."""
    factors = [factor for term in block.terms for factor in sources(term)]
    names = {factor.name for factor in factors if isinstance(factor, Operand)}
    return len(names) == len(factors)


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

        def operand_of(factor: Operand | Block) -> Operand:
            operand = step(factor) if isinstance(factor, Block) else factor
            name = operand.name
            while name in keys:  # a second use: a backward kernel writes one gradient per factor
                name += "'"
            keys[name] = operand.name
            return replace(operand, name=name)

        flat = replace(nested, terms=tuple(_flat(term, operand_of) for term in nested.terms))
        names = [keys.get(operand.name, operand.name) for operand in flat.operands]
        level = max((levels.get(name, -1) + 1 for name in names), default=-1)
        result = Operand(f"#{len(steps)}", nested.shape)  # no parameter can be called that
        levels[result.name] = level
        steps.append(Step(flat, tuple((index, name) for name in names), (index, result.name), level))
        results[nested] = result
        return result

    step(block)
    return steps


def _flat(term: Term, operand_of: Callable[[Operand | Block], Operand]) -> Term:
    if isinstance(term, Dense):
        return replace(term, weight=operand_of(term.weight))
    if isinstance(term, Composed):
        return replace(term, first=operand_of(term.first), second=operand_of(term.second))
    if isinstance(term, Separable):
        pointwise = None if term.pointwise is None else operand_of(term.pointwise)
        return replace(term, depthwise=operand_of(term.depthwise), pointwise=pointwise)
    return replace(
        term,
        pointwise=None if term.pointwise is None else operand_of(term.pointwise),
        filter=term.filter if isinstance(term.filter, Average) else operand_of(term.filter),
    )


# --- prepared -----------------------------------------------------------------------------------------------------------


def prepare(backend: Backend, blocks: Sequence[Block], signature: Signature) -> Prepared:
    """Prepare blocks, nested or not."""
    if backend.traceable:  # which computes nested blocks as they are
        return backend.prepare(blocks, signature)
    if all(map(_is_flat, blocks)):
        return _prepare_flat(backend, blocks, signature)
    return _PreparedProgram(backend, program(blocks), signature)


def _prepare_flat(backend: Backend, blocks: Sequence[Block], signature: Signature) -> Prepared:
    prepared, idle = backend.prepare(blocks, signature), _idle_rows(blocks)
    return _WithIdleRows(prepared, idle) if idle else prepared


def _idle_rows(blocks: Sequence[Block]) -> list[tuple[int, int]]:
    """Return the rows of scales that scale nothing, each behind the place of its operand among those of all blocks."""
    rows, place = [], -1
    for block in blocks:
        place += len(block.operands)  # scales are the last operand of their block
        if block.scales is not None:
            used = {term.scale for term in block.terms}
            rows += [(place, row) for row in range(block.scales.shape[0]) if row not in used]
    return rows


class _WithIdleRows(Prepared):
    """Blocks with rows of scales that scale nothing. Kernels write the other rows of the gradient."""

    def __init__(self, prepared: Prepared, idle: Sequence[tuple[int, int]]) -> None:
        self._prepared, self._idle = prepared, idle

    def forward(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        return self._prepared.forward(tensors)

    def backward(
        self, tensors: Sequence[Tensor], upstream: Sequence[Tensor | None], needed: Sequence[bool]
    ) -> Gradients:
        gradients = self._prepared.backward(tensors, upstream, needed)
        for place, row in self._idle:
            gradient = gradients[place]
            if gradient is not None:
                gradient[row].zero_()
        return gradients


class _PreparedProgram(Prepared):
    """One launch per level. Kernels of nested blocks are in the precision of composing; backward recomputes them."""

    def __init__(self, backend: Backend, steps: Program, signature: Signature) -> None:
        self._program, self._device, self._dtype = steps, signature.device, signature.compute_dtype
        layouts: dict[Key, Layout] = dict(zip(steps.inputs, signature.layouts, strict=True))
        inner = replace(signature, dtype=self._dtype, memory_format=torch.channels_last)
        for step in steps.constants:
            layouts[step.output] = Layout.dense(step.block.shape, self._dtype, torch.contiguous_format)
        self._levels = []
        for level in (*steps.inner, steps.last):
            wanted = signature if level is steps.last else inner
            wanted = replace(wanted, layouts=tuple(layouts[key] for step in level for key in step.inputs))
            self._levels.append((level, _prepare_flat(backend, [step.block for step in level], wanted)))
            layouts.update((step.output, inner.kernel(step.block)) for step in level)

    def forward(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        last, prepared = self._levels[-1]
        return prepared.forward(_inputs(last, self._inner_values(tensors)))

    def backward(
        self, tensors: Sequence[Tensor], upstream: Sequence[Tensor | None], needed: Sequence[bool]
    ) -> Gradients:
        values, steps = self._inner_values(tensors), self._program
        wanted = {key for key, need in zip(steps.inputs, needed, strict=True) if need}
        for level in steps.inner:
            wanted |= {step.output for step in level if not wanted.isdisjoint(step.inputs)}
        sums: dict[Key, Tensor] = {s.output: g for s, g in zip(steps.last, upstream, strict=True) if g is not None}
        for level, prepared in reversed(self._levels):
            outputs = [sums.get(step.output) for step in level]
            keys = [(key, step.output in sums) for step in level for key in step.inputs]
            gradients = prepared.backward(_inputs(level, values), outputs, [h and k in wanted for k, h in keys])
            for (key, _), gradient in zip(keys, gradients, strict=True):
                if gradient is not None:
                    sums[key] = sums[key] + gradient if key in sums else gradient
        return [sums.get(key) if need else None for key, need in zip(steps.inputs, needed, strict=True)]

    def _inner_values(self, tensors: Sequence[Tensor]) -> dict[Key, Tensor]:
        """All tensors that the last steps read: operands, and kernels of nested blocks."""
        values: dict[Key, Tensor] = dict(zip(self._program.inputs, tensors, strict=True))
        like = {"": torch.empty(0, dtype=self._dtype, device=self._device)}  # a constant has no operand that would tell
        for step in self._program.constants:
            values[step.output] = reference.squeeze_block(step.block, like).contiguous()
        for level, prepared in self._levels[:-1]:
            kernels = prepared.forward(_inputs(level, values))
            values.update(zip((step.output for step in level), kernels, strict=True))
        return values


def _inputs(level: Sequence[Step], values: dict[Key, Tensor]) -> list[Tensor]:
    return [values[key] for step in level for key in step.inputs]
