"""Loads whole checkpoints: of the authors and of the originals, exactly, into our models or timm's; and timm's own."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import load_file
from timm.models import clean_state_dict, get_pretrained_cfg
from timm.models.byobnet import MobileOneBlock, RepVggBlock
from torch import Tensor, nn

from ..module_info import count_parameters, walk
from ..modules.official_blocks import Entries, Entry, check_tensors, deployed_key, key_problems, load_translated
from ..modules.offline_conv import OfflineConv
from ..modules.online_form import online_form
from ..modules.repvgg import RepVGGBlock
from ..surgery.convert import compare_outputs, convert
from ..surgery.prepare import prepare
from ..surgery.report import LayerReport, Report, attach
from .key_map import ORIGINAL_LAYERS, official_entries, official_names, original_entries
from .timm_models import MODELS, ModelSpec, create_on_meta, spec_of, timm_repvgg_block


def load_official(
    source: Mapping[str, Any] | str | os.PathLike[str], arch: str, *, backend: str = "auto", online: bool = False
) -> nn.Module:
    """Load a checkpoint of the authors into the model of that name; see `orepa.load_official`."""
    state = _state(source)
    original, classes = _original(arch, state), {"num_classes": _classes(state)}
    if original is not None:
        model = create_on_meta(original, **classes)
        _load(model, original_entries(_family(original), model), state, original)
        return prepare(model, preserve=True, inplace=True, backend=backend) if online else model
    name, spec = _spec(arch)
    if not _has_dbb(state):
        model = create_on_meta(name, **classes, backend=backend)
        _load(model, official_entries(model), state, name)
        return model
    offline = _prepare_dbb(create_on_meta(spec.plain, **classes), offline=True)
    _load(offline, official_entries(offline), state, f"{spec.plain} of DBB blocks")
    if not online:
        return offline
    model = _prepare_dbb(create_on_meta(spec.plain, **classes), backend=backend)
    model.load_state_dict(_online_state(offline, backend), assign=True)
    return model


def plain_from_official(
    source: Mapping[str, Any] | str | os.PathLike[str], arch: str, *, backend: str = "auto"
) -> nn.Module:
    """Load a checkpoint of the authors and convert it to timm's plain model, verified.

    Norms are not folded (and the branches of RepVGG and MobileOne stay apart), so that the state dict is that of
    ``timm.create_model("resnet18")``.

    Arguments and errors are those of `load_official`; ConversionError says that the model is not the same function.

    Returns:
        timm's model in eval mode.
    """
    state = _state(source)
    if _original(arch, state) is not None:
        model, detail = load_official(state, arch).eval(), "its branches stay apart, as in timm"
        layers = [
            LayerReport(name, type(block).__name__, "left", detail)
            for name, block in walk(model, (RepVggBlock, MobileOneBlock))
            if isinstance(block, RepVggBlock | MobileOneBlock)
        ]
        attach(model, Report("convert", layers, (count_parameters(model),) * 2))
        return model
    _, spec = _spec(arch)
    # DBB as well as OREPA: one convolution and its norm
    model = load_official(state, arch, backend=backend, online=True).eval()
    like = next(model.parameters())
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)).to(like.device, like.dtype)
    if not spec.is_repvgg:
        return convert(model, fold_bn=False, inplace=True, example_inputs=images)  # nothing to merge
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
    plain = convert(plain.eval(), merge=False, fold_bn=False, inplace=True, example_inputs=images)
    with torch.no_grad():
        compare_outputs(
            expected, plain(images), tolerance=None
        )  # `convert` has not seen the blocks that were taken apart
    return plain


def load_timm(name: str, path: str | os.PathLike[str]) -> tuple[nn.Module, dict[str, int]]:
    """Load a checkpoint of timm's model of that name, with as many classes and input channels as it has.

    Args:
        name: such as ``"mobileone_s0"``.
        path: a state dict with the keys of `timm.create_model`, as a safetensors file or one of PyTorch; there, it may be
            wrapped and prefixed as `timm.models.load_state_dict` knows it, and the average of the weights goes first.

    Returns:
        The model, in eval mode and float32, and those arguments of `timm.create_model` that are not its defaults.

    Raises:
        OSError: the file cannot be read.
        ValueError: it holds no weights of this model.
    """
    state = clean_state_dict(_read(path, _WRAPPERS))
    arguments = _timm_arguments(name, state)
    model = timm.create_model(name, pretrained=False, **arguments)
    assert isinstance(model, nn.Module)
    entries = {key: Entry(key, optional=key.endswith("num_batches_tracked")) for key in model.state_dict()}
    _check(state, entries, model, name)
    model.load_state_dict(state, strict=False)  # what may be missing, the norms add
    return model.eval(), arguments


def _timm_arguments(name: str, state: Mapping[str, Tensor]) -> dict[str, int]:
    """Return the number of classes and of input channels, where they are not those that timm gives the model."""
    cfg = get_pretrained_cfg(name)
    if cfg is None:
        return {}
    result = {}
    for argument, layers, axis, default in (
        ("num_classes", cfg.classifier, 0, cfg.num_classes),
        ("in_chans", cfg.first_conv, 1, cfg.input_size[0]),
    ):
        layer = layers if isinstance(layers, str | None) else layers[0]
        weight = state.get(f"{layer}.weight")
        if weight is not None and weight.dim() > axis and weight.shape[axis] != default:
            result[argument] = weight.shape[axis]
        elif argument == "num_classes" and layer and not any(key.startswith(f"{layer}.") for key in state):
            result[argument] = 0  # the file has no head
    return result


# --- the originals --------------------------------------------------------------------------------------------------------


def _family(name: str) -> str:
    return name.partition("_")[0]


def _original(arch: str, state: Mapping[str, Tensor]) -> str | None:
    """Return timm's name of an original RepVGG or MobileOne (``"repvgg_a0"`` of ``"RepVGG-A0"``), or None.

    Three RepVGGs are the authors' as well: there, the keys decide.
    """
    name = str(arch).lower().replace("-", "_")
    if _family(name) not in ORIGINAL_LAYERS or not timm.is_model(name):
        return None
    return name if f"orepa_{name}" not in MODELS or any(".rbr_dense.conv." in key for key in state) else None


def _spec(arch: str) -> tuple[str, ModelSpec]:
    try:
        return spec_of(arch)
    except ValueError as error:
        raise ValueError(f"{error}; the originals that load are timm's repvgg_* and mobileone_*") from None


def _has_dbb(state: Mapping[str, Tensor]) -> bool:
    return any(".dbb_" in key for key in state)


def _prepare_dbb(plain: nn.Module, **options: Any) -> nn.Module:
    """Put DBB blocks where its authors have them: kernels larger than 1x1 and smaller than the stem's."""

    def choose(_: str, conv: nn.Conv2d) -> dict[str, Any] | None:
        return {"topology": "dbb", **options} if conv.kernel_size == (3, 3) else None

    return prepare(plain, choose, inplace=True)


def _online_state(offline: nn.Module, backend: str) -> dict[str, Tensor]:
    """Return the state dict of a ResNet of offline DBB blocks for one of online blocks."""
    state = offline.state_dict()
    for block, name, norm, _ in official_names(offline):
        if isinstance(block, OfflineConv):
            state = {key: value for key, value in state.items() if not key.startswith(f"{name}.")}
            pair = online_form(block, "dbb", backend=backend)
            for place, module in zip((name, norm), pair, strict=True):
                state |= {f"{place}.{key}": value for key, value in module.state_dict().items()}
    return state


# --- reading --------------------------------------------------------------------------------------------------------------


#: where timm's checkpoints have the state dict, the best one first
_WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model")


def _read(path: object, wrappers: tuple[str, ...] = ("state_dict",)) -> dict[str, Tensor]:
    if not isinstance(path, str | os.PathLike):
        raise TypeError(f"source must be a file or a mapping of names to tensors, got {type(path).__name__}")
    file = Path(path)
    file.open("rb").close()  # for the system's reason why not
    kind = "safetensors" if file.suffix == ".safetensors" else "PyTorch"
    try:
        content = load_file(file) if kind == "safetensors" else torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # zip and pickle readers may raise anything
        raise ValueError(f"{file} is not a readable checkpoint: damaged, or not a {kind} file") from error
    if not isinstance(content, Mapping):
        raise ValueError(f"{file} is no checkpoint: it holds {_kind(content)}, no state dict")
    try:
        return _unwrap(content, wrappers)
    except ValueError as error:
        raise ValueError(f"{file.name}: {error}") from error


def _state(source: Mapping[str, Any] | str | os.PathLike[str]) -> dict[str, Tensor]:
    return _unwrap(source) if isinstance(source, Mapping) else _read(source)


def _unwrap(content: Mapping[str, Any], wrappers: tuple[str, ...] = ("state_dict",)) -> dict[str, Tensor]:
    """Return the tensors by their names, without the wrapper and the prefix of `torch.nn.DataParallel`."""
    wrapper = next((key for key in wrappers if content.get(key) is not None), None)
    state = content if wrapper is None else content[wrapper]
    if not isinstance(state, Mapping):
        raise ValueError(f"no checkpoint: its {wrapper} is {_kind(state)}")
    for key, value in state.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise ValueError(f"no checkpoint: {key!r} must be a tensor, got {_kind(value)}")
    return {key.removeprefix("module."): value for key, value in state.items()}


def _kind(value: object) -> str:
    return f"{'an' if type(value).__name__[0] in 'aeiou' else 'a'} {type(value).__name__}"


def _classes(state: Mapping[str, Tensor], key: str = "linear.weight") -> int:
    weight = state.get(key)
    return weight.shape[0] if weight is not None and weight.dim() == 2 and weight.shape[0] else 1000


def _load(model: nn.Module, entries: Entries, state: Mapping[str, Tensor], name: str) -> None:
    _check(state, entries, model, name)
    check_tensors(state, entries, model)
    load_translated(model, entries, state)


def _check(state: Mapping[str, Tensor], entries: Entries, model: nn.Module, name: str) -> None:
    """Raise ValueError for keys or shapes that do not fit."""
    deployed = deployed_key(state)
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
