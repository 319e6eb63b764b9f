"""The README's Python examples run as written."""

import re
from pathlib import Path

import pytest

import orepa

README = Path(__file__).resolve().parent.parent / "README.md"
EXAMPLES = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)


def test_examples_were_found():
    assert len(EXAMPLES) >= 4


@pytest.mark.parametrize("index", range(len(EXAMPLES)))
def test_example_runs(index):
    code = EXAMPLES[index]
    if "timm" in code:
        pytest.importorskip("timm", reason="timm is not installed (the [models] extra)")
    known = set(orepa.topologies())
    try:
        exec(compile(code, f"README example {index}", "exec"), {})
    finally:
        for name in set(orepa.topologies()) - known:
            del orepa.topology._REGISTRY[name]


def test_every_topology_has_its_row():
    text = README.read_text(encoding="utf-8")
    missing = [name for name in orepa.topologies() if f"`{name}`" not in text]
    assert not missing
