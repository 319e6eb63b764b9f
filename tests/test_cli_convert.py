"""`orepa convert --timm`: weights of any model of timm, to plain ones that load as the command says."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from official_checkpoints import random_values
from test_cli import refused
from torch import Tensor, nn

import orepa
from orepa.cli import main

timm = pytest.importorskip("timm", reason="timm is not installed (the [models] extra)")
safetensors_torch = pytest.importorskip("safetensors.torch")


@pytest.fixture(autouse=True)
def _narrow_models_in_an_empty_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Shrink timm's RepVGG: two blocks in the stages that have several, an eighth of the channels."""
    from timm.models.byobnet import model_cfgs

    cfg = model_cfgs["repvgg_a0"]
    blocks = tuple(replace(block, d=min(block.d, 2), c=block.c // 8) for block in cfg.blocks)
    monkeypatch.setitem(model_cfgs, "repvgg_a0", replace(cfg, blocks=blocks, stem_chs=8))
    monkeypatch.chdir(tmp_path)


def trained(name: str, **arguments: Any) -> tuple[nn.Module, dict[str, Tensor]]:
    """A model with random values, in eval mode, and its state dict."""
    model = timm.create_model(name, **arguments)
    state = random_values({key: tuple(value.shape) for key, value in model.state_dict().items()})
    model.load_state_dict(state)
    return model.eval(), state


@torch.no_grad()
def assert_loads_as_printed(printed: str, model: nn.Module, channels: int = 3) -> str:
    """Run the line that the command prints; the network that it makes must be the same function."""
    (line,) = (line for line in printed.splitlines() if line.startswith("load it by: "))
    names = {"timm": timm, "torch": torch, "orepa": orepa, "safetensors": pytest.importorskip("safetensors")}
    exec(line.removeprefix("load it by: "), names)
    x = torch.randn(2, channels, 32, 32)
    expected, got = model(x), names["model"](x)
    assert got.shape == expected.shape and (got - expected).norm() <= 1e-5 * expected.norm()
    return line


def test_merged_weights_fit_timm_s_reparameterized_model(capsys: pytest.CaptureFixture[str]) -> None:
    model, state = trained("repvgg_a0", num_classes=5, in_chans=1)
    safetensors_torch.save_file(state, "w.safetensors")
    assert main(["convert", "--timm", "repvgg_a0", "--checkpoint", "w.safetensors", "out.safetensors"]) == 0
    printed = capsys.readouterr().out
    line = assert_loads_as_printed(printed, model, channels=1)
    assert "timm.utils.reparameterize_model(timm.create_model('repvgg_a0', num_classes=5, in_chans=1)" in line
    assert "convert: 8 merged" in printed and "convolutions 16 -> 8" in printed and "left" not in printed
    assert sorted(path.name for path in Path().iterdir()) == ["out.json", "out.safetensors", "w.safetensors"]
    record = json.loads(Path("out.json").read_text())
    assert record["model"] == "repvgg_a0" and record["arguments"] == {"num_classes": 5, "in_chans": 1}
    assert record["convolutions"] == {"before": 16, "after": 8} and 0 < record["error"] < 1e-4
    assert [layer["name"] for layer in record["merged"]][:2] == ["stem", "stages.0.0"]
    stem = record["merged"][0]
    assert (stem["convolution"], stem["detail"]) == ("3x3 1->8 s2", "2 convolutions in 2 branches")
    assert 0 < stem["error"] < 1e-6 and not record["left"] and record["load"] in line
    assert record["versions"]["timm"] == timm.__version__


def test_other_weights_fit_the_converted_model(capsys: pytest.CaptureFixture[str]) -> None:
    """A file of a training run: wrapped, from several processes, with a moving average, without the head."""
    model, state = trained("test_resnet", num_classes=0)
    worse = {f"module.{key}": torch.zeros_like(value) for key, value in state.items()}
    content = {"epoch": 3, "state_dict": worse, "state_dict_ema": {f"module.{k}": v for k, v in state.items()}}
    torch.save(content, "w.pth")
    assert main(["convert", "out.pt", "--timm=test_resnet", "--force", "--checkpoint=w.pth"]) == 0
    printed = capsys.readouterr().out
    line = assert_loads_as_printed(printed, model)
    assert "model = orepa.convert(timm.create_model('test_resnet', num_classes=0).eval())" in line
    assert len(json.loads(Path("out.json").read_text())["folded"]) == 15 and "15 folded" in printed


class ShiftBeforePadding(nn.Module):
    """Two branches that are one convolution only as long as the norm of the first shifts nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, padding=1)
        self.other = nn.Conv2d(3, 4, 3, padding=1)
        nn.init.zeros_(self.first.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.norm(self.first(x))) + self.other(x)


def test_layers_that_the_values_decide_on(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from timm.models import _registry

    monkeypatch.setitem(_registry._model_entrypoints, "shift_before_padding", lambda **_: ShiftBeforePadding())
    model, state = trained("shift_before_padding")
    torch.save({"model": state}, "w.pt")
    assert main(["convert", "--timm", "shift_before_padding", "--checkpoint", "w.pt", "out.pt"]) == 0
    printed = capsys.readouterr().out
    assert "checkpoint_path='w.pt'" in assert_loads_as_printed(printed, model)
    (left,) = json.loads(Path("out.json").read_text())["left"]
    assert "before zero padding" in left["detail"] and left["detail"] in printed


# --- refused ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--timm repvgg_a0 out.pt", "--timm and --checkpoint go together"),
        ("--checkpoint w.pt out.pt", "--timm and --checkpoint go together"),
        ("--timm repvgg_a0 --checkpoint w.pt", "the following arguments are required: OUT"),
        ("--timm repvgg_a0 --checkpoint w.pt w.pt out.pt", "unrecognized arguments: out.pt"),
        ("--timm repvgg_a0 --checkpoint w.pt --official --arch RepVGG-A0 out.pt", "--timm and --official exclude"),
        ("--timm repvgg_a9 --checkpoint w.pt out.pt", "timm has no model 'repvgg_a9'; did you mean repvgg_a"),
        ("--timm repvgg_a0 --checkpoint none.pt out.pt", "cannot read the checkpoint none.pt: No such file"),
        ("--timm repvgg_a0 --checkpoint text.pt out.pt", "text.pt is not a readable checkpoint: damaged, or not a Py"),
        ("--timm repvgg_a0 --checkpoint text.safetensors out.pt", "not a readable checkpoint: damaged, or not a safet"),
        ("--timm repvgg_a0 --checkpoint list.pt out.pt", "list.pt is no checkpoint: it holds a list, no state dict"),
        ("--timm repvgg_a0 --checkpoint run.pt out.pt", "run.pt: no checkpoint: 'epoch' must be a tensor, got an int"),
        ("--timm repvgg_a0 --checkpoint deployed.pt out.pt", "is deployed already ('stem.reparam_conv.weight')"),
        ("--timm test_resnet --checkpoint w.pt out.pt", "no checkpoint of test_resnet: missing 'conv1.0.weight', "),
        (
            "--timm repvgg_a0 --checkpoint wide.pt out.pt",
            "'stages.0.0.conv_kxk.conv.weight' is [7, 8, 3, 3] there, [8,",
        ),
        ("--timm repvgg_a0 --checkpoint w.pt out.bin", "OUT must end in .safetensors, .pt, .pth, got out.bin"),
        ("--timm repvgg_a0 --checkpoint w.pt there.pt", "there.json exists already (--force replaces it)"),
        ("--timm repvgg_a0 --checkpoint w.pt none/out.pt", "the folder none does not exist"),
        ("--timm repvgg_a0 --checkpoint nan.pt out.pt", "the conversion failed its check, nothing was written: "),
    ],
)
def test_convert_timm_refuses(arguments: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    _, state = trained("repvgg_a0")
    torch.save(state, "w.pt")
    torch.save([state], "list.pt")
    torch.save({"epoch": 1, "weights": state}, "run.pt")
    torch.save({"stem.reparam_conv.weight": torch.ones(1)}, "deployed.pt")
    kernel = "stages.0.0.conv_kxk.conv.weight"
    torch.save({**state, kernel: torch.ones(7, 8, 3, 3)}, "wide.pt")
    torch.save({**state, kernel: torch.full_like(state[kernel], torch.nan)}, "nan.pt")
    for name in ("text.pt", "text.safetensors", "there.json"):
        Path(name).write_text("precious")
    assert message in refused(capsys, "convert", *arguments.split())
    assert Path("there.json").read_text() == "precious"


@pytest.mark.parametrize("out", ["out.pt", "out.safetensors"])
def test_a_full_disk_leaves_both_files_as_they_were(
    out: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.save(trained("repvgg_a0")[1], "w.pt")
    for path in (Path(out), Path("out.json")):
        path.write_text("precious")

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    monkeypatch.setattr(safetensors_torch, "save", full)
    command = f"convert --timm repvgg_a0 --checkpoint w.pt --force {out}".split()
    assert f"cannot write {out}: No space left on device" in refused(capsys, *command)
    assert Path(out).read_text() == Path("out.json").read_text() == "precious"
