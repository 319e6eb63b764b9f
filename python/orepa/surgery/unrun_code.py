"""Reads the code that a trace did not run: another branch of a flag, other methods.

A trace shows one state of a model. What follows a convolution is proven only if nothing that can change between two calls, such
as an attribute, decides about it, and if no other method uses the convolution or its norm in another way. Again, what the
reading does not understand counts against the proof. Tests of whether a layer exists, and of the mode where both were traced,
are no flags.
"""

from __future__ import annotations

import ast
import contextlib
import dis
import functools
import inspect
import linecache
import re
from collections.abc import Collection, Iterator, Sequence
from itertools import takewhile
from types import FunctionType
from typing import Any, NamedTuple

from torch import nn

from .module_state import names_in
from .source_usage import ITERATED, ITERATORS, FunctionReader, ModuleReader, Usage, called, is_plain
from .tracing import Call, CallSite

_CONDITIONALS = (ast.If, ast.IfExp, ast.BoolOp, ast.While, ast.For, ast.Match)
_STORING = {"append", "appendleft", "extend", "insert", "add", "update", "setdefault", "put"}
_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
#: tests that come out the same in each call of one model
_FIXED_CALLS = re.compile(r"isinstance|hasattr|(\w+\.)*is_(scripting|tracing|compiling|exporting|in_onnx_export)")


class Use(NamedTuple):
    """The use of a child by code that was not run."""

    child: str
    usage: Usage
    before: str = ""  # the child whose output it takes
    after: str = ""  # the child that takes its output, as the only user


@functools.lru_cache(maxsize=4096)
def _function_at(file: str, line: int) -> Any:
    """Return the innermost function around a line, None without source (code that was compiled or typed at a prompt)."""
    around = [node for node in _functions(file) if _contains([*getattr(node, "decorator_list", ()), node], line)]
    return max(around, key=lambda node: node.lineno, default=None)


@functools.lru_cache(maxsize=256)
def _functions(file: str) -> list[Any]:
    try:
        return [node for node in ast.walk(ast.parse("".join(linecache.getlines(file)))) if isinstance(node, _FUNCTIONS)]
    except SyntaxError:
        return []


def _contains(nodes: list[Any], *lines: int) -> bool:
    return bool(nodes) and all(nodes[0].lineno <= line <= nodes[-1].end_lineno for line in lines)


# --- between two calls --------------------------------------------------------------------------------------------------------


def is_unconditional(first: Call, second: Call, in_train_mode: bool) -> bool:
    """Return whether every call of one layer is followed by that call of the other, whatever the state of the model."""
    around = [a[1] for a, b in zip(first.calls, second.calls, strict=False) if a == b]
    start = around[-1] if around else 0
    ours, theirs = first.sites[start:], second.sites[start:]
    shared = list(takewhile(lambda pair: pair[0].run == pair[1].run, zip(ours, theirs, strict=False)))
    apart = ours[len(shared) :] + theirs[len(shared) :]
    if any(_has_flag(site, 0, len(linecache.getlines(site.file)), in_train_mode) for site in apart):
        return False
    if not shared:
        return True
    here, there = shared[-1]
    if here.instruction == there.instruction:
        return _is_plain_loop(here, in_train_mode)
    if here.instruction > there.instruction or _has_flag(here, here.line, there.line, in_train_mode):
        return False
    return not _is_used_on_flag(here, there.line, in_train_mode)


def find_flag(site: CallSite) -> str:
    """Return the conditional of a function that may go another way in another state of the model, or an empty string.

    One whose other way needs a part that the owner does not have is none, as in ``if self.deploy: return self.merged(x)``.
    Which rounds a loop makes is no question here. The mode counts as known.
    """
    function = _function_at(site.file, site.line)
    if function is None:
        return "a jump in it" if any("JUMP_IF" in i.opname for i in dis.get_instructions(site.code)) else ""
    assigned = [node for node in ast.walk(function) if isinstance(node, ast.Assign)]
    layers = {ast.unparse(node.targets[0]) for node in assigned if ast.unparse(node.value).startswith("getattr(")}
    for node in _flags(function, site.owner, in_train_mode=True):
        test = ast.unparse(getattr(node, "test", node))
        is_lookup = any(test in (f"{name} is None", f"{name} is not None") for name in layers)
        is_dead = any(_is_missing(arm, site.owner) for arm in _arms(node))
        if not (isinstance(node, ast.For) or is_lookup or is_dead):
            return test
    return ""


def _is_missing(arm: list[Any], owner: nn.Module | None) -> bool:
    """Return whether code reads an attribute that the owner does not have."""
    parts = [part for node in arm for part in ast.walk(node) if isinstance(part, ast.Attribute)]
    names = {part.attr for part in parts if isinstance(part.value, ast.Name) and part.value.id == "self"}
    return owner is not None and not all(hasattr(owner, name) for name in names)


def _is_used_on_flag(site: CallSite, taken: int, in_train_mode: bool) -> bool:
    """Return whether a flag decides about another use of the variable that holds what a call returned.

    Where the layer that is called in line ``taken`` is in the same statement, no variable does.
    """
    function = _function_at(site.file, site.line) or ast.Pass()
    names = [node for node in ast.walk(function) if isinstance(node, ast.Name)]
    flags = list(_flags(function, site.owner, in_train_mode))
    assigned = [n for n in ast.walk(function) if isinstance(n, ast.Assign) and _contains([n], site.line)]
    assigned = [n for n in assigned if not _contains([n], taken)]
    held = {n.id for a in assigned for t in a.targets for n in ast.walk(t) if isinstance(n, ast.Name)}
    stores = [n for n in names if n.id in held and isinstance(n.ctx, ast.Store) and n.lineno > site.line]
    certain = [n.lineno for n in stores if not any(_contains([flag], n.lineno) for flag in flags)]
    last = min(certain, default=getattr(function, "end_lineno", 0))
    loads = [n.lineno for n in names if n.id in held and isinstance(n.ctx, ast.Load) and site.line < n.lineno <= last]
    return any(
        _contains([flag], line) and not _contains_both(flag, site.line, line) for flag in flags for line in loads
    )


def _has_flag(site: CallSite, first: int, last: int, in_train_mode: bool) -> bool:
    """Return whether a flag decides which of the code between two lines is run, or about one of them alone."""
    function = _function_at(site.file, site.line)
    if function is None:
        return any("JUMP_IF" in i.opname for i in dis.get_instructions(site.code))
    return any(
        node.lineno <= last and node.end_lineno >= first and not _contains_both(node, first, last)
        for node in _flags(function, site.owner, in_train_mode)
    )


def _contains_both(node: Any, first: int, last: int) -> bool:
    return isinstance(node, ast.stmt) and any(_contains(arm, first, last) for arm in _arms(node))


def _is_plain_loop(site: CallSite, in_train_mode: bool) -> bool:
    """Return whether a call in a loop is made in each round of it."""
    function = _function_at(site.file, site.line)
    loops = [n for n in ast.walk(function or ast.Pass()) if isinstance(n, ast.For) and _contains(n.body, site.line)]
    if not loops or not _is_fixed(loops[-1], site.owner, in_train_mode):
        return False
    jumps = (ast.Break, ast.Continue, ast.Return)
    return not any(
        _contains([node], site.line) or any(isinstance(inner, jumps) for inner in ast.walk(node))
        for node in _flags(loops[-1], site.owner, in_train_mode)
        if node is not loops[-1]
    )


def _flags(code: ast.AST, owner: nn.Module | None, in_train_mode: bool) -> Iterator[Any]:
    """Yield the conditionals in code that may go another way in another call."""
    found = [node for node in ast.walk(code) if isinstance(node, _CONDITIONALS)]
    in_tests = {id(part) for node in found if hasattr(node, "test") for part in ast.walk(node.test)}
    for node in found:
        if id(node) not in in_tests and not _is_fixed(node, owner, in_train_mode):
            yield node


def _tests(node: Any, name: str) -> bool:
    """Return whether a conditional depends on a variable."""
    tested = ast.walk(getattr(node, "test", node))
    return any(isinstance(part, ast.Name) and part.id == name for part in tested)


def _stores(code: ast.AST, name: str) -> bool:
    """Return whether code sets an attribute of a variable, or calls a method of one that may store something."""
    for node in ast.walk(code):
        if isinstance(node, ast.Attribute | ast.Subscript) and isinstance(node.ctx, ast.Store):
            target: ast.expr = node
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in _STORING:
            target = node.func
        else:
            continue
        while isinstance(target, ast.Attribute | ast.Subscript):
            target = target.value
        if isinstance(target, ast.Name) and target.id == name:
            return True
    return False


def _arms(node: Any) -> list[list[Any]]:
    if isinstance(node, ast.Match):
        return [case.body for case in node.cases]
    arms = [getattr(node, "body", []), getattr(node, "orelse", [])]
    return [arm if isinstance(arm, list) else [arm] for arm in arms]


def _is_fixed(node: Any, owner: nn.Module | None, in_train_mode: bool) -> bool:
    text = ast.unparse(node)
    if isinstance(node, ast.For):
        loop = ast.unparse(node.iter)
        return not any(isinstance(n, ast.Slice) for n in ast.walk(node.iter)) and (
            "range(" not in loop or "len(" in loop
        )
    if "checkpoint" in text:  # computes again what it is given
        return True
    return not isinstance(node, ast.Match) and _is_fixed_test(getattr(node, "test", node), text, owner, in_train_mode)


def _is_fixed_test(test: ast.expr, text: str, owner: nn.Module | None, in_train_mode: bool) -> bool:
    """Return whether a test, in a conditional of this ``text``, is about layers, the mode, or the host of the code."""
    match test:
        case ast.Constant():
            return True
        case ast.BoolOp(values=values):
            return all(_is_fixed_test(value, text, owner, in_train_mode) for value in values)
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            return _is_fixed_test(operand, text, owner, in_train_mode)
        case ast.Compare(left=left, ops=[ast.Is() | ast.IsNot()], comparators=[ast.Constant(value=None)]):
            return isinstance(left, ast.Attribute) and _is_fixed_test(left, text, owner, in_train_mode)
        case ast.Call(func=function):
            return _FIXED_CALLS.fullmatch(ast.unparse(function)) is not None
        case ast.Attribute(value=ast.Name(id="self"), attr="training"):
            return in_train_mode
        case ast.Attribute(value=ast.Name(id="self"), attr="inplace"):
            return True  # the result is the same
        case ast.Attribute(value=ast.Name(id="self"), attr=name) if owner is not None:
            is_layer = owner._modules.get(name) is not None
            is_called = re.search(rf"self\.{name}\(| in self\.{name}\b", text) is not None
            return is_layer or (vars(owner).get(name) is None and is_called)  # a layer that was left out
    return False


# --- elsewhere ----------------------------------------------------------------------------------------------------------------


def other_uses(owner: nn.Module, lines: Collection[tuple[int, str, int]] | None, in_train_mode: bool) -> list[Use]:
    """Return what code of a module does with its children that did not run; ``lines`` did.

    Where they are None, the module could not be traced. Then all code counts; of that which `forward` reaches, the calls in
    functions that test an attribute or store something in one, as `usage_of_children` knows the rest.
    """
    children = {name: child for name, child in owner._modules.items() if child is not None}
    reader = ModuleReader(owner, children)
    if lines is None:
        with contextlib.suppress(Exception):  # `usage_of_children` says that nothing is known
            reader.read()
    uses: list[Use] = []
    for name, function in _methods(type(owner)):
        code = function.__code__
        if not names_in(code) & {*children, *vars(owner), "getattr", *ITERATED}:
            continue
        definition = _function_at(code.co_filename, code.co_firstlineno)
        if definition is None or not code.co_argcount:
            uses += [Use(child, Usage.UNKNOWN) for child in names_in(code) & children.keys()]
            continue
        ran = [line for i, file, line in lines or () if (i, file) == (id(owner), code.co_filename)]
        function_reader = _OtherReader(reader, definition)
        is_known = name in reader.done
        first = code.co_varnames[0]
        flags = _flags(definition, owner, in_train_mode=True)
        if is_known and not _stores(definition, first) and not any(_tests(flag, first) for flag in flags):
            continue
        for block in _unrun_blocks(definition, ran, owner, in_train_mode):
            found = function_reader.uses(first, block)
            uses += [use for use in found if not is_known or use.usage is Usage.CALLED]
    return uses


def _methods(kind: type) -> Iterator[tuple[str, FunctionType]]:
    """Yield the functions that a call of a method or a property runs, except torch's, by name."""
    done = {"__init__"}
    for base in kind.__mro__:
        for name, attribute in vars(base).items():
            if (
                name in done
                or isinstance(attribute, staticmethod | classmethod)
                or base.__module__.startswith("torch.")
            ):
                continue
            function = inspect.unwrap(getattr(attribute, "fget", None) or getattr(attribute, "func", attribute))
            if isinstance(function, FunctionType):
                yield name, function
                done |= {name} - ({name} if "super" in function.__code__.co_names else set())


def _unrun_blocks(definition: Any, ran: list[int], owner: nn.Module, in_train_mode: bool) -> Iterator[list[Any]]:
    """Yield the parts of a function that no trace ran: all, or branches of flags."""
    if not any(_contains([definition], line) for line in ran):
        yield [definition]
        return
    for node in _flags(definition, owner, in_train_mode):
        for arm in _arms(node):
            if not any(_contains(arm, line) for line in ran):
                yield arm


class _OtherReader(FunctionReader):
    """Reads code that was not run.

    Unlike `forward`, most methods compute nothing with the layers that they read: they initialise, load, fuse or replace them.
    So only a call counts, or where a layer is handed over together with a value.
    """

    def uses(self, self_name: str, block: list[Any]) -> Iterator[Use]:
        inside = {id(node) for statement in block for node in ast.walk(statement)}
        mentions: dict[Any, list[str]] = {}
        owner, children = self.reader.parent, self.reader.children
        for node in self.loads(self_name):
            outer = self.parents[node]
            if id(node) not in inside:
                continue
            if isinstance(outer, ast.Call) and called(outer) == "getattr" and outer.args[0] is node:
                mentions[outer] = self._named(outer.args[1])
            elif not isinstance(outer, ast.Attribute) or self.is_iterator(outer, owner):
                if (use := self.use(node, [owner])) is Usage.ITERATED:
                    yield from (Use(child, use.of_elements) for child in children)
            elif outer.attr in children and isinstance(outer.ctx, ast.Load):
                mentions[outer] = [outer.attr]
            elif outer.attr == "_modules" and isinstance(items := self.parents[outer], ast.Attribute):
                use = self._use_iterated(self.parents[items], ITERATED.get(items.attr, ()), list(children.values()))
                yield from (Use(child, use.of_elements) for child in children)
            elif outer.attr not in vars(nn.Module()) and not is_plain(vars(owner).get(outer.attr)):
                yield from (Use(child, Usage.UNKNOWN) for child in children)  # a list of layers, ...
        after = {node: follower for node in mentions if (follower := self._follower(node)) in mentions}
        before = {follower: node for node, follower in after.items()}
        for mention, names in mentions.items():
            around = [mentions.get(other.get(mention), [""]) for other in (before, after)]
            for name in names:
                yield Use(name, self.use(mention, [children[name]]), *(n[0] if len(n) == 1 else "" for n in around))

    def _named(self, name: ast.expr) -> list[str]:
        """Return the children that the second argument of `getattr` may name."""
        code = self.definition if isinstance(name, ast.Name) else name
        texts = [n.value for n in ast.walk(code) if isinstance(n, ast.Constant) and isinstance(n.value, str)]
        is_part = isinstance(name, ast.JoinedStr)
        children = list(self.reader.children)
        return [c for c in children if any(c.startswith(t) if is_part else c == t for t in texts)] or children

    def use(self, node: ast.AST, objects: Sequence[nn.Module]) -> Usage:
        outer = self.parents[node]
        if isinstance(outer, ast.Attribute) and outer.attr != "forward" and not self.is_iterator(outer, *objects):
            if parts := [part for o in objects if (part := o._modules.get(outer.attr)) is not None]:
                return self.use(outer, parts).of_container
            call = self.parents[outer]
            if isinstance(call, ast.Call) and outer in [*call.args[1:], *(k.value for k in call.keywords)]:
                return Usage.UNKNOWN  # F.conv2d(x, self.conv.weight)
            return Usage.READ  # what a method does is read where it is defined
        is_chosen = isinstance(outer, ast.IfExp) and node is not outer.test
        is_listed = isinstance(outer, ast.Call) and "Sequential" in ast.unparse(outer.func)
        if is_chosen or is_listed or isinstance(outer, ast.List | ast.Tuple):
            return Usage.CALLED
        is_known = isinstance(
            outer, ast.Call | ast.Subscript | ast.For | ast.comprehension | ast.Assign | ast.Attribute
        )
        return super().use(node, objects) if is_known else Usage.READ

    def _use_iterated(self, node: ast.AST, path: tuple[int, ...], elements: Sequence[nn.Module]) -> Usage:
        outer = self.parents[node]
        if isinstance(outer, ast.Starred):
            return Usage.ITERATED
        if isinstance(outer, ast.Assign) and isinstance(outer.targets[0], ast.Tuple):
            names = [n.id for n in ast.walk(outer.targets[0]) if isinstance(n, ast.Name)]
            uses = {self._use_variable(name, elements) for name in names}
            return Usage.READ if uses == {Usage.READ} else Usage.UNKNOWN
        if isinstance(outer, ast.Call) and called(outer) not in ITERATORS:
            is_handed_with_value = any(
                isinstance(argument, ast.Name) for argument in outer.args if argument is not node
            )
            return Usage.UNKNOWN if is_handed_with_value else Usage.READ
        is_known = isinstance(outer, ast.Call | ast.Subscript | ast.For | ast.comprehension)
        return super()._use_iterated(node, path, elements) if is_known else Usage.READ

    def _follower(self, node: Any) -> Any:
        """Return what is called on the output of a call, and nothing else is: in the same expression or the next statement."""
        call = self.parents[node]
        listed = call.args if isinstance(call, ast.Call) else getattr(call, "elts", [])
        if node in listed:  # layers in their order
            return next(iter(listed[listed.index(node) + 1 :]), None)
        if not isinstance(call, ast.Call) or call.func is not node:
            return None
        outer = self.parents[call]
        if isinstance(outer, ast.Assign) and isinstance(outer.targets[0], ast.Name) and len(outer.targets) == 1:
            bodies = [getattr(self.parents[outer], field, []) for field in ("body", "orelse", "finalbody")]
            body = next(body for body in bodies if outer in body)
            nodes = [n for statement in body[body.index(outer) + 1 :][:1] for n in ast.walk(statement)]
            names = [n for n in nodes if isinstance(n, ast.Name) and n.id == outer.targets[0].id]
            loads = [n for n in names if isinstance(n.ctx, ast.Load)]
            is_last = len(names) > len(loads) or any(isinstance(n, ast.Return) for n in nodes)
            if len(loads) != 1 or not is_last or any(isinstance(n, _CONDITIONALS) for n in nodes):
                return None
            call, outer = loads[0], self.parents[loads[0]]
        return outer.func if isinstance(outer, ast.Call) and outer.args[:1] == [call] else None
