"""The command line: every mistake is one line on stderr, exit code 2, and no file."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import orepa
from orepa import cli
from orepa.cli import main


@pytest.fixture(autouse=True)
def _empty_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    place = tmp_path / "here"
    place.mkdir()
    monkeypatch.chdir(place)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # such small tensors gain nothing from more, and wait for them on a busy machine
    yield
    torch.set_num_threads(threads)


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Run a command that must fail; its one line of error."""
    before = sorted(Path().rglob("*"))
    try:
        code = main([str(argument) for argument in arguments])
    except SystemExit as end:
        code = end.code  # type: ignore[assignment]
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    assert code == 2, captured
    assert captured.out == ""
    assert len(lines) == 1 and lines[0].startswith("orepa: error: "), captured.err
    assert sorted(Path().rglob("*")) == before, "it wrote something"
    return lines[0]


# --- general --------------------------------------------------------------------------------------------------------------


def test_help_and_info_import_nothing_heavy() -> None:
    script = """
        import sys
        from orepa.cli import main
        try:
            main(sys.argv[1:])
        except SystemExit:
            pass
        heavy = {"timm", "lightning", "torchvision", "sklearn", "tensorboard", "matplotlib", "tqdm.auto"} & sys.modules.keys()
        print("imported:", sorted(heavy))
    """
    for arguments in (["--help"], ["train", "--help"], ["info"]):
        command = [sys.executable, "-c", "\n".join(line[8:] for line in script.splitlines()), *arguments]
        output = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
        assert "imported: []" in output, output
        assert len(output.splitlines()) > 5


def test_python_m_orepa() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "orepa", "nonsense"], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 2 and done.stderr.startswith("orepa: error: ") and len(done.stderr.splitlines()) == 1


def test_a_reader_that_goes_away() -> None:
    script = "import sys; from orepa.cli import main; print(0, flush=True); sys.stdin.read(); sys.exit(main(['info']))"
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", script], stdin=pipe, stdout=pipe, stderr=pipe, text=True) as process:
        assert process.stdout is not None and process.stdin is not None and process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        process.stdin.close()
        assert process.stderr.read() == ""
        assert process.wait(60) == 141


def test_no_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert "COMMAND" in refused(capsys)


def test_ctrl_c_outside_of_training(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_require", interrupt)
    assert main(["train"]) == 130
    assert capsys.readouterr().err == "orepa: interrupted\n"


# --- models ---------------------------------------------------------------------------------------------------------------


def test_models(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("timm", reason="the models need the extra `models`")
    assert main(["models"]) == 0
    header, *rows = capsys.readouterr().out.splitlines()
    assert header.split()[-2:] == ["training", "deployed"] and len(rows) == 9
    assert rows[0].split() == ["orepa_resnet18", "ResNet-18", "37,756,041", "11,684,712"]
    assert main(["models", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    wide = {"name": "orepa_wide_resnet18_2", "official": "ResNet-18-2x", "plain": "wide_resnet18_2"}
    assert {**wide, "training": 149_410_889, "deployed": 45_683_432} in facts


@pytest.mark.parametrize("command", [["models"], ["convert", "--official", "--arch", "ResNet-18", "a.pth", "b.pth"]])
def test_models_without_timm(
    command: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli.importlib.util, "find_spec", lambda name: None)
    assert 'needs timm, not installed here: pip install "orepa-kernels[models]"' in refused(capsys, *command)


# --- info -----------------------------------------------------------------------------------------------------------------


def test_info(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info"]) == 0
    printed = capsys.readouterr().out
    assert (
        orepa.__version__ in printed and torch.__version__ in printed and "reference" in printed and "timm" in printed
    )


def test_info_as_json(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "_version", {"timm": "9.9", "lightning": None}.__getitem__)
    assert main(["info", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["torch"] == torch.__version__ and facts["timm"] == "9.9" and facts["lightning"] is None
    assert facts["backends"]["reference"]["runs"] is True


# --- train: mistakes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--epochs", "0", "a whole number from 1 on, got '0'"),
        ("--epochs", "2.5", "a whole number from 1 on, got '2.5'"),
        ("--batch-size", "1", "from 2 on"),
        ("--lr", "-0.1", "a number above 0, got '-0.1'"),
        ("--lr", "0", "a number above 0"),
        ("--lr", "nan", "a number above 0, got 'nan'"),
        ("--lr", "fast", "a number above 0, got 'fast'"),
        ("--weight-decay", "inf", "a number from 0"),
        ("--seed", "-1", "from 0 on"),
        ("--workers", "-1", "from 0 on"),
        ("--limit", "1", "from 2 on"),
        ("--checkpoint-every", "0", "from 1 on"),
        ("--precision", "8-true", "invalid choice"),
        ("--accelerator", "abacus", "invalid choice"),
        ("--colour", "red", "unrecognized arguments"),
    ],
)
def test_train_bad_numbers(option: str, value: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    error = refused(capsys, "train", f"{option}={value}")
    assert option in error and message in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--model", "resnet_18"), "timm has no model 'resnet_18'; did you mean "),
        (("--model", "resnet_18"), "resnet18"),
        (("--model", ""), "timm has no model ''"),
        (("--model", "hf-hub:timm/resnet18"), "timm has no model"),
        (("--model", "inception_v3"), "does not take 32x32 images (see --img-size)"),
        (("--model", "test_vit"), "test_vit has no convolution with a norm layer after it"),
        (("--epochs", 3, "--warmup-epochs", 3), "--warmup-epochs 3 must be less than --epochs 3"),
        (("--no-orepa", "--preserve"), "give one of them"),
        (("--data", "nowhere"), "nowhere: no such folder"),
        (("--devices", 3, "--accelerator", "cpu"), "cannot be shared by 3 device(s)"),
        (("--precision", "16-mixed", "--accelerator", "cpu"), "needs a GPU"),
    ],
)
@pytest.mark.usefixtures("training_extra")
def test_train_bad_requests(arguments: tuple[object, ...], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert message in refused(capsys, "train", *arguments)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
@pytest.mark.usefixtures("training_extra")
def test_train_on_a_missing_device(capsys: pytest.CaptureFixture[str]) -> None:
    assert "cannot use --accelerator cuda" in refused(capsys, "train", "--accelerator", "cuda")


@pytest.mark.usefixtures("training_extra")
def test_train_where_one_cannot_write(capsys: pytest.CaptureFixture[str]) -> None:
    Path("file").write_text("not a folder")
    assert "cannot write to the folder file/run: Not a directory" in refused(capsys, "train", "--out", "file/run")
    assert Path("file").read_text() == "not a folder"


def test_train_without_its_packages(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    find = cli.importlib.util.find_spec
    monkeypatch.setattr(cli.importlib.util, "find_spec", lambda n: None if n in ("timm", "sklearn") else find(n))
    error = refused(capsys, "train")
    assert "timm" in error and "scikit-learn" in error and 'pip install "orepa-kernels[train]"' in error
    assert 'pip install "orepa-kernels[train]"' in refused(capsys, "convert", "a.pt", "b.pt")


# --- convert ----------------------------------------------------------------------------------------------------------------


def test_convert(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", str(checkpoint), "deploy.pt"]) == 0
    printed = capsys.readouterr().out
    assert "layer4.0.conv1" in printed and "15 converted" in printed and "written to deploy.pt" in printed
    mine, theirs = (torch.load(p, weights_only=True) for p in ("deploy.pt", checkpoint.with_name("deploy.pt")))
    states = mine.pop("state_dict"), theirs.pop("state_dict")
    assert mine == theirs
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert [path.name for path in Path().iterdir()] == ["deploy.pt"]


def test_convert_does_not_overwrite(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("deploy.pt").write_text("precious")
    assert "exists already (--force replaces it)" in refused(capsys, "convert", checkpoint, "deploy.pt")
    assert Path("deploy.pt").read_text() == "precious"
    assert main(["convert", str(checkpoint), "deploy.pt", "--force"]) == 0
    assert torch.load("deploy.pt", weights_only=True)["model"] == "test_resnet"


@pytest.mark.parametrize(("out", "message"), [("nowhere/deploy.pt", "does not exist"), (".", "is a folder")])
def test_convert_to_nowhere(out: str, message: str, checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert message in refused(capsys, "convert", checkpoint, out)


def test_convert_a_missing_file_writes_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    """The authors' script saves random weights here."""
    pytest.importorskip("timm")
    assert "cannot read the checkpoint missing.pt: No such file" in refused(
        capsys, "convert", "missing.pt", "deploy.pt"
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a readable checkpoint"),
        (b"\x80\x02not a pickle", "not a readable checkpoint"),
        ({"state_dict": {"a": torch.ones(1)}}, "not a checkpoint of `orepa train`"),
        (torch.ones(3), "not a checkpoint of `orepa train`"),
        ({"format": "orepa.deploy"}, "is a converted model already"),
        ({"format": "orepa.checkpoint", "version": 1}, "it has no config, data, environment"),
    ],
    ids=["empty", "bytes", "another's", "tensor", "deployed", "incomplete"],
)
def test_convert_something_else(content: Any, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("timm")
    if isinstance(content, bytes):
        Path("other.pt").write_bytes(content)
    else:
        torch.save(content, "other.pt")
    error = refused(capsys, "convert", "other.pt", "deploy.pt")
    assert message in error and "other.pt" in error


@pytest.mark.parametrize("kept", [0.3, 0.99])
def test_convert_a_torn_checkpoint(kept: float, checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = checkpoint.read_bytes()
    Path("torn.pt").write_bytes(whole[: int(kept * len(whole))])
    assert "not a readable checkpoint" in refused(capsys, "convert", "torn.pt", "deploy.pt")


def test_convert_never_runs_code_from_a_checkpoint(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("timm")
    torch.save(Path("pickled"), "object.pt")
    assert "not a readable checkpoint" in refused(capsys, "convert", "object.pt", "deploy.pt")


def _newer(content: dict[str, Any]) -> str:
    content["version"] = 99
    return "version 99"


def _unknown_model(content: dict[str, Any]) -> str:
    content["model_spec"]["model"] = "resnet_from_the_future"
    return "timm has no model 'resnet_from_the_future'"


def _missing_weight(content: dict[str, Any]) -> str:
    del content["model"]["fc.weight"]
    return 'Missing key(s) in state_dict: "fc.weight"'


def _wrong_shape(content: dict[str, Any]) -> str:
    content["model"]["fc.bias"] = torch.zeros(11)
    return "fc.bias"


def _damaged(content: dict[str, Any]) -> str:
    content["model"]["layer1.0.conv1.origin_weight"].fill_(float("nan"))
    return "the conversion failed its check"


@pytest.mark.parametrize("change", [_newer, _unknown_model, _missing_weight, _wrong_shape, _damaged])
def test_convert_a_checkpoint_that_does_not_fit(
    change: Any, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = torch.load(checkpoint, weights_only=True)
    message = change(content)
    torch.save(content, "changed.pt")
    assert message in refused(capsys, "convert", "changed.pt", "deploy.pt")


@pytest.mark.parametrize(
    ("backend", "message"),
    [("gpu", "OREPA_BACKEND must be one of auto, cuda"), ("cuda", "OREPA_BACKEND=cuda cannot run here: ")],
)
def test_a_backend_that_cannot_be_had_is_told_before_anything_is_written(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, backend: str, message: str
) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    monkeypatch.setenv("OREPA_BACKEND", backend)
    assert main(["train", "--out", str(tmp_path / "run")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line and not (tmp_path / "run").exists()
