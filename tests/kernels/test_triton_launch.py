"""How Triton kernels are launched, without a GPU: with which arguments, and who is told. See ``triton_stub``."""

from __future__ import annotations

import os
import weakref
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton", reason="needs triton, which this torch does not bring")
if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

from triton import knobs
from triton_stub import fills_table, pretend

from orepa import OREPAConv
from orepa_kernels import squeeze
from orepa_kernels.backends.base import Signature
from orepa_kernels.backends.triton import compiled_kernel, device
from orepa_kernels.backends.triton import launcher as launch
from orepa_kernels.dispatch import calls


@pytest.fixture
def launched():
    """The arguments of every launch, as they would reach compiled code."""
    calls = []
    with pretend(lambda *arguments: calls.append(arguments)):
        yield calls


@pytest.fixture
def conv():
    return OREPAConv(8, 8, 3, bias=False, topology="plain", backend="triton")


def run(conv, backward=True):
    """Addresses of operands and kernel; those of the gradients where there are any."""
    (out,) = squeeze([conv.plan], [conv.operands()], backend="triton")
    grads = torch.autograd.grad(out, list(conv.parameters()), torch.ones_like(out)) if backward else []
    return [t.data_ptr() for t in (*conv.operands(), out)], [g.data_ptr() for g in grads]


def numbers(arguments):
    """All integers among the arguments, however they are nested."""
    for argument in arguments:
        if isinstance(argument, tuple):
            yield from numbers(argument)
        elif type(argument) is int:
            yield argument


def addresses(arguments):
    return [number for number in numbers(arguments) if number > 1 << 20]


def told_of(arguments):
    """What a launch has for hooks: a chain of them, and what they are told."""
    return [a for a in arguments if type(a).__name__ in ("LazyDict", "HookChain")]


def without_addresses(arguments):
    """The arguments without what differs from call to call, and what is for hooks."""
    if isinstance(arguments, tuple):
        return [without_addresses(a) for a in arguments]
    return None if told_of([arguments]) or (type(arguments) is int and arguments > 1 << 20) else arguments


def tell(monkeypatch, name, told):
    """Have a hook told of launches, the way profilers do in this Triton."""
    monkeypatch.setattr(getattr(knobs.runtime, name), "calls", [told])


def test_launches_around_the_runner_say_what_the_runner_says(launched, conv, monkeypatch):
    run(conv)  # by Triton's front end
    with monkeypatch.context() as patch:
        patch.setattr(compiled_kernel, "_hooked", lambda: True)
        run(conv)  # by Triton's runner
    run(conv)
    count = len(launched) // 3
    assert count >= 2
    by_front_end, by_runner, around = (launched[n * count : (n + 1) * count] for n in range(3))
    said = without_addresses(tuple(by_front_end))
    assert said == without_addresses(tuple(by_runner)) == without_addresses(tuple(around))
    assert not any(told_of(arguments) for arguments in around)


def test_addresses_are_those_of_the_tensors(launched, conv):
    for _ in range(3):
        launched.clear()
        operands, gradients = run(conv)
        forward, backward = launched[0], launched[1]
        assert addresses(forward)[: len(operands)] == operands
        # the workspace is not the caller's, and the kernel was freed: the upstream gradient may have any address
        assert set(operands[:-1]) | set(gradients) <= set(addresses(backward))


def test_hooks_are_told_of_every_launch(launched, conv, monkeypatch):
    told = []
    run(conv)
    run(conv)
    count = len(launched) // 2
    launched.clear()
    with monkeypatch.context() as patch:
        tell(patch, "launch_enter_hook", lambda metadata: told.append(metadata))
        run(conv)
        assert len(launched) == count
        for arguments in launched:
            # Compiled code calls the hooks that it is given, with what it is given for them.
            (metadata,) = [a for a in arguments if type(a).__name__ == "LazyDict"]
            next(a for a in arguments if a is knobs.runtime.launch_enter_hook)(metadata)
    names = [metadata.get()["name"] for metadata in told]
    assert names[:2] == ["squeeze_forward", "squeeze_backward"] and len(names) == count
    launched.clear()
    with monkeypatch.context() as patch:
        tell(patch, "launch_exit_hook", lambda metadata: None)
        run(conv, backward=False)
        assert knobs.runtime.launch_exit_hook in launched[0]
    launched.clear()
    run(conv, backward=False)  # nobody listens any more
    assert not told_of(launched[0])


def test_a_triton_that_keeps_its_launcher_elsewhere_is_left_to_its_runner():
    ran = []

    class Compiled:
        def __getitem__(self, grid):
            return lambda *arguments: ran.append((grid, arguments))

    function = {(3, 1, 1): lambda *arguments, **named: Compiled()}
    tables = [torch.empty(1), torch.empty(1)]
    own = launch.CompiledKernel(function, 3, tables, {"C": 7}, {"num_warps": 4}, 0)
    with pretend():
        own((1, 2))
        own((3, 4), 9)
    assert ran == [((3, 1, 1), ((3, 4), *(table.data_ptr() for table in tables), 9, 7))]


def test_operands_elsewhere_and_other_settings_get_launches_of_their_own(launched, conv):
    """The same layout, but addresses that are no multiple of 16, or another precision: another kernel has to run."""
    run(conv, backward=False)
    run(conv, backward=False)
    (((_, call),),) = calls._calls.values()
    prepared = call.prepared
    assert len(prepared._forward) == 1
    (name, parameter), *_ = conv.named_parameters()
    elements = parameter.numel()
    moved = torch.empty(elements + 1)[1:].view(parameter.shape)
    assert moved.data_ptr() % 16 and moved.stride() == parameter.stride()
    old, parameter.data = parameter.data, moved
    for _ in range(2):
        run(conv, backward=False)
        assert len(prepared._forward) == 2, name
    used = []
    for which, launches in enumerate(prepared._forward.values()):
        for own in launches:
            own.run = lambda addresses, which=which, go=own.run: (used.append(which), go(addresses))
    run(conv, backward=False)
    parameter.data = old
    run(conv, backward=False)
    assert used == [1, 0]
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        for _ in range(2):
            run(conv, backward=False)
            assert len(prepared._forward) == 3
    finally:
        torch.set_float32_matmul_precision(before)
    assert len(launched) == 8


def test_another_device_is_made_current(launched, conv, monkeypatch):
    run(conv)
    run(conv)
    current, entered = {"index": 1}, []

    class Guard:
        def __enter__(self):
            entered.append(current["index"])
            current["index"] = 0

        def __exit__(self, *_):
            current["index"] = 1

    state = device.LaunchState(0, lambda: current["index"], lambda: False)
    monkeypatch.setattr(launch, "launch_state", lambda _: state)
    monkeypatch.setattr(launch, "on_device", lambda _: Guard())
    signature = Signature.of(conv.operands(), torch.float32, torch.contiguous_format)
    prepared = launch.PreparedLaunches([conv.plan], signature)
    for turn in range(3):
        entered.clear()
        prepared.forward(conv.operands())
        assert current["index"] == 1 and entered and set(entered) == {1}, turn


def test_what_a_graph_has_recorded_is_kept(launched, conv, monkeypatch):
    monkeypatch.setattr(launch, "_captured", set())
    recording = SimpleNamespace(now=False)
    state = device.LaunchState(0, lambda: 0, lambda: recording.now)
    monkeypatch.setattr(launch, "launch_state", lambda _: state)
    run(conv)
    run(conv)
    assert not launch._captured
    recording.now = True
    run(conv)
    assert len(launch._captured) == 2  # one forward, one backward


@pytest.mark.parametrize(("size", "forward", "backward"), [(7, 2 + 2, 3 + 2 * 4), (9, 2 + 3, 4 + 2 * 5)])
def test_a_deep_stem_takes_a_launch_for_each_thing_that_waits_for_another(launched, size, forward, backward):
    """Its blocks at once (but the first, whose few channels make it another structure), then a composition after the other.

    Backward, all but the last composition is computed again; then come two launches for each of the forward's.
    """
    stem = OREPAConv(3, 16, size, bias=False, topology="deep_stem", backend="triton")
    (out,) = squeeze([stem.plan], [stem.operands()], backend="triton")
    assert sum(not fills_table(arguments) for arguments in launched) == forward
    launched.clear()
    torch.autograd.grad(out, list(stem.parameters()), torch.ones_like(out))
    assert sum(not fills_table(arguments) for arguments in launched) == backward


def test_tables_outlast_what_another_stream_reads(launched, conv, monkeypatch):
    """The caching allocator may hand an evicted launch's tables to others: it is told of each stream, once."""
    run(conv, backward=False)
    (((_, call),),) = calls._calls.values()
    kernel = next(iter(call.prepared._forward.values()))[0].run
    told = []
    for table in kernel._tensors:
        assert table.data_ptr() in kernel._tables
    tensors = [SimpleNamespace(device=torch.device("cuda", 0), record_stream=told.append) for _ in kernel._tensors]
    monkeypatch.setattr(kernel, "_tensors", tensors)
    stream = SimpleNamespace(now=5)
    run_compiled, _, *rest = kernel._direct
    monkeypatch.setattr(kernel, "_direct", (run_compiled, lambda _: stream.now, *rest))
    monkeypatch.setattr(torch.accelerator, "current_stream", lambda device: stream.now)
    for stream.now in (5, 5, 6, 5):
        run(conv, backward=False)
    assert told == [5, 5, 6, 6]


def test_a_list_is_captured_without_memory_of_the_host(launched, monkeypatch):
    """Addresses are kernel arguments, which a graph records by value, into a new table each time."""
    convs = [OREPAConv(8, 8 * n, 3, bias=False, topology="plain", backend="triton") for n in (1, 2)]
    plans, tensors = [conv.plan for conv in convs], [conv.operands() for conv in convs]
    recording = SimpleNamespace(now=False)
    state = device.LaunchState(0, lambda: 0, lambda: recording.now)
    monkeypatch.setattr(launch, "launch_state", lambda _: state)
    monkeypatch.setattr(launch, "_captured", set())
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda *_: pytest.fail("pinned"))
    for recording.now in (False, True):
        launched.clear()
        kernels = squeeze(plans, tensors, backend="triton")
        fill, forward = launched
        expected = [t.data_ptr() for own, kernel in zip(tensors, kernels, strict=True) for t in (*own, kernel)]
        words, table = [*numbers(tuple(fill))], set(addresses(fill)) - set(expected)
        assert fills_table(tuple(fill)) and not fills_table(tuple(forward))
        assert [word for word in words if word in expected][: len(expected)] == expected
        assert table & set(addresses(forward))
    assert len(launch._captured) == 1
    tables, held, find, run_both = [], [], launch.AddressTables.find, launch.BackwardLaunch._run_both
    monkeypatch.setattr(
        launch.AddressTables, "find", lambda own, words: (tables.append(weakref.ref(row := find(own, words))), row)[1]
    )
    monkeypatch.setattr(
        launch.BackwardLaunch, "_run_both", lambda *own: (held.append(tables[-1]() is not None), run_both(*own))
    )
    kernels = squeeze(plans, tensors, backend="triton")
    tables.clear()
    torch.autograd.grad(kernels, [p for conv in convs for p in conv.parameters()], list(map(torch.ones_like, kernels)))
    assert (
        held == [True] and tables[0]() is None
    )  # as long as the launches, for which more memory of the graph is taken
