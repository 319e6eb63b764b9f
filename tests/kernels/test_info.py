"""What runs here and why not the rest: `orepa_kernels.info`, `backends()` and how a backend is chosen."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from orepa_kernels import BackendError, Block, Dense, Operand, Support, backends, info, squeeze
from orepa_kernels.dispatch import NAMES, names_on

BLOCK = Block(4, 2, (3, 3), (Dense(Operand("w", (4, 2, 3, 3))),))
ABSENT = [name for name, verdict in backends().items() if not verdict]


def squeeze_one(backend: str = "auto") -> torch.Tensor:
    (kernel,) = squeeze([BLOCK], [[torch.ones(4, 2, 3, 3)]], backend=backend)
    return kernel


def run_info(*arguments: str) -> str:
    command = [sys.executable, "-m", "orepa_kernels.info", *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def test_info_prints_every_backend_with_its_reason():
    lines = run_info().splitlines()
    assert any(line.split() == ["torch", torch.__version__] for line in lines)
    for name, verdict in backends().items():
        (row,) = [line for line in lines if line.split()[:1] == [name]]
        assert row.split()[1] == ("yes" if verdict else "no")
        assert row.endswith(verdict.reason)


def test_info_json_holds_the_same_facts():
    facts = json.loads(run_info("--json"))
    assert facts == json.loads(json.dumps(info.collect()))
    assert facts["torch"] == torch.__version__
    assert set(facts["backends"]) == set(NAMES)


def test_info_shows_the_environment_variable(monkeypatch, capsys):
    monkeypatch.setenv("OREPA_BACKEND", "reference")
    info.main(["--json"])
    assert json.loads(capsys.readouterr().out)["OREPA_BACKEND"] == "reference"


def test_info_refuses_unknown_arguments(capsys):
    with pytest.raises(SystemExit) as stop:
        info.main(["--no-such-option"])
    assert stop.value.code == 2
    assert "--no-such-option" in capsys.readouterr().err


def test_backends_are_all_listed_and_absent_ones_say_why():
    table = backends()
    assert tuple(table) == NAMES == ("cuda", "triton", "cpu", "reference")
    assert table["reference"] == Support(True)
    assert all(verdict.reason for verdict in table.values() if not verdict)


def test_the_backends_of_a_device_are_those_that_squeeze_there():
    """Available is not enough: on a machine with a GPU, the CPU's kernels are available and take no tensor of the GPU."""
    assert "cpu" not in names_on(torch.device("cuda", 0)) and "reference" in names_on(torch.device("cuda", 0))
    for name in names_on(torch.device("cpu")):
        assert squeeze_one(name).shape == (4, 2, 3, 3)


@pytest.mark.parametrize("name", ["reference", "auto", ""])
def test_environment_variable_that_can_be_met(monkeypatch, name):
    monkeypatch.setenv("OREPA_BACKEND", name)
    assert torch.equal(squeeze_one(), torch.ones(4, 2, 3, 3))


def test_unknown_name_in_the_environment_names_the_variable(monkeypatch):
    monkeypatch.setenv("OREPA_BACKEND", "cudnn")
    with pytest.raises(ValueError, match=r"OREPA_BACKEND must be one of auto, cuda, .*, got 'cudnn'"):
        squeeze_one()


def test_unknown_name_as_argument():
    with pytest.raises(ValueError, match=r"^backend must be one of auto, cuda, .*, got 'cudnn'"):
        squeeze_one("cudnn")


@pytest.mark.parametrize("name", ABSENT)
@pytest.mark.parametrize("through", ["argument", "environment"])
def test_a_backend_that_cannot_run_raises_and_never_falls_back(monkeypatch, name, through):
    if through == "environment":
        monkeypatch.setenv("OREPA_BACKEND", name)
    with pytest.raises(BackendError) as failure:
        squeeze_one(name if through == "argument" else "auto")
    assert repr(name) in str(failure.value)
    assert backends()[name].reason in str(failure.value)


@pytest.mark.parametrize("environment", [*ABSENT, "cudnn"])
def test_an_explicit_backend_beats_the_environment(monkeypatch, environment):
    monkeypatch.setenv("OREPA_BACKEND", environment)
    assert torch.equal(squeeze_one("reference"), torch.ones(4, 2, 3, 3))
