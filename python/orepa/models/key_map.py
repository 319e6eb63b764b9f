"""Maps the keys of the authors' checkpoints to those of the registered models."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from torch import Tensor, nn

from ..module_info import walk
from ..modules.linear_block import LinearBlock
from ..modules.official_blocks import (
    Entries,
    Entry,
    add_prefixes,
    conv_entries,
    key_problems,
    norm_entries,
    offline_entries,
    repvgg_entries,
    translate,
)
from ..modules.offline_conv import OfflineConv
from ..modules.orepa_conv import OREPAConv
from ..modules.repvgg import RepVGGBlock

CHECKPOINTS_URL = "https://github.com/JUGGHM/OREPA_CVPR2022"


def official_filter(state: Mapping[str, Tensor], model: nn.Module) -> Mapping[str, Tensor]:
    """Return the authors' tensors under our names, another state dict as it is: timm's ``pretrained_filter_fn``.

    Shapes are left to timm, which drops a classifier of another size, except for the number of input channels: timm adapts
    the one kernel of a plain convolution, not the branches of a block.

    Raises:
        ValueError: missing or unexpected keys, or another number of input channels.
    """
    if "linear.weight" in state:
        entries = official_entries(model)
        problems = key_problems(state, entries)
        if problems:
            raise ValueError(f"no checkpoint of this model: {'; '.join(problems)}")
        state = translate(entries, state)
    _check_input_channels(state, model)
    return state


def _check_input_channels(state: Mapping[str, Tensor], model: nn.Module) -> None:
    blocks = ((name, module) for name, module in model.named_modules() if isinstance(module, OREPAConv | RepVGGBlock))
    stem, block = next(blocks)
    for key, parameter in block.named_parameters(stem):
        theirs, ours = state.get(key, parameter).shape, parameter.shape
        if theirs[:1] == ours[:1] and theirs[1:2] != ours[1:2]:
            raise ValueError(
                f"{key!r} is {list(theirs)} in the checkpoint, {list(ours)} in the model: the branches of a block cannot be "
                f"adapted to other input channels. Use in_chans={theirs[1]} (gray images: x.expand(-1, {theirs[1]}, -1, -1)), "
                "or convert the checkpoint, let timm adapt the plain model, and prepare that with preserve=True"
            )


#: our convolutions (RepVGG: blocks), the norm after each, and their name for the two together
_NAMES = (
    (r"conv1", "bn1", "stage0.conv1"),
    (r"layer(\d+)\.(\d+)\.conv(\d+)", r"layer\1.\2.bn\3", r"stage\1.\2.conv\3"),
    (r"layer(\d+)\.(\d+)\.downsample\.0", r"layer\1.\2.downsample.1", r"stage\1.\2.shortcut"),
    (r"stem", "", "stage0"),
    *((rf"stages\.{stage}\.(\d+)", "", rf"stage{stage + 1}.\1") for stage in range(4)),
)


def official_entries(model: nn.Module) -> Entries:
    """Return the entry of every tensor of one of the registered models, or of such a ResNet of offline DBB blocks."""
    result: Entries = {}
    for module, ours, norm, theirs in official_names(model):
        if isinstance(module, RepVGGBlock):
            result |= add_prefixes(f"{theirs}.", f"{ours}.", repvgg_entries(module.identity_bn is not None))
            continue
        if isinstance(module, OfflineConv):
            result |= add_prefixes(f"{theirs}.", f"{ours}.", offline_entries("dbb", module._lowered.branches))
            continue
        if isinstance(module, OREPAConv):
            stages = module.kernel_size[0] // 2
            result |= add_prefixes(f"{theirs}.", f"{ours}.", conv_entries(module.topology, module.groups, stages))
        else:  # a shortcut that stays a convolution
            result[f"{theirs}.conv.weight"] = Entry(f"{ours}.weight")
        result |= norm_entries(f"{theirs}.bn", norm)
    head = "head.fc" if hasattr(model, "head") else "fc"
    return result | {f"linear.{kind}": Entry(f"{head}.{kind}") for kind in ("weight", "bias")}


def official_names(model: nn.Module) -> Iterator[tuple[nn.Module, str, str, str]]:
    """Yield every convolution (RepVGG: block), its name, that of the norm after it, and theirs for the two together."""
    for name, module in walk(model, (LinearBlock, RepVGGBlock)):
        if isinstance(module, OREPAConv | OfflineConv | RepVGGBlock | nn.Conv2d):
            for pattern, norm, theirs in _NAMES:
                match = re.fullmatch(pattern, name)
                if match:
                    yield module, name, match.expand(norm), match.expand(theirs)


# --- the originals in timm ------------------------------------------------------------------------------------------------

_PLACES = (
    (r"^head\.fc\.", "linear."),
    (r"^stem\.", "stage0."),
    *((rf"^stages\.{stage}\.", f"stage{stage + 1}.") for stage in range(4)),
)
#: how timm and the authors name the layers of a block
ORIGINAL_LAYERS = {
    "repvgg": {
        ".conv_kxk.": ".rbr_dense.",
        ".conv_1x1.": ".rbr_1x1.",
        ".identity.": ".rbr_identity.",
        ".attn.fc1.": ".se.down.",
        ".attn.fc2.": ".se.up.",
    },
    "mobileone": {
        ".conv_kxk.": ".rbr_conv.",
        ".conv_scale.": ".rbr_scale.",
        ".identity.": ".rbr_skip.",
        ".attn.fc1.": ".se.reduce.",
        ".attn.fc2.": ".se.expand.",
    },
}


def original_entries(family: str, model: nn.Module) -> Entries:
    """Return the entry of every tensor of a network of timm of that family, by the keys of the authors."""
    result: Entries = {}
    for ours in model.state_dict():
        theirs = ours
        for pattern, replacement in _PLACES:
            theirs = re.sub(pattern, replacement, theirs)
        for layer, replacement in ORIGINAL_LAYERS[family].items():
            theirs = theirs.replace(layer, replacement)
        result[theirs] = Entry(ours, optional=ours.endswith(".num_batches_tracked"))
    return result
