"""The ablation: what it trains is what its tables say, nothing finished is lost, and its numbers are right."""

from __future__ import annotations

import functools
import os
import re
import signal
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import nn

pytest.importorskip("timm")
pytest.importorskip("lightning")
pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

from ablation import run as script
from ablation import training
from ablation.data import draw
from ablation.models import DBB_BRANCHES, variants
from ablation.rows import BENCHMARK, STEP, TABLES, TRAIN
from ablation.tables import VariantRuns, estimate, markdown, paired, shown
from scipy import stats

from orepa import OREPAConv
from orepa.bench import machine
from orepa.bench.results import Results, Row, load
from orepa.errors import UserError
from orepa.surgery.consumer_graph import is_norm
from orepa.topology import ConvSpec
from orepa.topology.catalogue import dbb
from orepa.topology.catalogue import orepa as orepa_block
from orepa.topology.lowering import SCALINGS
from orepa.train.data import load_data
from orepa.train.images import ImageData
from orepa.train.runtime import Stopped

ROOT = Path(__file__).resolve().parents[2]
SPEC = ConvSpec(8, 8, (3, 3))


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def tiny(
    out: Path | None = None, rows: tuple[str, ...] = ("plain", "rep1x1"), **changes: Any
) -> training.AblationConfig:
    return training.AblationConfig(
        **{"rows": rows, "seeds": 1, "train_images": 30, "epochs": 1, "rounds": 0, "limit": 64, "out": out, **changes}
    )


def run(config: training.AblationConfig) -> tuple[Results, list[str]]:
    said: list[str] = []
    return training.run(config, said.append), said


@functools.cache
def digits(limit: int | None = None) -> ImageData:
    return load_data(tiny(limit=limit).recipe(0), None, {})


@functools.cache
def model(name: str) -> nn.Module:
    return training.build(name, tiny().recipe(0), digits())


# --- the script -----------------------------------------------------------------------------------------------------------


def test_quick_trains_times_and_writes_everything(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, png = tmp_path / "a.json", tmp_path / "a.png"
    assert script.main(["--quick", "--rows", "plain,rep1x1", "--out", str(out), "--plot", str(png)]) == 0
    results = load(out)
    assert results.complete and png.read_bytes().startswith(b"\x89PNG")
    assert [(row.mode, row.provider) for row in results.rows] == [
        (mode, name) for mode in (TRAIN, STEP) for name in ("plain", "rep1x1")
    ]
    assert all(0 <= row.facts["correct"] <= row.facts["images"] == 64 + 34 for row in results.rows[:2])
    assert {"commit", "torch", "threads", "busy_cores_of_others"} <= results.environment.keys()
    assert results.settings["protocol"]["recipe"]["lr"] == 0.1
    printed = capsys.readouterr().out
    assert markdown(results) in printed and "| plain |" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rows", "plain,nonsense"], "--rows must be among plain, .* got nonsense"),
        (["--rows", ","], "got none"),
        (["--train-images", "65"], "from 1 to 64, got 65"),
        (["--train-images", "few"], "a number or `all`"),
        (["--rounds", "-1"], "0 or more"),
        (["--out", "no/such/folder/a.json"], "there is no folder"),
    ],
)
def test_what_cannot_be_met_is_refused(capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    assert script.main(["--quick", *arguments]) == 2
    captured = capsys.readouterr()
    assert re.search(message, captured.err) and "seed 0" not in captured.out


# --- nothing finished is lost ---------------------------------------------------------------------------------------------


def test_an_interrupted_ablation_goes_on_where_it_was(tmp_path: Path) -> None:
    whole, _ = run(tiny(tmp_path / "whole.json", seeds=2))
    request = tiny(tmp_path / "a.json", seeds=2)
    told: list[str] = []

    def interrupt(line: str) -> None:
        told.append(line)
        if len(told) == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Stopped):
        training.run(request, interrupt)
    kept = load(tmp_path / "a.json")
    assert len(kept.rows) == 3 and not kept.complete

    results, said = run(request)
    assert len(said) == 1 and said[0].startswith("seed 1  rep1x1")
    assert results.complete
    assert [(row.key, row.facts) for row in results.rows] == [(row.key, row.facts) for row in whole.rows]
    assert results == load(tmp_path / "a.json")
    assert not run(request)[1]  # nothing is left to do


def test_more_seeds_and_rows_are_added_to_a_file(tmp_path: Path) -> None:
    run(tiny(tmp_path / "a.json", ("rep1x1",)))
    results, said = run(tiny(tmp_path / "a.json", ("plain",), seeds=2))
    assert len(said) == 2
    assert [(row.provider, row.case["seed"]) for row in results.rows] == [("plain", 0), ("plain", 1), ("rep1x1", 0)]


def test_a_file_of_another_protocol_is_kept(tmp_path: Path) -> None:
    out = tmp_path / "a.json"
    run(tiny(out, ("plain",)))
    before = out.read_bytes()
    for change, what in ({"epochs": 2}, "epochs 1 -> 2"), ({"train_images": 40}, "train_images 30 -> 40"):
        with pytest.raises(UserError, match=what):
            run(tiny(out, ("plain",), **change))
        assert out.read_bytes() == before
    results, _ = run(tiny(out, ("plain",), epochs=2, overwrite=True))
    assert results.settings["protocol"]["recipe"]["epochs"] == 2 and len(results.rows) == 1
    Results("step", machine.environment()).save(out)
    with pytest.raises(UserError, match="something else than results of ablation"):
        run(tiny(out, ("plain",)))


def test_a_recipe_that_had_fewer_options_is_the_same_protocol(tmp_path: Path) -> None:
    out = tmp_path / "a.json"
    results, _ = run(tiny(out, ("plain",)))
    del results.settings["protocol"]["recipe"]["precision"]  # as if the option had come later
    results.save(out)
    assert not run(tiny(out, ("plain",)))[1]


def test_another_commit_is_said_in_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "a.json"
    results, _ = run(tiny(out, ("plain",)))
    results.environment["commit"] = "earlier"
    results.save(out)
    after, _ = run(tiny(out, ("plain",), seeds=2))
    assert after.environment["commit"] == "earlier"
    assert [e["commit"] for e in after.environment["continued_with"]] == [machine.environment()["commit"]]
    assert "was begun with" in capsys.readouterr().err


def test_a_run_that_diverges_is_a_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build = training.build

    def exploding(name: str, *rest: Any) -> nn.Module:
        made = build(name, *rest)
        if name == "rep1x1":
            made.get_parameter("fc.weight").data.mul_(1e38)
        return made

    monkeypatch.setattr(training, "build", exploding)
    results, said = run(tiny(tmp_path / "a.json"))
    row = results.rows[1]
    assert (row.provider, row.status, row.facts["diverged"]) == ("rep1x1", "failed", True)
    assert row.reason in said[1] and "epoch 1" in row.reason
    assert str(tmp_path.parent) not in (tmp_path / "a.json").read_text()
    assert load(tmp_path / "a.json").rows == results.rows
    assert not run(tiny(tmp_path / "a.json"))[1]
    assert "| NaN |" in markdown(results) and "| 1 of 1 |" in markdown(results)


# --- what is trained ------------------------------------------------------------------------------------------------------


def blocks(name: str, size: int) -> list[OREPAConv]:
    return [m for m in model(name).modules() if isinstance(m, OREPAConv) and m.kernel_size == (size, size)]


def branch_names(block: OREPAConv) -> set[str]:
    return {branch.name for branch in block._lowered.branches}


def test_the_tables_show_every_variant_and_nothing_else() -> None:
    listed = {name for table in TABLES for name, _ in table.rows}
    assert listed == set(variants())
    for table in TABLES:
        assert table.base in dict(table.rows)


def test_components_come_one_by_one_until_the_block_of_the_catalogue() -> None:
    whole = set(dict(orepa_block(SPEC)))
    added = [branch_names(blocks(name, 3)[0]) for name in ("dbb-online", "prior", "dws")]
    assert added[0] == set(DBB_BRANCHES) == set(dict(dbb(SPEC)))
    assert [added[1] - added[0], added[2] - added[1]] == [{"prior"}, {"dws"}] and added[2] == whole
    assert not blocks("dws", 7) and [b.topology for b in blocks("stem", 7)] == ["deep_stem"]
    assert not blocks("stem", 1) and {b.topology for b in blocks("rep1x1", 1)} == {"rep1x1"}
    order = [name for name, _ in TABLES[1].rows if name != "dbb-offline"]
    parameters = [sum(p.numel() for p in model(name).parameters()) for name in order]
    assert parameters == sorted(set(parameters))
    assert all(len(blocks(name, 3)) == 7 for name in order[1:])


def test_scalings_are_all_there_are() -> None:
    found = {name: {b.scaling for b in blocks(name, 3)} for name in ("rep1x1", "scalar", "no-scaling")}
    assert found == {"rep1x1": {"vector"}, "scalar": {"scalar"}, "no-scaling": {"none"}}
    assert {s for some in found.values() for s in some} == set(SCALINGS)


def test_norms_are_where_the_rows_say() -> None:
    norms = {name: [m for m in model(name).modules() if is_norm(m)] for name in variants()}
    assert not norms["no-norm"] and not norms["plain-no-norm"]
    assert len(norms["dbb-offline"]) > len(norms["repvgg-offline"]) > len(norms["plain"])
    online = ("dbb-no-branch-norm", "repvgg-no-branch-norm", "dbb-online", "prior", "dws", "stem", "rep1x1", "scalar")
    assert {len(norms[name]) for name in online} == {len(norms["plain"])}
    # No residual branch starts at zero anywhere, because the offline blocks' could not.
    assert all(bool((m.get_parameter("weight") == 1).all()) for some in norms.values() for m in some)


def test_what_a_variant_does_not_swap_starts_the_same() -> None:
    for name in variants():
        assert torch.equal(model(name).get_parameter("fc.weight"), model("plain").get_parameter("fc.weight")), name
    assert torch.equal(model("dws").get_parameter("conv1.weight"), model("plain").get_parameter("conv1.weight"))


def test_few_images_to_learn_from_and_all_others_to_be_tested_on() -> None:
    data = digits()
    drawn = draw(data, 100, seed=3)
    places = set(drawn.train.places)
    assert len(places) == 100 and len(drawn.train) == len(data.train)
    assert {source for source, _ in places} == {data.train}
    assert set(Counter(data.train.load(i)[1] for _, i in places).values()) == {10}
    assert max(Counter(drawn.train.places).values()) - min(Counter(drawn.train.places).values()) == 1
    tested = set(drawn.val.places)
    assert len(tested) == len(drawn.val) == 1797 - 100 and not tested & places
    assert drawn.val.name(0) == data.val.name(0) and drawn.val.load(0)[1] == data.val.load(0)[1]
    assert set(draw(data, 100, seed=3).train.places) == places != set(draw(data, 100, seed=4).train.places)
    assert draw(data, len(data.train), seed=3) is data
    with pytest.raises(UserError, match="from 1 to 1437, got 0"):
        draw(data, 0, 0)


# --- arithmetic -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [2, 5, 11])
def test_estimates_are_those_of_numpy_and_scipy(count: int) -> None:
    values = numpy.random.default_rng(count).normal(95, 2, count)
    found = estimate(values.tolist())
    assert found is not None and found.std is not None and found.interval is not None
    assert found.mean == pytest.approx(values.mean()) and found.std == pytest.approx(values.std(ddof=1))
    wanted = stats.t.interval(0.95, count - 1, values.mean(), stats.sem(values))
    assert found.interval == pytest.approx(wanted, rel=1e-4)
    assert found.is_a_difference
    around_zero = estimate((values - values.mean()).tolist())
    assert around_zero is not None and not around_zero.is_a_difference


def test_one_value_has_no_spread_and_none_no_estimate() -> None:
    one = estimate([3.0])
    assert one is not None and (one.mean, one.std, one.interval, one.is_a_difference) == (3.0, None, None, False)
    assert estimate([]) is None


def test_differences_are_of_equal_seeds() -> None:
    found = paired({0: 91.0, 1: 96.0, 3: 50.0}, {1: 95.0, 0: 90.5, 2: 0.0})
    assert found is not None and (found.mean, found.count) == (0.75, 2)
    assert found.std == pytest.approx(numpy.std([0.5, 1.0], ddof=1))
    assert paired({0: 1.0}, {1: 1.0}) is None


def planted(**accuracies: list[float | None]) -> Results:
    """A file of made-up runs of 1000 test images; None diverged."""
    protocol = {"model": "m", "train_images": 9, "test_images": 1000, "recipe": {"epochs": 2}, "steps_per_epoch": 3}
    rows = []
    for name, values in accuracies.items():
        for seed, value in enumerate(values):
            facts: dict[str, Any] = {"parameters": 1234}
            if value is None:
                row = Row({"seed": seed}, name, TRAIN, status="failed", reason="lost", facts=facts | {"diverged": True})
            else:
                facts |= {"correct": round(10 * value), "images": 1000, "train_loss": 0.25, "test_loss": 1.0}
                row = Row({"seed": seed}, name, TRAIN, processes=[[1.0]], facts=facts)
            rows.append(row)
        rows.append(Row({}, name, STEP, processes=[[0.01 * len(rows)] * 3]))
    return Results(BENCHMARK, machine.environment(), {"protocol": protocol}, rows)


def test_the_tables_say_what_the_runs_say() -> None:
    text = markdown(
        planted(
            **{
                "plain": [90.0, 91.0, 92.0],
                "dbb-offline": [91.0, 92.1, 92.9],
                "dbb-online": [89.0, 92.0, 91.0],
                "rep1x1": [90.0, None, 92.5],
                "no-norm": [None, None, None],
            }
        )
    )
    lines = {line.split(" | ")[0].removeprefix("| "): line for line in text.splitlines() if line.startswith("| ")}
    assert lines["plain"] == "| plain | 91.00 ± 1.00 |  |  | 0.2500 | 0 of 3 | 1,234 | 1.00 |"
    assert "| 92.00 ± 0.95 | **+1.00 [+0.75, +1.25]** |  |" in lines["offline DBB"]
    assert "| 90.67 ± 1.53 | −0.33 [−3.20, +2.54] | −1.33 [−3.99, +1.32] |" in lines["online: linear scaling for norms"]
    # No difference: the two runs that did not diverge are a selection.
    assert lines["+ Rep-1×1: all of OREPA"].endswith("| 91.25 ± 1.77 |  |  | 0.2500 | 1 of 3 | 1,234 | 5.00 |")
    assert lines["without post-addition norm"].startswith("| without post-addition norm | NaN |  |  | 3 of 3 |")
    assert "minus “vector scaling”" in text and "**Branch-wise norms" not in text  # it would only repeat rows
    assert "as in 1 of 3 comparisons" in text and "about 0.1 of them" in text
    assert "1000 to test on (one is 0.10%)" in text and "3 seed(s)" in text


def test_only_tables_with_a_base_are_shown() -> None:
    assert [t.title for t in shown(planted(**{"dbb-online": [90.0], "prior": [91.0], "scalar": [92.0]}))] == []
    assert [t.base for t in shown(planted(**{"rep1x1": [90.0], "scalar": [92.0]}))] == ["rep1x1"]
    text = markdown(planted(**{"rep1x1": [90.0], "scalar": [92.0]}))
    assert "| scalar scaling | 92.00 | +2.00 | 0.2500 |" in text and "interval" not in text


# --- what is committed ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path", sorted((ROOT / "benchmarks" / "results").rglob("ablation*.json")), ids=lambda p: p.stem
)
def test_committed_runs_are_whole_and_stand_in_the_notes(path: Path) -> None:
    results = load(path)
    assert results.complete and results.benchmark == BENCHMARK
    names = {row.provider for row in results.rows}
    for name in names:
        runs = VariantRuns(results, name)
        assert runs.runs >= 5 and (runs.step_us or 0) > 0, name
    if path.stem == "ablation":
        assert names == set(variants()) and path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    notes = (ROOT / "benchmarks" / "NOTES.md").read_text(encoding="utf-8")
    marker = f"results:{path.parent.name}/{path.stem} -->"
    assert f"<!-- {marker}\n{markdown(results)}\n<!-- /{marker}" in notes
