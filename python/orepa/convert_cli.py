"""Converts the three kinds of checkpoints that ``orepa convert`` takes; `cli` has its options."""

from __future__ import annotations

import argparse
import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import safetensors.torch
import timm
import torch
from timm.models import model_entrypoint
from timm.utils import reparameterize_model
from torch import Tensor, nn

from orepa_kernels import __version__

from .errors import UserError, reason
from .models.checkpoints import load_timm, plain_from_official
from .models.timm_models import MODELS, spec_of
from .surgery.convert import compare_outputs, convert
from .surgery.report import report
from .train.files import save, write_atomically
from .train.model import convert_checkpoint, default_cfg

_SUFFIXES = (".safetensors", ".pt", ".pth")
_SIZE = 64  # of the images on which a network is compared, where it takes any


def run(args: argparse.Namespace) -> int:
    """Convert a checkpoint, verify the result, and write plain weights; return the exit code."""
    out: Path = args.out
    if args.timm and out.suffix not in _SUFFIXES:
        raise UserError(f"OUT must end in {', '.join(_SUFFIXES)}, got {out}")
    for path in [out, out.with_suffix(".json")] if args.timm else [out]:
        if path.is_dir():
            raise UserError(f"{path} is a folder; name the file to write")
        if path.exists() and not args.force:
            raise UserError(f"{path} exists already (--force replaces it)")
    if not out.parent.is_dir():
        raise UserError(f"cannot write {out}: the folder {out.parent} does not exist")
    if args.timm:
        _convert_timm(args.timm, args.weights, out)
        return 0
    if args.official:
        model, note = _convert_official(args)
    else:
        model, note = convert_checkpoint(args.checkpoint, out)
    print(report(model))
    print(f"written to {out}: {note}")
    return 0


@contextlib.contextmanager
def _reading(checkpoint: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot read the checkpoint {checkpoint}: {reason(error)}") from error
    except (TypeError, ValueError) as error:
        raise UserError(str(error)) from error


def _convert_official(args: argparse.Namespace) -> tuple[nn.Module, str]:
    with _reading(args.checkpoint):
        model = plain_from_official(args.checkpoint, args.arch)
    save(args.out, dict(model.state_dict()))
    cfg: Any = model.pretrained_cfg
    name = cfg["architecture"]
    name = MODELS[name].plain if name in MODELS else name
    return model, f"a state dict for {_created(name)}" + " (after import orepa.models)" * _is_ours(name)


def _is_ours(name: str) -> bool:
    return model_entrypoint(name).__module__ == spec_of.__module__


def _created(name: str, **arguments: object) -> str:
    """Return the call that creates a model, in code."""
    return f"timm.create_model({', '.join([repr(name), *(f'{key}={value!r}' for key, value in arguments.items())])})"


# --- timm's models --------------------------------------------------------------------------------------------------------


def _convert_timm(name: str, checkpoint: Path, out: Path) -> None:
    """Convert a checkpoint of timm's model; write the weights, and a JSON file of what was done."""
    cfg = default_cfg(name)  # raises a UserError if timm has no such model
    with _reading(checkpoint):
        model, arguments = load_timm(name, checkpoint)
    images = _images(model, name, cfg, arguments)
    converted = convert(model, example_inputs=images)
    state = {k: v.detach().clone(memory_format=torch.contiguous_format) for k, v in converted.state_dict().items()}
    done, (before, after) = report(converted), map(_count_convolutions, (model, converted))
    net = _net_of(state, converted, images, name, arguments)
    if net is None:  # only the trained values say which layers become one
        created = _created(name, **arguments, checkpoint_path=str(checkpoint))
        net = f"orepa.convert({created}.eval(), example_inputs=torch.randn{tuple(images.shape)})"
    read = "safetensors.torch.load_file({})" if _is_safe(out) else "torch.load({}, weights_only=True)"
    load = f"model = {net}; model.load_state_dict({read.format(repr(str(out)))})"
    record = {
        "model": name,
        "arguments": arguments,
        "load": "import orepa.models; " * _is_ours(name) + load,
        "convolutions": {"before": before, "after": after},
        "parameters": dict(zip(("before", "after"), done.parameters, strict=True)),
        "compared_on": list(images.shape),
        "error": done.error,
        **{
            action: [
                {"name": layer.name, "convolution": layer.layer, "detail": layer.detail, "error": layer.error}
                for layer in done.select(action)
            ]
            for action in ("merged", "converted", "folded", "left")
        },
        "versions": {"orepa-kernels": __version__, "timm": timm.__version__, "torch": str(torch.__version__)},
    }
    _write(out, state, record)
    for layer in done.left:
        print(f"{layer.name} left: {layer.detail}")
    print(*str(done).splitlines()[len(done.layers) + 1 :], sep="\n")
    print(f"convolutions {before} -> {after}; written to {out} and {out.with_suffix('.json').name}")
    print(f"load it by: {record['load']}")


def _images(model: nn.Module, name: str, cfg: dict[str, Any], arguments: dict[str, int]) -> Tensor:
    """Return images that the model takes, small ones where it can."""
    channels, *size = cfg.get("input_size", (3, 224, 224))
    for side in [size] if cfg.get("fixed_input_size") else [[_SIZE, _SIZE], size]:
        shape = (2, arguments.get("in_chans", channels), *side)
        images = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        try:
            with torch.no_grad():
                model(images)
            return images
        except Exception as error:  # models raise whatever they like
            problem = error
    raise UserError(f"{name} does not take images of {list(shape)}: {reason(problem)}") from problem


def _net_of(
    state: dict[str, Tensor], converted: nn.Module, images: Tensor, name: str, arguments: dict[str, int]
) -> str | None:
    """Return code for a network that loads the weights and then gives the same output, if untrained values suffice."""
    plain = timm.create_model(name, **arguments).eval()
    for function, code in ((reparameterize_model, "timm.utils.reparameterize_model"), (convert, "orepa.convert")):
        with contextlib.suppress(Exception), torch.no_grad():  # also of timm's own code
            net = function(plain)
            net.load_state_dict(state)
            compare_outputs(converted(images), net(images), None)
            return f"{code}({_created(name, **arguments)}.eval())"
    return None


def _count_convolutions(model: nn.Module) -> int:
    return sum(isinstance(module, nn.Conv2d) for module in model.modules())


def _write(out: Path, state: dict[str, Tensor], record: dict[str, Any]) -> None:
    """Write both files or none."""

    def write(file: IO[bytes]) -> None:
        file.write((json.dumps(record, indent=2, allow_nan=False) + "\n").encode())
        if _is_safe(out):
            write_atomically(out, lambda weights: weights.write(safetensors.torch.save(state, {"format": "pt"})))
        else:
            save(out, state)

    write_atomically(out.with_suffix(".json"), write)


def _is_safe(out: Path) -> bool:
    return out.suffix == ".safetensors"
