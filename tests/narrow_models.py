"""timm's models, ours among them, with all of their kinds of layers but few channels and few blocks: for quick tests."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn


def narrow(name: str, **arguments: Any) -> nn.Module:
    """Call `timm.create_model` with arguments that make the model small."""
    import timm
    from timm.models.byobnet import model_cfgs

    few: dict[str, Any]
    if "repvgg" in name:
        blocks = model_cfgs[name.removeprefix("orepa_")].blocks
        few = {"width_factor": 0.25, "blocks": tuple(replace(block, d=min(block.d, 2)) for block in blocks)}
    elif "wide" in name:  # whose width is a whole number
        few = {"width": 1, "layers": (1, 1, 1, 1)} | ({"topology": "plain"} if "orepa" in name else {})
    else:
        few = {"channels": (16, 16, 32, 32), "layers": (1, 2, 1, 1)}
    model = timm.create_model(name, **few, **arguments)
    assert isinstance(model, nn.Module)
    return model


def images(channels: int = 3, *, seed: int = 1) -> Tensor:
    """Draw two images of 64x64."""
    return torch.randn(2, channels, 64, 64, generator=torch.Generator().manual_seed(seed))


def settled(model: nn.Module) -> nn.Module:
    """Return the model in eval mode, with statistics of its own."""
    with torch.no_grad():
        model.train()(images(seed=2))
    return model.eval()


def assert_close(got: Tensor, expected: Tensor) -> None:
    assert got.shape == expected.shape and (got - expected).norm() <= 1e-5 * expected.norm()
