"""List the rows of the ablation as in the paper's Tables 1 to 3: plain data."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

from orepa.bench.variants import PLAIN

#: the benchmark's name, and the modes of its rows: a whole training, a step of it
BENCHMARK, TRAIN, STEP = "ablation", "train", "step"
FULL = "rep1x1"


@dataclass(frozen=True)
class PaperTable:
    """Rows as the paper shows them.

    Args:
        title: of the table.
        rows: name of a variant, and what the row says.
        base: the variant that differences refer to.
        cumulative: whether each row adds something to the one before, which it is compared with too.
    """

    title: str
    rows: tuple[tuple[str, str], ...]
    base: str
    cumulative: bool = False

    def pairs(self) -> Iterator[tuple[str, str]]:
        """Yield the comparisons that the table makes: a variant, and what it is compared with."""
        names = [name for name, _ in self.rows]
        yield from ((name, self.base) for name in names if name != self.base)
        if self.cumulative:
            yield from ((name, before) for before, name in pairwise(names) if before != self.base)


TABLES = (
    PaperTable(
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
    PaperTable(
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
    PaperTable(
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
