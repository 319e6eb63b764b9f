"""Build the compiled kernels with CMake. Everything declarative is in pyproject.toml.

The build needs neither torch nor a GPU. Without nvcc it leaves out the CUDA kernels, without a C++ compiler all compiled
kernels. It prints the reason, and ``python -m orepa_kernels.info`` shows it later. A compiler that exists but fails is an
error. Environment variables:

    OREPA_CUDA        AUTO (default), ON (fail without nvcc) or OFF
    OREPA_CUDA_ARCHS  such as "80-real;90" (default), in the notation of CMAKE_CUDA_ARCHITECTURES
    MAX_JOBS          number of parallel compilers (default: one per core, with 2 GB of free memory each)
    CMAKE_ARGS        further arguments for CMake
"""

import importlib.util
import json
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
REPORT = "_build.json"  # beside the module: what was missing to build it


def find_nvcc() -> "str | None":
    """Return the path of nvcc from CUDACXX, CUDA_HOME, CUDA_PATH, PATH or /usr/local/cuda, or None."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    candidates = (
        os.environ.get("CUDACXX"),
        home and f"{home}/bin/nvcc",
        shutil.which("nvcc"),
        "/usr/local/cuda/bin/nvcc",
    )
    return next((path for path in candidates if path and Path(path).is_file()), None)


def missing_requirement() -> str:
    """Return why compiled kernels cannot be built here, or an empty string."""
    if sys.platform == "win32":
        return "the compiled kernels are not ported to Windows"
    compiler = shlex.split(os.environ.get("CXX", "")) or ["c++"]
    if not any(shutil.which(name) for name in (compiler[0], "c++", "g++", "clang++")):
        return "no C++ compiler was found (looked at CXX, c++, g++, clang++)"
    if not shutil.which("cmake"):
        return "cmake was not found"
    if importlib.util.find_spec("pybind11") is None:
        return "pybind11 was not found"
    return ""


def parallel_jobs() -> str:
    """Return the number of parallel compilers."""
    requested = os.environ.get("MAX_JOBS", "")
    if requested:
        return requested
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    except (ValueError, OSError):
        return str(cores)
    return str(max(1, min(cores, memory // 2**31)))


def remove_stale_build(build: Path, *options: object) -> None:
    """Delete a build folder that was configured with other options: CMake's cache would bring them back."""
    record, current = build / "options.json", json.dumps(options)
    if not record.is_file() or record.read_text() != current:
        shutil.rmtree(build, ignore_errors=True)
        build.mkdir(parents=True)
        record.write_text(current)


class CMakeBuild(build_ext):
    """Runs CMake, incrementally if the last build had the same options."""

    def build_extension(self, ext: Extension) -> None:
        """Build the module, or report what is missing."""
        folder = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        folder.mkdir(parents=True, exist_ok=True)
        cuda = os.environ.get("OREPA_CUDA", "AUTO").upper()
        if cuda not in ("AUTO", "ON", "OFF"):
            raise SystemExit(f"OREPA_CUDA must be AUTO, ON or OFF, got {cuda!r}")
        missing = missing_requirement()
        if missing and cuda == "ON":
            raise SystemExit(f"OREPA_CUDA=ON, but no kernels can be compiled: {missing}")
        (folder / REPORT).write_text(json.dumps({"missing": missing}) + "\n")
        if missing:
            print(f"WARNING: the compiled kernels are left out: {missing}", file=sys.stderr)
            return
        import pybind11

        build = ROOT / "build" / f"cmake-{sysconfig.get_config_var('SOABI')}-{cuda.lower()}"
        arguments = [
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={folder}",
            f"-DOREPA_CUDA={cuda}",
        ]
        nvcc = find_nvcc()
        if nvcc and cuda != "OFF":
            arguments.append(f"-DCMAKE_CUDA_COMPILER={nvcc}")
        architectures = os.environ.get("OREPA_CUDA_ARCHS", "").replace(",", ";").replace(" ", ";")
        if architectures:
            arguments.append(f"-DOREPA_CUDA_ARCHS={architectures}")
        ninja = shutil.which("ninja")
        if ninja:
            arguments += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
        extra = shlex.split(os.environ.get("CMAKE_ARGS", ""))
        arguments += extra
        remove_stale_build(build, str(build), nvcc, architectures, extra)
        subprocess.run(["cmake", "-S", str(ROOT), "-B", str(build), *arguments], check=True)
        subprocess.run(["cmake", "--build", str(build), "--target", "_C", "--parallel", parallel_jobs()], check=True)

    def copy_extensions_to_source(self) -> None:
        """Copy the report along with the module for editable installs."""
        super().copy_extensions_to_source()
        report = Path(self.build_lib) / "orepa_kernels" / REPORT
        if report.is_file():
            self.copy_file(str(report), str(ROOT / "orepa_kernels" / REPORT))


setup(ext_modules=[Extension("orepa_kernels._C", [], optional=True)], cmdclass={"build_ext": CMakeBuild})
