"""Accuracy of re-parameterised nets: the forms are what their names say, nothing finished is lost, and the tables are right."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy
import pytest
import torch
from torch import nn

pytest.importorskip("timm")
pytest.importorskip("lightning")
pytest.importorskip("sklearn")
pytest.importorskip("torchvision")

from narrow_models import narrow
from reparam_accuracy import run as script
from reparam_accuracy.forms import forms, load_fashion
from reparam_accuracy.tables import BENCHMARK, FORMS, OFFLINE, ONLINE, markdown

from orepa import OREPAConv, convert
from orepa.bench import machine
from orepa.bench.results import Results, Row, load
from orepa.bench.variants import PLAIN
from orepa.errors import UserError
from orepa.surgery.norms import is_norm

ROOT = Path(__file__).resolve().parents[2]


def quick(out: Path, names: str, *more: str) -> int:
    arguments = ["--limit", "64", "--epochs", "2", "--seeds", "1", "--lrs", "0.03", "--forms", names, "--out", str(out)]
    threads = torch.get_num_threads()
    try:
        return script.main([*arguments, "--models", "repvgg_a0", *more])
    finally:
        torch.set_num_threads(threads)


def test_it_trains_and_continues_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("orepa.train.model.create_plain", lambda name, arguments, _size: narrow(name, **arguments))
    # PyTorch 2.11 crashes in channels_last convolutions of such nets on some CPUs, without a block of this project.
    monkeypatch.setattr(script, "_MEMORY_FORMAT", torch.contiguous_format)
    out = tmp_path / "a.json"
    assert quick(out, f"{PLAIN},{ONLINE}") == 0
    first = load(out)
    assert quick(out, f"{PLAIN},{OFFLINE}") == 0
    results = load(out)
    assert results.complete and [row.provider for row in results.rows] == [OFFLINE, ONLINE, PLAIN]
    assert [row for row in results.rows if row.provider != OFFLINE] == first.rows
    for row in results.rows:
        assert row.case == {"model": "repvgg_a0", "epochs": 2, "lr": 0.03, "seed": 0}
        assert len(row.seconds) == len(row.facts["curve"]) == 2 and row.facts["curve"][-1] == row.facts["correct"]
    assert markdown(results) in capsys.readouterr().out
    assert quick(out, PLAIN, "--limit", "65") == 2 and "another protocol" in capsys.readouterr().err
    assert quick(out, "nonsense") == 2 and "--forms must be among plain, " in capsys.readouterr().err


def test_forms_are_what_their_names_say() -> None:
    source = narrow("repvgg_a0", in_chans=1, num_classes=10)
    built = {name: form(source) for name, form in forms().items()}
    assert list(built) == list(FORMS) and all(m.training and m is not source for m in built.values())
    kinds: dict[str, list[list[nn.Module]]] = {
        name: [[m for m in model.modules() if test(m)] for test in (is_conv, is_norm, is_online)]
        for name, model in built.items()
    }
    merged = [m for m in convert(source.eval()).modules() if is_conv(m)]
    for name in (PLAIN, "plain-timm-init"):
        convs, norms, _ = kinds[name]
        assert [(c.weight.shape, c.stride, c.padding, c.groups) for c in convs] == [
            (c.weight.shape, c.stride, c.padding, c.groups) for c in merged
        ]
        assert len(norms) == len(convs) and all(c.bias is None for c in convs)
        assert all(bool((m.running_var == 1).all() and (m.weight == 1).all()) for m in norms)
    for name in (PLAIN, "plain-timm-init", OFFLINE, "as-it-comes-torch-init"):
        conv = max(kinds[name][0], key=lambda c: c.weight.numel())
        variance = 2 / 9 / len(conv.weight) if name in ("plain-timm-init", OFFLINE) else 1 / 3 / conv.weight[0].numel()
        assert float(conv.weight.detach().var()) == pytest.approx(variance, rel=0.05), name
    for name in (ONLINE, "online-preserved"):
        assert not kinds[name][0] and len(kinds[name][1]) == len(kinds[name][2]) == len(merged)
    images = torch.randn(2, 1, 32, 32)
    with torch.no_grad():
        assert torch.allclose(built["online-preserved"].eval()(images), source(images), atol=1e-4)
        assert not torch.allclose(built[ONLINE].eval()(images), source(images), atol=1e-2)
    for name in (OFFLINE, "as-it-comes-torch-init"):
        assert [type(m) for m in built[name].modules()] == [type(m) for m in source.modules()]
    assert all(
        torch.equal(m.get_parameter("head.fc.weight"), source.get_parameter("head.fc.weight")) for m in built.values()
    )


def is_conv(m: nn.Module) -> bool:
    return isinstance(m, nn.Conv2d)


def is_online(m: nn.Module) -> bool:
    return isinstance(m, OREPAConv)


def test_fashion_mnist_is_read_as_published(tmp_path: Path) -> None:
    pixels = numpy.random.default_rng(0).integers(0, 256, (6, 28, 28), numpy.uint8)
    for name, count in (("train", 6), ("t10k", 3)):
        for kind, values in (("images-idx3", pixels[:count]), ("labels-idx1", numpy.arange(count, dtype=numpy.uint8))):
            head = bytes([0, 0, 8, values.ndim]) + b"".join(size.to_bytes(4, "big") for size in values.shape)
            (tmp_path / f"{name}-{kind}-ubyte.gz").write_bytes(gzip.compress(head + values.tobytes()))
    data = load_fashion(tmp_path, 3)
    assert [data.train.load(i)[1] for i in range(len(data.train))] == [0, 2, 4] and len(data.val) == 3
    image, label = data.val.load(1)
    shown = data.transform(image)
    assert label == 1 and shown.shape == data.augment(image).shape == (1, 32, 32)
    assert torch.allclose((shown * 0.353 + 0.286)[0, 2:30, 2:30], torch.from_numpy(pixels[1]) / 255, atol=1e-6)
    (tmp_path / "t10k-labels-idx1-ubyte.gz").write_bytes(gzip.compress(head + b"ab"))
    with pytest.raises(UserError, match=r"cannot read .*t10k-labels-idx1-ubyte.gz: "):
        load_fashion(tmp_path, None)


def planted(runs: dict[tuple[str, int, float], tuple[float, list[float | None]]]) -> Results:
    """A file of made-up runs: by form, epochs and learning rate the seconds, and the accuracies by seed; None diverged."""
    rows = []
    for (form, epochs, lr), (seconds, accuracies) in runs.items():
        for seed, accuracy in enumerate(accuracies):
            case = {"model": "net", "epochs": epochs, "lr": lr, "seed": seed}
            if accuracy is None:
                rows.append(Row(case, form, "train", status="failed", reason="lost", facts={"diverged": True}))
            else:
                facts = {"correct": round(10 * accuracy), "images": 1000}
                rows.append(Row(case, form, "train", processes=[[seconds / epochs] * epochs], facts=facts))
    protocol = {"data": "digits", "train_images": 9, "test_images": 1000, "recipe": {"batch_size": 64}}
    return Results(BENCHMARK, machine.environment(), {"protocol": protocol}, rows)


def test_the_tables_say_what_the_runs_say() -> None:
    text = markdown(
        planted(
            {
                (PLAIN, 10, 0.1): (10.0, [50.0, None, 50.0]),
                (PLAIN, 10, 0.03): (10.0, [90.0, 91.0, 92.0]),
                (PLAIN, 10, 0.01): (10.0, [99.0]),
                (ONLINE, 10, 0.1): (11.0, [95.0, 96.0, 97.1]),
                (ONLINE, 10, 0.03): (11.0, [94.0, 95.0, 96.0]),
                (OFFLINE, 10, 0.1): (40.0, [80.0, 80.0, 80.0]),
                (OFFLINE, 10, 0.03): (40.0, [85.0, 86.0, 99.0]),
                (ONLINE, 40, 0.1): (44.0, [97.0, 98.0, 99.0]),
                (OFFLINE, 80, 0.1): (320.0, [99.0, 99.0, 99.0]),
            }
        )
    )
    assert (
        "| net | 10 | 0.1 | plain twin, PyTorch's initial values | 3 | 50.00 ± 0.00 (1 of 3 diverged) |  | 10 |" in text
    )
    assert "|  |  |  | as it comes | 3 | 80.00 ± 0.00 | **+16.03 [+13.42, +18.64]** | 40 |" in text
    chosen = text[text.index("each its best") :]
    assert chosen.startswith(
        "each its best | plain twin, PyTorch's initial values | 3 | 91.00 ± 1.00 | **+5.03 [+4.89, +5.18]** |"
    )
    assert (
        "|  |  |  | online | 3 | 96.03 ± 1.05 |  | 11 |" in chosen
        and "| as it comes | 3 | 90.00 ± 7.81 | +6.03 [" in chosen
    )
    assert "| net | 40 epochs, 44 s: 98.00 ± 1.00 | 10 epochs, 40 s: 90.00 ± 7.81 | +8.00 " in text
    assert "80 epochs" not in text and "one is 0.10%" in text


def test_without_online_runs_there_is_nothing_to_compare() -> None:
    text = markdown(planted({(PLAIN, 10, 0.1): (10.0, [None]), (OFFLINE, 10, 0.1): (40.0, [80.0])}))
    assert "initial values | 1 | NaN (1 of 1 diverged) |  | 0 |" in text and "processor time**" not in text


@pytest.mark.parametrize(
    "path", sorted((ROOT / "benchmarks" / "results").rglob("reparam_accuracy*.json")), ids=lambda p: p.stem
)
def test_committed_runs_stand_in_the_notes(path: Path) -> None:
    results = load(path)
    assert results.benchmark == BENCHMARK
    notes = (ROOT / "benchmarks" / "NOTES.md").read_text(encoding="utf-8")
    marker = f"results:{path.parent.name}/{path.stem} -->"
    assert f"<!-- {marker}\n{markdown(results)}\n<!-- /{marker}" in notes
