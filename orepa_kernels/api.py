"""The public function: validate, pick a backend per block, squeeze."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .backends.base import Backend
from .dispatch import choose, recall, remember, resolve
from .guards import is_plain, is_watched
from .plan import Block, Operand

#: dtypes that operands and kernels can have
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def squeeze(
    blocks: Sequence[Block],
    tensors: Sequence[Sequence[Tensor]],
    *,
    dtype: torch.dtype | None = None,
    memory_format: torch.memory_format = torch.contiguous_format,
    folds: Sequence[Tensor | None] | None = None,
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
        folds: per block None, or a factor ``[O]`` of each output channel's kernel, applied before rounding: the scale
            ``gamma / sqrt(var + eps)`` of a batch norm that is folded into the convolution.
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
    alone = len(blocks) == len(tensors) == 1 and len(tensors[0]) == len(blocks[0].operands) and folds is None
    repeatable = alone and not torch.compiler.is_compiling() and not is_watched()
    if repeatable:  # a training step makes the same calls every time
        key = (blocks[0], name, dtype, memory_format)
        shortcut = recall(key, tensors[0])
        if shortcut is not None:
            return shortcut(tensors[0])
    if len(blocks) != len(tensors):
        raise ValueError(f"tensors must have one entry per block: got {len(tensors)} for {len(blocks)} blocks")
    if dtype is not None and dtype not in DTYPES:
        raise TypeError(f"dtype must be one of {_names(DTYPES)}, got {dtype}")
    if memory_format not in (torch.contiguous_format, torch.channels_last):
        raise ValueError(f"memory_format must be contiguous_format or channels_last, got {memory_format}")

    if folds is None:
        folds = [None] * len(blocks)
    elif len(folds) != len(blocks):
        raise ValueError(f"folds must have one entry per block: got {len(folds)} for {len(blocks)} blocks")

    work: dict[tuple[str, torch.dtype], tuple[Backend, list[int]]] = {}
    for index, (block, operands) in enumerate(zip(blocks, tensors, strict=True)):
        plain = _check_operands(block, operands, index)
        first = operands[block.leading]
        _check_fold(block, folds[index], first.device, index)
        out_dtype = first.dtype if dtype is None else dtype
        chosen = choose(name, block, first.device, _widest(block, operands), out_dtype, plain)
        if len(blocks) == 1:
            kernels = chosen.squeeze(blocks, tensors, out_dtype, memory_format, folds)
            shortcut = chosen.shortcut(block, operands, out_dtype, memory_format) if repeatable and plain else None
            if shortcut is not None:
                remember(key, operands, shortcut)
            return kernels
        work.setdefault((chosen.name, out_dtype), (chosen, []))[1].append(index)

    # Blocks that share a backend and a dtype go to it in one call, so that a fused backend can take them in one launch.
    squeezed: list[Tensor | None] = [None] * len(blocks)
    for (_, out_dtype), (chosen, indices) in work.items():
        results = chosen.squeeze(
            [blocks[i] for i in indices],
            [tensors[i] for i in indices],
            out_dtype,
            memory_format,
            [folds[i] for i in indices],
        )
        for index, kernel in zip(indices, results, strict=True):
            squeezed[index] = kernel
    return [kernel for kernel in squeezed if kernel is not None]


def _check_fold(block: Block, factor: Tensor | None, device: torch.device, index: int) -> None:
    if factor is None:
        return
    where = f"folds[{index}]"
    if tuple(factor.shape) != (block.out_channels,):
        raise ValueError(f"{where} must be [{block.out_channels}], got {list(factor.shape)}")
    if factor.dtype not in DTYPES:
        raise TypeError(f"{where} must be one of {_names(DTYPES)}, got {factor.dtype}")
    if factor.device != device:
        raise ValueError(f"{where} is on {factor.device}, the operands are on {device}")


def _check_operands(block: Block, operands: Sequence[Tensor], index: int) -> bool:
    """Raise where the operands do not fit.

    Returns:
        Whether raw memory may be read: not of tensor subclasses, nor inside ``torch.func`` transforms.
    """
    count = len(operands)
    if count == 0 or count != len(block.operands):
        _check_count(block, operands, f"blocks[{index}]")
    device, dtype = operands[0].device, operands[block.leading].dtype
    # Whole lists at a time: this is a good part of what the host does for a squeeze.
    usual = (
        dtype in DTYPES
        and [tensor.shape for tensor in operands] == block.shapes
        and [tensor.dtype for tensor in operands].count(dtype) == count
        and [tensor.device for tensor in operands].count(device) == count
    )
    if not usual:
        for operand, tensor in zip(block.operands, operands, strict=True):
            _check_operand(block, operand, tensor, operands[block.leading], f"blocks[{index}]")
    if torch.compiler.is_compiling():
        return True  # the registered operators are traced, and run on what the tensors then are
    return is_plain(operands)


def _widest(block: Block, operands: Sequence[Tensor]) -> torch.dtype:
    """What a backend has to know: the dtype of the block, or that of a float64 filter, in which all is composed then."""
    dtypes = [tensor.dtype for tensor in operands]
    return torch.float64 if torch.float64 in dtypes else dtypes[block.leading]


def _check_count(block: Block, operands: Sequence[Tensor], where: str) -> None:
    if len(operands) != len(block.operands):
        raise ValueError(f"{where} needs {len(block.operands)} tensors, got {len(operands)}")
    raise ValueError(f"{where} has no operands, so its device and dtype are unknown")


def _check_operand(block: Block, operand: Operand, tensor: Tensor, first: Tensor, where: str) -> None:
    if tensor.shape != operand.shape:
        raise ValueError(f"{where}: operand {operand.name!r} must be {list(operand.shape)}, got {list(tensor.shape)}")
    if tensor.dtype not in DTYPES:
        raise TypeError(f"{where}: operand {operand.name!r} must be one of {_names(DTYPES)}, got {tensor.dtype}")
    if tensor.device != first.device:
        raise ValueError(
            f"{where}: operand {operand.name!r} is on {tensor.device}, {block.operands[block.leading].name!r} on {first.device}"
        )
    # The one three-dimensional kind of operand is a filter, a constant that a half-precision block keeps in float32.
    if tensor.dtype != first.dtype and len(operand.shape) != 3:
        raise ValueError(
            f"{where}: operand {operand.name!r} is {tensor.dtype}, {block.operands[block.leading].name!r} is {first.dtype}"
        )


def _names(dtypes: Sequence[torch.dtype]) -> str:
    return ", ".join(str(d).removeprefix("torch.") for d in dtypes)
