"""The public function: validate, pick a backend per block, squeeze."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .autograd import Call
from .backends.base import Backend, Gradients, Request, Signature
from .dispatch import Squeezer, calls, resolve, select
from .guards import is_plain, is_watched
from .plan import Block

#: dtypes that operands and kernels can have
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def squeeze(
    blocks: Sequence[Block],
    tensors: Sequence[Sequence[Tensor]],
    *,
    dtype: torch.dtype | None = None,
    memory_format: torch.memory_format = torch.contiguous_format,
    backend: str = "auto",
) -> list[Tensor]:
    """Squeeze linear blocks into one convolution kernel each (paper section 3.3, Eq. 3 and 4), differentiably.

    Args:
        blocks: what to compute, one plan per block; a single block is a list of one.
        tensors: per block, one tensor per operand, in the order of ``block.operands``: all of one device and one of
            float64, float32, bfloat16, float16, any strides. Filters may be of a wider dtype than the rest.
        dtype: of the returned kernels; by default that of each block's first operand that is no filter. Half-precision
            operands are composed in float32 and rounded once.
        memory_format: of the returned kernels, ``torch.contiguous_format`` or ``torch.channels_last``.
        backend: ``"auto"`` (or what ``OREPA_BACKEND`` says), or one of ``"cuda"``, ``"triton"``, ``"cpu"``,
            ``"reference"``.

    Returns:
        One kernel ``[O, I/g, kh, kw]`` per block, centre-aligned, ready for ``torch.nn.functional.conv2d``.

    Raises:
        ValueError: a count, shape, device or name does not fit; the message names the operand.
        TypeError: an operand or ``dtype`` is not a floating-point one of the four above.
        BackendError: the backend asked for cannot do it; the message says why.
    """
    name = resolve(backend)
    key, operands = _key(name, blocks, tensors, dtype, memory_format)
    cacheable = not torch.compiler.is_compiling() and not is_watched()
    if cacheable:  # a training step makes the same calls every time
        call = calls.find(key, operands)
        if call is not None:
            return call(operands)
    _check_results(dtype, memory_format)
    groups = _group(name, blocks, tensors, dtype)
    if not (cacheable and all(group.plain for group in groups)):
        return _run(groups, [group.visible(memory_format) for group in groups], operands)
    return _prepare(groups, key, operands, memory_format)(operands)


def squeeze_together(
    blocks: Sequence[Block],
    tensors: Sequence[Sequence[Tensor]],
    *,
    kernels: Sequence[Tensor] | None = None,
    dtype: torch.dtype | None = None,
    memory_format: torch.memory_format = torch.contiguous_format,
    backend: str = "auto",
) -> list[Tensor]:
    """Squeeze plain tensors as `squeeze` does, with one autograd node for all blocks of a device, backend and dtype.

    The node may be differentiated any number of times, for different kernels, and hooks on saved tensors do not see it.

    Args:
        blocks, tensors, dtype, memory_format, backend: as for `squeeze`.
        kernels: of an earlier call with the same arguments. They get a graph of their own, and nothing is computed before its
            backward pass: for activation checkpoints, which run a forward twice.
    """
    call, operands = _call(blocks, tensors, dtype, memory_format, backend)
    if torch.is_grad_enabled() and any([tensor.requires_grad for tensor in operands]):
        return call.record(operands, kernels)
    return call(operands) if kernels is None else list(kernels)


def squeeze_gradients(
    blocks: Sequence[Block],
    tensors: Sequence[Sequence[Tensor]],
    upstream: Sequence[Tensor | None],
    *,
    backend: str = "auto",
) -> list[Tensor | None]:
    """Return the gradients of operands from those of their kernels: the backward pass of `squeeze` without its forward.

    Args:
        blocks, tensors, backend: as for `squeeze`; every tensor is a plain one.
        upstream: per block, the gradient of its kernel ``[O, I/g, kh, kw]``, of any dtype, or None where there is none. Sums
            over many batches may be in a wider dtype than kernels.

    Returns:
        One per operand of all blocks, one block after the other, like that operand; None where it requires no gradient or its
        block has none.
    """
    call, operands = _call(blocks, tensors, None, torch.contiguous_format, backend)
    return call.backward(operands, upstream, [tensor.requires_grad for tensor in operands])


def _key(
    name: str,
    blocks: Sequence[Block],
    tensors: Sequence[Sequence[Tensor]],
    dtype: torch.dtype | None,
    memory_format: torch.memory_format,
) -> tuple[tuple[object, ...], Sequence[Tensor]]:
    """Return the key of a call in the cache, and the operands of all blocks."""
    if len(blocks) == 1 and len(tensors) == 1 and len(tensors[0]) == len(blocks[0].shapes):
        return (name, dtype, memory_format, blocks[0]), tensors[0]
    _check_counts(blocks, tensors)
    return (name, dtype, memory_format, *blocks), [tensor for part in tensors for tensor in part]


def _call(
    blocks: Sequence[Block],
    tensors: Sequence[Sequence[Tensor]],
    dtype: torch.dtype | None,
    memory_format: torch.memory_format,
    backend: str,
) -> tuple[Squeezer, Sequence[Tensor]]:
    """Return what squeezes plain tensors, from the cache or new, and the operands of all blocks."""
    name = resolve(backend)
    key, operands = _key(name, blocks, tensors, dtype, memory_format)
    call = calls.find(key, operands)
    if call is None:
        call = _prepare(_group(name, blocks, tensors, dtype), key, operands, memory_format)
    return call, operands


def _prepare(
    groups: Sequence[_Group], key: tuple[object, ...], operands: Sequence[Tensor], memory_format: torch.memory_format
) -> Squeezer:
    parts = [
        Call(group.backend, group.blocks, [operands[place] for place in group.places], group.dtype, memory_format)
        for group in groups
    ]
    call = parts[0] if len(parts) == 1 else _Parts(groups, parts)
    if operands:
        calls.add(key, operands, call)
    return call


class _Group:
    """Blocks on one device that go to one backend in one call, so that a fused backend can take them in one launch.

    Args:
        backend: that computes them.
        dtype: of their kernels.
    """

    def __init__(self, backend: Backend, dtype: torch.dtype) -> None:
        self.backend, self.dtype = backend, dtype
        self.plain = True  # whether raw memory of all operands may be read
        self.blocks: list[Block] = []
        self.indices: list[int] = []  # of the blocks
        self.places: list[int] = []  # of their operands, among those of all blocks

    def visible(self, memory_format: torch.memory_format) -> Callable[[Sequence[Tensor]], list[Tensor]]:
        """Return what squeezes by operations that tracers, modes and transforms see: the registered operator, or plain ones."""

        def squeeze_visibly(operands: Sequence[Tensor]) -> list[Tensor]:
            if self.backend.traceable:
                signature = Signature.of(operands, self.dtype, memory_format)
                return self.backend.prepare(self.blocks, signature).forward(operands)
            texts, channels_last = [block.text for block in self.blocks], memory_format == torch.channels_last
            operator = torch.ops.orepa_kernels.squeeze
            return operator(list(operands), texts, self.backend.name, self.dtype, channels_last)

        return squeeze_visibly


class _Parts:
    """Calls of several backends, devices or dtypes as one."""

    def __init__(self, groups: Sequence[_Group], parts: Sequence[Call]) -> None:
        self._groups, self._parts = groups, parts

    def __call__(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        return _run(self._groups, self._parts, tensors)

    def record(self, tensors: Sequence[Tensor], kernels: Sequence[Tensor] | None = None) -> list[Tensor]:
        def recorder(group: _Group, part: Call) -> Callable[[Sequence[Tensor]], list[Tensor]]:
            given = None if kernels is None else [kernels[index] for index in group.indices]
            return lambda operands: part.record(operands, given)

        return _run(self._groups, [recorder(*pair) for pair in zip(self._groups, self._parts, strict=True)], tensors)

    def backward(
        self, tensors: Sequence[Tensor], upstream: Sequence[Tensor | None], needed: Sequence[bool]
    ) -> Gradients:
        gradients: Gradients = [None] * len(tensors)
        for group, part in zip(self._groups, self._parts, strict=True):
            operands, needs = [tensors[place] for place in group.places], [needed[place] for place in group.places]
            values = part.backward(operands, [upstream[index] for index in group.indices], needs)
            for place, value in zip(group.places, values, strict=True):
                gradients[place] = value
        return gradients


def _group(
    name: str, blocks: Sequence[Block], tensors: Sequence[Sequence[Tensor]], dtype: torch.dtype | None
) -> list[_Group]:
    """Check all operands and pick the backends."""
    groups: dict[tuple[str, torch.device, torch.dtype], _Group] = {}
    place = 0
    for index, (block, operands) in enumerate(zip(blocks, tensors, strict=True)):
        _check_operands(block, operands, f"blocks[{index}]")
        # Where the compiler traces, operators are recorded, which run on what the tensors then are.
        plain = torch.compiler.is_compiling() or is_plain(operands)
        first, dtypes = operands[block.leading], [tensor.dtype for tensor in operands]
        out_dtype = first.dtype if dtype is None else dtype
        widest = torch.float64 if torch.float64 in dtypes else first.dtype  # a float64 filter widens all
        backend = select(name, Request(block, first.device, widest, out_dtype, plain))
        group = groups.setdefault((backend.name, first.device, out_dtype), _Group(backend, out_dtype))
        group.plain = group.plain and plain
        group.blocks.append(block)
        group.indices.append(index)
        group.places += range(place, place + len(operands))
        place += len(operands)
    return list(groups.values())


def _run(
    groups: Sequence[_Group],
    squeezers: Sequence[Callable[[Sequence[Tensor]], list[Tensor]]],
    operands: Sequence[Tensor],
) -> list[Tensor]:
    """Squeeze the blocks of each group, and bring the kernels into the order of the blocks."""
    kernels: dict[int, Tensor] = {}
    for group, squeezer in zip(groups, squeezers, strict=True):
        kernels.update(zip(group.indices, squeezer([operands[place] for place in group.places]), strict=True))
    return [kernels[index] for index in range(len(kernels))]


# --- validation ---------------------------------------------------------------------------------------------------------


def _check_results(dtype: torch.dtype | None, memory_format: torch.memory_format) -> None:
    if dtype is not None and dtype not in DTYPES:
        raise TypeError(f"dtype must be one of {_names(DTYPES)}, got {dtype}")
    if memory_format not in (torch.contiguous_format, torch.channels_last):
        raise ValueError(f"memory_format must be contiguous_format or channels_last, got {memory_format}")


def _check_counts(blocks: Sequence[Block], tensors: Sequence[Sequence[Tensor]]) -> None:
    if len(blocks) != len(tensors):
        raise ValueError(f"tensors must have one entry per block: got {len(tensors)} for {len(blocks)} blocks")
    for index, (block, operands) in enumerate(zip(blocks, tensors, strict=True)):
        if len(operands) != len(block.operands):
            raise ValueError(f"blocks[{index}] needs {len(block.operands)} tensors, got {len(operands)}")


def _check_operands(block: Block, operands: Sequence[Tensor], where: str) -> None:
    """Raise where shapes, dtypes or devices do not fit."""
    if not operands:
        raise ValueError(f"{where} has no operands, so its device and dtype are unknown")
    leading, first = block.operands[block.leading].name, operands[block.leading]
    # Whole lists first: this is a good part of what the host does for the first squeeze.
    if (
        first.dtype in DTYPES
        and [tensor.shape for tensor in operands] == block.shapes
        and {tensor.dtype for tensor in operands} == {first.dtype}
        and {tensor.device for tensor in operands} == {first.device}
    ):
        return
    for operand, tensor in zip(block.operands, operands, strict=True):
        if tensor.shape != operand.shape:
            raise ValueError(
                f"{where}: operand {operand.name!r} must be {list(operand.shape)}, got {list(tensor.shape)}"
            )
        if tensor.dtype not in DTYPES:
            raise TypeError(f"{where}: operand {operand.name!r} must be one of {_names(DTYPES)}, got {tensor.dtype}")
        if tensor.device != first.device:
            raise ValueError(f"{where}: operand {operand.name!r} is on {tensor.device}, {leading!r} on {first.device}")
        # The one three-dimensional kind of operand is a filter, a constant that a half-precision block keeps in float32.
        if tensor.dtype != first.dtype and len(operand.shape) != 3:
            raise ValueError(f"{where}: operand {operand.name!r} is {tensor.dtype}, {leading!r} is {first.dtype}")


def _names(dtypes: Sequence[torch.dtype]) -> str:
    return ", ".join(str(d).removeprefix("torch.") for d in dtypes)
