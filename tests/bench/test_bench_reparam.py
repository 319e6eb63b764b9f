"""``orepa bench reparam``: every form of a net is the same function, what is not is reported, and the tables show both."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import plots
import pytest
import render
import torch
from torch import nn

pytest.importorskip("timm")

from timm.models import register_model
from timm.models.byobnet import ByoBlockCfg, ByobNet, ByoModelCfg
from training_budget import memory

import orepa
from orepa.bench import reparam
from orepa.bench.check import ALLOWED
from orepa.bench.results import load
from orepa.bench.step import StepCase, TrainingStep
from orepa.cli import main
from orepa.surgery.report import relative_error

FORMS = ["as it comes", "online", "plain twin", "as it comes", "reparameterize_model", "orepa.convert"]


@register_model
def tiny_mobileone(num_classes: int, in_chans: int, **_: Any) -> nn.Module:
    blocks = tuple(
        ByoBlockCfg(type="one", d=1, c=8, s=s, gs=1, br=1.0, block_kwargs={"num_conv_branches": 2}) for s in (1, 2)
    )
    return ByobNet(ByoModelCfg(blocks=blocks, stem_type="one", stem_chs=8), num_classes, in_chans)


@pytest.fixture(autouse=True)
def _threads_as_before() -> Any:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def bench(*arguments: str, model: str = "tiny_mobileone") -> int:
    options = f"--models {model} --inputs 2x32 --rounds 1 --seconds 0.01 --threads 1".split()
    return main(["bench", "reparam", *options, *arguments])


def test_all_forms_are_measured_and_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench("--out", str(tmp_path / "a.json")) == 0
    rows = load(tmp_path / "a.json").rows
    assert [(row.provider, row.status) for row in rows] == [(name, "ok") for name in FORMS]
    assert [row.mode for row in rows] == ["step"] * 3 + ["inference"] * 3
    branched, online, twin, _, timms, ours = (row.facts for row in rows)
    assert branched["convolutions"] > ours["convolutions"] == timms["convolutions"] == 3
    assert online["convolutions"] == twin["convolutions"] == 3
    assert all(row.facts["error"] < 1e-5 for row in rows)
    assert twin["parameter_count"] == ours["parameter_count"] + 3 * 8  # a norm has one more per channel than a bias
    assert online["parameter_count"] > twin["parameter_count"] and branched["peak_bytes"] > twin["peak_bytes"]

    printed = capsys.readouterr().out
    assert "images/s, batch 2, 32 px" in printed and "online / plain twin" in printed
    (tmp_path / "page.md").write_text("<!-- results:a -->\n<!-- /results:a -->\n")
    assert render.main(["--document", str(tmp_path / "page.md"), "--results", str(tmp_path)]) == 0
    page = (tmp_path / "page.md").read_text()
    assert "| inference: images/s, batch 2, 32 px | as it comes | reparameterize_model | orepa.convert |" in page
    assert plots.main([str(tmp_path / "a.json"), str(tmp_path / "a.png")]) == 0


def test_another_function_is_wrong_and_not_timed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def lose_a_bias(net: nn.Module) -> nn.Module:
        merged = orepa.convert(net)
        nn.init.zeros_([m for m in merged.modules() if isinstance(m, nn.Conv2d)][2].bias)
        return merged

    monkeypatch.setitem(reparam.FORMS["inference"], "orepa.convert", lose_a_bias)
    assert bench("--out", str(tmp_path / "a.json")) == 1
    *others, row = load(tmp_path / "a.json").rows
    assert row.status == "wrong" and "outputs differ by" in row.reason and not row.seconds
    assert {other.status for other in others} == {"ok"} and "WRONG" in capsys.readouterr().out


def test_a_net_without_branches_has_nothing_to_compare(tmp_path: Path) -> None:
    assert bench("--out", str(tmp_path / "a.json"), model="test_resnet") == 0
    statuses = {(row.provider, row.status) for row in load(tmp_path / "a.json").rows}
    assert statuses == {(name, "ok" if name == "as it comes" else "skipped") for name in FORMS}


def test_the_peak_is_that_of_the_allocator() -> None:
    net, images, labels = StepCase("tiny_mobileone", 4, 32).create()
    step = TrainingStep(net, images, labels)
    step()
    split = memory.measure(step, memory.recorder("cpu"))
    assert reparam.peak_bytes(step) == pytest.approx(split["peak_bytes"], rel=1e-3)


def test_no_mistake_hides_behind_a_fresh_net() -> None:
    net, images, _ = StepCase("repvgg_a0", 8, 64).create()  # whose outputs vanish where it is fresh
    reparam.randomize(net, images)
    net.eval()
    norms = [module for module in net.modules() if isinstance(module, nn.BatchNorm2d)]
    with torch.no_grad():
        outputs = net(images)
        for norm in norms[::12]:
            norm.running_var *= 1.1
            assert relative_error(outputs, net(images)) > 3 * ALLOWED["logits"]
            norm.running_var /= 1.1
    assert all(norm.momentum == 0.1 for norm in norms)
