"""`OREPAConv`: a convolution whose kernel is squeezed from many branches at every training step."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from operator import attrgetter
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Proxy

import orepa_kernels
from orepa_kernels import Block, Dense, Operand
from orepa_kernels.api import squeeze_together
from orepa_kernels.dispatch import resolve

from ..topology.language import Size, Topology, declaration
from .branch_order import SplitBlock, check_order, prefers_branch, split_block
from .conv_base import ConvBlock, ConvGeometry, call_as_leaf
from .kernel_store import Step, StoredKernel, in_backward, open_steps, request_key, squeeze_to_store

_requires_grad = attrgetter("requires_grad")  # cheaper than a generator: every training step asks


def default_topology(kernel_size: Size, groups: int = 1) -> str:
    """Return the paper's block for a kernel size: Rep-1x1, the deep stem from 7 to 11, the OREPA block elsewhere.

    Even sizes have no centre for a 1x1 branch, so they get the block without one. Grouped (also depthwise) kernels and those
    from 13 on get the OREPA block too: they have far more degrees of freedom than a stack of 3x3 kernels.
    """
    if max(kernel_size) == 1:
        return "rep1x1"
    if any(k % 2 == 0 for k in kernel_size):
        return "repvgg_dense"
    return "deep_stem" if groups == 1 and 7 <= max(kernel_size) < 13 else "orepa"


def process_count() -> int:
    """Return the number of processes that train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


class OREPAConv(ConvBlock):
    """A drop-in for `torch.nn.Conv2d` that trains as a re-parameterised block at the price of one convolution.

    Training squeezes the block's branches into one kernel, differentiably, and convolves once (paper section 3.3). Where the
    block does not train (in eval mode with gradients off, or frozen), the kernel is cached until something writes to a
    parameter; see `clear_cache`. The norm after the block belongs to the host model and matters: without one, training diverges
    (paper Table 3).

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device, dtype:
            as for `torch.nn.Conv2d`. ``bias`` is one vector ``[O]`` for the whole block.
        topology: a name of `orepa.topologies`, or a declaration ``spec -> Topology``. By default the paper's choice for the
            kernel size: ``"rep1x1"`` for 1x1, ``"repvgg_dense"`` for even sizes, ``"deep_stem"`` from 7x7 to 11x11 without
            groups, ``"orepa"`` elsewhere.
        scaling: of the branches: ``"vector"``, ``"scalar"`` or ``"none"`` (paper Table 3).
        backend: that squeezes; see `orepa_kernels.squeeze`.
        order: of the branch that is a sequence of convolutions, such as 1x1-kxk (of several, the one that costs most to
            squeeze). ``"branch"`` runs it on feature maps wherever the block trains and squeezes the others; ``"squeeze"``
            squeezes all; ``"auto"`` does what is cheaper for the shape of the input, see `orepa.modules.branch_order`. All
            compute the same, but for rounding.
        options: of the topology, such as ``prior="dct2d"``.

    Raises:
        ValueError: an argument does not fit; the message names it, what was given and what is allowed.
        TypeError: an option that the topology does not have.

    Shape:
        ``[N, I, H, W]`` (or ``[I, H, W]``) to ``[N, O, H', W']`` as for `torch.nn.Conv2d`.
    """

    #: whether DistributedDataParallel leaves the parameters alone (`orepa.exclude_from_ddp`)
    excluded = False

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Size,
        stride: int | Size = 1,
        padding: int | Size | str = 0,
        dilation: int | Size = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        topology: str | Callable[..., Topology] | None = None,
        scaling: str = "vector",
        backend: str = "auto",
        order: str = "auto",
        **options: Any,
    ) -> None:
        resolve(backend)
        arguments = (in_channels, out_channels, kernel_size, stride, padding, dilation, groups, padding_mode)
        geometry = ConvGeometry(*arguments)
        chosen = default_topology(geometry.spec.kernel_size, groups) if topology is None else topology
        declared = declaration(chosen, **options)(geometry.spec).linearize()
        super().__init__(geometry, declared, chosen, scaling, bias, device, dtype)
        if not self.plan.operands:
            raise ValueError(f"topology {self.topology!r} has nothing to learn: no layer with a weight and no scaling")
        self.backend = backend
        self.order = order
        self._cached: StoredKernel | None = None  # where the block does not train
        self._stored: StoredKernel | None = None  # of the last step that squeezed it with others
        self._once: Step | None = None  # the one of `orepa.squeeze_once`, while it is open
        self.register_load_state_dict_post_hook(_clear_cache)

    # --- forward ------------------------------------------------------------------------------------------------------------

    def forward(self, x: Tensor) -> Tensor:
        """Convolve once, with the squeezed kernel; or twice more for a branch that runs on feature maps, see ``order``."""
        if isinstance(x, Proxy):
            return call_as_leaf(self, x)
        tensors = self._tensors_to_split(x)
        return self._convolve(x, self._kernel(x), self.bias) if tensors is None else self._convolve_split(x, tensors)

    def forward_branches(self, x: Tensor) -> Tensor:
        """Run the unsqueezed branches layer by layer on feature maps: the ground truth that `forward` equals.

        Zero padding happens once, on the block's input, so the two agree on the borders as well.
        """
        return self._run_unsqueezed(lambda batch: self.run_branches(self.pad(batch), self.stride, self.dilation), x)

    def squeeze(
        self, dtype: torch.dtype | None = None, memory_format: torch.memory_format = torch.contiguous_format
    ) -> Tensor:
        """Return the block as one kernel, differentiable in its parameters.

        Args:
            dtype: of the kernel; by default that of the parameters.
            memory_format: of the kernel.

        Returns:
            ``[O, I/g, kh, kw]``.
        """
        return self._squeeze(self.source_tensors(), dtype, memory_format)

    def to_conv2d(self, dtype: torch.dtype | None = None) -> nn.Conv2d:
        """Return a plain convolution that computes the same function, composed in float64.

        It keeps device, memory format and train/eval mode, and requires gradients where the block does.

        Args:
            dtype: of the convolution; by default that of the parameters.

        Raises:
            RuntimeError: a weight that a forward hook computes, as the old `torch.nn.utils.weight_norm` does.
        """
        self._check_parameters()
        dtype = next(self.parameters()).dtype if dtype is None else dtype
        bias = None if self.bias is None else self.bias.detach().to(dtype, copy=True)
        conv = self._plain_conv(self._compose(torch.float64).to(dtype), bias)
        if self.bias is not None and conv.bias is not None:
            conv.bias.requires_grad_(self.bias.requires_grad)
        return conv

    def load_kernel_(self, weight: Tensor) -> None:
        """Set the parameters so that the block squeezes to a given kernel: the start from pretrained weights.

        The first branch that is one bare convolution of full size takes the kernel over. The other branches keep their
        drawn weights behind a scale of zero (so they wake up with the first gradient step), or, without scaling, are
        subtracted from the kernel.

        Args:
            weight: ``[O, I/g, kh, kw]``.

        Raises:
            ValueError: a wrong shape, or a topology without such a branch (`deep_stem` cannot hold every kernel).
        """
        shape, scales = self.plan.shape, self.scales
        if tuple(weight.shape) != shape:
            raise ValueError(f"weight must be {list(shape)}, got {list(weight.shape)}")
        dense = [(t.weight, t.scale) for t in self.plan.terms if isinstance(t, Dense) and isinstance(t.weight, Operand)]
        # A dilated one has fewer taps than its kernel.
        full = ((operand, row) for operand, row in dense if operand.shape == shape == getattr(self, operand.name).shape)
        carrier, row = next(full, (None, None))
        if carrier is None:
            raise ValueError(f"topology {self.topology!r} has no full-size convolution that could hold a given kernel")
        parameter = getattr(self, carrier.name)
        with torch.no_grad():
            scale = None if scales is None or row is None else scales[row].clone()
            if scales is not None:
                scales.zero_()
                if scale is not None:
                    scale = torch.where(scale == 0, torch.ones_like(scale), scale)  # a scale of 0 could carry nothing
                    scales[row] = scale
            parameter.zero_()
            missing = weight.double() - self._compose(torch.float64)
            parameter.copy_(missing if scale is None else missing / scale.double().view(-1, 1, 1, 1))

    def clear_cache(self) -> None:
        """Drop the stored kernel.

        Writes to parameters are detected, whoever makes them: ``parameter.data``, fused optimizers, collectives. Needed only
        after those that PyTorch does not make: through a NumPy array or a raw pointer taken before the kernel was cached, and
        by the replay of a CUDA graph. ``train()``, ``eval()``, ``to()`` and ``load_state_dict`` clear it as well, for its
        memory. Nothing is cached for parameters in memory that is not PyTorch's own (shared with another process, mapped from a
        file, NumPy's), nor under FSDP.
        """
        self._cached = self._stored = None

    # --- the kernel ---------------------------------------------------------------------------------------------------------

    def _read_weight(self) -> Tensor:
        if torch.compiler.is_compiling():
            return self.squeeze()
        like = next(self.parameters())
        if hasattr(like, "full_tensor"):
            raise RuntimeError(
                "the weight of a sharded block needs all of its parameters: call unshard() of FSDP2 before"
            )
        kernel = self._stored_kernel(like, None, torch.contiguous_format)
        cached = self._cached
        if cached is not None and cached.kernel is kernel:
            kernel = torch._lazy_clone(kernel)  # whoever writes to the memory after all gets a copy
        return kernel

    def _kernel(self, x: Tensor, to_split: list[Tensor] | None = None) -> Tensor:
        """Return the kernel for a convolution of ``x``, in the dtype of autocast where that is on."""
        if self.excluded:
            self._check_reduced()
        # Asking for the name of a device costs more than all of these.
        dtype = orepa_kernels.autocast_dtype("cpu" if x.is_cpu else "cuda" if x.is_cuda else x.device.type)
        return self._stored_kernel(x, dtype, _memory_format(x), to_split)

    def _stored_kernel(
        self,
        like: Tensor,
        dtype: torch.dtype | None,
        memory_format: torch.memory_format,
        to_split: list[Tensor] | None = None,
    ) -> Tensor:
        """Return the kernel, on the device of ``like``: from the store if it has a current one, else squeezed alone.

        ``to_split`` are the tensors at `sources` of a block in two parts; the kernel is then that of the rest.
        """
        split = None if to_split is None else self._split
        squeeze = partial(self._squeeze, dtype=dtype, memory_format=memory_format, autocast=True, split=split)
        if torch.compiler.is_compiling() or torch._C._is_tracing():
            return squeeze(self.source_tensors() if to_split is None else to_split)
        key = request_key(like, dtype, memory_format, self.backend, split is not None)
        captures = key[-1]
        # In train mode an update is next, also where a checkpoint switches gradients off: a cache would be for nothing.
        trains = self.training or torch.is_grad_enabled()
        cached = self._cached  # read once: another thread may replace it
        if cached is not None and not captures:
            if cached.is_current(key) and not (trains and cached.is_trainable()):
                return cached.kernel
            self._cached = None
        if trains:
            kernel = self._step_kernel(key, split)
            if kernel is not None:
                return kernel
        tensors = self.source_tensors() if to_split is None else to_split
        if captures or (trains and any(map(_requires_grad, tensors))):
            return squeeze(tensors)
        self._cached = cached = squeeze_to_store(self, key, squeeze)
        return squeeze(tensors) if cached is None else cached.kernel

    def _step(self) -> Step | None:
        """Return what squeezes this block with others."""
        if self._once is not None:
            return self._once
        return open_steps.steps[-1] if open_steps.steps else None

    def _step_kernel(self, key: tuple[Any, ...], split: SplitBlock | None) -> Tensor | None:
        """Return the kernel that was squeezed with those of other blocks, or None."""
        step = self._step()
        if step is not None:
            return step.kernel(self, key)
        stored = self._stored
        if stored is None or not in_backward() or not stored.is_current(key):
            return None
        # The second forward of a checkpoint has to find the kernel of the first.
        (kernel,) = squeeze_together(
            [self.plan_of(split)],
            [self.operands_of(self.source_tensors(), split)],
            kernels=[stored.kernel],
            dtype=stored.kernel.dtype,
            memory_format=key[1],
            backend=self.backend,
        )
        return kernel

    def _squeeze(
        self,
        tensors: list[Tensor],
        dtype: torch.dtype | None,
        memory_format: torch.memory_format,
        autocast: bool = False,
        split: SplitBlock | None = None,
    ) -> Tensor:
        """Squeeze the tensors at `sources`, of a ``split`` block all but one branch."""
        if autocast and tensors[0].dtype == torch.float64:
            dtype = None  # autocast leaves float64 alone
        plan, operands = self.plan_of(split), self.operands_of(tensors, split)
        (kernel,) = orepa_kernels.squeeze(
            [plan], [operands], dtype=dtype, memory_format=memory_format, backend=self.backend
        )
        return kernel

    @torch.no_grad()
    def _compose(self, dtype: torch.dtype) -> Tensor:
        """Return the kernel, computed in ``dtype`` throughout."""
        operands = [t.to(dtype) for t in self.operands()]
        return orepa_kernels.squeeze([self.plan], [operands], backend="reference")[0]

    def _check_reduced(self) -> None:
        """Raise where parameters would drift apart among the processes, as nobody averages their gradients."""
        if self._once is not None or not torch.is_grad_enabled() or process_count() == 1:
            return
        if any([parameter.requires_grad for parameter in self.parameters()]):
            raise RuntimeError(
                f"{self} is excluded from DDP, and nobody averages its gradients here: train it inside "
                "orepa.squeeze_once(model, process_group=...), and run it elsewhere without gradients"
            )

    def _check_parameters(self) -> None:
        for path, name in self.sources:
            if name in vars(self.get_submodule(".".join(path))):
                raise RuntimeError(
                    f"{'.'.join((*path, name))} must be a parameter, got a tensor that a hook computes before each forward; "
                    "use torch.nn.utils.parametrizations, or remove the hook first (torch.nn.utils.remove_weight_norm, "
                    "remove_spectral_norm, prune.remove)"
                )

    def plan_of(self, split: SplitBlock | None) -> Block:
        # What is squeezed. No docstring, as for `operands_of`: the guide shows what has one, and these are for this package.
        return self.plan if split is None else split.rest

    def operands_of(self, tensors: list[Tensor], split: SplitBlock | None = None) -> list[Tensor]:
        return super().operands_of(tensors) if split is None else split.rest_operands(self, tensors)

    # --- the convolution ------------------------------------------------------------------------------------------------------

    def _convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if self.padding_mode != "zeros":
            return self._convolve_padded(self.pad(x), weight, bias)
        return F.conv2d(x, weight, bias, self.stride, self.padding, self.dilation, self.groups)

    def _convolve_padded(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.conv2d(x, weight, bias, self.stride, 0, self.dilation, self.groups)

    # --- the order ------------------------------------------------------------------------------------------------------------

    @property
    def order(self) -> str:
        """``"auto"``, ``"squeeze"`` or ``"branch"``; may be set at any time."""
        return self._order

    @order.setter
    def order(self, value: str) -> None:
        check_order(value)
        split = None if value == "squeeze" else split_block(self._lowered)
        if value == "branch" and split is None:
            raise ValueError(
                f"order='branch' needs a branch of two or more convolutions beside others, topology {self.topology!r} has none"
            )
        self._order, self._split = value, split

    def _tensors_to_split(self, x: Tensor) -> list[Tensor] | None:
        """Return the tensors at `sources` where one branch is to run on feature maps; None where all are to be squeezed."""
        if self._split is None or not (self.training or torch.is_grad_enabled()):
            return None
        step = None if torch.compiler.is_compiling() else self._step()
        if not (self.prefers_branch(x) if step is None else step.splits(self, x)):
            return None
        tensors = self.source_tensors()
        # Of a frozen block the kernel is cached. (torch.compile traces no attrgetter.)
        return tensors if any([tensor.requires_grad for tensor in tensors]) else None

    def prefers_branch(self, x: Tensor, uses: int = 1) -> bool:
        """Return whether ``order`` wants a branch on feature maps for an input, if ``uses`` forwards share one squeeze."""
        if self._split is None or self._order == "branch":
            return self._split is not None
        return prefers_branch(self, self._split, x, uses)

    def _convolve_split(self, x: Tensor, tensors: list[Tensor]) -> Tensor:
        assert self._split is not None
        kernel = self._kernel(x, tensors)
        if self.padding_mode == "zeros":
            return self._convolve(x, kernel, self.bias) + self._split.run(self, tensors, x)
        x = self.pad(x)
        return self._convolve_padded(x, kernel, self.bias) + self._split.run(self, tensors, x)

    # --- invalidation of the cache --------------------------------------------------------------------------------------------

    def train(self, mode: bool = True) -> OREPAConv:
        self.clear_cache()
        return super().train(mode)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Any:
        self.clear_cache()
        return super()._apply(fn, recurse)

    def _replicate_for_data_parallel(self) -> OREPAConv:
        replica: OREPAConv = super()._replicate_for_data_parallel()
        replica._cached = replica._stored = replica._once = None
        return replica

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_cached": None, "_stored": None, "_once": None}

    def extra_repr(self) -> str:
        text = super().extra_repr()
        for name in ("backend", "order"):
            if getattr(self, name) != "auto":
                text += f", {name}={getattr(self, name)}"
        return text


def _memory_format(x: Tensor) -> torch.memory_format:
    try:
        if x.dim() == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last):
            return torch.channels_last
    except RuntimeError:  # a batch within vmap does not tell
        pass
    return torch.contiguous_format


def _clear_cache(module: nn.Module, _incompatible: object) -> None:
    assert isinstance(module, OREPAConv)
    module.clear_cache()
