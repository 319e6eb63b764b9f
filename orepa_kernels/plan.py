"""What a squeeze computes, as plain data: no tensor, no device, no autograd.

A linear re-parameterised block is a sum of branches, each a sequence of linear layers (paper section 3.3). Lowered, it
is a sum of *terms* (paper Eq. 4) of four kinds, which is all that a backend has to know:

===================  ==========================================================================  ======================
kind                 kernel ``K [O, I/g, kh, kw]``                                               examples
===================  ==========================================================================  ======================
`Dense`              ``K = W``                                                                   origin, ACNet's 1xk
`PointwiseFilter`    ``K[o,i,p] = P[o,i] * F[o,p]``                                              avg, prior, 1x1, Sobel
`Composed`           ``K[o,i,p] = sum_m sum_q W2[o,m,q] * W1[m,i,p-q]`` (paper Eq. 3)            1x1-kxk, deep stem
`Separable`          ``K[o,i,p] = sum_e pw[o,i*E+e] * dw[i*E+e,p]``                              dws, DO-Conv
===================  ==========================================================================  ======================

Letters: ``O``/``I`` out/in channels, ``g`` groups, ``M`` internal channels, ``E`` depthwise expansion. Every term may be
scaled per output channel (paper section 3.2) and is centre-aligned in the block's kernel.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, TypeAlias

Size: TypeAlias = tuple[int, int]


@dataclass(frozen=True)
class Operand:
    """One input tensor of a block. Equal names within a block mean the same tensor.

    Args:
        name: unique within the block; by convention the parameter's key in the owner's ``state_dict``.
        shape: the exact shape that the tensor must have.
    """

    name: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Average:
    """The fixed filter ``1/(kh*kw)``: average pooling as a kernel.

    ``Average((1, 1))`` is the unit impulse, which makes a `PointwiseFilter` a plain 1x1 branch.
    """

    kernel_size: Size


IMPULSE = Average((1, 1))


@dataclass(frozen=True)
class Dense:
    """``K = weight``, centred.

    Args:
        weight: ``[O, I/g, kh, kw]``, or a nested block that squeezes to it.
        scale: row of the block's ``scales``, or None for no scaling.
    """

    weight: Operand | Block
    scale: int | None = None


@dataclass(frozen=True)
class PointwiseFilter:
    """``K[o,i,p] = pointwise[o,i] * filter[o,p]``.

    Args:
        pointwise: ``[O, I/g, 1, 1]``, or None for the identity ``delta(i, o mod I/g)``.
        filter: ``[1|O, kh, kw]``, or an `Average`.
        scale: row of the block's ``scales``, or None for no scaling.
    """

    pointwise: Operand | None
    filter: Operand | Average
    scale: int | None = None


@dataclass(frozen=True)
class Composed:
    """``K = second o first``: two convolutions in sequence, ``first`` nearer to the input (paper Eq. 3).

    Args:
        first: ``[M, I/g, kh1, kw1]``, or a nested block that squeezes to it.
        second: ``[O, M/g, kh2, kw2]``, or a nested block that squeezes to it.
        identity: use ``first + id`` with ``id[m, m mod I/g] = 1``; ``first`` must then be 1x1 and ``I/g`` divide ``M/g``.
        scale: row of the block's ``scales``, or None for no scaling.
    """

    first: Operand | Block
    second: Operand | Block
    identity: bool = False
    scale: int | None = None


@dataclass(frozen=True)
class Separable:
    """``K[o,i,p] = sum_e pointwise[o, i*E+e] * depthwise[i*E+e, p]`` (``i`` counts within the group in ``pointwise``).

    Args:
        depthwise: ``[I*E, 1, kh, kw]``.
        pointwise: ``[O, I/g*E, 1, 1]``, or None for the depthwise convolution alone (then ``O = I*E``).
        scale: row of the block's ``scales``, or None for no scaling.
    """

    depthwise: Operand
    pointwise: Operand | None
    scale: int | None = None


Term: TypeAlias = Dense | PointwiseFilter | Composed | Separable


@dataclass(frozen=True, eq=False)
class Block:
    """A linear block: the sum of its terms, each scaled and centred in ``kernel_size``.

    Args:
        out_channels: ``O``.
        in_channels: ``I``.
        kernel_size: ``(kh, kw)`` of the squeezed kernel.
        terms: at least one.
        groups: ``g``; must divide ``I`` and ``O``.
        scales: ``[B, O]`` (vector scaling) or ``[B, 1]`` (scalar scaling), or None. A row scales one term, or none: then its
            gradient is zero.

    Raises:
        ValueError: a shape does not fit, groups do not divide the channels, or a term's kernel cannot be centred.
    """

    out_channels: int
    in_channels: int
    kernel_size: Size
    terms: tuple[Term, ...]
    groups: int = 1
    scales: Operand | None = None
    #: every tensor that the block needs, nested blocks included, in the order in which `squeeze` takes them
    operands: tuple[Operand, ...] = field(init=False, compare=False, repr=False)
    #: their shapes
    shapes: list[tuple[int, ...]] = field(init=False, compare=False, repr=False)
    #: the place of the first that is no filter, whose dtype is the block's: filters may be wider
    leading: int = field(init=False, compare=False, repr=False)
    #: the most terms that this block or one nested in it has
    most_terms: int = field(init=False, compare=False, repr=False)
    #: the plan as text, see `encode`
    text: str = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        _check_geometry(self)
        for index, term in enumerate(self.terms):
            _check_term(self, term, f"terms[{index}] ({type(term).__name__})")
        _check_scale_rows(self)
        unique: dict[str, Operand] = {}
        for operand in _walk(self):
            if unique.setdefault(operand.name, operand).shape != operand.shape:
                shapes = f"{list(unique[operand.name].shape)} and {list(operand.shape)}"
                raise ValueError(f"operand {operand.name!r} is used with two shapes, {shapes}")
        object.__setattr__(self, "operands", tuple(unique.values()))
        object.__setattr__(self, "shapes", [operand.shape for operand in self.operands])
        parameters = [index for index, shape in enumerate(self.shapes) if len(shape) != 3]
        object.__setattr__(self, "leading", parameters[0] if parameters else 0)
        nested = [s.most_terms for term in self.terms for s in sources(term) if isinstance(s, Block)]
        object.__setattr__(self, "most_terms", max(len(self.terms), *nested, 0))
        object.__setattr__(self, "text", encode(self))

    # Blocks are keys of caches that every call asks: comparing texts is much cheaper than comparing trees.
    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, Block) and self.text == other.text)

    def __hash__(self) -> int:
        return hash(self.text)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Shape of the squeezed kernel, ``(O, I/g, kh, kw)``."""
        return (self.out_channels, self.in_channels // self.groups, *self.kernel_size)


def kernel_size_of(source: Operand | Block | Average) -> Size:
    """Spatial size of a factor: the last two dimensions of its kernel."""
    if isinstance(source, Operand):
        return (source.shape[-2], source.shape[-1])
    return source.kernel_size


def term_kernel_size(term: Term) -> Size:
    """Spatial size of a term's kernel before it is centred in the block's."""
    if isinstance(term, Dense):
        return kernel_size_of(term.weight)
    if isinstance(term, PointwiseFilter):
        return kernel_size_of(term.filter)
    if isinstance(term, Separable):
        return kernel_size_of(term.depthwise)
    (ah, aw), (bh, bw) = kernel_size_of(term.first), kernel_size_of(term.second)
    return (ah + bh - 1, aw + bw - 1)


def sources(term: Term) -> tuple[Operand | Block, ...]:
    """The tensors and nested blocks that a term reads, in order."""
    if isinstance(term, Dense):
        return (term.weight,)
    if isinstance(term, Composed):
        return (term.first, term.second)
    if isinstance(term, Separable):
        return (term.depthwise,) if term.pointwise is None else (term.depthwise, term.pointwise)
    return tuple(s for s in (term.pointwise, term.filter) if isinstance(s, Operand))


def _walk(block: Block) -> Iterator[Operand]:
    for term in block.terms:
        for source in sources(term):
            if isinstance(source, Block):
                yield from _walk(source)
            else:
                yield source
    if block.scales is not None:
        yield block.scales


def _check_geometry(block: Block) -> None:
    for name in ("in_channels", "out_channels", "groups"):
        value = getattr(block, name)
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    for name in ("in_channels", "out_channels"):
        if getattr(block, name) % block.groups:
            raise ValueError(f"groups={block.groups} must divide {name}={getattr(block, name)}")
    if len(block.kernel_size) != 2 or min(block.kernel_size) < 1:
        raise ValueError(f"kernel_size must be two positive integers, got {block.kernel_size}")
    if not block.terms:
        raise ValueError("terms must hold at least one term, got none")
    if block.scales is not None:
        shape = block.scales.shape
        if len(shape) != 2 or shape[1] not in (1, block.out_channels):
            raise ValueError(
                f"scales must be [branches, {block.out_channels}] (vector) or [branches, 1] (scalar), got {list(shape)}"
            )


def _check_scale_rows(block: Block) -> None:
    rows = sorted(term.scale for term in block.terms if term.scale is not None)
    if len(set(rows)) < len(rows):
        raise ValueError(f"a row of scales must scale at most one term; the terms name {rows}")


def _check_term(block: Block, term: Term, where: str) -> None:
    out, per_group = block.out_channels, block.in_channels // block.groups

    def expect(source: Operand | Block, shape: tuple[int | None, ...], role: str) -> None:
        got = source.shape
        if len(got) != len(shape) or any(s is not None and s != g for s, g in zip(shape, got, strict=True)):
            want = ", ".join("*" if s is None else str(s) for s in shape)
            raise ValueError(f"{where}: {role} must be [{want}], got {list(got)}")
        if isinstance(source, Block) and source.groups != block.groups:
            raise ValueError(f"{where}: {role} has groups={source.groups}, the block has groups={block.groups}")

    if isinstance(term, Dense):
        expect(term.weight, (out, per_group, None, None), "weight")
    elif isinstance(term, PointwiseFilter):
        if term.pointwise is None:
            _check_identity(block, out, where)
        else:
            expect(term.pointwise, (out, per_group, 1, 1), "pointwise")
        if isinstance(term.filter, Operand) and (len(term.filter.shape) != 3 or term.filter.shape[0] not in (1, out)):
            raise ValueError(f"{where}: filter must be [1 or {out}, *, *], got {list(term.filter.shape)}")
    elif isinstance(term, Composed):
        expect(term.first, (None, per_group, None, None), "first")
        internal = term.first.shape[0]
        if internal % block.groups:
            raise ValueError(f"{where}: groups={block.groups} must divide the {internal} internal channels of first")
        expect(term.second, (out, internal // block.groups, None, None), "second")
        if term.identity:
            _check_identity(block, internal, where)
            if kernel_size_of(term.first) != (1, 1):
                raise ValueError(f"{where}: identity needs a 1x1 first, got {list(term.first.shape)}")
    else:
        expect(term.depthwise, (None, 1, None, None), "depthwise")
        expanded = term.depthwise.shape[0]
        if expanded % block.in_channels:
            raise ValueError(f"{where}: depthwise has {expanded} rows, no multiple of in_channels={block.in_channels}")
        if term.pointwise is not None:
            expect(term.pointwise, (out, expanded // block.groups, 1, 1), "pointwise")
        elif expanded != out:
            raise ValueError(f"{where}: without a pointwise, depthwise needs {out} rows, got {expanded}")

    if term.scale is not None and (block.scales is None or not 0 <= term.scale < block.scales.shape[0]):
        rows = 0 if block.scales is None else block.scales.shape[0]
        raise ValueError(f"{where}: scale={term.scale} is no row of scales, which has {rows}")
    check_alignment(term_kernel_size(term), block.kernel_size, where)


def _check_identity(block: Block, channels: int, where: str) -> None:
    per_group = block.in_channels // block.groups
    if (channels // block.groups) % per_group:
        raise ValueError(
            f"{where}: an identity needs in_channels/groups={per_group} to divide its output channels per group, "
            f"got {channels // block.groups}"
        )


def check_alignment(kernel_size: Size, target: Size, where: str = "kernel") -> None:
    """Raise unless a kernel can be centred in a larger one: the difference must be even and not negative.

    Raises:
        ValueError: naming both sizes.
    """
    for small, large in zip(kernel_size, target, strict=True):
        if small > large or (large - small) % 2:
            why = "is larger than" if small > large else "cannot be centred in"
            raise ValueError(
                f"{where}: a {kernel_size[0]}x{kernel_size[1]} kernel {why} the block's {target[0]}x{target[1]} kernel "
                "(in each dimension the difference must be even and not negative)"
            )


# --- plans as text ------------------------------------------------------------------------------------------------------

# What the operators registered with PyTorch take, since their arguments are tensors and plain values. The text of a plan is
# its meaning, so a compiled graph that holds it stays valid in another process.


def encode(block: Block) -> str:
    """A plan as JSON; equal plans give equal texts."""
    return json.dumps(_plain(block), separators=(",", ":"))


def decode(text: str) -> Block:
    """The plan that `encode` wrote.

    Raises:
        ValueError: the text is no plan, or one that could not be built.
    """
    kinds = {kind.__name__: kind for kind in (*Term.__args__, Operand, Average, Block)}

    def build(node: Any) -> Any:
        if isinstance(node, dict):
            kind = kinds[node.pop("kind")]
            return kind(**{name: build(value) for name, value in node.items()})
        return tuple(build(value) for value in node) if isinstance(node, list) else node

    try:
        block = build(json.loads(text))
    except (KeyError, TypeError) as error:
        raise ValueError(f"not the text of a plan: {text[:80]!r} ({error!r})") from error
    if not isinstance(block, Block):
        raise ValueError(f"not the text of a plan: {text[:80]!r}")
    return block


def _plain(node: Any) -> Any:
    if dataclasses.is_dataclass(node):
        inputs = {f.name: _plain(getattr(node, f.name)) for f in dataclasses.fields(node) if f.init}
        return {"kind": type(node).__name__, **inputs}
    return [_plain(value) for value in node] if isinstance(node, tuple) else node
