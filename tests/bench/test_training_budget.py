"""Training budgets: the memory split adds up to what the allocator says, components come one by one, the paper is quoted."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("timm")

import compare as compare_script
from test_bench_step import CASE, _one_thread, plain_model  # noqa: F401
from training_budget import memory, run
from training_budget.components import BRANCHES, STEM, sweep
from training_budget.memory import CpuRecorder, Event, Split, measure, split_peak
from training_budget.paper import TABLE_4
from training_budget.plots import plot

from orepa.bench import step
from orepa.bench.runner import BenchConfig
from orepa.bench.step import TrainingStep
from orepa.bench.tables import show
from orepa.bench.variants import OREPA, PLAIN, all_variants
from orepa.cli import main
from orepa.modules.step import squeeze_alone_in
from orepa.topology import ConvSpec
from orepa.topology.catalogue import orepa as orepa_block

TOY = "test_resnet"


def make_step(variant: str = OREPA, model: str = TOY, batch: int = 2, device: str = "cpu") -> TrainingStep:
    built = all_variants()[variant].build(plain_model(model)).train().to(device)
    return TrainingStep(built, torch.randn(batch, 3, 32, 32, device=device), torch.arange(batch, device=device))


@pytest.mark.parametrize(("model", "variant"), [("resnet18", PLAIN), ("resnet18", OREPA), (TOY, "dbb-offline")])
def test_the_split_adds_up_to_the_allocators_peak(model: str, variant: str) -> None:
    # The truth knows nothing of tensors: all blocks that the allocator handed out from before the model was built.
    plain_model(model)
    kept: list[TrainingStep] = []

    def life() -> None:
        kept.append(make_step(variant, model, batch=4))
        kept[0]()

    _, before = CpuRecorder().record(life)
    _, events = CpuRecorder().record(kept[0])
    live: dict[int, int] = {}
    total = peak = 0
    for number, event in enumerate([*before, *events]):
        if event.size > 0:
            live[event.address] = event.size
            total += event.size
        elif event.address in live:
            total -= live.pop(event.address)
        peak = max(peak, total) if number >= len(before) else peak

    found = measure(kept[0], CpuRecorder())
    assert sum(found["split"].values()) == pytest.approx(peak, rel=0.02)
    assert found["peak_bytes"] == pytest.approx(peak, rel=0.02)


@pytest.mark.gpu
@pytest.mark.parametrize("variant", [PLAIN, OREPA, "dbb-offline"])
def test_the_split_adds_up_to_the_peak_on_cuda(variant: str) -> None:
    memory.warm_up("cuda")
    make_step(variant, "resnet18", batch=32, device="cuda")()
    gc.collect()
    before = memory.occupied("cuda")
    made = make_step(variant, "resnet18", batch=32, device="cuda")
    made()
    found = measure(made, memory.recorder("cuda"), before)
    made()
    torch.cuda.reset_peak_memory_stats()
    made()
    peak = torch.cuda.max_memory_allocated() - before[0]
    assert sum(found["split"].values()) == pytest.approx(peak, rel=0.02)


def test_parts_are_what_they_are_called() -> None:
    made = make_step()
    squeeze_alone_in(made.model)
    made()
    found = measure(made, CpuRecorder())
    parameters = sum(p.numel() * 4 for p in made.model.parameters())
    assert found["split"]["parameters"] == found["split"]["optimizer"] == parameters
    assert 0 < found["squeeze_saved_bytes"] < found["saved_bytes"]
    assert found["split"]["squeeze"] <= found["squeeze_saved_bytes"]
    assert all(p.grad is None for p in made.model.parameters())

    for variant in (PLAIN, OREPA):  # one node for all blocks refers to the parameters
        made = make_step(variant)
        made()
        assert measure(made, CpuRecorder())["squeeze_saved_bytes"] == 0


def test_what_is_saved_counts_once_and_exactly() -> None:
    class Square(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(1))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = x.flatten(1) * self.scale  # saves the images, which are there anyway
            return y * y  # saves y, twice the same

    made = TrainingStep(Square(), torch.randn(2, 3, 32, 32), torch.arange(2))
    made()
    found = measure(made, CpuRecorder())
    logits = 2 * 3 * 32 * 32 * 4
    assert found["split"]["buffers"] == logits + 2 * 8
    assert logits * 2 <= found["saved_bytes"] <= logits * 2 + 100  # y and the log-softmax


def test_an_address_that_is_used_again_keeps_its_parts_apart() -> None:
    forward = [Event(1, 100), Event(2, 50), Event(2, -50), Event(3, 10)]
    backward = [Event(1, -100), Event(1, 30), Event(2, 200), Event(3, -10), Event(1, -30), Event(1, 40)]
    standing = {"parameters": {9: 7}, "optimizer": {8: 5}, "buffers": {9: 7}}
    split = split_peak([forward, backward, [Event(77, -1)]], standing, {1: True, 3: False}, {1, 2})
    # At the peak, address 1 is no longer what the squeeze saved, and not yet the gradient.
    assert split == Split(7, gradients=200, optimizer=5, activations=10, squeeze=0, buffers=0, temporary=30)
    assert split.total == 252


# --- the sweep ----------------------------------------------------------------------------------------------------------


def test_components_come_one_by_one_online_and_offline() -> None:
    planned = sweep(CASE)
    assert len(planned) == len(BRANCHES) + 1 and STEM in planned[-1][0].components
    sizes: dict[str, list[int]] = {}
    for _, variants in planned:
        for variant in variants:
            count = sum(p.numel() for p in variant.build(plain_model("resnet18")).parameters())
            sizes.setdefault(variant.name, []).append(count)
    assert len(set(sizes["plain"])) == 1
    for name in ("online", "offline"):
        assert sizes[name] == sorted(set(sizes[name]))
    assert set(orepa_block(ConvSpec(8, 8, (3, 3))).branches) == set(BRANCHES)


# --- what the user sees -------------------------------------------------------------------------------------------------


def test_the_command_prints_the_papers_table_and_draws(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(TABLE_4, CASE.model, TABLE_4["resnet18"])
    out, png = tmp_path / "a.json", tmp_path / "a.png"
    arguments = [
        "--batch-sizes",
        "2",
        "--img-size",
        "32",
        "--rounds",
        "1",
        "--seconds",
        "0.01",
        "--threads",
        "1",
        "--models",
        CASE.model,
    ]
    chosen = ["--variants", "plain,orepa-reference", "--out", str(out), "--plot", str(png)]
    assert run.main([*arguments, *chosen]) == 0
    printed = capsys.readouterr().out
    for text in ("orepa-reference", "images/s", "temporary", "Table 4", "0.086", "1.40", "not measured"):
        assert text in printed
    assert png.read_bytes()[:4] == b"\x89PNG"
    assert main(["bench", "show", str(out)]) == 0
    assert capsys.readouterr().out.splitlines()[:5] == printed.splitlines()[:5]
    assert compare_script.main([str(out), str(out)]) == 0
    assert "no difference in any of 2" in capsys.readouterr().out


def test_a_sweep_has_its_own_variants(capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main(["--sweep", "components", "--variants", "plain"]) == 2
    assert "variants of its own" in capsys.readouterr().err


def test_a_sweep_is_drawn_over_its_components(tmp_path: Path) -> None:
    planned = [(case, variants[:2]) for case, variants in sweep(CASE)[:2]]
    config = BenchConfig(cases=planned, modes=["step"], rounds=1, seconds=1e-3)
    results = step.run(config, probe=memory.probe)
    assert {row.case["components"] for row in results.timed} == {"1: origin", "2: +avg"}
    plot(results, tmp_path / "sweep.png")
    assert (tmp_path / "sweep.png").stat().st_size > 10_000
    show(results)


def test_the_papers_ratios() -> None:
    ratios = {m: (b["OREPA"].seconds / next(iter(b.values())).seconds) for m, b in TABLE_4.items()}
    assert {m: round(r, 2) for m, r in ratios.items()} == {
        **{"resnet18": 1.40, "resnet34": 1.57, "resnet50": 1.24, "resnet101": 1.16},
        **{"repvgg_a0": 1.36, "repvgg_a1": 1.21, "repvgg_a2": 1.24},
    }
