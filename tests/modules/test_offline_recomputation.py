"""Activation checkpointing computes the gradients that training without it computes, offline blocks included."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from orepa import OfflineConv

F64 = torch.float64


def net(topology="dbb"):
    """Two blocks whose borders follow running statistics, which a first step moves far."""
    torch.manual_seed(1)
    blocks = [
        OfflineConv(3, 6, 3, padding=1, topology=topology),
        nn.ReLU(),
        OfflineConv(6, 6, 3, padding=1, topology=topology),
    ]
    return nn.Sequential(*blocks).double()


def batch(seed):
    return torch.randn(4, 3, 6, 6, dtype=F64, generator=torch.Generator().manual_seed(seed)) * 3 + 5


def saved(model, reentrant):
    def run(x):
        return checkpoint(model, x.clone().requires_grad_(), use_reentrant=reentrant)

    return run


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return [p.grad.clone() for p in model.parameters()]


def assert_same(model, twin, run):
    """One step of ``run``, given a forward, gives the same gradients with and without checkpointing."""
    expected, found = gradients(twin, run(twin)), gradients(model, run(saved(model, run.reentrant)))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


def step(reentrant, *seeds):
    def run(forward):
        return sum((forward(batch(seed)) ** 2).mean() for seed in seeds)

    run.reentrant = reentrant
    return run


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("seeds", [(0,), (0, 1), (2, 1, 0)])
def test_gradients_are_those_without_checkpoints(reentrant, seeds):
    """Several forward passes before the backward pass as well: each has its own borders."""
    model = net()
    assert_same(model, copy.deepcopy(model), step(reentrant, *seeds))


@pytest.mark.parametrize("reentrant", [False, True])
def test_steps_on_the_same_batch_and_a_pass_that_is_thrown_away(reentrant):
    model = net()
    with torch.no_grad():
        model(batch(7))
    for _ in range(3):
        twin = copy.deepcopy(model)  # checkpoints move the statistics twice, as those of any batch norm
        assert_same(model, twin, step(reentrant, 0))


def test_a_graph_that_is_retained():
    model = net()
    loss = (saved(model, False)(batch(0)) ** 2).mean()
    first = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
    for a, b in zip(first, torch.autograd.grad(loss, list(model.parameters())), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("reentrant", [False, True])
def test_passes_that_cannot_be_told_apart_are_refused(reentrant):
    model = net()
    run = saved(model, reentrant)
    loss = run(batch(0)).sum() + run(batch(0)).sum()
    with pytest.raises(
        RuntimeError, match="OfflineConv is recomputed by activation checkpointing, but 2 of its last 2"
    ):
        loss.backward()


def test_a_pass_inside_a_backward_pass_that_recomputes_nothing():
    """A hook that runs the model, where nothing was checkpointed."""
    model, seen = net(), []
    y = model(batch(0))
    y.register_hook(lambda gradient: seen.append(model(batch(1))))
    y.sum().backward()
    assert len(seen) == 1


def test_what_is_remembered_is_not_saved_and_goes_with_the_mode():
    model = net()
    size = len(pickle.dumps(model))
    saved(model, False)(batch(0))
    assert model[0]._passes and len(pickle.dumps(model)) < size + 100
    assert not copy.deepcopy(model)[0]._passes
    model.eval()
    assert not model[0]._passes
    model.train()
    model(batch(0))
    assert not model[0]._passes, "without checkpointing nothing is remembered"
