"""The squeezed kernel that eval mode keeps, and how it knows that it is out of date."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .block import LinearBlock


@dataclass(frozen=True)
class _Source:
    """One operand as it was: where its module keeps it, and what of it changes with every write."""

    owner: dict[str, Tensor | None]
    name: str
    tensor: Tensor
    version: int
    address: int

    def is_current(self) -> bool:
        tensor = self.tensor  # held, so that neither it nor its memory can come back as another
        same = self.owner.get(self.name) is tensor and tensor._version == self.version
        return same and tensor.data_ptr() == self.address


@dataclass(frozen=True)
class KeptKernel:
    """A kernel without a graph, and the operands that it was squeezed from.

    It is valid while each operand is the same tensor, of the same version (every in-place write counts it up) and at the same
    address (which ``parameter.data = ...`` changes).
    """

    kernel: Tensor
    memory_format: torch.memory_format
    sources: tuple[_Source, ...]

    def is_current(self, dtype: torch.dtype | None, memory_format: torch.memory_format) -> bool:
        """Whether this is still the kernel, in this form. ``dtype`` None stands for that of the parameters."""
        if memory_format is not self.memory_format or self.kernel.dtype != (dtype or self.sources[0].tensor.dtype):
            return False
        return all(source.is_current() for source in self.sources)


def keep(
    block: LinearBlock, operands: Sequence[Tensor], kernel: Tensor, memory_format: torch.memory_format
) -> KeptKernel | None:
    """Keep a kernel, or None where its operands are not the block's ordinary parameters.

    Tensors that are traced, wrapped by a functional transform, sharded, or born in inference mode tell nothing reliable
    about their changes.
    """
    sources = []
    for (path, name), tensor in zip(block.sources, operands, strict=True):
        owner = block.get_submodule(".".join(path))
        kind, home = (nn.Parameter, owner._parameters) if name in owner._parameters else (Tensor, owner._buffers)
        if type(tensor) is not kind or tensor.is_inference():
            return None
        sources.append(_Source(home, name, tensor, tensor._version, tensor.data_ptr()))  # type: ignore[arg-type]
    return KeptKernel(kernel, memory_format, tuple(sources))
