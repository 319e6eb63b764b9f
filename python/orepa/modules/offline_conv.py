"""`OfflineConv`: a block as its authors train it, every layer and norm on feature maps. What OREPA is compared with."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import orepa_kernels
from orepa_kernels.reference import align, compose, identity

from ..module_info import batch_norm_affine, conv_arguments, is_channels_last
from ..topology.language import Norm, Size, Topology, declaration
from ..topology.lowering import ConvStage, DepthwiseStage, FilterStage, NestedStage, Stage
from .conv_base import ConvBlock, ConvGeometry
from .linear_block import LinearBlock
from .offline_branches import OfflineBranch, Step, pad, pads_zeros_itself, resolve_branches


class OfflineConv(ConvBlock):
    """A re-parameterised block trained *offline*: DBB, RepVGG, ACNet, MobileOne as published.

    Training runs every branch layer by layer on feature maps, with a `torch.nn.BatchNorm2d` wherever the topology declares a
    ``Norm``: many convolutions and norms where `OREPAConv` has one convolution. In eval mode the block equals one
    convolution with a bias (`squeeze`, `to_conv2d`), borders included: a branch is padded before its first layer larger than
    1x1, with what its layers so far make of zeros. That comes from the running statistics of their norms and, as in the
    authors' DBB, carries no gradient in train mode.

    Parameters are named as those of an `OREPAConv` of the same topology, the norms of a branch ``origin_bn``, or
    ``avg_bn1``, ``avg_bn2``. A branch with a norm has no scaling. Where all branches end in norms, none belongs after the
    block. ``plan`` and ``run_branches`` are of the block without its norms.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, padding_mode, device, dtype:
            as for `torch.nn.Conv2d`.
        bias: one vector ``[O]`` for the whole block; by default only where no branch has a norm, as norms bring theirs.
        topology: a name of `orepa.topologies`, or a declaration ``spec -> Topology``.
        scaling: of branches without a norm: ``"vector"``, ``"scalar"`` or ``"none"``.
        eps, momentum: of the norms.
        options: of the topology, such as ``branches=4``.

    Raises:
        ValueError: an argument does not fit, or the topology has norms inside a nested block.
        TypeError: an option that the topology does not have.

    Shape:
        ``[N, I, H, W]`` (or ``[I, H, W]``) to ``[N, O, H', W']`` as for `torch.nn.Conv2d`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Size,
        stride: int | Size = 1,
        padding: int | Size | str = 0,
        dilation: int | Size = 1,
        groups: int = 1,
        bias: bool | None = None,
        padding_mode: str = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        topology: str | Callable[..., Topology] = "dbb",
        scaling: str = "vector",
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        **options: Any,
    ) -> None:
        arguments = (in_channels, out_channels, kernel_size, stride, padding, dilation, groups, padding_mode)
        geometry = ConvGeometry.checked(*arguments)
        declared = declaration(topology, **options)(geometry.spec).offline()
        if bias is None:
            bias = not any(isinstance(layer, Norm) for _, branch in declared for layer in branch.layers)
        super().__init__(geometry, declared.linearize(), topology, scaling, bias, device, dtype)
        self._branches = resolve_branches(declared, self._lowered, self.borders, self.dilation)
        for branch in self._branches:
            for name, channels in branch.norms:
                self.add_module(name, nn.BatchNorm2d(channels, eps, momentum, device=device, dtype=dtype))

    @property
    def ends_in_norms(self) -> bool:
        """Whether every branch ends in a norm, so that the block needs none after it."""
        return all(isinstance(branch.steps[-1], str) for branch in self._branches)

    def reset_parameters(self) -> None:
        """Draw initial values: the topology's, norms that change nothing, and for the bias those of `torch.nn.Conv2d`."""
        super().reset_parameters()
        for child in self.children():
            if isinstance(child, nn.modules.batchnorm._BatchNorm):
                child.reset_parameters()

    # --- on feature maps --------------------------------------------------------------------------------------------------

    def forward(self, x: Tensor) -> Tensor:
        """Sum of the branches, layer by layer on feature maps, in either mode."""
        batched = x if x.dim() == 4 else x.unsqueeze(0)
        total: Tensor | None = None
        for branch in self._branches:
            y = self._run(branch, batched)
            total = y if total is None else total + y
        assert total is not None  # a topology has at least one branch
        if self.bias is not None:
            total = total + self.bias.view(1, -1, 1, 1)
        return total if x.dim() == 4 else total.squeeze(0)

    def _run(self, branch: OfflineBranch, x: Tensor) -> Tensor:
        shift: Tensor | None = None  # what zeros have become so far; None is zero
        for index, step in enumerate(branch.steps):
            padding = (0, 0)
            if index == branch.pad_at:
                padding, x = self._pad(branch, x, shift)
            if isinstance(step, str):
                x = getattr(self, step)(x)
            else:
                x = self._apply_stage(step, x, self.stride if index == branch.last else (1, 1), padding)
            if index < branch.pad_at and self.padding_mode == "zeros" and max(branch.margins) > 0:
                # After the norm, as its running statistics are then those of this step: so do the authors.
                with torch.set_grad_enabled(torch.is_grad_enabled() and not self.training):
                    shift = self._shift_after(step, shift)
        if branch.scale is not None and self.scales is not None:
            x = x * self.scales[branch.scale].view(1, -1, 1, 1)
        return x

    def _pad(self, branch: OfflineBranch, x: Tensor, shift: Tensor | None) -> tuple[Size, Tensor]:
        """What of the margins the next step shall pad by itself, and ``x`` with the rest of them."""
        left, right, top, bottom = branch.margins
        step = branch.steps[branch.pad_at]
        zeros = shift is None and self.padding_mode == "zeros"
        if zeros and min(branch.margins) >= 0 and (left, top) == (right, bottom) and pads_zeros_itself(step):
            return (top, left), x  # spares a padded copy of the map
        return (0, 0), pad(x, branch.margins, self.padding_mode, shift)

    def _apply_stage(self, stage: Stage, x: Tensor, stride: Size, padding: Size) -> Tensor:
        if isinstance(stage, NestedStage):
            child = getattr(self, stage.child)
            assert isinstance(child, LinearBlock)
            return child.run_branches(x, stride, self.dilation)
        if isinstance(stage, FilterStage) and isinstance(stage.filter, orepa_kernels.Average):
            if stage.kernel_size == (1, 1):
                return x[:, :, :: stride[0], :: stride[1]]
            if self.dilation == (1, 1):
                return F.avg_pool2d(x, stage.kernel_size, stride)
        weight, groups = self._weight(stage, x.shape[1], x)
        return F.conv2d(x, weight, None, stride, padding, self.dilation, groups)

    def _weight(self, stage: Stage, channels: int, like: Tensor) -> tuple[Tensor, int]:
        """A layer as the weight and the groups of one convolution. Fixed filters come in the dtype of ``like``."""
        groups = self._lowered.spec.groups
        if isinstance(stage, ConvStage):
            weight = self._own(stage.weight)
            if stage.identity:
                weight = weight.to(torch.promote_types(weight.dtype, like.dtype))
                weight = weight + identity(weight.shape[0], weight.shape[1], weight)
            return weight, groups
        if isinstance(stage, DepthwiseStage):
            return self._own(stage.weight), channels
        if isinstance(stage, NestedStage):
            child = getattr(self, stage.child)
            operands = [t.to(like.dtype) for t in child.operands()]
            return orepa_kernels.squeeze([child.plan], [operands], backend="reference")[0], groups
        if isinstance(stage.filter, orepa_kernels.Average):
            taps = math.prod(stage.kernel_size)
            return like.new_full((channels, 1, *stage.kernel_size), 1 / taps), channels
        return self._own(stage.filter).to(like.dtype)[:, None].expand(channels, -1, -1, -1), channels

    # --- as one convolution -----------------------------------------------------------------------------------------------

    def squeeze(self, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor | None]:
        """The block in eval mode as one convolution, composed in float64; differentiable in the parameters.

        The norms enter with their running statistics, so in train mode `forward` computes something else.

        Args:
            dtype: of the result; by default that of the parameters.

        Returns:
            ``weight [O, I/g, kh, kw]`` and ``bias [O]``, which is None where the block has neither norms nor a bias.
        """
        like = next(self.parameters())
        weight = torch.zeros(self.plan.shape, dtype=torch.float64, device=like.device)
        bias = None if self.bias is None else self.bias.double()
        for branch in self._branches:
            kernel: Tensor | None = None
            shift: Tensor | None = None
            for step in branch.steps:
                kernel, shift = self._kernel_after(step, kernel, weight), self._shift_after(step, shift)
            assert kernel is not None  # a branch has at least one layer
            if branch.scale is not None and self.scales is not None:
                scale = self.scales[branch.scale].double()
                kernel = kernel * scale.view(-1, 1, 1, 1)
                shift = None if shift is None else shift * scale
            weight = weight + align(kernel, self.kernel_size)
            if shift is not None:
                bias = shift if bias is None else bias + shift
        dtype = like.dtype if dtype is None else dtype
        return weight.to(dtype), None if bias is None else bias.to(dtype)

    def _kernel_after(self, step: Step, kernel: Tensor | None, like: Tensor) -> Tensor:
        """The kernel ``[M, I/g, kh, kw]`` of a branch up to and with a step, in float64. None is the input itself."""
        channels = self.in_channels if kernel is None else kernel.shape[0]
        if isinstance(step, ConvStage | NestedStage):
            weight = self._weight(step, channels, like)[0].double()
            return weight if kernel is None else compose(kernel, weight, self.groups)
        if kernel is None:
            kernel = identity(channels, channels // self.groups, like)
        if isinstance(step, str):
            return kernel * batch_norm_affine(getattr(self, step))[0].view(-1, 1, 1, 1)
        weight = self._weight(step, channels, like)[0].double()
        kernel = kernel.repeat_interleave(weight.shape[0] // channels, 0).transpose(0, 1)
        # A true convolution, row by row and fully padded: the depthwise case of `compose`.
        border = (step.kernel_size[0] - 1, step.kernel_size[1] - 1)
        return F.conv2d(kernel, weight.flip((2, 3)), padding=border, groups=weight.shape[0]).transpose(0, 1)

    def _shift_after(self, step: Step, shift: Tensor | None) -> Tensor | None:
        """What a step makes of a map that is ``shift [C]`` everywhere, in float64. None is zero."""
        if isinstance(step, str):
            factor, offset = batch_norm_affine(getattr(self, step))
            return offset if shift is None else factor * shift + offset
        if shift is None:
            return None
        weight, groups = self._weight(step, shift.numel(), shift)
        return F.conv2d(shift.view(1, -1, 1, 1), weight.double().sum((2, 3), keepdim=True), groups=groups).flatten()

    @torch.no_grad()
    def to_conv2d(self, dtype: torch.dtype | None = None) -> nn.Conv2d:
        """The block in eval mode as a plain convolution, composed in float64.

        It keeps device, memory format and train/eval mode, and requires gradients where the block does.

        Args:
            dtype: of the convolution; by default that of the parameters.
        """
        weight, bias = self.squeeze(dtype)
        conv = nn.Conv2d(**conv_arguments(self), bias=bias is not None, device="meta")
        last = is_channels_last(*(p for p in self.parameters() if p.dim() == 4))
        weight = weight.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
        trainable = any(p.requires_grad for p in self.parameters())
        conv.weight = nn.Parameter(weight, requires_grad=trainable)
        if bias is not None:
            conv.bias = nn.Parameter(bias.clone(), requires_grad=trainable)
        return conv.train(self.training)
