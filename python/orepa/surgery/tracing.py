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
from types import CodeType, FrameType
from typing import Any

import torch
from torch import fx, nn

from .module_state import ModelState

log = logging.getLogger("orepa")

_NOT_THE_MODELS = tuple(os.path.join(os.path.dirname(file), "") for file in (torch.__file__, __file__))
_SEEDS = range(8)  # of the traces of a forward that draws random numbers


@dataclass(frozen=True)
class CallSite:
    """Where a function is that has called another: a method of ``owner``, or what one called.

    ``run`` numbers the runs of functions in one trace. A frame would tell them apart as well, but keep alive what its callers
    hold.
    """

    run: int
    code: CodeType
    owner: nn.Module | None
    line: int
    instruction: int

    @property
    def file(self) -> str:
        return self.code.co_filename


@dataclass(frozen=True)
class Call:
    """The call of a layer: its call sites, outermost first, and the calls of modules that it lies in."""

    sites: list[CallSite]
    calls: list[tuple[object, int]]  # an identity, and the number of sites around the call


@dataclass
class Traces:
    """The graphs of one module, for each mode and each choice of optional arguments to leave out.

    Args:
        graphs: they stay until the garbage is collected, so they know of no module.
        calls: of layers, by node.
        shared: nodes of values that a module returned as it got them, or that the forward left in the model.
        lines: that called a module: id of the owner, file, line.
        in_train_mode: whether the train mode could be traced as well.
    """

    graphs: list[fx.Graph] = field(default_factory=list)
    calls: dict[fx.Node, Call] = field(default_factory=dict)
    shared: set[fx.Node] = field(default_factory=set)
    lines: set[tuple[int, str, int]] = field(default_factory=set)
    in_train_mode: bool = True


class _Tracer(fx.Tracer):
    """Adds calls and shared values to `Traces`, and the lines if the trace succeeds. It is used once."""

    def __init__(self, is_layer: Callable[[nn.Module], bool], traces: Traces) -> None:
        super().__init__()
        self.is_layer, self.traces = is_layer, traces
        self.lines: set[tuple[int, str, int]] = set()
        self.calls: list[tuple[object, int]] = []
        self.runs: dict[FrameType, int] = {}

    def trace(self, root: Any, concrete_args: dict[str, Any] | None = None) -> fx.Graph:
        try:
            graph = super().trace(root, concrete_args)
            self.traces.lines |= self.lines
            return graph
        finally:
            # Closures of torch keep a tracer until the garbage is collected, and with it all that it knows.
            vars(self).clear()

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return self.is_layer(m) or super().is_leaf_module(m, module_qualified_name)

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        sites = call_sites(sys._getframe(1), self.runs)
        self.lines.update((id(site.owner), site.file, site.line) for site in sites)
        call = Call(sites, self.calls)
        self.calls = [*self.calls, (object(), len(sites))]
        result = super().call_module(m, forward, args, kwargs)
        self.calls = call.calls
        if isinstance(result, fx.Proxy):
            if self.is_leaf_module(m, ""):
                self.traces.calls[result.node] = call
            elif type(m).forward is not nn.Sequential.forward and any(result is value for value in args):
                self.traces.shared.add(result.node)
        return result


def call_sites(frame: FrameType | None, runs: dict[FrameType, int]) -> list[CallSite]:
    """Return where the code outside torch stands that is running in a trace, outermost first; number its runs."""
    frames = []
    while frame is not None and frame.f_code is not fx.Tracer.trace.__code__:
        if not frame.f_code.co_filename.startswith(_NOT_THE_MODELS):
            frames.append(frame)
        frame = frame.f_back
    sites: list[CallSite] = []
    for frame in reversed(frames):
        code = frame.f_code
        first = frame.f_locals.get(code.co_varnames[0]) if code.co_argcount else None
        owner = first if isinstance(first, nn.Module) else sites[-1].owner if sites else None
        sites.append(CallSite(runs.setdefault(frame, len(runs)), code, owner, frame.f_lineno, frame.f_lasti))
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
        with silence(), state.preserved(seed) as has_drawn, set_mode(module, training):
            traces.graphs.append(_Tracer(is_layer, traces).trace(module, concrete_args=defaults or None))
            drew = has_drawn()
        traces.shared.update(value.node for value in state.stored if isinstance(value, fx.Proxy))
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
def silence() -> Iterator[None]:
    """Print nothing, whatever a forward says about symbolic values."""
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
