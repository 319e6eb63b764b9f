"""The package as it is built: wheel, sdist, and what the build says where something is missing."""

from __future__ import annotations

import email
import importlib.metadata
import importlib.util
import json
import os
import shutil
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version
from repository import PACKAGES, ROOT, git_files, run

import orepa
import orepa_kernels

BUILD_NEEDS = Version("77")  # pyproject.toml, build-system.requires

BUILD = """
import sys
from setuptools import build_meta
wheel, sdist = sys.argv[1:]
build_meta.build_sdist(sdist)
build_meta.build_wheel(wheel)
torch = sys.modules.get("torch")
assert torch is None, "the build imports torch"
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A wheel and an sdist of the project where there is no compiler, and the wheel compiled from that sdist alone; offline."""
    try:
        found = importlib.metadata.version("setuptools")
    except importlib.metadata.PackageNotFoundError:
        found = "0"
    if Version(found) < BUILD_NEEDS:
        pytest.skip(f"building needs setuptools >= {BUILD_NEEDS} in this environment, found {found}")
    base = tmp_path_factory.mktemp("built")
    bare = base / "bin"  # a machine with Python and nothing else
    bare.mkdir()
    wheel, sdist = build(copy_of_tree(base / "tree"), base / "tree-out", PATH=str(bare), CXX="")
    with tarfile.open(sdist) as archive:
        archive.extractall(base / "unpacked")
    (unpacked,) = (base / "unpacked").iterdir()
    # Nvcc and the optimizer are at work wherever the package is installed; what is tested here does not depend on them.
    quick = {"OREPA_CUDA": "OFF", "CMAKE_ARGS": "-DCMAKE_BUILD_TYPE=Debug"}
    again, _ = build(unpacked, base / "unpacked-out", **quick)
    return {"wheel": wheel, "sdist": sdist, "wheel of sdist": again}


def copy_of_tree(folder: Path) -> Path:
    """What git knows: a build leaves egg-info and build/ beside the sources."""
    for path in git_files():
        target = folder / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(path, target)
    return folder


def build(tree: Path, out: Path, **environment: str) -> tuple[Path, Path]:
    folders = [out / kind for kind in ("wheel", "sdist")]
    for folder in folders:
        folder.mkdir(parents=True)
    run(sys.executable, "-c", BUILD, *folders, cwd=tree, **environment)
    (wheel,), (sdist,) = (list(folder.iterdir()) for folder in folders)
    return wheel, sdist


def members(archive: Path) -> set[str]:
    if archive.suffix == ".whl":
        return set(zipfile.ZipFile(archive).namelist())
    with tarfile.open(archive) as tar:
        return {"/".join(Path(m.name).parts[1:]) for m in tar.getmembers() if m.isfile()}


def expected_modules() -> set[str]:
    """Where every module, and the typing marker, of both packages belongs in a wheel."""
    listed = git_files()
    return {
        f"{name}/{path.relative_to(folder).as_posix()}"
        for name, folder in PACKAGES.items()
        for path in listed
        if folder in path.parents and (path.suffix in (".py", ".pyi") or path.name == "py.typed")
    }


@pytest.mark.parametrize("kind", ["wheel", "wheel of sdist"])
def test_wheel_holds_both_packages_and_nothing_else(built, kind):
    expected = expected_modules()
    assert {
        "orepa_kernels/py.typed",
        "orepa/py.typed",
        "orepa_kernels/backends/__init__.py",
        "orepa/cli.py",
    } <= expected
    found = {name for name in members(built[kind]) if ".dist-info/" not in name}
    compiled = {name for name in found if name.startswith("orepa_kernels/_C.")}
    assert len(compiled) == (kind == "wheel of sdist" and not missing_tools())
    assert found - compiled == expected | {"orepa_kernels/_build.json"}


def missing_tools() -> list[str]:
    """What this environment lacks for compiled kernels."""
    tools = [] if any(map(shutil.which, ("c++", "g++", "clang++"))) else ["a C++ compiler"]
    tools += [] if shutil.which("cmake") else ["cmake"]
    return tools + ([] if importlib.util.find_spec("pybind11") else ["pybind11"])


def test_without_a_compiler_it_installs_and_says_what_is_missing(built, tmp_path):
    zipfile.ZipFile(built["wheel"]).extractall(tmp_path / "site")
    code = "import json, orepa_kernels.info as i; print(json.dumps(i.collect()['backends']['cpu']))"
    # Without `site`, which would run the hooks of an editable install and find the compiled module of this tree.
    path = os.pathsep.join([str(tmp_path / "site"), sysconfig.get_path("purelib")])
    cpu = json.loads(run(sys.executable, "-S", "-c", code, cwd=tmp_path, PYTHONPATH=path))
    assert cpu["runs"] is False and "no C++ compiler was found" in cpu["reason"]


def test_a_compiler_that_fails_is_an_error_and_no_silent_fallback(built, tmp_path):
    if missing_tools():
        pytest.skip(f"this environment has no {', '.join(missing_tools())}")
    tree = copy_of_tree(tmp_path / "tree")
    (tree / "csrc" / "squeeze.h").write_text("#error planted\n")
    with pytest.raises(AssertionError, match="planted"):
        build(tree, tmp_path / "out", OREPA_CUDA="OFF")


def test_cuda_that_is_asked_for_and_cannot_be_had_is_an_error(built, tmp_path):
    if missing_tools():
        pytest.skip(f"this environment has no {', '.join(missing_tools())}")
    tree = copy_of_tree(tmp_path / "tree")
    with pytest.raises(AssertionError, match=r"OREPA_CUDA=ON, but no working nvcc|CMAKE_CUDA_COMPILER"):
        build(tree, tmp_path / "out", OREPA_CUDA="ON", CUDACXX=shutil.which("false") or "/bin/false")
    with pytest.raises(AssertionError, match="OREPA_CUDA must be AUTO, ON or OFF, got 'MAYBE'"):
        build(tree, tmp_path / "out2", OREPA_CUDA="maybe")
    with pytest.raises(AssertionError, match="OREPA_CUDA=ON, but no kernels can be compiled: no C\\+\\+ compiler"):
        build(tree, tmp_path / "out3", OREPA_CUDA="ON", PATH=str(tmp_path / "nothing"), CXX="")


def test_a_build_that_is_asked_otherwise_forgets_the_last_one(built, tmp_path):
    """CMake's cache would go on with what it was told then; asked alike, it builds only what has changed."""
    if missing_tools():
        pytest.skip(f"this environment has no {', '.join(missing_tools())}")
    tree, types = copy_of_tree(tmp_path / "tree"), []
    for number, arguments in enumerate(("-DCMAKE_BUILD_TYPE=Debug -DOREPA_MODULE=OFF", "-DOREPA_MODULE=OFF")):
        # No module is built, which saves the time; the cache is what counts.
        with pytest.raises(AssertionError, match="_C"):
            build(tree, tmp_path / str(number), OREPA_CUDA="OFF", CMAKE_ARGS=arguments)
        (cache,) = (tree / "build").glob("cmake-*/CMakeCache.txt")
        types += [
            line.partition("=")[2] for line in cache.read_text().splitlines() if line.startswith("CMAKE_BUILD_TYPE:")
        ]
        objects = cache.parent / "kept.o"
        assert not objects.exists()
        objects.touch()
    assert types == ["Debug", ""]
    with pytest.raises(AssertionError, match="_C"):
        build(tree, tmp_path / "alike", OREPA_CUDA="OFF", CMAKE_ARGS="-DOREPA_MODULE=OFF")
    assert objects.exists()


def test_compiled_module_needs_neither_torch_nor_cuda(built, tmp_path):
    names = [name for name in members(built["wheel of sdist"]) if name.startswith("orepa_kernels/_C.")]
    if not names:
        pytest.skip(f"built without {', '.join(missing_tools())}")
    zipfile.ZipFile(built["wheel of sdist"]).extract(names[0], tmp_path)
    code = f"""
import importlib.machinery, importlib.util
loader = importlib.machinery.ExtensionFileLoader("_C", {str(tmp_path / names[0])!r})
module = importlib.util.module_from_spec(importlib.util.spec_from_loader("_C", loader))
loader.exec_module(module)
print(module.cpu_instruction_set())
maps = open("/proc/self/maps").read()
assert not [name for name in ("libcuda", "libcudart", "libtorch", "libc10") if name in maps]
"""
    if not Path("/proc/self/maps").exists():
        pytest.skip("no /proc to look at")
    assert run(sys.executable, "-c", code).strip() in ("avx512", "avx2", "baseline")


def test_sdist_holds_the_sources_and_no_tests(built):
    found = members(built["sdist"])
    sources = {path.relative_to(ROOT).as_posix() for folder in PACKAGES.values() for path in folder.rglob("*.py")}
    native = {path.relative_to(ROOT).as_posix() for path in git_files() if ROOT / "csrc" in path.parents}
    project = {"pyproject.toml", "setup.py", "README.md", "LICENSE", "CHANGELOG.md"}
    assert sources | native | project <= found
    assert not [
        name for name in found if name.startswith(("tests/", "benchmarks/", "examples/", "python/guide/", ".ci/"))
    ]


@pytest.mark.parametrize("kind", ["wheel", "wheel of sdist"])
def test_wheel_metadata(built, kind):
    archive = zipfile.ZipFile(built[kind])
    (folder,) = {name.split("/")[0] for name in archive.namelist() if ".dist-info/" in name}
    metadata = email.message_from_bytes(archive.read(f"{folder}/METADATA"))
    assert metadata["Name"] == "orepa-kernels"
    assert metadata["Version"] == orepa_kernels.__version__ == orepa.__version__
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.10"
    requirements = [Requirement(line) for line in metadata.get_all("Requires-Dist")]
    assert {r.name for r in requirements if r.marker is None} == {"torch", "numpy"}
    assert {*metadata.get_all("Provides-Extra")} == {
        *("models", "train", "bench", "export", "examples", "docs", "test", "dev")
    }
    assert f"{folder}/licenses/LICENSE" in archive.namelist()
    entry_points = archive.read(f"{folder}/entry_points.txt").decode()
    assert entry_points.split() == ["[console_scripts]", "orepa", "=", "orepa.cli:main"]
