"""What a device can do, and the few questions that vendors answer differently."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch

from ...guards import float32_precision

#: with this variable set before its import, Triton runs kernels in its interpreter, on CPU tensors
INTERPRET = "TRITON_INTERPRET"
INTERPRETING = os.environ.get(INTERPRET, "0").lower() in ("1", "true", "yes", "on")

#: oldest NVIDIA generation with the TF32 tensor cores that the tiles are made for
OLDEST = (8, 0)


@dataclass(frozen=True)
class Device:
    """A kind of device."""

    kind: str  # "cuda", "hip", "xpu" or "interpreter"
    arch: int = 0  # compute capability times ten on NVIDIA
    name: str = ""  # architecture where the vendor has one ("gfx942")

    def precision(self, half: bool) -> str:
        """Return the precision of matrix products whose result, or whose upstream gradient, is ``half`` or float32.

        On NVIDIA's tensor cores, one TF32 product of ``"rounded"`` factors for halves, whose own rounding is larger; for
        float32, what ``torch.get_float32_matmul_precision()`` asks for: ``"highest"`` is three TF32 products, with the error
        of float32 at several times its speed.
        """
        highest = float32_precision() == "highest"
        if self.kind == "cuda":
            return "tf32x3" if highest and not half else "rounded"
        if self.kind == "xpu" or self.name.startswith("gfx94"):
            return "ieee" if highest else "tf32"
        return "ieee"


def device_of(device: torch.device) -> Device:
    """Return the kind of a torch device."""
    if device.type == "cpu":
        return Device("interpreter")
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        if torch.version.hip is not None:
            return Device("hip", name=properties.gcnArchName.partition(":")[0])
        return Device("cuda", 10 * properties.major + properties.minor)
    return Device(device.type)


@dataclass(frozen=True)
class LaunchState:
    """What has to be asked before every launch on a device, with as few calls as that takes."""

    index: int | None  # of the device
    current: Callable[[], int | None]  # the index of the device that launches go to
    capturing: Callable[[], bool]  # whether a graph records the launches of this stream


def launch_state(device: torch.device) -> LaunchState:
    """Return the questions for the device of a tensor."""
    if device.type == "cuda":
        # `torch.cuda.current_device` without the question whether CUDA is initialised: there is a tensor.
        return LaunchState(device.index, torch._C._cuda_getDevice, torch.cuda.is_current_stream_capturing)
    if device.type == "xpu":
        return LaunchState(device.index, torch.xpu.current_device, lambda: False)
    return LaunchState(None, lambda: None, lambda: False)


def capturing(device: torch.device) -> bool:
    """Return whether a graph records the launches of this stream."""
    return launch_state(device).capturing()


def on_device(device: torch.device) -> AbstractContextManager[object]:
    """Let launches go to ``device``, a GPU."""
    return torch.cuda.device(device) if device.type == "cuda" else torch.xpu.device(device)


def stream_of(device: torch.device) -> int:
    """Return the current stream, as a number."""
    if device.type == "cuda":
        return torch.cuda.current_stream(device).cuda_stream
    return torch.xpu.current_stream(device).sycl_queue if device.type == "xpu" else 0
