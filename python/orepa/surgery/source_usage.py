"""What a module that cannot be traced does with its children, read in its source.

A trace of a child says what happens where the child is called. Its parent might do something else with it: call a layer of it
alone, iterate over it, hand it to a function. So whoever wants to rely on that trace needs to know that the parent calls it and
does nothing else with it. The reading is conservative: what it does not understand counts as "something else".
"""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from .replace import own_call

#: what is done with a child: anything, calls of its own children alone (a container that is iterated), calls of it alone
ANYTHING, ELEMENTS, CALLS = 0, 1, 2

#: which call `module`, in code too long to be read here
_WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel)
_ITERATED = {"values": (), "children": (), "items": (1,), "named_children": (1,)}
#: torch's and timm's
_CHECKPOINTS = {"checkpoint": CALLS, "checkpoint_seq": ELEMENTS, "checkpoint_sequential": ELEMENTS}
_HARMLESS = {"len", "isinstance", "type", "bool", "hasattr", "super", "id"}
_HARMLESS_METHODS = {"parameters", "named_parameters", "buffers", "keys", "register_buffer", "__class__", "_get_name"}
_DEPTH = 4  # how far to look for modules in other objects
_PLAIN = (int, float, str, bool, type(None), type, torch.dtype, torch.device, torch.Tensor)

Function = ast.FunctionDef | ast.AsyncFunctionDef


def uses_of_children(parent: nn.Module) -> dict[str, int]:
    """`ANYTHING`, `ELEMENTS` or `CALLS` for every child, by its name."""
    children = {name: child for name, child in parent._modules.items() if child is not None}
    if type(parent).__module__.startswith("torch._dynamo.") and "_orig_mod" in children:  # what torch.compile returns
        return {"_orig_mod": CALLS}
    if own_call(parent):
        return dict.fromkeys(children, ANYTHING)
    if type(parent).forward is nn.Sequential.forward:
        return dict.fromkeys(children, CALLS)
    if isinstance(parent, _WRAPPERS):
        return {name: CALLS if name == "module" else ANYTHING for name in children}
    try:
        return _Reader(parent, children).read()
    except Exception:  # no source (compiled, scripted, typed at a prompt), or whatever a property of a child's raises
        return dict.fromkeys(children, ANYTHING)


class _Reader:
    def __init__(self, parent: nn.Module, children: dict[str, nn.Module]) -> None:
        self.parent, self.children = parent, children
        self.uses = dict.fromkeys(children, CALLS)
        self.waiting, self.read_already = ["__call__", "forward"], set[str]()

    def read(self) -> dict[str, int]:
        while self.waiting:
            name = self.waiting.pop()
            if name not in self.read_already:
                self.read_already.add(name)
                for kind in type(self.parent).__mro__:
                    if kind not in (nn.Module, object) and name in vars(kind):
                        self._read_function(vars(kind)[name])
        return self.uses

    def _read_function(self, attribute: Any) -> None:
        if isinstance(attribute, staticmethod | classmethod):
            return  # it has no ``self``, and what it is given counts where it is called
        if not hasattr(attribute, "__get__"):
            if not _is_plain(attribute, _DEPTH):
                raise TypeError(f"{attribute} may hold layers")
            return
        function: Any = attribute.fget if isinstance(attribute, property) else getattr(attribute, "func", attribute)
        definition = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
        if not isinstance(definition, Function):
            raise TypeError(f"the source of {function} is no function")
        arguments = [*definition.args.posonlyargs, *definition.args.args]
        if not arguments:
            raise TypeError(f"{function} has no self")
        _Body(self, definition).read(arguments[0].arg)

    def limit(self, names: Sequence[str], use: int) -> None:
        for name in names:
            self.uses[name] = min(self.uses[name], use)


class _Body:
    """One function of the parent's."""

    def __init__(self, reader: _Reader, definition: Function) -> None:
        self.reader, self.definition = reader, definition
        self.above = {child: node for node in ast.walk(definition) for child in ast.iter_child_nodes(node)}
        self.following: set[str] = set()

    def read(self, self_name: str) -> None:
        for node in self._loads(self_name):
            self._read_self(node)
        for inherited in ast.walk(self.definition):
            if isinstance(inherited, ast.Attribute) and _called(inherited.value) == "super":
                self._read_attribute(inherited, inherited.attr)

    def _loads(self, name: str) -> Iterator[ast.Name]:
        for node in ast.walk(self.definition):
            if isinstance(node, ast.Name) and node.id == name and isinstance(node.ctx, ast.Load):
                yield node

    def _read_self(self, node: ast.AST) -> None:
        reader, above = self.reader, self.above[node]
        everything = list(reader.children)
        if (
            isinstance(above, ast.Call)
            and _called(above) == "getattr"
            and above.args[0] is node
            and len(above.args) > 1
        ):
            name = above.args[1]
            if not isinstance(name, ast.Constant):
                reader.limit(everything, self._use(above, list(reader.children.values())))
            else:
                self._read_attribute(above, str(name.value))
        elif isinstance(above, ast.Attribute) and not self._is_iterator(above, reader.parent):
            if isinstance(above.ctx, ast.Load):
                self._read_attribute(above, above.attr)
        else:  # ``self`` as a container of its children
            reader.limit(everything, CALLS if self._use(node, [reader.parent]) >= ELEMENTS else ANYTHING)

    def _read_attribute(self, node: ast.expr, name: str) -> None:
        reader = self.reader
        if name in reader.children:
            reader.limit([name], self._use(node, [reader.children[name]]))
        elif any(name in vars(kind) for kind in type(reader.parent).__mro__ if kind not in (nn.Module, object)):
            reader.waiting.append(name)
        elif name not in _HARMLESS_METHODS and not _is_plain(getattr(reader.parent, name, None), _DEPTH):
            reader.limit(list(reader.children), ANYTHING)  # a list of layers, a bound method, ...

    def _is_iterator(self, node: ast.Attribute, *objects: nn.Module) -> bool:
        """Whether ``objects.name`` is torch's own way to iterate over them."""
        return node.attr in _ITERATED and all(
            getattr(getattr(type(o), node.attr, None), "__module__", "").startswith("torch.nn.") for o in objects
        )

    def _use(self, node: ast.AST, objects: Sequence[nn.Module]) -> int:
        """What becomes of an expression that is one of these modules."""
        above = self.above[node]
        elements = [child for o in objects for child in o.children()]
        if isinstance(above, ast.Call):
            if above.func is node:
                return CALLS
            if isinstance(above.func, ast.Name) and above.func.id in _HARMLESS:
                return CALLS
            function = above.func.attr if isinstance(above.func, ast.Attribute) else _called(above)
            if function in _CHECKPOINTS and above.args and above.args[0] is node:
                return _CHECKPOINTS[function]
        elif isinstance(above, ast.Compare):
            if all(isinstance(op, ast.Is | ast.IsNot | ast.In | ast.NotIn) for op in above.ops):
                return CALLS
        elif isinstance(above, ast.Attribute) and isinstance(above.ctx, ast.Load):
            if above.attr == "forward":
                return self._use(above, objects)
            if self._is_iterator(above, *objects) and isinstance(self.above[above], ast.Call):
                return self._use_iterated(self.above[above], _ITERATED[above.attr], elements)
            if all(_is_plain(getattr(o, above.attr, self), _DEPTH) for o in objects):
                return CALLS
        elif isinstance(above, ast.Subscript) and above.value is node:
            if isinstance(above.slice, ast.Slice):
                return self._use_iterated(above, (), elements)
            return ELEMENTS if self._use(above, elements) == CALLS else ANYTHING
        elif isinstance(
            above, ast.If | ast.IfExp | ast.While | ast.UnaryOp
        ):  # of which a value can only be the condition
            if node is getattr(above, "test", node):
                return CALLS
        elif isinstance(above, ast.Assign) and len(above.targets) == 1 and isinstance(above.targets[0], ast.Name):
            return self._use_variable(above.targets[0].id, objects)
        elif isinstance(above, ast.Expr):
            return CALLS
        return self._use_iterated(node, (), elements)

    def _use_variable(self, name: str, objects: Sequence[nn.Module]) -> int:
        if name in self.following:  # ``x = x[0]``: the reading would not end
            return ANYTHING
        self.following.add(name)
        use = min((self._use(load, objects) for load in self._loads(name)), default=CALLS)
        self.following.discard(name)
        return use

    def _use_iterated(self, node: ast.AST, path: tuple[int, ...], elements: Sequence[nn.Module]) -> int:
        """`ELEMENTS` where a loop over an expression does nothing but call what ``path`` leads to in each of its items."""
        above = self.above[node]
        if isinstance(above, ast.For | ast.comprehension) and above.iter is node:
            target: ast.expr = above.target
            for index in path:
                if not isinstance(target, ast.Tuple) or any(isinstance(e, ast.Starred) for e in target.elts):
                    return ANYTHING
                target = target.elts[index]
            if isinstance(target, ast.Name) and self._use_variable(target.id, elements) == CALLS:
                return ELEMENTS
        elif isinstance(above, ast.Call) and node in above.args:
            name = _called(above)
            if name in ("reversed", "list", "tuple", "iter") and len(above.args) == 1:
                return self._use_iterated(above, path, elements)
            if name == "enumerate":
                return self._use_iterated(above, (1, *path), elements)
            if name == "zip" and not any(isinstance(a, ast.Starred) for a in above.args):
                return self._use_iterated(above, (above.args.index(node), *path), elements)
        return ANYTHING


def _called(call: ast.expr) -> str:
    return call.func.id if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) else ""


def _is_plain(value: object, depth: int) -> bool:
    """Whether no module can be reached from a value; False, too, where that is not seen within ``depth`` steps."""
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
    return all(_is_plain(part, depth - 1) for part in parts)
