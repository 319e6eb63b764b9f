"""`prepare`: swap a model's convolutions for re-parameterised ones."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from typing import Any, TypeAlias, TypeVar

import torch
from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from orepa_kernels import DTYPES
from orepa_kernels.dispatch import resolve

from ..module_info import conv_arguments, count_owners, count_parameters, describe, is_channels_last, walk
from ..modules.branch_order import check_order
from ..modules.linear_block import LinearBlock
from ..modules.offline_conv import OfflineConv
from ..modules.orepa_conv import OREPAConv, default_topology
from ..modules.repvgg import RepVGGBlock
from ..modules.step import squeeze_alone_in, squeeze_together_in
from ..optim import watch_replaced
from ..topology.language import Topology, declaration, is_norm_free
from ..topology.lowering import SCALINGS
from .consumer_graph import Consumer, consumers, is_conv
from .fold_bn import is_foldable, norm_placeholder
from .linear_map import Inexact
from .linear_regions import Region
from .merge import region_error, rewrite_regions
from .norms import is_norm
from .online_regions import calibrate, describe_branches, obstacle, to_online
from .references import PARAMETER_HOOKS, find_references
from .replace import carry_over, check_model, copy_model, customization, replace_modules
from .report import LayerReport, Report, attach, relative_error
from .tracing import set_mode

#: a policy's choice for one layer: a topology (its name or declaration), keyword arguments of `OREPAConv`, or None to leave the
#: layer alone
Choice: TypeAlias = str | Callable[..., Topology] | Mapping[str, Any] | None
#: one `Choice` for all layers, choices by layer name (a shell pattern) or type, or a function ``(name, conv) -> choice``
Policy: TypeAlias = str | Mapping[str | type[nn.Module], Choice] | Callable[[str, nn.Conv2d], Choice]

NORMS = ("auto", "required", "any")

#: largest relative error of a region that keeps its function: of the rounding of its weights and statistics to half precision
_PRESERVED = 0.1

#: begins the reason to leave a layer alone that no norm follows
_NO_NORM = "no norm follows"

Block = TypeVar("Block", OREPAConv, OfflineConv)


def prepare(
    model: nn.Module,
    policy: Policy | None = None,
    *,
    preserve: bool = False,
    example_inputs: Any = None,
    inplace: bool = False,
    scaling: str = "vector",
    backend: str = "auto",
    order: str = "auto",
    norm: str = "auto",
    norm_types: tuple[type[nn.Module], ...] = (),
    together: bool = True,
) -> nn.Module:
    """Swap the convolutions of any model for `OREPAConv`, by a policy.

    First, each *linear region* of two or more branches (parallel convolutions, batch norms and identities of one value, as in
    MobileOne or RepVGG, whatever the class of the module) becomes one `OREPAConv` of the same branches and one batch norm after
    their sum (paper section 3.2). Then the convolutions elsewhere are swapped one by one.

    A convolution is left alone, with the reason in `orepa.report`, where no norm layer follows it (paper Table 3: training
    diverges; but see ``norm``), where it is frozen, shares its weight, is parametrized or hooked, where it or its class
    replaces the forward of `nn.Conv2d`, where its weight is complex or no ordinary parameter, where something else in the
    model holds its weight or one of its methods, or where the topology does not fit it. Lists, closures and compiled blocks
    that hold the layer itself go on with the new one. So do attributes and a frozen bias.

    Args:
        model: any module tree, in either mode.
        policy: by default the paper's block for each kernel size (`orepa.modules.default_topology`). Otherwise a topology for
            all; a mapping from layer names (shell patterns such as ``"layer1.*"``) or types to topologies, where the first
            match counts and layers without a match are left; or a function ``(name, conv)``. In place of a topology, None
            leaves a layer alone and a mapping gives `OREPAConv`'s keyword arguments. It is asked about regions, too, by the
            name of the module that holds one, with a convolution of its shape: a topology then takes the place of the region's
            branches, which are kept by default and by keyword arguments without a topology; None leaves its convolutions to the
            policy, ``"offline": True`` leaves the region as it is. With ``"offline": True`` among them the
            layer becomes an `OfflineConv`, the baseline, and the batch norm after it moves into the branches: only where a
            traced graph (or an `nn.Sequential`) proves that it takes all of that convolution's output, and not with
            ``preserve``.
        preserve: start from the model's weights, so that it computes the same function as before. The default policy then
            takes ``"orepa"`` where a stack of small kernels could not hold the given one. A region keeps its branches; one
            norm stands for theirs, with the same function in eval mode and about the same in train mode.
        example_inputs: with ``preserve``, a batch of data (one argument, a tuple of positional or a mapping of keyword
            arguments), on which the norms of regions measure the statistics of their sums. Without it these are estimated from
            the running statistics of the norms that they replace.
        inplace: change ``model`` itself instead of a copy.
        scaling, backend, order: of every `OREPAConv`, where the policy does not say otherwise.
        norm: ``"required"`` leaves convolutions alone that no norm follows, ``"any"`` swaps them, too. ``"auto"`` swaps them
            where the policy names a topology for nets without norms (``"ecb"``, ``"sesr"``, or one of your own, see
            `orepa.register_topology`).
        norm_types: module types that count as norms besides those that normalize by statistics of their input, such as a frozen
            batch norm.
        together: squeeze all blocks at once in every forward of the model, by a hook on it. Without, and where a part of the
            model is called alone, each block squeezes alone. `orepa.squeeze_once` squeezes for several forwards.

    Returns:
        The prepared model, trainable, in the mode, on the devices and in the dtypes that it had.

    Raises:
        TypeError: a policy of another kind, or one that gives something else.
        ValueError: an unknown topology, scaling, backend, order or ``norm``, a pattern that matches no convolution,
            ``preserve`` of weights that are on the meta device, ``example_inputs`` without ``preserve``, a model under DDP
            or FSDP (prepare it first), or one that cannot be copied. ``model`` is then unchanged.
    """
    if scaling not in SCALINGS:
        raise ValueError(f"scaling must be one of {', '.join(SCALINGS)}, got {scaling!r}")
    resolve(backend)
    check_order(order)
    if norm not in NORMS:
        raise ValueError(f"norm must be one of {', '.join(NORMS)}, got {norm!r}")
    if example_inputs is not None and not preserve:
        raise ValueError("example_inputs are for preserve=True: a block that starts anew has no function to keep")
    check_model(model, "prepare")
    parameters = dict(model.named_parameters())
    if not inplace:
        model = copy_model(model)
    choose = _Chooser(policy, preserve, norm)
    before = count_parameters(model)
    settings = {"scaling": scaling, "backend": backend, "order": order}
    layers, regions, inner = _prepare_regions(model, choose, settings, preserve)
    done = [regions]
    try:
        others, replacements = _prepare_layers(model, choose, settings, preserve, norm_types, inner)
        done.append(replacements)
        choose.check_patterns()
        if example_inputs is not None:
            with set_mode(model, training=False), torch.no_grad():
                calibrate(model, example_inputs)
    except Exception:
        for replaced in reversed(done):
            replace_modules(model, replaced)  # undoes it
        raise
    watch_replaced(parameters, model)
    (squeeze_together_in if together else squeeze_alone_in)(model)
    parameters_now = (before, count_parameters(model))
    attach(model, Report("prepare", layers + others, parameters_now, note=_note(others, policy, norm)))
    return model


def _note(layers: list[LayerReport], policy: Policy | None, norm: str) -> str:
    count = sum(layer.detail.startswith(_NO_NORM) for layer in layers)
    if norm != "auto" or policy is None or not count:
        return ""
    return (
        f'{count} left because no norm follows: training may diverge there (paper Table 3). norm="any" swaps them, too.'
    )


def _prepare_regions(
    model: nn.Module, choose: _Chooser, settings: Mapping[str, Any], preserve: bool
) -> tuple[list[LayerReport], dict[nn.Module, nn.Module], dict[nn.Module, str]]:
    """Replace the linear regions of a model by online blocks.

    Returns:
        The report's lines, what was replaced, and the layers of the regions that stay as the policy wants, with the reason.
    """
    inner: dict[nn.Module, str] = {}

    def build(region: Region) -> tuple[nn.Module, float]:
        if not region.is_sum:
            raise Inexact("its layers are swapped one by one")
        shape = region.linear_map("meta").symmetric().as_conv2d()
        options = choose.for_region(region.name, shape)
        if options is None:
            raise Inexact("the policy leaves it")
        if options.pop("offline", False):
            reason = "the policy leaves it as it is, an offline block"
            inner.update((layer.module, reason) for layer in region.layers if layer.module is not None)
            raise Inexact(reason)
        if reason := obstacle(region):
            raise Inexact(reason)
        try:
            new = to_online(region, {**settings, **options}, preserve)
        except ValueError as misfit:
            raise Inexact(str(misfit)) from misfit
        error = region_error(region, new.eval(), shape) if preserve else math.nan
        if error > _PRESERVED:
            raise Inexact(f"the block differs by {error:.1e} (relative), allowed is {_PRESERVED:.1e}")
        return new, error

    modes = {module: module.training for module in model.modules()}
    with set_mode(model, training=False):
        rewrite = rewrite_regions(model, build)
    layers = []
    for region, new, error in rewrite.done:
        conv = new.get_submodule("conv")
        assert isinstance(conv, OREPAConv)
        detail = f"{conv.topology}: {describe_branches(region)}"
        layers.append(LayerReport(region.name, describe(conv), "swapped", detail, None if math.isnan(error) else error))
    for region in rewrite.left:
        if region.is_sum:
            layers.append(LayerReport(region.name, f"{region.convolutions} convolutions", "left", region.problem))
    for owner, new in rewrite.replacements.items():
        for module in new.modules():
            module.training = modes.get(module, owner.training)
    replace_modules(model, rewrite.replacements)
    return layers, rewrite.replacements, inner


def _prepare_layers(
    model: nn.Module,
    choose: _Chooser,
    settings: Mapping[str, Any],
    preserve: bool,
    norm_types: tuple[type[nn.Module], ...],
    inner: Mapping[nn.Module, str],
) -> tuple[list[LayerReport], dict[nn.Module, nn.Module]]:
    """Replace single convolutions; return the report's lines and what was replaced."""
    follows, owners = consumers(model, norm_types), count_owners(model)
    held = find_references(model, (m for m in model.modules() if is_conv(m) or is_norm(m, norm_types)))
    layers: list[LayerReport] = []
    replacements: dict[nn.Module, nn.Module] = {}
    for name, conv in walk(model, (LinearBlock, RepVGGBlock)):
        if isinstance(conv, torch.jit.ScriptModule) and conv.original_name in ("Conv2d", "Conv1d", "Conv3d"):
            layers.append(LayerReport(name, conv.original_name, "left", "it is compiled by TorchScript"))
        if not is_conv(conv) or isinstance(conv, LinearBlock):
            continue
        reason = inner.get(conv) or _obstacle(conv, follows.get(name), owners) or held.get(conv, "")
        choice = None
        if isinstance(conv, nn.Conv2d) and conv not in inner:
            choice = choose(name, conv)
            if choice is None:
                reason = "the policy leaves it"
            elif not reason and follows[name].norm is None and choose.needs_norm(choice):
                reason = f"{_NO_NORM}: {follows[name].problem}"
        if reason:
            layers.append(LayerReport(name, describe(conv), "left", reason))
            continue
        assert isinstance(conv, nn.Conv2d) and choice is not None
        if preserve and conv.weight.is_meta:
            raise ValueError(f"preserve=True starts from the model's weights, but {name}.weight is on the meta device")
        options, error = {"scaling": settings["scaling"], **choice}, None
        try:
            if options.pop("offline", False):
                new, norm, detail = _build_offline(model, conv, follows[name], options, preserve)
                if norm is not None:
                    if norm in held:
                        raise ValueError(f"{detail}, but {held[norm]}")
                    replacements[norm] = norm_placeholder(norm)
                    carry_over(norm, replacements[norm])
                replacements[conv] = new
            else:
                replacements[conv], detail, error = _build_online(conv, {**settings, **options}, preserve)
        except ValueError as misfit:
            layers.append(LayerReport(name, describe(conv), "left", str(misfit)))
            continue
        if follows[name].norm is None:
            detail += " (no norm follows)"
        elif not follows[name].is_proven:
            detail += f" (norm {follows[name].norm} found by its place only)"
        layers.append(LayerReport(name, describe(conv), "swapped", detail, error))
    replace_modules(model, replacements)
    return layers, replacements


class _Chooser:
    """A policy in any of its forms as one function that returns `OREPAConv`'s keyword arguments, or None."""

    def __init__(self, policy: Policy | None, preserve: bool, norm: str) -> None:
        if not (policy is None or isinstance(policy, str | Mapping) or callable(policy)):
            raise TypeError(f"policy must be a topology's name, a mapping, a function or None, got {policy!r}")
        self.policy, self.preserve, self.norm = policy, preserve, norm
        self.unmatched = set(policy) if isinstance(policy, Mapping) else set()

    def __call__(self, name: str, conv: nn.Conv2d) -> dict[str, Any] | None:
        choice = self._choice(name, conv)
        if choice is None:
            return None
        if not (isinstance(choice, str | Mapping) or callable(choice)):
            raise TypeError(
                f"policy: for {name} it gives {choice!r}; it must give a topology, keyword arguments of OREPAConv, or None to "
                "leave the convolution alone"
            )
        keywords = dict(choice) if isinstance(choice, Mapping) else {"topology": choice}
        # An unknown name is the caller's mistake, not a layer that does not fit.
        declaration(keywords.get("topology") or "plain")
        return keywords

    def for_region(self, name: str, shape: nn.Conv2d) -> dict[str, Any] | None:
        """Return the same for a region that is one convolution of a ``shape``; without a topology, it keeps its branches."""
        return {} if self.policy is None else self(name, shape)

    def _choice(self, name: str, conv: nn.Conv2d) -> Choice:
        policy = self.policy
        if policy is None:
            topology = default_topology((conv.kernel_size[0], conv.kernel_size[1]), conv.groups)
            return "orepa" if topology == "deep_stem" and self.preserve else topology
        if isinstance(policy, str):
            return policy
        if isinstance(policy, Mapping):
            for key, choice in policy.items():
                if fnmatchcase(name, key) if isinstance(key, str) else isinstance(conv, key):
                    self.unmatched.discard(key)
                    return choice
            return None
        return policy(name, conv)

    def needs_norm(self, choice: Mapping[str, Any]) -> bool:
        """Return whether a layer is left alone that no norm follows."""
        if self.norm == "auto":
            return self.policy is None or not is_norm_free(choice.get("topology") or "")
        return self.norm == "required"

    def check_patterns(self) -> None:
        names = sorted(str(key) for key in self.unmatched)
        if names:
            raise ValueError(f"policy: no convolution matches {', '.join(names)} (first match counts)")


def _obstacle(conv: nn.Module, consumer: Consumer | None, owners: Mapping[int, int]) -> str:
    """Return the reason to leave a convolution alone, or an empty string."""
    if not isinstance(conv, nn.Conv2d) or isinstance(conv, nn.modules.lazy.LazyModuleMixin):
        return f"{type(conv).__name__}: only 2-D convolutions of known size are re-parameterised"
    if (type(conv).forward, type(conv)._conv_forward) != (nn.Conv2d.forward, nn.Conv2d._conv_forward):
        return f"{type(conv).__name__} computes something else than nn.Conv2d"
    if is_parametrized(conv) or "weight" not in conv._parameters:
        return "its weight is parametrized"
    if type(conv.weight) is not nn.Parameter or conv.weight.dtype not in DTYPES:
        return f"its weight is of {type(conv.weight).__name__}, {conv.weight.dtype}"
    if reason := customization(conv, backward_hooks=True):
        return reason
    if not conv.weight.requires_grad:
        return "its weight is frozen"
    if any(getattr(p, hooks) for p in conv.parameters(recurse=False) for hooks in PARAMETER_HOOKS):
        return "its parameters have hooks, which new ones would not have"
    if owners[id(conv.weight)] > 1:
        return "it shares its weight with another module"
    return "the model does not call it where it could be traced" if consumer is None else ""


def _build_online(conv: nn.Conv2d, options: Mapping[str, Any], preserve: bool) -> tuple[OREPAConv, str, float | None]:
    """Return the block, the report's detail, and the error of the preserved kernel. Raise ValueError for a misfit."""
    new = OREPAConv(**conv_arguments(conv), bias=conv.bias is not None, **_placement(conv), **options)
    if conv.bias is not None and new.bias is not None and (preserve or not conv.bias.requires_grad):
        with torch.no_grad():
            new.bias.copy_(conv.bias)
    if not preserve:
        return _like(conv, new), new.topology, None
    new.load_kernel_(conv.weight.detach())
    return _like(conv, new), new.topology, relative_error(conv.weight, new.squeeze())


def _build_offline(
    model: nn.Module, conv: nn.Conv2d, consumer: Consumer, options: Mapping[str, Any], preserve: bool
) -> tuple[OfflineConv, nn.Module | None, str]:
    """Return the block, the norm that its branches replace (if they end in norms), and the report's detail.

    Raise ValueError for a misfit, ``preserve``, or a norm that is not proven to belong to the convolution alone.
    """
    if preserve:
        raise ValueError("an offline block cannot start from the model's function (preserve=True)")
    if conv.bias is not None and not conv.bias.requires_grad:
        raise ValueError("an offline block cannot keep a frozen bias")
    norm = None if consumer.norm is None else model.get_submodule(consumer.norm)
    settings = {"bias": False if conv.bias is None else None, **_placement(conv)}  # None: only if no branch has a norm
    if isinstance(norm, nn.modules.batchnorm._BatchNorm):
        settings |= {"eps": norm.eps, "momentum": norm.momentum}
    new = OfflineConv(**conv_arguments(conv), **{**settings, **options})
    detail = f"{new.topology} offline"
    if not new.ends_in_norms:
        return _like(conv, new), None, detail
    if norm is None or not (consumer.direct and consumer.is_proven) or not is_foldable(norm):
        raise ValueError(f"{detail}: norm {consumer.norm} cannot be proven to be this convolution's batch norm alone")
    if isinstance(norm, nn.SyncBatchNorm):
        new = nn.SyncBatchNorm.convert_sync_batchnorm(new, norm.process_group)
    return _like(conv, new), norm, f"{detail}, in place of norm {consumer.norm}"


def _placement(conv: nn.Conv2d) -> dict[str, Any]:
    return {"device": conv.weight.device, "dtype": conv.weight.dtype}


def _like(conv: nn.Conv2d, new: Block) -> Block:
    """Give a new block the memory format of the convolution, and what others have set on it."""
    if is_channels_last(conv.weight):
        new = new.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    for name, parameter in new.named_parameters():
        like = conv.bias if name == "bias" else conv.weight
        vars(parameter).update(vars(like))  # what optimizers read, such as a factor of the learning rate
    carry_over(conv, new)
    return new
