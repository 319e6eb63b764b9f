"""Replacing modules in a tree, under every name that they have."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import nn


def walk(model: nn.Module, stop: tuple[type[nn.Module], ...] = ()) -> Iterator[tuple[str, nn.Module]]:
    """Every module once, by its first qualified name; the inside of ``stop`` types is skipped."""
    inside: set[int] = set()
    for name, module in model.named_modules():
        if id(module) in inside:
            continue
        yield name, module
        if isinstance(module, stop):
            inside.update(id(m) for m in module.modules() if m is not module)


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
