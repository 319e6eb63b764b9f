"""A GPU that is not there: Triton compiles for it and launches, up to the driver's own call, which does nothing.

A helper of the tests and of ``benchmarks/host_overhead.py``. Tensors are on the CPU, and kernels leave them as they are.
"""

from __future__ import annotations

import contextlib
import itertools
from collections import defaultdict
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import triton.backends.nvidia.driver as nvidia
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from orepa_kernels import dispatch
from orepa_kernels.backends.triton import backend, device
from orepa_kernels.backends.triton import launcher as launch
from orepa_kernels.backends.triton.kernels.addresses import write_words
from orepa_kernels.backends.triton.kernels.backward import squeeze_backward
from orepa_kernels.backends.triton.kernels.forward import squeeze_forward
from orepa_kernels.backends.triton.kernels.sums import add_parts

#: what launches are handed to by default: takes whatever comes and does nothing, without a Python frame
NOTHING: Callable[..., object] = itertools.chain

KERNELS = (squeeze_forward, squeeze_backward, add_parts, write_words)


def fills_table(arguments: object) -> bool:
    """Return whether a launch fills a table of addresses, by its arguments."""
    nested = isinstance(arguments, tuple)
    return nested and (len(arguments) == launch._WORDS or any(map(fills_table, arguments)))


class _Driver:
    """As much of Triton's driver as launching needs; launchers are Triton's own."""

    launcher_cls = nvidia.CudaLauncher

    def __init__(self, launched: Callable[..., object]) -> None:
        self.get_current_device = torch.cuda.current_device
        self.get_current_stream = torch._C._cuda_getCurrentRawStream
        self.utils = SimpleNamespace(
            launch=launched,
            build_signature_metadata=lambda types: bytes(len(types)),
            get_device_properties=lambda index: {"max_shared_mem": 227 * 1024},
            load_binary=lambda *what: (1, 2, 32, 0, 1024),  # module, function, registers, spills, threads
        )

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


@contextlib.contextmanager
def pretend(launched: Callable[..., object] = NOTHING) -> Iterator[None]:
    """Let ``backend="triton"`` launch for CPU tensors, as if they were a GPU's, for the length of the block.

    What is asked of torch before every launch is asked all the same, but for the calls of the CUDA runtime.

    Args:
        launched: is called in place of Triton's compiled launcher, with what Triton hands over to that.
    """
    hopper, before = device.Device("cuda", 90), dict(vars(driver))
    with contextlib.ExitStack() as stack:

        def put(where: Any, name: str, value: object) -> None:
            stack.enter_context(mock.patch.object(where, name, value, create=True))

        put(torch.cuda, "_initialized", True)
        put(torch._C, "_cuda_getDevice", int)  # builtins, because so are those: 0, and the default stream, a false 0
        put(torch._C, "_cuda_getCurrentRawStream", bool)
        put(torch.cuda.graphs, "_cuda_isCurrentStreamCapturing", bool)
        put(backend, "INTERPRETING", True)  # the tensors may be on the CPU
        put(launch, "device_of", lambda _: hopper)
        state = device.LaunchState(0, torch._C._cuda_getDevice, torch.cuda.is_current_stream_capturing)
        put(launch, "launch_state", lambda _: state)
        put(dispatch.calls, "_calls", {})
        put(dispatch, "_REASONS", {})
        for function in KERNELS:  # not what was compiled for another launcher
            put(function, "device_caches", defaultdict(function.create_binder))
        # Up to Triton 3.6 each launcher is compiled for its signature, later there is one for all.
        put(nvidia, "library_dirs", list)
        put(nvidia, "compile_module_from_src", lambda **_: SimpleNamespace(launch=launched))
        put(nvidia, "PyKernelArg", lambda **how: how)
        driver.set_active(_Driver(launched))
        try:
            yield
        finally:
            for function in KERNELS:
                for compiled in [kernel for own, *_ in function.device_caches.values() for kernel in own.values()]:
                    compiled.module = None  # which Triton would unload, from 3.8 on
            vars(driver).clear()  # no `reset_active`, which looks for a GPU
            vars(driver).update(before)
