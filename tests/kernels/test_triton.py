"""The Triton backend without a GPU: in Triton's interpreter, in a child process, and what it says where it cannot run."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from orepa_kernels import Block, Dense, Operand, Separable, squeeze
from orepa_kernels.backends.base import BackendError, Request
from orepa_kernels.backends.triton import TritonBackend, device
from orepa_kernels.backends.triton import backend as module

CASES = Path(__file__).parent / "triton_interpreter" / "cases.py"
CPU = torch.device("cpu")


def interpret(*options):
    pytest.importorskip("triton", reason="needs triton, which this torch does not bring")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *options, str(CASES)]
    # Beside the tests, not in the repository's root: `python -m` puts the working directory on the path.
    child = subprocess.run(command, cwd=CASES.parent, env=environment, capture_output=True, text=True, check=False)
    assert child.returncode == 0, child.stdout + child.stderr


EACH = "every_term or several_tiles or one_structure or bitwise or opcheck or strides"


@pytest.mark.slow
def test_each_kind_of_call_in_the_interpreter():
    interpret("-k", EACH)


@pytest.mark.slow
def test_every_shape_and_memory_in_the_interpreter():
    interpret("-k", f"not ({EACH})")


def block_of(*terms, size=(3, 3)):
    return Block(4, 4, size, terms or (Dense(Operand("w", (4, 4, *size))),))


def request(block=None, where=CPU, dtype=torch.float32, out_dtype=torch.float32, plain=True):
    return Request(block or block_of(), where, dtype, out_dtype, plain)


def test_it_says_why_it_cannot_run(monkeypatch):
    monkeypatch.setattr(module, "INTERPRETING", True)
    backend = TritonBackend()
    assert backend.supports(request())
    assert "float64 is not one of" in backend.supports(request(dtype=torch.float64)).reason
    assert "float64 is not one of" in backend.supports(request(out_dtype=torch.float64)).reason
    assert "subclasses" in backend.supports(request(plain=False)).reason
    assert "CPU tensors, got meta" in backend.supports(request(where=torch.device("meta"))).reason
    wide = Separable(Operand("dw", (4, 1, 9, 9)), Operand("pw", (4, 4, 1, 1)))
    assert "more than 49 taps" in backend.supports(request(block_of(wide, size=(9, 9)))).reason
    monkeypatch.setattr(module, "INTERPRETING", False)
    assert "cpu is no CUDA" in backend.supports(request()).reason


def test_an_explicit_request_without_a_device_raises(monkeypatch):
    if torch.cuda.is_available() or device.INTERPRETING:
        pytest.skip("there is something to run on")
    with pytest.raises(BackendError, match="'triton' was asked for but cannot run: (no CUDA|triton is not installed)"):
        squeeze([block_of()], [[torch.ones(4, 4, 3, 3)]], backend="triton")


def test_importing_the_package_does_not_import_triton():
    code = "import sys, orepa_kernels; orepa_kernels.backends(); sys.exit('triton.language' in sys.modules)"
    before = "import sys, torch; sys.exit('triton.language' in sys.modules)"
    if subprocess.run([sys.executable, "-c", before], check=False).returncode:
        pytest.skip("torch imports triton by itself")
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("way", ["cuda.matmul.", ""])
def test_precision_follows_the_newer_setting_too(way):
    """Said that way, PyTorch refuses to answer the older question, and nobody here may ask it."""
    code = f"import torch; torch.backends.{way}fp32_precision = 'tf32'; import orepa_kernels.info\n"
    code += "from orepa_kernels.guards import float32_precision\n"
    code += "from orepa_kernels.backends.triton.device import Device\n"
    code += "orepa_kernels.info.collect(); print(float32_precision(), Device('cuda', 90).precision(False))"
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert child.returncode == 0, child.stderr
    assert child.stdout.strip() == "high rounded"


def test_precision_follows_the_setting():
    before = torch.get_float32_matmul_precision()
    try:
        for setting, cuda, instinct in (
            ("highest", "tf32x3", "ieee"),
            ("high", "rounded", "tf32"),
            ("medium", "rounded", "tf32"),
        ):
            torch.set_float32_matmul_precision(setting)
            assert device.Device("cuda", 90).precision(False) == cuda
            assert device.Device("cuda", 90).precision(True) == "rounded"
            assert device.Device("hip", name="gfx942").precision(False) == instinct
            assert device.Device("hip", name="gfx90a").precision(True) == "ieee"
    finally:
        torch.set_float32_matmul_precision(before)
