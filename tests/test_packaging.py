"""The rules that the repository keeps, what an import costs, and the tests' own safety net."""

from __future__ import annotations

import ast
import re
import shutil
import sys

import pytest
import torch
from repository import PACKAGES, ROOT, git_files, run

# --- what an import costs -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("package", "absent"),
    [
        ("orepa_kernels", {"orepa", "timm", "lightning", "sklearn", "matplotlib", "onnx"}),
        ("orepa", {"timm", "lightning", "sklearn", "matplotlib", "onnx"}),
    ],
)
def test_import_stays_light(package, absent):
    """Neither package needs an extra to be imported; `orepa_kernels` knows nothing of `orepa`."""
    loaded = run(sys.executable, "-c", f"import sys, {package}; print(*sys.modules)").split()
    assert package in loaded
    assert not absent & set(loaded)


# --- rules of the repository ----------------------------------------------------------------------------------------------


def imported(source: str) -> set[str]:
    """Top-level names of every absolute import in ``source``, at any depth."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add((node.module or "").partition(".")[0])
    return names


def test_the_arrow_points_from_orepa_to_orepa_kernels():
    sources = sorted(PACKAGES["orepa_kernels"].rglob("*.py"))
    assert len(sources) > 5
    wrong = [path.name for path in sources if "orepa" in imported(path.read_text(encoding="utf-8"))]
    assert not wrong
    assert imported("def f():\n    from orepa.modules.orepa_conv import OREPAConv") == {
        "orepa"
    }  # the scan sees what it should


def test_no_paths_of_a_machine_in_any_file():
    # Put together here, so that this file passes its own test.
    machine = re.compile(
        "|".join(f"/{top}/" for top in ("work", "root", "farm", "opt/wheels")) + "|/(?:home|Users)/[a-z]"
    )
    found = []
    for path in git_files():
        data = path.read_bytes()
        if b"\0" not in data:
            found += [
                f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
                for number, line in enumerate(data.decode().splitlines(), 1)
                if machine.search(line)
            ]
    assert not found


def test_readme_blocks_that_ci_runs():
    bash = shutil.which("bash")
    if bash is None:
        pytest.skip("no bash")
    assert "pytest" in run(bash, ".ci/readme_block", "test")
    assert "orepa train" in run(bash, ".ci/readme_block", "train")


# --- the tests' own safety net (conftest.py) --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.complex64])
def test_uninitialised_memory_is_poisoned(dtype):
    like = torch.ones(2, 3, dtype=dtype)
    fresh = [
        torch.empty(2, 3, dtype=dtype),
        torch.empty_like(like),
        torch.empty_strided((2, 3), (1, 2), dtype=dtype),
        torch.empty_permuted((2, 3), (1, 0), dtype=dtype),
        like.new_empty(2, 3),
        like.new_empty_strided((2, 3), (1, 2)),
        torch.empty(2, 3, dtype=dtype, requires_grad=True),
    ]
    assert all(tensor.isnan().all() for tensor in fresh)
    assert fresh[-1].is_leaf and fresh[-1].requires_grad


def test_poison_leaves_the_rest_of_torch_alone():
    assert torch.empty(4, dtype=torch.int64).dtype is torch.int64
    assert torch.empty(4, device="meta").is_meta
    with torch.device("meta"):
        assert torch.empty(4).is_meta
        assert torch.nn.Conv2d(3, 4, 3).weight.is_meta
    compiled = torch.compile(lambda x: torch.empty_like(x).fill_(2) * x, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(torch.ones(3)), torch.full((3,), 2.0))


def test_random_numbers_start_from_the_same_seed():
    assert torch.initial_seed() == 0
