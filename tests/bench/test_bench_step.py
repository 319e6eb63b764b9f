"""``orepa bench step``: what it times is right, what is wrong it says, and the user sees both."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import plots
import pytest
import torch
from torch import nn

pytest.importorskip("timm")

import orepa.modules.step
import orepa_kernels
from orepa.bench import step
from orepa.bench.results import load
from orepa.bench.runner import BenchConfig
from orepa.bench.variants import OREPA, Variant, all_variants, choose, in_orders, squeezing
from orepa.cli import main
from orepa.errors import UserError
from orepa.modules.branch_order import ORDERS
from orepa.timing import CpuStopwatch
from orepa.train.model import create_plain, model_arguments

CASE = step.StepCase("test_resnet", 2, 32)  # timm's own toy


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


def measure_all(variants: list[Variant], **options: Any) -> step.Results:
    cases = [(options.pop("case", CASE), variants)]
    how = {name: options.pop(name, None) for name in ("timed", "out")}
    return step.run(BenchConfig(cases=cases, modes=["step"], rounds=1, seconds=1e-3, **how), **options)


# --- right before fast --------------------------------------------------------------------------------------------------


def test_every_variant_that_runs_is_right_and_timed(tmp_path: Path) -> None:
    out = tmp_path / "step.json"
    seen: list[nn.Module] = []

    def compiler(model: nn.Module) -> nn.Module:
        seen.append(model)
        return model

    results = measure_all(list(all_variants().values()), compiler=compiler, out=out)
    rows = {row.provider: row for row in results.rows}
    assert rows.keys() == all_variants().keys() and len(seen) == 2
    assert {row.status for row in rows.values()} <= {"ok", "skipped"}
    assert {"plain", "plain-compile", "orepa-reference", "orepa-compile", "dbb-offline", "repvgg-offline"} <= {
        row.provider for row in results.timed
    }
    assert rows["orepa-compile"].facts["logits_error"] < 1e-5
    assert rows["orepa-reference"].facts["parameter_count"] > rows["plain"].facts["parameter_count"]
    assert {"orepa-cpu", "orepa-cpu-once", "orepa-cpu-alone"} <= rows.keys()
    assert all(row.seconds for row in results.timed)
    assert [row.key for row in load(out).rows] == [row.key for row in results.rows] and load(out).complete


def broken(how: Callable[[nn.Module], None], name: str = "broken") -> Variant:
    def build(model: nn.Module) -> nn.Module:
        built = all_variants()[OREPA].build(model)
        how(built)
        return built

    return Variant(name, build, OREPA)


def test_a_wrong_variant_is_reported_and_not_timed() -> None:
    def spoil(model: nn.Module) -> None:
        conv = squeezing(model)[-1]
        conv.register_forward_hook(lambda _module, _inputs, output: output * 1.2 + 0.1 * output.roll(1, 1))

    results = measure_all([all_variants()[OREPA], broken(spoil)])
    row = results.rows[1]
    assert (row.provider, row.status, row.seconds) == ("broken", "wrong", [])
    assert "differ by" in row.reason


def test_an_infinite_loss_and_an_error_are_results_too() -> None:
    def explode(model: nn.Module) -> None:
        squeezing(model)[0].register_forward_hook(lambda _module, _inputs, output: output * float("nan"))

    def fail(_model: nn.Module) -> None:
        raise RuntimeError("no luck")

    results = measure_all(
        [broken(explode, "first"), all_variants()[OREPA], broken(explode, "nan"), broken(fail, "fails")]
    )
    found = {row.provider: (row.status, row.reason) for row in results.rows}
    assert found["nan"] == ("wrong", "its loss is nan")
    assert found["fails"] == ("failed", "RuntimeError: no luck")
    assert found["first"][0] == "skipped" and "did not run" in found["first"][1]


def test_compilation_is_over_before_the_clock_runs() -> None:
    log: list[str] = []

    class Watch(CpuStopwatch):
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

    measure_all(choose(["plain-compile"], all_variants()), compiler=compiler, stopwatch=Watch())
    assert log.count("compiled") == 1 and log.index("timed") > log.index("compiled")


@pytest.mark.parametrize(("autocast", "layout"), [("bf16", "channels_last"), ("bf16", "contiguous")])
def test_other_precisions_and_layouts(autocast: str, layout: str) -> None:
    case = step.StepCase(CASE.model, 2, 32, autocast, layout)
    compiled = choose(["orepa-compile"], all_variants())
    results = measure_all(compiled, case=case, compiler=lambda model: model)
    assert [row.status for row in results.rows] == ["ok", "ok"]


def test_there_are_no_graphs_on_the_cpu() -> None:
    with pytest.raises(UserError, match="no CUDA graphs on the CPU"):
        step.run(BenchConfig(cases=[(CASE, [])], modes=["step"], launches=("graph",)))


def test_gradients_accumulate_over_batches() -> None:
    model = all_variants()[OREPA].build(plain_model()).train()
    images, labels = torch.randn(2, 3, 32, 32), torch.arange(2)
    expected = step.TrainingStep(model, images, labels).output()
    for once in (False, True):
        found = step.TrainingStep(model, images, labels, accumulate=3, once=once)
        forwards: list[object] = []
        hook = model.register_forward_hook(lambda *_, forwards=forwards: forwards.append(1))
        assert found.output().compare(expected, None)[1] == ""
        hook.remove()
        assert len(forwards) == 3


@pytest.mark.parametrize("way", ["", "-once", "-alone"])
def test_a_step_squeezes_together_once_or_alone(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    squeezed: list[int] = []

    def record(real: Callable[..., Any], blocks: Any, *args: Any, **how: Any) -> Any:
        squeezed.append(len(blocks))
        return real(blocks, *args, **how)

    for module, name in ((orepa.modules.step, "squeeze_together"), (orepa_kernels, "squeeze")):
        monkeypatch.setattr(module, name, functools.partial(record, getattr(module, name)))
    variant = in_orders(all_variants(), ["squeeze"])[f"orepa-cpu{way}-squeeze"]
    model = variant.build(plain_model()).train()
    made = step.TrainingStep(model, torch.randn(2, 3, 32, 32), torch.arange(2), accumulate=3, once=variant.once)
    made()  # lets each block say what it needs
    squeezed.clear()
    made()
    blocks = len(squeezing(model))
    assert squeezed == {"": [blocks] * 3, "-once": [blocks], "-alone": [1] * 3 * blocks}[way]


@pytest.mark.parametrize("order", ORDERS)
def test_orders_are_variants_of_what_squeezes(order: str) -> None:
    plain, found = all_variants(), in_orders(all_variants(), [order])
    ending = "" if order == "auto" else f"-{order}"
    same = ("plain", "orepa-reference", "orepa-compile", "dbb", "repvgg")
    assert list(found) == [name if name.startswith(same) else name + ending for name in plain]
    blocks = squeezing(found[f"orepa-cpu{ending}"].build(plain_model()))
    assert {block.order for block in blocks if block.kernel_size == (3, 3)} == {order}


# --- what the user sees -------------------------------------------------------------------------------------------------


def test_the_command_prints_a_table_and_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, png = tmp_path / "a.json", tmp_path / "a.png"
    options = f"--models {CASE.model} --inputs 2x32,3x64 --rounds 1 --seconds 0.01 --threads 1".split()
    options += ["--variants", "plain,orepa-cpu,dbb-offline", "--out", str(out)]
    assert main(["bench", "step", *options]) == 0
    printed = capsys.readouterr().out
    for text in ("orepa-cpu", "images/s", "batch 2, 32 px", "batch 3, 64 px"):
        assert text in printed
    results = load(out)
    # The reference, which the weights come from, is checked against and not timed.
    assert [row.provider for row in results.rows] == ["plain", "orepa-cpu", "dbb-offline"] * 2
    assert [(row.case["batch"], row.case["size"]) for row in results.rows] == [(2, 32)] * 3 + [(3, 64)] * 3
    assert results.environment["busy_cores_of_others"] is None or results.environment["busy_cores_of_others"] >= 0
    assert plots.main([str(out), str(png)]) == 0
    assert png.read_bytes()[:4] == b"\x89PNG"
    assert main(["bench", "show", str(out)]) == 0
    assert capsys.readouterr().out.splitlines()[:5] == printed.splitlines()[:5]


def test_accumulation_and_orders_are_cases_and_variants(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "a.json"
    options = (
        f"--models {CASE.model} --inputs 2x32 --grad-accum 1,3 --order squeeze,auto --rounds 1 --seconds 0.01".split()
    )
    assert main(["bench", "step", *options, "--variants", "plain,orepa-cpu-once", "--out", str(out)]) == 0
    results = load(out)
    assert [row.provider for row in results.rows] == ["plain", "orepa-cpu-once", "orepa-cpu-once-squeeze"] * 2
    assert {row.status for row in results.rows} == {"ok"}
    assert [row.case.get("accumulate") for row in results.rows] == [None] * 3 + [3] * 3
    assert "3 batches of 2, 32 px" in capsys.readouterr().out


def test_processes_train_together(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "a.json"
    options = (
        f"--models {CASE.model} --inputs 2x32 --grad-accum 2 --processes 2 --rounds 2 --threads 1 --device cpu".split()
    )
    options += ["--variants", "plain,plain-compile,orepa-cpu,orepa-cpu-once", "--out", str(out)]
    assert main(["bench", "step", *options]) == 0
    results, printed = load(out), capsys.readouterr().out
    assert [(row.provider, row.status) for row in results.rows] == [
        ("plain", "ok"),
        ("plain-compile", "skipped"),
        ("orepa-cpu", "ok"),
        ("orepa-cpu-once", "ok"),
    ]
    for row in results.timed:  # float32, once per step
        if row.provider != "orepa-cpu-once":
            assert row.facts["reduced_bytes"] == 4 * row.facts["parameter_count"]
        assert (row.case["processes"], len(row.seconds)) == (2, 2)
    plain, whole, once = (row.facts["reduced_bytes"] for row in results.timed)
    assert plain <= once < 1.1 * plain < whole  # kernels, and what the processes compare
    assert "2 batches of 2, 32 px, 2 processes" in printed and "reduced MB" in printed


def test_a_process_that_fails_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "step", "--models", "nonsense", "--processes", "2", "--device", "cpu"]) == 2
    assert "timm has no model" in capsys.readouterr().err


def test_a_twin_that_is_not_timed_still_checks() -> None:
    def spoil(model: nn.Module) -> None:
        squeezing(model)[-1].register_forward_hook(lambda _module, _inputs, output: output * 1.2)

    results = measure_all([all_variants()[OREPA], broken(spoil)], timed=["broken"])
    assert [(row.provider, row.status) for row in results.rows] == [("broken", "wrong")]


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--variants", "none"], "--variants must be among plain"),
        (["--batch-sizes", "1"], "from 2 on"),
        (["--models", "nonsense"], "timm has no model"),
        (["--inputs", "8x64,1x64"], "from 2 on"),
        (["--inputs", "8"], "pairs such as 8x64"),
        (["--order", "fast"], "--order must be among auto, squeeze, branch"),
        (["--inputs", "8x64", "--img-size", "64"], "leave these out"),
        (["--cuda-graph", "on", "--device", "cpu"], "no CUDA graphs"),
        (["--out", "missing/a.json"], "there is no folder"),
    ],
)
def test_mistakes_are_one_line(arguments: list[str], complaint: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "step", *arguments]) == 2
    assert complaint in capsys.readouterr().err
