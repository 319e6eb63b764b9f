"""Replaces modules in a tree, and finds the calls that a replacement would change."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn


def replace_modules(model: nn.Module, replacements: Mapping[nn.Module, nn.Module]) -> nn.Module:
    """Replace modules wherever a parent refers to them; return the model, or the model's replacement."""
    if model in replacements:
        return replacements[model]
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child is not None and child in replacements:
                setattr(parent, name, replacements[child])
    return model


def customization(module: nn.Module, *, backward_hooks: bool = False) -> str:
    """Return what a call of this one module does besides its class's forward, in words, or an empty string.

    A replacement of the module would lose that. ``backward_hooks`` says whether hooks of the backward pass count, too.
    """
    hooks = [module._forward_hooks, module._forward_pre_hooks]
    if backward_hooks:
        hooks += [module._backward_hooks, module._backward_pre_hooks]
    if any(hooks):
        return f"it has {'hooks' if backward_hooks else 'forward hooks'}, which a new module would not have"
    if "forward" in vars(module) or "_conv_forward" in vars(module):
        return "its forward was replaced on the instance"
    return ""
