"""Which backend squeezes what: the registry, the choice, and what is remembered from call to call.

To add a backend, subclass `orepa_kernels.backends.base.Backend` and `register` it: nothing else in the project changes.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .backends.base import Backend, BackendError, Request, Shortcut, Verdict
from .backends.cpu import CpuBackend
from .backends.cuda import CudaBackend
from .backends.reference import ReferenceBackend
from .backends.triton import TritonBackend
from .guards import signature
from .plan import Block, Dense, Operand

log = logging.getLogger("orepa_kernels")

#: every backend that this package defines, fastest first; those not registered are not part of the installed build
NAMES = ("cuda", "triton", "cpu", "reference")

#: environment variable that replaces ``backend="auto"``
ENVIRONMENT_VARIABLE = "OREPA_BACKEND"


_REGISTRY: dict[str, Backend] = {}
#: asked on first use, once: finding out may load a driver (a plain dict, because torch.compile cannot trace functools.cache)
_AVAILABLE: dict[str, Verdict] = {}
#: what `choose` found; a training step asks for the same blocks every time
_CHOICES: dict[tuple[object, ...], Backend] = {}
_MOST_CHOICES = 1 << 16
#: `Backend.shortcut` of calls seen before, each after the predicate that its operands have to meet
_SHORTCUTS: dict[tuple[object, ...], list[tuple[Callable[..., bool], Shortcut]]] = {}
_MOST_SHORTCUTS, _MOST_SIGNATURES = 1 << 14, 8


def register(backend: Backend) -> Backend:
    """Make a backend known. Its name must be one of `NAMES`, which also gives its rank in the automatic choice."""
    if backend.name not in NAMES:
        raise ValueError(f"backend name must be one of {', '.join(NAMES)}, got {backend.name!r}")
    _REGISTRY[backend.name] = backend
    _AVAILABLE.pop(backend.name, None)
    _CHOICES.clear()
    _SHORTCUTS.clear()
    return backend


def get(name: str) -> Backend:
    """A registered backend by name.

    Raises:
        KeyError: there is none of that name.
    """
    return _REGISTRY[name]


def _available(name: str) -> Verdict:
    if name not in _REGISTRY:
        return Verdict(False, f"not part of this build, which has: {', '.join(n for n in NAMES if n in _REGISTRY)}")
    if torch.compiler.is_compiling():
        reason = _why_not_available(name)
        return Verdict(not reason, reason)
    return _asked(name)


def _asked(name: str) -> Verdict:
    if name not in _AVAILABLE:
        _AVAILABLE[name] = _REGISTRY[name].available()
    return _AVAILABLE[name]


def _why_not_available(name: str) -> str:
    return _asked(name).reason


# What `torch.compiler.assume_constant_result` does, without its import of the compiler: torch.compile shall take the
# answer, and not trace into compiled modules and drivers where it is the first to ask. A constant has to be text or a
# number.
_why_not_available._dynamo_marked_constant = True  # type: ignore[attr-defined]


def backends() -> dict[str, Verdict]:
    """Every backend by name, fastest first, each with whether it runs here and, if not, why."""
    return {name: _available(name) for name in NAMES}


def names_on(device: torch.device) -> list[str]:
    """The backends that squeeze float32 tensors on ``device``, fastest first; the CPU's are not among those of a GPU."""
    block = Block(1, 1, (1, 1), (Dense(Operand("weight", (1, 1, 1, 1))),))
    request = Request(block, device, torch.float32, torch.float32)
    return [name for name in NAMES if _verdict(name, request)]


def resolve(name: str) -> str:
    """The backend name to use: ``"auto"`` is replaced by ``OREPA_BACKEND`` where that is set.

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
    """The backend that squeezes ``request``.

    Args:
        name: ``"auto"`` for the first that can, or the one to use (see `resolve`).

    Raises:
        BackendError: the backend asked for by name cannot; never another one in its place.
    """
    if name == "auto":
        for candidate in NAMES:
            verdict = _verdict(candidate, request)
            if verdict:
                return _REGISTRY[candidate]
            if candidate in _REGISTRY:
                _note_pass(candidate, verdict.reason)
        raise BackendError(f"no backend can squeeze this block: {request}")
    verdict = _verdict(name, request)
    if not verdict:
        raise BackendError(f"backend {name!r} was asked for but cannot run: {verdict.reason}")
    return _REGISTRY[name]


def choose(
    name: str, block: Block, device: torch.device, dtype: torch.dtype, out_dtype: torch.dtype, plain: bool
) -> Backend:
    """`select` for the request of these fields; asked once, then remembered."""
    if torch.compiler.is_compiling():  # could not trace the lookup
        return select(name, Request(block, device, dtype, out_dtype, plain))
    key = (name, block, device, dtype, out_dtype, plain)
    chosen = _CHOICES.get(key)
    if chosen is None:
        chosen = select(name, Request(block, device, dtype, out_dtype, plain))
        if len(_CHOICES) >= _MOST_CHOICES:
            _CHOICES.clear()
        _CHOICES[key] = chosen
    return chosen


def recall(key: tuple[object, ...], operands: Sequence[Tensor]) -> Shortcut | None:
    """What `remember` was told for such operands."""
    for matches, shortcut in _SHORTCUTS.get(key, ()):
        if matches(*operands):
            return shortcut
    return None


def remember(key: tuple[object, ...], operands: Sequence[Tensor], shortcut: Shortcut) -> None:
    """Keep a shortcut for what ``key`` says and operands that look like these. The oldest of a key goes when there are many."""
    if len(_SHORTCUTS) >= _MOST_SHORTCUTS:
        _SHORTCUTS.clear()
    kept = _SHORTCUTS.get(key, [])[-_MOST_SIGNATURES + 1 :]
    _SHORTCUTS[key] = [*kept, (signature(operands), shortcut)]


def _verdict(name: str, request: Request) -> Verdict:
    available = _available(name)
    return _REGISTRY[name].can_run(request) if available else available


def _note_pass(name: str, reason: str) -> None:
    if not torch.compiler.is_compiling():
        log.debug("backend %s passes: %s", name, reason)


for backend in (CudaBackend(), TritonBackend(), CpuBackend(), ReferenceBackend()):
    register(backend)
