"""Results of benchmarks: files, comparisons, tables, plots, the command line, and what the README shows of them."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import compare as compare_script
import plots
import pytest
import roofline
import squeeze as script
from compare import compare
from test_bench import Clock, FakeWatch, Planted, Slower, config

from orepa.bench import machine, tables
from orepa.bench import squeeze as bench
from orepa.bench.providers import Eager
from orepa.bench.results import Results, Row, load
from orepa.cli import main
from orepa.errors import UserError
from orepa.timing import CpuStopwatch

ROOT = Path(__file__).resolve().parents[2]


def row(provider: str = "eager", seconds: tuple[float, ...] = (1.0, 1.1, 1.2), **changes: Any) -> Row:
    case = {"out": 6, "in": 4, "k": 3, "groups": 1, "topology": "orepa", "dtype": "fp32", "device": "cpu"}
    return Row(**{"case": case, "provider": provider, "processes": [list(seconds)] if seconds else [], **changes})


def results(*rows: Row, complete: bool = True) -> Results:
    settings = {"providers": list(dict.fromkeys(r.provider for r in rows))}
    return Results("squeeze", machine.environment(), settings, list(rows), complete)


# --- files ----------------------------------------------------------------------------------------------------------------


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    wrong = row("planted", (), status="wrong", reason="the kernel is off", facts={"weight_error": 0.5})
    before = results(row(processes=[[1.0, 1.1, 1.2], [1.0]]), wrong, row("copy", floor=True))
    before.lost = ["process 2 of 3 was killed by SIGKILL"]
    before.save(tmp_path / "a.json")
    assert load(tmp_path / "a.json") == before
    content = json.loads((tmp_path / "a.json").read_text())
    assert (content["schema"], content["version"]) == ("orepa.bench", 2)
    assert {"commit", "torch", "threads", "processor", "date"} <= content["environment"].keys()
    assert content["rows"][0]["summary"]["median_us"] == pytest.approx(1.05e6)
    assert "[1.0, 1.1, 1.2]" in (tmp_path / "a.json").read_text()  # samples on one line
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_files_of_version_1_are_those_of_one_process(tmp_path: Path) -> None:
    after = results(row(), row("planted", (), status="failed"))
    after.save(tmp_path / "a.json")
    content = json.loads((tmp_path / "a.json").read_text())
    for entry in content["rows"]:
        entry["seconds"] = [s for samples in entry.pop("processes") for s in samples]
    del content["lost"]
    (tmp_path / "a.json").write_text(json.dumps({**content, "version": 1}))
    assert load(tmp_path / "a.json") == after


def test_other_work_is_noticed() -> None:
    other = machine.OtherWork()
    with other:
        sum(range(10**6))
    if not Path("/proc/stat").exists():
        assert other.cores is None
    else:
        assert 0 <= other.cores <= machine.environment()["cores"] + 1
        with other:
            other._start = (other._start[0] - 3000.0, *other._start[1:])  # as if others had worked that long
        assert other.cores > 100


def test_nan_is_written_as_json_knows_it(tmp_path: Path) -> None:
    results(row("planted", (), status="wrong", facts={"weight_error": float("nan")})).save(tmp_path / "a.json")
    assert load(tmp_path / "a.json").rows[0].facts == {"weight_error": "nan"}


def _changed(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        results(row()).save(path)
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))

    return write


DAMAGES = {
    "missing": (lambda path: None, "cannot read"),
    "no JSON": (lambda path: path.write_text("{"), "is not JSON"),
    "binary": (lambda path: path.write_bytes(b"\xff\xfe\x00"), "is not JSON"),
    "other JSON": (lambda path: path.write_text("[1]"), "not a result of"),
    "other schema": (_changed(lambda c: c.update(schema="x")), "not a result of"),
    "version": (_changed(lambda c: c.update(version=99)), "version 99"),
    "no rows": (_changed(lambda c: c.pop("rows")), "it has no 'rows'"),
    "no environment": (_changed(lambda c: c.pop("environment")), "it has no 'environment'"),
    "no provider": (_changed(lambda c: c["rows"][0].pop("provider")), "it has no 'provider'"),
    "rows no list": (_changed(lambda c: c.update(rows=3)), "damaged"),
    "no samples": (_changed(lambda c: c["rows"][0].update(processes=[])), "has samples of 0 processes"),
    "a process without": (_changed(lambda c: c["rows"][0].update(processes=[[1.0], []])), "must be positive numbers"),
    "samples of none": (_changed(lambda c: c["rows"][0].update(processes=[1.0])), "must be positive numbers"),
    "samples no numbers": (_changed(lambda c: c["rows"][0].update(processes=[["1"]])), "must be positive numbers"),
    "negative": (_changed(lambda c: c["rows"][0].update(processes=[[-1.0]])), "must be positive numbers"),
    "lost": (_changed(lambda c: c.update(lost=3)), "lost is no list"),
    "status": (_changed(lambda c: c["rows"][0].update(status="fine")), "status 'fine'"),
    "twice": (_changed(lambda c: c["rows"].append(c["rows"][0])), "two rows are the same"),
}


@pytest.mark.parametrize("name", list(DAMAGES))
def test_a_damaged_file_is_refused_in_one_line(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damage, message = DAMAGES[name]
    damage(tmp_path / "a.json")  # type: ignore[operator]
    results(row()).save(tmp_path / "b.json")
    assert compare_script.main([str(tmp_path / "b.json"), str(tmp_path / "a.json")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("compare: error: ") and message in line
    assert main(["bench", "show", str(tmp_path / "a.json")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("orepa: error: ") and message in line


def test_partial_results_are_written_as_they_come(tmp_path: Path) -> None:
    path, seen = tmp_path / "a.json", []

    class Watch(FakeWatch):
        def calls(self, task: object) -> int:
            if path.exists():
                seen.append(load(path))
            return 1

    bench.run(config(out=path), {"eager": Eager()}, stopwatch=Watch())
    assert [(len(r.rows), r.complete) for r in seen] == [(1, False), (2, False)]
    assert load(path).complete and len(load(path).rows) == 3


def test_what_the_host_takes_is_shown_where_it_was_measured(capsys: pytest.CaptureFixture[str]) -> None:
    tables.show(results(row(facts={"launches": 3, "host_us": 12.34}), row("compile", facts={"launches": 1})))
    text = capsys.readouterr().out
    assert "host µs" in text and "12.3" in text
    tables.show(results(row()))
    assert "host µs" not in capsys.readouterr().out


# --- comparisons ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cuda", "order", "verdict"),
    [
        (2.0, ("triton", "cuda", "reference"), "asks triton first: as it should be"),
        (2.0, ("cuda", "triton"), "asks cuda first: change TRITON_FIRST"),
        (0.5, ("cuda", "triton"), "asks cuda first: as it should be"),
        (0.5, ("triton", "cuda"), "asks triton first: change TRITON_FIRST"),
    ],
)
def test_measured_squeezes_say_whether_the_order_is_right(cuda: float, order: tuple[str, ...], verdict: str) -> None:
    rows = [row("triton", (1.0,)), row("cuda", (cuda,)), row("cuda", (9.0,), mode="backward"), row("eager")]
    advice = tables.order_advice(rows, order)
    assert advice.startswith(f"cuda / triton: {cuda:.2f} (geometric mean of 1 rows") and verdict in advice
    assert not tables.order_advice(rows, ("cuda", "cpu")) and not tables.order_advice(rows[1:], order)


def test_a_run_against_itself_is_no_difference() -> None:
    run = bench.run(config(rounds=5), {"eager": Eager(), "copy": script.all_providers()["copy"]})
    comparison = compare(run, run)
    assert [pair.verdict for pair in comparison.pairs] == ["no difference"] * 6
    one = "was measured in one process: what differs between processes is not in its spread"
    assert comparison.notes == [f"A {one}", f"B {one}"]
    assert comparison.conclusion == "no difference in any of 6 measurements"


def test_a_planted_slow_down_is_caught() -> None:
    def run(seconds: float) -> Results:
        clock = Clock()
        providers = {"eager": Eager(), "planted": Slower(clock, seconds)}
        return bench.run(config(rounds=5), providers, stopwatch=CpuStopwatch(clock))

    def verdicts(before: Results, after: Results) -> dict[tuple[str, str], str]:
        return {(p.before.provider, p.before.mode): p.verdict for p in compare(before, after).pairs}

    as_it_was, planted = run(0.0), run(0.01)
    found = verdicts(as_it_was, planted)
    # The forward that a backward pass needs does not count as its time.
    assert {key for key, verdict in found.items() if verdict == "slower"} == {
        ("planted", "forward"),
        ("planted", "both"),
    }
    assert set(found.values()) == {"slower", "no difference"}
    back = verdicts(planted, as_it_was)
    assert back[("planted", "forward")] == back[("planted", "both")] == "faster"
    assert set(verdicts(run(0.01), planted).values()) == {"no difference"}


@pytest.mark.parametrize(
    ("before", "after", "verdict"),
    [
        ((1.0, 1.0, 1.0), (1.1, 1.1, 1.1), "slower"),
        ((1.0, 1.0, 1.0), (0.9, 0.9, 0.9), "faster"),
        ((0.8, 1.0, 1.2), (0.9, 1.1, 1.3), "no difference"),
        ((1.0, 1.0, 1.0), (0.5, 1.1, 1.7), "no difference"),
    ],
)
def test_noise_decides(before: tuple[float, ...], after: tuple[float, ...], verdict: str) -> None:
    (pair,) = compare(results(row(seconds=before)), results(row(seconds=after))).pairs
    assert pair.verdict == verdict


def test_what_speaks_against_a_comparison_is_said() -> None:
    a, b = results(row(), row("compile")), results(row(), row("compile", (), status="failed"), complete=False)
    b.environment["threads"] = -1
    notes = " / ".join(compare(a, b).notes)
    assert "threads differs" in notes and "compile, forward: ok in A, failed in B" in notes and "B is partial" in notes
    with pytest.raises(UserError, match="different benchmarks"):
        compare(a, Results("eval_cache", {}, rows=[row()]))
    with pytest.raises(UserError, match="nothing|no timed"):
        compare(a, results(row("other")))


# --- the command line -------------------------------------------------------------------------------------------------------


def test_squeeze_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for package in ("scipy", "matplotlib"):
        pytest.importorskip(package)
    out, picture = tmp_path / "a.json", tmp_path / "a.png"
    options = "--shapes 6,4,3;8,4,1 --dtypes fp32,bf16 --providers eager,gemms,copy,cuda --rounds 2 --seconds 60 --processes 2"
    assert script.main([*options.split(), "--device", "cpu", "--out", str(out), "--plot", str(picture)]) == 0
    text = capsys.readouterr().out
    for word in (
        "4->6 3x3",
        "4->8 1x1",
        "eager",
        "gemms (floor)",
        "copy (floor)",
        "±",
        "fp32",
        "bf16",
        "cuda: skipped",
    ):
        assert word in text
    found = load(out)
    assert found.complete and len(found.rows) == 2 * 2 * 4 * 3
    assert all([len(samples) for samples in r.processes] == [2, 2] for r in found.timed)
    assert found.settings["processes"] == 2 and "the medians of 2 processes" in text
    assert picture.read_bytes().startswith(b"\x89PNG")
    picture.unlink()
    assert main(["bench", "show", str(out)]) == 0
    assert plots.main([str(out), str(picture)]) == 0
    assert "4->6 3x3" in capsys.readouterr().out and picture.exists()
    assert roofline.main([str(out)]) == 0
    rates = capsys.readouterr().out
    assert "GFLOP/s" in rates and rates in text
    assert compare_script.main([str(out), str(out)]) == 0
    assert "no difference in any of 36 measurements" in capsys.readouterr().out


def test_a_wrong_provider_is_loud(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    providers = {"eager": Eager(), "planted": Planted(lambda kernel: kernel * 1.01)}
    monkeypatch.setattr("orepa.bench.providers.all_providers", lambda: providers)
    options = ["--shapes", "6,4,3", "--rounds", "1", "--seconds", "0.1", "--mode", "forward", "--device", "cpu"]
    assert main(["bench", "squeeze", *options]) == 1
    text = capsys.readouterr().out
    assert "WRONG" in text and "planted: wrong: the kernel is off by 1.0e-02" in text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--shapes 8,8,3,3", "must divide"),
        ("--dtypes fp8", "--dtypes must be among"),
        ("--providers eager,magic", "--providers must be among"),
        ("--providers ,", "--providers must be among"),
        ("--topology magic", "--topology must be among"),
        ("--shapes 8,8,2 --topology orepa", "does not fit"),
        ("--out nowhere/a.json", "there is no folder"),
        ("--rounds 0", "whole number"),
        ("--seconds nan", "above 0"),
    ],
)
def test_mistakes_are_one_line(options: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    try:
        code = main(["bench", "squeeze", *options.split(" ")])
    except SystemExit as end:
        code = end.code  # type: ignore[assignment]
    captured = capsys.readouterr()
    assert code == 2 and captured.out == ""
    (line,) = captured.err.splitlines()
    assert line.startswith("orepa: error: ") and message in line


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--models resnet19", "--models must be"),
        ("--plot nowhere/a.png", "there is no folder"),
        ("--processes 0", "whole number"),
        ("--shapes 8,8,3 --models all", "not allowed with"),
    ],
)
def test_mistakes_in_the_script_are_one_line(options: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    try:
        code = script.main(options.split(" "))
    except SystemExit as end:
        code = end.code  # type: ignore[assignment]
    captured = capsys.readouterr()
    assert code == 2 and captured.out == ""
    (line,) = captured.err.splitlines()
    assert line.startswith("squeeze: error: ") and message in line


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert script.main(["--plot", "a.png"]) == 2
    assert "scipy, matplotlib" in capsys.readouterr().err


def test_cuda_without_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(UserError, match="no CUDA device"):
        bench.run(config(device="cuda"), {"eager": Eager()})


# --- the README -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def render() -> ModuleType:
    spec = importlib.util.spec_from_file_location("render", ROOT / "benchmarks" / "render.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def document(tmp_path: Path, body: str) -> list[str]:
    (tmp_path / "README.md").write_text(f"before\n{body}\nafter\n")
    return ["--document", str(tmp_path / "README.md"), "--results", str(tmp_path)]


def test_render_writes_what_was_measured(render: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "cpu").mkdir()
    rows = [row(mode="both"), row("compile", (0.5, 0.55, 0.6), mode="both"), row("copy", mode="both", floor=True)]
    results(*rows).save(tmp_path / "cpu" / "squeeze.json")
    arguments = document(tmp_path, "<!-- results:cpu/squeeze -->\nold\n<!-- /results:cpu/squeeze -->")
    assert render.main([*arguments, "--check"]) == 1
    assert render.main(arguments) == 0
    assert render.main([*arguments, "--check"]) == 0
    text = (tmp_path / "README.md").read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "old" not in text
    assert "| µs, forward + backward | `eager` | `compile` | copy (floor) |" in text
    assert "| 1,100,000 ±5% | 550,000 ±5% (2.00×) | 1,100,000 ±5% |" in text
    assert f"commit {machine.environment()['commit']}" in text


def test_render_branch_order(render: ModuleType, tmp_path: Path) -> None:
    case = {"topology": "dbb", "out": 8, "in": 4, "k": 3, "stride": 2, "groups": 1, "batch": 8, "image": 64, "size": 16}
    rows = [Row(case, name, "both", processes=[[s, 2 * s]]) for name, s in (("squeeze", 0.4), ("branch", 0.3))]
    rows.append(Row(case, "auto", "both", processes=[[0.3]], facts={"chosen": "branch"}))
    model = {"model": "resnet18", "batch": 8, "size": 64}
    rows += [Row(model, name, "step", processes=[[s]]) for name, s in (("plain", 0.1), ("orepa, auto", 0.18))]
    Results("branch_order", machine.environment(), rows=rows).save(tmp_path / "order.json")
    assert render.main(document(tmp_path, "<!-- results:order -->\n<!-- /results:order -->")) == 0
    text = (tmp_path / "README.md").read_text()
    assert "| dbb, 4 → 8, stride 2 | **0.75** |" in text
    assert "| resnet18 | 8×64 | 100.0 | 1.80 |" in text


def test_render_eval_cache_and_training(render: ModuleType, tmp_path: Path) -> None:
    case = {"out": 8, "in": 8, "k": 3, "stride": 2, "groups": 1, "size": 8}
    rows = [Row(case, name, "eval", processes=[[s, s]]) for name, s in (("OREPAConv", 1.1e-5), ("Conv2d", 1e-5))]
    Results("eval_cache", machine.environment(), rows=rows).save(tmp_path / "eval.json")
    column = {"accuracy": 0.975, "changed": 0, "max_difference": 1e-6, "parameters": 1234, "inference_ms": 1.25}
    metrics = {
        "config": {"model": "test_resnet", "orepa": True, "epochs": 15},
        "data": {"val_images": 360},
        "outcome": {"batch_size": 64, "largest_logit": 9.0, "trained": {**column, "training_ms": 3.5}},
        "training_seconds": 21.4,
        "environment": {"threads": 1, "packages": {"torch": "2.11"}},
    }
    (tmp_path / "train.json").write_text(json.dumps(metrics))
    sections = "".join(f"<!-- results:{name} -->\n<!-- /results:{name} -->\n" for name in ("eval", "train"))
    assert render.main(document(tmp_path, sections)) == 0
    text = (tmp_path / "README.md").read_text()
    assert "| 8->8 3x3 s2 @8 | 11.0 ±0% | 10.0 ±0% | 1.100 |" in text
    assert "| accuracy on 360 validation images | 97.50% |" in text
    assert "| test_resnet, OREPA, 15 epochs in 21 s | trained |" in text


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("<!-- results:x -->\n<!-- /results:x -->", "cannot read"),
        ("<!-- results:x -->", "no twin"),
        ("<!-- /results:x -->", "no twin"),
        ("<!-- results:other -->\n<!-- /results:other -->", "neither"),
        ("<!-- results:damaged -->\n<!-- /results:damaged -->", "damaged"),
    ],
)
def test_render_refuses(
    render: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], body: str, message: str
) -> None:
    (tmp_path / "other.json").write_text("{}")
    (tmp_path / "damaged.json").write_text('{"outcome": 3}')
    arguments = document(tmp_path, body)
    before = (tmp_path / "README.md").read_text()
    assert render.main(arguments) == 2
    assert message in capsys.readouterr().err
    assert (tmp_path / "README.md").read_text() == before


def test_the_readme_says_what_the_results_say() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "render.py", "--check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_committed_results_can_be_read() -> None:
    files = [p for p in (ROOT / "benchmarks" / "results").rglob("*.json") if "orepa.bench" in p.read_text()[:200]]
    for path in files:
        results = load(path)  # each row of `reparam_accuracy` is a whole training, and there can always be more
        assert results.complete or results.benchmark == "reparam_accuracy", path


def test_render_shows_steps_of_several_sizes_a_line_each(render: ModuleType, tmp_path: Path) -> None:
    rows = []
    for size, plain in ((64, 0.1), (224, 1.25)):
        case = {
            "model": "resnet18",
            "batch": 8,
            "size": size,
            "autocast": "none",
            "layout": "contiguous",
            "device": "cpu",
        }
        for name, factor in (("plain", 1.0), ("orepa-cpu", 4.0), ("dbb-offline", 3.4)):
            facts = {"parameter_count": 1}
            rows.append(Row(case, name, "step", processes=[[0.9 * plain * factor, plain * factor]], facts=facts))
        rows.append(Row(case, "orepa-cuda", "step", status="skipped", reason="no device"))
    rows[-2].status, rows[-2].reason, rows[-2].processes = "failed", "no memory", []
    Results("step", machine.environment(), rows=rows, complete=True).save(tmp_path / "steps.json")
    arguments = document(tmp_path, "<!-- results:steps -->\n<!-- /results:steps -->")
    assert render.main(arguments) == 0 and render.main([*arguments, "--check"]) == 0
    header, _, *lines = (tmp_path / "README.md").read_text().splitlines()[2:6]
    assert header == "| model | batch×px | plain, ms | OREPA (cpu), × | DBB offline, × | spread |"
    assert lines[0] == "| resnet18 | 8×64 | 95.0 | 4.00 | 3.40 | ±3% |"
    assert lines[1] == "| resnet18 | 8×224 | 1,187.5 | 4.00 | failed | ±3% |"


@pytest.mark.parametrize("style", ["terminal", "markdown"])
def test_tables_for_the_terminal_and_for_markdown(style: str) -> None:
    text = tables.render(["block", "µs"], [["3x3", "1,234"], ["7x7 stem", "5"]], style)  # type: ignore[arg-type]
    expected = {
        "terminal": "block        µs\n--------  -----\n3x3       1,234\n7x7 stem      5",
        "markdown": "| block | µs |\n| --- | ---: |\n| 3x3 | 1,234 |\n| 7x7 stem | 5 |",
    }
    assert text == expected[style]
