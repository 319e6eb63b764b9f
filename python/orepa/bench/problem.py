"""Define what `orepa bench squeeze` measures: convolution shapes, and the tensors of one block to squeeze."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from orepa_kernels import Block

from ..errors import UserError
from ..modules.linear_block import LinearBlock
from ..modules.orepa_conv import default_topology
from ..topology.language import ConvSpec, declaration
from ..topology.lowering import lower

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


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
        return default_topology(self.spec.kernel_size, self.spec.groups)

    @property
    def spec(self) -> ConvSpec:
        return ConvSpec(self.in_channels, self.out_channels, (self.kernel_size, self.kernel_size), self.groups)

    def __str__(self) -> str:
        text = f"{self.in_channels}->{self.out_channels} {self.kernel_size}x{self.kernel_size}"
        return text if self.groups == 1 else f"{text} g{self.groups}"


def parse_shapes(text: str) -> tuple[Shape, ...]:
    """Parse blocks such as ``"64,64,3;128,64,3,2"``, each ``O,I,k`` or ``O,I,k,g``; a UserError names what is no block."""
    shapes = []
    for part in filter(None, (p.strip() for p in text.split(";"))):
        numbers = [int(n) if n.strip().isdecimal() else 0 for n in part.split(",")]
        if len(numbers) not in (3, 4) or min(numbers) < 1:
            raise UserError(f"--shapes takes O,I,k or O,I,k,g, several separated by ';', got {part!r}")
        shape = Shape(*numbers)
        if shape.out_channels % shape.groups or shape.in_channels % shape.groups:
            raise UserError(f"--shapes {part!r}: {shape.groups} groups must divide the channels")
        shapes.append(shape)
    if not shapes:
        raise UserError("--shapes names no shape")
    return tuple(shapes)


#: the default: the 3x3 block over the widths of a ResNet
DEFAULT = tuple(Shape(c, c, 3) for c in (64, 128, 256, 512))


@dataclass(frozen=True)
class SqueezeCase:
    """What identifies one measurement of the squeeze."""

    shape: Shape
    topology: str
    dtype: str = "fp32"  # of the kernel; parameters are float32, as under autocast
    device: str = "cpu"

    def as_dict(self) -> dict[str, object]:
        s = self.shape
        geometry = {"out": s.out_channels, "in": s.in_channels, "k": s.kernel_size, "groups": s.groups}
        return {**geometry, "topology": self.topology, "dtype": self.dtype, "device": self.device}

    def __str__(self) -> str:
        return f"{self.shape} {self.topology} {self.dtype}"

    def plan(self) -> Block:
        """Lower the block; no tensor is made. A UserError where the topology does not fit the shape."""
        spec = self.shape.spec
        try:
            return lower(declaration(self.topology)(spec).linearize(), spec).plan
        except ValueError as misfit:
            raise UserError(f"topology {self.topology} does not fit {self.shape}: {misfit}") from misfit


class Problem:
    """The tensors of one case: the same for every provider.

    Parameters are random all over: a block at its initial values, with its zeros and identities, could hide a mistake.

    Attributes:
        plan: the block as `orepa_kernels` sees it.
        operands: by name, in the plan's order; leaves, float32. Constants do not require a gradient.
        out_dtype: of the kernel ``[O, I/g, k, k]``.
        grad: the gradient fed to the kernel, in ``out_dtype``.
    """

    def __init__(self, case: SqueezeCase, seed: int = 0) -> None:
        self.case, self.plan, self.out_dtype = case, case.plan(), DTYPES[case.dtype]
        block = LinearBlock(case.shape.spec, declaration(case.topology)(case.shape.spec).linearize())
        generator = torch.Generator().manual_seed(seed)
        trainable = {name for name, _ in block.named_parameters()}
        self.operands: dict[str, Tensor] = {}
        for operand, value in zip(self.plan.operands, block.operands(), strict=True):
            value = value.detach()
            if operand.name in trainable:
                value = _random(value.shape, generator, around_one=operand.name.endswith("scales"))
            self.operands[operand.name] = value.to(case.device).requires_grad_(operand.name in trainable)
        self.grad = _random(self.plan.shape, generator).to(case.device, self.out_dtype)

    @property
    def parameters(self) -> list[Tensor]:
        """The operands that have a gradient, in the plan's order."""
        return [t for t in self.operands.values() if t.requires_grad]

    @property
    def constants(self) -> frozenset[str]:
        """Names of the operands that have none: fixed filters."""
        return frozenset(name for name, t in self.operands.items() if not t.requires_grad)


def _random(shape: torch.Size | tuple[int, ...], generator: torch.Generator, around_one: bool = False) -> Tensor:
    """Draw normal values of a variance that keeps kernels of half precision in range."""
    value = torch.randn(tuple(shape), generator=generator)
    if around_one:
        return 1 + 0.25 * value
    fan_in = value[0].numel() if value.dim() > 1 else 1
    return value / fan_in**0.5
