"""Turns a linear region into one `OREPAConv` of the same branches, and one norm after their sum (paper section 3.2)."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from orepa_kernels import DTYPES

from ..module_info import affine_of_statistics, is_channels_last, run_example
from ..modules.branch_statistics import set_statistics, sum_statistics
from ..modules.conv_norm import ConvNorm
from ..modules.orepa_conv import OREPAConv
from ..topology import language as lang
from ..topology.catalogue import DEFAULT_KAIMING
from ..topology.language import Topology, constant_declaration
from ..topology.lowering import ConvStage, DepthwiseStage
from .linear_forward import Layer
from .linear_map import LinearMap
from .linear_regions import Branch, Region
from .references import PARAMETER_HOOKS


@dataclass
class _OnlineBranch:
    """A branch in the language of topologies, with the values that it has now.

    Args:
        name: of its first layer.
        text: in few words, such as ``"3x3"``.
        layers: without norms.
        weights: of its convolutions, each with the norms and scales before it, in float64.
        factor: the norms and scales after the last layer, per channel ``[O]``, or None for a bare identity.
        start: how it starts when it does not start from the values that it has: its sign, and its layer scale.
        kernel: the whole branch as a kernel of the region.
        statistics: mean and variance ``[O]`` of its output less its shift; None where no norm of its own knows them.
    """

    name: str
    text: str
    layers: list[lang.Layer]
    weights: list[Tensor]
    factor: Tensor | None
    start: float
    kernel: Tensor
    statistics: tuple[Tensor, Tensor] | None


def obstacle(region: Region) -> str:
    """Return the reason why a region cannot be trained as one convolution, or an empty string."""
    parameters = [t for layer in region.layers for t in layer.tensors if isinstance(t, nn.Parameter)]
    if not all(p.requires_grad for p in parameters):
        return "a part of it is frozen"
    if any(getattr(p, hooks) for p in parameters for hooks in PARAMETER_HOOKS):
        return "its parameters have hooks, which new ones would not have"
    if not {p.dtype for p in parameters} <= set(DTYPES):
        return f"its parameters are of {parameters[0].dtype}"
    for node in region.nodes:
        if node.op == "call_module":
            m = region.forward.root.get_submodule(str(node.target))
            if not m._parameters and type(m).forward is not nn.Identity.forward and _drop_rate(m):
                return f"{node.target} drops values in train mode"
    if not _norms(region):
        return "it holds no batch norm, so none would follow its convolution"
    for layer in region.layers:
        if layer.kind == "conv" and not isinstance(layer.module, nn.Conv2d):
            return f"{layer.name} is a block already"
        if layer.kind == "norm" and not isinstance(layer.module, _BatchNorm):
            return f"{layer.name} is frozen, or no batch norm of torch"
    return ""


def _drop_rate(m: nn.Module) -> float:
    rates = (getattr(m, name, None) for name in ("p", "drop_prob", "drop_rate"))
    return next((float(rate) for rate in rates if isinstance(rate, int | float)), 0.0)


def _norms(region: Region) -> list[_BatchNorm]:
    """Return the norms of a region that normalize by the statistics of a batch when they train."""
    return [layer.module for layer in region.layers if isinstance(layer.module, _BatchNorm)]


def to_online(region: Region, options: Mapping[str, Any], preserve: bool) -> ConvNorm:
    """Return a block of a region's branches and the norm after it.

    Every branch has a scaling in place of its norms. Layer scales and signs are the start of the scaling.

    With ``preserve`` it computes in eval mode what the region does. In train mode the norm takes the statistics of the batch,
    where the region has one norm per branch. Its weight is therefore the standard deviation that the sum is expected to have:
    from the running statistics of the norm after the sum, or else from those of the branches (`sum_statistics`).

    Args:
        region: in eval mode, without an `obstacle`.
        options: keyword arguments of `OREPAConv`. With ``topology`` among them, that takes the place of the branches.
        preserve: start from the values of the region.

    Raises:
        ValueError: the branches cannot be declared in the language of topologies, or the topology cannot hold the kernel.
    """
    whole, norms = region.linear_map().symmetric(), _norms(region)
    shape = whole.as_conv2d()
    like = next(layer.tensors[0] for layer in region.layers if layer.kind == "conv")
    branches: list[_OnlineBranch] = []
    if "topology" not in options:
        identity = LinearMap(torch.ones(1, 1, 1, 1), torch.zeros(1)).on(shape.in_channels, region.device)
        after_sum = _norm_after_sum(region)
        branches = [_read_branch(branch, shape, whole, identity, after_sum) for branch in region.branches]
        options = {**options, "topology": constant_declaration(_declare(branches))}
    conv = OREPAConv(
        shape.in_channels,
        shape.out_channels,
        (shape.kernel_size[0], shape.kernel_size[1]),
        (shape.stride[0], shape.stride[1]),
        (int(shape.padding[0]), int(shape.padding[1])),
        (shape.dilation[0], shape.dilation[1]),
        shape.groups,
        bias=False,
        padding_mode=shape.padding_mode,
        device=like.device,
        dtype=like.dtype,
        **options,
    )
    if branches:
        conv.topology = _summary(branches)
    norm = nn.BatchNorm2d(shape.out_channels, norms[-1].eps, norms[-1].momentum, device=like.device)
    norm = norm.to(next(iter(norms[-1].state_dict().values())).dtype)
    if preserve:
        with torch.no_grad():
            if branches:
                _load_branches(conv, branches)
            else:
                conv.load_kernel_(whole.kernel.to(like))
            _load_statistics(norm, region, whole, branches)
    if isinstance(norms[-1], nn.SyncBatchNorm):
        norm = nn.SyncBatchNorm.convert_sync_batchnorm(norm, norms[-1].process_group)
    if is_channels_last(*(t for layer in region.layers for t in layer.tensors if t.dim() == 4)):
        conv = conv.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    for parameter in conv.parameters():
        vars(parameter).update(vars(like))  # what optimizers read, such as a factor of the learning rate
    return ConvNorm(conv, norm)


def describe_branches(region: Region) -> str:
    """Return the branches of a region by the names of their layers, for the report; norms only where there is nothing else."""
    texts = []
    for branch in region.branches:
        names = {
            kind: [layer.name for layer in branch.layers if layer.kind == kind] for kind in ("conv", "pool", "norm")
        }
        texts.append(" > ".join(names["conv"] + names["pool"] or names["norm"]) or "identity")
    return ", ".join(texts)


# --- from layers to the language of topologies --------------------------------------------------------------------------------


def _norm_after_sum(region: Region) -> Layer | None:
    """Return the last norm that all branches share, after which they only get scaled."""
    first, *others = ([layer for layer in b.layers if layer.kind != "scale"][-1:] for b in region.branches)
    same = bool(others) and all(other == first for other in others)
    return first[0] if same and first and first[0].kind == "norm" else None


def _read_branch(
    branch: Branch, shape: nn.Conv2d, whole: LinearMap, identity: LinearMap, after_sum: Layer | None
) -> _OnlineBranch:
    so_far, channels, start = identity, shape.in_channels, branch.factor
    carry = identity.kernel.new_ones(channels)
    layers: list[lang.Layer] = []
    weights: list[Tensor] = []
    texts: list[str] = []
    statistics: tuple[Tensor, Tensor] | None = None
    for layer in branch.layers:
        linear = layer.map_on(channels, carry.device)
        rows, columns, *taps = linear.kernel.shape
        factor = linear.kernel[:, 0, 0, 0]
        dilation = _dilation_in(shape, so_far.stride, linear, layer.name)
        so_far = so_far.then(linear)
        if layer.kind == "norm":
            carry = carry * factor
            statistics = None if layer is after_sum else _output_statistics(layer)
        elif layer.kind == "scale":
            carry, start = carry * factor, start * float(factor.mean())
            statistics = statistics and (statistics[0] * factor + linear.shift, statistics[1] * factor.square())
        elif layer.kind == "pool":
            if dilation != (1, 1):
                raise ValueError(f"{layer.name} pools taps that are not neighbours")
            carry, statistics = carry * factor * taps[0] * taps[1], None
            layers.append(lang.AvgPool((taps[0], taps[1])))
            texts.append("average")
        elif layer.kind == "conv":
            if linear.groups == shape.groups:
                layers.append(lang.Conv((taps[0], taps[1]), rows, init=DEFAULT_KAIMING, dilation=dilation))
            elif columns == 1:
                layers.append(lang.Depthwise((taps[0], taps[1]), rows // channels, DEFAULT_KAIMING, dilation))
            else:
                raise ValueError(f"{layer.name} has {linear.groups} groups, the sum {shape.groups}")
            incoming = carry.view(linear.groups, 1, columns).expand(-1, rows // linear.groups, -1)
            weights.append(linear.kernel * incoming.reshape(rows, columns, 1, 1))
            carry, statistics, channels = carry.new_ones(rows), None, rows
            texts.append("x".join(map(str, taps)))
    if any(a.low - b.low != b.high - a.high for a, b in zip(so_far.axes, whole.axes, strict=True)):
        raise ValueError(f"the branch of {branch.layers[-1].name} is not centred in the sum")
    bare = branch.factor == 1 and all(layer.kind == "pad" for layer in branch.layers)
    named = [layer.name for kind in ("conv", "norm", "pool") for layer in branch.layers if layer.kind == kind]
    if statistics is not None:
        shift = branch.factor * so_far.shift
        statistics = branch.factor * statistics[0] - shift, branch.factor**2 * statistics[1]
    return _OnlineBranch(
        named[0] if named else "identity",
        "-".join(texts) or "identity",
        layers or [lang.Identity()],
        weights,
        None if bare else branch.factor * carry,
        start,
        so_far.times(branch.factor).aligned(whole),
        statistics,
    )


def _dilation_in(shape: nn.Conv2d, strides: tuple[int, int], linear: LinearMap, name: str) -> tuple[int, int]:
    """Return the dilation of a layer, after layers with strides, as a part of a block that is dilated itself.

    Raises:
        ValueError: its taps lie between those of the block.
    """
    result = []
    for stride, axis, own in zip(strides, linear.axes, shape.dilation, strict=True):
        spacing = stride * axis.dilation
        if axis.taps > 1 and spacing % own:
            raise ValueError(f"the taps of {name} are {spacing} pixels apart, those of the sum {own}")
        result.append(spacing // own if axis.taps > 1 else 1)
    return result[0], result[1]


def _output_statistics(layer: Layer) -> tuple[Tensor, Tensor]:
    """Return the mean and the variance of what a norm gives where its running statistics hold."""
    norm = layer.module
    assert norm is not None
    factor, shift = affine_of_statistics(norm)
    mean, var = norm.get_buffer("running_mean").double(), norm.get_buffer("running_var").double()
    return factor * mean + shift, factor.square() * var


def _declare(branches: list[_OnlineBranch]) -> Topology:
    """Return the topology of the branches. Equal ones start together like one, an identity no louder than a convolution."""
    equal = Counter(branch.text for branch in branches)
    declared: dict[str, lang.Branch] = {}
    for branch in branches:
        name = unique = re.sub(r"\W", "_", branch.name if branch.name[0].isalpha() else f"branch_{branch.name}")
        while unique in declared:
            unique = f"{name}_{len(declared)}"
        quiet = equal[branch.text] ** -0.5 if branch.weights else 3**-0.5
        scale = None if branch.factor is None else branch.start * quiet
        declared[unique] = lang.Branch(*branch.layers, scale=scale)
    return Topology(**declared)


def _summary(branches: list[_OnlineBranch]) -> str:
    """Return the branches in few words: ``"4x 3x3 + 1x1 + identity"``."""
    counts = Counter(branch.text for branch in branches)
    return " + ".join(text if count == 1 else f"{count}x {text}" for text, count in counts.items())


# --- values -------------------------------------------------------------------------------------------------------------------


def _load_branches(conv: OREPAConv, branches: list[_OnlineBranch]) -> None:
    """Give a block the weights and factors of its branches.

    Raises:
        ValueError: its scaling cannot hold the factors.
    """
    for resolved, branch in zip(conv._lowered.branches, branches, strict=True):
        weights, factor = list(branch.weights), branch.factor
        if resolved.scale is not None and factor is not None and conv.scales is not None:
            row = conv.scales[resolved.scale]
            if len(row) == 1 and weights:
                row.fill_(1.0)
            elif len(row) == 1 and len(set(factor.tolist())) > 1:
                raise ValueError(f"scaling {conv.scaling!r} has no factor per channel for the branch of {branch.name}")
            else:
                row.copy_(factor if len(row) > 1 else factor[:1])
                factor = None
        if factor is not None:  # there is no scale for it
            if not weights and bool((factor != 1).any()):
                raise ValueError(f"scaling {conv.scaling!r} has no factor for the branch of {branch.name}")
            weights = [*weights[:-1], *(w * factor.view(-1, 1, 1, 1) for w in weights[-1:])]
        stages = [stage for stage in resolved.stages if isinstance(stage, ConvStage | DepthwiseStage)]
        for stage, weight in zip(stages, weights, strict=True):
            conv.get_parameter(stage.weight.name).copy_(weight)


def _load_statistics(norm: nn.BatchNorm2d, region: Region, linear: LinearMap, branches: list[_OnlineBranch]) -> None:
    """Set a norm so that it adds the region's shift in eval mode, and changes little in train mode."""
    after_sum = _norm_after_sum(region)
    if after_sum is not None:
        mean, variance = _output_statistics(after_sum)
        layers = region.branches[0].layers
        for layer in layers[layers.index(after_sum) + 1 :]:
            factor = layer.map_on(len(mean), mean.device).kernel.flatten()
            mean, variance = mean * factor, variance * factor.square()
        mean = mean - linear.shift
    else:
        mean, variance = _estimate(
            [(branch.kernel, branch.statistics) for branch in branches] or [(linear.kernel, None)]
        )
    set_statistics(norm, mean, variance, linear.shift)


def calibrate(model: nn.Module, inputs: Any) -> None:
    """Give the norms after online blocks the statistics that their inputs have when a model in eval mode runs.

    The function in eval mode stays: the rest of each norm follows from its statistics.
    """

    def measure(norm: nn.BatchNorm2d, args: tuple[Tensor]) -> None:
        shift = norm.bias.double() - norm.get_buffer("running_mean").double()
        variance, mean = torch.var_mean(args[0].double(), (0, 2, 3), correction=0)
        set_statistics(norm, mean, variance, shift)

    norms = [module.get_submodule("norm") for module in model.modules() if isinstance(module, ConvNorm)]
    handles = [norm.register_forward_pre_hook(measure) for norm in norms]
    try:
        run_example(model, inputs)
    finally:
        for handle in handles:
            handle.remove()


def _estimate(branches: list[tuple[Tensor, tuple[Tensor, Tensor] | None]]) -> tuple[Tensor, Tensor]:
    """Return mean and variance of a sum; a branch without statistics counts as if the others had told the input's."""
    energies = [kernel.flatten(1).square().sum(1) for kernel, _ in branches]
    known = [(s[1].mean() / e.mean().clamp_min(1e-12)) for e, (_, s) in zip(energies, branches, strict=True) if s]
    power = torch.stack(known).mean() if known else energies[0].new_ones(())
    means = [
        energy.new_zeros(len(energy)) if s is None else s[0] for energy, (_, s) in zip(energies, branches, strict=True)
    ]
    variances = [power * energy if s is None else s[1] for energy, (_, s) in zip(energies, branches, strict=True)]
    return sum_statistics([kernel for kernel, _ in branches], means, variances)
