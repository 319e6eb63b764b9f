"""Reads the linear layers and the arithmetic of a traced forward: every value as an affine map of others."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import is_parametrized

from ..modules.offline_conv import OfflineConv
from ..modules.orepa_conv import OREPAConv
from .forward_graph import Forward, affine_of_norm, is_identity, runs_as_norm
from .linear_map import Axis, LinearMap
from .replace import customization


@dataclass(frozen=True, eq=False)
class Layer:
    """One linear layer.

    Args:
        kind: ``"conv"``, ``"norm"``, ``"scale"`` (per channel or whole; also a constant that is added), ``"pool"``, ``"pad"``.
        name: of the module, below the one that was traced, or of the function.
        map: what it computes in eval mode.
        module: None for a function.
        tensors: the parameters and buffers that it reads.
        problem: why it cannot be merged, or an empty string.
        compose: gives the map of a block, whose kernel is on the device "meta" in ``map``.
    """

    kind: str
    name: str
    map: LinearMap
    module: nn.Module | None = None
    tensors: tuple[Tensor, ...] = ()
    problem: str = ""
    compose: Callable[[], LinearMap] | None = None

    def map_on(self, channels: int, device: str | torch.device) -> LinearMap:
        """Return the map of an input with so many channels, in float64; on the device "meta", its size only."""
        composed = self.compose is not None and torch.device(device).type != "meta"
        linear = self.compose() if self.compose is not None and composed else self.map
        return linear.on(channels, device)


@dataclass(frozen=True)
class Step:
    """A linear node: the sum of multiples of values, then a layer, if any.

    Args:
        inputs: factors and nodes.
        layer: None for a sum or an identity.
        stack: the ``torch.stack`` between the two, of which this is the sum.
    """

    inputs: tuple[tuple[float, fx.Node], ...]
    layer: Layer | None = None
    stack: fx.Node | None = None


# --- layers -------------------------------------------------------------------------------------------------------------


def _scale(factor: Tensor, shift: Tensor | None = None) -> LinearMap:
    """Return a map of single pixels, ``[C]`` or ``[1]`` each."""
    shift = factor.new_zeros(1) if shift is None else shift
    return LinearMap(factor.reshape(-1, 1, 1, 1), shift, shifted=shift.is_meta or bool(shift.detach().any()))


def _unknown(kind: str, name: str, module: nn.Module, problem: str) -> Layer:
    return Layer(kind, name, _scale(torch.ones(1)), module, (), problem)


def _pair(value: int | Sequence[int]) -> tuple[int, int]:
    height, width = (value, value) if isinstance(value, int) else value
    return height, width


def _window(m: nn.Conv2d | nn.AvgPool2d | OREPAConv | OfflineConv, dilation: Sequence[int]) -> tuple[Axis, Axis]:
    """Return the axes of a layer that slides a window."""
    axes = []
    strides, paddings = _pair(m.stride), None if isinstance(m.padding, str) else _pair(m.padding)
    for axis, (taps, d) in enumerate(zip(_pair(m.kernel_size), dilation, strict=True)):
        reach = d * (taps - 1)
        around = reach * (m.padding == "same") if paddings is None else 2 * paddings[axis]
        axes.append(Axis(taps, -(around // 2), d if taps > 1 else 1, strides[axis], around - reach - 1))
    return axes[0], axes[1]


def _outside(axes: tuple[Axis, Axis], mode: str) -> str:
    return mode if any(axis.reads_before() or axis.reads_after() for axis in axes) else ""


def _read_conv(name: str, m: nn.Conv2d) -> Layer:
    problem = "its weight is parametrized" if is_parametrized(m) else customization(m, backward_hooks=True)
    if not problem and (type(m).forward, type(m)._conv_forward) != (nn.Conv2d.forward, nn.Conv2d._conv_forward):
        problem = f"{type(m).__name__} has a forward of its own"
    if not problem and (is_lazy(m.weight) or m.weight.is_meta or not m.weight.is_floating_point()):
        problem = "its weight is no floating-point tensor with data"
    if problem:
        return _unknown("conv", name, m, problem)
    axes = _window(m, m.dilation)
    shift = m.weight.new_zeros(1) if m.bias is None else m.bias
    shifted = bool(shift.detach().any())
    linear = LinearMap(m.weight, shift, m.groups, axes, _outside(axes, m.padding_mode), shifted)
    return Layer("conv", name, linear, m, tuple(m.parameters()))


def _read_block(name: str, m: OREPAConv | OfflineConv) -> Layer:
    problem = next((reason for inner in m.modules() if (reason := customization(inner, backward_hooks=True))), "")
    if type(m).forward not in (OREPAConv.forward, OfflineConv.forward):
        problem = f"{type(m).__name__} has a forward of its own"
    if problem:
        return _unknown("conv", name, m, problem)
    has_norms = any(isinstance(inner, nn.modules.batchnorm._BatchNorm) for inner in m.modules())
    axes = _window(m, m.dilation)
    mode = _outside(axes, m.padding_mode)
    kernel = torch.empty(m.plan.shape, device="meta")
    size = LinearMap(kernel, torch.zeros(1), m.groups, axes, mode, m.bias is not None or has_norms)

    @torch.no_grad()
    def compose() -> LinearMap:
        conv = m.to_conv2d(torch.float64)
        shift = conv.weight.new_zeros(1) if conv.bias is None else conv.bias
        return replace(size, kernel=conv.weight, shift=shift)

    return Layer("conv", name, size, m, tuple(m.parameters()), compose=compose)


def _read_norm(name: str, m: nn.Module) -> Layer | None:
    problem = "it is in train mode" if m.training else customization(m, backward_hooks=True)
    problem = problem or ("its weight is parametrized" if is_parametrized(m) else "")
    if not problem and getattr(m, "running_mean", None) is None:
        problem = "it normalizes with the statistics of its input"
    if problem:
        return _unknown("norm", name, m, problem)
    affine = affine_of_norm(m)  # None for one with an activation, say
    tensors = (*m.parameters(), *(t for t in m.buffers() if t.is_floating_point()))
    return affine and Layer("norm", name, _scale(*affine), m, tensors)


def _read_pool(name: str, m: nn.AvgPool2d) -> Layer:
    axes, divisor = _window(m, (1, 1)), m.divisor_override
    problem = customization(m, backward_hooks=True)
    if _outside(axes, "zeros") and not m.count_include_pad and divisor is None:
        problem = "it does not count the padding, so it is another filter at the border"
    if m.ceil_mode and (axes[0].stride, axes[1].stride) != (1, 1):
        problem = "it rounds the size of its output up"
    taps = axes[0].taps, axes[1].taps
    kernel = torch.full((1, 1, *taps), 1 / (divisor or taps[0] * taps[1]), dtype=torch.float64)
    return Layer("pool", name, LinearMap(kernel, torch.zeros(1), 0, axes, _outside(axes, "zeros")), m, (), problem)


def _read_pad(name: str, m: nn.Module | None, margins: Sequence[int]) -> Layer:
    left, right, top, bottom = margins
    axes = Axis(low=-top, extra=top + bottom - 1), Axis(low=-left, extra=left + right - 1)
    linear = LinearMap(torch.ones(1, 1, 1, 1), torch.zeros(1), 0, axes, _outside(axes, "zeros"))
    return Layer("pad", name, linear, m, (), "" if m is None else customization(m, backward_hooks=True))


# --- forwards -----------------------------------------------------------------------------------------------------------

#: the arithmetic that is read; what of it writes in place is known by its name (`writes`)
_ARITHMETIC: dict[Any, str] = {
    **dict.fromkeys((operator.add, operator.iadd, torch.add, "add", "add_"), "add"),
    **dict.fromkeys((operator.sub, operator.isub, torch.sub, "sub", "sub_"), "sub"),
    **dict.fromkeys((operator.mul, operator.imul, torch.mul, "mul", "mul_"), "mul"),
    **dict.fromkeys((operator.truediv, operator.itruediv, torch.div, "div", "div_"), "div"),
    **dict.fromkeys((operator.neg, torch.neg, "neg"), "neg"),
    **dict.fromkeys((torch.sum, "sum"), "sum"),
}
_IN_PLACE = (operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.setitem)
#: what is evaluated where all its arguments are constants; nothing random, nothing in place
_CONSTANT = {
    *("view", "reshape", "unsqueeze", "squeeze", "flatten", "unflatten", "expand", "getitem"),
    *("add", "sub", "mul", "truediv", "div", "neg", "pow", "exp", "sqrt", "rsqrt", "reciprocal", "abs"),
    *("relu", "sigmoid", "tanh", "softplus", "softmax"),
}


class LinearForward:
    """The linear steps of a traced forward, and the constants."""

    def __init__(self, forward: Forward) -> None:
        self.forward, self.root = forward, forward.root
        self.nodes = list(self.root.graph.nodes)
        self.index = {node: i for i, node in enumerate(self.nodes)}
        self.constants: dict[fx.Node, Any] = {}
        #: by constant the parameters and buffers that it is made of
        self.read: dict[fx.Node, tuple[Tensor, ...]] = {}
        self.steps: dict[fx.Node, Step] = {}
        #: by node the values that it is an affine map of
        self.sources: dict[fx.Node, set[fx.Node]] = {}
        for node in self.nodes:
            if self._evaluate(node):
                continue
            self.sources[node] = {node}
            if step := self._step(node):
                self.steps[node] = step
                self.sources[node] |= set.intersection(*(self.sources[value] for _, value in step.inputs))

    def writes(self, node: fx.Node) -> bool:
        """Return whether a node may write to its inputs."""
        if node.op == "call_module":
            return any(getattr(m, "inplace", False) for m in self.root.get_submodule(str(node.target)).modules())
        name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
        named = name.endswith("_") and not name.endswith("__")
        return named or node.target in _IN_PLACE or bool(node.kwargs.get("inplace")) or "out" in node.kwargs

    def _evaluate(self, node: fx.Node) -> bool:
        """Evaluate a node if it is a constant; return whether it is."""
        if node.op == "get_attr":
            try:
                value = operator.attrgetter(str(node.target))(self.root)
            except AttributeError:  # the forward itself had set it
                return False
            if isinstance(value, Tensor) and not is_lazy(value) and not value.is_meta:
                self.constants[node], self.read[node] = value.detach(), (value,)
            return node in self.constants
        name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
        inputs = node.all_input_nodes
        known = node.op in ("call_function", "call_method") and name in _CONSTANT and inputs
        if not known or any(value not in self.constants for value in inputs):
            return False
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), self.constants.__getitem__)
        function: Any = node.target
        if node.op == "call_method":
            function, args = getattr(args[0], name), args[1:]
        self.constants[node] = function(*args, **kwargs)
        self.read[node] = tuple(t for value in inputs for t in self.read[value])
        return True

    def _is_value(self, argument: Any) -> bool:
        return isinstance(argument, fx.Node) and argument not in self.constants

    def _step(self, node: fx.Node) -> Step | None:
        args: tuple[Any, ...] = node.args
        if node.op == "call_module":
            if len(args) != 1 or node.kwargs or not self._is_value(args[0]):
                return None
            return self._read_module(str(node.target), ((1.0, args[0]),))
        if node.op not in ("call_function", "call_method"):
            return None
        if node.target is F.pad and self._is_value(args[0]):
            return self._read_function_pad(node.name, **_arguments(node, "input", "pad", "mode", "value"))
        kind = _ARITHMETIC.get(node.target)
        if kind == "sum":
            return self._read_stack(**_arguments(node, "input", "dim"))
        if kind is None or set(node.kwargs) - {"alpha"}:
            return None
        if kind == "neg":
            return Step(((-1.0, args[0]),))
        first, second = args
        factor: Any = node.kwargs.get("alpha", 1)
        factor = -float(factor) if kind == "sub" else float(factor)
        if self._is_value(first) and self._is_value(second):
            return Step(((1.0, first), (factor, second))) if kind in ("add", "sub") else None
        if self._is_value(first):
            value, constant, sign = first, second, 1.0
        else:
            value, constant, sign = second, first, factor
        if kind == "div" and value is second:
            return None
        tensors = self.read.get(constant, ()) if isinstance(constant, fx.Node) else ()
        vector = self._per_channel(constant)
        if vector is None:
            return None
        if kind in ("add", "sub"):
            if constant == 0 and not tensors and sign == 1:
                return Step(((1.0, value),))  # sum() begins with 0, and blocks have one in place of a branch
            linear = _scale(torch.ones_like(vector[:1]), vector * (factor if value is first else 1))
        else:
            linear = _scale(1 / vector if kind == "div" else vector)
        return Step(((sign, value),), Layer("scale", node.name, linear, None, tensors))

    def _per_channel(self, constant: Any) -> Tensor | None:
        """Return a number or a constant of one element per channel as a vector."""
        value = self.constants.get(constant) if isinstance(constant, fx.Node) else constant
        if not isinstance(value, int | float | Tensor):
            return None
        value = torch.as_tensor(value).double()
        one_each = value.dim() in (3, 4) and value.shape[-3] == value.numel()
        return value.flatten() if (value.numel() == 1 and value.dim() <= 4) or one_each else None

    def _read_function_pad(
        self, name: str, input: Any, pad: Any, mode: str = "constant", value: Any = 0
    ) -> Step | None:
        known = isinstance(pad, tuple | list) and all(isinstance(p, int) for p in pad) and len(pad) <= 4
        if mode != "constant" or value or not known:
            return None
        return Step(((1.0, input),), _read_pad(name, None, [*pad, 0, 0][:4]))

    def _read_stack(self, input: Any, dim: Any = None, **options: Any) -> Step | None:
        """Read ``torch.stack(values, dim).sum(dim)``."""
        if not isinstance(input, fx.Node) or input.target is not torch.stack or options:
            return None
        arguments = {"dim": 0} | _arguments(input, "tensors", "dim")
        along = arguments["dim"]
        if dim not in (along, (along,), [along]) or not all(map(self._is_value, arguments["tensors"])):
            return None
        return Step(tuple((1.0, value) for value in arguments["tensors"]), stack=input)

    def _read_module(self, name: str, inputs: tuple[tuple[float, fx.Node], ...]) -> Step | None:
        m = self.root.get_submodule(name)
        layer: Layer | None = None
        if isinstance(m, torch.jit.ScriptModule):
            return None
        if isinstance(m, nn.Conv2d):
            layer = _read_conv(name, m)
        elif isinstance(m, OREPAConv | OfflineConv):
            layer = _read_block(name, m)
        elif runs_as_norm(m):
            layer = _read_norm(name, m)
        elif type(m) is nn.AvgPool2d:
            layer = _read_pool(name, m)
        elif type(m) is nn.ZeroPad2d or (type(m) is nn.ConstantPad2d and m.value == 0):
            layer = _read_pad(name, m, m.padding)
        elif is_identity(m) and not customization(m, backward_hooks=True):
            if not m.training or type(m).forward is nn.Identity.forward:
                return Step(inputs)
            layer = _unknown("scale", name, m, "it drops values in train mode")
        return None if layer is None else Step(inputs, layer)


def _arguments(node: fx.Node, *names: str) -> dict[str, Any]:
    return dict(zip(names, node.args, strict=False)) | node.kwargs
