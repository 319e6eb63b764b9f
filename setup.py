"""The build's one programmable step: the compiled kernels, through CMake. Everything declarative is in pyproject.toml.

Neither torch nor a GPU is needed to build. What the machine lacks is left out and said, at build time and later by
``python -m orepa_kernels.info``: without nvcc the CUDA kernels, without a C++ compiler all compiled kernels. A compiler that is
there and fails is an error. Environment variables:

    OREPA_CUDA        AUTO (default), ON (fail without nvcc) or OFF
    OREPA_CUDA_ARCHS  such as "80-real;90" (default), in the notation of CMAKE_CUDA_ARCHITECTURES
    MAX_JOBS          compilers at once (default: as many as cores, and memory at 2 GB each, allow)
    CMAKE_ARGS        more arguments for CMake
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
REPORT = "_build.json"  # beside the module: why there is none


def find_nvcc() -> "str | None":
    """nvcc where users of CUDA keep it, or None."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    places = (os.environ.get("CUDACXX"), home and f"{home}/bin/nvcc", shutil.which("nvcc"), "/usr/local/cuda/bin/nvcc")
    return next((place for place in places if place and Path(place).is_file()), None)


def what_is_missing() -> str:
    """What compiled kernels cannot be built without, or an empty string."""
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


def jobs() -> str:
    """How many compilers may run at once."""
    asked = os.environ.get("MAX_JOBS", "")
    if asked:
        return asked
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    except (ValueError, OSError):
        return str(cores)
    return str(max(1, min(cores, memory // 2**31)))


def begin_anew_if_asked_otherwise(build: Path, *asked: object) -> None:
    """Remove what an earlier build left that was asked for something else, or in another place: CMake would remember that."""
    record, now = build / "asked.json", json.dumps(asked)
    if not record.is_file() or record.read_text() != now:
        shutil.rmtree(build, ignore_errors=True)
        build.mkdir(parents=True)
        record.write_text(now)


class CMakeBuild(build_ext):
    """Runs CMake, incrementally where an earlier build is left."""

    def build_extension(self, ext: Extension) -> None:
        """Build the module, or leave a report of why it could not be."""
        folder = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        folder.mkdir(parents=True, exist_ok=True)
        cuda = os.environ.get("OREPA_CUDA", "AUTO").upper()
        if cuda not in ("AUTO", "ON", "OFF"):
            raise SystemExit(f"OREPA_CUDA must be AUTO, ON or OFF, got {cuda!r}")
        missing = what_is_missing()
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
        more = shlex.split(os.environ.get("CMAKE_ARGS", ""))
        arguments += more
        begin_anew_if_asked_otherwise(build, str(build), nvcc, architectures, more)
        subprocess.run(["cmake", "-S", str(ROOT), "-B", str(build), *arguments], check=True)
        subprocess.run(["cmake", "--build", str(build), "--target", "_C", "--parallel", jobs()], check=True)

    def copy_extensions_to_source(self) -> None:
        """For editable installs: the report goes where the module goes."""
        super().copy_extensions_to_source()
        built = Path(self.build_lib) / "orepa_kernels" / REPORT
        if built.is_file():
            self.copy_file(str(built), str(ROOT / "orepa_kernels" / REPORT))


setup(ext_modules=[Extension("orepa_kernels._C", [], optional=True)], cmdclass={"build_ext": CMakeBuild})
