"""The interface of `nn.Conv2d` for blocks that stand in its place: checked arguments, bias, padding, repr."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Proxy

import orepa_kernels

from ..module_info import conv2d_like, is_channels_last
from ..topology.fingerprint import fingerprint_tensor, is_other_function
from ..topology.language import ConvSpec, Size, Topology, pair
from .linear_block import LinearBlock
from .squeezed_weight import NO_WRITES, SqueezedWeight, read_only

PADDING_MODES = ("zeros", "reflect", "replicate", "circular")


def call_as_leaf(module: nn.Module, x: Proxy) -> Any:
    """Record a call of a module in an fx graph, whose tracer would fail on what the module does inside.

    Raises:
        RuntimeError: the module is the root of the trace, which has to be traced inside.
    """
    path = x.tracer.path_of_module(module)  # type: ignore[attr-defined]
    if not path:
        name = type(module).__name__
        raise RuntimeError(
            f"fx cannot trace an {name} by itself: trace a model around it, or convert it (orepa.convert)"
        )
    return x.tracer.create_proxy("call_module", path, (x,), {})


class ConvGeometry:
    """The checked arguments of a convolution, as `nn.Conv2d` takes and stores them.

    ``borders`` is the padding on the left, right, top and bottom, in the order of `torch.nn.functional.pad`.

    Raises:
        ValueError: naming the argument, what was given and what is allowed.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Size,
        stride: int | Size,
        padding: int | Size | str,
        dilation: int | Size,
        groups: int,
        padding_mode: str,
    ) -> None:
        size, strides, self.dilation = pair(kernel_size), pair(stride, "stride"), pair(dilation, "dilation")
        for name, value in (("in_channels", in_channels), ("out_channels", out_channels), ("groups", groups)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a positive integer, got {value!r}")
        for name, value in (("in_channels", in_channels), ("out_channels", out_channels)):
            if value % groups:
                raise ValueError(f"groups={groups} must divide {name}={value}")
        if padding_mode not in PADDING_MODES:
            raise ValueError(f"padding_mode must be one of {', '.join(PADDING_MODES)}, got {padding_mode!r}")
        self.spec = ConvSpec(in_channels, out_channels, size, groups, strides)
        self.borders = _borders(padding, size, strides, self.dilation)
        self.padding = padding if isinstance(padding, str) else (self.borders[2], self.borders[0])
        self.padding_mode = padding_mode


def _borders(padding: int | Size | str, kernel_size: Size, stride: Size, dilation: Size) -> tuple[int, int, int, int]:
    if isinstance(padding, str):
        if padding not in ("same", "valid"):
            raise ValueError(f"padding must be a number, two numbers, 'same' or 'valid', got {padding!r}")
        if padding == "valid":
            return (0, 0, 0, 0)
        if stride != (1, 1):
            raise ValueError(f"padding='same' needs stride=1, got {stride}")
        total = [d * (k - 1) for k, d in zip(kernel_size, dilation, strict=True)]
        top, left = (t // 2 for t in total)
        return (left, total[1] - left, top, total[0] - top)
    top, left = (padding, padding) if isinstance(padding, int) else padding
    if min(top, left) < 0:
        raise ValueError(f"padding must not be negative, got {padding}")
    return (left, left, top, top)


class ConvBlock(LinearBlock):
    """A linear block with the attributes, the bias ``[O]``, the padding and the repr of an `nn.Conv2d`.

    ``name`` is that of the topology. A TypeError says that ``dtype`` is not one of the four of `orepa_kernels.DTYPES`.
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        geometry: ConvGeometry,
        topology: Topology,
        name: str | Callable[..., Topology],
        scaling: str,
        bias: bool,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        if dtype is not None and dtype not in orepa_kernels.DTYPES:
            raise TypeError(f"dtype must be float64, float32, bfloat16 or float16, got {dtype}")
        spec = geometry.spec
        super().__init__(spec, topology, scaling, device=device, dtype=dtype)
        self.in_channels, self.out_channels, self.groups = spec.in_channels, spec.out_channels, spec.groups
        self.kernel_size, self.stride, self.dilation = spec.kernel_size, spec.stride, geometry.dilation
        self.padding, self.padding_mode, self.borders = geometry.padding, geometry.padding_mode, geometry.borders
        self.topology = name if isinstance(name, str) else getattr(name, "__name__", type(name).__name__)
        self.scaling = scaling
        vector = torch.empty(spec.out_channels, device=device, dtype=dtype) if bias else None
        self.register_parameter("bias", None if vector is None else nn.Parameter(vector))
        self._reset_bias()

    def reset_parameters(self) -> None:
        """Draw initial values: the topology's, and for the bias those of `torch.nn.Conv2d`."""
        super().reset_parameters()
        self._reset_bias()

    @property
    def qconfig(self) -> None:
        # torch's eager quantization goes by classes, so it would leave a block alone that it is to quantize, and say nothing.
        # It leaves alone for good reason where this is None.
        if "_qconfig" not in vars(self):
            raise AttributeError("qconfig")

    @qconfig.setter
    def qconfig(self, value: Any) -> None:
        if value is not None:
            raise RuntimeError(
                f"{type(self).__name__} cannot be quantized: orepa.convert the model before torch.ao.quantization prepares it, "
                "or give blocks that are to stay as they are the qconfig None"
            )
        vars(self)["_qconfig"] = None

    def _reset_bias(self) -> None:
        if self.bias is not None:
            bound = 1 / math.sqrt(math.prod(self.plan.shape[1:]))
            nn.init.uniform_(self.bias, -bound, bound)

    # --- the weight -------------------------------------------------------------------------------------------------------

    @property
    def weight(self) -> Tensor:
        """The squeezed kernel ``[O, I/g, kh, kw]``, to be read like the weight of `torch.nn.Conv2d`.

        It is computed from the branches: differentiable where gradients are on and the block is not frozen, cached as the
        kernel of `forward` is.

        Raises:
            RuntimeError: where it, or a view of it, is written to (`OREPAConv.load_kernel_` sets it).
            AttributeError: where a tensor is assigned, or the block has branch-wise norms and so no weight that goes with its
                ``bias``.
        """
        kernel = self._read_weight()
        return kernel if torch.compiler.is_compiling() else read_only(kernel)

    @weight.setter
    def weight(self, value: object) -> None:
        raise AttributeError(NO_WRITES)

    def _read_weight(self) -> Tensor:
        raise NotImplementedError

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        # Called by the assignment of a parameter, and, with the weight that they read, by hooks that compute a weight.
        if name == "weight" or isinstance(param, SqueezedWeight):
            raise AttributeError(NO_WRITES)
        super().register_parameter(name, param)

    # --- saving -----------------------------------------------------------------------------------------------------------

    def get_extra_state(self) -> Tensor:
        """Return numbers that identify what defines the block's function and is no parameter, as a tensor."""
        return fingerprint_tensor(self._lowered, next(self.parameters(), torch.empty(0)))

    def set_extra_state(self, state: object) -> None:
        """Raise ValueError where a state is that of a block with the same parameters and another function."""
        if isinstance(state, Tensor) and is_other_function(state, self._lowered):
            raise ValueError(
                "saved from a block whose parameters have the same names, but which computes something else than this "
                f"{type(self).__name__}({self.extra_repr()}): build the block with the topology, scaling and options (such as "
                "prior=) that it was saved with, or remove this key to load the parameters anyway"
            )

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Mapping[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        key = f"{prefix}_extra_state"
        try:
            self.set_extra_state(state_dict.get(key))
        except ValueError as error:
            error_msgs.append(f"{key}: {error}")  # with the layer's name; raised when all layers have been looked at
            return
        lists = (missing_keys, unexpected_keys, error_msgs)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, *lists)
        if key in missing_keys:  # saved by an earlier version
            missing_keys.remove(key)

    # --- traced and scripted ----------------------------------------------------------------------------------------------

    __jit_unused_properties__ = ("plan", "weight", "ends_in_norms")

    def __prepare_scriptable__(self) -> nn.Module:
        raise RuntimeError(
            f"torch.jit.script cannot compile an {type(self).__name__}: convert the model first (orepa.convert(model.eval()))"
        )

    # --- as a convolution -------------------------------------------------------------------------------------------------

    def pad(self, x: Tensor) -> Tensor:
        """Return the block's input ``[N, I, H, W]`` with its borders, in its padding mode."""
        return F.pad(x, self.borders, mode="constant" if self.padding_mode == "zeros" else self.padding_mode)

    def _run_unsqueezed(self, run: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """Return ``run`` of a batch plus the bias; a single image counts as a batch of one."""
        y = run(x if x.dim() == 4 else x.unsqueeze(0))
        if self.bias is not None:
            y = y + self.bias.view(1, -1, 1, 1)
        return y if x.dim() == 4 else y.squeeze(0)

    def _plain_conv(self, weight: Tensor, bias: Tensor | None) -> nn.Conv2d:
        """Return a plain convolution with the block's mode and memory format; it is trainable where the block is."""
        channels_last = is_channels_last(*(p for p in self.parameters() if p.dim() == 4))
        weight = weight.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
        return conv2d_like(self, weight, bias, any(p.requires_grad for p in self.parameters()))

    def extra_repr(self) -> str:
        text = f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}"
        defaults = {"padding": (0, 0), "dilation": (1, 1), "groups": 1, "padding_mode": "zeros"}
        for name, default in defaults.items():
            if getattr(self, name) != default:
                text += f", {name}={getattr(self, name)}"
        text += f"{'' if self.bias is not None else ', bias=False'}, topology={self.topology}"
        return text if self.scaling == "vector" else f"{text}, scaling={self.scaling}"
