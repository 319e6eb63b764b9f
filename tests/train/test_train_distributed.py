"""Two processes, however they are started, train as one does with the same global batch."""

from __future__ import annotations

import copy
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from train_runs import FOLDER, Run, free_port, steady, sync_norm, timm, train, two_runs

from orepa.train import loop
from orepa.train.distributed import world_size
from orepa.train.files import load_checkpoint

BatchNormAct2d = timm.layers.BatchNormAct2d

pytest_plugins = ("train_runs",)
pytestmark = [
    pytest.mark.usefixtures("small_and_quick", "only_training"),
    pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="this torch has no gloo"),
]

# Four steps in all, each of 16 images in two parts. 33 validation images: the shares of two processes differ.
SYNC_ON_CPU = "import sync_norm; sync_norm.install()\n"
TWO_EPOCHS = ("--limit", 33, "--batch-size", 16, "--epochs", 2, "--img-size", 16, "--grad-accum", 2, "--sync-bn")


def start(arguments: tuple[object, ...], launcher: tuple[str, ...] = (), mishap: str = "") -> subprocess.Popen[str]:
    """`orepa train` as its users start it, which says what its parameters are in the end."""
    script = Path("main.py")
    script.write_text(
        textwrap.dedent("""
            import sys
            from orepa.cli import main
            from orepa.train import run

            sys.path.append("TESTS")
            import sync_norm

            sync_norm.install()

            def told(trainer, *_):
                print("parameters:", {type(p).__name__ for p in trainer.module.parameters()})
                print("excluded:", any(getattr(module, "excluded", False) for module in trainer.module.modules()))

            run._evaluate = told
        """).replace("TESTS", str(Path(__file__).parent))
        + textwrap.dedent(mishap)
        + "\nsys.exit(main())\n"
    )
    command = [sys.executable, *launcher, str(script), "train", "--accelerator", "cpu", *map(str, arguments)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen[str]) -> str:
    """What it printed."""
    try:
        printed, errors = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 0, errors
    return printed


def difference(one: Path, other: Path, entry: str = "model") -> float:
    """Of all weights and running statistics: the norm of the difference, relative to the norm."""
    a, b = (load_checkpoint(out / "checkpoint.pt")[entry] for out in (one, other))
    assert a.keys() == b.keys()
    flat = [torch.cat([value.double().flatten() for value in model.values()]) for model in (a, b)]
    return float((flat[0] - flat[1]).norm() / flat[0].norm())


def histories(*outs: str) -> list[list[dict[str, Any]]]:
    return [steady(load_checkpoint(Path(out, "checkpoint.pt"))["progress"]["history"]) for out in outs]


KILLED = """
    import os, signal
    from orepa.train import loop

    loss = loop.Objective.loss

    def killed(self, *batch):
        loss.calls += 1
        if loss.calls == 8 and os.environ["LOCAL_RANK"] == "1":  # between two parts of the fourth step
            os.kill(os.getpid(), signal.SIGKILL)
        return loss(self, *batch)

    loss.calls, loop.Objective.loss = 0, killed
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs POSIX signals")
def test_two_processes_equal_one_even_if_one_of_them_is_killed() -> None:
    """In float64, where rounding cannot hide a mistake, to far less than 1e-6; batch norms over all processes."""
    arguments = (*TWO_EPOCHS, "--precision", "64-true", "--ema", 0.6, "--label-smoothing", 0.1)
    killed = start((*arguments, "--devices", 2, "--checkpoint-every", 1, "--out", "two"), mishap=KILLED)
    assert train(*arguments, "--out", "one") == 0
    _, errors = killed.communicate(timeout=120)  # the other one does not wait for it
    assert killed.returncode != 0, errors
    assert load_checkpoint(Path("two/checkpoint.pt"))["progress"]["step"] == 3
    printed = finish(start(("--resume", "--devices", 2, "--out", "two")))
    assert "parameters: {'Parameter'}" in printed and "excluded: True" in printed
    for entry in ("model", "ema"):
        assert difference(Path("one"), Path("two"), entry) < 1e-12
    for a, b in zip(*histories("one", "two"), strict=True):
        assert a == pytest.approx(b, rel=1e-12)
    assert train(*arguments, "--grad-accum", 1, "--out", "other") == 0
    assert difference(Path("one"), Path("other")) > 1e-3, "norms over 16 images at once instead of 8: this sees it"


@pytest.mark.slow
def test_fsdp2_under_torchrun_continues_what_one_process_began(monkeypatch: pytest.MonkeyPatch) -> None:
    """In float32, as FSDP2 is for: equal to 1e-6. Checkpoints do not depend on how many processes wrote or read them."""
    assert train(*TWO_EPOCHS, "--out", "one") == 0
    step = loop.Trainer._step

    def interrupted(self: loop.Trainer, *batch: Any) -> None:
        step(self, *batch)
        self.stop.number = 15 if self.step == 2 else 0  # after the third step: momentum has gathered

    with monkeypatch.context() as patch:
        patch.setattr(loop.Trainer, "_step", interrupted)
        assert train(*TWO_EPOCHS, "--out", "two") == 128 + 15
    torchrun = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(free_port()))
    printed = finish(start(("--resume", "--strategy", "fsdp2", "--out", "two"), torchrun))
    assert "parameters: {'DTensor'}" in printed and "device  2 x cpu" in printed
    assert difference(Path("one"), Path("two")) < 1e-6
    for a, b in zip(*histories("one", "two"), strict=True):
        assert a == pytest.approx(b, rel=1e-5)


@pytest.mark.slow
def test_two_machines_skip_the_same_broken_image(folder: Path) -> None:
    victims = [folder / "train" / "red" / "3.png", folder / "validation" / "green" / "2.png"]
    for victim in victims:
        victim.write_bytes(b"no image")
    arguments = ("--data", folder, *FOLDER, "--sync-bn")
    nodes = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    two = (*arguments, "--accelerator", "cpu", "--num-nodes", 2, "--out", "two")
    both = [Run(*two, before=SYNC_ON_CPU, NODE_RANK=rank, **nodes) for rank in range(2)]
    assert train(*arguments, "--out", "one") == 0
    assert [each.wait() for each in both] == [0, 0], [each.err for each in both]
    assert "2 skipped" in both[0].out
    assert difference(Path("one"), Path("two")) < 1e-6
    one, two = (load_checkpoint(Path(out, "checkpoint.pt"))["progress"] for out in ("one", "two"))
    assert one["skipped"].keys() == two["skipped"].keys() == {str(victim) for victim in victims}
    assert [record["val_correct"] for record in one["history"]] == [record["val_correct"] for record in two["history"]]


FULL = """
    import os, resource
    from orepa.train import loop

    step = loop.Trainer._step

    def full(self, *batch):
        if self.step == 1 and os.environ["LOCAL_RANK"] == "0":  # a limit on files is the nearest thing to a full disk
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        step(self, *batch)

    loop.Trainer._step = full
"""
LOST = """
    import os
    from orepa.train import loop

    step = loop.Trainer._step

    def lost(self, *batch):
        step(self, *batch)
        if self.step == 1 and os.environ["LOCAL_RANK"] == "1":
            self.sums += float("nan")

    loop.Trainer._step = lost
"""


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="needs POSIX limits")
@pytest.mark.parametrize(
    ("mishap", "message"),
    [(FULL, "cannot write run/checkpoint.pt: File too large"), (LOST, "the loss is not finite any more in epoch 1")],
    ids=["a full disk", "divergence"],
)
def test_what_stops_one_process_stops_both(mishap: str, message: str) -> None:
    both = two_runs(*TWO_EPOCHS, "--accelerator", "cpu", "--out", "run", before=SYNC_ON_CPU + textwrap.dedent(mishap))
    codes, errors = [each.wait() for each in both], both[0].err + both[1].err
    told = [line for line in errors.splitlines() if line.startswith("orepa: ")]
    assert codes == [2, 0] and len(told) == 1 and told[0].startswith(f"orepa: error: {message}"), (codes, errors)
    assert "Traceback" not in errors
    assert load_checkpoint(Path("run/checkpoint.pt"))["progress"]["step"] == 0


# --- in this process ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [(("--devices", 3), "--devices 3 contradicts torchrun"), (("--num-nodes", 1), "which has started 2")],
)
def test_torchrun_knows_best(
    options: tuple[object, ...],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name, value in {"TORCHELASTIC_RUN_ID": "x", "LOCAL_WORLD_SIZE": 2, "WORLD_SIZE": 4}.items():
        monkeypatch.setenv(name, str(value))
    assert world_size(None, None) == world_size(2, 2) == 4
    assert train(*TWO_EPOCHS, *options, "--out", "run") == 2
    assert message in capsys.readouterr().err
    assert not Path("run").exists()


@pytest.mark.parametrize("activation", [False, True], ids=["norm", "norm and activation"])
def test_a_lone_synchronised_norm_is_the_norm_that_it_was(activation: bool) -> None:
    norm: nn.Module = BatchNormAct2d(4) if activation else nn.BatchNorm2d(4)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), norm)
    twin = sync_norm.synchronise_norms(nn.Sequential(nn.Conv2d(3, 4, 3), type(norm)(4)))
    assert type(twin[1]) is not type(norm) and isinstance(twin[1], type(norm))
    twin.load_state_dict(model.state_dict())
    for training in (True, False):
        x = torch.randn(5, 3, 6, 6)
        assert torch.equal(model.train(training)(x), twin.train(training)(x))
    for name, value in model.state_dict().items():
        assert torch.equal(value, twin.state_dict()[name])


@pytest.mark.parametrize(
    ("norm", "shape"),
    [
        (nn.BatchNorm1d, (3, 4)),
        (nn.BatchNorm2d, (3, 4, 5, 6)),
        (nn.BatchNorm3d, (3, 4, 2, 2, 3)),
        (BatchNormAct2d, (3, 4, 2, 2)),
    ],
)
def test_a_synchronised_norm_sees_the_images_of_all(
    norm: type[nn.Module], shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other process having the same images as this one, every sum over both is twice this one's."""
    plain = norm(4).double()
    with torch.no_grad():
        plain.weight.copy_(torch.rand(4) + 0.5)
        plain.bias.copy_(torch.randn(4))
    synced = sync_norm.synchronise_norms(nn.Sequential(copy.deepcopy(plain)))
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "all_reduce", lambda tensor: tensor.mul_(2))
    monkeypatch.setattr(sync_norm, "all_reduce", lambda tensor: 2 * tensor)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    both = torch.cat([x, x])
    expected, got = plain(both)[:3], synced(x)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    for name, buffer in plain.named_buffers():
        torch.testing.assert_close(synced.state_dict()[f"0.{name}"], buffer, rtol=1e-12, atol=1e-12)
    weights = torch.randn(shape, dtype=torch.float64)
    (mine,) = torch.autograd.grad((got * weights).sum(), x)
    (theirs,) = torch.autograd.grad((plain(both) * torch.cat([weights, weights])).sum() / 2, x)
    torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10)
