"""Loads whole checkpoints of the authors: into our models, exactly, or into timm's plain ones."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..module_info import walk
from ..modules.official_blocks import Entries, check_tensors, key_problems, load_translated
from ..modules.repvgg import RepVGGBlock
from ..surgery.convert import compare_outputs, convert
from .key_map import official_entries
from .timm_models import create_on_meta, spec_of, timm_repvgg_block


def load_official(source: Mapping[str, Any] | str | os.PathLike[str], arch: str, *, backend: str = "auto") -> nn.Module:
    """Load a checkpoint of the authors into the registered model of that name; see `orepa.load_official`."""
    name, _ = spec_of(arch)
    state = _unwrap(source) if isinstance(source, Mapping) else _read(source)
    model = create_on_meta(name, num_classes=_classes(state), backend=backend)
    entries = official_entries(model)
    _check(state, entries, model, name)
    load_translated(model, entries, state)
    return model


def plain_from_official(
    source: Mapping[str, Any] | str | os.PathLike[str], arch: str, *, backend: str = "auto"
) -> nn.Module:
    """Load a checkpoint of the authors and convert it to timm's plain model, verified.

    Norms are not folded (and the branches of RepVGG stay apart), so that the state dict is that of
    ``timm.create_model("resnet18")``.

    Arguments and errors are those of `load_official`; ConversionError says that the model is not the same function.

    Returns:
        timm's model in eval mode.
    """
    _, spec = spec_of(arch)
    model = load_official(source, arch, backend=backend).eval()
    like = next(model.parameters())
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)).to(like.device, like.dtype)
    if not spec.is_repvgg:
        return convert(model, fold_bn=False, inplace=True, example_inputs=images)
    with torch.no_grad():
        expected = model(images)
    plain = create_on_meta(spec.plain, num_classes=_classes(model.state_dict(), "head.fc.weight"))
    blocks = {path: block for path, block in walk(model, (RepVGGBlock,)) if isinstance(block, RepVGGBlock)}
    state = {k: v for k, v in model.state_dict().items() if not any(k.startswith(f"{path}.") for path in blocks)}
    for path, block in blocks.items():
        state |= timm_repvgg_block(path, block, plain)
    missing, unexpected = plain.load_state_dict(state, strict=False, assign=True)
    lost = [key for key in missing if ".conv_kxk.conv." not in key]
    assert not lost and not unexpected, (lost, unexpected)
    plain = convert(plain.eval(), fold_bn=False, inplace=True, example_inputs=images)
    with torch.no_grad():
        compare_outputs(
            expected, plain(images), tolerance=None
        )  # `convert` has not seen the blocks that were taken apart
    return plain


# --- reading --------------------------------------------------------------------------------------------------------------


def _read(path: object) -> dict[str, Tensor]:
    if not isinstance(path, str | os.PathLike):
        raise TypeError(f"source must be a file or a mapping of names to tensors, got {type(path).__name__}")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # zip and pickle readers may raise anything
        raise ValueError(f"{os.fspath(path)} is not a readable checkpoint: damaged, or not a PyTorch file") from error
    if not isinstance(content, Mapping):
        raise ValueError(f"{os.fspath(path)} is no checkpoint of the authors: it holds {_kind(content)}, no state dict")
    try:
        return _unwrap(content)
    except ValueError as error:
        raise ValueError(f"{Path(path).name}: {error}") from error


def _unwrap(content: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the tensors by their names, without the wrapper and the prefix of `torch.nn.DataParallel`."""
    state = content.get("state_dict", content)
    if not isinstance(state, Mapping):
        raise ValueError(f"no checkpoint of the authors: its state_dict is {_kind(state)}")
    for key, value in state.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise ValueError(f"no checkpoint of the authors: {key!r} must be a tensor, got {_kind(value)}")
    return {key.removeprefix("module."): value for key, value in state.items()}


def _kind(value: object) -> str:
    return f"{'an' if type(value).__name__[0] in 'aeiou' else 'a'} {type(value).__name__}"


def _classes(state: Mapping[str, Tensor], key: str = "linear.weight") -> int:
    weight = state.get(key)
    return weight.shape[0] if weight is not None and weight.dim() == 2 and weight.shape[0] else 1000


def _check(state: Mapping[str, Tensor], entries: Entries, model: nn.Module, name: str) -> None:
    """Raise ValueError for keys, shapes, devices or dtypes that do not fit."""
    deployed = next((key for key in state if "_reparam." in key), None)
    if deployed is not None:
        raise ValueError(f"the checkpoint is deployed already ({deployed!r}): plain convolutions, nothing to convert")
    problems = key_problems(state, entries)
    expected = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    for key, entry in entries.items():
        if key in state and tuple(state[key].shape) not in entry.shapes(expected[entry.name]):
            problems.append(f"{key!r} is {list(state[key].shape)} there, {list(expected[entry.name])} in the model")
            break
    if problems:
        raise ValueError(f"no checkpoint of {name}: {'; '.join(problems)}")
    check_tensors(state, entries, model)
