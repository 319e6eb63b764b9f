# mypy: disable-error-code="import-untyped, import-not-found"
"""Runs one Triton kernel: through Triton's front end the first time, around it from then on."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from triton import knobs
from triton.runtime import driver

#: holds the hooks of profilers; a module attribute, which Triton never replaces
_runtime = knobs.runtime


class CompiledKernel:
    """A Triton kernel with its grid and all arguments that do not change: the first call goes through Triton's front end.

    Args:
        function: the kernel, whose parameters are addresses, then tables, then a workspace where it has one, then constants.
        programs: how many run.
        tables: on the device.
        constants: by name, in the order of the parameters.
        options: the compiler's.
        index: of the device, which is current whenever this is called.
    """

    def __init__(
        self,
        function: Any,
        programs: int,
        tables: Sequence[Tensor],
        constants: dict[str, Any],
        options: dict[str, int],
        index: int | None,
    ) -> None:
        self._function, self._options, self._index = function, options, index
        self._programs, self._tensors, self._tables = programs, tables, tuple(map(Tensor.data_ptr, tables))
        self._streams: set[int] = set()
        self._named, self._constants = constants, tuple(constants.values())
        self._tail = self._tables + self._constants
        self._compiled: Any = None
        #: how to run what was compiled: the launcher, what finds a device's stream, the function's handle, what it needs
        self._direct: tuple[Callable[..., object], Callable[[int | None], int], object, object] | None = None

    def __call__(self, addresses: int | tuple[int, ...], *workspace: int) -> None:
        """Launch on the current stream; addresses of tensors are integers, in one tuple, or that of a table of them."""
        direct = self._direct
        if direct is None or _hooked():
            self._by_triton(addresses, *self._tables, *workspace)
            return
        # As Inductor launches its kernels. Triton's runner would ask for the device first, and make what hooks want to know.
        run, stream_of_index, handle, metadata = direct
        tail = (*self._tables, *workspace, *self._constants) if workspace else self._tail
        stream = stream_of_index(self._index)
        if stream not in self._streams:
            self._record(stream)
        run(self._programs, 1, 1, stream, handle, metadata, None, None, None, addresses, *tail)

    def _record(self, stream: int) -> None:
        """Have the tables outlast what the current stream is about to read of them, should this be evicted in between."""
        self._streams.add(stream)
        for table in self._tensors:
            if table.device.type != "cpu":
                table.record_stream(torch.accelerator.current_stream(table.device))

    def _by_triton(self, *arguments: object) -> None:
        grid = (self._programs, 1, 1)
        if self._direct is not None:
            self._record(self._direct[1](self._index))
        if self._compiled is not None:
            # Without the front end's look at each argument: all that it could find out is part of our key.
            self._compiled[grid](*arguments, *self._constants)
            return
        compiled = self._compiled = self._function[grid](*arguments, **self._named, **self._options)
        if compiled is None:  # the interpreter compiles nothing
            return
        with contextlib.suppress(AttributeError):  # a Triton that keeps them elsewhere; its runner will know where
            stream_of_index = driver.active.get_current_stream
            self._direct = compiled.run, stream_of_index, compiled.function, compiled.packed_metadata


def _hooked() -> bool:
    """Whether launch hooks are set. A hook is a chain, which may be empty."""
    return bool(_runtime.launch_enter_hook.calls or _runtime.launch_exit_hook.calls)
