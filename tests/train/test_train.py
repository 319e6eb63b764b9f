"""`orepa train`: the whole job, what determines it, and mistakes of the user's."""

from __future__ import annotations

import json
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from train_runs import OUTPUTS, SMALL, Image, assert_same_run, timm, train

import orepa
from orepa.cli import main
from orepa.surgery import evaluation
from orepa.train import loop
from orepa.train.config import Config
from orepa.train.data import Loaders
from orepa.train.files import load_checkpoint
from orepa.train.images import load_digits
from orepa.train.model import create, from_checkpoint, save_deployed

pytest_plugins = ("train_runs",)
pytestmark = pytest.mark.usefixtures("small_and_quick")


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


@pytest.mark.usefixtures("only_training")
def test_same_seed_same_bits(uninterrupted: Path) -> None:
    torch.rand(7)  # what happened before must not matter
    assert train(*SMALL, "--out", "again") == 0
    assert_same_run(uninterrupted, Path("again"))


@pytest.mark.usefixtures("only_training")
def test_another_seed_gives_other_weights(uninterrupted: Path) -> None:
    assert train(*SMALL, "--seed", 1, "--out", "other") == 0
    with pytest.raises(AssertionError):
        assert_same_run(uninterrupted, Path("other"))


def test_no_setting_leaks_out_of_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    threads, hook = torch.get_num_threads(), threading.excepthook
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    monkeypatch.setattr(loop.Trainer, "_train_epoch", lambda *_: pytest.fail("stop here"))
    with pytest.raises(pytest.fail.Exception):
        train(*SMALL, "--threads", threads + 1, "--precision", "64-true")
    assert torch.get_num_threads() == threads and torch.get_default_dtype() == torch.float32
    assert threading.excepthook is hook
    assert not torch.are_deterministic_algorithms_enabled()
    assert handlers == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]


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


@pytest.mark.usefixtures("only_training")
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

    monkeypatch.setattr(evaluation, "convert", refuse)
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

    monkeypatch.setattr(evaluation, "convert", wrong)
    result = evaluation.evaluate_conversion(model, loaders.val_all, torch.device("cpu"))
    assert result.columns["converted"].changed > 0 and result.columns["converted"].max_difference > 1e-3
    assert result.columns["trained"].changed == 0
    assert "changed no prediction" not in result.summary()


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
