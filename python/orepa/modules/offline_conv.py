"""`OfflineConv`: a block as its authors train it, every layer and norm on feature maps. The baseline of OREPA."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Proxy

from orepa_kernels import Average
from orepa_kernels.reference import align, compose, identity

from ..module_info import batch_norm_affine
from ..topology.language import Norm, Size, Topology, declaration
from ..topology.lowering import ConvStage, DepthwiseStage, FilterStage, Lowered, NestedStage, NormStep, Stage, Step
from .conv_base import ConvBlock, ConvGeometry, call_as_leaf
from .kernel_store import in_backward
from .linear_block import insert_zeros

#: left, right, top, bottom, as `torch.nn.functional.pad` counts; negative ones crop
Margins: TypeAlias = tuple[int, int, int, int]

#: forward passes that may wait for their recomputation at a time, as the micro-batches of a pipeline do
_MOST_PASSES = 64


class OfflineConv(ConvBlock):
    """A re-parameterised block trained *offline*: DBB, RepVGG, ACNet, MobileOne as published.

    Training runs every branch layer by layer on feature maps, with a `torch.nn.BatchNorm2d` wherever the topology declares a
    ``Norm``: many convolutions and norms where `OREPAConv` has one convolution. In eval mode the block equals one
    convolution with a bias (`squeeze`, `to_conv2d`), borders included: a branch is padded before its first layer larger than
    1x1, with the values that the layers before it turn zeros into. These come from the running statistics of the norms and,
    as in the authors' DBB, carry no gradient in train mode.

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
        geometry = ConvGeometry(*arguments)
        declared = declaration(topology, **options)(geometry.spec).offline()
        if bias is None:
            bias = not any(isinstance(layer, Norm) for _, branch in declared for layer in branch.layers)
        super().__init__(geometry, declared, topology, scaling, bias, device, dtype)
        self._branches = _place_borders(self._lowered, self.borders, self.dilation)
        for step in (step for branch in self._branches for step in branch.steps if isinstance(step, NormStep)):
            self.add_module(step.name, nn.BatchNorm2d(step.channels, eps, momentum, device=device, dtype=dtype))

    _passes: tuple[_Pass, ...] = ()

    def __getattr__(self, name: str) -> Any:
        if name == "weight":
            raise AttributeError(
                f"this {type(self).__name__} has norms, so it has no weight that goes with its bias: squeeze() returns the "
                "kernel and the bias of eval mode, to_conv2d() the convolution"
            )
        return super().__getattr__(name)

    def _read_weight(self) -> Tensor:
        if any(isinstance(step, NormStep) for branch in self._branches for step in branch.steps):
            raise AttributeError  # worded above, which Python asks next
        return self.squeeze()[0]

    @property
    def ends_in_norms(self) -> bool:
        """Whether every branch ends in a norm, so that the block needs none after it."""
        return all(isinstance(branch.steps[-1], NormStep) for branch in self._branches)

    def reset_parameters(self) -> None:
        """Draw initial values: the topology's, norms that change nothing, and for the bias those of `torch.nn.Conv2d`."""
        super().reset_parameters()
        for child in self.children():
            if isinstance(child, nn.modules.batchnorm._BatchNorm):
                child.reset_parameters()

    # --- on feature maps --------------------------------------------------------------------------------------------------

    def forward(self, x: Tensor) -> Tensor:
        """Sum the branches, layer by layer on feature maps, in either mode."""
        if isinstance(x, Proxy):
            return call_as_leaf(self, x)
        return self._run_unsqueezed(self._sum_branches, x)

    def _sum_branches(self, x: Tensor) -> Tensor:
        total: Tensor | None = None
        past = self._past_shifts(x)
        shifts: list[Tensor] = []  # those of this pass, in the order of the layers
        for branch in self._branches:
            y = self._run_branch(branch, x, past, shifts)
            total = y if total is None else total + y
        assert total is not None  # a topology has at least one branch
        if shifts and past is None and self._may_be_recomputed():
            self._passes = (*self._passes[1 - _MOST_PASSES :], _Pass(_sample(x), shifts))
        return total

    def _run_branch(
        self, branch: OfflineBranch, x: Tensor, past: Sequence[Tensor] | None, shifts: list[Tensor]
    ) -> Tensor:
        shift: Tensor | None = None  # the value of the border so far, per channel; None is zero
        for index, step in enumerate(branch.steps):
            padding = (0, 0)
            if index == branch.pad_at:
                padding, x = self._pad(branch, x, shift)
            if isinstance(step, NormStep):
                x = getattr(self, step.name)(x)
            else:
                x = self._run_layer(step, x, self.stride if index == branch.last else (1, 1), padding)
            if index < branch.pad_at and self.padding_mode == "zeros" and max(branch.margins) > 0:
                # After the norm, whose running statistics are then those of this step, as in the authors' code.
                with torch.set_grad_enabled(torch.is_grad_enabled() and not self.training):
                    shift = self._shift_after(step, shift)
                if self.training and shift is not None:
                    shift = shift if past is None else past[len(shifts)]
                    shifts.append(shift)
        if branch.scale is not None and self.scales is not None:
            x = x * self.scales[branch.scale].view(1, -1, 1, 1)
        return x

    def _pad(self, branch: OfflineBranch, x: Tensor, shift: Tensor | None) -> tuple[Size, Tensor]:
        """Return the padding that the next step applies itself, and ``x`` with the rest of the margins."""
        left, right, top, bottom = branch.margins
        step = branch.steps[branch.pad_at]
        zeros = shift is None and self.padding_mode == "zeros"
        if zeros and min(branch.margins) >= 0 and (left, top) == (right, bottom) and _runs_as_conv2d(step):
            return (top, left), x  # spares a padded copy of the map
        return (0, 0), pad(x, branch.margins, self.padding_mode, shift)

    def _run_layer(self, stage: Stage, x: Tensor, stride: Size, padding: Size) -> Tensor:
        if isinstance(stage, FilterStage) and isinstance(stage.filter, Average):  # cheaper than a convolution
            if stage.kernel_size == (1, 1):
                return x[:, :, :: stride[0], :: stride[1]]
            if self.dilation == (1, 1):
                return F.avg_pool2d(x, stage.kernel_size, stride)
        return self._run_stage(stage, x, stride, self.dilation, padding)

    # --- activation checkpointing -----------------------------------------------------------------------------------------

    def _may_be_recomputed(self) -> bool:
        """Return whether this forward looks like the first pass of a checkpoint: hooks take what is saved, or nothing is."""
        if not self.training or torch.compiler.is_compiling() or in_backward():
            return False
        return not torch.is_grad_enabled() or torch._C._autograd._top_saved_tensors_default_hooks(True) is not None

    def _past_shifts(self, x: Tensor) -> list[Tensor] | None:
        """Return the borders of the first pass where this forward recomputes it: the statistics have moved since.

        Raises:
            RuntimeError: no pass had this input, or several that still wait for their backward pass.
        """
        if not (self.training and self._passes) or torch.compiler.is_compiling() or not in_backward():
            return None
        sample = _sample(x)
        same = [p for p in self._passes if p.sample.shape == sample.shape and torch.equal(p.sample, sample)]
        waiting = [p for p in same if not p.recomputed] or same[-1:]  # a graph that is retained recomputes again
        if len(waiting) != 1:
            raise RuntimeError(
                f"{type(self).__name__} is recomputed by activation checkpointing, but {len(waiting)} of its last "
                f"{len(self._passes)} passes had this input, so the borders are unknown; run the backward pass of one before "
                f"the forward pass of the next, or do not checkpoint this layer: {self}"
            )
        waiting[0].recomputed = True
        return waiting[0].shifts

    def train(self, mode: bool = True) -> OfflineConv:
        self._passes = ()
        return super().train(mode)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_passes": ()}

    # --- as one convolution -----------------------------------------------------------------------------------------------

    def squeeze(self, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor | None]:
        """Return the block in eval mode as one convolution, composed in float64; differentiable in the parameters.

        Norms count with their running statistics, so in train mode `forward` computes something else.

        Args:
            dtype: of the result; by default that of the parameters.

        Returns:
            ``weight [O, I/g, kh, kw]`` and ``bias [O]``, which is None where the block has neither norms nor a bias.
        """
        like = next(self.parameters())
        weight = torch.zeros(self.plan.shape, dtype=torch.float64, device=like.device)
        bias = None if self.bias is None else self.bias.double()
        for branch in self._branches:
            kernel, shift = self._squeeze_branch(branch)
            weight = weight + align(kernel, self.kernel_size)
            if shift is not None:
                bias = shift if bias is None else bias + shift
        dtype = like.dtype if dtype is None else dtype
        return weight.to(dtype), None if bias is None else bias.to(dtype)

    def _squeeze_branch(self, branch: OfflineBranch) -> tuple[Tensor, Tensor | None]:
        """Return a branch in eval mode as a kernel of its size and a bias ``[O]`` (None is zero), in float64."""
        like = next(self.parameters()).new_empty(0, dtype=torch.float64)
        kernel: Tensor | None = None
        shift: Tensor | None = None
        for step in branch.steps:
            kernel, shift = self._kernel_after(step, kernel, like), self._shift_after(step, shift)
        assert kernel is not None  # a branch has at least one layer
        if branch.scale is not None and self.scales is not None:
            scale = self.scales[branch.scale].double()
            kernel = kernel * scale.view(-1, 1, 1, 1)
            shift = None if shift is None else shift * scale
        return kernel, shift

    def _kernel_after(self, step: Step, kernel: Tensor | None, like: Tensor) -> Tensor:
        """Return the kernel ``[M, I/g, kh, kw]`` of a branch up to and with a step, in float64; None is the input itself."""
        channels = self.in_channels if kernel is None else kernel.shape[0]
        if isinstance(step, ConvStage | NestedStage):
            weight = self._stage_kernel(step, channels, like)
            return weight if kernel is None else compose(kernel, weight, self.groups)
        if kernel is None:
            kernel = identity(channels, channels // self.groups, like)
        if isinstance(step, NormStep):
            return kernel * batch_norm_affine(getattr(self, step.name), kernel)[0].view(-1, 1, 1, 1)
        weight = self._stage_kernel(step, channels, like)
        kernel = kernel.repeat_interleave(weight.shape[0] // channels, 0).transpose(0, 1)
        # A true convolution, row by row and fully padded: the depthwise case of `compose`.
        border = (step.kernel_size[0] - 1, step.kernel_size[1] - 1)
        return F.conv2d(kernel, weight.flip((2, 3)), padding=border, groups=weight.shape[0]).transpose(0, 1)

    def _stage_kernel(self, stage: Stage, channels: int, like: Tensor) -> Tensor:
        weight = self._stage_weight(stage, channels, like)[0].double()
        return insert_zeros(weight, stage.dilation) if isinstance(stage, ConvStage | DepthwiseStage) else weight

    def _shift_after(self, step: Step, shift: Tensor | None) -> Tensor | None:
        """Apply a step to a map that is ``shift [C]`` everywhere, in float64; None is zero."""
        if isinstance(step, NormStep):
            if shift is None:
                shift = next(self.parameters()).new_zeros(step.channels, dtype=torch.float64)
            factor, offset = batch_norm_affine(getattr(self, step.name), shift)
            return factor * shift + offset
        if shift is None:
            return None
        weight, groups = self._stage_weight(step, shift.numel(), shift)
        return F.conv2d(shift.view(1, -1, 1, 1), weight.double().sum((2, 3), keepdim=True), groups=groups).flatten()

    @torch.no_grad()
    def to_conv2d(self, dtype: torch.dtype | None = None) -> nn.Conv2d:
        """Return the block in eval mode as a plain convolution, composed in float64.

        It keeps device, memory format and train/eval mode, and requires gradients where the block does.

        Args:
            dtype: of the convolution; by default that of the parameters.
        """
        weight, bias = self.squeeze(dtype)
        return self._plain_conv(weight, None if bias is None else bias.clone())


@dataclass
class _Pass:
    """A forward pass that a checkpoint may recompute: a sample of its input, and the borders in their order."""

    sample: Tensor
    shifts: list[Tensor]
    recomputed: bool = False


def _sample(x: Tensor) -> Tensor:
    """Return few elements of a map that tell it from others."""
    return x.detach()[:, ::8, :: -(-x.shape[2] // 4), :: -(-x.shape[3] // 4)].clone()


# --- branches with norms --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class OfflineBranch:
    """A branch with its norms, and where it is padded."""

    steps: tuple[Step, ...]
    scale: int | None  # row of the scales
    last: int  # index of the last linear layer, which takes the stride
    pad_at: int  # index of the step to pad before: the first layer larger than 1x1
    margins: Margins  # the block's padding, less what centre alignment crops


def _place_borders(lowered: Lowered, borders: Margins, dilation: Size) -> tuple[OfflineBranch, ...]:
    """Find where the ``borders`` of the block are due in each branch. Raise ValueError for norms inside a nested block."""
    branches = []
    for branch in lowered.branches:
        if any(isinstance(stage, NestedStage) and _has_norms(stage.lowered) for stage in branch.stages):
            raise ValueError(f"branch {branch.name!r} nests a block with branch-wise norms, which cannot run offline")
        sizes = {i: step.kernel_size for i, step in enumerate(branch.steps) if not isinstance(step, NormStep)}
        # A branch of 1x1 layers is padded at its input.
        pad_at = next((i for i, size in sizes.items() if size != (1, 1)), 0)
        extents = zip(lowered.spec.kernel_size, branch.kernel_size, dilation, strict=True)
        height, width = ((k - b) // 2 * d for k, b, d in extents)
        left, right, top, bottom = borders
        margins = (left - width, right - width, top - height, bottom - height)
        branches.append(OfflineBranch(branch.steps, branch.scale, max(sizes), pad_at, margins))
    return tuple(branches)


def _has_norms(lowered: Lowered) -> bool:
    if any(isinstance(step, NormStep) for branch in lowered.branches for step in branch.steps):
        return True
    return any(_has_norms(child) for child in lowered.children.values())


def _runs_as_conv2d(step: Step) -> bool:
    """Return whether a step is one `torch.nn.functional.conv2d`, which can pad its input itself."""
    if isinstance(step, FilterStage):
        return not isinstance(step.filter, Average)
    return isinstance(step, ConvStage | DepthwiseStage)


def pad(x: Tensor, margins: Margins, mode: str = "zeros", value: Tensor | None = None) -> Tensor:
    """Pad a map ``[N, C, H, W]``, in mode ``"zeros"`` with ``value [C]``, or crop it where a margin is negative."""
    left, right, top, bottom = (max(-margin, 0) for margin in margins)
    grow = [max(margin, 0) for margin in margins]
    if any(grow):
        size = x.shape[2:]
        x = F.pad(x, grow, mode="constant" if mode == "zeros" else mode)
        if value is not None:
            # One addition for the whole frame: written in place, its four strips would copy the gradient four times.
            frame = F.pad(x.new_zeros(1, 1, *size), grow, value=1.0)
            x = x + value.to(x.dtype).view(1, -1, 1, 1) * frame
    return x[:, :, top : x.shape[2] - bottom, left : x.shape[3] - right]
