"""The tables that a launch reads: sizes and strides of its blocks, and which program computes which tile. Plain integers.

A launch over many blocks is one list of tiles, the longest first, so that the last ones to run are short.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import product
from math import prod

from torch import Tensor

from ...plan import Block
from .configs import Backward, Forward
from .spec import Spec, Term, strides

#: words of a row of the tile map
TILE_WORDS = 8
#: most steps of a split sum that one program takes
_LONGEST_SUM = 48

#: roles of a backward program, see `kernels.backward`
SECOND, FIRST, SEPARABLE, ELEMENTWISE = 0, 1, 2, -1
#: which of a term's three offsets in the workspace: of its scale, of ``first`` or ``depthwise``, of ``filter``
_SCALE, _FACTOR, _FILTER = 0, 1, 2

#: how many tiles there are along the three coordinates of a role, per group
Grid = tuple[int, int, int]
#: what a program costs, and its row of the tile map
Task = tuple[int, tuple[int, ...]]


def _tiles(size: int, tile: int) -> int:
    return -(-size // tile)


def _internal_channels(term: Term, tensors: Sequence[Tensor], groups: int) -> int:
    """Return the internal channels per group of a composed term, and 0 for others."""
    return tensors[term.first].shape[0] // groups if term.kind == "composed" else 0


def _longest_first(tasks: list[Task]) -> list[int]:
    return [word for _, row in sorted(tasks, key=lambda task: -task[0]) for word in row]


def block_words(
    block: Block, spec: Spec, tensors: Sequence[Tensor], offsets: Sequence[Sequence[int]] | None = None
) -> list[int]:
    """Return a block's row of the table: sizes, each term's internal channels and ``offsets``, each tensor's strides."""
    groups = block.groups
    words = [groups, block.out_channels // groups, block.in_channels // groups]
    for index, term in enumerate(spec.terms):
        words += [_internal_channels(term, tensors, groups), *((0, 0, 0) if offsets is None else offsets[index])]
    for tensor in tensors:
        words += strides(tensor)
    return words


def forward_tiles(
    blocks: Sequence[Block], spec: Spec, tensors: Sequence[Sequence[Tensor]], config: Forward
) -> list[int]:
    """Return rows of (block, -, group, o tile, i tile, tap tile, -, -); neighbours share their output channels' factors."""
    taps = _tiles(spec.height * spec.width, config.TAPS)
    tasks: list[Task] = []
    for index, (block, operands) in enumerate(zip(blocks, tensors, strict=True)):
        groups, out, per_group, *_ = block.groups, *block.shape
        cost = 1 + sum(_internal_channels(term, operands, groups) for term in spec.terms)
        grid = (groups, _tiles(out // groups, config.BO), taps, _tiles(per_group, config.BI))
        for group, o, tap, i in product(*map(range, grid)):
            tasks.append((cost, (index, 0, group, o, i, tap, 0, 0)))
    return _longest_first(tasks)


@dataclass
class BackwardTables:
    """What the two backward launches read.

    Args:
        words: the table of blocks.
        tiles: the tile map of the first launch.
        jobs: what the second launch adds, see `sums.add_parts`.
        workspace: its float32 elements.
    """

    words: list[int] = field(default_factory=list)
    tiles: list[int] = field(default_factory=list)
    jobs: list[list[int]] = field(default_factory=list)
    workspace: int = 0

    def sum_tiles(self, count: int) -> list[int]:
        """Return rows of (job, tile of ``count`` elements), those with most parts first."""
        order = sorted(range(len(self.jobs)), key=lambda number: -self.jobs[number][3])
        return [word for job in order for tile in range(_tiles(self.jobs[job][5], count)) for word in (job, tile)]


def backward_tables(
    blocks: Sequence[Block], spec: Spec, tensors: Sequence[Sequence[Tensor]], config: Backward
) -> BackwardTables:
    """Return the tables of blocks of one structure; ``tensors`` has each block's in the order of the spec's slots."""
    tables = BackwardTables()
    tasks: list[Task] = []
    for index, (block, slots) in enumerate(zip(blocks, tensors, strict=True)):
        layout = _Layout(tables, index, block, spec, slots, config)
        tasks += layout.tasks()
        tables.words += block_words(block, spec, slots, layout.offsets)
    tables.tiles = _longest_first(tasks)
    return tables


class _Layout:
    """One block: its programs, and where the parts of its sums lie in the workspace."""

    def __init__(
        self, tables: BackwardTables, index: int, block: Block, spec: Spec, tensors: Sequence[Tensor], config: Backward
    ) -> None:
        self.tables, self.index, self.spec, self.tensors, self.config = tables, index, spec, tensors, config
        self.groups, self.out = block.groups, block.out_channels
        self.out_per_group, self.in_per_group = self.out // self.groups, block.in_channels // self.groups
        self.grids = [self._grids(term) for term in spec.terms]
        self.offsets = [[0, 0, 0] for _ in spec.terms]
        if spec.d_scales >= 0:
            self._scales(tensors[spec.d_scales])
        for term, grids, offsets in zip(spec.terms, self.grids, self.offsets, strict=True):
            self._factors(term, grids, offsets)

    def _grids(self, term: Term) -> dict[int, Grid]:
        """Return the grid of each role that serves a term."""
        config, grids, out, inputs = self.config, {}, self.out_per_group, self.in_per_group
        if term.kind == "composed":
            internal = _internal_channels(term, self.tensors, self.groups)
            if term.d_second >= 0 or self.spec.needs_scale_gradient(term):
                taps = _tiles(term.height2 * term.width2, config.TAPS)
                grids[SECOND] = (_tiles(out, config.BO), _tiles(internal, config.BM), taps)
            if term.d_first >= 0:
                grids[FIRST] = (_tiles(internal, config.FM), _tiles(inputs, config.FI), term.height1 * term.width1)
        elif self.spec.needs_gradient(term):
            if term.kind == "separable":
                grids[SEPARABLE] = (_tiles(out, config.ROWS), _tiles(inputs * term.expand, config.SC), 1)
            else:
                grids[ELEMENTWISE] = (_tiles(out, config.EO), _tiles(inputs, config.EI), 1)
        return grids

    def _slices(self, term: Term) -> int:
        """Return into how many parts the sum over output channels is cut that gives ``first``'s gradient."""
        tiles = _tiles(self.out_per_group, self.config.FO)
        return min(tiles, _tiles(tiles * term.height2 * term.width2, _LONGEST_SUM))

    def tasks(self) -> Iterator[Task]:
        """Yield every program of the first launch."""
        config, elementwise = self.config, None
        for number, (term, grids) in enumerate(zip(self.spec.terms, self.grids, strict=True)):
            elementwise = grids.get(ELEMENTWISE, elementwise)
            if SECOND in grids:
                steps = _tiles(self.in_per_group, config.BI) * term.height1 * term.width1
                yield from self._role_tasks(4 * steps * config.TAPS, 3 * number + SECOND, grids[SECOND])
            if FIRST in grids:
                slices = self._slices(term)
                steps = _tiles(self.out_per_group, config.FO) * term.height2 * term.width2 // slices
                for group, part, m, i, r in product(range(self.groups), range(slices), *map(range, grids[FIRST])):
                    yield 4 * steps, (self.index, 3 * number + FIRST, group, m, i, r, part, slices)
            if SEPARABLE in grids:
                cost = config.ROWS // config.SO * term.height * term.width
                yield from self._role_tasks(cost, 3 * number + SEPARABLE, grids[SEPARABLE])
        if elementwise is not None:  # one role for all these terms
            cost = self.spec.height * self.spec.width * len(self.spec.terms)
            yield from self._role_tasks(cost, ELEMENTWISE, elementwise)

    def _role_tasks(self, cost: int, role: int, grid: Grid) -> Iterator[Task]:
        for serial, (group, a, b, c) in enumerate(product(range(self.groups), *map(range, grid))):
            yield cost, (self.index, role, group, a, b, c, b * grid[2] + c, serial)

    def _scales(self, gradient: Tensor) -> None:
        """Lay out the parts of the scales' gradients: per row [part, O] (vector) or [part] (scalar), of all terms with it."""
        row_step, step = gradient.stride()
        width = 1 if self.spec.scalar else self.out
        for row in range(gradient.shape[0]):
            begin, parts = self.tables.workspace, 0
            for term, grids, offsets in zip(self.spec.terms, self.grids, self.offsets, strict=True):
                if term.scale == row:
                    grid = next(grids[role] for role in (SECOND, SEPARABLE, ELEMENTWISE) if role in grids)
                    own = self.groups * prod(grid) if self.spec.scalar else prod(grid[1:])
                    offsets[_SCALE] = self._reserve(own * width)
                    parts += own
            # A row that no term uses is a job without parts: its gradient is zero.
            self._job(self.spec.d_scales, begin, parts, width, width, 1, 1, row * row_step, (step, 0, 0, 0))

    def _factors(self, term: Term, grids: dict[int, Grid], offsets: list[int]) -> None:
        """Lay out the parts of the gradients of ``first``, ``depthwise`` and ``filter``."""
        if term.kind == "composed" and term.d_first >= 0:
            rows, size = self.tensors[term.first].shape[0], (term.height1, term.width1)
            offsets[_FACTOR] = self._sum(term.d_first, self._slices(term), rows, self.in_per_group, size)
        size = (term.height, term.width)
        if term.kind == "separable" and term.d_depthwise >= 0:
            rows, parts = self.groups * self.in_per_group * term.expand, grids[SEPARABLE][0]
            offsets[_FACTOR] = self._sum(term.d_depthwise, parts, rows, 1, size)
        if term.kind == "pointwise" and term.d_filter >= 0:
            across, along, _ = grids[ELEMENTWISE]
            parts, rows = (along, self.out) if term.filter_rows else (self.groups * across * along, 1)
            offsets[_FILTER] = self._sum(term.d_filter, parts, rows, 1, size)

    def _reserve(self, elements: int) -> int:
        begin = self.tables.workspace
        self.tables.workspace += elements
        return begin

    def _sum(self, slot: int, parts: int, rows: int, columns: int, size: tuple[int, int]) -> int:
        elements = prod(size) * rows * columns
        begin = self._reserve(parts * elements)
        self._job(slot, begin, parts, elements, rows * columns, columns, size[1], 0, strides(self.tensors[slot]))
        return begin

    def _job(
        self, slot: int, begin: int, parts: int, elements: int, plane: int, columns: int, width: int, offset: int,
        steps: tuple[int, int, int, int],
    ) -> None:  # fmt: skip
        job = [self.index, slot, begin, parts, elements, elements, plane, columns, width, offset, *steps, 0, 0]
        self.tables.jobs.append(job)
