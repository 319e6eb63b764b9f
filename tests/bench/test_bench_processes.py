"""Benchmarks in several processes: what differs between them is in the spread, and one that dies is reported."""

from __future__ import annotations

import math
import os
import random
import signal
import statistics
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import processes
import pytest
from compare import compare
from processes import merge

from orepa.bench.results import Results, Row, load
from orepa.bench.runner import Save, Say
from orepa.errors import UserError
from orepa.timing import summary

CASE = {"out": 6, "in": 4, "k": 3, "groups": 1, "topology": "orepa", "dtype": "fp32", "device": "cpu"}


def row(*samples: list[float], provider: str = "eager", **changes: Any) -> Row:
    return Row(**{"case": CASE, "provider": provider, "processes": list(samples), **changes})


def results(*rows: Row, busy: float = 0.0) -> Results:
    environment = {"threads": 1, "cores": 2, "busy_cores_of_others": busy}
    return Results("squeeze", environment, {}, list(rows))


# --- jobs: a worker process imports them from here ----------------------------------------------------------------------------


def at(speed: float, say: Say, save: Save) -> None:
    """Five samples within 1% of ``1 / speed`` seconds, first partial, then complete."""
    found = results(row([(1 + 0.002 * i) / speed for i in range(5)]))
    say("timing")
    save(found)
    found.rows.append(row([1.0], provider="copy"))
    found.complete = True
    save(found)


def dies(say: Say, save: Save) -> None:
    save(results(row([3.0])))
    os.kill(os.getpid(), signal.SIGKILL)


def exits(say: Say, save: Save) -> None:
    os._exit(7)


def refuses(say: Say, save: Save) -> None:
    raise UserError("no such thing")


def sleeps(pid_file: Path, say: Say, save: Save) -> None:
    pid_file.write_text(str(os.getpid()))
    time.sleep(300)


def silent(text: str) -> None:
    pass


# --- processes ----------------------------------------------------------------------------------------------------------------


def test_what_differs_between_processes_is_in_the_spread(tmp_path: Path) -> None:
    """Planted: processes within 1% of themselves, 10% apart from each other."""
    heard: list[str] = []
    kept = []

    def keep(found: Results) -> None:
        kept.append((found.complete, [len(r.processes) for r in found.rows]))
        found.save(tmp_path / "a.json")

    found = processes.run([partial(at, speed) for speed in (1.0, 1.1)], heard.append, keep)
    assert heard == ["process 1 of 2: timing", "process 2 of 2: timing"]
    assert kept == [(False, [1]), (False, [1, 1]), (False, [2, 1]), (False, [2, 2]), (True, [2, 2])]
    eager, copy = found.rows
    assert [s[0] for s in eager.processes] == [1.0, 1 / 1.1] and copy.processes == [[1.0], [1.0]]
    assert eager.spread > 0.1 and copy.spread == 0
    alone = [summary([samples]) for samples in eager.processes]
    assert alone[1]["high_us"] < alone[0]["low_us"]  # each alone would call the other a different speed
    assert all(eager.summary["low_us"] < s["median_us"] < eager.summary["high_us"] for s in alone)
    assert load(tmp_path / "a.json").complete
    assert {pair.verdict for pair in compare(found, found).pairs} == {"no difference"}
    assert compare(found, found).notes == []


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
def test_processes_that_die_are_reported_and_the_others_count(capsys: pytest.CaptureFixture[str]) -> None:
    from orepa.bench.tables import problems, show

    found = processes.run([dies, exits, partial(at, 1.0)], silent, lambda _: None)
    lost = ["process 1 of 3 was killed by SIGKILL", "process 2 of 3 ended early with exit code 7"]
    assert found.lost == lost and not found.complete
    assert [r.processes[0][0] for r in found.rows] == [3.0, 1.0] and len(found.rows[0].processes) == 2
    assert problems(found)[:2] == [f"lost: {line}" for line in lost]
    show(found)
    assert lost[0] in capsys.readouterr().out
    assert [note for note in compare(found, found).notes if lost[1] in note] == [
        f"{n} is partial: {lost[1]}" for n in "AB"
    ]
    with pytest.raises(UserError, match="nothing was measured: process 1 of 1 ended early with exit code 7"):
        processes.run([exits], silent, lambda _: None)


def test_what_the_user_can_put_right_is_passed_on() -> None:
    with pytest.raises(UserError, match="^no such thing$"):
        processes.run([refuses, partial(at, 1.0)], silent, lambda _: None)


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
def test_a_killed_parent_leaves_no_worker(tmp_path: Path) -> None:
    code = (
        "from functools import partial; from pathlib import Path; import test_bench_processes as t\n"
        "import processes\n"
        "if __name__ == '__main__':\n"
        f"    processes.run([partial(t.sleeps, Path({str(tmp_path / 'pid')!r}))], t.silent, print)\n"
    )
    (tmp_path / "parent.py").write_text(code)
    path = os.pathsep.join(filter(None, [*sys.path, str(Path(__file__).parent)]))
    with subprocess.Popen([sys.executable, tmp_path / "parent.py"], env={**os.environ, "PYTHONPATH": path}) as parent:
        try:
            _wait(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text() != "", 120)
        finally:
            parent.kill()
    worker = int((tmp_path / "pid").read_text())
    _wait(lambda: not _alive(worker), 30)


def _wait(until: Any, seconds: float) -> None:
    end = time.monotonic() + seconds
    while not until():
        assert time.monotonic() < end
        time.sleep(0.1)


def _alive(pid: int) -> bool:
    """Whether it runs; one that nobody reaped, as in a container without init, does not."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    stat = Path(f"/proc/{pid}/stat")
    return not (stat.exists() and stat.read_text().rpartition(")")[2].split()[0] == "Z")


# --- merging ------------------------------------------------------------------------------------------------------------------


def test_merging_keeps_raw_samples_by_process() -> None:
    parts = [
        results(row([1.0, 2.0]), busy=0.1),
        results(row([4.0]), row([5.0], mode="both"), busy=0.3),
    ]
    merged = merge(parts)
    assert [r.processes for r in merged.rows] == [[[1.0, 2.0], [4.0]], [[5.0]]]
    assert parts[0].rows[0].processes == [[1.0, 2.0]] and merged.complete
    assert merged.environment["busy_cores_of_others"] == pytest.approx(0.2)
    assert merged.processes == 2 and merged.rows[0].median_us == pytest.approx(2.75e6)


@pytest.mark.parametrize("status", ["wrong", "failed"])
def test_a_provider_that_is_wrong_once_is_wrong(status: str) -> None:
    bad = row(status=status, reason="off")
    for parts in ([results(row([1.0])), results(bad)], [results(bad), results(row([1.0]))]):
        (merged,) = merge(parts).rows
        assert (merged.status, merged.reason, merged.processes) == (status, "off", [])


# --- the estimator ------------------------------------------------------------------------------------------------------------


def test_summary_of_several_processes() -> None:
    # Medians 1, 1.1, 1.21: their logarithms have the standard deviation log(1.1). Percentiles reach from 1 to 1.21.
    three = summary([[1.0, 1.0], [1.1], [1.21, 1.21, 1.21]])
    assert three["median_us"] == pytest.approx(1.1e6)
    half = 4.302652730 * math.log(1.1) / math.sqrt(3)
    assert three["low_us"] == pytest.approx(1.1e6 * math.exp(-half))
    assert three["high_us"] == pytest.approx(1.1e6 * math.exp(half))
    # Processes that agree leave the spread of their samples.
    assert summary([[1.0, 2.0, 3.0]] * 4)["low_us"] == summary([[1.0, 2.0, 3.0] * 4])["p20_us"]
    # Nineteen degrees of freedom.
    assert 1 < summary([[1.0], [1.1]] * 10)["high_us"] / 1e6 <= 1.1


@pytest.mark.parametrize("count", [2, 3, 5])
def test_runs_of_the_same_agree_within_their_spreads(count: int) -> None:
    """Processes differ by 5%, their samples by 1%: of pairs of runs, hardly any are told apart, and percentiles alone fail."""
    generator = random.Random(0)

    def run() -> Row:
        speeds = [generator.gauss(0, 0.05) for _ in range(count)]
        return row(*[[2.0 ** (speed + generator.gauss(0, 0.01)) for _ in range(15)] for speed in speeds])

    def apart(spans: list[tuple[float, float]]) -> bool:
        return spans[0][1] < spans[1][0] or spans[1][1] < spans[0][0]

    def span(r: Row) -> tuple[float, float]:
        return r.summary["low_us"], r.summary["high_us"]

    def first_process_alone(r: Row) -> tuple[float, float]:
        return span(row(r.processes[0]))

    pairs = [(run(), run()) for _ in range(300)]
    told = [compare(results(a), results(b)).pairs[0].verdict != "no difference" for a, b in pairs]
    beyond = [abs(a.median_us - b.median_us) > a.spread * a.median_us + b.spread * b.median_us for a, b in pairs]
    assert statistics.fmean(told) < 0.03 and statistics.fmean(beyond) < 0.03
    assert statistics.fmean(apart([first_process_alone(a), first_process_alone(b)]) for a, b in pairs) > 0.3


def test_a_slow_down_beyond_the_spread_of_processes_is_caught() -> None:
    before = results(row([1.0], [1.01], [1.02]))
    for factor, verdict in ((1.02, "no difference"), (1.2, "slower"), (0.8, "faster")):
        after = results(row([factor], [1.01 * factor], [1.02 * factor]))
        assert compare(before, after).pairs[0].verdict == verdict
