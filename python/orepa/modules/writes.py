"""Detects writes to tensors: every one, by marks; within a training step, by versions, which cost nothing.

Marks: PyTorch's copy-on-write storages tell. A tensor is marked by a lazy clone that is dropped at once, so that its storage
has one owner again. The first access that may write, by whatever alias, takes the mark away, and neither copies nor moves
anything. Reading leaves it.

Versions: autograd counts writes, but not those of fused optimizers. So optimizers report their steps (`Versions`).
"""

from __future__ import annotations

import functools
import threading
from collections import deque
from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any
from weakref import ReferenceType, WeakValueDictionary, ref

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

# --- marks --------------------------------------------------------------------------------------------------------------

_is_marked: Callable[[Tensor], bool] = getattr(torch._C, "_is_cow_tensor", lambda tensor: False)
#: of the storage; unlike ``data_ptr()`` it does not count as a write
_address: Callable[[Tensor], int] = getattr(torch._C, "_data_address", lambda tensor: 0)


class Mark:
    """A period without writes to the storage at ``address``, which is None once a later mark has begun."""

    def __init__(self, address: int) -> None:
        self.address: int | None = address

    def holds(self, tensor: Tensor) -> bool:
        """Return whether nobody has written to the storage since, which is still that of ``tensor``."""
        return _is_marked(tensor) and _address(tensor) == self.address


#: by address: the kernels of all blocks that read a storage share its mark
_marks: WeakValueDictionary[int, Mark] = WeakValueDictionary()
_lock = threading.Lock()


def mark(tensor: Tensor) -> Mark | None:
    """Mark the storage of a tensor; None where it cannot be, as it is not PyTorch's own memory."""
    with _lock:
        address = _address(tensor)
        old = _marks.get(address)
        if not _is_marked(tensor):
            try:
                torch._lazy_clone(tensor)
            except RuntimeError:
                return None
            if old is not None:  # there was a write since, which other caches of this storage no longer see
                old.address, old = None, None
        if old is None:
            old = _marks[address] = Mark(address)
        return old


@functools.cache
def detects_writes() -> bool:
    """Return whether this PyTorch tells writes from reads as the above expects. Its functions are not public."""
    try:
        tensor = torch.zeros(1, device="cpu")
        address = _address(tensor)
        torch._lazy_clone(tensor)
        tensor.clone()
        marked = _is_marked(tensor)
        tensor.data.add_(1)
        return marked and not _is_marked(tensor) and _address(tensor) == address
    except (AttributeError, RuntimeError):
        return False


# --- versions -----------------------------------------------------------------------------------------------------------

_steps = 0
#: the optimizers that made the last steps, the newest first
_stepped: deque[ReferenceType[Optimizer]] = deque(maxlen=64)


def _count_step(optimizer: Optimizer, _args: Any, _kwargs: Any) -> None:
    global _steps
    if not torch.compiler.is_compiling():  # compiled steps count as writes
        _stepped.appendleft(ref(optimizer))
        _steps += 1


register_optimizer_step_post_hook(_count_step)


class Versions:
    """A period without writes to some tensors that autograd counts, and without steps of optimizers that have them."""

    __slots__ = ("_counts", "_steps", "_tensors")

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._tensors, self._counts, self._steps = tensors, [tensor._version for tensor in tensors], _steps

    def hold(self) -> bool:
        """Return whether nobody has written to the tensors since."""
        return [tensor._version for tensor in self._tensors] == self._counts and (
            self._steps == _steps or self._skipped_by_optimizers()
        )

    def _skipped_by_optimizers(self) -> bool:
        now, own = _steps, set(map(id, self._tensors))
        optimizers = [made() for made in islice(_stepped, now - self._steps)]
        if len(optimizers) < now - self._steps:
            return False
        for optimizer in optimizers:
            if optimizer is None or any(id(p) in own for group in optimizer.param_groups for p in group["params"]):
                return False
        self._steps = now
        return True
