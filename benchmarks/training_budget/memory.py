"""Find where the memory of a training step goes: record its allocations, replay them, and name what is alive at the peak.

Each part is found by itself, none as the rest of the total, so that their sum can be checked against the allocator.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol
from unittest import mock

import torch
from torch import Tensor

import orepa_kernels
from orepa.bench.step import TrainingStep


@dataclass(frozen=True)
class Split:
    """Bytes at the peak of a step.

    Args:
        parameters: of the model.
        gradients: those that exist at the peak, which is often before most of them do.
        optimizer: momentum.
        activations: saved for the backward pass by everything but the squeeze; the squeezed kernels are among them, which
            the convolutions save.
        squeeze: saved for the backward pass by the squeeze.
        buffers: of the model, and the batch.
        temporary: all else, such as gradients of feature maps.
        rounding: what the allocator adds to the requested bytes.
    """

    parameters: int
    gradients: int
    optimizer: int
    activations: int
    squeeze: int
    buffers: int
    temporary: int
    rounding: int = 0

    @property
    def total(self) -> int:
        return sum(asdict(self).values())


@dataclass(frozen=True)
class Event:
    """A block of memory was handed out, or taken back where ``size`` is negative."""

    address: int
    size: int


class Recorder(Protocol):
    """An allocator that can be watched."""

    def record(self, call: Callable[[], Any]) -> tuple[Any, list[Event]]:
        """The value of a call, and what was allocated and freed meanwhile, in order."""

    def start(self) -> None:
        """Forget the peak so far."""

    def peak(self) -> tuple[int, int] | None:
        """Return the bytes allocated at the peak since `start`, and those requested; None if it does not count them."""


class CpuRecorder:
    """PyTorch's CPU allocator, through the profiler: what compiled code allocates is seen as well."""

    def record(self, call: Callable[[], Any]) -> tuple[Any, list[Event]]:
        from torch.profiler import ProfilerActivity, profile

        with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
            value = call()
        results = profiler.profiler.kineto_results
        events = []
        for event in _descend(results.experimental_event_tree()):
            fields = event.extra_fields
            if isinstance(fields, torch._C._profiler._ExtraFields_Allocation) and fields.device.type == "cpu":
                events.append((event.start_time_ns, Event(fields.ptr, fields.alloc_size)))
        return value, [event for _, event in sorted(events, key=lambda pair: pair[0])]

    def start(self) -> None:
        pass

    def peak(self) -> tuple[int, int] | None:
        return None


class CudaRecorder:
    """PyTorch's caching allocator, through its own history."""

    def record(self, call: Callable[[], Any]) -> tuple[Any, list[Event]]:
        torch.cuda.synchronize()
        torch.cuda.memory._record_memory_history("all", context=None, max_entries=1_000_000, clear_history=True)
        try:
            value = call()
            torch.cuda.synchronize()
            history = torch.cuda.memory._snapshot()["device_traces"][torch.cuda.current_device()]
        finally:
            torch.cuda.memory._record_memory_history(None)
        signs = {"alloc": 1, "free_requested": -1}
        return value, [Event(e["addr"], signs[e["action"]] * e["size"]) for e in history if e["action"] in signs]

    def start(self) -> None:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()

    def peak(self) -> tuple[int, int] | None:
        stats = torch.cuda.memory_stats()
        return stats["allocated_bytes.all.peak"], stats["requested_bytes.all.peak"]


def recorder(device: str) -> Recorder:
    """Of ``"cpu"`` or ``"cuda"``."""
    return CpuRecorder() if device == "cpu" else CudaRecorder()


def occupied(device: str) -> tuple[int, int]:
    """Return the bytes allocated now, and how many of them were requested. On the CPU, which does not count them, 0."""
    if device == "cpu":
        return 0, 0
    torch.cuda.synchronize()
    stats = torch.cuda.memory_stats()
    return stats.get("allocated_bytes.all.current", 0), stats.get("requested_bytes.all.current", 0)


def probe(device: str) -> Callable[[TrainingStep, bool], dict[str, Any]]:
    """Return the function that measures one variant: see `orepa.bench.step.Probe`."""
    warm_up(device)
    before = occupied(device)

    def measured(step: TrainingStep, eager: bool) -> dict[str, Any]:
        step()  # gives the optimizer its state
        return measure(step, recorder(device), before, eager)

    return measured


def warm_up(device: str) -> None:
    """Make the libraries allocate their workspaces now, so that no variant is charged for them."""
    if device == "cuda":
        a = torch.ones(64, 64, device=device, requires_grad=True)
        (a @ a).sum().backward()
        torch.cuda.synchronize()


def measure(
    step: TrainingStep, watch: Recorder, before: tuple[int, int] = (0, 0), eager: bool = True
) -> dict[str, Any]:
    """Run a step and split its peak.

    Args:
        step: has run before, so that its optimizer has its state and nothing is compiled any more.
        watch: the allocator.
        before: `occupied` before the model was built.
        eager: whether the squeeze runs as its own function. A compiled model mixes its intermediates with all others.

    Returns:
        ``peak_bytes`` by the allocator and its ``split``; ``saved_bytes``, all that the forward pass saves for the backward
        pass, and ``squeeze_saved_bytes``, the part of the squeeze (None where not ``eager``).
    """
    step.clear()
    permanent = _permanent(step)
    saved: dict[int, bool] = {}  # address to whether the squeeze saved it first
    inside = [False]

    def pack(tensor: Tensor) -> Tensor:
        saved.setdefault(tensor.untyped_storage().data_ptr(), inside[0])
        return tensor

    def forward() -> Tensor:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            return step.loss(step.logits())

    watch.start()
    with warnings.catch_warnings(), _marking(inside) if eager else contextlib.nullcontext():
        warnings.simplefilter("ignore", UserWarning)  # the profiler's, on repeated use
        loss, first = watch.record(forward)
        _, second = watch.record(loss.backward)
        gradients = set(_storages(p.grad for p in step.model.parameters() if p.grad is not None))
        _, third = watch.record(step.optimizer.step)
    counted = watch.peak()
    del loss
    step.clear()
    split = split_peak([first, second, third], permanent, saved, gradients)
    allocated = split.total
    if counted is not None:
        allocated = counted[0] - before[0]
        rounding = max(0, allocated - (counted[1] - before[1]))
        split = Split(**{**asdict(split), "rounding": rounding})
    after_forward = {address: first[index].size for address, index in _alive(first).items() if address in saved}
    by_squeeze = sum(size for address, size in after_forward.items() if saved[address])
    return {
        "peak_bytes": allocated,
        "split": asdict(split),
        "saved_bytes": sum(after_forward.values()),
        "squeeze_saved_bytes": by_squeeze if eager else None,
    }


def _permanent(step: TrainingStep) -> dict[str, dict[int, int]]:
    state = [v for s in step.optimizer.state.values() for v in s.values() if isinstance(v, Tensor)]
    return {
        "parameters": _storages(step.model.parameters()),
        "optimizer": _storages(state),
        "buffers": _storages([*step.model.buffers(), step.images, step.labels]),
    }


def _storages(tensors: Iterable[Tensor]) -> dict[int, int]:
    """Return bytes by address, each storage once."""
    storages = (tensor.untyped_storage() for tensor in tensors)
    return {storage.data_ptr(): storage.nbytes() for storage in storages}


@contextlib.contextmanager
def _marking(inside: list[bool]) -> Iterator[None]:
    """While it is open, ``inside[0]`` tells whether a squeeze is running."""
    squeeze = orepa_kernels.squeeze

    def marked(*args: Any, **kwargs: Any) -> list[Tensor]:
        inside[0] = True
        try:
            return squeeze(*args, **kwargs)
        finally:
            inside[0] = False

    with mock.patch.object(orepa_kernels, "squeeze", marked):
        yield


def split_peak(
    phases: Sequence[Sequence[Event]],
    permanent: Mapping[str, Mapping[int, int]],
    saved: Mapping[int, bool],
    gradients: set[int],
) -> Split:
    """Replay allocations and name what is alive when most is.

    Args:
        phases: the events of forward, backward and update.
        permanent: what is allocated between two steps: by part, bytes of each storage by its address.
        saved: addresses of what was saved for the backward pass, and whether the squeeze did.
        gradients: addresses of the parameters' gradients after it.
    """
    events = [(number, event) for number, phase in enumerate(phases) for event in phase]
    until_update = sum(len(phase) for phase in phases[:2])
    total = peak = at = 0
    live: dict[int, int] = {}  # address to index of the event
    for index, (_, event) in enumerate(events):
        if event.size > 0:
            live[event.address] = index
            total += event.size
        elif event.address in live:  # what was there before is someone else's
            total += event.size
            del live[event.address]
        if total > peak:
            peak, at = total, index + 1
    plain = [event for _, event in events]
    after_backward, at_peak = _alive(plain[:until_update]), _alive(plain[:at])
    parts = dict.fromkeys(("gradients", "activations", "squeeze", "temporary"), 0)
    for index in at_peak.values():
        phase, event = events[index]
        # Addresses are reused: only the block that survives the backward pass is a gradient, and only one
        # of the forward pass is what was saved.
        if event.address in gradients and after_backward.get(event.address) == index:
            part = "gradients"
        elif phase == 0 and event.address in saved:
            part = "squeeze" if saved[event.address] else "activations"
        else:
            part = "temporary"
        parts[part] += event.size
    owned: dict[int, str] = {}
    for name, blocks in permanent.items():
        for address in blocks:
            owned.setdefault(address, name)
    fixed = {name: sum(n for a, n in blocks.items() if owned[a] == name) for name, blocks in permanent.items()}
    return Split(**fixed, **parts)


def _alive(events: Sequence[Event]) -> dict[int, int]:
    """Address of each block that is still there at the end, to the index of the event that handed it out."""
    live: dict[int, int] = {}
    for index, event in enumerate(events):
        if event.size > 0:
            live[event.address] = index
        else:
            live.pop(event.address, None)
    return live


def _descend(events: Any) -> Iterator[Any]:
    for event in events:
        yield event
        yield from _descend(event.children)
