"""The benchmark of what the host takes: it runs without a GPU, says what it left out, and its results can be rendered."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from orepa.bench.results import load

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


def run(script, *arguments):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(BENCHMARKS / script), *map(str, arguments)]
    child = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert child.returncode == 0, child.stderr
    return child.stdout


def test_it_is_measured_and_rendered(tmp_path):
    pytest.importorskip("triton", reason="needs triton, which this torch does not bring")
    output = run("host_overhead.py", "--rounds", 2, "--out", tmp_path / "host.json")
    found = load(tmp_path / "host.json")
    measured = {(row.provider, row.mode) for row in found.timed}
    assert found.complete and {("triton", mode) for mode in ("forward", "no_grad", "backward")} <= measured
    steps = {(row.provider, row.mode) for row in found.timed if row.case.get("blocks") == 53}
    assert steps >= {(f"triton, {way}", "step of 4") for way in ("alone", "together", "once")}
    assert {row.provider for row in found.timed if row.floor} == {"autograd.Function", "nn.Conv2d"}
    missing = found.settings["missing"]
    assert f"left out: {missing}" in output and (missing == "nothing") == torch.cuda.is_available()
    page = tmp_path / "page.md"
    page.write_text("<!-- results:host -->\n<!-- /results:host -->\n")
    run("render.py", "--document", page, "--results", tmp_path)
    header, _, *lines = page.read_text().partition("\n\n")[0].splitlines()[1:]
    assert header.startswith(f"| µs of the host, 10 operands; left out: {missing} | forward | no_grad | backward |")
    assert lines[0].startswith("| `triton` | ") and lines[1].startswith("| autograd.Function (floor) | ")
    assert "| µs of the host, resnet50, 53 blocks; left out: " in page.read_text()
