"""Traces a module's forward with `torch.fx` in both modes, and records the lines of code that call its parts."""

from __future__ import annotations

import contextlib
import inspect
import io
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import torch
from torch import fx, nn

from .module_state import ModelState

log = logging.getLogger("orepa")

_TORCH = os.path.join(os.path.dirname(torch.__file__), "")
_SEEDS = range(8)  # of the traces of a forward that draws random numbers


@dataclass(frozen=True)
class CallSite:
    """Where a function is that has called another: a method of ``owner``, or what one called."""

    frame: FrameType
    owner: nn.Module | None
    line: int
    instruction: int

    @property
    def file(self) -> str:
        return self.frame.f_code.co_filename


@dataclass(frozen=True)
class Call:
    """The call of a layer: its call sites, outermost first, and the calls of modules that it lies in."""

    sites: list[CallSite]
    calls: list[tuple[object, int]]  # an identity, and the number of sites around the call


@dataclass
class Traces:
    """The graphs of one module, for each mode and each choice of optional arguments to leave out."""

    graphs: list[fx.Graph] = field(default_factory=list)
    lines: set[tuple[int, str, int]] = field(default_factory=set)  # that called a module: id of the owner, file, line
    in_train_mode: bool = True  # whether the train mode could be traced as well


class _Tracer(fx.Tracer):
    """Marks the nodes of layers with their `Call`, and what a module returns as it got it with ``passed_on``.

    `trace` marks with ``stored`` what the forward leaves in the model.
    """

    def __init__(self, is_layer: Callable[[nn.Module], bool]) -> None:
        super().__init__()
        self.is_layer = is_layer
        self.lines: set[tuple[int, str, int]] = set()
        self.calls: list[tuple[object, int]] = []

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return self.is_layer(m) or super().is_leaf_module(m, module_qualified_name)

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        sites = _call_sites(sys._getframe(1))
        self.lines.update((id(site.owner), site.file, site.line) for site in sites)
        call = Call(sites, self.calls)
        self.calls = [*self.calls, (object(), len(sites))]
        result = super().call_module(m, forward, args, kwargs)
        self.calls = call.calls
        if isinstance(result, fx.Proxy):
            if self.is_leaf_module(m, ""):
                result.node.meta["call"] = call
            elif type(m).forward is not nn.Sequential.forward and any(result is value for value in args):
                result.node.meta["passed_on"] = True
        return result


def _call_sites(frame: FrameType | None) -> list[CallSite]:
    """Return where the code outside torch stands that is running in a trace, outermost first."""
    frames = []
    while frame is not None and frame.f_code is not fx.Tracer.trace.__code__:
        if not frame.f_code.co_filename.startswith((_TORCH, __file__)):
            frames.append(frame)
        frame = frame.f_back
    sites: list[CallSite] = []
    for frame in reversed(frames):
        code = frame.f_code
        first = frame.f_locals.get(code.co_varnames[0]) if code.co_argcount else None
        owner = first if isinstance(first, nn.Module) else sites[-1].owner if sites else None
        sites.append(CallSite(frame, owner, frame.f_lineno, frame.f_lasti))
    return sites


def trace(module: nn.Module, name: str, state: ModelState, is_layer: Callable[[nn.Module], bool]) -> Traces | None:
    """Trace a module, in which `is_layer` tells what to call as a whole; return None where it cannot be traced.

    That is where the eval mode, with any choice of arguments, raises an error or draws random numbers: each call is another
    function then. In train mode, draws (layer drop) are repeated with several seeds.
    """
    if not any(True for _ in module.children()) or not has_forward(module) or "forward" in vars(module):
        return None
    traces = Traces()

    def draws(training: bool, defaults: dict[str, Any], seed: int = 0) -> bool:
        """Add a trace, and return whether it drew random numbers."""
        with _silence(), state.preserved(seed) as has_drawn, set_mode(module, training):
            tracer = _Tracer(is_layer)
            traces.graphs.append(tracer.trace(module, concrete_args=defaults or None))
            traces.lines |= tracer.lines
            drew = has_drawn()
        for value in state.stored:
            if isinstance(value, fx.Proxy):
                value.node.meta["stored"] = True
        return drew

    try:
        if any(draws(False, defaults) for defaults in _choices(module)):
            raise RuntimeError("its forward draws random numbers in eval mode")
    except Exception as error:  # a forward may raise anything on symbolic values; the fallback is to look inside
        log.debug("cannot trace %s: %s", name or "the model", error)
        return None
    try:
        for defaults in _choices(module):
            all(draws(True, defaults, seed) for seed in _SEEDS)  # one trace where nothing is drawn
    except Exception as error:
        log.debug("cannot trace %s in train mode: %s", name or "the model", error)
        traces.in_train_mode = False
    return traces


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        warnings.simplefilter("ignore")  # about arguments fixed at their defaults, on purpose
        yield


@contextlib.contextmanager
def set_mode(module: nn.Module, training: bool) -> Iterator[None]:
    """Set the mode of all parts; a scripted one keeps it outside of its attributes."""
    modes = {part: part.training for part in module.modules()}
    try:
        for part in modes:
            part.training = training
        yield
    finally:
        for part, mode in modes.items():
            part.training = mode


def has_forward(module: nn.Module) -> bool:
    """Return whether a module is more than a list of its children."""
    return type(module).forward not in (nn.Module.forward, nn.ModuleList.forward, nn.ModuleDict.forward)


def _choices(module: nn.Module) -> list[dict[str, Any]]:
    """Return the optional arguments to trace with their defaults: none, all, and all but one.

    A symbolic value is never None, so ``if mask is not None`` goes one way only in each of them.
    """
    parameters = inspect.signature(inspect.unwrap(type(module).forward)).parameters.values()
    optional = {p.name: p.default for p in parameters if p.default is not p.empty}
    # The tracer would take a collection apart.
    optional = {name: value for name, value in optional.items() if not isinstance(value, list | tuple | dict)}
    all_but_one = [{name: value for name, value in optional.items() if name != given} for given in optional]
    return [{}, *([optional] if optional else []), *(all_but_one if len(optional) > 1 else [])]
