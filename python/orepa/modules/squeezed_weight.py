"""`SqueezedWeight`: a kernel that is computed, to be read like the weight of a convolution. Writes to it raise."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

NO_WRITES = (
    "the weight of a re-parameterised block is computed from its branches, so a write to it would be lost: set it with "
    "OREPAConv.load_kernel_(kernel), change the parameters of the branches, or convert the model first (orepa.convert)"
)

#: what writes to its first argument, besides all whose names end in an underscore
_IN_PLACE = frozenset(
    f"__{name}__"
    for name in (
        *(
            "setitem",
            "set",
            "delete",
            "iadd",
            "isub",
            "imul",
            "imatmul",
            "itruediv",
            "idiv",
            "ifloordiv",
            "imod",
            "ipow",
        ),
        *("iand", "ior", "ixor", "ilshift", "irshift"),
    )
)


class SqueezedWeight(Tensor):
    """A tensor, and its views, that raise RuntimeError where they would be written to. What is computed from it is plain."""

    _is_detached = False

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if any(isinstance(target, SqueezedWeight) for target in _targets(func, args, kwargs)):
            raise RuntimeError(NO_WRITES)
        with torch._C.DisableTorchFunctionSubclass():
            if func in (Tensor.__deepcopy__, Tensor.__reduce_ex__):
                return func(args[0].detach().as_subclass(Tensor), *args[1:], **kwargs)
            weights = [arg for arg in (*args, *kwargs.values()) if isinstance(arg, SqueezedWeight)]
            if func is Tensor.__iter__:
                return iter(_guard(args[0].unbind(), weights))
            result = _guard(func(*args, **kwargs), weights)
            if func is Tensor.detach:
                result._is_detached = True
            return result

    @property
    def _is_param(self) -> bool:
        return False

    @_is_param.setter
    def _is_param(self, value: bool) -> None:
        # `nn.Parameter(weight)` flags tensors of other types instead of changing their type. This one shall be ordinary.
        self.__class__ = nn.Parameter  # type: ignore[assignment]


def read_only(kernel: Tensor) -> Tensor:
    """Return an alias of a kernel, in its graph, that is read-only; a kernel of another type (sharded, fake) as it is."""
    return kernel.as_subclass(SqueezedWeight) if type(kernel) is Tensor else kernel


def _targets(func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterable[Any]:
    """Return what a function writes to."""
    name = func.__name__
    yield from _flat(kwargs.get("out"))
    if name == "requires_grad_" and getattr(args[0], "_is_detached", False):
        return  # a leaf, to differentiate with respect to
    if name in _IN_PLACE or (name.endswith("_") and not name.endswith("__")) or kwargs.get("inplace"):
        yield from _flat(args[0] if args else next(iter(kwargs.values())))


def _flat(value: Any) -> Iterable[Any]:
    return value if isinstance(value, list | tuple) else (value,)


def _guard(result: Any, weights: Sequence[Tensor]) -> Any:
    """Return a result with the tensors and arrays in it read-only that share the memory of a weight."""
    if isinstance(result, np.ndarray):
        result.flags.writeable = False
    elif type(result) in (list, tuple):
        return type(result)(_guard(item, weights) for item in result)
    elif type(result) is Tensor and torch._C._has_storage(result):
        storage = result.untyped_storage()._cdata
        if any(weight.untyped_storage()._cdata == storage for weight in weights):
            return read_only(result)
    return result
