"""Batch norms with statistics over all processes, on any device: torch's own are for GPUs only, and so is its DDP of them."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from timm.layers import BatchNormAct2d, convert_sync_batchnorm
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce
from torch.nn.modules.batchnorm import _BatchNorm


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


def synchronise_norms(model: nn.Module, device: torch.device) -> nn.Module:
    """Swap the batch norms of a model; names of parameters and buffers stay.

    Args:
        model: changed in place.
        device: that the model will run on.

    Returns:
        The model; another module only where it is itself a batch norm.
    """
    if device.type in ("cuda", "xpu"):
        return convert_sync_batchnorm(model)
    for module in model.modules():
        module.__class__ = _KINDS.get(type(module), type(module))
    return model
