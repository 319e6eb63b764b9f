"""The authors' checkpoints, whole models: into ours, exactly, or into timm's plain ones."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .block import LinearBlock
from .conv import OREPAConv
from .convert import _compare, convert
from .official import (
    Entries,
    Entry,
    check_tensors,
    deep_stem_entries,
    key_problems,
    norm_entries,
    orepa_entries,
    rep1x1_entries,
    repvgg_entries,
    translate,
    under,
)
from .repvgg import RepVGGBlock
from .surgery import walk

CHECKPOINTS_URL = "https://github.com/JUGGHM/OREPA_CVPR2022"


def load_official(source: Mapping[str, Any] | str | os.PathLike[str], arch: str, *, backend: str = "auto") -> nn.Module:
    """Load a checkpoint of the authors into the model of the same name here (`orepa.models`), exactly.

    Outputs, gradients and running statistics are theirs, to about 1e-8 relative per block in float64; see
    `block_from_official`. Files are read without running any code that they hold.

    Args:
        source: a file, or what it holds: a state dict with their keys, within ``{"state_dict": ...}`` or not, with the prefix
            ``module.`` or not. It is copied.
        arch: the model, as `timm.create_model` or the authors call it: ``"orepa_resnet18"``, ``"resnet18"``, ``"ResNet-18"``.
        backend: of every `OREPAConv`.

    Returns:
        In train mode, with the dtype and on the device of the tensors (from a file: the CPU), and with as many classes.

    Raises:
        ImportError: without timm, the extra ``models``.
        OSError: the file cannot be read.
        TypeError: ``source`` is neither.
        ValueError: an unknown ``arch``, a file that is no checkpoint, or a checkpoint of something else; the message names the
            first missing and unexpected keys and, where a tensor has another shape, both shapes.
    """
    from . import models

    name, _ = models.spec_of(arch)
    state = _unwrap(source) if isinstance(source, Mapping) else _read(source)
    model = models.create_on_meta(name, num_classes=_classes(state), backend=backend)
    entries = official_entries(model)
    _check(state, entries, model, name)
    ours = {key: tensor.detach().clone() for key, tensor in translate(entries, state).items()}
    for key, value in model.state_dict().items():
        if key not in ours:  # the optional num_batches_tracked
            ours[key] = torch.zeros_like(value, device=next(iter(ours.values())).device)
    model.load_state_dict(ours, assign=True)
    return model


def plain_from_official(
    source: Mapping[str, Any] | str | os.PathLike[str], arch: str, *, backend: str = "auto"
) -> nn.Module:
    """Load a checkpoint of the authors and convert it to timm's plain model, verified.

    Norms are not folded (and the branches of RepVGG stay three), so that the state dict is that of
    ``timm.create_model("resnet18")``.

    Args:
        source, arch, backend: as for `load_official`.

    Returns:
        timm's model in eval mode.

    Raises:
        ConversionError: the converted model is not the same function.
        ImportError, OSError, TypeError, ValueError: as `load_official`.
    """
    from . import models

    _, spec = models.spec_of(arch)
    model = load_official(source, arch, backend=backend).eval()
    like = next(model.parameters())
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)).to(like.device, like.dtype)
    if not spec.is_repvgg:
        return convert(model, fold_bn=False, inplace=True, example_inputs=images)
    with torch.no_grad():
        expected = model(images)
    plain = models.create_on_meta(spec.plain, num_classes=_classes(model.state_dict(), "head.fc.weight"))
    blocks = {path: block for path, block in walk(model, (RepVGGBlock,)) if isinstance(block, RepVGGBlock)}
    state = {k: v for k, v in model.state_dict().items() if not any(k.startswith(f"{path}.") for path in blocks)}
    for path, block in blocks.items():
        state |= models.timm_repvgg_block(path, block, plain)
    missing, unexpected = plain.load_state_dict(state, strict=False, assign=True)
    lost = [key for key in missing if ".conv_kxk.conv." not in key]
    assert not lost and not unexpected, (lost, unexpected)
    plain = convert(plain.eval(), fold_bn=False, inplace=True, example_inputs=images)
    with torch.no_grad():
        _compare(expected, plain(images), tolerance=None)  # `convert` has not seen the blocks that were taken apart
    return plain


def official_filter(state: Mapping[str, Tensor], model: nn.Module) -> Mapping[str, Tensor]:
    """timm's ``pretrained_filter_fn``: the authors' tensors under our names, another state dict as it is.

    Shapes are left to timm, which drops a classifier of another size.

    Raises:
        ValueError: missing or unexpected keys.
    """
    if "linear.weight" not in state:
        return state
    entries = official_entries(model)
    problems = key_problems(state, entries)
    if problems:
        raise ValueError(f"no checkpoint of this model: {'; '.join(problems)}")
    return translate(entries, state)


# --- names ----------------------------------------------------------------------------------------------------------------

#: our convolutions (RepVGG: blocks), the norm after each, and what they call the two together
_NAMES = (
    (r"conv1", "bn1", "stage0.conv1"),
    (r"layer(\d+)\.(\d+)\.conv(\d+)", r"layer\1.\2.bn\3", r"stage\1.\2.conv\3"),
    (r"layer(\d+)\.(\d+)\.downsample\.0", r"layer\1.\2.downsample.1", r"stage\1.\2.shortcut"),
    (r"stem", "", "stage0"),
    *((rf"stages\.{stage}\.(\d+)", "", rf"stage{stage + 1}.\1") for stage in range(4)),
)


def official_entries(model: nn.Module) -> Entries:
    """Their key of every tensor of one of the registered models, and the map of its values."""
    result: Entries = {}
    for module, ours, norm, theirs in _blocks(model):
        if isinstance(module, RepVGGBlock):
            result |= under(f"{theirs}.", f"{ours}.", repvgg_entries(module.identity_bn is not None))
            continue
        if isinstance(module, OREPAConv):
            own, start = _block_entries(module), f"{theirs}."
        else:  # a shortcut that stays a convolution
            own, start = {"weight": Entry("weight")}, f"{theirs}.conv."
        result |= under(start, f"{ours}.", own)
        result |= norm_entries(f"{theirs}.bn", norm)
    head = "head.fc" if hasattr(model, "head") else "fc"
    return result | {f"linear.{kind}": Entry(f"{head}.{kind}") for kind in ("weight", "bias")}


def _blocks(model: nn.Module) -> Iterator[tuple[nn.Module, str, str, str]]:
    for name, module in walk(model, (LinearBlock, RepVGGBlock)):
        if isinstance(module, OREPAConv | RepVGGBlock | nn.Conv2d):
            for pattern, norm, theirs in _NAMES:
                match = re.fullmatch(pattern, name)
                if match:
                    yield module, name, match.expand(norm), match.expand(theirs)


def _block_entries(conv: OREPAConv) -> Entries:
    if conv.topology == "rep1x1":
        return rep1x1_entries()
    if conv.topology == "deep_stem":
        return deep_stem_entries(conv.kernel_size[0] // 2)
    return orepa_entries(conv.groups)


# --- reading --------------------------------------------------------------------------------------------------------------


def _read(path: object) -> dict[str, Tensor]:
    if not isinstance(path, str | os.PathLike):
        raise TypeError(f"source must be a file or a mapping of names to tensors, got {type(path).__name__}")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # torch.load lets through whatever the bytes provoke in zip and pickle readers
        raise ValueError(f"{os.fspath(path)} is not a readable checkpoint: damaged, or not a PyTorch file") from error
    if not isinstance(content, Mapping):
        raise ValueError(f"{os.fspath(path)} is no checkpoint of the authors: it holds {_kind(content)}, no state dict")
    try:
        return _unwrap(content)
    except ValueError as error:
        raise ValueError(f"{Path(path).name}: {error}") from error


def _unwrap(content: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors by their names, without the wrapper and the prefix of `torch.nn.DataParallel`."""
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
    """Raises ValueError for keys, shapes, devices or dtypes that do not fit."""
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
