"""Batch norms with statistics over all processes, on any device: torch's own run on GPUs only.

So the tests can compare several processes on CPUs with one that has the whole batch.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from timm.layers import BatchNormAct2d
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce
from torch.nn.modules.batchnorm import _BatchNorm

from orepa.train import distributed, loop


class _Synced(_BatchNorm):
    """Two passes over the images: their mean, then the deviations from it. Autograd derives the backward pass of both."""

    def _in_step(self) -> bool:
        """Whether there are others to share statistics with. If not, this is the norm that it was."""
        return self.training and dist.is_initialized() and dist.get_world_size() > 1

    def forward(self, input: Tensor) -> Tensor:
        if not self._in_step():
            return super().forward(input)
        dims = [0, *range(2, input.dim())]
        shape = [1, -1, *[1] * (input.dim() - 2)]
        number = torch.tensor([input.numel() / input.size(1)], dtype=torch.float64, device=input.device)
        dist.all_reduce(number)
        count = number.item()
        x = input.to(torch.promote_types(input.dtype, torch.float32))
        mean = all_reduce(x.sum(dims)) / count
        centred = x - mean.view(shape)
        variance = all_reduce(centred.square().sum(dims)) / count
        self._track(mean.detach(), variance.detach() * (count / (count - 1)))
        output = centred * (variance + self.eps).rsqrt().view(shape)
        if self.affine:
            output = output * self.weight.view(shape) + self.bias.view(shape)
        return output.to(input.dtype)

    @torch.no_grad()
    def _track(self, mean: Tensor, variance: Tensor) -> None:
        if self.num_batches_tracked is None:
            return
        self.num_batches_tracked.add_(1)
        share = self.momentum if self.momentum is not None else 1 / self.num_batches_tracked.item()
        for running, new in ((self.running_mean, mean), (self.running_var, variance)):
            assert running is not None  # as the number is tracked
            running.lerp_(new.to(running.dtype), share)


class _Synced1d(_Synced, nn.BatchNorm1d): ...


class _Synced2d(_Synced, nn.BatchNorm2d): ...


class _Synced3d(_Synced, nn.BatchNorm3d): ...


class _SyncedAct(_Synced, BatchNormAct2d):
    """timm's norm and activation in one."""

    def forward(self, input: Tensor) -> Tensor:
        output = super().forward(input)
        layers: Any = self
        return layers.act(layers.drop(output)) if self._in_step() else output


_KINDS: dict[type[nn.Module], type[nn.Module]] = {
    nn.BatchNorm1d: _Synced1d,
    nn.BatchNorm2d: _Synced2d,
    nn.BatchNorm3d: _Synced3d,
    BatchNormAct2d: _SyncedAct,
}


def synchronise_norms(model: nn.Module) -> nn.Module:
    """Replace the batch norms of a model, in place; the names of parameters and buffers stay."""
    for module in model.modules():
        module.__class__ = _KINDS.get(type(module), type(module))
    return model


def install() -> None:
    """Make ``--sync-bn`` of `orepa train` work on CPUs, in this process."""
    distributed.SYNC_BN_ACCELERATORS = ("cpu", "cuda")
    loop.convert_sync_batchnorm = synchronise_norms
