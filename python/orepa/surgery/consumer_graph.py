"""Finds the consumer of each convolution's output, for the norm check of `prepare` and the folding of `convert`.

The evidence is `torch.fx` graphs of the model in both modes, or, where the whole model cannot be traced (control flow that
depends on data), of the largest submodules that can. Inside what cannot be traced, the order of modules decides: it is proof in
an `nn.Sequential`, and a hint elsewhere. Proofs about a submodule hold where it is called as a whole, so the source of each
module around it that cannot be traced is read (`source_usage`): where that might use the submodule in another way, a proof
becomes a hint. A graph shows one state of the model: where a flag, another method or a norm that was not called might make a
difference (`unrun_code`), the norm is not ``direct``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum

import torch
from torch import fx, nn

from ..module_info import is_frozen_norm, join
from ..modules.linear_block import LinearBlock
from ..modules.repvgg import RepVGGBlock
from .module_state import ModelState
from .norms import NormTypes, is_norm
from .other_states import OtherStates
from .replace import customization
from .source_usage import Usage, usage_of_children
from .tracing import Traces, has_forward, trace
from .unrun_code import is_unconditional

__all__ = ["Consumer", "Evidence", "consumers", "is_conv", "is_norm"]


class Evidence(Enum):
    """How a `Consumer` is known."""

    GRAPH = "a traced graph"
    SEQUENCE = "an nn.Sequential"
    ORDER = "the order of registration, which proves nothing"


_SHAPE_ONLY = {"permute", "contiguous", "transpose", "reshape", "view", "flatten", "movedim", "to"}
_SHAPE_ONLY_FUNCTIONS = {torch.permute, torch.transpose, torch.reshape, torch.flatten, torch.movedim}


@dataclass(frozen=True)
class Consumer:
    """The use of a convolution's output."""

    norm: str | None  # name of the norm layer that takes all of it
    direct: bool = False  # only identities are between the two, and each runs once: the norm can be folded
    evidence: Evidence = Evidence.GRAPH
    problem: str = ""  # why ``norm`` is None, in words
    affine: str | None = None  # name of the frozen norm that takes all of it, where ``norm`` is None

    @property
    def is_proven(self) -> bool:
        """Whether ``direct`` and ``norm`` are proven."""
        return self.evidence is not Evidence.ORDER


def is_conv(module: nn.Module) -> bool:
    """Return whether `prepare` or `convert` may look at a module as a convolution."""
    return isinstance(module, nn.modules.conv._ConvNd | LinearBlock)


def consumers(model: nn.Module, norm_types: NormTypes = ()) -> dict[str, Consumer]:
    """Return the consumer of every convolution in ``model``, by qualified name (the first, for a module with several).

    ``norm_types`` count as norms besides those that `is_norm` knows. A frozen batch norm is ``affine``, and no ``norm``, unless
    it is among them. The model's forward runs on symbolic values; its state is afterwards as it was.
    """
    search = _Search(model, norm_types)
    search.visit(model, "", Usage.CALLED)
    return search.results()


class _Search:
    def __init__(self, model: nn.Module, norm_types: NormTypes) -> None:
        self.model, self.norm_types, self.state = model, norm_types, ModelState(model)
        self.consumers: dict[str, Consumer] = {}
        self.traced: dict[str, Traces] = {}
        self.called: set[str] = set()
        names = {id(module): name for name, module in model.named_modules()}
        paths = list(model.named_modules(remove_duplicate=False))
        #: names of modules that have several
        self.aliased = {names[id(module)] for name, module in paths if names[id(module)] != name}

    def visit(self, module: nn.Module, prefix: str, usage: Usage) -> None:
        """Read one module whose ancestors cannot be traced and use it as ``usage`` says."""
        if is_conv(module):
            self._add(prefix, Consumer(None, problem="nothing is known of what follows it"))
            return
        if isinstance(module, torch.jit.ScriptModule):
            return  # it goes on as it was compiled
        # A module that is iterated over is only a list of its children.
        traces = None if usage is Usage.ITERATED else trace(module, prefix, self.state, self._is_layer)
        if traces is not None:
            self.traced[prefix] = traces
            for name, consumer in self._read_graphs(module, traces, prefix).items():
                self._add(name, consumer if not prefix else self._downgrade(name, consumer, usage))
            if traces.in_train_mode:
                return
            usage = Usage.UNKNOWN  # of what is called in train mode only
        usages = _usage_of_children(module, usage)
        for name, child in module.named_children():
            path = join(prefix, name)
            if is_conv(child):
                self._add(path, self._downgrade(path, self._next_sibling(module, name, prefix), usage))
            elif not self._is_any_norm(child) and not isinstance(child, RepVGGBlock):
                self.visit(child, path, usages[name])

    def results(self) -> dict[str, Consumer]:
        """Return the consumers: a norm is ``direct`` only where no other state of the model may matter."""
        others = OtherStates(self.model, self.traced, self.called, is_conv, self._is_any_norm)
        for name, consumer in self.consumers.items():
            name_of_norm = consumer.norm
            if name_of_norm is None:
                continue
            if consumer.direct and others.may_part(name, name_of_norm):
                consumer = replace(consumer, direct=False)
            norm = self.model.get_submodule(name_of_norm)
            if not is_norm(norm, self.norm_types):
                problem = f"{type(norm).__name__} is affine, without statistics of its input, and not among norm_types"
                consumer = replace(consumer, norm=None, problem=problem, affine=name_of_norm)
            self.consumers[name] = consumer
        return self.consumers

    def _is_any_norm(self, module: nn.Module) -> bool:
        return is_norm(module, self.norm_types) or is_frozen_norm(module)

    def _is_layer(self, module: nn.Module) -> bool:
        return is_conv(module) or isinstance(module, RepVGGBlock) or self._is_any_norm(module)

    def _add(self, name: str, consumer: Consumer) -> None:
        self.consumers.setdefault(name, consumer)

    def _downgrade(self, name: str, consumer: Consumer, usage: Usage) -> Consumer:
        """Weaken a proof that holds for the parent as a whole where the parent is used in another way."""
        if consumer.norm is None:
            return consumer
        if usage is not Usage.CALLED:
            consumer = replace(consumer, evidence=Evidence.ORDER)
        return replace(consumer, direct=False) if {name, consumer.norm} & self.aliased else consumer

    def _read_graphs(self, module: nn.Module, traces: Traces, prefix: str) -> dict[str, Consumer]:
        """Return what holds in all graphs of a module."""
        readings = [self._read_graph(module, graph, traces, prefix) for graph in traces.graphs]
        merged: dict[str, Consumer] = {}
        for name in dict.fromkeys(name for reading, _ in readings for name in reading):
            candidates = [reading[name] for reading, _ in readings if name in reading]
            first = next((c for c in candidates if c.norm is None), candidates[0])
            if first.norm is not None:
                direct = all(c.norm == first.norm and c.direct for c in candidates)
                # A graph without the convolution must be without the norm, too.
                direct = direct and not any(first.norm in called for reading, called in readings if name not in reading)
                first = replace(first, direct=direct)
            merged[name] = first
        self.called.update(*(called for _, called in readings))
        return merged

    def _read_graph(
        self, module: nn.Module, graph: fx.Graph, traces: Traces, prefix: str
    ) -> tuple[dict[str, Consumer], set[str]]:
        """Return the consumer of each convolution that is called, and the names of all modules that are."""
        modules = dict(module.named_modules())
        calls: dict[str, list[fx.Node]] = {}
        attributes_read: set[str] = set()
        for node in graph.nodes:
            if node.op == "call_module":
                calls.setdefault(str(node.target), []).append(node)
            elif node.op == "get_attr":
                attributes_read.add(str(node.target).rpartition(".")[0])

        result: dict[str, Consumer] = {}
        for name, nodes in calls.items():
            if not is_conv(modules[name]):
                continue
            followed = [self._follow(node, modules, traces.shared) for node in nodes]
            norms = sorted(set().union(*(names for names, _, _ in followed)))
            problem = next((text for _, text, _ in followed if text), "" if norms else "nothing uses its output")
            if prefix and problem == _LEAVES:
                problem = f"its output leaves {prefix}, whose caller cannot be traced"
            if problem:
                result[join(prefix, name)] = Consumer(None, problem=problem)
                continue
            once = len(nodes) == len(norms) == len(calls[norms[0]]) == 1
            direct = once and followed[0][2] and not {name, norms[0]} & attributes_read
            if direct:
                ours, theirs = (traces.calls[node] for node in (nodes[0], calls[norms[0]][0]))
                direct = is_unconditional(ours, theirs, traces.in_train_mode)
            result[join(prefix, name)] = Consumer(join(prefix, norms[0]), direct)
        return result, {join(prefix, name) for name in calls}

    def _follow(self, node: fx.Node, modules: dict[str, nn.Module], shared: set[fx.Node]) -> tuple[set[str], str, bool]:
        """Return the norms that a value reaches through shape-only steps, another use of it, and whether nothing is between."""
        norms: set[str] = set()
        direct, frontier = True, [node]
        while frontier:
            value = frontier.pop()
            direct = direct and value not in shared
            for user in value.users:
                module = modules.get(str(user.target)) if user.op == "call_module" else None
                if isinstance(module, nn.Identity):
                    direct = direct and _is_plain_identity(module)
                    frontier.append(user)
                elif isinstance(module, nn.Dropout | nn.Dropout2d) or _is_shape_only(user, value):
                    direct = False
                    frontier.append(user)
                elif module is not None and self._is_any_norm(module):
                    norms.add(str(user.target))
                elif user.op == "output":
                    return norms, _LEAVES, False
                else:
                    function = str(getattr(user.target, "__name__", user.target))
                    target = function if module is None else f"{user.target} ({type(module).__name__})"
                    return norms, f"its output goes to {target}, not to a norm", False
        return norms, "", direct

    def _next_sibling(self, parent: nn.Module, name: str, prefix: str) -> Consumer:
        """Take the next sibling for the consumer, in a parent that cannot be traced."""
        names = list(parent._modules)
        is_sequence = type(parent).forward is nn.Sequential.forward and "forward" not in vars(parent)
        evidence = Evidence.SEQUENCE if is_sequence else Evidence.ORDER
        for follower in names[names.index(name) + 1 :]:
            module = parent._modules[follower]
            if module is None or (isinstance(module, nn.Identity) and _is_plain_identity(module)):
                continue
            if not self._is_any_norm(module):
                break
            channels = getattr(module, "num_features", None) or getattr(module, "num_channels", None)
            if channels is not None and channels != getattr(parent._modules[name], "out_channels", None):
                break
            return Consumer(join(prefix, follower), True, evidence)
        return Consumer(
            None, evidence=evidence, problem="no norm layer stands after it (the model cannot be traced here)"
        )


_LEAVES = "its output leaves the model"


def _usage_of_children(module: nn.Module, usage: Usage) -> dict[str, Usage]:
    is_container = isinstance(module, nn.ModuleList | nn.ModuleDict) and not has_forward(module)
    if usage is Usage.CALLED and not is_container:
        return usage_of_children(module)
    return dict.fromkeys(module._modules, usage.of_elements)


def _is_plain_identity(module: nn.Module) -> bool:
    return type(module).forward is nn.Identity.forward and not customization(module)


def _is_shape_only(user: fx.Node, value: fx.Node) -> bool:
    if not user.args or user.args[0] is not value:
        return False
    if user.op == "call_method":
        return user.target in _SHAPE_ONLY
    return user.op == "call_function" and user.target in _SHAPE_ONLY_FUNCTIONS
