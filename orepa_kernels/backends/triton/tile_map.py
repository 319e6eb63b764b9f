"""The tables that a launch reads: sizes and strides of its blocks, and who computes which tile. Plain integers.

A launch over many blocks is one list of tiles, those that take longest first, so that the last ones to run are short.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import product

from torch import Tensor

from ...plan import Block
from .configs import Backward, Forward
from .spec import Spec, Term, strides

#: words of a row of the tile map
TILE_WORDS = 8
#: steps of a split sum that one program takes at most
_LONGEST_SUM = 48
#: words per term: internal channels, then where the parts of three sums begin in the workspace
_SCALE, _FACTOR, _FILTER = 1, 2, 3

SECOND, FIRST, SEPARABLE, ELEMENTWISE = 0, 1, 2, -1


def _tiles(size: int, tile: int) -> int:
    return -(-size // tile)


@dataclass(frozen=True)
class Sizes:
    """Channels of a block."""

    groups: int
    out: int
    out_per_group: int
    in_per_group: int

    @classmethod
    def of(cls, block: Block) -> Sizes:
        groups = block.groups
        return cls(groups, block.out_channels, block.out_channels // groups, block.in_channels // groups)


def internal_channels(spec: Spec, term: Term, operands: Sequence[Tensor], groups: int) -> int:
    """Internal channels per group of a composed term."""
    return operands[term.first].shape[0] // groups if term.kind == "composed" else 0


def block_words(
    block: Block, spec: Spec, tensors: Sequence[Tensor], places: Sequence[Sequence[int]] | None = None
) -> list[int]:
    """A block's row of the table: sizes, per term its internal channels and ``places``, per tensor its strides."""
    sizes = Sizes.of(block)
    words = [sizes.groups, sizes.out_per_group, sizes.in_per_group]
    for index, term in enumerate(spec.terms):
        begin = (0, 0, 0) if places is None else places[index]
        words += [internal_channels(spec, term, tensors, sizes.groups), *begin]
    for tensor in tensors:
        words += strides(tensor)
    return words


def forward_tiles(
    blocks: Sequence[Block], spec: Spec, tensors: Sequence[Sequence[Tensor]], config: Forward
) -> list[int]:
    """Rows of (block, -, group, o tile, i tile, tap tile, -, -); neighbours share their output channels' factors."""
    taps = _tiles(spec.height * spec.width, config.TAPS)
    work: list[tuple[int, tuple[int, ...]]] = []
    for index, (block, own) in enumerate(zip(blocks, tensors, strict=True)):
        sizes = Sizes.of(block)
        cost = 1 + sum(internal_channels(spec, term, own, sizes.groups) for term in spec.terms)
        grid = (sizes.groups, _tiles(sizes.out_per_group, config.BO), taps, _tiles(sizes.in_per_group, config.BI))
        for group, o, tap, i in product(*map(range, grid)):
            work.append((cost, (index, 0, group, o, i, tap, 0, 0)))
    return _longest_first(work)


def _longest_first(work: list[tuple[int, tuple[int, ...]]]) -> list[int]:
    return [word for _, row in sorted(work, key=lambda item: -item[0]) for word in row]


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
        """Rows of (job, tile of ``count`` elements), those with most parts first."""
        order = sorted(range(len(self.jobs)), key=lambda number: -self.jobs[number][3])
        return [word for job in order for tile in range(_tiles(self.jobs[job][5], count)) for word in (job, tile)]


def backward_tables(
    blocks: Sequence[Block], spec: Spec, tensors: Sequence[Sequence[Tensor]], config: Backward
) -> BackwardTables:
    """The tables of blocks of one structure; ``tensors`` per block as the spec's slots."""
    tables = BackwardTables()
    work: list[tuple[int, tuple[int, ...]]] = []
    for index, (block, own) in enumerate(zip(blocks, tensors, strict=True)):
        layout = _Layout(tables, index, block, spec, own, config)
        work += layout.tiles()
        tables.words += block_words(block, spec, own, layout.places)
    tables.tiles = _longest_first(work)
    return tables


class _Layout:
    """One block: its tiles, and where the parts of its sums lie."""

    def __init__(
        self, tables: BackwardTables, index: int, block: Block, spec: Spec, tensors: Sequence[Tensor], config: Backward
    ) -> None:
        self.tables, self.index, self.spec, self.tensors, self.config = tables, index, spec, tensors, config
        self.sizes = Sizes.of(block)
        self.places = [[0, 0, 0] for _ in spec.terms]
        self._scales()
        for number, term in enumerate(spec.terms):
            self._factors(number, term)

    def _grids(self, number: int, term: Term) -> dict[int, tuple[int, int, int]]:
        """Per role that serves a term: how many tiles along its three coordinates (per group)."""
        sizes, config, spec = self.sizes, self.config, self.spec
        scaled = spec.d_scales >= 0 and term.scale >= 0
        grids = {}
        if term.kind == "composed":
            internal = internal_channels(spec, term, self.tensors, sizes.groups)
            if scaled or term.d_second >= 0:
                taps = _tiles(term.height2 * term.width2, config.TAPS)
                grids[SECOND] = (_tiles(sizes.out_per_group, config.BO), _tiles(internal, config.BM), taps)
            if term.d_first >= 0:
                taps = term.height1 * term.width1
                grids[FIRST] = (_tiles(internal, config.FM), _tiles(sizes.in_per_group, config.FI), taps)
        elif term.kind == "separable":
            if scaled or term.wanted:
                columns = sizes.in_per_group * term.expand
                grids[SEPARABLE] = (_tiles(sizes.out_per_group, config.ROWS), _tiles(columns, config.SC), 1)
        elif scaled or term.wanted:
            grids[ELEMENTWISE] = (
                _tiles(sizes.out_per_group, config.EO),
                _tiles(sizes.in_per_group, config.EI),
                1,
            )
        return grids

    def _slices(self, term: Term) -> int:
        """Into how many parts the sum over output channels is cut that gives ``first``'s gradient."""
        blocks = _tiles(self.sizes.out_per_group, self.config.FO)
        return min(blocks, _tiles(blocks * term.height2 * term.width2, _LONGEST_SUM))

    def tiles(self) -> Iterator[tuple[int, tuple[int, ...]]]:
        """(cost, row of the tile map), for every tile."""
        elementwise: tuple[int, int, int] | None = None
        for number, term in enumerate(self.spec.terms):
            grids = self._grids(number, term)
            elementwise = grids.get(ELEMENTWISE, elementwise)
            if SECOND in grids:
                yield from self._second_tiles(number, term, grids[SECOND])
            if FIRST in grids:
                yield from self._first_tiles(number, term, grids[FIRST])
            if SEPARABLE in grids:
                cost = self.config.ROWS // self.config.SO * term.height * term.width
                yield from self._plane_tiles(cost, 3 * number + SEPARABLE, grids[SEPARABLE])
        if elementwise is not None:
            cost = self.spec.height * self.spec.width * len(self.spec.terms)
            yield from self._plane_tiles(cost, ELEMENTWISE, elementwise)

    def _second_tiles(
        self, number: int, term: Term, grid: tuple[int, int, int]
    ) -> Iterator[tuple[int, tuple[int, ...]]]:
        steps = _tiles(self.sizes.in_per_group, self.config.BI) * term.height1 * term.width1
        coordinates = product(range(self.sizes.groups), *map(range, grid))
        for serial, (group, o, m, q) in enumerate(coordinates):
            row = (self.index, 3 * number + SECOND, group, o, m, q, m * grid[2] + q, serial)
            yield 4 * steps * self.config.TAPS, row

    def _first_tiles(
        self, number: int, term: Term, grid: tuple[int, int, int]
    ) -> Iterator[tuple[int, tuple[int, ...]]]:
        slices = self._slices(term)
        steps = _tiles(self.sizes.out_per_group, self.config.FO) * term.height2 * term.width2 // slices
        for group, part, m, i, r in product(range(self.sizes.groups), range(slices), *map(range, grid)):
            yield 4 * steps, (self.index, 3 * number + FIRST, group, m, i, r, part, slices)

    def _plane_tiles(self, cost: int, role: int, grid: tuple[int, int, int]) -> Iterator[tuple[int, tuple[int, ...]]]:
        for serial, (group, a, b) in enumerate(product(range(self.sizes.groups), range(grid[0]), range(grid[1]))):
            yield cost, (self.index, role, group, a, b, 0, b, serial)

    def _reserve(self, elements: int) -> int:
        begin = self.tables.workspace
        self.tables.workspace += elements
        return begin

    def _scales(self) -> None:
        """Parts of the scales' gradients: [part, O] per row (vector) or [part] (scalar), of all terms with that row."""
        spec, slot = self.spec, self.spec.d_scales
        if slot < 0:
            return
        gradient = self.tensors[slot]
        row_step, step = gradient.stride()
        width = 1 if spec.scalar else self.sizes.out
        for row in range(gradient.shape[0]):
            begin, parts = self.tables.workspace, 0
            for number, term in enumerate(spec.terms):
                if term.scale != row:
                    continue
                grids = self._grids(number, term)
                grid = next(grids[role] for role in (SECOND, SEPARABLE, ELEMENTWISE) if role in grids)
                own = self.sizes.groups * grid[0] * grid[1] * grid[2] if spec.scalar else grid[1] * grid[2]
                self.places[number][_SCALE - 1] = self._reserve(own * width)
                parts += own
            # A row that no term uses is a job without parts: its gradient is zero.
            self._job(slot, begin, parts, width, width, 1, 1, row * row_step, (step, 0, 0, 0))

    def _factors(self, number: int, term: Term) -> None:
        """Parts of the gradients of ``first``, ``depthwise`` and ``filter``."""
        sizes, grids, place = self.sizes, self._grids(number, term), self.places[number]
        if term.kind == "composed" and term.d_first >= 0:
            rows = sizes.groups * internal_channels(self.spec, term, self.tensors, sizes.groups)
            parts, columns = self._slices(term), sizes.in_per_group
            place[_FACTOR - 1] = self._sum(term.d_first, parts, rows, columns, term.height1, term.width1)
        if term.kind == "separable" and term.d_depthwise >= 0:
            rows, parts = sizes.groups * sizes.in_per_group * term.expand, grids[SEPARABLE][0]
            place[_FACTOR - 1] = self._sum(term.d_depthwise, parts, rows, 1, term.height, term.width)
        if term.kind == "pointwise" and term.d_filter >= 0:
            across, along, _ = grids[ELEMENTWISE]
            if term.filter_rows:
                parts, rows = along, sizes.out
            else:
                parts, rows = sizes.groups * across * along, 1
            place[_FILTER - 1] = self._sum(term.d_filter, parts, rows, 1, term.height, term.width)

    def _sum(self, slot: int, parts: int, rows: int, columns: int, height: int, width: int) -> int:
        elements = height * width * rows * columns
        begin = self._reserve(parts * elements)
        self._job(slot, begin, parts, elements, rows * columns, columns, width, 0, strides(self.tensors[slot]))
        return begin

    def _job(
        self, slot: int, begin: int, parts: int, elements: int, plane: int, columns: int, width: int, offset: int,
        steps: tuple[int, int, int, int],
    ) -> None:  # fmt: skip
        job = [self.index, slot, begin, parts, elements, elements, plane, columns, width, offset, *steps, 0, 0]
        self.tables.jobs.append(job)
