"""The GPU script, dry: everything but the timings, on this machine."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "benchmarks" / "run_gpu.sh"

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")


def run(*arguments, **environment):
    command = ["bash", str(SCRIPT), *map(str, arguments)]
    # A build would replace the compiled module under the tests that run beside this one: pip only says what it would do.
    variables = {
        **os.environ,
        "PYTHON": sys.executable,
        "OMP_NUM_THREADS": "1",
        "PIP_DRY_RUN": "1",
        "PIP_QUIET": "0",
        **environment,
    }
    return subprocess.run(command, env=variables, capture_output=True, text=True, timeout=300, check=False)


def test_dry_run_of_the_benchmarks(tmp_path):
    pytest.importorskip("timm", reason="timm is not installed (the [models] extra)")
    result = run("--dry-run", "--only", "bench", tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    log = (tmp_path / "log.txt").read_text()
    assert "Would install orepa-kernels" in log and "no GPU: nothing to compare" in log
    for name in ("squeeze-fp32", "step-r18"):
        content = json.loads((tmp_path / f"{name}.json").read_text())
        assert content["complete"] and {row["status"] for row in content["rows"]} <= {"ok", "skipped"}
    table = result.stdout.split("\n\n")[-1].splitlines()
    assert len(table) <= 40 and any("reference" in line for line in table)
    assert table[-1].startswith("after ")


def test_a_failed_step_is_named_and_the_others_still_run(tmp_path):
    broken = tmp_path / "python"
    broken.write_text(
        f'#!/bin/sh\ncase "$*" in *sanitize*) exit 3;; *pytest*) exit 0;; esac\nexec {sys.executable} "$@"\n'
    )
    broken.chmod(0o755)
    result = run("--dry-run", "--only", "tests", tmp_path / "out", PYTHON=str(broken))
    assert result.returncode == 1
    assert result.stdout.splitlines()[-1] == "FAILED: sanitizer-shapes (exit 3)"
    assert "--- tests-cuda: exit 0" in result.stdout and "--- tests-others: exit 0" in result.stdout


def test_few_files_and_what_failed_survives_a_time_limit(tmp_path):
    """A machine that is lent may hand back only so many files, and takes itself back while a step runs."""
    slow = tmp_path / "test_slow.py"
    slow.write_text(
        "import pytest, time\n"
        "pytestmark = pytest.mark.gpu\n"
        "def test_wrong(): assert 1 == 2, 'seen'\n"
        "def test_endless(): time.sleep(600)\n"
    )
    hurried = tmp_path / "bin"
    hurried.mkdir()
    (hurried / "timeout").write_text(f'#!/bin/sh\nshift 5\nexec {shutil.which("timeout")} -s INT -k 10 8 "$@"\n')
    broken = hurried / "python"
    broken.write_text(
        f'#!/bin/sh\ncase "$*" in *test_gpu.py*) exec {sys.executable} -m pytest -q -p no:cacheprovider {slow};;\n'
        "*) exit 0;; esac\n"
    )
    for program in hurried.iterdir():
        program.chmod(0o755)
    path = f"{hurried}{os.pathsep}{os.environ['PATH']}"
    result = run("--dry-run", "--only", "tests", tmp_path / "out", PYTHON=str(broken), PATH=path)
    assert "FAILED: tests-cuda (exit 124)" in result.stdout
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["log.txt"]
    log = (tmp_path / "out" / "log.txt").read_text()
    assert "AssertionError: seen" in log and "=== sanitizer-shapes" in log


def test_unknown_options_are_refused(tmp_path):
    result = run("--wet-run", tmp_path)
    assert result.returncode == 2 and "unknown option --wet-run" in result.stderr


def measured(**changes):
    return {"path": "fp32", "what": "3x3, 64 channels", "mode": "forward", "provider": "cuda", "us": 9.0, **changes}


def test_claims_of_the_audit_are_confirmed_or_refuted():
    import gpu_claims

    bounds = [
        {"path": "fp32", "what": "3x3, 64 channels", "mode": "forward", "triton": 4.0, "cuda": 8.0, "tensor": 5.0}
    ]
    bounds[0]["floor"] = 1.0
    lines = gpu_claims.verdicts([measured(), measured(provider="triton", us=4.5), measured(path="other")], bounds)
    assert [line.partition(":")[0] for line in lines] == ["confirmed", "REFUTED", "confirmed"]
    assert lines[1] == "REFUTED: triton fp32 3x3, 64 channels forward: 4.5 us, bound 5.0, memory 1.0"
    assert lines[2] == "confirmed: triton has the lower bounds, triton is faster"
    slow = gpu_claims.verdicts([measured(), measured(provider="triton", us=10.0)], bounds)
    assert slow[-1] == "REFUTED: triton has the lower bounds, cuda is faster"


def test_counters_are_read_from_what_ncu_prints():
    import gpu_claims

    issue, registers = "smsp__issue_active.avg.pct_of_peak_sustained_active", "launch__registers_per_thread"
    text = f'==PROF== Connected\n"ID","Kernel Name","{issue}","{registers}"\n"","","%","register/thread"\n'
    assert gpu_claims.counters(text) == []
    text += '"0","squeeze_forward","61.5","194"\n'
    assert gpu_claims.counters(text) == ["squeeze_forward: % of cycles issue 61.5, registers 194"]
