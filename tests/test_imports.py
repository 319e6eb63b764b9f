"""Imports have one direction: no circle between files, none between rooms, and rooms in the order of CONTRIBUTING."""

from __future__ import annotations

import ast
import graphlib
from pathlib import Path

import pytest

import orepa
import orepa_kernels

PACKAGES = {module.__name__: Path(module.__file__).parent for module in (orepa_kernels, orepa)}

#: folders of `orepa`, each of which may import those after it
ROOMS = ("bench", "train", "models", "surgery", "analysis", "modules", "topology")


def modules() -> dict[str, Path]:
    """Every module of both packages, by its dotted name."""
    found = {}
    for package, folder in PACKAGES.items():
        for path in folder.rglob("*.py"):
            parts = [package, *path.relative_to(folder).with_suffix("").parts]
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(name: str, source: str, is_package: bool, known: set[str]) -> set[str]:
    """The modules of ``known`` that a module imports, at any depth of its source."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = name.split(".")[: None if is_package else -1]
            base = base[: len(base) - node.level + 1] if node.level else []
            target = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                submodule = f"{target}.{alias.name}"
                found.add(submodule if submodule in known else target)
    return found & known - {name}


def graph() -> dict[str, set[str]]:
    """By module what it imports."""
    found = modules()
    known = set(found)
    return {
        name: imports(name, path.read_text(encoding="utf-8"), path.name == "__init__.py", known)
        for name, path in found.items()
    }


def room(name: str) -> str:
    """The folder of a module; files at the top of a package are rooms of their own."""
    parts = name.split(".")
    return ".".join(parts[:2])


def test_the_scan_sees_every_kind_of_import():
    known = {"a", "a.b", "a.b.c", "a.d"}
    assert imports("a.b.c", "def f():\n    from .. import d", False, known) == {"a.d"}
    assert imports("a.b.c", "from ..d import x", False, known) == {"a.d"}
    assert imports("a.b", "from . import c", True, known) == {"a.b.c"}
    assert imports("a.d", "import a.b.c", False, known) == {"a.b.c"}
    assert imports("a.d", "from a import b, x", False, known) == {"a.b", "a"}
    with pytest.raises(graphlib.CycleError):
        list(graphlib.TopologicalSorter({"a": {"b"}, "b": {"a"}}).static_order())


def test_no_circle_between_files():
    order = list(graphlib.TopologicalSorter(graph()).static_order())
    assert len(order) > 80 and order[-1].startswith("orepa.")


def test_no_circle_between_rooms():
    rooms: dict[str, set[str]] = {}
    for name, targets in graph().items():
        if name.startswith("orepa."):
            rooms.setdefault(room(name), set()).update(room(t) for t in targets if t.startswith("orepa."))
    for own, targets in rooms.items():
        targets.discard(own)
    list(graphlib.TopologicalSorter(rooms).static_order())
    for above, below in ((a, b) for i, a in enumerate(ROOMS) for b in ROOMS[i:] if a != b):
        assert f"orepa.{above}" not in rooms[f"orepa.{below}"], f"{below} imports {above}"


def test_backends_do_not_import_what_is_built_on_them():
    upper = {f"orepa_kernels.{name}" for name in ("api", "dispatch", "autograd", "nested", "ops", "info")}
    for name, targets in graph().items():
        if name.startswith("orepa_kernels.backends"):
            assert not targets & upper, name


def test_helpers_of_tests_and_benchmarks_have_names_of_their_own():
    """Both are imported by their bare names, in one process: of two files of one name, one would hide the other."""
    tests = Path(__file__).parent
    folders = [tests, *(folder for folder in tests.iterdir() if folder.is_dir()), tests.parent / "benchmarks"]
    names = [path.name for folder in folders for path in folder.glob("*.py")]
    assert len(names) > 100 and sorted(names) == sorted(set(names))
