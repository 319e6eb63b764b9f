"""Whatever stops a run, nothing is lost: the resumed run equals the uninterrupted one, bit by bit."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from train_runs import (
    FOLDER,
    OUTPUTS,
    SMALL,
    Run,
    assert_same,
    assert_same_run,
    restless_trainer,
    steady,
    train,
    two_runs,
)

from orepa.errors import UserError
from orepa.train import files, loop
from orepa.train.distributed import full_state, load_optimizer
from orepa.train.files import load_checkpoint, write_atomically
from orepa.train.report import Events
from orepa.train.runtime import Stopped, StopRequest

pytest_plugins = ("train_runs",)
pytestmark = pytest.mark.usefixtures("small_and_quick")


# --- interruptions --------------------------------------------------------------------------------------------------------


DIE = """
import os, signal
from orepa.train import files, loop

def die():
    os.kill(os.getpid(), signal.SIGKILL)
"""
# Four steps are an epoch, and there is a checkpoint every three: at 3, 4, 6, 8, ...
IN_A_STEP = """
step = loop.Trainer._step
loop.Trainer._step = lambda self, *batch: die() if self.step == 7 else step(self, *batch)
"""
WHILE_WRITING = """
save = files.torch.save
def torn(content, file):
    if content.get("progress", {}).get("step") == 6:
        file.write(b"half a checkpoint")
        file.flush()
        die()
    save(content, file)
files.torch.save = torn
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs POSIX signals")
@pytest.mark.parametrize(("where", "saved"), [(IN_A_STEP, 6), (WHILE_WRITING, 4)], ids=["in a step", "while writing"])
@pytest.mark.usefixtures("only_training")
def test_kill_9_loses_nothing(where: str, saved: int, uninterrupted: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = Path("killed")
    died = Run(*SMALL, "--out", out, before=DIE + where)
    assert died.wait() == -signal.SIGKILL, died.err
    checkpoint = load_checkpoint(out / "checkpoint.pt")
    assert checkpoint["progress"]["step"] == saved

    assert train("--resume", "--out", out) == 0
    assert_same_run(uninterrupted, out)
    assert {entry.name for entry in out.iterdir()} == {"checkpoint.pt", "tensorboard"}
    assert "epoch   1/" not in capsys.readouterr().out, "it must not begin from the start"


@pytest.mark.skipif(os.name == "nt", reason="needs POSIX signals")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_from_outside_saves_and_tells_how_to_go_on(number: int, folder: Path) -> None:
    """To the whole process group, as a terminal or a batch system sends it: the data workers must not die of it first."""
    out = Path("a run").absolute()
    process = Run("--data", folder, *FOLDER, "--epochs", 5000, "--workers", 1, "--threads", 1, "--out", out)
    while "epoch   2/" not in process.out:
        assert process.running(), process.err
        time.sleep(0.05)
    process.send(number)
    assert process.wait() == 128 + number, process.err
    assert "nothing is lost" in process.err and f"orepa train --resume --out '{out}'" in process.err
    assert "Traceback" not in process.err
    assert load_checkpoint(out / "checkpoint.pt")["progress"]["step"] >= 6


@pytest.mark.skipif(os.name == "nt", reason="needs POSIX signals")
def test_two_processes_stop_at_the_same_step() -> None:
    """A signal that reaches one of them only stops both, and the checkpoint is whole."""
    interrupt = """
        import os, signal
        from orepa.train import loop

        step = loop.Trainer._step

        def interrupted(self, *batch):
            if self.step == 5 and os.environ["LOCAL_RANK"] == "1":
                signal.raise_signal(signal.SIGTERM)
            step(self, *batch)

        loop.Trainer._step = interrupted
    """
    one, other = two_runs(*SMALL, "--accelerator", "cpu", "--devices", 2, "--out", "two", before=interrupt)
    assert (one.wait(), other.wait()) == (143, 0), (
        one.err + other.err
    )  # any code but 0 would make launchers kill the first
    assert "orepa: stopped in epoch 2, step 6" in one.err and "--resume --out two --devices 2" in one.err
    assert one.out.count("epoch   1/3") == 1 and other.out == "", "only the first process speaks"
    progress = load_checkpoint(Path("two/checkpoint.pt"))["progress"]
    assert progress["step"] == 6 and progress["sums"][2] == 32, "two batches of 16, over both processes"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.usefixtures("only_training")
def test_a_signal_in_mid_epoch_and_bit_exact_resume(
    number: int, code: int, uninterrupted: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    step = loop.Trainer._step

    def interrupted(self: loop.Trainer, images: Tensor, labels: Tensor) -> None:
        if self.step == 4:
            signal.raise_signal(number)
        step(self, images, labels)

    with monkeypatch.context() as patch:
        patch.setattr(loop.Trainer, "_step", interrupted)
        assert train(*SMALL, "--out", "run") == code
    assert "orepa: stopped in epoch 2, step 5" in capsys.readouterr().err
    assert load_checkpoint(Path("run/checkpoint.pt"))["progress"]["batch"] == 1
    assert train("--resume", "--out", "run") == 0
    assert_same_run(uninterrupted, Path("run"))


def test_a_signal_while_the_loop_looks_around_is_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = restless_trainer(Path("run.pt"))
    most = trainer._all_reduce_max

    def interrupted(*values: float) -> list[Any]:
        agreed = most(*values)
        if trainer.step == 3:
            trainer.stop.number = signal.SIGTERM
        return agreed

    monkeypatch.setattr(trainer, "_all_reduce_max", interrupted)
    with pytest.raises(Stopped):
        trainer.run()
    assert trainer.step == 4


def test_a_second_ctrl_c_ends_at_once() -> None:
    with StopRequest() as stop:
        signal.raise_signal(signal.SIGINT)
        assert stop.number == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


EVERYTHING = {
    "ema": 0.6,
    "mixup": 0.4,
    "cutmix": 0.4,
    "label_smoothing": 0.1,
    "grad_accum": 2,
    "scale_weight_decay": True,
}


@pytest.mark.parametrize("settings", [{}, EVERYTHING], ids=["paper", "everything on"])
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("last", [1, 6, 8], ids=["first step", "mid-epoch", "before validation"])
def test_resume_is_exact_with_dropout_and_workers(last: int, workers: int, settings: dict[str, Any]) -> None:
    whole = restless_trainer(Path("whole.pt"), **settings)
    whole.run()
    assert whole.step == 3 * 4, "the incomplete batch is dropped"

    def request_stop(step: int, _loss: float) -> None:
        first.stop.number = signal.SIGTERM if step == last else 0

    first = restless_trainer(Path("parts.pt"), workers, request_stop, **settings)
    with pytest.raises(Stopped):
        first.run()
    first.loaders.close()
    torch.rand(5)
    second = restless_trainer(Path("parts.pt"), **settings)
    second.load(load_checkpoint(Path("parts.pt")))
    assert second.step == last
    assert (second.history, second.best) == (first.history, first.best)
    second.run()
    assert_same(whole.module.state_dict(), second.module.state_dict())
    if whole.ema is not None:
        assert second.ema is not None
        assert_same(whole.ema.module.state_dict(), second.ema.module.state_dict())
    assert steady(whole.history) == steady(second.history) and whole.best == second.best


def test_a_stop_during_validation_resumes_with_validation(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, trainer = restless_trainer(Path("whole.pt")), restless_trainer(Path("parts.pt"))
    whole.run()
    val = trainer.loaders.val

    def interrupted() -> Any:
        trainer.stop.number = signal.SIGTERM
        return val()

    monkeypatch.setattr(trainer.loaders, "val", interrupted)
    with pytest.raises(Stopped):
        trainer.run()
    assert (trainer.epoch, trainer.batch) == (0, 4)
    second = restless_trainer(Path("parts.pt"))
    second.load(load_checkpoint(Path("parts.pt")))
    second.run()
    assert_same(whole.module.state_dict(), second.module.state_dict())
    assert [record["val_loss"] for record in second.history] == [record["val_loss"] for record in whole.history]


@pytest.mark.parametrize("by_position", [False, True], ids=["by name", "by position, as older checkpoints"])
def test_the_optimizer_state_of_used_parameters_is_restored(by_position: bool) -> None:
    """Those without gradients have no state; neither saving nor loading may give them any, as torch's functions do."""

    def build() -> tuple[nn.ModuleDict, torch.optim.Optimizer]:
        model = nn.ModuleDict({"unused": nn.Linear(3, 4), "used": nn.Linear(3, 4)})
        return model, torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=0.1)

    model, optimizer = build()
    assert full_state(model, optimizer)[1] == {} and not optimizer.state
    model["used"](torch.randn(2, 3)).sum().backward()
    optimizer.step()
    saved = optimizer.state_dict() if by_position else full_state(model, optimizer)[1]
    other, restored = build()
    load_optimizer(other, restored, saved)
    assert_same(restored.state_dict(), optimizer.state_dict())
    assert len(restored.state) == 2


# --- checkpoints by the clock -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("minutes", "expected"), [(None, [0, 4, 8, 12]), (1.0, [0, 2, 4, 4, 6, 8, 8, 10, 12, 12])])
def test_a_checkpoint_every_few_minutes(
    minutes: float | None, expected: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a clock on which every step takes half a minute; and one before, one after validation."""
    trainer, saved = restless_trainer(Path("run.pt"), checkpoint_minutes=minutes), []
    save = trainer.save
    monkeypatch.setattr(loop.time, "monotonic", lambda: 30.0 * trainer.step)
    monkeypatch.setattr(trainer, "save", lambda: (saved.append(trainer.step), save()))
    trainer._saved_at = 0.0
    trainer.run()
    assert saved == expected


# --- a full disk --------------------------------------------------------------------------------------------------------------

FULL = """
import resource
from orepa.train import loop
step = loop.Trainer._step
def full(self, *batch):
    if self.step == 5:  # the next checkpoint is due after step 6; a limit on files is the nearest thing to a full disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    step(self, *batch)
loop.Trainer._step = full
"""


@pytest.mark.skipif(os.name == "nt", reason="needs POSIX limits")
def test_a_full_disk_is_told_and_loses_nothing(uninterrupted: Path) -> None:
    out = Path("full").absolute()
    ended = Run(*SMALL, "--out", out, before=FULL)
    assert ended.wait() == 2
    assert ended.err.splitlines() == [f"orepa: error: cannot write {out / 'checkpoint.pt'}: File too large"]
    assert {entry.name for entry in out.iterdir()} == {"checkpoint.pt", "tensorboard"}, "no temporary file is left"
    assert load_checkpoint(out / "checkpoint.pt")["progress"]["step"] == 4
    assert train("--resume", "--out", out) == 0
    assert_same_run(uninterrupted, out)
    assert {entry.name for entry in out.iterdir()} == OUTPUTS


def test_the_systems_reason_is_told_wherever_the_disk_was_full(tmp_path: Path) -> None:
    def write(_: object) -> None:
        try:
            raise OSError(28, "No space left on device")
        finally:
            raise RuntimeError(
                "unexpected pos 86848 vs 86744"
            )  # as torch.save does, depending on the size of the tensors

    with pytest.raises(UserError, match=r"cannot write .*: No space left on device"):
        write_atomically(tmp_path / "checkpoint.pt", write)
    assert not list(tmp_path.iterdir())


class FullDisk:
    """As a fabric whose TensorBoard log cannot be written."""

    def __init__(self) -> None:
        self.logger = self

    def log_dict(self, *_: Any) -> None:
        raise OSError(28, "No space left on device")

    finalize = log_dict


def test_the_run_goes_on_without_tensorboard(capsys: pytest.CaptureFixture[str]) -> None:
    before = threading.excepthook
    with Events(FullDisk()) as events:  # type: ignore[arg-type]
        events.log({"loss": 1.0}, 0)
        events.log({"loss": 1.0}, 1)
        writer = threading.Thread(target=FullDisk().log_dict)  # as TensorBoard's does
        writer.start()
        writer.join()
    assert threading.excepthook is before
    assert capsys.readouterr().err == "orepa: cannot write for TensorBoard any more: No space left on device\n"


# --- atomic files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("disk"), KeyboardInterrupt()])
def test_a_failed_write_leaves_the_old_file(error: BaseException, tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_atomically(path, lambda file: file.write(b"old"))

    def fail(file: Any) -> None:
        file.write(b"new, but")
        raise error

    with pytest.raises(KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else UserError):
        write_atomically(path, fail)
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_a_file_is_synced_before_it_takes_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(files.os, "fsync", lambda descriptor: (calls.append("fsync"), fsync(descriptor)))
    monkeypatch.setattr(files.os, "replace", lambda a, b: (calls.append("replace"), replace(a, b)))
    write_atomically(tmp_path / "file", lambda file: file.write(b"content"))
    assert calls[:2] == ["fsync", "replace"]
