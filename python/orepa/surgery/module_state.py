"""Keeps the state of a model while its forward runs for real on symbolic values."""

from __future__ import annotations

import collections
import contextlib
import functools
import pickle
import random
import sys
from collections.abc import Callable, Iterable, Iterator
from types import CellType, CodeType, FunctionType, MemberDescriptorType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_ATOMS = (str, bytes, int, float, complex, type(None), ModuleType, torch.dtype, torch.device)
#: the code of these packages holds no state of a model
_FOREIGN = {*sys.stdlib_module_names, "torch", "numpy", "orepa", "orepa_kernels"}
#: other threads may change the objects of these packages meanwhile
_SHARED = {"logging", "threading", "_thread", "weakref", "concurrent", "multiprocessing", "torch"}


class ModelState:
    """What a forward can change: all that can be reached from a model and its code, and the random generators.

    That is the contents of containers, the attributes of instances and classes, variables of closures, globals that the code
    names, and tensors. Tensors are not copied: the first write to one keeps what it held.
    """

    def __init__(self, model: nn.Module) -> None:
        self._records: list[tuple[Callable[[], Any], Callable[[Any], None], Any]] = []
        self._tensors: list[tuple[Tensor, Tensor, bool]] = []
        self._generators: list[_Generator] = []
        self.stored: list[Any] = []  # what the changed objects held when `preserved` ended
        self.changed = False  # whether anything was put back then
        # The global functions of `random` and `numpy.random` are methods of the global generators.
        pending = [model, torch.default_generator, random.random.__self__, np.random.random_sample.__self__]  # type: ignore[attr-defined]
        pending += torch.cuda.default_generators if torch.cuda.is_initialized() else ()
        seen: dict[int, Any] = {}
        while pending:
            value = pending.pop()
            if id(value) not in seen and not isinstance(value, _ATOMS):
                seen[id(value)] = value
                pending += self._visit(value)

    @contextlib.contextmanager
    def preserved(self, seed: int) -> Iterator[Callable[[], bool]]:
        """Seed all generators, and put everything back at the end; yield a function that tells whether numbers were drawn."""
        for generator in self._generators:
            generator.seed(seed)
        seeded = [generator.read() for generator in self._generators]
        writes = _Writes()
        try:
            with writes:
                yield lambda: [generator.read() for generator in self._generators] != seeded
        finally:
            for generator in self._generators:
                generator.write(generator.saved)
            self.stored, self.changed = [], bool(writes.written)
            for read, write, saved in self._records:
                if _differs(now := read(), saved):
                    self.changed = True
                    self.stored += tree_leaves(now)
                    write(saved)
            for tensor, alias, requires_grad in self._tensors:
                if tensor.data_ptr() != alias.data_ptr():
                    tensor.data, self.changed = alias, True
                if tensor.requires_grad != requires_grad:
                    tensor.requires_grad_(requires_grad)
                    self.changed = True
            writes.undo()

    def _keep(self, read: Callable[[], Any], write: Callable[[Any], None]) -> Any:
        saved = read()
        self._records.append((read, write, saved))
        return saved

    def _visit(self, value: Any) -> Iterable[Any]:
        """Record what one object holds, and return the objects in it."""
        kind = type(value)
        if isinstance(value, dict):
            return self._keep(lambda: dict(value), lambda saved: _refill(value, saved)).values()
        if isinstance(value, set):
            return self._keep(lambda: set(value), lambda saved: _refill(value, saved))
        if isinstance(value, list | bytearray | collections.deque):
            return self._keep(lambda: list(value), lambda saved: _refill(value, saved))
        if isinstance(value, tuple | frozenset):
            return value
        if isinstance(value, MethodType):
            return value.__self__, value.__func__
        if isinstance(value, functools.partial):
            return value.func, value.args, value.keywords
        if isinstance(value, staticmethod | classmethod | property | functools.cached_property):
            return [getattr(value, name, None) for name in ("__func__", "fget", "func")]
        if isinstance(value, CellType):
            return self._keep(lambda: _contents(value), lambda saved: setattr(value, "cell_contents", *saved))
        if isinstance(value, type | FunctionType) and value.__module__.partition(".")[0] in _FOREIGN:
            return ()
        if isinstance(value, type):
            held = self._keep(lambda: dict(vars(value)), lambda saved: _reset_class(value, saved))
            return *value.__bases__, *held.values()
        if isinstance(value, FunctionType):
            scope, names = value.__globals__, names_in(value.__code__)
            held = self._keep(
                lambda: {name: scope[name] for name in names if name in scope},
                lambda saved: _reset_globals(scope, names, saved),
            )
            return *held.values(), vars(value), value.__closure__, value.__defaults__, value.__kwdefaults__
        if kind in (Tensor, nn.Parameter):
            self._tensors.append((value, value.detach(), value.requires_grad))
        elif kind is np.ndarray and value.flags.writeable:
            self._keep(
                value.tobytes, lambda saved: np.copyto(value, np.frombuffer(saved, value.dtype).reshape(value.shape))
            )
        elif isinstance(value, random.Random | torch.Generator | np.random.Generator | np.random.RandomState):
            self._generators.append(_Generator(value))
        elif isinstance(value, nn.Module) or kind.__module__.partition(".")[0] not in _SHARED:
            slots = [n for base in kind.__mro__ for n, d in vars(base).items() if isinstance(d, MemberDescriptorType)]
            held = self._keep(lambda: _slots(value, slots), lambda saved: _set_slots(value, saved))
            return kind, getattr(value, "__dict__", None), *held.values()
        return ()


class _Writes(TorchDispatchMode):
    """Keeps what tensors held before operators wrote to them."""

    def __init__(self) -> None:
        super().__init__()
        self.written: list[tuple[Tensor, Tensor]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {**dict(enumerate(args)), **(kwargs or {})}
        for index, argument in enumerate(func._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                tensors = tree_leaves(given.get(index, given.get(argument.name)))
                self.written += [(t, t.clone()) for t in tensors if isinstance(t, Tensor)]
        return func(*args, **(kwargs or {}))

    @torch.no_grad()
    def undo(self) -> None:
        for tensor, old in reversed(self.written):
            if tensor.shape != old.shape:
                tensor.resize_(old.shape)
            tensor.copy_(old)


class _Generator:
    """A random generator of torch, numpy or Python, with one interface."""

    def __init__(self, value: Any) -> None:
        self.value = getattr(value, "bit_generator", getattr(value, "_bit_generator", value))  # numpy's legacy class
        self.saved = self.read()

    def read(self) -> Any:
        if isinstance(self.value, random.Random):
            return self.value.getstate()
        return (
            self.value.get_state().tolist()
            if isinstance(self.value, torch.Generator)
            else pickle.dumps(self.value.state)
        )

    def write(self, state: Any) -> None:
        if isinstance(self.value, random.Random):
            self.value.setstate(state)
        elif isinstance(self.value, torch.Generator):
            self.value.set_state(torch.tensor(state, dtype=torch.uint8, device="cpu"))
        else:
            self.value.state = pickle.loads(state)

    def seed(self, seed: int) -> None:
        if isinstance(self.value, random.Random):
            self.value.seed(seed)
        elif isinstance(self.value, torch.Generator):
            self.value.manual_seed(seed)
        else:
            self.value.state = type(self.value)(seed).state


def names_in(code: CodeType) -> set[str]:
    """Return the names of globals and attributes in code and the functions in it."""
    return {*code.co_names}.union(*(names_in(part) for part in code.co_consts if isinstance(part, CodeType)))


def _differs(now: Any, saved: Any) -> bool:
    try:
        return bool(now != saved)
    except Exception:  # tensors and symbolic values have no truth value
        return True


def _refill(container: Any, contents: Any) -> None:
    container.clear()
    (container.update if isinstance(container, dict | set) else container.extend)(contents)


def _reset_class(kind: type, saved: dict[str, Any]) -> None:
    for name in vars(kind).keys() - saved.keys():
        delattr(kind, name)
    for name, value in saved.items():
        if vars(kind).get(name) is not value:
            setattr(kind, name, value)


def _reset_globals(scope: dict[str, Any], names: set[str], saved: dict[str, Any]) -> None:
    for name in names - saved.keys():
        scope.pop(name, None)
    scope.update(saved)


def _slots(value: Any, names: list[str]) -> dict[str, Any]:
    return {name: getattr(value, name) for name in names if hasattr(value, name)}


def _set_slots(value: Any, saved: dict[str, Any]) -> None:
    for name, held in saved.items():
        object.__setattr__(value, name, held)  # of frozen objects, too


def _contents(cell: CellType) -> list[Any]:
    try:
        return [cell.cell_contents]
    except ValueError:  # not yet filled
        return []
