"""A small model for the tests of one squeeze per step, and what counts its squeezes."""

import copy
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.utils import parametrizations

from orepa import OREPAConv
from orepa.modules.step import squeeze_alone_in, squeeze_together_in
from orepa_kernels import autograd


class Net(nn.Module):
    """Three kinds of blocks, norms, two heads."""

    def __init__(self, **options):
        super().__init__()
        self.stem = OREPAConv(3, 8, 3, padding=1, bias=False, **options)
        self.bn1 = nn.BatchNorm2d(8)
        self.body = nn.Sequential(
            OREPAConv(8, 8, 3, padding=1, bias=False, **options),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            OREPAConv(8, 8, 1, groups=2, bias=False, **options),
            nn.BatchNorm2d(8),
        )
        self.left = OREPAConv(8, 4, 3, topology="repvgg_dense", **options)
        self.right = OREPAConv(8, 4, 1, **options)

    def features(self, x):
        return self.body(self.bn1(self.stem(x)).relu()).relu()

    def forward(self, x):
        x = self.features(x)
        return self.left(x), self.right(x)


def other_kinds(**options):
    """Return a model of a nested block, a dilated and a parametrized one."""
    convs = [
        OREPAConv(3, 4, 7, padding=3, topology="deep_stem", **options),
        OREPAConv(4, 4, 5, padding=2, topology="unireplknet", **options),
        OREPAConv(4, 4, 3, padding=1, groups=4, **options),
    ]
    parametrizations.weight_norm(convs[2], next(n for n, p in convs[2].named_parameters() if p.dim() == 4))
    return nn.Sequential(*(nn.Sequential(conv, nn.BatchNorm2d(4)) for conv in convs))


def pair(build=Net, **options):
    """Return a model that squeezes its blocks together, and a copy in which each squeezes alone; with random scales."""
    torch.manual_seed(0)
    together = build(**options).double().train()
    with torch.no_grad():
        for name, parameter in together.named_parameters():
            if name.endswith("scales"):
                parameter.uniform_(0.5, 1.5)
    alone = copy.deepcopy(together)
    squeeze_together_in(together)
    assert not any(module._forward_pre_hooks for module in alone.modules())
    squeeze_alone_in(alone)
    return together, alone


def batch(seed=0, size=2, dtype=torch.float64):
    return torch.randn(size, 3, 8, 8, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def loss(outputs):
    return sum(output.square().mean() for output in outputs if output is not None)


def gradients(model):
    return {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}


def assert_same_gradients(model, other, tolerance=1e-12):
    found, expected = gradients(model), gradients(other)
    for name, gradient in expected.items():
        mine = found[name]
        assert (mine is None) == (gradient is None), name
        if gradient is not None:
            error = (mine.double() - gradient.double()).norm() / gradient.double().norm().clamp_min(1e-30)
            assert error <= tolerance, f"{name}: {error:.1e}"


@contextmanager
def counted(monkeypatch):
    """Give the number of blocks of each squeeze, forward and backward."""
    seen = {"forward": [], "backward": []}
    make = autograd.prepare

    def counting(backend, blocks, signature):
        prepared = make(backend, blocks, signature)
        forward, backward = prepared.forward, prepared.backward

        def count_forward(tensors):
            seen["forward"].append(len(blocks))
            return forward(tensors)

        def count_backward(tensors, upstream, needed):
            seen["backward"].append(sum(gradient is not None for gradient in upstream))
            return backward(tensors, upstream, needed)

        prepared.forward, prepared.backward = count_forward, count_backward
        return prepared

    with monkeypatch.context() as patch:
        from orepa_kernels.dispatch import calls

        calls.clear()
        patch.setattr(autograd, "prepare", counting)
        yield seen
    calls.clear()
