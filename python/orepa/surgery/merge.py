"""Merges each linear region into one convolution, block by block; `rewrite_regions` puts any module in a region's place.

What holds a region is replaced by the simplest module that computes the same: the convolution alone, an `nn.Sequential` of it
and of the layers after it, or, where the forward is more than a sequence, a `torch.fx.GraphModule`. All of them print, pickle
and script with torch alone, and hold no parameter of the old branches. Layers outside of the region stay the same objects,
under the same names; the new one is called ``reparam_conv``, as timm calls it.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

from ..module_info import is_channels_last, random_input
from ..modules.conv_norm import ConvNorm
from .forward_graph import trace
from .linear_map import Inexact
from .linear_regions import Region, find_regions, read_regions
from .module_state import ModelState
from .references import find_references
from .replace import exact_copy
from .report import relative_error, rounding_limit
from .tracing import set_mode

_NAME = "reparam_conv"


@dataclass
class Rewrite:
    """Changes to a model that are not applied yet: ``replace_modules(model, rewrite.replacements)`` does that.

    Args:
        replacements: owners of regions to what takes their place.
        done: by region the new layer and its relative error against the region.
        left: the regions that stay, with their `Region.problem`.
    """

    replacements: dict[nn.Module, nn.Module] = field(default_factory=dict)
    done: list[tuple[Region, nn.Module, float]] = field(default_factory=list)
    left: list[Region] = field(default_factory=list)


def merge_regions(model: nn.Module, whole: Collection[nn.Module] = ()) -> Rewrite:
    """Merge every linear region of a model in eval mode into one `nn.Conv2d`, composed in float64 and rounded once.

    Each convolution is compared with its region (`to_conv2d`); a region that differs stays. Nothing is applied yet.

    Args:
        model: not changed.
        whole: modules in which a single convolution and its norm are merged, too.
    """
    return rewrite_regions(model, to_conv2d, whole)


def rewrite_regions(
    model: nn.Module, build: Callable[[Region], tuple[nn.Module, float]], whole: Collection[nn.Module] = ()
) -> Rewrite:
    """Build a module for every linear region, and for each owner of regions the module that calls it.

    Args:
        model: not changed.
        build: gives the layer that takes a region's input and returns its output, and an error for the report. It raises
            `Inexact` for a region that shall stay.
        whole: see `find_regions`.
    """
    result = Rewrite()
    candidates = find_regions(model, whole)  # larger owners first
    for owner, reason in find_references(model, {r.owner for r in candidates}, parameters=False).items():
        for region in candidates:
            region.problem = region.problem or (reason if region.owner is owner else "")
    taken: set[int] = set()
    entered: set[nn.Module] = set()
    for owner in dict.fromkeys(region.owner for region in candidates):
        open_regions = [r for r in candidates if not r.problem and not r.tensors & taken]
        own = [region for region in open_regions if region.owner is owner]
        if not own or owner in entered:  # what an owner enters is rewritten with it
            continue
        visible = {owner}
        for region in open_regions:
            visible |= region.entered if region.owner in visible else set()
        try:
            new, done, left = _rewrite(
                own[0], visible, whole, {region.tensors for region in open_regions}, build, owner is model
            )
        except Inexact as error:
            for region in own:
                region.problem = str(error)
            continue
        if done:
            result.replacements[owner] = new
            result.done += done
            entered |= visible
            taken |= {tensor for region, _, _ in done for tensor in region.tensors}
        result.left += left
    result.left += [region for region in candidates if region.problem and not region.tensors & taken]
    return result


# --- convolutions -------------------------------------------------------------------------------------------------------


def to_conv2d(region: Region) -> tuple[nn.Conv2d, float]:
    """Return the convolution that a region is in eval mode, and its relative error in float64 on random input.

    It has the dtype, device and memory format of the region's weights, and is trainable where any of its parameters is.

    Raises:
        Inexact: the error is more than the rounding of the weights, or a parameter is not finite.
    """
    linear = region.linear_map().symmetric()
    tensors = [t for layer in region.layers for t in layer.tensors if t.dim()]
    # Whether there is a bias follows from the layers, not from their values: so a new net takes the state of a trained one.
    has_bias = any(layer.kind == "norm" or layer.map.shifted or _has_bias(layer.module) for layer in region.layers)
    conv = linear.as_conv2d(has_bias, tensors[0].dtype)
    channels_last = is_channels_last(*(t for t in tensors if t.dim() == 4))
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    weight = linear.kernel.to(tensors[0].dtype).contiguous(memory_format=memory_format)
    trainable = any(t.requires_grad for t in tensors)
    conv.weight = nn.Parameter(weight, trainable)
    if has_bias:
        conv.bias = nn.Parameter(linear.shift.to(weight.dtype, copy=True), trainable)
    error = region_error(region, conv.eval(), conv)
    limit = rounding_limit(weight.dtype)
    if math.isnan(error):
        raise Inexact("its values are not finite; parameters or statistics are damaged")
    if error > limit:
        raise Inexact(f"one convolution differs by {error:.1e} (relative), allowed is {limit:.1e}")
    return conv, error


def _has_bias(module: nn.Module | None) -> bool:
    return module is not None and module._parameters.get("bias") is not None


@torch.no_grad()
def region_error(region: Region, new: nn.Module, shape: nn.Conv2d) -> float:
    """Return the relative error of a layer, both it and the region run in float64, on random input for a convolution."""
    x = random_input(shape, region.device)
    constants = {n: _double(value) for n, value in region.forward.constants.items()}
    values: dict[fx.Node, Any] = {**constants, region.source: x}
    for node in region.nodes:
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
        if node.op == "call_module":
            values[node] = exact_copy(region.forward.root.get_submodule(str(node.target)), copy.deepcopy)(*args)
        elif node.op == "call_method":
            values[node] = getattr(args[0], str(node.target))(*args[1:], **kwargs)
        else:
            values[node] = node.target(*args, **kwargs)  # type: ignore[operator]
    return relative_error(values[region.sink], exact_copy(new, copy.deepcopy)(x))


def _double(value: Any) -> Any:
    return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


# --- owners -------------------------------------------------------------------------------------------------------------


def _rewrite(
    like: Region,
    visible: set[nn.Module],
    whole: Collection[nn.Module],
    wanted: set[frozenset[int]],
    build: Callable[[Region], tuple[nn.Module, float]],
    is_model: bool,
) -> tuple[nn.Module, list[tuple[Region, nn.Module, float]], list[Region]]:
    """Return what takes the place of an owner, its new layers, and the regions that ``build`` leaves.

    Args:
        like: one of the owner's regions.
        visible: the modules around its regions. All others are called as they are, and keep their class and mode.
        whole: see `find_regions`.
        wanted: the regions to rewrite, by what they read.
        build: see `rewrite_regions`.
        is_model: whether the owner is the model itself.
    """
    owner = like.owner
    state = ModelState(owner)
    traced = trace(owner, visible, state)
    assert traced is not None  # less is looked into than where the regions were found
    if _graph_in_training(owner, visible, state) != str(traced.root.graph):
        raise Inexact("the forward around it is another one in train mode")
    if traced.problem:
        raise Inexact(traced.problem)
    root, graph = traced.root, traced.root.graph
    done: list[tuple[Region, nn.Module, float]] = []
    left: list[Region] = []
    places: dict[str, str] = {}
    keys = {child: key for key, child in owner._modules.items()}
    for region in read_regions(like.name, owner, traced, whole, everywhere=True)[0]:
        if region.problem or region.tensors not in wanted:
            continue
        try:
            layer, error = build(region)
        except Inexact as problem:
            region.problem = str(problem)
            left.append(region)
            continue
        target = f"{_NAME}_{len(done) + 1}" if done else _NAME
        done.append((region, layer, error))
        ends_in = [module for _, module in traced.calls[region.sink]]
        if region.sink.op == "call_module":
            ends_in.append(root.get_submodule(str(region.sink.target)))
        places[target] = keys.get(ends_in[0], "") if ends_in else ""
        root.add_submodule(target, layer)
        with graph.inserting_after(region.sink):
            region.sink.replace_all_uses_with(graph.call_module(target, (region.source,)))
        for node in reversed(region.nodes):
            graph.erase_node(node)
        for node in reversed(graph.nodes):
            if node in region.forward.constants and not node.users:
                graph.erase_node(node)
    new = _simplest(owner, root, places)
    if is_model and isinstance(new, fx.GraphModule) and not all(region.is_own_sum for region, _, _ in done):
        raise Inexact("the whole model would have to be rewritten for it")
    return new, done, left


def _graph_in_training(owner: nn.Module, visible: set[nn.Module], state: ModelState) -> str:
    """Return the graph of an owner's forward in train mode; the parts that are called as they are change mode by themselves."""
    with set_mode(owner, training=True):
        traced = trace(owner, visible, state)
    return "" if traced is None else str(traced.root.graph)


def _simplest(owner: nn.Module, root: fx.GraphModule, places: dict[str, str]) -> nn.Module:
    """Return a graph module as a layer or a sequence, if it is one, in eval mode, with the plain attributes of the owner.

    Args:
        owner: what it replaces.
        root: the graph module.
        places: by new layer the name of the owner's child in whose call its region ended.
    """
    first, *calls, output = root.graph.nodes
    following = [first, *calls]
    names = [str(node.target) for node in calls]
    is_sequence = first.op == "placeholder" and len(set(names)) == len(names) and output.args[0] is following[-1]
    for value, node in zip(following, calls, strict=False):
        is_sequence = is_sequence and node.op == "call_module" and node.args == (value,) and not node.kwargs
    new: nn.Module
    if not is_sequence:
        new = fx.GraphModule(root, root.graph, type(owner).__name__)
    elif type(owner).forward is nn.Sequential.forward and not isinstance(
        owner, ConvNorm
    ):  # its children keep their places
        new = nn.Sequential()
        for key in owner._modules:
            inside = [n for n in names if places.get(n, n.partition(".")[0]) == key]
            new.add_module(key, _sequence({n.removeprefix(f"{key}."): root.get_submodule(n) for n in inside}))
    else:
        new = _sequence({name: root.get_submodule(name) for name in names})
    for name, value in vars(owner).items():
        parts = value if isinstance(value, tuple) else (value,)
        if all(isinstance(part, int | float | str | None) for part in parts) and not hasattr(new, name):
            vars(new)[name] = value
    return new.eval()


def _sequence(layers: dict[str, nn.Module]) -> nn.Module:
    if len(layers) == 1:
        return next(iter(layers.values()))
    result = nn.Sequential() if layers else nn.Identity()
    for name, layer in layers.items():
        result.add_module(name.replace(".", "_"), layer)
    return result
