"""Build the model of a run, restore it from a checkpoint, and deploy it as plain weights that timm alone can load."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import get_pretrained_cfg
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

from ..errors import UserError, reason
from ..models.deployed import to_timm
from ..models.timm_models import MODELS  # the import registers the models with timm
from ..modules.linear_block import LinearBlock
from ..surgery.convert import convert
from ..surgery.prepare import prepare
from .files import DEPLOY_FORMAT, VERSION, load_checkpoint, save


def default_cfg(name: str) -> dict[str, Any]:
    """Return timm's configuration of a model: input size, mean, std, interpolation.

    Raises:
        UserError: timm has no such model; the message suggests similar names.
    """
    if not timm.is_model(name):
        architectures = timm.list_models()
        close = difflib.get_close_matches(name, architectures, n=3) or [m for m in architectures if name in m][:3]
        hint = f"; did you mean {', '.join(close)}?" if name and close else "; `timm.list_models()` names them all"
        raise UserError(f"timm has no model {name!r}{hint}")
    cfg = get_pretrained_cfg(name)
    return {} if cfg is None else cfg.to_dict()


def model_arguments(name: str, num_classes: int, in_chans: int, img_size: int) -> dict[str, Any]:
    """Return keyword arguments for `timm.create_model`, with ``img_size`` for models of a fixed input size."""
    size = {"img_size": img_size} if default_cfg(name).get("fixed_input_size") else {}
    return {"num_classes": num_classes, "in_chans": in_chans, **size}


def create_plain(name: str, arguments: dict[str, Any], img_size: int) -> nn.Module:
    """Create a timm model without pretrained weights, and check that it maps ``[N, C, S, S]`` to ``[N, num_classes]``.

    Raises:
        UserError: timm cannot build it with these arguments, or it does not take such images.
    """
    try:
        model = timm.create_model(name, pretrained=False, **arguments)
    except Exception as error:  # models raise whatever they like
        raise UserError(f"timm cannot build {name} with {arguments}: {reason(error)}") from error
    training, classes = model.training, arguments["num_classes"]
    images = torch.zeros(2, arguments["in_chans"], img_size, img_size)
    try:
        with torch.no_grad():
            shape = tuple(getattr(model.eval()(images), "shape", ()))
    except Exception as error:
        size = f"{img_size}x{img_size}"
        raise UserError(f"{name} does not take {size} images (see --img-size): {reason(error)}") from error
    if shape != (2, classes):
        raise UserError(f"{name} is not a classifier: for 2 images of {classes} classes it gives {list(shape)}")
    return model.train(training)


def create(name: str, arguments: dict[str, Any], img_size: int, *, orepa: bool, preserve: bool) -> nn.Module:
    """Create the model of a run: timm's, prepared if ``orepa``. Those of `orepa.models` consist of OREPA blocks already.

    Raises:
        UserError: see `create_plain`; or there is no convolution to replace, or the options do not go with the model.
    """
    registered = MODELS.get(name)
    if registered is not None and (preserve or not orepa):
        flag = "--preserve" if preserve else "--no-orepa"
        raise UserError(f"{name} is built of OREPA blocks; with {flag} take --model {registered.plain}")
    model = create_plain(name, arguments, img_size)
    if registered is not None or not orepa:
        return model
    model = prepare(model, preserve=preserve, inplace=True)
    if not any(isinstance(module, LinearBlock) for module in model.modules()):
        raise UserError(f"{name} has no convolution with a norm layer after it, nothing for OREPA (see --no-orepa)")
    return model


def from_checkpoint(checkpoint: dict[str, Any]) -> nn.Module:
    """Restore the trained model of a checkpoint, in eval mode; with the moving average of the weights, if there is one."""
    config, spec = checkpoint["config"], checkpoint["model_spec"]
    default_cfg(spec["model"])  # raises a UserError if timm has no such model
    model = create(spec["model"], spec["model_kwargs"], config["img_size"], orepa=config["orepa"], preserve=False)
    load_weights(model, checkpoint.get("ema", checkpoint["model"]))
    return model.eval()


def describe_weights(checkpoint: dict[str, Any]) -> str:
    """Say which weights `from_checkpoint` takes."""
    if "ema" not in checkpoint:
        return "the weights of the last step"
    return f"the moving average of the weights (--ema {checkpoint['config']['ema']:g})"


def load_weights(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Load whole tensors into a model, sharded or not; raise a `UserError` if they do not fit."""
    # Checkpoints of earlier versions do not say which function their blocks compute.
    missing = sorted(k for k in model.state_dict().keys() - state.keys() if not k.endswith("_extra_state"))
    try:
        if missing:  # torch would leave them as they are
            raise RuntimeError(f'\nMissing key(s) in state_dict: "{missing[0]}"')
        set_model_state_dict(model, dict(state), options=StateDictOptions(full_state_dict=True))
    except RuntimeError as error:
        details = " ".join(line.strip() for line in str(error).splitlines()[1:3])
        raise UserError(f"the checkpoint does not fit the model it names (another timm version?): {details}") from error


def save_deployed(path: Path, model: nn.Module, spec: dict[str, Any]) -> None:
    """Write a converted model as plain weights and what is needed to use them::

        d = torch.load(path, weights_only=True)
        model = timm.create_model(d["model"], **d["model_kwargs"])
        model.load_state_dict(d["state_dict"])

    The model must be converted with ``fold_bn=False``, as timm's has batch norms. ``spec`` holds ``model``, ``model_kwargs``,
    ``classes``, ``img_size`` and ``preprocessing``.
    """
    spec, state = to_timm(spec, {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()})
    save(path, {"format": DEPLOY_FORMAT, "version": VERSION, **spec, "state_dict": state})


def convert_checkpoint(checkpoint: Path, out: Path) -> tuple[nn.Module, str]:
    """Convert a checkpoint of ``orepa train``, finished or not, verify the result, and write a deploy file.

    Returns:
        The converted model, and which weights of the checkpoint it has.

    Raises:
        ConversionError: the converted model computes another function. Nothing is written then.
    """
    content = load_checkpoint(checkpoint)
    model, spec = from_checkpoint(content), content["model_spec"]
    shape = (4, spec["model_kwargs"]["in_chans"], spec["img_size"], spec["img_size"])
    images = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    converted = convert(model, fold_bn=False, example_inputs=images)
    save_deployed(out, converted, spec)
    return converted, describe_weights(content)
