"""Finds the folds that a model's own deployment code would not survive.

A detector's ``fuse``, timm's ``reparameterize``, RepVGG's ``switch_to_deploy``: they build one convolution from a convolution
and its norm. Most of them ignore the convolution's own bias, which a folded one has.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import logging
import re
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_leaves

from ..module_info import conv_arguments
from ..modules.offline_conv import OfflineConv
from ..modules.orepa_conv import OREPAConv
from .fold_bn import fold_batch_norm, norm_placeholder
from .replace import copy_model, replace_modules

log = logging.getLogger("orepa")

#: names of methods that merge layers, called without arguments
_MERGES = re.compile(
    r"fuse(_\w+)?|(\w+_)?re_?param\w*|(\w+_)?to_deploy\w*|(merge|fold|absorb|collapse)_\w+|rep_?(vgg_convert|params)"
    r"|\w*equiv\w*_kernel\w*|_?get_kernel_bias"
)
#: names of methods that merge a convolution and a norm given to them
_MERGES_PAIR = re.compile(r"_?(fuse|merge|fold|absorb)_(\w+_)?(bn|batch_?norm|norm)(_\w+)?")


def deploy_conflicts(model: nn.Module, folds: Mapping[str, str]) -> dict[str, str]:
    """Return the folds that change what a deploy method builds, or may do so: that method by the convolution's name.

    Args:
        model: unchanged.
        folds: the name of the norm to fold, by the convolution's name.
    """
    conflicts: dict[str, str] = {}
    for name, owner in reversed(list(model.named_modules())):  # inner ones first
        methods = _deploy_methods(owner)
        if not methods:
            continue
        prefix = f"{name}." if name else ""
        inside = {
            c: n for c, n in folds.items() if c not in conflicts and (c.startswith(prefix) or n.startswith(prefix))
        }
        whole = all(c.startswith(prefix) and n.startswith(prefix) for c, n in inside.items())
        pairs = [(c.removeprefix(prefix), n.removeprefix(prefix)) for c, n in inside.items()]
        method = next((m for m in methods if not (whole and _commutes(owner, m, pairs))), None) if inside else None
        if method is not None:
            conflicts |= dict.fromkeys(inside, f"{type(owner).__name__}.{method}")
    return conflicts


def self_fusing_pairs(model: nn.Module) -> set[nn.Module]:
    """Return the modules of one convolution and one batch norm that a method of their own returns as one convolution.

    Such as timm's ``ConvNorm.fuse``: its caller puts that convolution in the place of the module. With the norm folded,
    it would lose the bias.
    """
    found = set()
    for module in model.modules():
        parts = list(module.named_modules())
        convs = [name for name, m in parts if isinstance(m, nn.Conv2d | OREPAConv | OfflineConv)]
        norms = [name for name, m in parts if isinstance(m, _BatchNorm)]
        if len(convs) == len(norms) == 1 and module is not model:
            pair = convs[0], norms[0]
            methods = _deploy_methods(module) if deploy_conflicts(module, dict([pair])) else []
            if any(_returns_conv(module, method, pair) for method in methods):
                found.add(module)
    return found


@torch.no_grad()
def _returns_conv(owner: nn.Module, method: str, pair: tuple[str, str]) -> bool:
    try:
        with torch.random.fork_rng(devices=[]), contextlib.redirect_stdout(io.StringIO()):
            copy = copy_model(owner).cpu().float()
            _simplify(copy, [pair])
            return isinstance(getattr(copy, method)(), nn.Conv2d)
    except Exception as error:  # other people's code, which may raise anything
        log.debug("%s.%s: %s", type(owner).__name__, method, error)
        return False


def _deploy_methods(module: nn.Module) -> list[str]:
    kinds = [kind for kind in type(module).__mro__ if kind is not object and not kind.__module__.startswith("torch.")]
    names = dict.fromkeys(name for kind in kinds for name in vars(kind))
    merges = [name for name in names if _MERGES.fullmatch(name) and inspect.isroutine(getattr(module, name, None))]
    # Those without arguments call those for one pair.
    entries = [name for name in merges if not _takes_arguments(getattr(module, name))]
    return entries or [name for name in names if _MERGES_PAIR.fullmatch(name)]


def _takes_arguments(method: object) -> bool:
    parameters = inspect.signature(method).parameters.values()  # type: ignore[arg-type]
    return any(p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters)


@torch.no_grad()
def _commutes(owner: nn.Module, method: str, pairs: list[tuple[str, str]]) -> bool:
    """Return whether a method builds the same before the folds and after them, on copies with random values."""
    try:
        # A method may print, and draw initial values for what it builds.
        with torch.random.fork_rng(devices=[]), contextlib.redirect_stdout(io.StringIO()):
            first = copy_model(owner).cpu().float()
            torch.default_generator.manual_seed(0)
            _simplify(first, pairs)
            second = copy_model(first)
            _fold(second, _modules(second, pairs))
            unfolded, results = _modules(first, pairs), []
            for copy in (first, second):
                torch.default_generator.manual_seed(0)
                results.append(getattr(copy, method)())
            present = set(first.modules())
            _fold(first, [pair for pair in unfolded if present.issuperset(pair)])
            before, after = _tensors(first, results[0]), _tensors(second, results[1])
        same = before.keys() == after.keys() and all(t.shape == after[name].shape for name, t in before.items())
        return same and all(torch.allclose(t, after[name], rtol=1e-3, atol=1e-5) for name, t in before.items())
    except Exception as error:  # other people's code, which may raise anything
        log.debug("%s.%s: %s", type(owner).__name__, method, error)
        return False


def _modules(owner: nn.Module, pairs: list[tuple[str, str]]) -> list[tuple[nn.Module, nn.Module]]:
    return [(owner.get_submodule(conv), owner.get_submodule(norm)) for conv, norm in pairs]


def _simplify(owner: nn.Module, pairs: list[tuple[str, str]]) -> None:
    """Put a plain convolution in the place of every block, as after conversion; give the norms random values."""
    blocks = [module for module in owner.modules() if isinstance(module, OREPAConv | OfflineConv)]
    plain = [nn.Conv2d(**conv_arguments(b), bias=b.bias is not None).train(b.training) for b in blocks]
    replace_modules(owner, dict(zip(blocks, plain, strict=True)))
    for _, norm in _modules(owner, pairs):
        for name in ("weight", "bias", "running_mean", "running_var"):
            if (tensor := getattr(norm, name)) is not None:
                tensor.uniform_(0.5, 2.0)


def _fold(owner: nn.Module, pairs: list[tuple[nn.Module, nn.Module]]) -> None:
    replacements: dict[nn.Module, nn.Module] = {}
    for conv, norm in pairs:
        assert isinstance(conv, nn.Conv2d)
        replacements |= {conv: fold_batch_norm(conv, norm), norm: norm_placeholder(norm)}
    replace_modules(owner, replacements)


def _tensors(owner: nn.Module, result: object) -> dict[str, Tensor]:
    """Return what a deploy method left in its owner and returned."""
    leaves = result.state_dict() if isinstance(result, nn.Module) else dict(enumerate(tree_leaves(result)))
    returned = {f"returned {name}": t for name, t in leaves.items() if isinstance(t, Tensor)}
    return {name: t.double() for name, t in {**owner.state_dict(), **returned}.items()}
