"""Traces a module's own forward, so that a graph module can take the module's place."""

from __future__ import annotations

import copy
import inspect
import operator
import sys
from collections.abc import Callable, Collection
from dataclasses import dataclass
from types import CodeType, FrameType
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx, nn
from torch.nn.parameter import is_lazy

from ..module_info import affine_of_statistics
from ..modules.linear_block import LinearBlock
from ..modules.repvgg import RepVGGBlock
from .module_state import ModelState
from .replace import customization
from .tracing import CallSite, call_sites, has_forward, silence
from .unrun_code import find_flag

#: calls of modules, from outside to inside, each with its number
Calls: TypeAlias = tuple[tuple[int, nn.Module], ...]

_DROPOUTS = {kind.forward for kind in (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout)}


@dataclass(frozen=True)
class Forward:
    """The symbolic forward of one module.

    Args:
        root: a graph module of the same layers.
        calls: by node the calls that it lies in, without its own.
        problem: why ``root`` cannot take the module's place, or an empty string.
    """

    root: fx.GraphModule
    calls: dict[fx.Node, Calls]
    problem: str

    @property
    def entered(self) -> set[nn.Module]:
        """The modules whose forward was looked into."""
        return {module for calls in self.calls.values() for _, module in calls}


class _Tracer(fx.Tracer):
    proxy_buffer_attributes = True

    def __init__(self, root: nn.Module, visible: Collection[nn.Module] | None) -> None:
        super().__init__()
        self.visible, self.number = visible, 0
        parts = [m for m in root.modules() if not isinstance(m, torch.jit.ScriptModule)]
        self.layers = {m for m in parts if is_identity(m) or runs_as_norm(m)}
        self.stack: Calls = ()
        self.calls: dict[fx.Node, Calls] = {}
        self.modes, self.switches = (True, False, 0), False
        self.called: set[nn.Module] = set()
        self.sites: dict[tuple[CodeType, nn.Module | None], CallSite] = {}  # of the functions that ran
        self.runs: dict[FrameType, int] = {}

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        block = isinstance(m, nn.modules.conv._ConvNd | LinearBlock | RepVGGBlock | torch.jit.ScriptModule)
        leaf = block or m in self.layers or bool(customization(m, backward_hooks=True))
        return leaf or (self.visible is not None and m not in self.visible) or super().is_leaf_module(m, "")

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def call_module(self, m: nn.Module, forward: Callable, args: tuple, kwargs: dict) -> Any:
        self.called |= set(m.modules()) if self.is_leaf_module(m, "") else {m}
        outer, self.number = self.stack, self.number + 1
        self.stack = (*outer, (self.number, m))
        try:
            return super().call_module(m, forward, args, kwargs)
        finally:
            self.stack = outer

    def create_node(self, kind: str, *args: Any, **kwargs: Any) -> fx.Node:
        node = super().create_node(kind, *args, **kwargs)
        self.calls[node] = self.stack[:-1] if kind == "call_module" else self.stack
        self.switches |= _modes() != self.modes
        self.sites.update(((site.code, site.owner), site) for site in call_sites(sys._getframe(1), self.runs))
        return node

    def find_problem(self, graph: fx.Graph) -> str:
        """Return why another state of the model may have another graph, or an empty string."""
        if flag := next(filter(None, map(find_flag, self.sites.values())), ""):
            return f"its forward depends on {flag}"
        read = {str(node.target).rpartition(".")[0] for node in graph.nodes if node.op == "get_attr"}
        idle = [
            name
            for name, m in self.root.named_modules()
            if name and (m._parameters or m._buffers) and m not in self.called and name not in read
        ]
        return f"its forward does not use {idle[0]}, which it might in another state" if idle else ""


def _modes() -> tuple[bool, bool, int]:
    depth = torch.autocast_increment_nesting()  # also inside of autocast(enabled=False)
    torch.autocast_decrement_nesting()
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), depth


class _Proxy(fx.Proxy):
    """A value that records ``+=`` and the like as what they are: a write."""


def _write(function: Callable) -> Callable:
    def method(self: fx.Proxy, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    return method


for _function in (operator.iadd, operator.isub, operator.imul, operator.itruediv):
    setattr(_Proxy, f"__{_function.__name__}__", _write(_function))


def runs_as_norm(m: nn.Module) -> bool:
    """Return whether a module is called as a norm: torch's and its subclasses, and others that do what torch's do."""
    return isinstance(m, nn.modules.batchnorm._NormBase) or affine_of_norm(m) is not None


@torch.no_grad()
def affine_of_norm(m: nn.Module) -> tuple[Tensor, Tensor] | None:
    """Return the ``factor * x + shift`` of a norm with running statistics in eval mode, both ``[C]`` in float64.

    It is read from the attributes, whatever the class. A forward that is not torch's is called, too, and has to agree. None for
    any other module.
    """
    mean, var = (getattr(m, key, None) for key in ("running_mean", "running_var"))
    if not isinstance(mean, Tensor) or not isinstance(var, Tensor) or is_lazy(mean) or mean.is_meta:
        return None
    factor, shift = affine_of_statistics(m)
    if type(m).forward in (nn.BatchNorm2d.forward, nn.SyncBatchNorm.forward):
        return factor, shift
    x = 10 * torch.randn(2, len(mean), 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x = x.to(mean.device)
    try:
        y = torch.func.functional_call(m, {key: t.double() for key, t in m.state_dict().items()}, (x.clone(),))
    except Exception:  # it takes another kind of input
        return None
    expected = factor.view(-1, 1, 1) * x + shift.view(-1, 1, 1)
    agrees = isinstance(y, Tensor) and y.shape == x.shape and torch.allclose(y, expected, 1e-9, 1e-9)
    return (factor, shift) if agrees else None


def is_identity(m: nn.Module) -> bool:
    """Return whether a module returns its input in eval mode: an identity, dropout, stochastic depth of any class."""
    if type(m).forward is nn.Identity.forward or type(m).forward in _DROPOUTS:
        return True
    if type(m).__module__.startswith("torch.nn.") or m._modules or m._parameters or m._buffers:
        return False
    try:
        first, *rest = fx.Tracer().trace(copy.deepcopy(m).eval()).nodes
    except Exception:  # a forward may raise anything on symbolic values
        return False
    return [node.op for node in rest] == ["output"] and rest[0].args[0] is first


def trace(
    module: nn.Module, visible: Collection[nn.Module] | None = None, state: ModelState | None = None
) -> Forward | None:
    """Trace the forward of a module, with optional arguments left out; return None where that fails.

    Args:
        module: it stays as it was.
        visible: where given, calls of all other modules are not looked into, and the code of these may not depend on flags.
        state: of the module, if it is known.
    """
    if not has_forward(module) or "forward" in vars(module):
        return None
    parameters = inspect.signature(type(module).forward).parameters.values()
    optional = {p.name: p.default for p in parameters if p.default is not p.empty}
    tracer, state = _Tracer(module, visible), state or ModelState(module)
    try:
        with silence(), state.preserved(0) as has_drawn, torch.enable_grad():
            tracer.modes = _modes()
            graph = tracer.trace(module, concrete_args=optional or None)
            calls, switches = tracer.calls, tracer.switches
            state_problem = "" if visible is None else tracer.find_problem(graph)
            graph._tracer_cls = fx.Tracer  # what unpickles a graph module, with torch alone
            root = fx.GraphModule(module, graph, type(module).__name__)
            graph.owning_module = None  # nodes refer to each other, so they would keep all layers
            draws = has_drawn()
    except Exception:  # a forward may raise anything on symbolic values
        return None
    finally:
        vars(tracer).clear()  # closures of torch keep it until the garbage is collected
    problem = customization(module, backward_hooks=True)
    if optional or any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters):
        problem = "its forward takes optional arguments"
    elif switches:
        problem = "its forward switches gradients or autocast, which a graph does not hold"
    elif draws:
        problem = "its forward draws random numbers"
    elif state.changed:
        problem = "its forward changes the state of the model, or makes tensors"
    elif state_problem:
        problem = state_problem
    return Forward(root, calls, problem)
