"""Finds and changes what a model holds besides its tree of modules: methods, parameters, closures, weak references.

Everything is visited that can be reached from the instances: attributes, containers, closures, `functools.partial`, weak
references. Classes and global variables are not.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import CellType, CodeType, FunctionType, MemberDescriptorType, MethodType, ModuleType
from typing import Any

from torch import Tensor, nn

from ..module_info import join

PARAMETER_HOOKS = ("_backward_hooks", "_post_accumulate_grad_hooks")
_ATOMS = (type(None), int, float, complex, str, bytes, type, ModuleType, CodeType, *weakref.ProxyTypes)


def find_references(model: nn.Module, modules: Iterable[nn.Module], *, parameters: bool = True) -> dict[nn.Module, str]:
    """Return the modules that cannot be replaced because something else holds a part of them, with what that is, in words.

    A part is a method that not every module has, or (with ``parameters``) a parameter, outside the tree of modules.
    """
    targets = {id(module): module for module in modules}
    owners = {
        id(p): (module, name) for module in targets.values() for name, p in module.named_parameters(recurse=False)
    }
    held: dict[nn.Module, str] = {}

    def look(value: Any, where: str) -> Any:
        if id(value) in owners and parameters:
            module, name = owners[id(value)]
            held.setdefault(module, f"{where} holds its {name}")
        if isinstance(value, MethodType) and id(value.__self__) in targets:
            module, name = targets[id(value.__self__)], value.__name__
            if not hasattr(nn.Module, name) or value.__func__ is not getattr(type(module), name, None):
                held.setdefault(module, f"{where} holds its method {name}")
        return value

    _Walk(model, look, closed=targets.values()).run(model)
    return held


def redirect(model: nn.Module, replacements: Mapping[nn.Module, nn.Module]) -> None:
    """Finish an exchange of classes and attributes between modules and their replacements.

    Methods that were taken out of the modules follow them, and what the replacements know of themselves leads to the modules.
    """
    modules, twins = {id(old) for old in replacements}, {id(new): old for old, new in replacements.items()}

    def change(value: Any, where: str) -> Any:
        if isinstance(value, MethodType) and id(value.__self__) in modules:
            now = getattr(value.__self__, value.__name__)
            return value if now == value else now
        return twins.get(id(value), value)

    _Walk(model, change).run(model)


def reconnect(copied: nn.Module, memo: dict[int, Any]) -> None:
    """Lead what `copy.deepcopy` shares, functions and weak references, from the model to its copy.

    Args:
        copied: the copy.
        memo: of `copy.deepcopy`.
    """

    def change(value: Any, where: str) -> Any:
        if id(value) not in memo and isinstance(value, FunctionType) and _reaches(value, memo):
            memo[id(value)] = _copy_function(value, memo)
        return memo.get(id(value), value)

    _Walk(copied, change).run(copied)


def _copy_function(function: FunctionType, memo: dict[int, Any]) -> FunctionType:
    """Copy a function, and of its closure what belongs to the copied model."""
    for cell in function.__closure__ or ():
        if id(cell) not in memo and _is_filled(cell) and _reaches(cell.cell_contents, memo):
            memo[id(cell)] = CellType(copy.deepcopy(cell.cell_contents, memo))
    closure = tuple(memo.get(id(cell), cell) for cell in function.__closure__ or ())
    defaults, keywords, attributes = copy.deepcopy(
        (function.__defaults__, function.__kwdefaults__, vars(function)), memo
    )
    new = FunctionType(function.__code__, function.__globals__, function.__name__, defaults, closure)
    new.__kwdefaults__, new.__qualname__ = keywords, function.__qualname__
    vars(new).update(attributes)
    return new


class _Found(Exception):
    pass


def _reaches(start: object, memo: Mapping[int, object]) -> bool:
    """Return whether an object leads to one that was copied."""

    def look(value: Any, where: str) -> Any:
        if id(value) in memo:
            raise _Found
        return value

    try:
        _Walk(None, look).run(start)
    except _Found:
        return True
    return False


class _Walk:
    """Visit all objects that a start leads to, and put others in their places.

    Args:
        model: whose names of modules say where an object is.
        change: called with every object and the attribute where it was found first; returns the object for its place.
        closed: objects that are not entered.
    """

    def __init__(
        self, model: nn.Module | None, change: Callable[[Any, str], Any], closed: Iterable[nn.Module] = ()
    ) -> None:
        self._names = {} if model is None else {id(module): name for name, module in model.named_modules()}
        self._change = change
        #: by id: an object, kept alive so that its id stays its own, and what is to stand in its place
        self._seen: dict[int, tuple[Any, Any]] = {id(module): (module, module) for module in closed}
        self._queue: deque[tuple[Any, str]] = deque()

    def run(self, start: object) -> None:
        self._visit(start, "")
        while self._queue:
            holder, where = self._queue.popleft()
            for label, value, write in _entries(holder):
                place = join(self._names.get(id(holder), where), label)
                new = self._visit(value, place)
                if new is not value:
                    write(new)

    def _visit(self, value: Any, where: str) -> Any:
        """Return what is to stand in the place of an object; an object that can change itself is entered later."""
        if issubclass(type(value), _ATOMS):
            return value
        if id(value) not in self._seen:
            new = self._change(value, where)
            if new is value:
                new = self._rebuild(value, where)
            self._seen[id(value)] = (value, new)
            if id(new) not in self._seen or new is value:
                self._seen[id(new)] = (new, new)
                self._queue.append((new, where))
        return self._seen[id(value)][1]

    def _rebuild(self, value: Any, where: str) -> Any:
        """Return an object that cannot change itself with its parts exchanged, or itself where they stay."""
        if isinstance(value, MethodType):
            owner = self._visit(value.__self__, where)
            return value if owner is value.__self__ else MethodType(value.__func__, owner)
        if type(value) is weakref.ref:
            target = value()
            new = self._visit(target, where)
            return value if new is target else weakref.ref(new, value.__callback__)
        if isinstance(value, tuple | frozenset):
            parts = [self._visit(part, where) for part in value]
            if any(new is not old for new, old in zip(parts, value, strict=True)):
                base: Any = tuple if isinstance(value, tuple) else frozenset
                return base.__new__(type(value), parts)
        return value


def _entries(holder: Any) -> Iterator[tuple[str, Any, Callable[[Any], object]]]:
    """Yield what an object holds: the name of a module's attribute, the value, and a function that puts another there."""
    if isinstance(holder, list | deque):
        for index, value in enumerate(holder):
            yield "", value, functools.partial(holder.__setitem__, index)
    elif isinstance(holder, dict):
        for key, value in list(dict.items(holder)):
            yield "", value, functools.partial(holder.__setitem__, key)
            yield "", key, functools.partial(_set_key, holder, key)
    elif isinstance(holder, set):
        for value in list(holder):
            yield "", value, functools.partial(_set_member, holder, value)
    elif isinstance(holder, functools.partial):
        for index, value in enumerate((holder.func, holder.args, holder.keywords)):
            yield "", value, functools.partial(_set_part, holder, index)
    elif isinstance(holder, FunctionType):
        for cell in filter(_is_filled, holder.__closure__ or ()):
            yield "", cell.cell_contents, functools.partial(setattr, cell, "cell_contents")
        for name in ("__defaults__", "__kwdefaults__"):
            yield "", getattr(holder, name), functools.partial(setattr, holder, name)
    elif isinstance(holder, Tensor):
        for name in PARAMETER_HOOKS:
            yield from _entries(getattr(holder, name))
    elif isinstance(holder, MethodType):
        return
    yield from _attributes(holder)


def _attributes(holder: Any) -> Iterator[tuple[str, Any, Callable[[Any], object]]]:
    try:
        namespace = object.__getattribute__(holder, "__dict__")  # runs no code of the object's class
    except AttributeError:
        namespace = {}
    is_module = isinstance(holder, nn.Module)
    for name, value in list(namespace.items()):
        if is_module and name in ("_parameters", "_buffers"):
            for tensor in value.values():
                yield from _entries(tensor)
        else:
            label = name if is_module and name != "_modules" else ""
            yield label, value, functools.partial(namespace.__setitem__, name)
    for kind in type(holder).__mro__:
        slots = vars(kind).values() if "__slots__" in vars(kind) else ()
        for slot in slots:
            if isinstance(slot, MemberDescriptorType):
                with contextlib.suppress(AttributeError):  # an empty slot
                    yield "", slot.__get__(holder), functools.partial(slot.__set__, holder)


def _is_filled(cell: CellType) -> bool:
    try:
        _ = cell.cell_contents
    except ValueError:
        return False
    return True


def _set_key(holder: dict[Any, Any], key: Any, new: Any) -> None:
    items = [(new if name is key else name, value) for name, value in holder.items()]
    holder.clear()
    holder.update(items)  # in the same order


def _set_member(holder: set[Any], member: Any, new: Any) -> None:
    holder.remove(member)
    holder.add(new)


def _set_part(holder: functools.partial[Any], index: int, new: Any) -> None:
    state = [holder.func, holder.args, holder.keywords, vars(holder)]
    state[index] = new
    holder.__setstate__(tuple(state))  # type: ignore[attr-defined]
