"""``orepa bench step``: what it times is right, what is wrong it says, and the user sees both."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("timm")
pytest.importorskip("rich")

from orepa.bench import step, step_tables
from orepa.bench.contestants import OREPA, Contestant, choose, everyone, squeezing
from orepa.bench.paper import TABLE_4
from orepa.bench.results import load
from orepa.bench.step_sweep import BRANCHES, STEM, sweep
from orepa.cli import main
from orepa.errors import UserError
from orepa.topology import ConvSpec
from orepa.topology.catalogue import orepa as orepa_block
from orepa.train.model import create_plain, model_arguments

CASE = step.Case("test_resnet", 2, 32)  # timm's own toy


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@functools.cache
def plain_model(name: str = CASE.model) -> nn.Module:
    torch.manual_seed(0)
    return create_plain(name, model_arguments(name, 1000, 3, 32), 32)


def measure_all(contestants: list[Contestant], **options: Any) -> step.Results:
    request = step.Request(
        [(options.pop("case", CASE), contestants)], rounds=1, seconds=1e-3, out=options.pop("out", None)
    )
    return step.run(request, {}, **options)


# --- right before fast --------------------------------------------------------------------------------------------------


def test_every_contestant_that_runs_is_right_and_timed(tmp_path: Path) -> None:
    out = tmp_path / "step.json"
    seen: list[nn.Module] = []

    def compiler(model: nn.Module) -> nn.Module:
        seen.append(model)
        return model

    results = measure_all(list(everyone().values()), compiler=compiler, out=out)
    rows = {row.provider: row for row in results.rows}
    assert rows.keys() == everyone().keys() and len(seen) == 2
    assert {row.status for row in rows.values()} <= {"ok", "skipped"}
    assert {"plain", "plain-compile", "orepa-reference", "orepa-compile", "dbb-offline", "repvgg-offline"} <= {
        row.provider for row in results.timed
    }
    assert rows["orepa-compile"].facts["logits_error"] < 1e-5
    assert rows["orepa-reference"].facts["parameter_count"] > rows["plain"].facts["parameter_count"]
    assert all(row.seconds for row in results.timed)
    assert [row.key for row in load(out).rows] == [row.key for row in results.rows] and load(out).complete


def broken(how: Callable[[nn.Module], None], name: str = "broken") -> Contestant:
    def build(model: nn.Module) -> nn.Module:
        built = everyone()[OREPA].build(model)
        how(built)
        return built

    return Contestant(name, build, OREPA)


def test_a_wrong_contestant_is_reported_and_not_timed() -> None:
    def spoil(model: nn.Module) -> None:
        conv = squeezing(model)[-1]
        conv.register_forward_hook(lambda _module, _inputs, output: output * 1.2 + 0.1 * output.roll(1, 1))

    results = measure_all([everyone()[OREPA], broken(spoil)])
    row = results.rows[1]
    assert (row.provider, row.status, row.seconds) == ("broken", "wrong", [])
    assert "differ by" in row.reason


def test_an_infinite_loss_and_an_error_are_results_too() -> None:
    def explode(model: nn.Module) -> None:
        squeezing(model)[0].register_forward_hook(lambda _module, _inputs, output: output * float("nan"))

    def fail(_model: nn.Module) -> None:
        raise RuntimeError("no luck")

    results = measure_all([broken(explode, "first"), everyone()[OREPA], broken(explode, "nan"), broken(fail, "fails")])
    found = {row.provider: (row.status, row.reason) for row in results.rows}
    assert found["nan"] == ("wrong", "its loss is nan")
    assert found["fails"] == ("failed", "RuntimeError: no luck")
    assert found["first"][0] == "skipped" and "did not run" in found["first"][1]


def test_compilation_is_over_before_the_clock_runs() -> None:
    log: list[str] = []

    class Watch(step.StepStopwatch):
        def sample(self, task: Any, calls: int) -> float:
            log.append("timed")
            return super().sample(task, calls)

    def compiler(model: nn.Module) -> Any:
        first = [True]

        def call(x: torch.Tensor) -> torch.Tensor:
            if first.pop() if first else False:
                log.append("compiled")
            return model(x)

        return call

    measure_all(choose(["plain-compile"], everyone()), compiler=compiler, stopwatch=Watch())
    assert log.count("compiled") == 1 and log.index("timed") > log.index("compiled")


@pytest.mark.parametrize(("autocast", "layout"), [("bf16", "channels_last"), ("bf16", "contiguous")])
def test_other_precisions_and_layouts(autocast: str, layout: str) -> None:
    case = step.Case(CASE.model, 2, 32, autocast, layout)
    compiled = choose(["orepa-compile"], everyone())
    results = measure_all(compiled, case=case, compiler=lambda model: model)
    assert [row.status for row in results.rows] == ["ok", "ok"]


def test_there_are_no_graphs_on_the_cpu() -> None:
    with pytest.raises(UserError, match="no CUDA graphs on the CPU"):
        step.run(step.Request([(CASE, [])], launches=("graph",)), {})


# --- the sweep ----------------------------------------------------------------------------------------------------------


def test_components_come_one_by_one_online_and_offline() -> None:
    planned = sweep(CASE)
    assert len(planned) == len(BRANCHES) + 1 and STEM in planned[-1][0].components
    sizes: dict[str, list[int]] = {}
    for _, contestants in planned:
        for contestant in contestants:
            count = sum(p.numel() for p in contestant.build(plain_model("resnet18")).parameters())
            sizes.setdefault(contestant.name, []).append(count)
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
    chosen = ["--contestants", "plain,orepa-reference", "--out", str(out), "--plot", str(png)]
    assert main(["bench", "step", *arguments, *chosen]) == 0
    printed = capsys.readouterr().out
    for text in ("orepa-reference", "images/s", "temporary", "Table 4", "0.086", "1.40", "not measured"):
        assert text in printed
    assert png.read_bytes()[:4] == b"\x89PNG"
    assert main(["bench", "show", str(out)]) == 0
    assert capsys.readouterr().out.splitlines()[:5] == printed.splitlines()[:5]
    assert main(["bench", "compare", str(out), str(out)]) == 0
    assert "no difference in any of 2" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--contestants", "none"], "--contestants must be among plain"),
        (["--batch-sizes", "1"], "from 2 on"),
        (["--models", "nonsense"], "timm has no model"),
        (["--cuda-graph", "on", "--device", "cpu"], "no CUDA graphs"),
        (["--sweep", "components", "--contestants", "plain"], "contestants of its own"),
        (["--out", "missing/a.json"], "there is no folder"),
    ],
)
def test_mistakes_are_one_line(arguments: list[str], complaint: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "step", *arguments]) == 2
    assert complaint in capsys.readouterr().err


def test_a_sweep_is_drawn_over_its_components(tmp_path: Path) -> None:
    from orepa.bench.step_plots import plot

    planned = [(case, contestants[:2]) for case, contestants in sweep(CASE)[:2]]
    results = step.run(step.Request(planned, rounds=1, seconds=1e-3), {})
    assert {row.case["components"] for row in results.timed} == {"1: origin", "2: +avg"}
    plot(results, tmp_path / "sweep.png")
    assert (tmp_path / "sweep.png").stat().st_size > 10_000
    step_tables.show(results)


def test_the_papers_ratios() -> None:
    ratios = {m: (b["OREPA"].seconds / next(iter(b.values())).seconds) for m, b in TABLE_4.items()}
    assert {m: round(r, 2) for m, r in ratios.items()} == {
        **{"resnet18": 1.40, "resnet34": 1.57, "resnet50": 1.24, "resnet101": 1.16},
        **{"repvgg_a0": 1.36, "repvgg_a1": 1.21, "repvgg_a2": 1.24},
    }
