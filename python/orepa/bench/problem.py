"""One block to squeeze, with its tensors: what every provider is given."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from orepa_kernels import Block

from ..errors import UserError
from ..modules.linear_block import LinearBlock
from ..topology.language import ConvSpec, declaration
from ..topology.lowering import lower
from . import work
from .shapes import Shape

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Case:
    """What is measured.

    Args:
        shape: of the convolution.
        topology: of the block.
        dtype: of the kernel, a key of `DTYPES`; parameters are float32, as under autocast.
        device: ``"cpu"`` or ``"cuda"``.
    """

    shape: Shape
    topology: str
    dtype: str = "fp32"
    device: str = "cpu"

    def as_dict(self) -> dict[str, object]:
        """Plain data, for JSON: it identifies the case."""
        s = self.shape
        return {
            "out": s.out_channels,
            "in": s.in_channels,
            "k": s.kernel_size,
            "groups": s.groups,
            "topology": self.topology,
            "dtype": self.dtype,
            "device": self.device,
        }


def plan(case: Case) -> Block:
    """The block of a case, as `orepa_kernels` sees it; no tensor is made.

    Raises:
        UserError: the topology does not fit the shape.
    """
    spec = _spec(case.shape)
    try:
        return lower(declaration(case.topology)(spec).linearize(), spec).plan
    except ValueError as misfit:
        raise UserError(f"topology {case.topology} does not fit {case.shape}: {misfit}") from misfit


def _spec(shape: Shape) -> ConvSpec:
    return ConvSpec(shape.in_channels, shape.out_channels, (shape.kernel_size, shape.kernel_size), shape.groups)


class Workload:
    """The tensors of one case: the same for every provider.

    Parameters are random all over: a block at its initial values, with its zeros and identities, could hide a mistake.

    Args:
        case: what to build.
        seed: of the values.

    Raises:
        UserError: the topology does not fit the shape.

    Attributes:
        plan: the block as `orepa_kernels` sees it.
        operands: by name, in the plan's order; leaves, float32. Constants do not require a gradient.
        out_dtype: of the kernel ``[O, I/g, k, k]``.
        grad: the gradient fed to the kernel, in ``out_dtype``.
    """

    def __init__(self, case: Case, seed: int = 0) -> None:
        spec = _spec(case.shape)
        self.case, self.plan, self.out_dtype = case, plan(case), DTYPES[case.dtype]
        block = LinearBlock(spec, declaration(case.topology)(spec).linearize())
        generator = torch.Generator().manual_seed(seed)
        trainable = {name for name, _ in block.named_parameters()}
        self.operands: dict[str, Tensor] = {}
        for operand, value in zip(self.plan.operands, block.operands(), strict=True):
            value = value.detach()
            if operand.name in trainable:
                value = _random(value.shape, generator, one=operand.name.endswith("scales"))
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

    def flops(self, mode: str) -> int:
        """See `orepa.bench.work.flops`."""
        return work.flops(self.plan, mode)

    def bytes(self, mode: str) -> int:
        """See `orepa.bench.work.minimum_bytes`."""
        return work.minimum_bytes(self.plan, self.constants, mode, torch.float32, self.out_dtype)


def _random(shape: torch.Size | tuple[int, ...], generator: torch.Generator, one: bool = False) -> Tensor:
    """Normal values of the variance that keeps activations alive, so that kernels of half precision stay in range."""
    value = torch.randn(tuple(shape), generator=generator)
    if one:
        return 1 + 0.25 * value
    fan_in = value[0].numel() if value.dim() > 1 else 1
    return value / fan_in**0.5
