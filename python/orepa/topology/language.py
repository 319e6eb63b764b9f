"""The language in which re-parameterised blocks are declared: branches as sequences of linear layers (paper section 3.2).

A topology is plain data. ACNet, say, is three branches, each a convolution and a norm::

    @orepa.register_topology("acnet")
    def acnet(spec):
        kh, kw = spec.kernel_size
        return Topology(square=Branch(Conv((kh, kw)), Norm()),
                        vertical=Branch(Conv((kh, 1)), Norm()),
                        horizontal=Branch(Conv((1, kw)), Norm()))

`Topology.linearize` removes the norms and leaves a learnable scaling at the end of every branch, which makes the block
linear, and so squeezable into one kernel at every training step. `orepa.topology.lowering` turns layers into terms.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias

import torch
from torch import Tensor
from torch.nn import init

Size: TypeAlias = tuple[int, int]


@dataclass(frozen=True)
class ConvSpec:
    """The convolution that a block stands for: the argument of a declaration.

    Args:
        in_channels, out_channels: ``I`` and ``O``.
        kernel_size: ``(kh, kw)``.
        groups: ``g``, which divides both numbers of channels.
        stride: ``(height, width)``.
    """

    in_channels: int
    out_channels: int
    kernel_size: Size
    groups: int = 1
    stride: Size = (1, 1)

    @property
    def keeps_shape(self) -> bool:
        """Whether an identity branch fits, with as many channels out as in and no stride."""
        return self.in_channels == self.out_channels and self.stride == (1, 1)


# --- initial values -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kaiming:
    """``kaiming_uniform_`` with negative slope ``a``.

    It multiplies the variance by ``2 / (1 + a^2)``: in expectation, or with ``exact`` in every output channel.
    """

    a: float = 0.0
    exact: bool = False

    def __call__(self, weight: Tensor) -> None:
        init.kaiming_uniform_(weight, a=self.a)
        if self.exact:
            norm = torch.linalg.vector_norm(weight.detach(), dim=(1, 2, 3), keepdim=True)
            with torch.no_grad():
                weight.mul_(init.calculate_gain("leaky_relu", self.a) / norm.clamp_min(1e-4))


@dataclass(frozen=True)
class Constant:
    """Every element the same."""

    value: float

    def __call__(self, weight: Tensor) -> None:
        init.constant_(weight, self.value)


class Eye:
    """The identity of a (grouped) 1x1 convolution: ``weight[t, t mod columns] = 1``."""

    def __call__(self, weight: Tensor) -> None:
        rows, columns = weight.shape[:2]
        with torch.no_grad():
            weight.zero_()
            index = torch.arange(rows, device=weight.device)
            weight[index, index % columns] = 1


class TapEye:
    """Depthwise rows that each hold one tap: row ``i*E+e`` is one at tap ``e mod (kh*kw)`` (DO-Conv's start)."""

    def __call__(self, weight: Tensor) -> None:
        taps = weight.shape[-2] * weight.shape[-1]
        with torch.no_grad():
            weight.zero_()
            index = torch.arange(weight.shape[0], device=weight.device)
            weight.view(weight.shape[0], taps)[index, index % taps] = 1


Init: TypeAlias = Callable[[Tensor], None]

# --- layers -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Conv:
    """A convolution without bias, grouped like the block.

    Args:
        kernel_size: one number or ``(kh, kw)``.
        out_channels: by default the block's.
        identity: the weight is added to ``id[t, t mod I/g]``, a constant (1x1 only): the layer starts from the identity
            and weight decay pulls it back there.
        init: initial values of the weight.
        dilation: of this layer, times the block's: ``r`` makes ``k`` taps a kernel of size ``r*(k-1)+1``. One number or two.
    """

    kernel_size: int | Size
    out_channels: int | None = None
    identity: bool = False
    init: Init = Kaiming(0.0)
    dilation: int | Size = 1


@dataclass(frozen=True)
class Depthwise:
    """A depthwise convolution: channel ``i`` of its input gives the channels ``i*E`` to ``i*E+E-1`` of its output.

    Args:
        kernel_size: one number or ``(kh, kw)``.
        expand: output channels ``E`` per input channel.
        init: initial values of the weight ``[I*E, 1, kh, kw]``.
        dilation: as that of a `Conv`.
    """

    kernel_size: int | Size
    expand: int = 1
    init: Init = Kaiming(0.0)
    dilation: int | Size = 1


@dataclass(frozen=True)
class AvgPool:
    """Average pooling, which divides by ``kh*kw`` everywhere."""

    kernel_size: int | Size


@dataclass(frozen=True)
class Filter:
    """A fixed depthwise filter.

    Args:
        values: ``(channels, (kh, kw)) -> [channels or 1, kh, kw]`` in float64. A module-level function pickles.
        kernel_size: one number or ``(kh, kw)``.
    """

    values: Callable[[int, Size], Tensor]
    kernel_size: int | Size


@dataclass(frozen=True)
class Identity:
    """The input itself."""


@dataclass(frozen=True)
class Norm:
    """A branch-wise norm layer, as in the offline blocks. `Topology.linearize` removes it."""


@dataclass(frozen=True)
class Nested:
    """A whole block as a layer, with its branches and scales: the stages of a deep stem.

    Args:
        topology: its declaration.
        kernel_size: one number or ``(kh, kw)``.
        out_channels: by default the block's.
    """

    topology: Declaration
    kernel_size: int | Size
    out_channels: int | None = None


Layer: TypeAlias = Conv | Depthwise | AvgPool | Filter | Identity | Norm | Nested


@dataclass(frozen=True, init=False)
class Branch:
    """A sequence of layers and the initial value of the scaling after it.

    Args:
        layers: from input to output.
        scale: initial value of the branch's scaling vector, or None for a branch that has none.
    """

    layers: tuple[Layer, ...]
    scale: float | None

    def __init__(self, *layers: Layer, scale: float | None = 1.0) -> None:
        object.__setattr__(self, "layers", layers)
        object.__setattr__(self, "scale", scale)


class Topology:
    """Named branches, summed. The names are those of the parameters: ``origin`` gives ``origin_weight``.

    Raises:
        ValueError: no branch, or a branch without a layer.
    """

    def __init__(self, **branches: Branch) -> None:
        if not branches:
            raise ValueError("a topology needs at least one branch, got none")
        for name, branch in branches.items():
            if all(isinstance(layer, Norm) for layer in branch.layers):
                raise ValueError(f"branch {name!r} needs at least one linear layer, got {list(branch.layers)}")
        self.branches = branches

    def __iter__(self) -> Iterator[tuple[str, Branch]]:
        return iter(self.branches.items())

    def __repr__(self) -> str:
        return f"Topology({', '.join(f'{name}={branch!r}' for name, branch in self)})"

    def linearize(self) -> Topology:
        """Return the linear block: branch-wise norms removed, scalings in their place (paper section 3.2)."""

        def linear(branch: Branch) -> Branch:
            return Branch(*(layer for layer in branch.layers if not isinstance(layer, Norm)), scale=branch.scale)

        return Topology(**{name: linear(branch) for name, branch in self})

    def offline(self) -> Topology:
        """Return the block as its authors train it, for `orepa.OfflineConv`: norms take the place of a branch's scaling."""

        def normed(branch: Branch) -> Branch:
            has_norm = any(isinstance(layer, Norm) for layer in branch.layers)
            return Branch(*branch.layers, scale=None if has_norm else branch.scale)

        return Topology(**{name: normed(branch) for name, branch in self})


Declaration: TypeAlias = Callable[[ConvSpec], Topology]


def constant_declaration(topology: Topology) -> Declaration:
    """Return the declaration that gives this topology for every convolution. It pickles where the topology does."""
    return partial(_ignore_spec, topology)


def _ignore_spec(topology: Topology, _spec: ConvSpec) -> Topology:
    return topology


# --- names --------------------------------------------------------------------------------------------------------------

_REGISTRY: dict[str, Callable[..., Topology]] = {}
_NORM_FREE: list[Callable[..., Topology]] = []


def register_topology(
    name: str, *, norm_free: bool = False
) -> Callable[[Callable[..., Topology]], Callable[..., Topology]]:
    """Register a declaration, ``(spec, **options) -> Topology``, under a name that ``topology=`` then takes.

    Args:
        name: of the topology.
        norm_free: whether it is made for nets without norms, as those for super-resolution are: `orepa.prepare` then swaps
            convolutions that no norm follows, too.

    Raises:
        ValueError: the name is taken.
    """

    def add(declaration: Callable[..., Topology]) -> Callable[..., Topology]:
        if name in _REGISTRY:
            raise ValueError(f"a topology named {name!r} is registered already")
        _REGISTRY[name] = declaration
        if norm_free:
            _NORM_FREE.append(declaration)
        return declaration

    return add


def topologies() -> list[str]:
    """Return the names of all registered topologies."""
    return sorted(_REGISTRY)


def declaration(topology: str | Callable[..., Topology], **options: object) -> Declaration:
    """Return the declaration of that name (or the one given), with its options bound.

    Raises:
        ValueError: no topology of that name.
        TypeError: neither a name nor a declaration.
    """
    if isinstance(topology, str):
        if topology not in _REGISTRY:
            raise ValueError(f"topology must be one of {', '.join(topologies())}, got {topology!r}")
        topology = _REGISTRY[topology]
    if not callable(topology):
        raise TypeError(f"topology must be a name or a function that declares one, got {topology!r}")
    return partial(topology, **options) if options else topology


def is_norm_free(topology: str | Callable[..., Topology]) -> bool:
    """Return whether a topology, a name or a declaration with or without bound options, is registered as norm-free."""
    declared = _REGISTRY.get(topology) if isinstance(topology, str) else topology
    while isinstance(declared, partial):
        declared = declared.func
    return any(declared is one for one in _NORM_FREE)


def pair(value: int | Size, name: str = "kernel_size") -> Size:
    """Return ``3`` or ``(3, 3)`` as a pair of positive integers; raise ValueError with the ``name`` for anything else."""
    result = (value, value) if isinstance(value, int) else tuple(value)
    if len(result) != 2 or not all(isinstance(v, int) and v > 0 for v in result):
        raise ValueError(f"{name} must be a positive integer or two of them, got {value!r}")
    return (result[0], result[1])
