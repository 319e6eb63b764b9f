"""A linear block as a module: its parameters, and its branches run one by one on feature maps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import orepa_kernels
from orepa_kernels.reference import identity

from ..topology.language import ConvSpec, Size, Topology
from ..topology.lowering import ConvStage, DepthwiseStage, NestedStage, Stage, lower


class LinearBlock(nn.Module):
    """The parameters of one linear block (paper section 3.2) and its unsqueezed forward.

    Every branch has parameters named after it (``origin_weight``, ``dws_depthwise``, ...); all branch scalings are the rows of
    one parameter, ``scales``. Fixed filters are buffers outside the ``state_dict``: they are computed, not learned.

    Args:
        spec: the convolution that the block stands for.
        topology: linearized.
        scaling: ``"vector"``, ``"scalar"`` or ``"none"`` (paper Table 3).
    """

    scales: nn.Parameter | None

    def __init__(
        self,
        spec: ConvSpec,
        topology: Topology,
        scaling: str = "vector",
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        lowered = lower(topology, spec, scaling)
        self._lowered = lowered
        for name, (shape, _) in lowered.parameters.items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape, device=device, dtype=dtype)))
        scales = lowered.scales
        self.register_parameter(
            "scales", None if scales is None else nn.Parameter(torch.empty(scales.shape, device=device, dtype=dtype))
        )
        for name in lowered.constants:
            self.register_buffer(name, None, persistent=False)
        for name, child in lowered.children.items():
            self.add_module(name, LinearBlock(child.spec, child.topology, scaling, device=device, dtype=dtype))
        names = [operand.name for operand in lowered.plan.operands]
        #: the place of the tensor behind each operand of the plan: the submodules to descend into and the name there
        self.sources = tuple((tuple(path), name) for *path, name in (full.split(".") for full in names))
        self._dilations = {names.index(full): dilation for full, dilation in lowered.dilations.items()}
        self._place_constants(torch.empty(0, device=device, dtype=dtype))
        LinearBlock.reset_parameters(self)
        self.register_load_state_dict_post_hook(_follow_parameters)

    @property
    def plan(self) -> orepa_kernels.Block:
        """The squeeze as plain data, for a backend."""
        return self._lowered.plan

    def reset_parameters(self) -> None:
        """Draw the initial values of the declaration, in its order."""
        for name, (_, init) in self._lowered.parameters.items():
            init(getattr(self, name))
        if self.scales is not None:
            with torch.no_grad():
                for row, value in zip(self.scales, self._lowered.scale_values, strict=True):
                    row.fill_(value)
        for child in self.children():
            if isinstance(child, LinearBlock):
                child.reset_parameters()

    def operands(self) -> list[Tensor]:
        """Return the tensors of `plan`, in its order."""
        return self.operands_of(self.source_tensors())

    def operands_of(self, tensors: list[Tensor]) -> list[Tensor]:
        """Return the operands for the tensors at `sources`: the same, but for zeros between the taps of dilated ones."""
        if not self._dilations:
            return tensors
        dilation = [self._dilations.get(index) for index in range(len(tensors))]
        return [t if d is None else insert_zeros(t, d) for t, d in zip(tensors, dilation, strict=True)]

    def source_tensors(self) -> list[Tensor]:
        """Return the parameters and filters at `sources`."""
        tensors = []
        for path, name in self.sources:
            module: nn.Module = self
            for child in path:
                module = getattr(module, child)
            tensors.append(getattr(module, name))
        return tensors

    # --- the unsqueezed forward -----------------------------------------------------------------------------------------

    def run_branches(
        self,
        x: Tensor,
        stride: Size = (1, 1),
        dilation: Size = (1, 1),
        combine: Callable[[str, Tensor], Any] | None = None,
    ) -> Tensor:
        """Sum the branches, every layer an unpadded convolution of feature maps.

        Args:
            x: ``[N, I, H, W]``, padded once, as the block's input.
            stride: of the last layer of each branch.
            dilation: of every layer, times its own.
            combine: called with each branch's name and scaled output, for diagnostics.

        Returns:
            ``[N, O, H', W']``, equal to the convolution with the squeezed kernel.
        """
        kernel_size, total = self._lowered.spec.kernel_size, None
        for branch in self._lowered.branches:
            # Centre alignment on feature maps: a smaller kernel sees less of the border.
            y = crop(x, [(k - b) // 2 * d for k, b, d in zip(kernel_size, branch.kernel_size, dilation, strict=True)])
            for stage in branch.stages[:-1]:
                y = self._run_stage(stage, y, (1, 1), dilation)
            y = self._run_stage(branch.stages[-1], y, stride, dilation)
            if branch.scale is not None and self.scales is not None:
                y = y * self.scales[branch.scale].view(1, -1, 1, 1)
            if combine is not None:
                combine(branch.name, y)
            total = y if total is None else total + y
        assert total is not None  # a topology has at least one branch
        return total

    def _run_stage(self, stage: Stage, x: Tensor, stride: Size, dilation: Size, padding: Size = (0, 0)) -> Tensor:
        if isinstance(stage, NestedStage):
            return self._child(stage).run_branches(x, stride, dilation)
        weight, groups = self._stage_weight(stage, x.shape[1], x)
        if isinstance(stage, ConvStage | DepthwiseStage):
            dilation = (dilation[0] * stage.dilation[0], dilation[1] * stage.dilation[1])
        return F.conv2d(x, weight, None, stride, padding, dilation, groups)

    def _stage_weight(self, stage: Stage, channels: int, like: Tensor) -> tuple[Tensor, int]:
        """Return a layer as the weight and the groups of one convolution, of the layer's dilation, of ``channels`` channels.

        What is fixed (filters, identities) comes in the dtype of ``like``.
        """
        groups = self._lowered.spec.groups
        if isinstance(stage, NestedStage):
            child = self._child(stage)
            operands = [t.to(like.dtype) for t in child.operands()]
            return orepa_kernels.squeeze([child.plan], [operands], backend="reference")[0], groups
        if isinstance(stage, ConvStage):
            weight = self._tensor(stage.weight)
            if stage.identity:
                weight = weight.to(torch.promote_types(weight.dtype, like.dtype))
                weight = weight + identity(weight.shape[0], weight.shape[1], weight)
            return weight, groups
        if isinstance(stage, DepthwiseStage):
            return self._tensor(stage.weight), channels
        if isinstance(stage.filter, orepa_kernels.Average):
            kh, kw = stage.filter.kernel_size
            return like.new_full((channels, 1, kh, kw), 1 / (kh * kw)), channels
        return self._tensor(stage.filter).to(like.dtype)[:, None].expand(channels, -1, -1, -1), channels

    def _child(self, stage: NestedStage) -> LinearBlock:
        child = getattr(self, stage.child)
        assert isinstance(child, LinearBlock)
        return child

    def _tensor(self, operand: orepa_kernels.Operand) -> Tensor:
        tensor = getattr(self, operand.name)
        assert isinstance(tensor, Tensor)
        return tensor

    # --- constants follow the parameters ----------------------------------------------------------------------------------

    def _place_constants(self, like: Tensor) -> None:
        """Compute the fixed filters on the device of ``like``, in its dtype and in float32 at least.

        They are computed anew, not cast, so that they stay exact. Those that fit already stay, at the addresses that CUDA
        graphs have recorded.
        """
        dtype = torch.promote_types(like.dtype, torch.float32)
        for name, (channels, kernel_size, layer) in self._lowered.constants.items():
            old = getattr(self, name)
            if old is None or old.device != like.device or old.dtype != dtype:
                with torch.device("cpu"):  # whatever the default device is
                    values = layer.values(channels, kernel_size).to(dtype)
                setattr(self, name, values.to(like.device))

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Any:
        old = {name: self._buffers[name] for name in self._lowered.constants}
        # ``fn`` may write in place, which tensors of inference mode do not count.
        versions = {name: t._version for name, t in old.items() if t is not None and not t.is_inference()}
        result = super()._apply(fn, recurse)
        if next(self.parameters(), None) is not None:
            for name, constant in old.items():
                unchanged = constant is not None and name in versions and constant._version == versions[name]
                setattr(self, name, constant if unchanged else None)
        _follow_parameters(self)
        return result


def _follow_parameters(module: nn.Module, _incompatible: object = None) -> None:
    """Move the constants to the device and dtype of the parameters, after ``to_empty`` and ``assign=True`` as well."""
    assert isinstance(module, LinearBlock)
    like = next(iter(module.parameters()), None)
    if like is not None:
        module._place_constants(like)


def insert_zeros(weight: Tensor, dilation: Size) -> Tensor:
    """Return the kernel ``[.., .., r*(kh-1)+1, r*(kw-1)+1]`` that convolves as ``weight`` does with a dilation."""
    (rows, columns), (height, width) = weight.shape[2:], dilation
    kernel = weight.new_zeros(*weight.shape[:2], height * (rows - 1) + 1, width * (columns - 1) + 1)
    kernel[:, :, ::height, ::width] = weight
    return kernel


def crop(x: Tensor, margins: list[int]) -> Tensor:
    """Drop ``margins`` rows (top and bottom) and columns (left and right)."""
    top, left = margins
    return x[:, :, top : x.shape[2] - top, left : x.shape[3] - left]
