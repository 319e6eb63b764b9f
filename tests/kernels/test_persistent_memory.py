"""Memory that backends keep on a GPU: who allocates it, and what is written over what."""

import contextlib
import threading

import pytest
import torch

from orepa_kernels.backends import cuda, memory


def test_another_thread_allocates_on_the_same_stream(monkeypatch):
    seen = {}

    @contextlib.contextmanager
    def stream(which):
        seen["stream"] = which
        yield

    def make():
        seen["thread"] = threading.get_ident()
        return torch.zeros(1)

    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"stream of {device}")
    monkeypatch.setattr(torch.cuda, "stream", stream)
    assert torch.equal(memory.alloc_persistent(torch.device("cuda", 1), make), torch.zeros(1))
    assert seen["thread"] != threading.get_ident() and seen["stream"] == "stream of cuda:1"


def test_counters_are_kept_and_those_of_graphs_are_not(monkeypatch):
    made, capturing = [], [False]

    def alloc_persistent(device, make):
        made.append(make())
        return made[-1]

    monkeypatch.setattr(cuda, "alloc_persistent", alloc_persistent)
    monkeypatch.setattr(cuda, "_index", lambda device: 0)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing[0])
    backend, device = cuda.CudaBackend(), torch.device("cpu")
    first = backend._zeros(device, 7, 100)
    assert backend._zeros(device, 7, 4096) is first and backend._zeros(device, 8, 100) is not first
    larger = backend._zeros(device, 7, 5000)
    assert larger.nbytes == 5000 and backend._zeros(device, 7, 100) is larger
    capturing[0] = True
    assert backend._zeros(device, 7, 100) is not larger and len(made) == 3


def test_address_tables_are_written_over_the_least_recent_first():
    launch = pytest.importorskip("orepa_kernels.backends.triton.launcher", reason="needs triton")
    written = {}

    def write(words, address):
        assert len(words) == launch._WORDS and set(words[3:]) <= {words[0]}
        written[address] = [*words[:3]]

    def content(row):
        return written[row.data_ptr()]

    rows = torch.empty(launch._ADDRESS_TABLES, launch._WORDS, dtype=torch.int64)
    tables = launch.AddressTables(rows, write)
    found = [tables.find((number, 0, 5)) for number in range(launch._ADDRESS_TABLES)]
    assert [content(table) for table in found] == [[number, 0, 5] for number in range(len(found))]
    assert all(table.data_ptr() % 16 == found[0].data_ptr() % 16 for table in found)
    assert tables.find((0, 0, 5)) is found[0]  # used again, and so no longer the least recent
    assert tables.find((99, 0, 5)).data_ptr() == found[1].data_ptr() and content(found[1]) == [99, 0, 5]
    assert content(tables.find((0, 0, 5))) == [0, 0, 5]
    wide = launch.AddressTables(torch.empty(1, 2 * launch._WORDS, dtype=torch.int64), lambda *_: addresses.append(_[1]))
    addresses: list[int] = []
    row = wide.find((7,) * (launch._WORDS + 1))
    assert addresses == [row.data_ptr(), row.data_ptr() + 8 * launch._WORDS]
