"""Draw the two stages of OREPA, linearize and squeeze, for a block of the catalogue: ``python two_stages.py``.

The branches come from the block's declaration, so the figure shows what the package does. The SVG has no date, so a test can
compare the committed file with a new drawing.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

from orepa.topology.catalogue import dbb
from orepa.topology.language import AvgPool, Branch, Conv, ConvSpec, Layer, Norm, Topology

OUTPUT = Path(__file__).with_suffix(".svg")
SPEC = ConvSpec(in_channels=64, out_channels=64, kernel_size=(3, 3))

BOX, HIGH, GAP, COLUMN = 88, 26, 12, 98  # width and height of a box, space between boxes, distance between branches
TOP = 96  # upper edge of the branches
LINES = 4  # boxes in the longest branch
FILL = {"conv": "#cfe2f3", "pool": "#d9ead3", "norm": "#f4cccc", "scale": "#fff2cc", "kernel": "#e6e0ec"}
INK = "#222222"


class Canvas:
    """Collect SVG elements in drawing order."""

    def __init__(self) -> None:
        self.elements: list[str] = []

    def box(self, x: float, y: float, text: str, kind: str, width: float = BOX) -> None:
        """Draw a box with its label; ``x`` is the middle, ``y`` the upper edge."""
        self.elements.append(
            f'<rect x="{x - width / 2:g}" y="{y:g}" width="{width:g}" height="{HIGH}" rx="4" fill="{FILL[kind]}" '
            f'stroke="{INK}"/>'
        )
        self.text(x, y + 17, text)

    def text(self, x: float, y: float, text: str, size: int = 12, weight: str = "normal") -> None:
        """Draw a line of text, centred at ``x`` on the baseline ``y``."""
        self.elements.append(
            f'<text x="{x:g}" y="{y:g}" font-size="{size}" font-weight="{weight}" text-anchor="middle">{escape(text)}</text>'
        )

    def arrow(self, *points: tuple[float, float]) -> None:
        """Draw a line through the points, with an arrowhead at its end."""
        path = " ".join(f"{x:g},{y:g}" for x, y in points)
        self.elements.append(f'<polyline points="{path}" fill="none" stroke="{INK}" marker-end="url(#head)"/>')

    def plus(self, x: float, y: float) -> None:
        """Draw a plus sign in a circle at ``(x, y)``."""
        self.elements.append(f'<circle cx="{x:g}" cy="{y:g}" r="11" fill="#ffffff" stroke="{INK}"/>')
        self.text(x, y + 5, "+", 16)

    def svg(self, width: float, height: float) -> str:
        """Return the file."""
        title = "From a block with norms in its branches to a linear block to one kernel"
        return "\n".join(
            [
                f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" role="img" '
                f'font-family="Helvetica, Arial, sans-serif" fill="{INK}">',
                f"<title>{title}</title>",
                '<defs><marker id="head" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
                f'<path d="M0,0 L8,4 L0,8 z" fill="{INK}"/></marker></defs>',
                f'<rect width="{width:g}" height="{height:g}" fill="#ffffff"/>',
                *self.elements,
                "</svg>\n",
            ]
        )


def label(layer: Layer) -> tuple[str, str]:
    """Return the label of a layer's box, and its kind."""
    if isinstance(layer, Norm):
        return "norm", "norm"
    if not isinstance(layer, Conv | AvgPool):
        raise TypeError(f"the figure knows convolutions, average pooling and norms, got {layer}")
    size = layer.kernel_size if isinstance(layer.kernel_size, tuple) else (layer.kernel_size, layer.kernel_size)
    text = "×".join(map(str, size))
    return (f"conv {text}", "conv") if isinstance(layer, Conv) else (f"average {text}", "pool")


def draw_block(canvas: Canvas, middle: float, branches: Sequence[Branch], scaled: bool) -> float:
    """Draw branches on feature maps and their sum; return the height of the sum."""
    first = middle - COLUMN * (len(branches) - 1) / 2
    fork, end = TOP - 22, TOP + LINES * (HIGH + GAP)
    canvas.text(middle, TOP - 32, "x")
    sum_at = end + 22
    for index, branch in enumerate(branches):
        x, y = first + index * COLUMN, TOP
        boxes = [label(layer) for layer in branch.layers]
        if scaled:
            boxes.append((f"scale s{'₁₂₃₄'[index]}", "scale"))
        canvas.arrow((middle, fork - 4), (middle, fork + 4), (x, fork + 4), (x, y))
        for number, (text, kind) in enumerate(boxes):
            if number:
                canvas.arrow((x, y - GAP), (x, y))
            canvas.box(x, y, text, kind)
            y += HIGH + GAP
        if x == middle:
            canvas.arrow((x, y - GAP), (x, sum_at - 11))
        else:
            canvas.arrow((x, y - GAP), (x, sum_at), (middle + (11 if x > middle else -11), sum_at))
    canvas.plus(middle, sum_at)
    return sum_at


def draw(topology: Topology) -> str:
    """Return the figure as SVG: the block as published, linearized, and squeezed."""
    canvas = Canvas()
    published = [branch for _, branch in topology.offline()]
    linear = [branch for _, branch in topology.linearize()]
    width = COLUMN * len(linear) + 34
    one, two, three = (width * (i + 0.5) for i in range(3))

    convs = sum(not isinstance(layer, Norm) for branch in linear for layer in branch.layers)
    captions = (
        (one, "As published", f"{convs} layers and their norms on feature maps"),
        (two, "1. Linearize", "scalings in the branches, one norm after the sum"),
        (three, "2. Squeeze, at every training step", "branches on kernels, one convolution on feature maps"),
    )
    for x, title, subtitle in captions:
        canvas.text(x, 22, title, 15, "bold")
        canvas.text(x, 41, subtitle)

    sum_at = draw_block(canvas, one, published, scaled=False)
    canvas.arrow((one, sum_at + 11), (one, sum_at + 70))
    canvas.text(one, sum_at + 85, "y")

    draw_block(canvas, two, linear, scaled=True)
    canvas.arrow((two, sum_at + 11), (two, sum_at + 28))
    canvas.box(two, sum_at + 28, "norm", "norm")
    canvas.arrow((two, sum_at + 28 + HIGH), (two, sum_at + 70))
    canvas.text(two, sum_at + 85, "y")

    # The third panel: kernels above, feature maps in one row below.
    first, kernel_sum = three - COLUMN * (len(linear) - 1) / 2, TOP + 66
    for index in range(len(linear)):
        x, n = first + index * COLUMN, "₁₂₃₄"[index]
        canvas.box(x, TOP, f"s{n} · K{n}", "kernel")
        canvas.arrow((x, TOP + HIGH), (x, kernel_sum), (three + (11 if x > three else -11), kernel_sum))
    canvas.text(three, TOP - 14, "one kernel per branch, centred and scaled: [O, I/g, 3, 3]")
    canvas.plus(three, kernel_sum)
    conv_at = sum_at - 11
    canvas.arrow((three, kernel_sum + 11), (three, conv_at))
    canvas.text(three + 14, (kernel_sum + conv_at) / 2 + 6, "W", 14)
    canvas.box(three, conv_at, "conv 3×3", "conv")
    canvas.text(three - 128, conv_at + 17, "x")
    canvas.arrow((three - 120, conv_at + HIGH / 2), (three - BOX / 2, conv_at + HIGH / 2))
    canvas.arrow((three, conv_at + HIGH), (three, sum_at + 28))
    canvas.box(three, sum_at + 28, "norm", "norm")
    canvas.arrow((three, sum_at + 28 + HIGH), (three, sum_at + 70))
    canvas.text(three, sum_at + 85, "y")

    for x in (width, 2 * width):
        canvas.elements.append(
            f'<line x1="{x:g}" y1="12" x2="{x:g}" y2="{sum_at + 88:g}" stroke="#bbbbbb" stroke-dasharray="4 4"/>'
        )
    return canvas.svg(3 * width, sum_at + 100)


def main() -> None:
    """Write the figure beside this file."""
    OUTPUT.write_text(draw(dbb(SPEC)), encoding="utf-8")


if __name__ == "__main__":
    main()
