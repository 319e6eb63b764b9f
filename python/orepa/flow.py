"""Who consumes a convolution's output? The question behind the norm check of `prepare` and the folding of `convert`.

The answer comes from a `torch.fx` graph of the model, or, where the whole model cannot be traced (control flow that depends
on data), of the largest submodules that can. Below that, the order of modules decides: as proof in an `nn.Sequential`, as an
indication elsewhere.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
from torch import fx, nn

from .block import LinearBlock
from .repvgg import RepVGGBlock

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
    found: dict[str, Consumer] = {}
    _visit(model, "", found)
    return found


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        leaf = is_conv(m) or isinstance(m, RepVGGBlock) or is_norm(m) or _is_called_norm(m)
        return leaf or super().is_leaf_module(m, module_qualified_name)


def _visit(module: nn.Module, prefix: str, found: dict[str, Consumer]) -> None:
    if is_conv(module):
        found.setdefault(prefix, Consumer(None, problem="nothing is known of what follows it"))
        return
    graph = _trace(module, prefix)
    if graph is not None:
        _read_graph(module, graph, prefix, found)
        return
    for name, child in module.named_children():
        path = f"{prefix}.{name}" if prefix else name
        if is_conv(child):
            found.setdefault(path, _by_order(module, name, prefix))
        elif not is_norm(child) and not isinstance(child, RepVGGBlock):
            _visit(child, path, found)


def _trace(module: nn.Module, prefix: str) -> fx.Graph | None:
    if not any(True for _ in module.children()) or isinstance(module, nn.ModuleList | nn.ModuleDict):
        return None
    try:
        return _Tracer().trace(module)
    except Exception as error:  # whatever a forward raises on symbolic values: the fallback is to look inside
        log.debug("cannot trace %s: %s", prefix or "the model", error)
        return None


def _read_graph(module: nn.Module, graph: fx.Graph, prefix: str, found: dict[str, Consumer]) -> None:
    modules = dict(module.named_modules())
    calls: dict[str, list[fx.Node]] = {}
    for node in graph.nodes:
        if node.op == "call_module":
            calls.setdefault(str(node.target), []).append(node)

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
            found.setdefault(path, Consumer(None, problem=problem))
            continue
        norm = sorted(norms)[0]
        direct = direct and len(norms) == 1 and len(calls[norm]) == 1
        found.setdefault(path, Consumer(f"{prefix}.{norm}" if prefix else norm, direct, GRAPH))


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
    proof = SEQUENCE if type(parent).forward is nn.Sequential.forward else ORDER
    for follower in names[names.index(name) + 1 :]:
        module = parent._modules[follower]
        if module is None or isinstance(module, nn.Identity):
            continue
        if not is_norm(module):
            break
        channels = getattr(module, "num_features", None) or getattr(module, "num_channels", None)
        if channels is not None and channels != getattr(parent._modules[name], "out_channels", None):
            break
        return Consumer(f"{prefix}.{follower}" if prefix else follower, True, proof)
    return Consumer(None, proof=proof, problem="no norm layer stands after it (the model cannot be traced here)")
