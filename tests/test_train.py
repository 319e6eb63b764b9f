"""`orepa train`: the whole job, and that nothing is lost whatever stops it."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

timm = pytest.importorskip("timm", reason="training needs the extra `train`")
lightning = pytest.importorskip("lightning.fabric", reason="training needs the extra `train`")
for package in ("sklearn", "tensorboard", "matplotlib", "tqdm", "torchvision"):
    pytest.importorskip(package, reason="training needs the extra `train`")

from PIL import Image  # noqa: E402

import orepa  # noqa: E402
from orepa.cli import main  # noqa: E402
from orepa.training import files, loop, outcome, run  # noqa: E402
from orepa.training.config import Config  # noqa: E402
from orepa.training.data import EpochOrder, Images, Loaders  # noqa: E402
from orepa.training.digits import load_digits  # noqa: E402
from orepa.training.errors import UserError  # noqa: E402
from orepa.training.export import save_deployed  # noqa: E402
from orepa.training.files import load_checkpoint, write_atomically  # noqa: E402
from orepa.training.model import create, from_checkpoint, without_weight_decay  # noqa: E402
from orepa.training.signals import Stopped, StopRequest  # noqa: E402

# 4 steps per epoch
SMALL = ("--limit", "64", "--batch-size", "16", "--epochs", "3", "--checkpoint-every", "3")
OUTPUTS = {"checkpoint.pt", "deploy.pt", "curves.png", "metrics.json", "tensorboard"}


@pytest.fixture(autouse=True)
def _small_and_quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setattr(outcome, "_ROUNDS", 2)
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # such small tensors gain nothing from more, and wait for them on a busy machine
    yield
    torch.set_num_threads(threads)


def train(*arguments: object) -> int:
    return main(["train", *map(str, arguments)])


def assert_same_run(one: Path, other: Path) -> None:
    """Two checkpoints hold the same training, bit by bit; only the time it took may differ."""
    a, b = load_checkpoint(one / "checkpoint.pt"), load_checkpoint(other / "checkpoint.pt")
    assert_same(a["model"], b["model"])
    assert_same(a["optimizer"], b["optimizer"])
    for progress in (a["progress"], b["progress"]):
        for record in (progress, *progress["history"]):
            record.pop("seconds")
    assert a["progress"] == b["progress"]
    assert a["config"] == b["config"]


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


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that every interrupted one has to equal."""
    out = tmp_path_factory.mktemp("uninterrupted")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(outcome, "_ROUNDS", 2)
        assert train(*SMALL, "--out", out) == 0
    return out


# --- the whole job --------------------------------------------------------------------------------------------------------


def test_the_default_job_end_to_end(capsys: pytest.CaptureFixture[str]) -> None:
    assert train("--limit", 300, "--epochs", 5, "--warmup-epochs", 1, "--batch-size", 32) == 0
    printed, out = capsys.readouterr().out, Path("runs/test_resnet-orepa")
    assert {entry.name for entry in out.iterdir()} == OUTPUTS
    assert Image.open(out / "curves.png").size[0] > 500
    assert any((out / "tensorboard").iterdir())

    metrics = json.loads((out / "metrics.json").read_text())
    assert [record["epoch"] for record in metrics["history"]] == [1, 2, 3, 4, 5]
    assert metrics["history"][-1]["train_loss"] < 0.5 * metrics["history"][0]["train_loss"]
    trained, converted, folded = (metrics["outcome"][name] for name in ("trained", "converted", "folded"))
    assert trained["accuracy"] > 0.5, "ten classes: 0.1 is chance"
    assert trained["correct"] == converted["correct"] == folded["correct"]
    assert trained["correct"] == metrics["history"][-1]["val_correct"]
    assert 0 < converted["max_difference"] < 1e-4 * metrics["outcome"]["largest_logit"]
    assert trained["parameters"] > 2 * converted["parameters"]
    assert min(form["inference_ms"] for form in (trained, converted, folded)) > 0
    assert metrics["config"]["model"] == "test_resnet" and metrics["environment"]["packages"]["torch"]

    accuracy = f"{100 * trained['accuracy']:.2f}%"
    line = next(line for line in printed.splitlines() if line.startswith("validation accuracy"))
    assert line.split()[2:] == [accuracy] * 3
    assert "changed no prediction" in printed and f"{converted['parameters']:,}" in printed


def test_the_deployed_weights_fit_timms_own_model(uninterrupted: Path) -> None:
    deployed = torch.load(uninterrupted / "deploy.pt", weights_only=True)
    plain = timm.create_model(deployed["model"], **deployed["model_kwargs"])
    plain.load_state_dict(deployed["state_dict"], strict=True)
    trained = from_checkpoint(load_checkpoint(uninterrupted / "checkpoint.pt"))
    assert not any(isinstance(module, orepa.OREPAConv) for module in plain.modules())
    assert any(isinstance(module, orepa.OREPAConv) for module in trained.modules())
    x = torch.randn(5, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, got = trained(x), plain.eval()(x)
        untrained = timm.create_model(deployed["model"], **deployed["model_kwargs"]).eval()(x)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    assert (untrained - expected).norm() > 0.1 * expected.norm(), "the comparison must be able to fail"
    assert deployed["classes"] == [str(i) for i in range(10)] and deployed["preprocessing"]["mean"]


def test_the_plain_twin() -> None:
    assert train(*SMALL, "--no-orepa") == 0
    checkpoint = load_checkpoint(Path("runs/test_resnet-plain/checkpoint.pt"))
    assert (
        checkpoint["model"].keys() == timm.create_model("test_resnet", num_classes=10, in_chans=1).state_dict().keys()
    )
    form = json.loads(Path("runs/test_resnet-plain/metrics.json").read_text())["outcome"]
    assert form["trained"]["parameters"] == form["converted"]["parameters"]
    assert form["trained"]["correct"] == form["converted"]["correct"]


def test_preserve_starts_from_the_plain_function() -> None:
    arguments = {"num_classes": 10, "in_chans": 1}
    models = []
    for options in (
        {"orepa": False, "preserve": False},
        {"orepa": True, "preserve": True},
        {"orepa": True, "preserve": False},
    ):
        torch.manual_seed(0)
        models.append(create("test_resnet", arguments, 32, **options).eval())
    x = torch.randn(2, 1, 32, 32)
    plain, preserved, drawn = (model(x) for model in models)
    torch.testing.assert_close(preserved, plain, rtol=1e-4, atol=1e-5)
    assert (drawn - plain).abs().max() > 1e-2


def test_reduced_precision() -> None:
    assert train("--limit", 32, "--batch-size", 16, "--epochs", 1, "--precision", "bf16-mixed", "--preserve") == 0
    assert {entry.name for entry in Path("runs/test_resnet-orepa").iterdir()} == OUTPUTS


# --- determinism ----------------------------------------------------------------------------------------------------------


def test_same_seed_same_bits(uninterrupted: Path) -> None:
    torch.rand(7)  # what happened before must not matter
    assert train(*SMALL, "--out", "again") == 0
    assert_same_run(uninterrupted, Path("again"))


def test_another_seed_gives_other_weights(uninterrupted: Path) -> None:
    assert train(*SMALL, "--seed", 1, "--out", "other") == 0
    with pytest.raises(AssertionError):
        assert_same_run(uninterrupted, Path("other"))


def test_no_setting_leaks_out_of_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    threads = torch.get_num_threads()
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    monkeypatch.setattr(loop.Trainer, "_train_epoch", lambda *_: pytest.fail("stop here"))
    with pytest.raises(pytest.fail.Exception):
        train(*SMALL, "--threads", threads + 1)
    assert torch.get_num_threads() == threads
    assert not torch.are_deterministic_algorithms_enabled()
    assert handlers == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]


# --- interruptions --------------------------------------------------------------------------------------------------------


def killed(where: str, out: Path) -> subprocess.CompletedProcess[str]:
    """Train in another process that kills itself, as `kill -9` does, at a given place."""
    script = f"""
        import os, signal, sys
        from orepa.cli import main
        from orepa.training import files, loop

        def die():
            os.kill(os.getpid(), signal.SIGKILL)

        {textwrap.indent(textwrap.dedent(where), " " * 8).strip()}
        sys.exit(main(["train", "--out", sys.argv[1], *{list(SMALL)!r}]))
    """
    command = [sys.executable, "-c", textwrap.dedent(script), str(out)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


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
def test_kill_9_loses_nothing(where: str, saved: int, uninterrupted: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = Path("killed").absolute()
    died = killed(where, out)
    assert died.returncode == -signal.SIGKILL, died.stderr
    checkpoint = load_checkpoint(out / "checkpoint.pt")
    assert checkpoint["progress"]["step"] == saved
    assert not (out / "deploy.pt").exists()

    assert train("--resume", "--out", out) == 0
    assert_same_run(uninterrupted, out)
    assert {entry.name for entry in out.iterdir()} == OUTPUTS
    assert "epoch   1/" not in capsys.readouterr().out, "it must not begin from the start"


@pytest.mark.skipif(os.name == "nt", reason="needs POSIX signals")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_from_outside_saves_and_tells_how_to_go_on(number: int, folder: Path) -> None:
    """To the whole process group, as a terminal or a batch system sends it: the data workers must not die of it first."""
    out = Path("a run").absolute()
    options = [
        "--data",
        str(folder),
        *FOLDER,
        "--epochs",
        "5000",
        "--workers",
        "1",
        "--threads",
        "1",
        "--out",
        str(out),
    ]
    command = [sys.executable, "-u", "-m", "orepa", "train", *options]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes, start_new_session=True) as process:
        assert process.stdout is not None
        assert any(line.startswith("epoch   2/") for line in process.stdout)
        os.killpg(process.pid, number)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + number, errors
    assert "nothing is lost" in errors and f"orepa train --resume --out '{out}'" in errors
    assert "Traceback" not in errors
    assert load_checkpoint(out / "checkpoint.pt")["progress"]["step"] >= 6


@pytest.mark.skipif(os.name == "nt", reason="needs POSIX signals")
def test_two_processes_stop_at_the_same_step(tmp_path: Path) -> None:
    """A signal that reaches one of them only stops both, and the checkpoint is whole."""
    script = tmp_path / "main.py"
    script.write_text(
        textwrap.dedent("""
            import os, signal, sys
            from orepa.cli import main
            from orepa.training import loop

            step = loop.Trainer._step

            def interrupted(self, *batch):
                if self.step == 5 and os.environ["LOCAL_RANK"] == "1":
                    signal.raise_signal(signal.SIGTERM)
                step(self, *batch)

            loop.Trainer._step = interrupted
            sys.exit(main())
        """)
    )
    two = ("--accelerator", "cpu", "--devices", "2", "--out", "two")
    done = subprocess.run(
        [sys.executable, str(script), "train", *SMALL, *two], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 143, done.stderr
    assert "orepa: stopped in epoch 2, step 6" in done.stderr and "--resume --out two --devices 2" in done.stderr
    assert done.stdout.count("epoch   1/3") == 1, "only the first process speaks"
    progress = load_checkpoint(Path("two/checkpoint.pt"))["progress"]
    assert progress["step"] == 6 and progress["sums"][2] == 32, "two batches of 16, over both processes"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
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


def test_a_second_ctrl_c_ends_at_once() -> None:
    with StopRequest() as stop:
        signal.raise_signal(signal.SIGINT)
        assert stop.number == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


class Restless(nn.Module):
    """Everything that could make a resumed run differ: batch statistics, dropout, momentum."""

    def __init__(self) -> None:
        super().__init__()
        layers = (nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5), nn.Flatten(), nn.LazyLinear(10))
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def restless_trainer(path: Path, workers: int = 0, on_step: Callable[[int, float], None] | None = None) -> loop.Trainer:
    config = Config(data="digits", img_size=8, epochs=3, batch_size=8, warmup_epochs=1, limit=35)
    fabric = lightning.Fabric(accelerator="cpu", devices=1)
    torch.manual_seed(3)
    model = Restless()
    model(torch.zeros(2, 1, 8, 8))
    stop, loaders = StopRequest(), Loaders(load_digits(8, 35), config, workers)
    about = {"model_spec": {}, "data": {}, "environment": {}}
    hook = on_step or (lambda step, loss: None)
    return loop.Trainer(fabric, config, model, loaders, path, about, stop, 1000, hook)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("last", [1, 6, 8], ids=["first step", "mid-epoch", "before validation"])
def test_resume_is_exact_with_dropout_and_workers(last: int, workers: int) -> None:
    whole = restless_trainer(Path("whole.pt"))
    whole.run()
    assert whole.step == 3 * 4, "the incomplete batch is dropped"

    def request_stop(step: int, _loss: float) -> None:
        first.stop.number = signal.SIGTERM if step == last else 0

    first = restless_trainer(Path("parts.pt"), workers, request_stop)
    with pytest.raises(Stopped):
        first.run()
    first.loaders.close()
    torch.rand(5)
    second = restless_trainer(Path("parts.pt"))
    second.load(load_checkpoint(Path("parts.pt")))
    assert second.step == last
    assert (second.history, second.best) == (first.history, first.best)
    second.run()
    assert_same(whole.module.state_dict(), second.module.state_dict())
    a, b = ([{k: v for k, v in r.items() if k != "seconds"} for r in t.history] for t in (whole, second))
    assert a == b and whole.best == second.best


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


# --- the order of the data --------------------------------------------------------------------------------------------------


def test_the_order_is_a_function_of_seed_and_epoch() -> None:
    def order(seed: int = 0, epoch: int = 0, first: int = 0, **ranks: int) -> list[list[tuple[int, int]]]:
        sampler = EpochOrder(23, 5, seed, **ranks)
        sampler.epoch, sampler.first = epoch, first
        return list(sampler)

    assert order() == order() and len(order()) == 4
    assert len({key for batch in order() for key in batch}) == 20
    assert order(epoch=1)[0] != order()[0] and order(seed=1)[0] != order()[0]
    assert order(first=2) == order()[2:]
    shares = [order(rank=rank, world_size=2) for rank in range(2)]
    assert [sorted(a + b) for a, b in zip(*shares, strict=True)] == [sorted(batch) for batch in order()]


def test_workers_end_though_they_ignore_signals() -> None:
    loaders = Loaders(load_digits(8, 35), Config(img_size=8, batch_size=8), workers=1)
    batches = loaders.train(0)
    next(batches)
    (worker,) = loaders._train._iterator._workers  # type: ignore[union-attr]
    worker.terminate()
    worker.join(0.3)
    assert worker.is_alive()
    loaders.close()
    worker.join(5)
    assert not worker.is_alive()


def test_augmentation_is_a_function_of_seed_epoch_and_image() -> None:
    data = load_digits(16)
    images = Images(data.train, data.augment, seed=0)
    first = images[(0, 5)][0]
    torch.rand(3)
    assert torch.equal(first, images[(0, 5)][0])
    assert not torch.equal(first, images[(1, 5)][0])
    assert not torch.equal(first, Images(data.train, data.augment, seed=1)[(0, 5)][0])


def test_the_digits_are_split_once_and_for_all() -> None:
    data = load_digits(8)
    assert (len(data.train), len(data.val)) == (1437, 360)
    held_out = {data.val.load(i)[0].tobytes() for i in range(len(data.val))}
    assert not held_out & {data.train.load(i)[0].tobytes() for i in range(len(data.train))}
    counts = torch.bincount(torch.tensor([data.val.load(i)[1] for i in range(len(data.val))]))
    assert counts.min() >= 34 and counts.max() <= 38, "stratified"


# --- the recipe -----------------------------------------------------------------------------------------------------------


def test_no_weight_decay_on_norms_biases_and_scalings() -> None:
    model = create("test_resnet", {"num_classes": 10, "in_chans": 1}, 32, orepa=True, preserve=False)
    trainer = restless_trainer(Path("unused.pt"))  # only for its loaders
    config = Config(img_size=32, epochs=3, warmup_epochs=1)
    fabric, about = lightning.Fabric(accelerator="cpu", devices=1), {"model_spec": {}, "data": {}, "environment": {}}
    prepared = loop.Trainer(fabric, config, model, trainer.loaders, Path("unused.pt"), about, StopRequest(), 1000)
    decay = {id(p): group["weight_decay"] for group in prepared._optimizer.param_groups for p in group["params"]}
    names = {name: decay[id(p)] for name, p in model.named_parameters()}
    assert len(names) == len(decay)
    spared = {name for name, value in names.items() if value == 0}
    scalings = set(without_weight_decay(model))
    assert len(scalings) == 15 and scalings <= spared
    assert {"bn1.weight", "bn1.bias", "fc.bias"} <= spared
    assert names["fc.weight"] == names["conv1.0.origin_weight"] == names["layer4.0.conv1.dws_depthwise"] == 1e-4
    group = prepared._optimizer.param_groups[0]
    assert type(prepared._optimizer) is torch.optim.SGD and group["momentum"] == 0.9 and not group["nesterov"]


def test_the_warm_up_lasts_epochs_and_the_cosine_ends_near_zero() -> None:
    rates: list[float] = []
    trainer = restless_trainer(Path("run.pt"), on_step=lambda *_: rates.append(trainer._learning_rate()))
    trainer.run()
    assert len(rates) == 12
    torch.testing.assert_close(rates[:5], [0.001 + 0.099 * t / 4 for t in range(4)] + [0.1])  # 1 epoch is 4 steps
    expected = [0.05 * (1 + math.cos(math.pi * t / 8)) for t in range(8)]
    torch.testing.assert_close(rates[4:], expected)


# --- image folders --------------------------------------------------------------------------------------------------------


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


FOLDER = ("--img-size", "32", "--epochs", "2", "--batch-size", "8", "--lr", "0.05", "--workers", "0")


def test_an_image_folder(folder: Path) -> None:
    assert train("--data", folder, *FOLDER, "--out", "run") == 0
    metrics = json.loads(Path("run/metrics.json").read_text())
    assert metrics["data"]["train_images"] == 24 and metrics["data"]["val_images"] == 8
    deployed = torch.load("run/deploy.pt", weights_only=True)
    assert deployed["classes"] == ["green", "red"] and deployed["model_kwargs"] == {"num_classes": 2, "in_chans": 3}
    (folder / "train" / "red" / "0.png").unlink()
    assert train("--resume", "--out", "run") == 2, "the images have changed"


def test_workers_do_not_change_the_result(folder: Path) -> None:
    assert train("--data", folder, *FOLDER, "--out", "here") == 0
    assert train("--data", folder, *FOLDER, "--workers", 2, "--out", "there") == 0
    assert_same_run(Path("here"), Path("there"))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_image_is_named_and_can_be_mended(
    folder: Path, workers: int, capsys: pytest.CaptureFixture[str]
) -> None:
    victim = folder / "train" / "red" / "3.png"
    whole = victim.read_bytes()
    victim.write_bytes(whole[:200])
    run_it = ("--data", folder, *FOLDER, "--workers", workers, "--out", "run")
    assert train(*run_it) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("orepa: error: cannot read the image") and str(victim) in error and "\n" not in error
    victim.write_bytes(whole)
    assert train("--resume", "--out", "run", "--workers", workers) == 0


def break_missing(root: Path) -> str:
    root.rename(root.with_name("elsewhere"))
    return "no such folder"


def break_no_validation(root: Path) -> str:
    (root / "validation").rename(root / "other")
    return "has no folder val/"


def break_empty_class(root: Path) -> str:
    (root / "train" / "blue").mkdir()
    (root / "validation" / "blue").mkdir()
    return f"{root / 'train' / 'blue'} holds no images"


def break_all_empty(root: Path) -> str:
    for image in (root / "train").glob("*/*.png"):
        image.unlink()
    return "holds no images"


def break_other_classes(root: Path) -> str:
    (root / "validation" / "red").rename(root / "validation" / "rouge")
    return "the class 'red' is in"


def break_one_class(root: Path) -> str:
    for split in ("train", "validation"):
        for image in (root / split / "red").iterdir():
            image.unlink()
        (root / split / "red").rmdir()
    return "one class only"


@pytest.mark.parametrize(
    "damage",
    [break_missing, break_no_validation, break_empty_class, break_all_empty, break_other_classes, break_one_class],
    ids=lambda damage: damage.__name__.removeprefix("break_"),
)
def test_a_folder_that_is_not_one(
    folder: Path, damage: Callable[[Path], str], capsys: pytest.CaptureFixture[str]
) -> None:
    message = damage(folder)
    assert train("--data", folder, *FOLDER, "--out", "run") == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("orepa: error: ") and message in error and "\n" not in error
    assert not Path("run").exists()


# --- what can go wrong ------------------------------------------------------------------------------------------------------


def test_divergence_stops_and_keeps_the_last_good_checkpoint(capsys: pytest.CaptureFixture[str]) -> None:
    assert train(*SMALL, "--lr", "1e30", "--out", "run") == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("orepa: error: ") and "not finite" in error and "lower --lr" in error and "\n" not in error
    checkpoint = load_checkpoint(Path("run/checkpoint.pt"))
    assert all(bool(torch.isfinite(t).all()) for t in checkpoint["model"].values())
    assert not Path("run/deploy.pt").exists()


def test_a_run_is_not_overwritten_by_accident(uninterrupted: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (uninterrupted / "checkpoint.pt").read_bytes()
    assert train(*SMALL, "--out", uninterrupted) == 2
    assert "--resume continues it, --overwrite discards it" in capsys.readouterr().err
    assert (uninterrupted / "checkpoint.pt").read_bytes() == before


def test_overwrite_leaves_other_files_alone() -> None:
    tiny = ("--limit", 32, "--batch-size", 16, "--epochs", 1, "--out", "run")
    assert train(*tiny) == 0
    Path("run/notes.txt").write_text("mine")
    Path("run/tensorboard/old").write_text("old")
    assert train(*tiny, "--overwrite", "--seed", 1) == 0
    assert load_checkpoint(Path("run/checkpoint.pt"))["config"]["seed"] == 1
    assert Path("run/notes.txt").read_text() == "mine" and not Path("run/tensorboard/old").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--seed", "1"), "another --seed: the checkpoint has 0, asked is 1"),
        (("--model", "test_vit"), "another --model"),
        (("--epochs", "4"), "another --epochs: the checkpoint has 3, asked is 4"),
        (("--no-orepa",), "another --no-orepa"),
        (("--lr", "0.2"), "another --lr"),
        (("--overwrite",), "give one of them"),
    ],
)
def test_resume_refuses_to_become_another_run(
    options: tuple[str, ...], message: str, uninterrupted: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train("--resume", "--out", uninterrupted, *options) == 2
    assert message in capsys.readouterr().err


def test_resume_takes_the_same_options_again(uninterrupted: Path) -> None:
    assert train("--resume", "--out", uninterrupted, *SMALL, "--seed", 0, "--lr", 0.1) == 0


def test_nothing_to_resume(capsys: pytest.CaptureFixture[str]) -> None:
    assert train("--resume") == 2
    assert "nothing to resume" in capsys.readouterr().err
    assert not Path("runs").exists()


def test_a_failed_conversion_writes_no_deploy_file(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: Any, **__: Any) -> nn.Module:
        raise orepa.ConversionError("the converted model's output differs by 1")

    monkeypatch.setattr(outcome, "convert", refuse)
    assert train("--limit", 32, "--batch-size", 16, "--epochs", 1, "--out", "run") == 2
    assert "failed its check" in capsys.readouterr().err
    assert Path("run/checkpoint.pt").exists() and not Path("run/deploy.pt").exists()


def test_the_outcome_shows_a_difference_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """The table must not be equal by construction."""
    data = load_digits(32, 40)
    model = create("test_resnet", {"num_classes": 10, "in_chans": 1}, 32, orepa=True, preserve=False)
    loaders = Loaders(data, Config(img_size=32, batch_size=20))

    def wrong(model: nn.Module, **_: Any) -> nn.Module:
        return nn.Sequential(orepa.convert(model), nn.Linear(10, 10))

    monkeypatch.setattr(outcome, "convert", wrong)
    result = outcome.conclude(model, loaders.val_all, torch.device("cpu"))
    assert result.columns["converted"].changed > 0 and result.columns["converted"].max_difference > 1e-3
    assert result.columns["trained"].changed == 0
    assert "changed no prediction" not in run.verdict(result)


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


# --- the registered models ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_registered_model_end_to_end() -> None:
    """One that consists of OREPA blocks already; its deployed weights are those of timm's plain model."""
    name, run_it = "orepa_resnet18", ("--limit", 16, "--batch-size", 8, "--epochs", 1)
    assert train("--model", name, *run_it, "--out", "run") == 0
    trained = from_checkpoint(load_checkpoint(Path("run/checkpoint.pt")))
    assert trained.conv1.topology == "deep_stem"
    assert main(["convert", "run/checkpoint.pt", "converted.pt"]) == 0
    x = torch.randn(3, 1, 32, 32)
    for path in ("run/deploy.pt", "converted.pt"):
        deployed = torch.load(path, weights_only=True)
        assert deployed["model"] == "resnet18"
        plain = timm.create_model(deployed["model"], **deployed["model_kwargs"])
        plain.load_state_dict(deployed["state_dict"])
        with torch.no_grad():
            torch.testing.assert_close(plain.eval()(x), trained(x), rtol=1e-3, atol=1e-4)


def test_the_deployed_weights_of_a_repvgg_fit_timms_own_model(tmp_path: Path) -> None:
    arguments = {"num_classes": 10, "in_chans": 1}
    model = create("orepa_repvgg_a0", arguments, 32, orepa=True, preserve=False)
    x = torch.randn(4, 1, 64, 64)
    model(x)  # other running statistics than the initial ones
    model.eval()
    spec = {"model": "orepa_repvgg_a0", "model_kwargs": arguments}
    save_deployed(tmp_path / "deploy.pt", orepa.convert(model, fold_bn=False), spec)
    deployed = torch.load(tmp_path / "deploy.pt", weights_only=True)
    assert deployed["model"] == "repvgg_a0"
    plain = timm.create_model(deployed["model"], **deployed["model_kwargs"])
    plain.load_state_dict(deployed["state_dict"])
    with torch.no_grad():
        torch.testing.assert_close(plain.eval()(x), model(x), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("option", ["--no-orepa", "--preserve"])
def test_a_registered_model_names_its_plain_twin(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert train("--model", "orepa_resnet18", option, "--limit", 32) == 2
    assert f"with {option} take --model resnet18" in capsys.readouterr().err
    assert not Path("runs").exists()
