"""The plan: what it accepts, what it derives, and that bad shapes are named."""

import pickle

import pytest

from orepa_kernels import Average, Block, Composed, Dense, Operand, PointwiseFilter, Separable


def op(name, *shape):
    return Operand(name, shape)


def test_operands_are_ordered_unique_and_include_nested_blocks():
    inner = Block(6, 4, (3, 3), (Dense(op("stage.w", 6, 2, 3, 3), 0),), groups=2, scales=op("stage.scales", 1, 6))
    block = Block(
        8,
        4,
        (5, 5),
        (Composed(inner, op("second", 8, 3, 3, 3), scale=0), Dense(op("w", 8, 2, 5, 5)), Dense(op("w", 8, 2, 5, 5), 1)),
        groups=2,
        scales=op("scales", 2, 8),
    )
    assert [o.name for o in block.operands] == ["stage.w", "stage.scales", "second", "w", "scales"]
    assert block.shape == (8, 2, 5, 5)


def test_plans_are_values():
    def make(channels):
        return Block(channels, 4, (3, 3), (PointwiseFilter(op("p", channels, 4, 1, 1), Average((3, 3))),))

    assert make(8) == make(8) and hash(make(8)) == hash(make(8))
    assert make(8) != make(6)
    again = pickle.loads(pickle.dumps(make(8)))
    assert again == make(8) and again.operands == make(8).operands


BAD = {
    "groups": (
        lambda: Block(8, 4, (3, 3), (Dense(op("w", 8, 1, 3, 3)),), groups=3),
        "groups=3 must divide in_channels=4",
    ),
    "channels": (lambda: Block(0, 4, (3, 3), (Dense(op("w", 8, 4, 3, 3)),)), "out_channels must be at least 1, got 0"),
    "empty": (lambda: Block(8, 4, (3, 3), ()), "at least one term"),
    "size": (lambda: Block(8, 4, (3, 0), (Dense(op("w", 8, 4, 3, 3)),)), "two positive integers"),
    "weight": (
        lambda: Block(8, 4, (3, 3), (Dense(op("w", 8, 3, 3, 3)),)),
        r"weight must be \[8, 4, \*, \*\], got \[8, 3, 3",
    ),
    "even": (
        lambda: Block(8, 4, (3, 3), (Dense(op("w", 8, 4, 2, 2)),)),
        "2x2 kernel cannot be centred in the block's 3x3",
    ),
    "too large": (lambda: Block(8, 4, (3, 3), (Dense(op("w", 8, 4, 5, 5)),)), "5x5 kernel is larger than"),
    "composed size": (
        lambda: Block(8, 4, (3, 3), (Composed(op("a", 6, 4, 3, 3), op("b", 8, 6, 3, 3)),)),
        "5x5 kernel is larger than",
    ),
    "composed inner": (
        lambda: Block(8, 4, (3, 3), (Composed(op("a", 6, 4, 1, 1), op("b", 8, 5, 3, 3)),)),
        r"second must be \[8, 6, \*, \*\], got \[8, 5",
    ),
    "inner groups": (
        lambda: Block(8, 4, (3, 3), (Composed(op("a", 5, 2, 1, 1), op("b", 8, 2, 3, 3)),), groups=2),
        "groups=2 must divide the 5 internal channels",
    ),
    "identity size": (
        lambda: Block(8, 4, (3, 3), (Composed(op("a", 4, 4, 3, 3), op("b", 8, 4, 1, 1), identity=True),)),
        "identity needs a 1x1 first",
    ),
    "identity channels": (
        lambda: Block(6, 4, (3, 3), (PointwiseFilter(None, Average((1, 1))),)),
        "identity needs in_channels/groups=4 to divide",
    ),
    "filter": (
        lambda: Block(8, 4, (3, 3), (PointwiseFilter(op("p", 8, 4, 1, 1), op("f", 3, 3, 3)),)),
        r"filter must be \[1 or 8, \*, \*\], got \[3, 3, 3\]",
    ),
    "depthwise": (
        lambda: Block(8, 4, (3, 3), (Separable(op("d", 6, 1, 3, 3), op("p", 8, 6, 1, 1)),)),
        "depthwise has 6 rows, no multiple of in_channels=4",
    ),
    "depthwise alone": (
        lambda: Block(8, 4, (3, 3), (Separable(op("d", 4, 1, 3, 3), None),)),
        "depthwise needs 8 rows, got 4",
    ),
    "scale row": (
        lambda: Block(8, 4, (3, 3), (Dense(op("w", 8, 4, 3, 3), 2),), scales=op("s", 2, 8)),
        "scale=2 is no row of scales, which has 2",
    ),
    "two terms in a row": (
        lambda: Block(
            8, 4, (3, 3), (Dense(op("w", 8, 4, 3, 3), 0), Dense(op("v", 8, 4, 3, 3), 0)), scales=op("s", 1, 8)
        ),
        r"a row of scales must scale at most one term; the terms name \[0, 0\]",
    ),
    "no scales": (
        lambda: Block(8, 4, (3, 3), (Dense(op("w", 8, 4, 3, 3), 0),)),
        "scale=0 is no row of scales, which has 0",
    ),
    "scales": (
        lambda: Block(8, 4, (3, 3), (Dense(op("w", 8, 4, 3, 3), 0),), scales=op("s", 2, 4)),
        r"scales must be \[branches, 8\]",
    ),
    "two shapes": (
        lambda: Block(8, 4, (3, 3), (Dense(op("w", 8, 4, 3, 3)), Dense(op("w", 8, 4, 1, 1)))),
        "operand 'w' is used with two shapes",
    ),
    "nested groups": (
        lambda: Block(8, 4, (3, 3), (Dense(Block(8, 2, (3, 3), (Dense(op("w", 8, 2, 3, 3)),))),), groups=2),
        "weight has groups=1, the block has groups=2",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_what_does_not_fit_is_refused_and_named(case):
    build, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        build()
