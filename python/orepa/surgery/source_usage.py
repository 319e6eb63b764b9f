"""Reads the source of a module that cannot be traced, for how it uses its children.

The trace of a child says what happens where the child is called. Its parent may use it in another way: call one of its layers
alone, iterate over it, pass it to a function. So the trace is proof only where the parent does nothing but call the child. The
reading is conservative: whatever it does not understand counts as another use.
"""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from collections.abc import Iterator, Sequence
from enum import IntEnum
from typing import Any

import torch
from torch import nn

from .replace import customization


class Usage(IntEnum):
    """How a module uses a child, from the weakest knowledge to the strongest."""

    UNKNOWN = 0
    ITERATED = 1  #: the child is a container: its children are called, nothing else
    CALLED = 2  #: the child is called, nothing else
    READ = 3  #: the child is looked at: its type, its parameters

    @property
    def of_elements(self) -> Usage:
        """The usage of the children of a container that is used like this."""
        return Usage.CALLED if self is Usage.ITERATED else self

    @property
    def of_container(self) -> Usage:
        """The usage of a container whose children are used like this."""
        return {Usage.CALLED: Usage.ITERATED, Usage.READ: Usage.READ}.get(self, Usage.UNKNOWN)


#: call their child ``module``, in code too long to be read here
_WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel)
ITERATORS = {"reversed", "list", "tuple", "iter", "enumerate", "zip"}
ITERATED = {"values": (), "children": (), "items": (1,), "named_children": (1,)}
#: functions of torch and timm that call their first argument, or its elements one after the other
_CHECKPOINTS = {"checkpoint", "checkpoint_seq", "checkpoint_sequential"}
_HARMLESS = {"len", "isinstance", "type", "bool", "hasattr", "super", "id"}
_HARMLESS_METHODS = {"parameters", "named_parameters", "buffers", "keys", "register_buffer", "__class__", "_get_name"}
_DEPTH = 4  # of the search for modules in other objects
_PLAIN = (int, float, str, bool, type(None), type, torch.dtype, torch.device, torch.Tensor)


def usage_of_children(parent: nn.Module) -> dict[str, Usage]:
    """Return how a module uses each child, by the child's name."""
    children = {name: child for name, child in parent._modules.items() if child is not None}
    if type(parent).__module__.startswith("torch._dynamo.") and "_orig_mod" in children:  # what torch.compile returns
        return {"_orig_mod": Usage.CALLED}
    if customization(parent):
        return dict.fromkeys(children, Usage.UNKNOWN)
    if type(parent).forward is nn.Sequential.forward:
        return dict.fromkeys(children, Usage.CALLED)
    if isinstance(parent, _WRAPPERS):
        return {name: Usage.CALLED if name == "module" else Usage.UNKNOWN for name in children}
    try:
        return ModuleReader(parent, children).read()
    except Exception:  # no source (compiled, scripted, typed at a prompt), or an error in a child's property
        return dict.fromkeys(children, Usage.UNKNOWN)


class ModuleReader:
    """Reads the methods of a module that a call runs."""

    def __init__(self, parent: nn.Module, children: dict[str, nn.Module]) -> None:
        self.parent, self.children = parent, children
        self.usages = dict.fromkeys(children, Usage.CALLED)
        self.pending, self.done = ["__call__", "forward"], set[str]()

    def read(self) -> dict[str, Usage]:
        while self.pending:
            name = self.pending.pop()
            if name not in self.done:
                self.done.add(name)
                for kind in self.classes_with(name):
                    self._read_function(vars(kind)[name])
        return self.usages

    def classes_with(self, name: str) -> list[type]:
        """Return the classes of the module, except torch's root, that define an attribute."""
        return [kind for kind in type(self.parent).__mro__ if kind not in (nn.Module, object) and name in vars(kind)]

    def limit(self, names: Sequence[str], usage: Usage) -> None:
        """Cap the usage of some children."""
        for name in names:
            self.usages[name] = min(self.usages[name], usage)

    def _read_function(self, attribute: Any) -> None:
        if isinstance(attribute, staticmethod | classmethod):
            return  # it has no ``self``; its arguments count where it is called
        if not hasattr(attribute, "__get__"):
            if not is_plain(attribute):
                raise TypeError(f"{attribute} may hold layers")
            return
        function: Any = attribute.fget if isinstance(attribute, property) else getattr(attribute, "func", attribute)
        definition = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
        if not isinstance(definition, ast.FunctionDef | ast.AsyncFunctionDef):
            raise TypeError(f"the source of {function} is no function")
        first, *_ = [*definition.args.posonlyargs, *definition.args.args]
        FunctionReader(self, definition).read(first.arg)


class FunctionReader:
    """Reads one function of the parent."""

    def __init__(self, reader: ModuleReader, definition: ast.AST) -> None:
        self.reader, self.definition = reader, definition
        self.parents = {child: node for node in ast.walk(definition) for child in ast.iter_child_nodes(node)}
        self.following: set[str] = set()

    def read(self, self_name: str) -> None:
        for node in self.loads(self_name):
            self._read_self(node)
        for inherited in ast.walk(self.definition):
            if isinstance(inherited, ast.Attribute) and called(inherited.value) == "super":
                self._read_attribute(inherited, inherited.attr)

    def loads(self, name: str) -> Iterator[ast.Name]:
        for node in ast.walk(self.definition):
            if isinstance(node, ast.Name) and node.id == name and isinstance(node.ctx, ast.Load):
                yield node

    def _read_self(self, node: ast.AST) -> None:
        reader, outer = self.reader, self.parents[node]
        names = list(reader.children)
        if isinstance(outer, ast.Call) and called(outer) == "getattr" and outer.args[0] is node and outer.args[1:]:
            name = outer.args[1]
            if not isinstance(name, ast.Constant):
                reader.limit(names, self.use(outer, list(reader.children.values())))
            else:
                self._read_attribute(outer, str(name.value))
        elif isinstance(outer, ast.Attribute) and not self.is_iterator(outer, reader.parent):
            if isinstance(outer.ctx, ast.Load):
                self._read_attribute(outer, outer.attr)
        else:  # ``self`` as a container of its children
            reader.limit(names, self.use(node, [reader.parent]).of_elements)

    def _read_attribute(self, node: ast.expr, name: str) -> None:
        reader = self.reader
        if name in reader.children:
            reader.limit([name], self.use(node, [reader.children[name]]))
        elif reader.classes_with(name):
            reader.pending.append(name)
        elif name not in _HARMLESS_METHODS and not is_plain(getattr(reader.parent, name, None)):
            reader.limit(list(reader.children), Usage.UNKNOWN)  # a list of layers, a bound method, ...

    def is_iterator(self, node: ast.Attribute, *objects: nn.Module) -> bool:
        """Return whether an attribute of the objects is torch's method to iterate over them."""
        return node.attr in ITERATED and all(
            getattr(getattr(type(o), node.attr, None), "__module__", "").startswith("torch.nn.") for o in objects
        )

    def use(self, node: ast.AST, objects: Sequence[nn.Module]) -> Usage:
        """Return how an expression that is one of these modules is used."""
        outer = self.parents[node]
        elements = [child for o in objects for child in o.children()]
        if isinstance(outer, ast.Call):
            if outer.func is node:
                return Usage.CALLED
            if called(outer) in _HARMLESS:
                return Usage.READ
            function = outer.func.attr if isinstance(outer.func, ast.Attribute) else called(outer)
            if function in _CHECKPOINTS and outer.args and outer.args[0] is node:
                return Usage.CALLED
        elif isinstance(outer, ast.Compare):
            if all(isinstance(op, ast.Is | ast.IsNot | ast.In | ast.NotIn) for op in outer.ops):
                return Usage.READ
        elif isinstance(outer, ast.Attribute) and isinstance(outer.ctx, ast.Load):
            if outer.attr == "forward":
                return self.use(outer, objects)
            if self.is_iterator(outer, *objects) and isinstance(self.parents[outer], ast.Call):
                return self._use_iterated(self.parents[outer], ITERATED[outer.attr], elements)
            if all(is_plain(getattr(o, outer.attr, self)) for o in objects):
                return Usage.READ
        elif isinstance(outer, ast.Subscript) and outer.value is node:
            if isinstance(outer.slice, ast.Slice):
                use = self.use(outer, objects)
                return Usage.ITERATED if use is Usage.CALLED else use
            return self.use(outer, elements).of_container
        elif isinstance(outer, ast.If | ast.IfExp | ast.While):
            if outer.test is node:
                return Usage.READ
        elif isinstance(outer, ast.Assign) and len(outer.targets) == 1 and isinstance(outer.targets[0], ast.Name):
            return self._use_variable(outer.targets[0].id, objects)
        elif isinstance(outer, ast.Expr | ast.UnaryOp):
            return Usage.READ
        return self._use_iterated(node, (), elements)

    def _use_variable(self, name: str, objects: Sequence[nn.Module]) -> Usage:
        if name in self.following:  # ``x = x[0]`` would not end
            return Usage.UNKNOWN
        self.following.add(name)
        use = min((self.use(load, objects) for load in self.loads(name)), default=Usage.READ)
        self.following.discard(name)
        return use

    def _use_iterated(self, node: ast.AST, path: tuple[int, ...], elements: Sequence[nn.Module]) -> Usage:
        """Return `ITERATED` where a loop over an expression only calls what ``path`` leads to in each of its items."""
        outer = self.parents[node]
        if isinstance(outer, ast.For | ast.comprehension) and outer.iter is node:
            target: ast.expr = outer.target
            for index in path:
                if not isinstance(target, ast.Tuple) or any(isinstance(e, ast.Starred) for e in target.elts):
                    return Usage.UNKNOWN
                target = target.elts[index]
            if isinstance(target, ast.Name):
                return self._use_variable(target.id, elements).of_container
        elif isinstance(outer, ast.Subscript) and outer.value is node and isinstance(outer.slice, ast.Slice):
            return self._use_iterated(outer, path, elements)
        elif isinstance(outer, ast.Call) and node in outer.args:
            name = called(outer)
            if name in ("reversed", "list", "tuple", "iter") and len(outer.args) == 1:
                return self._use_iterated(outer, path, elements)
            if name == "enumerate":
                return self._use_iterated(outer, (1, *path), elements)
            if name == "zip" and not any(isinstance(a, ast.Starred) for a in outer.args):
                return self._use_iterated(outer, (outer.args.index(node), *path), elements)
        return Usage.UNKNOWN


def called(call: ast.expr) -> str:
    """Return the name of the function that an expression calls, or an empty string."""
    return call.func.id if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) else ""


def is_plain(value: object, depth: int = _DEPTH) -> bool:
    """Return whether no module can be reached from a value; False also where ``depth`` steps do not show it."""
    if isinstance(value, _PLAIN):
        return True
    if isinstance(value, nn.Module) or depth == 0:
        return False
    parts: list[object]
    if isinstance(value, list | tuple | set | frozenset):
        parts = list(value)
    elif isinstance(value, dict):
        parts = list(value.values())
    elif isinstance(value, functools.partial):
        parts = [value.func, *value.args, *value.keywords.values()]
    elif inspect.ismethod(value):
        parts = [value.__self__]
    elif inspect.isfunction(value):
        parts = [cell.cell_contents for cell in value.__closure__ or ()]
    elif inspect.isbuiltin(value):
        parts = [] if inspect.ismodule(value.__self__) else [value.__self__]
    elif hasattr(value, "__dict__") and not inspect.ismodule(value):
        parts = list(vars(value).values())
    else:
        return False
    return all(is_plain(part, depth - 1) for part in parts)
