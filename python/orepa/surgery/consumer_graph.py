"""Who consumes a convolution's output? The question behind the norm check of `prepare` and the folding of `convert`.

The answer comes from a `torch.fx` graph of the model, or, where the whole model cannot be traced (control flow that depends
on data), of the largest submodules that can. Below that, the order of modules decides: as proof in an `nn.Sequential`, as an
indication elsewhere. Proofs about a submodule hold where it is called as a whole, so each module around it that cannot be
traced is read (`callers`): where it might do something else with the submodule, they are indications, too.
"""

from __future__ import annotations

import inspect
import logging
import warnings
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx, nn

from ..modules.linear_block import LinearBlock
from ..modules.repvgg import RepVGGBlock
from .replace import own_call
from .source_usage import ANYTHING, CALLS, ELEMENTS, uses_of_children

log = logging.getLogger("orepa")

#: how a `Consumer` is known: from a traced graph, from an nn.Sequential, or only from the order of registration
GRAPH, SEQUENCE, ORDER = "graph", "sequence", "order"

_SHAPE_ONLY = {"permute", "contiguous", "transpose", "reshape", "view", "flatten", "movedim", "to"}
_SHAPE_ONLY_FUNCTIONS = {torch.permute, torch.transpose, torch.reshape, torch.flatten, torch.movedim}


@dataclass(frozen=True)
class Consumer:
    """What happens to a convolution's output.

    Args:
        norm: name of the norm layer that takes all of it, or None.
        direct: nothing stands between the two but identities, and each runs once: the norm can be folded.
        proof: `GRAPH`, `SEQUENCE` or `ORDER`.
        problem: why ``norm`` is None, in words.
    """

    norm: str | None
    direct: bool = False
    proof: str = GRAPH
    problem: str = ""


def is_norm(module: nn.Module) -> bool:
    """Whether a module normalizes with statistics of its own input: any batch, instance, group, layer or RMS norm.

    Frozen batch norms are affine maps, not norms.
    """
    known = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)
    return isinstance(module, known) or (_is_called_norm(module) and "Frozen" not in type(module).__name__)


def _is_called_norm(module: nn.Module) -> bool:
    """Libraries bring norms of their own; blocks such as timm's ConvNormAct carry the word too, but hold a convolution."""
    return "Norm" in type(module).__name__ and not any(is_conv(m) for m in module.modules())


def is_conv(module: nn.Module) -> bool:
    """Whether a module is a convolution that `prepare` or `convert` may look at."""
    return isinstance(module, nn.modules.conv._ConvNd | LinearBlock)


def consumers(model: nn.Module) -> dict[str, Consumer]:
    """The consumer of every convolution in ``model``, by qualified name (the first, for a module with several)."""
    return _Search(model).found


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        leaf = is_conv(m) or isinstance(m, RepVGGBlock) or is_norm(m) or _is_called_norm(m)
        return leaf or super().is_leaf_module(m, module_qualified_name)


class _Search:
    def __init__(self, model: nn.Module) -> None:
        self.found: dict[str, Consumer] = {}
        names = {id(module): name for name, module in model.named_modules()}
        every = list(model.named_modules(remove_duplicate=False))
        #: names of modules that have several
        self.aliased = {names[id(module)] for name, module in every if names[id(module)] != name}
        self._visit(model, "", CALLS)

    def _visit(self, module: nn.Module, prefix: str, use: int) -> None:
        """Read one module, of which no ancestor can be traced. ``use`` is what those do with it (see `callers`)."""
        if is_conv(module):
            self._add(prefix, Consumer(None, problem="nothing is known of what follows it"))
            return
        graphs = [] if use == ELEMENTS else _trace(module, prefix)  # iterated over, it is but a list of its children
        if graphs:
            for name, consumer in _read_graphs(module, graphs, prefix).items():
                self._add(name, consumer if not prefix else self._downgrade(name, consumer, use))
            return
        if isinstance(module, nn.ModuleList | nn.ModuleDict) and not _has_forward(module):
            uses = dict.fromkeys(module._modules, CALLS if use >= ELEMENTS else ANYTHING)
        elif use == ELEMENTS:
            uses = dict.fromkeys(module._modules, CALLS)
        elif use == CALLS:
            uses = uses_of_children(module)
        else:
            uses = dict.fromkeys(module._modules, ANYTHING)
        for name, child in module.named_children():
            path = f"{prefix}.{name}" if prefix else name
            if is_conv(child):
                self._add(path, self._downgrade(path, _by_order(module, name, prefix), use))
            elif not is_norm(child) and not isinstance(child, RepVGGBlock):
                self._visit(child, path, uses[name])

    def _add(self, name: str, consumer: Consumer) -> None:
        self.found.setdefault(name, consumer)

    def _downgrade(self, name: str, consumer: Consumer, use: int) -> Consumer:
        """What is left of a proof that holds for the parent as a whole, where that is not all that is done with it."""
        if consumer.norm is None:
            return consumer
        if use != CALLS and consumer.proof != ORDER:
            consumer = replace(consumer, proof=ORDER)
        return replace(consumer, direct=False) if {name, consumer.norm} & self.aliased else consumer


def _has_forward(module: nn.Module) -> bool:
    return type(module).forward not in (nn.Module.forward, nn.ModuleList.forward, nn.ModuleDict.forward)


def _trace(module: nn.Module, prefix: str) -> list[fx.Graph]:
    """Graphs of a module, one for each choice of optional arguments to leave out; none where one cannot be traced.

    A symbolic value is never None, so ``if mask is not None`` goes one way only in each of them.
    """
    if not any(True for _ in module.children()) or not _has_forward(module) or "forward" in vars(module):
        return []
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that a default was taken for granted, which is the point
            return [_Tracer().trace(module, concrete_args=defaults or None) for defaults in _choices(module)]
    except Exception as error:  # whatever a forward raises on symbolic values: the fallback is to look inside
        log.debug("cannot trace %s: %s", prefix or "the model", error)
        return []


def _choices(module: nn.Module) -> list[dict[str, Any]]:
    """Optional arguments to trace with their defaults: none, all, and all but one."""
    parameters = inspect.signature(inspect.unwrap(type(module).forward)).parameters.values()
    optional = {p.name: p.default for p in parameters if p.default is not p.empty}
    # A default that is a collection would be taken apart by the tracer.
    optional = {name: value for name, value in optional.items() if not isinstance(value, list | tuple | dict)}
    choices: list[dict[str, Any]] = [{}]
    if optional:
        choices.append(optional)
    if len(optional) > 1:
        choices += [{name: value for name, value in optional.items() if name != given} for given in optional]
    return choices


def _read_graphs(module: nn.Module, graphs: list[fx.Graph], prefix: str) -> dict[str, Consumer]:
    """What all graphs of a module agree on."""
    readings = [_read_graph(module, graph, prefix) for graph in graphs]
    merged: dict[str, Consumer] = {}
    for name in dict.fromkeys(name for found, _ in readings for name in found):
        consumers_here = [found[name] for found, _ in readings if name in found]
        first = next((c for c in consumers_here if c.norm is None), consumers_here[0])
        if first.norm is not None:
            same = all(c.norm == first.norm and c.direct for c in consumers_here)
            # Where the convolution is left out, so must be the norm.
            same = same and not any(first.norm in norms for found, norms in readings if name not in found)
            first = replace(first, direct=same)
        merged[name] = first
    return merged


def _read_graph(module: nn.Module, graph: fx.Graph, prefix: str) -> tuple[dict[str, Consumer], set[str]]:
    """The consumer of each convolution that is called, and the names of all modules that are."""
    modules = dict(module.named_modules())
    calls: dict[str, list[fx.Node]] = {}
    read: set[str] = set()
    for node in graph.nodes:
        if node.op == "call_module":
            calls.setdefault(str(node.target), []).append(node)
        elif node.op == "get_attr":
            read.add(str(node.target).rpartition(".")[0])

    found: dict[str, Consumer] = {}
    for name, nodes in calls.items():
        if not is_conv(modules[name]):
            continue
        norms: set[str] = set()
        problem, direct = "", len(nodes) == 1
        for node in nodes:
            call_norms, call_problem, call_direct = _follow(node, modules)
            norms |= call_norms
            problem, direct = problem or call_problem, direct and call_direct
        path = f"{prefix}.{name}" if prefix else name
        if problem or not norms:
            if not problem:
                problem = "nothing uses its output"
            elif prefix and problem == _LEAVES:
                problem = f"its output leaves {prefix}, whose caller cannot be traced"
            found[path] = Consumer(None, problem=problem)
            continue
        norm = sorted(norms)[0]
        direct = direct and len(norms) == 1 and len(calls[norm]) == 1 and not {name, norm} & read
        found[path] = Consumer(f"{prefix}.{norm}" if prefix else norm, direct, GRAPH)
    return found, {f"{prefix}.{name}" if prefix else name for name in calls}


_LEAVES = "its output leaves the model"


def _follow(node: fx.Node, modules: dict[str, nn.Module]) -> tuple[set[str], str, bool]:
    """Norms that a value reaches through shape-only steps, the first other use of it, and whether nothing is between."""
    norms: set[str] = set()
    direct, frontier = True, [node]
    while frontier:
        value = frontier.pop()
        for user in value.users:
            module = modules.get(str(user.target)) if user.op == "call_module" else None
            if isinstance(module, nn.Identity):
                direct = direct and _is_plain_identity(module)
                frontier.append(user)
            elif isinstance(module, nn.Dropout | nn.Dropout2d) or _is_shape_only(user, value):
                direct = False
                frontier.append(user)
            elif module is not None and is_norm(module):
                norms.add(str(user.target))
            elif user.op == "output":
                return norms, _LEAVES, False
            else:
                what = f"{user.target} ({type(module).__name__})" if module is not None else _name(user)
                return norms, f"its output goes to {what}, not to a norm", False
    return norms, "", direct


def _is_plain_identity(module: nn.Module) -> bool:
    return type(module).forward is nn.Identity.forward and not own_call(module)


def _is_shape_only(user: fx.Node, value: fx.Node) -> bool:
    if not user.args or user.args[0] is not value:
        return False
    if user.op == "call_method":
        return user.target in _SHAPE_ONLY
    return user.op == "call_function" and user.target in _SHAPE_ONLY_FUNCTIONS


def _name(node: fx.Node) -> str:
    return str(getattr(node.target, "__name__", node.target))


def _by_order(parent: nn.Module, name: str, prefix: str) -> Consumer:
    """The next sibling, in a parent that cannot be traced."""
    names = list(parent._modules)
    is_sequence = type(parent).forward is nn.Sequential.forward and "forward" not in vars(parent)
    proof = SEQUENCE if is_sequence else ORDER
    for follower in names[names.index(name) + 1 :]:
        module = parent._modules[follower]
        if module is None or (isinstance(module, nn.Identity) and _is_plain_identity(module)):
            continue
        if not is_norm(module):
            break
        channels = getattr(module, "num_features", None) or getattr(module, "num_channels", None)
        if channels is not None and channels != getattr(parent._modules[name], "out_channels", None):
            break
        return Consumer(f"{prefix}.{follower}" if prefix else follower, True, proof)
    return Consumer(None, proof=proof, problem="no norm layer stands after it (the model cannot be traced here)")
