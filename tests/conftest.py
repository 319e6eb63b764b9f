"""What every test can rely on: a fixed seed, no leftover settings, and no luck with uninitialised memory.

There is no ``tests/__init__.py`` on purpose: with one, pytest would put the repository's root on ``sys.path`` and the tests
could import the sources instead of what is installed.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

if "PYTEST_XDIST_WORKER" in os.environ:  # one of several: with a pool of threads each, they would wait for each other
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import hypothesis
import pytest
import torch

import orepa
import orepa_kernels

ROOT = Path(__file__).resolve().parent.parent

sys.path.append(
    str(ROOT / "benchmarks")
)  # whose scripts tests/bench imports; a second conftest.py would replace this one

# --- which package is under test ---------------------------------------------------------------------------------------


def pytest_report_header() -> list[str]:
    places = [Path(module.__file__).resolve().parent for module in (orepa_kernels, orepa)]
    return [
        f"torch {torch.__version__}, CUDA {'yes' if torch.cuda.is_available() else 'no'}, {torch.get_num_threads()} threads",
        *(f"{place.name} from {place.parent}" for place in places),
    ]


def pytest_configure(config: pytest.Config) -> None:
    if hasattr(config.option, "loadscopereorder"):  # pytest-xdist would begin with the files of the most tests
        config.option.loadscopereorder = False
    # `python -m pytest` puts the working directory first on the path, and orepa_kernels lies there. After a plain
    # `pip install .` the tests would so mix that source with the installed orepa, and never see compiled kernels.
    from_source = [ROOT in Path(module.__file__).resolve().parents for module in (orepa_kernels, orepa)]
    if from_source == [True, False]:
        raise pytest.UsageError(
            "orepa_kernels is imported from the source folder but orepa from the installed package: "
            'install with `pip install -e ".[test]"`, or run `pytest` instead of `python -m pytest`'
        )


# --- hypothesis ---------------------------------------------------------------------------------------------------------


class _TorchRandom:
    """Torch's generator as hypothesis wants one, so that a failing example draws the same tensors when it is replayed."""

    seed = staticmethod(torch.manual_seed)
    getstate = staticmethod(torch.get_rng_state)
    setstate = staticmethod(torch.set_rng_state)


_torch_random = _TorchRandom()  # hypothesis keeps a weak reference only
hypothesis.register_random(_torch_random)

# A first call may compile, import or start threads: deadlines would measure that.
hypothesis.settings.register_profile("dev", deadline=None)
hypothesis.settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.register_profile("thorough", deadline=None, max_examples=2000)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE") or ("ci" if os.environ.get("CI") else "dev"))


# --- devices ------------------------------------------------------------------------------------------------------------


# What takes longest, in this order: among several processes it must not begin last.
_LONG = (
    "test_docs.py",
    "test_train_distributed.py",
    "test_triton.py",
    "test_train_resume.py",
    "test_triton_aot.py",
    "test_timm_contract.py",
    "test_build.py",
    "test_train.py",
    "test_cpu_backend.py",
    "test_examples.py",
    "test_conv.py",
    "test_official_models.py",
    "test_models.py",
    "test_cuda_emulator.py",
    "test_merge.py",
    "test_prepare_regions.py",
    "test_prepare.py",
    "test_bench_step.py",
    "test_cli.py",
    "test_run_gpu.py",
    "test_training_budget.py",
    "test_bench_results.py",
    "test_export.py",
)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if "PYTEST_XDIST_WORKER" in os.environ:
        items.sort(key=lambda item: _LONG.index(item.path.name) if item.path.name in _LONG else len(_LONG))
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


# --- a clean start for each test ------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _fresh_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OREPA_BACKEND", "OREPA_AUTOTUNE", "OREPA_AUTOTUNE_CACHE"):
        monkeypatch.delenv(name, raising=False)
    torch.manual_seed(0)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Tensors so small gain nothing from more threads, and wait for them on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# --- small runs of `orepa train` --------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def training_extra() -> None:
    """Skips where the extra `train` is not installed."""
    for package in ("timm", "lightning", "sklearn", "tensorboard", "matplotlib", "tqdm", "torchvision"):
        pytest.importorskip(package, reason="training needs the extra `train`")


@pytest.fixture(scope="session")
def checkpoint(training_extra: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """That of a finished run, beside its other files; to be read only."""
    from orepa.cli import main
    from orepa.surgery import evaluation

    out = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation, "_ROUNDS", 1)
        small = ("--limit", "32", "--batch-size", "16", "--epochs", "1")
        assert main(["train", *small, "--out", str(out)]) == 0
    return out / "checkpoint.pt"


# --- poisoned memory ------------------------------------------------------------------------------------------------------

_POISONED_DTYPES = {
    torch.float64,
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.complex128,
    torch.complex64,
}


def _is_ours(module: str) -> bool:
    return module.partition(".")[0] in ("orepa", "orepa_kernels") or module.startswith("test_")


def _poisoned(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """``allocate``, whose result is NaN all over where this project or a test calls it.

    Torch's own calls, and compilation, see the original: poison there could only slow or confuse. So do integers and
    tensors without memory of their own.
    """

    @functools.wraps(allocate)
    def wrapper(*args: Any, **kwargs: Any) -> torch.Tensor:
        tensor = allocate(*args, **kwargs)
        if torch.compiler.is_compiling() or not _is_ours(sys._getframe(1).f_globals.get("__name__", "")):
            return tensor
        plain = type(tensor) is torch.Tensor and not tensor.is_meta and tensor.layout is torch.strided
        if plain and tensor.dtype in _POISONED_DTYPES:
            with torch.no_grad():
                tensor.fill_(float("nan"))
        return tensor

    return wrapper


_WRAPPERS = [
    (owner, name, _poisoned(getattr(owner, name)))
    for owner, names in (
        (torch, ("empty", "empty_like", "empty_strided", "empty_permuted")),
        (torch.Tensor, ("new_empty", "new_empty_strided")),
    )
    for name in names
]

# Torch keeps tables keyed by its functions, filled at first use: fill them now, with the originals.
with torch.device("meta"):
    torch.empty(0)
torch.jit._builtins._find_builtin(torch.empty)


@pytest.fixture(autouse=True)
def _poison_uninitialised_memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fill what `torch.empty` and its kin return with NaN, so that an output left unwritten cannot pass by luck."""
    with monkeypatch.context() as patch:
        for owner, name, wrapper in _WRAPPERS:
            patch.setattr(owner, name, wrapper)
        yield
