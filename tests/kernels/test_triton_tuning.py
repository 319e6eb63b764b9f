"""Choosing tiles by the clock: what is taken, what is remembered where, and that nothing happens unless it is asked for."""

import json
import logging
import math
import subprocess
import sys
from dataclasses import replace
from typing import ClassVar

import pytest
import torch

import orepa_kernels
from orepa import OREPAConv
from orepa_kernels import Block, Dense, Operand, dispatch
from orepa_kernels.backends.triton import autotune as tuning
from orepa_kernels.backends.triton import configs
from orepa_kernels.backends.triton.spec import forward_spec

GPU = torch.device("cuda")
KIND = "triton 3, some GPU/9, sm 90"
FILE = "triton-3-some-GPU-9-sm-90.json"
LARGE, SMALL = configs.FORWARD_LARGE, configs.FORWARD_SMALL
MEDIUM = replace(SMALL, BO=32)


class Clock:
    """Milliseconds that were decided beforehand, in place of `tuning.measure`; ``timed`` lists what was asked."""

    def __init__(self, times):
        self.times, self.timed = times, []

    def run_of(self, config):
        return lambda: config

    def __call__(self, run):
        self.timed.append(run())
        return self.times[self.timed[-1]]


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """A machine whose GPU is only named; returns the folder of its choices, not there yet."""
    folder = tmp_path / "some" / "cache"
    monkeypatch.setenv("OREPA_AUTOTUNE", "1")
    monkeypatch.setenv("OREPA_AUTOTUNE_CACHE", str(folder))
    monkeypatch.setattr(tuning, "device_name", lambda device: KIND)
    monkeypatch.setattr(tuning, "capturing", lambda device: False)
    tuning._store.cache_clear()
    yield folder
    tuning._store.cache_clear()


@pytest.fixture
def clock(gpu, monkeypatch):
    """The small tile is the fastest."""
    clock = Clock({LARGE: 3.0, MEDIUM: 2.0, SMALL: 1.0})
    monkeypatch.setattr(tuning, "measure", clock)
    return clock


def choose(clock, key="a", choices=(LARGE, MEDIUM, SMALL), default=LARGE):
    return tuning.choose(choices, default, key, GPU, clock.run_of)


def forget():
    """What another process would find: the file alone."""
    tuning._store.cache_clear()


# --- the choice ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fastest", [LARGE, MEDIUM, SMALL])
def test_the_fastest_is_taken_and_timed_once(clock, fastest):
    clock.times[fastest] = 0.5
    assert [choose(clock) for _ in range(3)] == [fastest] * 3
    assert clock.timed == [LARGE, MEDIUM, SMALL]


def test_equally_fast_is_what_the_heuristics_take(clock):
    clock.times = dict.fromkeys(clock.times, 1.0)
    assert [choose(clock, str(tile), default=tile) for tile in (LARGE, MEDIUM, SMALL)] == [LARGE, MEDIUM, SMALL]


def test_a_tile_that_does_not_fit_is_never_taken(clock, gpu):
    clock.times = {LARGE: math.inf, MEDIUM: 7.0, SMALL: math.inf}
    assert choose(clock) == MEDIUM
    clock.times[MEDIUM] = math.inf
    assert choose(clock, "b") == LARGE  # whose launch then says what is wrong
    assert list(json.loads((gpu / FILE).read_text())["tiles"]) == ["a"]


def test_the_clock_reports_too_little_shared_memory(monkeypatch):
    pytest.importorskip("triton", reason="needs triton, which this torch does not bring")
    import triton.testing
    from triton.runtime.errors import OutOfResources

    def refuse(*_, **__):
        raise OutOfResources(200_000, 100_000, "shared memory")

    monkeypatch.setattr(triton.testing, "do_bench", refuse)
    assert tuning.measure(lambda: None) == math.inf


def test_without_memory_to_time_in_the_heuristics_decide(clock, gpu, monkeypatch, caplog):
    def exhausted(run):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(tuning, "measure", exhausted)
    assert choose(clock) == LARGE and not gpu.exists() and "no memory" in caplog.text
    monkeypatch.setattr(tuning, "measure", clock)
    assert choose(clock) == SMALL


@pytest.mark.parametrize("choices", [(), (LARGE,)])
def test_without_a_choice_nothing_is_timed(clock, gpu, choices):
    assert choose(clock, choices=choices) == LARGE
    assert not clock.timed and not gpu.exists()


def test_while_a_graph_is_captured_nothing_is_timed(clock, gpu, monkeypatch):
    monkeypatch.setattr(tuning, "capturing", lambda device: True)
    assert choose(clock) == LARGE and not clock.timed and not gpu.exists()
    monkeypatch.setattr(tuning, "capturing", lambda device: False)
    assert choose(clock) == SMALL  # the heuristics' tile was not remembered
    monkeypatch.setattr(tuning, "capturing", lambda device: True)
    assert choose(clock) == SMALL  # what was timed before is known


def test_the_interpreter_has_no_clock(clock, gpu):
    assert tuning.choose((LARGE, SMALL), LARGE, "a", torch.device("cpu"), clock.run_of) == LARGE
    assert not clock.timed and not gpu.exists()


# --- the file -------------------------------------------------------------------------------------------------------------

ANOTHER_PROCESS = """
import sys, torch
from orepa_kernels.backends.triton import autotune as tuning
from orepa_kernels.backends.triton import configs
tuning.device_name, tuning.capturing = (lambda device: sys.argv[1]), (lambda device: False)
choices = configs.FORWARD_LARGE, configs.FORWARD_SMALL
def run_of(config):
    sys.exit("timed")
print(tuning.choose(choices, choices[0], "a", torch.device("cuda"), run_of))
"""


def another_process(kind):
    command = [sys.executable, "-c", ANOTHER_PROCESS, kind]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_another_process_finds_the_choice(clock, gpu):
    choose(clock)
    assert [path.name for path in gpu.iterdir()] == [FILE]  # and no temporary file
    child = another_process(KIND)
    assert child.returncode == 0 and child.stdout.strip() == str(SMALL), child.stderr
    child = another_process("another GPU")
    assert child.returncode == 1 and child.stderr.strip().endswith("timed")


def test_the_file_says_what_it_is_for(clock, gpu):
    choose(clock)
    content = json.loads((gpu / FILE).read_text())
    assert content == {"for": KIND, "tiles": {"a": vars(SMALL)}}


def test_processes_keep_each_others_choices(gpu):
    path = gpu / FILE
    one, two = tuning._Store(path, KIND), tuning._Store(path, KIND)
    one.add("a", LARGE)
    two.add("b", SMALL)
    one.add("c", MEDIUM)
    two.add("a", SMALL)
    third, choices = tuning._Store(path, KIND), (LARGE, MEDIUM, SMALL)
    assert [third.find(key, choices) for key in "abcd"] == [SMALL, SMALL, MEDIUM, None]  # the last one wins
    assert [one.find(key, choices) for key in "abc"] == [LARGE, SMALL, MEDIUM]  # but no process changes its mind


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b'{"for": "triton 3, so',
        b"\xff\xfe\x00",
        b"[" * 100_000,
        b"[1, 2]",
        b"null",
        json.dumps({"for": "triton 2, an older GPU", "tiles": {"a": vars(LARGE)}}).encode(),
        json.dumps({"tiles": {"a": vars(LARGE)}}).encode(),
        json.dumps({"for": KIND, "tiles": ["a"]}).encode(),
    ],
)
def test_a_damaged_or_foreign_file_is_ignored_and_replaced(clock, gpu, caplog, content):
    gpu.mkdir(parents=True)
    (gpu / FILE).write_bytes(content)
    assert choose(clock) == SMALL
    assert "ignoring" in caplog.text and FILE in caplog.text
    forget()
    caplog.clear()
    assert choose(clock) == SMALL and len(clock.timed) == 3 and not caplog.text


@pytest.mark.parametrize("entry", [vars(replace(SMALL, BO=48)), {**vars(SMALL), "more": 1}, None, "small", 7, []])
def test_a_tile_that_the_tables_no_longer_have_is_timed_again(clock, gpu, entry):
    gpu.mkdir(parents=True)
    (gpu / FILE).write_text(json.dumps({"for": KIND, "tiles": {"a": entry, "b": vars(MEDIUM)}}))
    assert choose(clock, "b") == MEDIUM and not clock.timed
    assert choose(clock) == SMALL and clock.timed
    assert json.loads((gpu / FILE).read_text())["tiles"] == {"a": vars(SMALL), "b": vars(MEDIUM)}


def test_where_nothing_can_be_written_this_process_remembers(clock, gpu, caplog):
    gpu.parent.mkdir()
    gpu.write_text("a file where the folder should be")
    assert [choose(clock, key) for key in "abab"] == [SMALL] * 4
    assert len(clock.timed) == 6
    messages = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert len([text for text in messages if "cannot write" in text]) == 1


def test_a_write_that_fails_leaves_the_old_file(clock, gpu, monkeypatch):
    choose(clock)
    before = (gpu / FILE).read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tuning.os, "replace", full)
    assert choose(clock, "b") == SMALL
    assert [path.name for path in gpu.iterdir()] == [FILE] and (gpu / FILE).read_bytes() == before


def test_the_default_folder_is_the_users_cache(monkeypatch, tmp_path):
    monkeypatch.delenv("OREPA_AUTOTUNE_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert tuning._folder() == tmp_path / "orepa_kernels"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert tuning._folder() == tmp_path / ".cache" / "orepa_kernels"


# --- asked for or not -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("value", "on"), [(None, False), ("", False), ("0", False), ("1", True)])
def test_the_variable(monkeypatch, value, on):
    monkeypatch.delenv("OREPA_AUTOTUNE", raising=False)
    if value is not None:
        monkeypatch.setenv("OREPA_AUTOTUNE", value)
    assert tuning.enabled() is on


@pytest.mark.parametrize("value", ["yes", "true", "2", " 1"])
def test_other_values_are_refused(monkeypatch, value):
    monkeypatch.setenv("OREPA_AUTOTUNE", value)
    with pytest.raises(ValueError, match=f"OREPA_AUTOTUNE must be 0 or 1, got '{value}'"):
        tuning.enabled()


def dense(o=6, i=4, groups=1):
    block = Block(o, i, (3, 3), (Dense(Operand("w", (o, i // groups, 3, 3))),), groups)
    tensors = [torch.randn(block.shape), torch.randn(block.shape)]
    return block, forward_spec(block, tensors[:1], tensors[1]), tensors


class Made:
    """A launch that only notes that it was called, in place of a kernel's."""

    called: ClassVar = []

    def __init__(self, spec, indices, blocks, tensors, precision, config):
        self.config = config

    def __call__(self, addresses, capturing):
        self.called.append(self.config)


def made():
    pytest.importorskip("triton", reason="needs triton, which this torch does not bring")
    from orepa_kernels.backends.triton import launcher as launch

    block, spec, tensors = dense()
    choices = (LARGE, MEDIUM, SMALL)
    return launch.make_launch(Made, lambda *_: choices, spec, [0], [block], [tensors])


def test_a_launch_asks_the_clock_only_where_that_is_asked_for(clock, gpu, monkeypatch):
    def measure(run):
        run()
        return clock.times[Made.called[-1]]

    monkeypatch.setattr(configs, "_FILLED", 1)
    monkeypatch.setattr(tuning, "can_time", lambda device: True)
    monkeypatch.setattr(tuning, "measure", measure)
    monkeypatch.setattr(Made, "called", [])
    for value in ("0", ""):
        monkeypatch.setenv("OREPA_AUTOTUNE", value)
        assert made().config == LARGE and not Made.called and not gpu.exists()
    monkeypatch.setenv("OREPA_AUTOTUNE", "1")
    assert [made().config for _ in range(2)] == [SMALL, SMALL]
    assert Made.called == [LARGE, MEDIUM, SMALL]


def test_a_choice_is_for_one_structure_and_its_sizes():
    def key(block, spec, tensors, direction="forward", precision="tf32"):
        return tuning.cache_key(direction, spec, [block], [tensors], precision)

    block, spec, tensors = dense()
    keys = [
        key(block, spec, tensors),
        key(block, spec, tensors, direction="backward"),
        key(block, spec, tensors, precision="tf32x3"),
        key(block, replace(spec, wide=True), tensors),
        key(*dense(7)),
        key(*dense(6, 8)),
        key(*dense(6, 8, groups=2)),
        tuning.cache_key("forward", spec, [block, block], [tensors, tensors], "tf32"),
    ]
    assert len(set(keys)) == len(keys)
    assert dense()[1] is not spec and key(*dense()) == keys[0]


# --- the heuristics ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("filled", "taken"), [(6, LARGE), (7, MEDIUM), (9, MEDIUM), (10, SMALL)])
def test_without_the_clock_the_largest_tile_that_fills_the_gpu(monkeypatch, filled, taken):
    block, *_ = dense(70, 20)  # three taps at a time: 6 large tiles, 9 medium ones
    monkeypatch.setattr(configs, "_FILLED", filled)
    assert configs.largest_filling([block], (LARGE, MEDIUM, SMALL)) == taken


# --- on a GPU ---------------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(
    not orepa_kernels.backends()["triton"] or not torch.cuda.is_available(), reason="triton does not run here"
)
def test_tuned_launches_on_a_gpu(monkeypatch, tmp_path):

    def run():
        monkeypatch.setattr(dispatch.calls, "_calls", {})
        forget()
        conv.zero_grad()
        kernel = conv.squeeze()
        kernel.backward(upstream)
        return [kernel.detach(), *(parameter.grad.clone() for parameter in conv.parameters())]

    monkeypatch.setenv("OREPA_AUTOTUNE_CACHE", str(tmp_path / "cache"))
    conv = OREPAConv(96, 80, 3, bias=False, backend="triton").cuda()
    with torch.no_grad():
        for parameter in conv.parameters():
            parameter.normal_(std=0.2)
    upstream = torch.randn(conv.plan.shape, device="cuda")
    plain = run()
    assert not (tmp_path / "cache").exists()
    monkeypatch.setenv("OREPA_AUTOTUNE", "1")
    tuned = run()
    for mine, other in zip(tuned, plain, strict=True):
        assert (mine - other).norm() <= 1e-5 * other.norm()
    (path,) = (tmp_path / "cache").iterdir()
    assert {key.split()[0] for key in json.loads(path.read_text())["tiles"]} == {"forward", "backward"}
    monkeypatch.setattr(tuning, "measure", lambda run: pytest.fail("timed again"))
    assert all(torch.equal(a, b) for a, b in zip(run(), tuned, strict=True))
    forget()
