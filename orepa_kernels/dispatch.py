"""Which backend squeezes what: the registry, the choice, and the one cache of calls.

To add a backend, subclass `orepa_kernels.backends.base.Backend` and `register` it: nothing else in the project changes.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from .backends.base import Backend, BackendError, Gradients, Request, Support
from .backends.cpu import CpuBackend
from .backends.cuda import CudaBackend
from .backends.reference import ReferenceBackend
from .backends.triton import TritonBackend
from .guards import layout_guard
from .plan import Block, Dense, Operand

log = logging.getLogger("orepa_kernels")

#: every backend that this package defines, in the order of the automatic choice, but for `TRITON_FIRST`; those not registered
#: are not part of the installed build
NAMES = ("cuda", "triton", "cpu", "reference")

#: major compute capabilities of GPUs on which the automatic choice asks Triton before CUDA: where the static bound of its
#: products under autocast is lower (benchmarks/sass_audit.py). An estimate, until measured
TRITON_FIRST = frozenset({8, 9})

#: environment variable that replaces ``backend="auto"``
ENVIRONMENT_VARIABLE = "OREPA_BACKEND"

_REGISTRY: dict[str, Backend] = {}
#: why not available; asked on first use, as that may load a driver (torch.compile cannot trace functools.cache)
_REASONS: dict[str, str] = {}


# --- the cache ----------------------------------------------------------------------------------------------------------


class Squeezer(Protocol):
    """Squeezes the operands of all blocks, one after the other (see `orepa_kernels.autograd.Call`)."""

    def __call__(self, tensors: Sequence[Tensor], /) -> list[Tensor]: ...

    def record(self, tensors: Sequence[Tensor], kernels: Sequence[Tensor] | None = None, /) -> list[Tensor]: ...

    def backward(
        self, tensors: Sequence[Tensor], upstream: Sequence[Tensor | None], needed: Sequence[bool], /
    ) -> Gradients: ...


class CallCache:
    """The calls made before, each with what its backend prepared: the one cache on the way to a kernel.

    The key is ``(backend asked for, dtype asked for, memory format, *blocks)``. Under a key lie the newest few layouts of
    operands, each behind a guard (`orepa_kernels.guards.layout_guard`): number, types, dtypes, devices, shapes, strides, and
    which require gradients. What else a launch depends on (precision, alignment of addresses, layouts of upstream gradients)
    is looked up in the call itself. The oldest key goes when there are too many.
    """

    def __init__(self, most_keys: int = 4096, most_layouts: int = 8) -> None:
        self._most_keys, self._most_layouts = most_keys, most_layouts
        self._calls: dict[tuple[object, ...], list[tuple[Callable[..., bool], Squeezer]]] = {}

    def find(self, key: tuple[object, ...], tensors: Sequence[Tensor]) -> Squeezer | None:
        """Return what was added for such tensors."""
        for matches, call in self._calls.get(key, ()):
            if matches(*tensors):
                return call
        return None

    def add(self, key: tuple[object, ...], tensors: Sequence[Tensor], call: Squeezer) -> None:
        """Remember a call for tensors of these layouts."""
        layouts = self._calls.get(key, [])
        self._calls[key] = [*layouts[-self._most_layouts + 1 :], (layout_guard(tensors), call)]
        if len(self._calls) > self._most_keys:
            self._calls.pop(next(iter(self._calls)), None)

    def clear(self) -> None:
        """Forget all calls."""
        self._calls.clear()


calls = CallCache()


# --- the registry -------------------------------------------------------------------------------------------------------


def register(backend: Backend) -> Backend:
    """Make a backend known. Its name must be one of `NAMES`, which also gives its rank in the automatic choice."""
    if backend.name not in NAMES:
        raise ValueError(f"backend name must be one of {', '.join(NAMES)}, got {backend.name!r}")
    _REGISTRY[backend.name] = backend
    _REASONS.pop(backend.name, None)
    calls.clear()
    return backend


def get(name: str) -> Backend:
    """Return a registered backend by name.

    Raises:
        KeyError: there is none of that name.
    """
    return _REGISTRY[name]


def backends() -> dict[str, Support]:
    """Return every backend by name, each with whether it runs here and, if not, why."""
    return {name: _available(name) for name in NAMES}


def names_on(device: torch.device) -> list[str]:
    """Return the backends that squeeze float32 tensors on ``device``, in the order of the automatic choice."""
    block = Block(1, 1, (1, 1), (Dense(Operand("weight", (1, 1, 1, 1))),))
    request = Request(block, device, torch.float32, torch.float32)
    return [name for name in _order(device) if _support(name, request)]


def _available(name: str) -> Support:
    if name not in _REGISTRY:
        return Support(False, f"not part of this build, which has: {', '.join(n for n in NAMES if n in _REGISTRY)}")
    reason = _why_not_available(name)
    return Support(not reason, reason)


def _why_not_available(name: str) -> str:
    if name not in _REASONS:
        _REASONS[name] = _REGISTRY[name].available().reason
    return _REASONS[name]


# What `torch.compiler.assume_constant_result` does, without its import of the compiler: torch.compile shall take the
# answer, and not trace into compiled modules and drivers where it is the first to ask. A constant has to be text or a
# number.
_why_not_available._dynamo_marked_constant = True  # type: ignore[attr-defined]


# --- the choice ---------------------------------------------------------------------------------------------------------


def resolve(name: str) -> str:
    """Return the backend name to use: ``"auto"`` is replaced by ``OREPA_BACKEND`` where that is set.

    Raises:
        ValueError: no backend has that name.
    """
    source = "backend"
    if name == "auto":
        name, source = os.environ.get(ENVIRONMENT_VARIABLE, "auto") or "auto", ENVIRONMENT_VARIABLE
    if name != "auto" and name not in NAMES:
        raise ValueError(f"{source} must be one of auto, {', '.join(NAMES)}, got {name!r}")
    return name


def select(name: str, request: Request) -> Backend:
    """Return the backend that squeezes ``request``.

    Args:
        name: ``"auto"`` for the first that can, or the one to use (see `resolve`).

    Raises:
        BackendError: the backend asked for by name cannot; never another one in its place.
    """
    if name == "auto":
        for candidate in _order(request.device):
            support = _support(candidate, request)
            if support:
                return _REGISTRY[candidate]
            if candidate in _REGISTRY and not torch.compiler.is_compiling():
                log.debug("backend %s passes: %s", candidate, support.reason)
        raise BackendError(f"no backend can squeeze this block: {request}")
    support = _support(name, request)
    if not support:
        raise BackendError(f"backend {name!r} was asked for but cannot run: {support.reason}")
    return _REGISTRY[name]


def _order(device: torch.device) -> tuple[str, ...]:
    """Return the backends in the order of the automatic choice."""
    if device.type != "cuda" or not (_available("cuda") and _available("triton")):
        return NAMES
    if torch.cuda.get_device_capability(device)[0] not in TRITON_FIRST:
        return NAMES
    return "triton", "cuda", *(name for name in NAMES if name not in ("triton", "cuda"))


def _support(name: str, request: Request) -> Support:
    available = _available(name)
    return _REGISTRY[name].supports(request) if available else available


for backend in (CudaBackend(), TritonBackend(), CpuBackend(), ReferenceBackend()):
    register(backend)
