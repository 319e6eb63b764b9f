"""Affine maps of feature maps that commute with shifts: composed and summed exactly, borders included, or refused."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from orepa_kernels.reference import compose


class Inexact(Exception):
    """No convolution computes it; the text says why."""


@dataclass(frozen=True)
class Axis:
    """One spatial axis: output ``q`` reads the inputs ``stride * q + low + dilation * t`` for every tap ``t``.

    There are ``floor((size + extra) / stride) + 1`` outputs, so ``extra`` is all padding less the reach of the taps. The
    default is that of a 1x1 convolution.
    """

    taps: int = 1
    low: int = 0
    dilation: int = 1
    stride: int = 1
    extra: int = -1

    @property
    def high(self) -> int:
        """The offset of the last tap."""
        return self.low + self.dilation * (self.taps - 1)

    def reads_before(self) -> bool:
        """Return whether a tap may read before the first input."""
        return self.low < 0

    def reads_after(self) -> bool:
        """Return whether a tap may read after the last input."""
        return self.extra + self.high >= 0

    def over(self, low: int, high: int, steps: Iterable[int]) -> Axis:
        """Return the axis with taps from ``low`` to ``high`` that lie as far apart as all of ``steps`` allow."""
        step = math.gcd(*steps) or 1
        return replace(self, taps=(high - low) // step + 1, low=low, dilation=step)

    def then(self, second: Axis) -> Axis:
        """Return the axis of a composition."""
        steps = self.dilation * (self.taps > 1), self.stride * second.dilation * (second.taps > 1)
        axis = self.over(self.low + self.stride * second.low, self.high + self.stride * second.high, steps)
        return replace(axis, stride=self.stride * second.stride, extra=self.extra + self.stride * (1 + second.extra))

    def is_zero_outside(self, second: Axis) -> bool:
        """Return whether the outputs, continued to where ``second`` reads, see nothing but padding there."""
        before = not second.reads_before() or self.high < self.stride
        return before and (not second.reads_after() or self.extra + 1 + self.low >= 0)

    def plus(self, other: Axis) -> Axis:
        """Return the axis of a sum."""
        steps = [axis.dilation for axis in (self, other) if axis.taps > 1]
        return self.over(min(self.low, other.low), max(self.high, other.high), [*steps, self.low - other.low])

    def symmetric(self) -> Axis:
        """Return the axis with as few taps more as it takes to pad both sides alike: ``-low`` is the padding."""
        least = max(-self.low, self.high + self.extra + 1, 0, -(-(self.extra + 1) // 2))
        for dilation in (self.dilation if self.taps > 1 else 1, 1):
            for padding in range(least, least + dilation):
                high = padding - self.extra - 1
                if (self.low + padding) % dilation == 0 and (high + padding) % dilation == 0:
                    return self.over(-padding, high, [dilation if high > -padding else 0])
        raise AssertionError("a dilation of 1 always fits")


@dataclass(frozen=True)
class LinearMap:
    """A convolution with a bias.

    Args:
        kernel: ``[O, I/g, kh, kw]``; or ``[O or 1, 1, kh, kw]`` with ``groups=0``: per channel, for any number of them.
        shift: ``[O]`` or ``[1]``.
        groups: ``g``.
        axes: of height and width.
        mode: the padding mode; "" where no tap reads outside.
        shifted: whether any part of the shift is not zero.
    """

    kernel: Tensor
    shift: Tensor
    groups: int = 0
    axes: tuple[Axis, Axis] = (Axis(), Axis())
    mode: str = ""
    shifted: bool = False

    @property
    def stride(self) -> tuple[int, int]:
        """The strides of both axes."""
        return self.axes[0].stride, self.axes[1].stride

    @property
    def is_scale(self) -> bool:
        """Whether it only scales and shifts channels."""
        return self.axes == (Axis(), Axis()) and self.groups == self.kernel.shape[0] and self.kernel.shape[1] == 1

    def on(self, channels: int, device: str | torch.device) -> LinearMap:
        """Return the map of an input with so many channels, in float64 on a device.

        Raises:
            Inexact: it is made for another number.
        """
        own = self.kernel.shape[1] * self.groups or max(self.kernel.shape[0], self.shift.numel())
        if own != channels and (self.groups or own != 1):
            raise Inexact(f"a layer of {own} channels gets {channels}")
        kernel, shift = (t.detach().to(device, torch.float64) for t in (self.kernel, self.shift))
        kernel = kernel if self.groups else kernel.expand(channels, -1, -1, -1)
        return replace(self, kernel=kernel, shift=shift.expand(len(kernel)), groups=self.groups or channels)

    def times(self, factor: float) -> LinearMap:
        """Return a multiple."""
        return self if factor == 1 else replace(self, kernel=factor * self.kernel, shift=factor * self.shift)

    def then(self, second: LinearMap) -> LinearMap:
        """Return the map that applies this one first.

        Raises:
            Inexact: the second one pads with other values than the composition would read.
        """
        outside = any(axis.reads_before() or axis.reads_after() for axis in second.axes)
        if outside:
            self._check_border(second)
        axes = self.axes[0].then(second.axes[0]), self.axes[1].then(second.axes[1])
        if second.is_scale:
            kernel, groups = self.kernel * second.kernel, self.groups
        elif self.is_scale:
            groups = second.groups
            kernel = second.kernel.unflatten(0, (groups, -1)) * self.kernel.reshape(groups, 1, -1, 1, 1)
            kernel = kernel.flatten(0, 1)
        else:
            groups = math.gcd(self.groups, second.groups)
            early, late = (_regroup(m.kernel, m.groups, groups) for m in (self, second))
            early = _spread(early, [a.dilation // axis.dilation for a, axis in zip(self.axes, axes, strict=True)])
            spacing = [a.stride * b.dilation for a, b in zip(self.axes, second.axes, strict=True)]
            late = _spread(late, [s // axis.dilation for s, axis in zip(spacing, axes, strict=True)])
            kernel = compose(early, late, groups)
        through = second.kernel.sum((2, 3)).unflatten(0, (second.groups, -1)) @ self.shift.reshape(second.groups, -1, 1)
        shift, shifted = second.shift + through.flatten(), self.shifted or second.shifted
        return LinearMap(kernel, shift, groups, axes, second.mode if outside else self.mode, shifted)

    def _check_border(self, second: LinearMap) -> None:
        """Refuse a second map whose padding is not what this one makes of its own padding."""
        if second.mode != "zeros":  # it copies values, and so what makes them, where that is one pixel each
            if self.axes != (Axis(), Axis()):
                raise Inexact(f"{second.mode!r} padding follows a layer that is larger than 1x1")
        elif self.shifted:
            raise Inexact("a bias or a norm's shift comes before zero padding, which does not have it")
        elif self.mode not in ("", "zeros") or not all(map(Axis.is_zero_outside, self.axes, second.axes)):
            raise Inexact("zero padding follows a padded layer that is larger than 1x1")

    def plus(self, other: LinearMap) -> LinearMap:
        """Return the sum.

        Raises:
            Inexact: the outputs differ in shape, or the paddings in mode.
        """
        if self.kernel.shape[0] != other.kernel.shape[0]:
            raise Inexact(f"the branches have {self.kernel.shape[0]} and {other.kernel.shape[0]} channels")
        if self.stride != other.stride:
            raise Inexact(f"the branches have strides {self.stride} and {other.stride}")
        if any(a.extra != b.extra for a, b in zip(self.axes, other.axes, strict=True)):
            raise Inexact("the branches have outputs of different sizes")
        if len(modes := {self.mode, other.mode} - {""}) > 1:
            raise Inexact(f"the branches pad in different modes: {', '.join(sorted(modes))}")
        axes = self.axes[0].plus(other.axes[0]), self.axes[1].plus(other.axes[1])
        groups = math.gcd(self.groups, other.groups)
        first, second = (_place(_regroup(m.kernel, m.groups, groups), m.axes, axes) for m in (self, other))
        shift, shifted = self.shift + other.shift, self.shifted or other.shifted
        return LinearMap(first + second, shift, groups, axes, "".join(modes), shifted)

    def symmetric(self) -> LinearMap:
        """Return the map with zero taps where it takes some to pad both sides alike, as `torch.nn.Conv2d` does."""
        axes = self.axes[0].symmetric(), self.axes[1].symmetric()
        return replace(self, kernel=_place(self.kernel, self.axes, axes), axes=axes)

    def as_conv2d(self, bias: bool = False, dtype: torch.dtype | None = None) -> nn.Conv2d:
        """Return a convolution of this geometry on the device "meta"; the map is `symmetric`."""
        vertical, horizontal = self.axes
        return nn.Conv2d(
            self.kernel.shape[1] * self.groups,
            self.kernel.shape[0],
            (vertical.taps, horizontal.taps),
            self.stride,
            (-vertical.low, -horizontal.low),
            (vertical.dilation, horizontal.dilation),
            self.groups,
            bias=bias,
            padding_mode=self.mode or "zeros",  # type: ignore[arg-type] # one of torch's
            device="meta",
            dtype=dtype,
        )

    def aligned(self, other: LinearMap) -> Tensor:
        """Return the kernel with the groups and on the taps of another map, which cover its own."""
        return _place(_regroup(self.kernel, self.groups, other.groups), self.axes, other.axes)


def _spread(kernel: Tensor, factors: Iterable[int]) -> Tensor:
    """Insert zeros between taps, so that they lie ``factors`` apart."""
    for dim, factor in enumerate(factors, 2):
        if factor > 1 and kernel.shape[dim] > 1:
            shape = list(kernel.shape)
            shape[dim] = (shape[dim] - 1) * factor + 1
            wide = kernel.new_zeros(shape)
            wide.movedim(dim, 0)[::factor] = kernel.movedim(dim, 0)
            kernel = wide
    return kernel


def _place(kernel: Tensor, old: tuple[Axis, Axis], new: tuple[Axis, Axis]) -> Tensor:
    """Move a kernel to axes that cover its own."""
    kernel = _spread(kernel, [a.dilation // b.dilation for a, b in zip(old, new, strict=True)])
    (top, bottom), (left, right) = (
        ((a.low - b.low) // b.dilation, (b.high - a.high) // b.dilation) for a, b in zip(old, new, strict=True)
    )
    return F.pad(kernel, (left, right, top, bottom))


def _regroup(kernel: Tensor, groups: int, fewer: int) -> Tensor:
    """Write a kernel ``[O, I/groups, kh, kw]`` as one of fewer groups, block-diagonally."""
    if groups == fewer:
        return kernel
    blocks = kernel.reshape(fewer, groups // fewer, -1, *kernel.shape[1:])
    eye = torch.eye(groups // fewer, dtype=kernel.dtype, device=kernel.device)
    return torch.einsum("groihw,rq->groqihw", blocks, eye).reshape(len(kernel), -1, *kernel.shape[2:])
