"""Which blocks to measure: the distinct convolutions of well-known models, and shapes that the user names."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ..errors import UserError
from ..modules.orepa_conv import default_topology


@dataclass(frozen=True, order=True)
class Shape:
    """The convolution that a block stands for: ``[O, I/g, k, k]``."""

    out_channels: int
    in_channels: int
    kernel_size: int
    groups: int = 1

    @property
    def topology(self) -> str:
        """The block that `orepa.prepare` puts there by default."""
        return default_topology((self.kernel_size, self.kernel_size))

    @property
    def elements(self) -> int:
        """Number of elements of the kernel."""
        return self.out_channels * self.in_channels // self.groups * self.kernel_size**2

    def __str__(self) -> str:
        text = f"{self.in_channels}->{self.out_channels} {self.kernel_size}x{self.kernel_size}"
        return text if self.groups == 1 else f"{text} g{self.groups}"


def _shapes(*rows: tuple[int, ...]) -> tuple[Shape, ...]:
    return tuple(Shape(*row) for row in rows)


#: The distinct convolutions of timm's models that a norm follows, in the model's order: O, I, k, g.
MODELS: dict[str, tuple[Shape, ...]] = {
    "resnet18": _shapes(
        (64, 3, 7),
        (64, 64, 3),
        (128, 64, 3),
        (128, 128, 3),
        (128, 64, 1),
        (256, 128, 3),
        (256, 256, 3),
        (256, 128, 1),
        (512, 256, 3),
        (512, 512, 3),
        (512, 256, 1),
    ),
    "resnet50": _shapes(
        (64, 3, 7),
        (64, 64, 1),
        (64, 64, 3),
        (256, 64, 1),
        (64, 256, 1),
        (128, 256, 1),
        (128, 128, 3),
        (512, 128, 1),
        (512, 256, 1),
        (128, 512, 1),
        (256, 512, 1),
        (256, 256, 3),
        (1024, 256, 1),
        (1024, 512, 1),
        (256, 1024, 1),
        (512, 1024, 1),
        (512, 512, 3),
        (2048, 512, 1),
        (2048, 1024, 1),
        (512, 2048, 1),
    ),
    "resnext50_32x4d": _shapes(
        (64, 3, 7),
        (128, 64, 1),
        (128, 128, 3, 32),
        (256, 128, 1),
        (256, 64, 1),
        (128, 256, 1),
        (256, 256, 1),
        (256, 256, 3, 32),
        (512, 256, 1),
        (256, 512, 1),
        (512, 512, 1),
        (512, 512, 3, 32),
        (1024, 512, 1),
        (512, 1024, 1),
        (1024, 1024, 1),
        (1024, 1024, 3, 32),
        (2048, 1024, 1),
        (1024, 2048, 1),
    ),
    "repvgg_a0": _shapes(
        (48, 3, 3),
        (48, 3, 1),
        (48, 48, 3),
        (48, 48, 1),
        (96, 48, 3),
        (96, 48, 1),
        (96, 96, 3),
        (96, 96, 1),
        (192, 96, 3),
        (192, 96, 1),
        (192, 192, 3),
        (192, 192, 1),
        (1280, 192, 3),
        (1280, 192, 1),
    ),
}

#: what is measured when nothing is named: the 3x3 block over the widths of a ResNet
DEFAULT = _shapes(*((c, c, 3) for c in (64, 128, 256, 512)))


def parse_shapes(text: str) -> tuple[Shape, ...]:
    """``"64,64,3;128,64,3,2"``: blocks as ``O,I,k`` or ``O,I,k,g``.

    Raises:
        UserError: naming the block that is none.
    """
    shapes = []
    for part in filter(None, (p.strip() for p in text.split(";"))):
        try:
            numbers = [int(n) for n in part.split(",")]
        except ValueError:
            numbers = []
        if len(numbers) not in (3, 4) or min(numbers) < 1:
            raise UserError(f"--shapes takes O,I,k or O,I,k,g, several separated by ';', got {part!r}")
        shape = Shape(*numbers)
        if shape.out_channels % shape.groups or shape.in_channels % shape.groups:
            raise UserError(f"--shapes {part!r}: {shape.groups} groups must divide the channels")
        shapes.append(shape)
    if not shapes:
        raise UserError("--shapes names no shape")
    return tuple(shapes)


def model_shapes(names: Iterable[str]) -> tuple[Shape, ...]:
    """The distinct blocks of some models together, ``"all"`` for all of `MODELS`.

    Raises:
        UserError: a name that is not in `MODELS`.
    """
    chosen: dict[Shape, None] = {}
    for name in names:
        if name != "all" and name not in MODELS:
            raise UserError(f"--models must be all or among {', '.join(MODELS)}, got {name!r}")
        for model in MODELS if name == "all" else (name,):
            chosen.update(dict.fromkeys(MODELS[model]))
    return tuple(chosen)
