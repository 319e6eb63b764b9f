"""The rows of the ablation, and how they stand in the tables of the paper (Tables 1 to 3). Plain data."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

from orepa.bench.variants import PLAIN

#: the benchmark's name, and the modes of its rows: a whole training, a step of it
BENCHMARK, TRAIN, STEP = "ablation", "train", "step"
FULL = "rep1x1"


@dataclass(frozen=True)
class Table:
    """Rows as the paper shows them.

    Args:
        title: of the table.
        rows: name of a variant, and what the row says.
        base: the variant that differences refer to.
        cumulative: whether each row adds something to the one before, so that this difference is of interest too.
    """

    title: str
    rows: tuple[tuple[str, str], ...]
    base: str
    cumulative: bool = False

    def pairs(self) -> Iterator[tuple[str, str]]:
        """The comparisons that the table makes: a variant, and what it is compared with."""
        names = [name for name, _ in self.rows]
        yield from ((name, self.base) for name in names if name != self.base)
        if self.cumulative:
            yield from ((name, before) for before, name in pairwise(names) if before != self.base)


TABLES = (
    Table(
        "Branch-wise norms (paper Table 1)",
        (
            (PLAIN, "plain"),
            ("dbb-offline", "DBB"),
            ("dbb-no-branch-norm", "DBB, one norm after the sum"),
            ("repvgg-offline", "RepVGG"),
            ("repvgg-no-branch-norm", "RepVGG, one norm after the sum"),
        ),
        PLAIN,
    ),
    Table(
        "Components (paper Table 2)",
        (
            (PLAIN, "plain"),
            ("dbb-offline", "offline DBB"),
            ("dbb-online", "online: linear scaling for norms"),
            ("prior", "+ frequency prior filter"),
            ("dws", "+ linear depthwise separable"),
            ("stem", "+ linear deep stem"),
            (FULL, "+ Rep-1×1: all of OREPA"),
        ),
        PLAIN,
        cumulative=True,
    ),
    Table(
        "Linearization (paper Table 3)",
        (
            (FULL, "vector scaling: all of OREPA"),
            ("scalar", "scalar scaling"),
            ("no-scaling", "without scaling"),
            ("no-norm", "without post-addition norm"),
            ("plain-no-norm", "plain, without norms (not in the paper)"),
        ),
        FULL,
    ),
)
