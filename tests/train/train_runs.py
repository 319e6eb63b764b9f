"""Small runs of `orepa train`, and what the tests of training share: a pytest plugin that they name in `pytest_plugins`.

PYTEST_DONT_REWRITE: the tests import it before pytest loads it as a plugin, too late for its assertions to be rewritten.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import sys
import tempfile
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

timm = pytest.importorskip("timm", reason="training needs the extra `train`")
lightning = pytest.importorskip("lightning.fabric", reason="training needs the extra `train`")
torchvision = pytest.importorskip("torchvision", reason="training needs the extra `train`")
for package in ("sklearn", "tensorboard", "matplotlib", "tqdm"):
    pytest.importorskip(package, reason="training needs the extra `train`")

import sync_norm  # noqa: E402, F401
from PIL import Image  # noqa: E402

from orepa.cli import main  # noqa: E402
from orepa.surgery import evaluation  # noqa: E402
from orepa.train import loop, run  # noqa: E402
from orepa.train.config import Config  # noqa: E402
from orepa.train.data import Loaders  # noqa: E402
from orepa.train.files import load_checkpoint  # noqa: E402
from orepa.train.images import load_digits  # noqa: E402
from orepa.train.runtime import StopRequest  # noqa: E402

# 4 steps per epoch
SMALL = ("--limit", "64", "--batch-size", "16", "--epochs", "3", "--checkpoint-every", "3")
OUTPUTS = {"checkpoint.pt", "deploy.pt", "curves.png", "metrics.json", "tensorboard"}
FOLDER = ("--img-size", "32", "--epochs", "2", "--batch-size", "8", "--lr", "0.05", "--workers", "0")
VOLATILE = ("seconds", "images_per_second", "peak_memory_mb")  # of a record: what the machine was like


@pytest.fixture
def default_sigint() -> Iterator[None]:
    """SIGINT as in a terminal, in this process and its children: started by ``nohup`` or with ``&``, pytest ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def small_and_quick(one_thread: None, default_sigint: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """One thread, short timings, and an empty working directory."""
    monkeypatch.setattr(evaluation, "_ROUNDS", 2)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def only_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs end with their last checkpoint: what is compared is how they were trained."""
    monkeypatch.setattr(run, "_evaluate", lambda *_: None)


def train(*arguments: object) -> int:
    return main(["train", *map(str, arguments)])


# --- other processes ------------------------------------------------------------------------------------------------------

_FORKS = multiprocessing.get_context("forkserver" if hasattr(os, "fork") else "spawn")
_FORKS.set_forkserver_preload([__name__])


class Run:
    """`orepa train` in a process and a session of its own, after ``before``, which is Python; what it prints is in files.

    It is forked from a server that has imported everything, and computed nothing: imports take longer than the tiny runs.
    """

    def __init__(self, *arguments: object, before: str = "", **environment: object) -> None:
        folder = Path(tempfile.mkdtemp(dir="."))
        self._files = [(folder / name).absolute() for name in ("out", "err")]
        for file in self._files:
            file.touch()
        variables = {**os.environ, "OMP_NUM_THREADS": "1", **{name: str(value) for name, value in environment.items()}}
        command = ["train", *map(str, arguments)]
        self._process = _FORKS.Process(
            target=_run, args=(self._files, variables, os.getcwd(), textwrap.dedent(before), command)
        )
        self._process.start()

    def send(self, number: int) -> None:
        """Send a signal to the whole session."""
        assert self._process.pid is not None
        os.killpg(self._process.pid, number)

    def running(self) -> bool:
        return self._process.is_alive()

    def wait(self) -> int:
        """Return the exit code; of a process that a signal ended, the negative number."""
        self._process.join(120)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        assert self._process.exitcode is not None
        return self._process.exitcode

    @property
    def out(self) -> str:
        return self._files[0].read_text()

    @property
    def err(self) -> str:
        return self._files[1].read_text()


def two_runs(*arguments: object, before: str = "") -> list[Run]:
    """Two processes of one `orepa train`, as torchrun starts them."""
    job = {"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "GROUP_RANK": 0}
    job |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    return [Run(*arguments, before=before, RANK=rank, LOCAL_RANK=rank, **job) for rank in range(2)]


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def _run(files: list[Path], variables: dict[str, str], place: str, before: str, command: list[str]) -> None:
    if hasattr(os, "setsid"):
        os.setsid()
    multiprocessing.set_start_method(None, force=True)  # that of a program, for its data workers
    for stream, file in zip((sys.stdout, sys.stderr), files, strict=True):
        os.dup2(os.open(file, os.O_WRONLY | os.O_APPEND), stream.fileno())
        stream.reconfigure(line_buffering=True)
    os.environ.clear()
    os.environ.update(variables)
    os.chdir(place)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    torch.set_num_threads(1)
    exec(before, {})
    sys.exit(main(command))


def stop_and_resume(monkeypatch: pytest.MonkeyPatch, at: int, *arguments: object) -> None:
    """A run in ``parts``, stopped by SIGTERM at a step, in a worker process's company, and continued without."""
    step = loop.Trainer._step

    def interrupted(self: loop.Trainer, images: Tensor, labels: Tensor) -> None:
        if self.step == at:
            signal.raise_signal(signal.SIGTERM)
        step(self, images, labels)

    with monkeypatch.context() as patch:
        patch.setattr(loop.Trainer, "_step", interrupted)
        assert train(*arguments, "--workers", 1, "--out", "parts") == 143
    assert load_checkpoint(Path("parts/checkpoint.pt"))["progress"]["batch"] > 0  # within an epoch
    assert train("--resume", "--out", "parts", "--workers", 0) == 0


def assert_same_run(one: Path, other: Path) -> None:
    """Two checkpoints hold the same training, bit by bit; only the time it took may differ."""
    a, b = load_checkpoint(one / "checkpoint.pt"), load_checkpoint(other / "checkpoint.pt")
    assert_same(a["model"], b["model"])
    assert_same(a["optimizer"], b["optimizer"])
    assert_same(a.get("ema"), b.get("ema"))
    for progress in (a["progress"], b["progress"]):
        progress["history"] = steady(progress["history"])
        del progress["seconds"]
    assert a["progress"] == b["progress"]
    assert a["config"] == b["config"]


def steady(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The records of a run without what the machine was like."""
    return [{name: value for name, value in record.items() if name not in VOLATILE} for record in history]


def assert_same(a: Any, b: Any) -> None:
    if isinstance(a, Tensor):
        assert a.dtype == b.dtype and torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, list):
        assert len(a) == len(b)
        for left, right in zip(a, b, strict=True):
            assert_same(left, right)
    else:
        assert a == b


@pytest.fixture(scope="session")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that every interrupted one has to equal."""
    out = tmp_path_factory.mktemp("uninterrupted")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation, "_ROUNDS", 2)
        assert train(*SMALL, "--out", out) == 0
    return out


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two colours as two classes, a little noise on top."""
    generator = torch.Generator().manual_seed(0)
    for split, count in (("train", 12), ("validation", 4)):
        for label, colour in (("green", (40, 200, 40)), ("red", (200, 40, 40))):
            place = tmp_path / "images" / split / label
            place.mkdir(parents=True)
            for i in range(count):
                noise = torch.randint(-30, 30, (40, 48, 3), generator=generator)
                pixels = (torch.tensor(colour) + noise).clamp(0, 255).to(torch.uint8)
                Image.fromarray(pixels.numpy()).save(place / f"{i}.png")
    return tmp_path / "images"


class Restless(nn.Module):
    """Everything that could make a resumed run differ: batch statistics, dropout, momentum."""

    def __init__(self) -> None:
        super().__init__()
        layers = (nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5), nn.Flatten(), nn.LazyLinear(10))
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def restless_trainer(
    path: Path,
    workers: int = 0,
    on_step: Callable[[int, float], None] = lambda step, loss: None,
    model: nn.Module | None = None,
    checkpoint_minutes: float | None = None,
    **settings: Any,
) -> loop.Trainer:
    """Three epochs of four steps on a tiny network, with any fields of `Config`."""
    config = Config(img_size=8, epochs=3, batch_size=8, warmup_epochs=1, limit=35, **settings)
    fabric = lightning.Fabric(accelerator="cpu", devices=1)
    torch.manual_seed(3)
    if model is None:
        model = Restless()
        model(torch.zeros(2, 1, 8, 8))
    stop, loaders = StopRequest(), Loaders(load_digits(8, 35), config, workers)
    about = {"model_spec": {}, "data": {}, "environment": {}}
    return loop.Trainer(
        fabric, config, model, loaders, path, about, stop, 1000, on_step, checkpoint_minutes=checkpoint_minutes
    )
