"""Converts single blocks of the authors' checkpoints.

Reading a block yields its *entries*: for each of their tensors, our name for it and the map of its values. Where their
mathematics is not that of the paper, the map converts exactly:

- Their stem composes its stages by cross-correlation, which is a composition with every later stage flipped. A flipped
  frequency prior is the same prior times ``(-1)**f``; that sign goes into the pointwise weight before it.
- Their grouped depthwise separable branch takes the pointwise row ``ol*g + gi`` for output channel ``gi*O/g + ol``.
- Their ``vector`` may end with a row that nothing reads or ever initialised; it is dropped.

All these maps are linear and orthogonal (permutations, flips, signs), so they take gradients and momentum buffers as well.
Constants (priors, averages, identities) are in their checkpoints but derived here.

Blocks of RepVGG, MobileOne and DBB only change names (`orepa.modules.official_offline`).
"""

from __future__ import annotations

import math
import re
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeAlias

import torch
from torch import Tensor, nn

from ..topology.language import ConvSpec, Size, pair
from ..topology.lowering import ResolvedBranch
from .official_offline import OfflineKind, layer_names, recognize_offline
from .offline_conv import OfflineConv
from .online_form import online_form
from .orepa_conv import OREPAConv
from .repvgg import RepVGGBlock

# --- maps of values -----------------------------------------------------------------------------------------------------


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _flip(kernel: Tensor) -> Tensor:
    return kernel.flip(-2, -1)


def _mirror_prior(pointwise: Tensor) -> Tensor:
    """Multiply by the sign of a flipped frequency prior, per output channel: ``(-1)**f``, ``f`` as in `frequency_prior`."""
    half = pointwise.shape[0] // 2
    frequency = torch.arange(2 * half, device=pointwise.device) % half + 1
    return pointwise * (1 - 2 * (frequency % 2)).to(pointwise.dtype).view(-1, 1, 1, 1)


def _group_rows(pointwise: Tensor, groups: int) -> Tensor:
    """Move row ``ol*g + gi`` to row ``gi*O/g + ol``."""
    return pointwise.unflatten(0, (-1, groups)).transpose(0, 1).flatten(0, 1)


def _first_rows(vector: Tensor, rows: int) -> Tensor:
    return vector[:rows]


# --- entries ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Entry:
    """The place of one of their tensors."""

    name: str  # ours, in the ``state_dict`` of the converted block
    transform: Callable[[Tensor], Tensor] = _same  # keeps the shape, except for spare rows
    spare_rows: int = 0  # unused rows that may follow at the end of theirs
    optional: bool = False  # old checkpoints lack it

    def shapes(self, ours: tuple[int, ...]) -> list[tuple[int, ...]]:
        """Return the shapes that their tensor may have, where ``ours`` is that of our tensor."""
        return [tuple(ours), *((ours[0] + spare, *ours[1:]) for spare in range(1, self.spare_rows + 1))]


Entries: TypeAlias = dict[str, Entry]

_STATISTICS = ("weight", "bias", "running_mean", "running_var")
_CONSTANTS = ("id_tensor", *(f"weight_{kind}_{name}" for kind in ("orepa", "rbr") for name in ("prior", "avg_avg")))


def _dense_entries(kind: str, groups: int, flipped: bool) -> Entries:
    flip = _flip if flipped else _same
    return {
        f"weight_{kind}_origin": Entry("origin_weight", flip),
        f"weight_{kind}_avg_conv": Entry("avg_weight"),
        f"weight_{kind}_pfir_conv": Entry("prior_weight", _mirror_prior if flipped else _same),
        f"weight_{kind}_1x1_kxk_idconv1": Entry("conv1x1_kxk_conv1"),
        f"weight_{kind}_1x1_kxk_conv2": Entry("conv1x1_kxk_conv2", flip),
        f"weight_{kind}_gconv_dw": Entry("dws_depthwise", flip),
        f"weight_{kind}_gconv_pw": Entry("dws_pointwise", partial(_group_rows, groups=groups) if groups > 1 else _same),
    }


def conv_entries(topology: str, groups: int = 1, stages: int = 1, flipped: bool = False) -> Entries:
    """Return the entries of a block without its norm.

    ``groups`` and ``flipped`` (a later stage of a stem) are of ``"orepa"`` blocks, ``stages`` of stems.
    """
    if topology == "rep1x1":
        return {
            "weight_or1x1_origin": Entry("origin_weight"),
            "weight_or1x1_l2i_conv1": Entry("conv1x1_1x1_conv1"),
            "weight_or1x1_l2i_conv2": Entry("conv1x1_1x1_conv2"),
            "vector": Entry("scales"),
        }
    if topology == "plain_stem":
        return {f"weight{s}": Entry(f"stack_conv{s + 1}", _flip if s > 0 else _same) for s in range(stages)}
    if topology == "deep_stem":
        result: Entries = {}
        for s in range(stages):
            result |= add_prefixes(f"weight{s}.", f"stack_block{s + 1}.", conv_entries("orepa", flipped=s > 0))
        return result
    pointwise = {"weight_orepa_1x1": Entry("conv1x1_weight")}
    return {**_dense_entries("orepa", groups, flipped), **pointwise, "vector": Entry("scales")}


def norm_entries(theirs: str, ours: str) -> Entries:
    """Return the entries of a batch norm, with the names it has in the two blocks."""
    entries = {f"{theirs}.{name}": Entry(f"{ours}.{name}") for name in _STATISTICS}
    return {**entries, f"{theirs}.num_batches_tracked": Entry(f"{ours}.num_batches_tracked", optional=True)}


def repvgg_entries(has_identity: bool) -> Entries:
    """Return the entries of an OREPA-VGG block, its norms included."""
    vector = Entry("scales", partial(_first_rows, rows=5), spare_rows=1)
    result = add_prefixes("rbr_dense.", "dense.", {**_dense_entries("rbr", 1, False), "vector": vector})
    result |= norm_entries("rbr_dense.bn", "dense_bn")
    result["rbr_1x1.conv.weight"] = Entry("pointwise.weight")
    result |= norm_entries("rbr_1x1.bn", "pointwise_bn")
    return result | norm_entries("rbr_identity", "identity_bn") if has_identity else result


def offline_entries(kind: str, branches: Iterable[ResolvedBranch]) -> Entries:
    """Return the entries of an offline block, its norms included."""
    result: Entries = {}
    for theirs, ours, is_norm in layer_names(kind, branches):
        result |= norm_entries(theirs, ours) if is_norm else {theirs: Entry(ours)}
    return result


def add_prefixes(theirs: str, ours: str, entries: Entries) -> Entries:
    """Return entries with one prefix for their names and one for ours."""
    return {theirs + key: replace(entry, name=ours + entry.name) for key, entry in entries.items()}


def translate(entries: Entries, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return their tensors under our names: parameters, their gradients, or momentum buffers; the ones that there are.

    The results may be views of what is passed in.
    """
    return {entry.name: entry.transform(tensors[key]) for key, entry in entries.items() if key in tensors}


def load_translated(module: nn.Module, entries: Entries, tensors: Mapping[str, Tensor]) -> None:
    """Load copies of their tensors into a module on the meta device. The optional ones that they lack become zero."""
    state = {name: tensor.detach().clone() for name, tensor in translate(entries, tensors).items()}
    device = next(iter(state.values())).device
    for name, value in module.state_dict().items():
        if name not in state:
            state[name] = torch.zeros_like(value, device=device)
    module.load_state_dict(state, assign=True)


# --- reading --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class OfficialBlock:
    """One of their blocks, as far as its shapes tell."""

    topology: str  # ours; ``"repvgg_dense"`` stands for the whole `RepVGGBlock`, the name of ``offline`` for that
    in_channels: int
    out_channels: int
    kernel_size: Size
    groups: int
    has_norm: bool  # False for a weight-only OREPA block
    entries: Entries  # with the names of the module that `block_from_official` returns, or makes its online form of
    offline: OfflineKind | None = None


def read_block(state_dict: Mapping[str, Tensor], *, stride: int | Size = 1, groups: int = 1) -> OfficialBlock:
    """Recognize the block of a state dict, and check its keys. Errors are those of `block_from_official`.

    The stride decides whether there is an identity branch.
    """
    if not isinstance(state_dict, Mapping):
        raise TypeError(f"state_dict must be a mapping of names to tensors, got {type(state_dict).__name__}")
    for key, value in state_dict.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"state_dict[{key!r}] must be a tensor, got {type(value).__name__}")
    if not isinstance(groups, int) or groups < 1:
        raise ValueError(f"groups must be a positive integer, got {groups!r}")

    deployed = deployed_key(state_dict)
    if deployed is not None:
        raise ValueError(f"the block is deployed already ({deployed!r}): a plain convolution, nothing to convert")
    offline = recognize_offline(state_dict, groups)
    topology, first, stages = (offline.name, offline.first, 1) if offline else _recognize(state_dict)
    if first not in state_dict:
        raise ValueError(f"no complete {topology} block: missing {first!r}")
    shape = tuple(state_dict[first].shape)
    if len(shape) != 4:
        raise ValueError(f"{first!r} must be [O, I/g, kh, kw], got {list(shape)}")
    out_channels, in_channels = shape[0], shape[1] * groups
    kernel_size = (2 * stages + 1, 2 * stages + 1) if topology.endswith("stem") else (shape[2], shape[3])
    if offline is None and topology not in ("orepa", "plain_stem") and groups != 1:
        raise ValueError(f"their {topology} blocks all have groups=1, got groups={groups}")

    has_norm, note = topology != "orepa" or any(key.startswith("bn.") for key in state_dict), ""
    spec = ConvSpec(in_channels, out_channels, kernel_size, groups, pair(stride, "stride"))
    if topology in ("repvgg_dense", "repvgg", "mobileone"):
        identity = "an identity" if spec.keeps_shape else "no identity"
        note = f" ({in_channels} to {out_channels} channels at stride {stride}: {identity})"
    if offline is not None:
        entries = offline_entries(topology, offline.branches(spec))
    elif topology == "repvgg_dense":
        entries = repvgg_entries(spec.keeps_shape)
    else:
        entries = conv_entries(topology, groups, stages)
        if has_norm:
            entries = {**add_prefixes("", "conv.", entries), **norm_entries("bn", "norm")}
    problems = key_problems(state_dict, entries)
    if problems:
        raise ValueError(f"no complete {topology} block{note}: {'; '.join(problems)}")

    if topology in ("orepa", "repvgg_dense") and kernel_size != (3, 3):
        raise ValueError(
            f"{first!r} has a {kernel_size[0]}x{kernel_size[1]} kernel: their frequency prior is defined for 3x3 only and "
            "holds uninitialised memory elsewhere, so there is no exact conversion"
        )
    if topology == "deep_stem" and out_channels % 2:
        raise ValueError(
            f"{first!r} has {out_channels} output channels: the flipped frequency prior of their stem is a prior again for "
            "even numbers only, so there is no exact conversion"
        )
    actual = _groups(topology, state_dict, shape[1])
    if actual is not None and actual != groups:
        raise ValueError(f"the shapes are those of groups={actual}, got groups={groups}")
    return OfficialBlock(topology, in_channels, out_channels, kernel_size, groups, has_norm, entries, offline)


def _recognize(state_dict: Mapping[str, Tensor]) -> tuple[str, str, int]:
    """Return our topology, the key of the first kernel, and the number of stages."""
    keys = list(state_dict)
    for start, topology, first in (
        ("rbr_", "repvgg_dense", "rbr_dense.weight_rbr_origin"),
        ("weight_or1x1_", "rep1x1", "weight_or1x1_origin"),
        ("weight_orepa_", "orepa", "weight_orepa_origin"),
    ):
        if any(key.startswith(start) for key in keys):
            return topology, first, 1
    stages = [(int(match[1]), match[2]) for match in (re.match(r"weight(\d+)(\.|$)", key) for key in keys) if match]
    if stages:
        deep = min(stages)[1] == "."
        count = max(2, 1 + max(stage for stage, _ in stages))  # no stem has one stage
        return ("deep_stem", "weight0.weight_orepa_origin", count) if deep else ("plain_stem", "weight0", count)
    raise ValueError(
        "state_dict must hold one block of theirs, with keys such as 'weight_orepa_origin', 'rbr_dense.conv.weight', "
        "'rbr_conv.0.conv.weight' or 'dbb_origin.conv.weight' and no prefix, "
        f"got {_list(keys) if keys else 'no keys'}"
    )


def deployed_key(keys: Iterable[str]) -> str | None:
    """Return the first key of a deployed block."""
    return next((key for key in keys if re.search(r"_reparam\.|(^|\.)reparam_conv\.", key)), None)


def key_problems(state_dict: Mapping[str, Tensor], entries: Entries) -> list[str]:
    """Return in words which keys are missing and which are neither in ``entries`` nor constants."""
    missing = [key for key, entry in entries.items() if key not in state_dict and not entry.optional]
    owners = {key.rpartition(".")[0] for key, entry in entries.items() if entry.name.endswith("scales")}
    constants = {f"{owner}.{name}" if owner else name for owner in owners for name in _CONSTANTS}
    unexpected = [key for key in state_dict if key not in entries and key not in constants]
    problems = [f"missing {_list(missing)}"] if missing else []
    return [*problems, f"unexpected {_list(unexpected)}"] if unexpected else problems


def _list(keys: list[str], limit: int = 3) -> str:
    more = f" and {len(keys) - limit} more" if len(keys) > limit else ""
    return ", ".join(map(repr, keys[:limit])) + more


def _groups(topology: str, state_dict: Mapping[str, Tensor], in_per_group: int) -> int | None:
    """Return the groups that the shapes imply, or None where they imply none."""
    if topology not in ("orepa", "plain_stem"):
        return None
    shape = state_dict["weight_orepa_gconv_dw" if topology == "orepa" else "weight1"].shape
    if len(shape) != 4:
        return None
    rows, columns = shape[0], 8 * in_per_group if topology == "orepa" else shape[1]
    return rows // columns if columns and rows % columns == 0 else None


# --- building -----------------------------------------------------------------------------------------------------------


def block_from_official(
    state_dict: Mapping[str, Tensor],
    *,
    stride: int | Size,
    padding: int | Size,
    dilation: int | Size = 1,
    groups: int = 1,
    eps: float = 1e-5,
    backend: str = "auto",
    online: bool = False,
) -> nn.Module:
    """Convert one block of the authors' code, with the same function, gradients and running statistics.

    OREPA's agree to about 1e-8 (relative) in float64, because the authors' constants are rounded to float32; those of RepVGG,
    MobileOne and DBB to rounding. The only activation is the ReLU of an OREPA-VGG block: a state dict does not hold any.

    Args:
        state_dict: of an OREPA, Rep-1x1, deep stem, plain stem or OREPA-VGG block, or of the original RepVGG, MobileOne or DBB
            block without squeeze-and-excitation; without a prefix. It is copied.
        stride, padding, dilation, groups: of the block.
        eps: of its norms.
        backend: that squeezes; see `orepa_kernels.squeeze`.
        online: return a RepVGG, MobileOne or DBB block as one convolution with the same branches and one norm after the sum.
            The function is the same in eval mode. In train mode it is close: the mean of the norm is exact, its variance an
            estimate that takes the branches' outputs for as correlated as white noise would make them. OREPA's blocks are
            online as they are.

    Returns:
        In train mode, with the dtype and on the device of ``state_dict``: a `RepVGGBlock` for an OREPA-VGG block, an
        `OREPAConv` for an OREPA block without ``bn.*``, an `OfflineConv` for a block of RepVGG, MobileOne or DBB, else
        (and with ``online``) a ``Sequential(conv=OREPAConv, norm=BatchNorm2d)``.

    Raises:
        TypeError: not a mapping to floating-point tensors.
        ValueError: no block of theirs, missing or unexpected keys, a shape, device or dtype that does not fit, or a block
            without an exact conversion. The message names the key and what was expected.
    """
    if not (math.isfinite(eps) and eps >= 0):
        raise ValueError(f"eps must be finite and not negative, got {eps}")
    block = read_block(state_dict, stride=stride, groups=groups)
    module = _build(block, stride, padding, dilation, eps, backend)
    check_tensors(state_dict, block.entries, module)
    load_translated(module, block.entries, state_dict)
    if online and block.offline is not None:
        assert isinstance(module, OfflineConv)
        return online_form(module, block.offline.topology, backend=backend, **block.offline.options)
    return module


def _build(
    block: OfficialBlock, stride: int | Size, padding: int | Size, dilation: int | Size, eps: float, backend: str
) -> nn.Module:
    # On the meta device: nothing is drawn from the random generator only to be overwritten.
    geometry = (block.in_channels, block.out_channels, block.kernel_size, stride, padding, dilation, block.groups)
    kind = block.offline
    if (kind is not None or block.topology == "repvgg_dense") and pair(dilation, "dilation") != (1, 1):
        name = "OREPA-VGG" if kind is None else block.topology
        raise ValueError(f"their {name} block always trains with dilation=1, got dilation={dilation}")
    if kind is not None:
        return OfflineConv(*geometry, topology=kind.topology, eps=eps, device="meta", **kind.options)
    if block.topology == "repvgg_dense":
        module: nn.Module = RepVGGBlock(*geometry, backend=backend, device="meta")
    else:
        conv = OREPAConv(*geometry, bias=False, topology=block.topology, backend=backend, device="meta")
        if not block.has_norm:
            return conv
        module = nn.Sequential(OrderedDict(conv=conv, norm=nn.BatchNorm2d(block.out_channels, device="meta")))
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.eps = eps
    return module


def check_tensors(state_dict: Mapping[str, Tensor], entries: Entries, module: nn.Module) -> None:
    """Raise TypeError or ValueError for the first tensor whose shape, device or dtype does not fit."""
    expected = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    first, *_ = entries
    for key, entry in entries.items():
        if key not in state_dict:
            continue
        tensor, shape = state_dict[key], expected[entry.name]
        allowed = entry.shapes(shape)
        if tuple(tensor.shape) not in allowed:
            raise ValueError(f"{key!r} must be {' or '.join(str(list(s)) for s in allowed)}, got {list(tensor.shape)}")
        if tensor.device != state_dict[first].device:
            raise ValueError(f"{key!r} is on {tensor.device}, {first!r} on {state_dict[first].device}")
        if not tensor.is_floating_point():
            if not key.endswith("num_batches_tracked"):
                raise TypeError(f"{key!r} must be floating-point, got {tensor.dtype}")
        elif len(shape) > 1 and tensor.dtype != state_dict[first].dtype:  # norms may stay in float32
            raise ValueError(f"{key!r} is {tensor.dtype}, {first!r} is {state_dict[first].dtype}")
