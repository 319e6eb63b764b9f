"""Replacing modules in a tree, under every name that they have, by ones of the same geometry."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn


def replace_modules(model: nn.Module, replacements: Mapping[nn.Module, nn.Module]) -> nn.Module:
    """Put new modules where old ones are, wherever a parent refers to them.

    Returns:
        The model, or its replacement where the model itself is replaced.
    """
    if model in replacements:
        return replacements[model]
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child is not None and child in replacements:
                setattr(parent, name, replacements[child])
    return model


def own_call(module: nn.Module) -> str:
    """What a call of this one module does besides its class's forward, in words, or an empty string.

    A module put in its place would do without, and compute something else.
    """
    if module._forward_hooks or module._forward_pre_hooks:
        return "it has forward hooks, which a new module would not have"
    if "forward" in vars(module) or "_conv_forward" in vars(module):
        return "its forward was replaced on the instance"
    return ""


def lost_in_a_new_module(module: nn.Module) -> str:
    """What a module put in the place of this one would do without, in words, or an empty string: its hooks and `own_call`."""
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return "it has hooks, which a new module would not have"
    return own_call(module)
