"""What counts as a norm: statistics of the input, not a name."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import orepa
from orepa.surgery.consumer_graph import Consumer, Evidence, consumers, is_norm


class Affine(nn.Module):
    """Has what norms have: a scale, and an eps."""

    def __init__(self, channels=4):
        super().__init__()
        self.weight, self.bias, self.eps = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels)), 1e-5


class RMSNorm2d(Affine):
    def forward(self, x):
        return x / (x.square().mean(1, keepdim=True) + self.eps).sqrt() * self.weight.view(1, -1, 1, 1)


class ChannelLayerNorm(RMSNorm2d):
    pass


class FilterResponseNorm(RMSNorm2d):
    pass


class Layer_Norm(RMSNorm2d):  # noqa: N801
    pass


class BatchNormalization(RMSNorm2d):
    pass


class LayerNormWrapper(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.LayerNorm(4)


class ABN(nn.Module):
    """Has running statistics, and no name that says so."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))
        self.register_buffer("running_mean", torch.zeros(4))
        self.register_buffer("running_var", torch.ones(4))


class OwnBatchNorm(nn.BatchNorm2d):
    pass


class NormedAct(Affine):
    def forward(self, x):
        return torch.relu(x)


class NormalHead(NormedAct):
    pass


class LayerNormedAct(NormedAct):
    pass


class NormFreeBlock(NormedAct):
    pass


class WeightNormAct(NormedAct):
    pass


class L2Norm(NormedAct):
    def forward(self, x):
        return F.normalize(x) * self.weight.view(1, -1, 1, 1)


class LayerNormGate(nn.Module):
    """No norm is built like this."""

    def forward(self, x):
        return torch.sigmoid(x)


class LayerNormHead(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.fc = nn.LayerNorm(4), nn.Linear(4, 4)

    def forward(self, x):
        return x + self.fc.weight.sum()


class FrozenBatchNorm2d(nn.Module):
    def __init__(self, channels=4):
        super().__init__()
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.rand(channels) + 0.5)

    def forward(self, x):
        scale = self.weight * (self.running_var + 1e-5).rsqrt()
        return x * scale.view(1, -1, 1, 1) + (self.bias - self.running_mean * scale).view(1, -1, 1, 1)


class Fixed(FrozenBatchNorm2d):
    """Is one without being called so, and has an activation with parameters, like timm's."""

    def __init__(self):
        super().__init__()
        self.act = nn.PReLU()


NORMS = [RMSNorm2d, ChannelLayerNorm, FilterResponseNorm, Layer_Norm, BatchNormalization, LayerNormWrapper, ABN]
NORMS += [lambda: OwnBatchNorm(4), lambda: nn.SyncBatchNorm(4), lambda: nn.GroupNorm(2, 4), lambda: nn.RMSNorm(4)]
OTHERS = [NormedAct, NormalHead, LayerNormedAct, NormFreeBlock, WeightNormAct, L2Norm, LayerNormGate, LayerNormHead]
OTHERS += [lambda: nn.LocalResponseNorm(2)]
FROZEN = [FrozenBatchNorm2d, Fixed]


@pytest.mark.parametrize("build", NORMS)
def test_norms_are_known_by_what_they_are(build):
    assert is_norm(build())
    assert orepa.report(orepa.prepare(nn.Sequential(nn.Conv2d(3, 4, 3), build()))).swapped


@pytest.mark.parametrize("build", OTHERS)
def test_a_name_makes_no_norm(build):
    assert not is_norm(build())
    model = nn.Sequential(nn.Conv2d(3, 4, 3), build())
    assert consumers(model)["0"].norm is None
    assert not orepa.report(orepa.prepare(model)).swapped


@pytest.mark.parametrize("name", ["BatchNormAct2d", "SyncBatchNormAct", "EvoNorm2dB0", "FilterResponseNormTlu2d"])
def test_norms_of_timm(name):
    layers = pytest.importorskip("timm.layers", reason="timm is not installed (the [models] extra)")
    assert is_norm(getattr(layers, name)(4))


@pytest.mark.parametrize("build", FROZEN)
def test_frozen_norms_are_affine_unless_they_are_named(build):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), build())
    assert not is_norm(build()) and is_norm(build(), (FrozenBatchNorm2d,))
    found = consumers(model)["0"]
    assert (found.norm, found.affine, found.direct, found.is_proven) == (None, "1", True, True)
    assert type(model[1]).__name__ in found.problem and "norm_types" in found.problem
    assert consumers(model, (FrozenBatchNorm2d,))["0"] == Consumer("1", True, Evidence.GRAPH)
    assert "norm_types" in orepa.report(orepa.prepare(model)).left[0].detail


def test_any_type_can_be_named():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), L2Norm())
    assert consumers(model, (L2Norm,))["0"].norm == "1"
