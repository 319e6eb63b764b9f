"""Knows the blocks that train offline by their authors' keys: RepVGG, MobileOne and Diverse Branch Block (DBB)."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ..topology.catalogue import DEFAULT_KAIMING, dbb
from ..topology.language import AvgPool, Branch, Conv, ConvSpec, Norm, Topology, declaration
from ..topology.lowering import ConvStage, NormStep, ResolvedBranch, lower

#: for each branch of our topologies their layers with tensors, in order
_REPVGG = {
    "origin": ("rbr_dense.conv", "rbr_dense.bn"),
    "conv1x1": ("rbr_1x1.conv", "rbr_1x1.bn"),
    "identity": ("rbr_identity",),
}
_MOBILEONE = {"conv1x1": ("rbr_scale.conv", "rbr_scale.bn"), "identity": ("rbr_skip",)}
_DBB = {
    "origin": ("dbb_origin.conv", "dbb_origin.bn"),
    "avg": ("dbb_avg.conv", "dbb_avg.bn.bn", "dbb_avg.avgbn"),
    "conv1x1": ("dbb_1x1.conv", "dbb_1x1.bn"),
    "conv1x1_kxk": ("dbb_1x1_kxk.conv1", "dbb_1x1_kxk.bn1.bn", "dbb_1x1_kxk.conv2", "dbb_1x1_kxk.bn2"),
}


def dbb_released(spec: ConvSpec, internal: int) -> Topology:
    """The Diverse Branch Block in the shapes of the authors' code that the ``"dbb"`` of the catalogue does not have.

    Args:
        spec: the convolution. A depthwise one has no 1x1, and averages its input itself.
        internal: channels between the 1x1 and the kxk layer. Only as many as come in start from the identity.
    """
    k, init, branches = spec.kernel_size, DEFAULT_KAIMING, dict(dbb(spec))
    if internal != spec.in_channels:
        branches["conv1x1_kxk"] = Branch(Conv(1, internal, init=init), Norm(), Conv(k, init=init), Norm())
    if spec.groups == spec.out_channels:
        del branches["conv1x1"]
        branches["avg"] = Branch(AvgPool(k), Norm())
    return Topology(**branches)


@dataclass(frozen=True)
class OfflineKind:
    """What the keys of an offline block tell: its topology, and the key of its first kernel."""

    name: str
    first: str
    topology: str | Callable[..., Topology]
    options: Mapping[str, Any] = field(default_factory=dict)

    def branches(self, spec: ConvSpec) -> list[ResolvedBranch]:
        """Return the branches of the block that stands for a convolution. Raise ValueError where they do not fit it."""
        return lower(declaration(self.topology, **self.options)(spec).offline(), spec).branches


def recognize_offline(state_dict: Mapping[str, Tensor], groups: int) -> OfflineKind | None:
    """Return the kind of the block with these tensors, or None for no offline block."""
    matches = (re.match(r"rbr_conv\.(\d+)\.", key) for key in state_dict)
    indices = [int(match[1]) for match in matches if match]
    if indices or any(key.startswith(("rbr_scale.", "rbr_skip.")) for key in state_dict):
        count = 1 + max(indices, default=0)
        return OfflineKind("mobileone", "rbr_conv.0.conv.weight", "mobileone", {"branches": count})
    if any(key.startswith("dbb_") for key in state_dict):
        first, inner = "dbb_origin.conv.weight", "dbb_1x1_kxk.conv1.weight"
        depthwise = first in state_dict and state_dict[first].shape[:1] == (groups,)
        if not depthwise and inner not in state_dict:
            return OfflineKind("dbb", first, "dbb")
        internal = next(iter(state_dict[inner].shape), 0) if inner in state_dict else groups
        return OfflineKind("dbb", first, dbb_released, {"internal": internal})
    if any(key.startswith("rbr_") for key in state_dict) and not any(".weight_rbr_" in key for key in state_dict):
        return OfflineKind("repvgg", "rbr_dense.conv.weight", "repvgg")
    return None


def layer_names(kind: str, branches: Iterable[ResolvedBranch]) -> Iterator[tuple[str, str, bool]]:
    """Yield the layers of an offline block: their name and ours, both prefixes for a norm, and whether it is one."""
    for branch in branches:
        steps = [step for step in branch.steps if isinstance(step, ConvStage | NormStep)]
        # The depthwise DBB averages its input itself: that branch has nothing but the last norm.
        for step, name in zip(steps, _their_layers(kind, branch.name)[-len(steps) :], strict=True):
            if isinstance(step, NormStep):
                yield name, step.name, True
            else:
                yield f"{name.replace('conv1', 'idconv1') if step.identity else name}.weight", step.weight.name, False


def _their_layers(kind: str, branch: str) -> tuple[str, ...]:
    if kind == "mobileone" and branch not in _MOBILEONE:
        index = 0 if branch == "origin" else int(branch.removeprefix("conv")) - 1
        return (f"rbr_conv.{index}.conv", f"rbr_conv.{index}.bn")
    return {"repvgg": _REPVGG, "mobileone": _MOBILEONE, "dbb": _DBB}[kind][branch]
