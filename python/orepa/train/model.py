"""Build the model of a run, or of its checkpoint."""

from __future__ import annotations

import difflib
from typing import Any

import timm
import torch
from timm.models import get_pretrained_cfg
from torch import Tensor, nn

from ..errors import UserError
from ..models.timm_models import MODELS, create_on_meta  # the import registers the models with timm
from ..modules.linear_block import LinearBlock
from ..surgery.prepare import prepare


def default_cfg(name: str) -> dict[str, Any]:
    """timm's facts about a model: input size, mean, std, interpolation.

    Raises:
        UserError: timm has no such model; the message suggests some.
    """
    if not timm.is_model(name):
        architectures = timm.list_models()
        close = difflib.get_close_matches(name, architectures, n=3) or [m for m in architectures if name in m][:3]
        hint = f"; did you mean {', '.join(close)}?" if name and close else "; `timm.list_models()` names them all"
        raise UserError(f"timm has no model {name!r}{hint}")
    cfg = get_pretrained_cfg(name)
    return {} if cfg is None else cfg.to_dict()


def model_arguments(name: str, num_classes: int, in_chans: int, img_size: int) -> dict[str, Any]:
    """Keyword arguments of `timm.create_model`. Models of a fixed input size are told theirs."""
    arguments: dict[str, Any] = {"num_classes": num_classes, "in_chans": in_chans}
    if default_cfg(name).get("fixed_input_size"):
        arguments["img_size"] = img_size
    return arguments


def create_plain(name: str, arguments: dict[str, Any], img_size: int) -> nn.Module:
    """A timm model with initial values, checked to map ``[N, C, S, S]`` to ``[N, num_classes]``.

    Raises:
        UserError: timm cannot build it so, or it does not take such images.
    """
    try:
        model = timm.create_model(name, pretrained=False, **arguments)
    except Exception as error:  # each model checks its arguments in its own way
        raise UserError(f"timm cannot build {name} with {arguments}: {_first_line(error)}") from error
    images = torch.zeros(2, arguments["in_chans"], img_size, img_size)
    training = model.training
    try:
        with torch.no_grad():
            shape = tuple(getattr(model.eval()(images), "shape", ()))
    except Exception as error:  # likewise
        raise UserError(
            f"{name} does not take {img_size}x{img_size} images (see --img-size): {_first_line(error)}"
        ) from error
    if shape != (2, arguments["num_classes"]):
        raise UserError(
            f"{name} is not a classifier: for 2 images of {arguments['num_classes']} classes it gives {list(shape)}"
        )
    model.train(training)
    return model


def create(name: str, arguments: dict[str, Any], img_size: int, *, orepa: bool, preserve: bool) -> nn.Module:
    """The model of a run: timm's, prepared unless ``orepa`` is off; one of `orepa.models` is so already.

    Raises:
        UserError: see `create_plain`; or there is nothing to swap, or nothing that could be left out or preserved.
    """
    registered = MODELS.get(name)
    if registered is not None and (preserve or not orepa):
        wish = "--preserve" if preserve else "--no-orepa"
        raise UserError(f"{name} is built of OREPA blocks; with {wish} take --model {registered.plain}")
    model = create_plain(name, arguments, img_size)
    if registered is not None or not orepa:
        return model
    model = prepare(model, preserve=preserve, inplace=True)
    if not any(isinstance(module, LinearBlock) for module in model.modules()):
        raise UserError(
            f"{name} has no convolution with a norm layer after it, so OREPA has no place in it (see --no-orepa)"
        )
    return model


def from_checkpoint(checkpoint: dict[str, Any]) -> nn.Module:
    """Rebuild the trained model of a checkpoint, in eval mode: with the moving average of the weights, if there is one.

    Raises:
        UserError: timm does not know its model, or its weights do not fit.
    """
    config, spec = checkpoint["config"], checkpoint["model_spec"]
    default_cfg(spec["model"])
    model = create(spec["model"], spec["model_kwargs"], config["img_size"], orepa=config["orepa"], preserve=False)
    load_weights(model, checkpoint.get("ema", checkpoint["model"]))
    return model.eval()


def which_weights(checkpoint: dict[str, Any]) -> str:
    """What `from_checkpoint` takes, for people."""
    if "ema" not in checkpoint:
        return "the weights of the last step"
    return f"the moving average of the weights (--ema {checkpoint['config']['ema']:g})"


def load_weights(model: nn.Module, state: dict[str, Any]) -> None:
    """`load_state_dict`, with an error that a person can read.

    Raises:
        UserError: names the first differences.
    """
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines()[1:3]]
        raise UserError(
            f"the checkpoint does not fit the model it names (another timm version?): {' '.join(lines)}"
        ) from error


def as_timms_own(spec: dict[str, Any], state: dict[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Name the plain network of one of `orepa.models`, and its weights as timm does.

    Args:
        spec: with ``model`` and ``model_kwargs``.
        state: of the converted model, norms not folded.

    Returns:
        Both, so that ``timm.create_model(spec["model"], **spec["model_kwargs"])`` takes the weights; of another model as they
        were.
    """
    registered = MODELS.get(spec["model"])
    if registered is None:
        return spec, state
    if registered.is_repvgg:
        state = _with_three_branches(create_on_meta(registered.plain, **spec["model_kwargs"]), state)
    return {**spec, "model": registered.plain}, state


def _with_three_branches(plain: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """RepVGG's convolutions in timm's blocks of three branches: in the kxk one, behind a norm that only adds the bias.

    The other branches are zero. `timm.utils.reparameterize_model` takes them away.
    """
    result = {}
    for key, like in plain.state_dict().items():
        fill = 1.0 if key.endswith(".running_var") else 0.0
        result[key] = state[key] if key in state else torch.full(like.shape, fill, dtype=like.dtype)
    for name, norm in plain.named_modules():
        if name.endswith(".conv_kxk.bn") and isinstance(norm, nn.BatchNorm2d):
            block = name.removesuffix(".conv_kxk.bn")
            result[f"{block}.conv_kxk.conv.weight"] = state[f"{block}.conv.weight"]
            result[f"{name}.bias"] = state[f"{block}.conv.bias"]
            result[f"{name}.weight"].fill_((1 + norm.eps) ** 0.5)
    return result


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
