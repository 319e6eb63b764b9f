"""A linear block as a module: its parameters, its squeeze, and its branches run one by one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import orepa_kernels
from orepa_kernels.reference import identity

from ..topology.language import ConvSpec, Size, Topology
from ..topology.lowering import ConvStage, DepthwiseStage, NestedStage, Stage, constant_values, lower


class LinearBlock(nn.Module):
    """The parameters of one linear block (paper section 3.2) and the two ways to evaluate it.

    Every branch owns parameters named after it (``origin_weight``, ``dws_depthwise``, ...); all branch scalings are the
    rows of one parameter, ``scales``. Fixed filters are buffers outside the ``state_dict``: they are computed, not learned.

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
        for name, (child_spec, child_topology) in lowered.children.items():
            self.add_module(name, LinearBlock(child_spec, child_topology, scaling, device=device, dtype=dtype))
        #: where each operand of the plan lives, as the submodules to descend into and the name there
        self.sources = tuple(
            (tuple(path), name) for *path, name in (operand.name.split(".") for operand in lowered.plan.operands)
        )
        self._place_constants(torch.empty(0, device=device, dtype=dtype))
        LinearBlock.reset_parameters(self)
        self.register_load_state_dict_post_hook(_follow_parameters)

    @property
    def plan(self) -> orepa_kernels.Block:
        """What the squeeze computes, as plain data."""
        return self._lowered.plan

    def reset_parameters(self) -> None:
        """Draw initial values: those of the declaration, in its order."""
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
        """The tensors of `plan`, in its order."""
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
        """Sum of the branches, every layer a convolution of feature maps, unpadded.

        Args:
            x: ``[N, I, H, W]``, padded already, once, on the block's input.
            stride: of the last layer of each branch.
            dilation: of every layer.
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

    def _run_stage(self, stage: Stage, x: Tensor, stride: Size, dilation: Size) -> Tensor:
        if isinstance(stage, NestedStage):
            child = getattr(self, stage.child)
            assert isinstance(child, LinearBlock)
            return child.run_branches(x, stride, dilation)
        channels = x.shape[1]
        if isinstance(stage, ConvStage):
            weight = self._own(stage.weight)
            if stage.identity:
                weight = weight + identity(weight.shape[0], weight.shape[1], weight)
            return F.conv2d(x, weight, None, stride, 0, dilation, self._lowered.spec.groups)
        if isinstance(stage, DepthwiseStage):
            return F.conv2d(x, self._own(stage.weight), None, stride, 0, dilation, channels)
        if isinstance(stage.filter, orepa_kernels.Average):
            kh, kw = stage.filter.kernel_size
            weight = x.new_full((channels, 1, kh, kw), 1 / (kh * kw))
        else:
            weight = self._own(stage.filter).to(x.dtype)[:, None].expand(channels, -1, -1, -1)
        return F.conv2d(x, weight, None, stride, 0, dilation, channels)

    def _own(self, operand: orepa_kernels.Operand) -> Tensor:
        tensor = getattr(self, operand.name)
        assert isinstance(tensor, Tensor)
        return tensor

    # --- constants follow the parameters ----------------------------------------------------------------------------------

    def _place_constants(self, like: Tensor) -> None:
        """Compute the fixed filters where ``like`` lives. Computing beats moving: no cast can wear them down.

        Those that are there already stay, at the addresses that CUDA graphs have recorded.
        """
        dtype = torch.promote_types(like.dtype, torch.float32)  # as `constant_values` has it
        for name, (channels, kernel_size, layer) in self._lowered.constants.items():
            old = getattr(self, name)
            if old is None or old.device != like.device or old.dtype != dtype:
                with torch.device("cpu"):  # whatever the default device is
                    values = constant_values(channels, kernel_size, layer, like.dtype)
                setattr(self, name, values.to(like.device))

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Any:
        old = {name: self._buffers[name] for name in self._lowered.constants}
        # ``fn`` may write in place, and tensors of inference mode do not count that
        versions = {name: t._version for name, t in old.items() if t is not None and not t.is_inference()}
        result = super()._apply(fn, recurse)
        if next(self.parameters(), None) is not None:
            for name, constant in old.items():
                as_it_was = constant is not None and name in versions and constant._version == versions[name]
                setattr(self, name, constant if as_it_was else None)
        _follow_parameters(self)
        return result


def _follow_parameters(module: nn.Module, _incompatible: object = None) -> None:
    """Bring the constants to the device and dtype of the parameters, also after ``to_empty`` and ``assign=True``."""
    assert isinstance(module, LinearBlock)
    like = next(iter(module.parameters()), None)
    if like is not None:
        module._place_constants(like)


def crop(x: Tensor, margins: list[int]) -> Tensor:
    """Drop ``margins`` rows (top and bottom) and columns (left and right)."""
    top, left = margins
    return x[:, :, top : x.shape[2] - top, left : x.shape[3] - left]
