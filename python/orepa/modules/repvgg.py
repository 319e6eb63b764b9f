"""`RepVGGBlock`: the OREPA-VGG block, three branches with a norm each, the largest of them squeezed online."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Proxy

from orepa_kernels.reference import align, identity

from ..module_info import batch_norm_affine
from ..topology.language import Size, Topology, pair
from .conv_base import call_as_leaf
from .linear_block import crop
from .orepa_conv import OREPAConv


class RepVGGBlock(nn.Module):
    """``act(BN(OREPA kxk) + BN(1x1) + BN(identity))``, the OREPA-VGG block (paper section 4.5).

    The three branches stay apart in training, because their norms see different statistics; the kxk branch is an
    `OREPAConv`. In eval mode the sum is one convolution with a bias: `squeeze`, `to_conv2d`, `deploy`. Padding happens once,
    on the block's input, and the smaller branches see the middle of it, so that this holds on the borders as well.

    Args:
        in_channels, out_channels, stride, dilation, groups, padding_mode, device, dtype: as for `torch.nn.Conv2d`.
        kernel_size: odd, one number or ``(kh, kw)``.
        padding: as for `torch.nn.Conv2d`; by default ``dilation * (kernel_size - 1) / 2``, which at stride 1 keeps the size.
        act: a module, a factory of one such as `torch.nn.ReLU`, or None.
        topology, scaling, backend, options: of the kxk branch; see `OREPAConv`.

    Raises:
        ValueError: an even kernel size, or an argument that `OREPAConv` refuses.

    Shape:
        ``[N, I, H, W]`` to ``[N, O, H', W']`` as for `torch.nn.Conv2d`. The identity branch exists where ``O == I`` and
        the stride is 1.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Size = 3,
        stride: int | Size = 1,
        padding: int | Size | str | None = None,
        dilation: int | Size = 1,
        groups: int = 1,
        padding_mode: str = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        act: nn.Module | Callable[[], nn.Module] | None = nn.ReLU,
        topology: str | Callable[..., Topology] = "repvgg_dense",
        scaling: str = "vector",
        backend: str = "auto",
        **options: Any,
    ) -> None:
        super().__init__()
        size, dilations = pair(kernel_size), pair(dilation, "dilation")
        if any(k % 2 == 0 for k in size):
            raise ValueError(f"kernel_size must be odd, for the 1x1 branch to have a centre, got {kernel_size}")
        self._margins = (size[0] // 2 * dilations[0], size[1] // 2 * dilations[1])
        padding = self._margins if padding is None else padding
        placement: dict[str, Any] = {"device": device, "dtype": dtype}
        options |= {"bias": False, "padding_mode": padding_mode, "topology": topology, "scaling": scaling, **placement}
        self.dense = OREPAConv(
            in_channels, out_channels, size, stride, padding, dilations, groups, backend=backend, **options
        )
        strides = self.dense.stride
        self.dense_bn = nn.BatchNorm2d(out_channels, **placement)
        self.pointwise = nn.Conv2d(in_channels, out_channels, 1, strides, groups=groups, bias=False, **placement)
        self.pointwise_bn = nn.BatchNorm2d(out_channels, **placement)
        keeps_shape = in_channels == out_channels and strides == (1, 1)
        self.identity_bn = nn.BatchNorm2d(out_channels, **placement) if keeps_shape else None
        if act is None:
            self.act: nn.Module = nn.Identity()
        else:
            self.act = act if isinstance(act, nn.Module) else act().to(device=device, dtype=dtype)

    def reset_parameters(self) -> None:
        """Draw new initial values: the topology's, `torch.nn.Conv2d`'s, and norms that change nothing."""
        for module in (self.dense, self.dense_bn, self.pointwise, self.pointwise_bn, self.identity_bn):
            if module is not None:
                module.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        """Sum three branches, each with its norm; the kxk one is a single convolution with the squeezed kernel."""
        if isinstance(x, Proxy):
            return call_as_leaf(self, x)
        return self._add_branches(self.dense(x), x)

    def forward_branches(self, x: Tensor) -> Tensor:
        """Run `forward` with the kxk branch unsqueezed, layer by layer on feature maps: the ground truth."""
        return self._add_branches(self.dense.forward_branches(x), x)

    def _add_branches(self, dense: Tensor, x: Tensor) -> Tensor:
        middle = self._middle(x)
        y = self.dense_bn(dense) + self.pointwise_bn(self.pointwise(middle))
        if self.identity_bn is not None:
            y = y + self.identity_bn(middle)
        return self.act(y)

    def _middle(self, x: Tensor) -> Tensor:
        """Return the part of the padded input under the centre of the kernel: what a 1x1 kernel sees."""
        height, width = self._margins
        if self.dense.borders == (width, width, height, height):
            return x  # the usual case: cropping would undo the padding
        return crop(self.dense.pad(x), [height, width])

    # --- one convolution --------------------------------------------------------------------------------------------------

    def squeeze(self, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
        """Return the block before its activation, in eval mode, as one convolution; differentiable in the parameters.

        Norms count with their running statistics, so in train mode `forward` computes something else.

        Args:
            dtype: of the result; by default that of the parameters. Half precision is composed in float32.

        Returns:
            ``weight [O, I/g, kh, kw]`` and ``bias [O]``.
        """
        parameter_dtype = self.pointwise.weight.dtype
        dtype = parameter_dtype if dtype is None else dtype
        weight, bias = self._fold(self.dense.squeeze(torch.promote_types(parameter_dtype, torch.float32)))
        return weight.to(dtype), bias.to(dtype)

    def _fold(self, dense: Tensor) -> tuple[Tensor, Tensor]:
        """Add the other branches and the norms to ``dense``, the squeezed kernel; return the bias in float64."""

        def scale(kernel: Tensor, norm: nn.Module) -> tuple[Tensor, Tensor]:
            factor, shift = batch_norm_affine(norm, kernel)
            return kernel * factor.to(kernel.dtype).view(-1, 1, 1, 1), shift

        weight, bias = scale(dense, self.dense_bn)
        centre, shift = scale(self.pointwise.weight.to(dense.dtype), self.pointwise_bn)
        bias = bias + shift
        if self.identity_bn is not None:
            kernel, shift = scale(identity(dense.shape[0], dense.shape[1], dense), self.identity_bn)
            centre, bias = centre + kernel, bias + shift
        return weight + align(centre, self.dense.kernel_size), bias

    @torch.no_grad()
    def to_conv2d(self) -> nn.Conv2d:
        """Return the block before its activation, in eval mode, as a plain convolution with a bias, composed in float64.

        It keeps device, dtype, memory format and train/eval mode, and requires gradients where the block does.
        """
        conv = self.dense.to_conv2d()
        weight, bias = self._fold(self.dense._compose(torch.float64))
        trainable = any(p.requires_grad for p in self.parameters())
        conv.weight.copy_(weight).requires_grad_(trainable)
        conv.bias = nn.Parameter(bias.to(conv.weight.dtype), requires_grad=trainable)
        return conv.train(self.training)

    def deploy(self) -> nn.Module:
        """Return the block in eval mode as plain modules: ``Sequential(conv, act)``, or the convolution without an ``act``.

        The block itself does not change.
        """
        conv = self.to_conv2d()
        if isinstance(self.act, nn.Identity):
            return conv
        return nn.Sequential(OrderedDict(conv=conv, act=copy.deepcopy(self.act))).train(self.training)
