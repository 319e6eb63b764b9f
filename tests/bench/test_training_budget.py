"""The memory split of ``orepa bench step``: it adds up to what the allocator says, and its parts are what they are called."""

from __future__ import annotations

import functools
import gc

import pytest
import torch
from torch import nn

pytest.importorskip("timm")

from orepa.bench import memory, step
from orepa.bench.contestants import OREPA, PLAIN, everyone
from orepa.bench.memory import CpuRecorder, Event, Split, measure, split_peak
from orepa.bench.training_step import TrainingStep
from orepa.train.model import create_plain, model_arguments

TOY = "test_resnet"


@functools.cache
def plain_model(name: str = TOY) -> nn.Module:
    torch.manual_seed(0)
    return create_plain(name, model_arguments(name, 1000, 3, 32), 32)


def make_step(contestant: str = OREPA, model: str = TOY, batch: int = 2, device: str = "cpu") -> TrainingStep:
    built = everyone()[contestant].build(plain_model(model)).train().to(device)
    return TrainingStep(built, torch.randn(batch, 3, 32, 32, device=device), torch.arange(batch, device=device))


@pytest.mark.parametrize(("model", "contestant"), [("resnet18", PLAIN), ("resnet18", OREPA), (TOY, "dbb-offline")])
def test_the_split_adds_up_to_the_allocators_peak(model: str, contestant: str) -> None:
    # The truth knows nothing of tensors: all blocks that the allocator handed out from before the model was built.
    plain_model(model)
    kept: list[TrainingStep] = []

    def life() -> None:
        kept.append(make_step(contestant, model, batch=4))
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
@pytest.mark.parametrize("contestant", [PLAIN, OREPA, "dbb-offline"])
def test_the_split_adds_up_to_the_peak_on_cuda(contestant: str) -> None:
    step._warm_up("cuda")
    make_step(contestant, "resnet18", batch=32, device="cuda")()
    gc.collect()
    before = memory.occupied("cuda")
    made = make_step(contestant, "resnet18", batch=32, device="cuda")
    made()
    found = measure(made, memory.recorder("cuda"), before)
    made()
    torch.cuda.reset_peak_memory_stats()
    made()
    peak = torch.cuda.max_memory_allocated() - before[0]
    assert sum(found["split"].values()) == pytest.approx(peak, rel=0.02)


def test_parts_are_what_they_are_called() -> None:
    made = make_step()
    made()
    found = measure(made, CpuRecorder())
    parameters = sum(p.numel() * 4 for p in made.model.parameters())
    assert found["split"]["parameters"] == found["split"]["optimizer"] == parameters
    assert 0 < found["squeeze_saved_bytes"] < found["saved_bytes"]
    assert found["split"]["squeeze"] <= found["squeeze_saved_bytes"]
    assert all(p.grad is None for p in made.model.parameters())

    made = make_step(PLAIN)
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
