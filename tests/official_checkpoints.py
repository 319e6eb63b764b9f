"""Synthetic checkpoints with the authors' keys and shapes, written down from the description of their names."""

from __future__ import annotations

import torch
from torch import Tensor

Shapes = dict[str, tuple[int, ...]]
DEPTHS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}
RESNETS = {  # depth, width of the first stage, groups, width of the 3x3 layer per 64 channels of the stage
    "ResNet-18": (18, 64, 1, 64),
    "ResNet-34": (34, 64, 1, 64),
    "ResNet-50": (50, 64, 1, 64),
    "ResNet-101": (101, 64, 1, 64),
    "ResNet-18-2x": (18, 128, 1, 64),
    "ResNeXt-50": (50, 64, 32, 128),
}
REPVGGS = {
    "RepVGG-A0": (48, 48, 96, 192, 1280),
    "RepVGG-A1": (64, 64, 128, 256, 1280),
    "RepVGG-A2": (64, 96, 192, 384, 1408),
}
ARCHS = [*RESNETS, *REPVGGS]
#: the original RepVGGs: blocks per stage, widths, groups of every second block
ORIGINAL_REPVGGS = {
    "RepVGG-A0": ((2, 4, 14, 1), (48, 48, 96, 192, 1280), 1),
    "RepVGG-B1g4": ((4, 6, 16, 1), (64, 128, 256, 512, 2048), 4),
    "RepVGG-D2se": ((8, 14, 24, 1), (64, 160, 320, 640, 2560), 1),
}
#: MobileOne: widths, kxk branches, whether the last blocks have squeeze-and-excitation
MOBILEONES = {
    "MobileOne-S0": ((48, 48, 128, 256, 1024), 4, False),
    "MobileOne-S4": ((64, 192, 448, 896, 2048), 1, True),
}
ORIGINALS = [*ORIGINAL_REPVGGS, *MOBILEONES]


def norm(prefix: str, o: int) -> Shapes:
    names = ("weight", "bias", "running_mean", "running_var")
    return {**{f"{prefix}.{name}": (o,) for name in names}, f"{prefix}.num_batches_tracked": ()}


def dense(prefix: str, kind: str, i: int, o: int, g: int = 1, rows: int = 6) -> Shapes:
    t = i if g <= 4 else 2 * i
    shapes = {
        f"weight_{kind}_origin": (o, i // g, 3, 3),
        f"weight_{kind}_avg_conv": (o, i // g, 1, 1),
        f"weight_{kind}_pfir_conv": (o, i // g, 1, 1),
        f"weight_{kind}_1x1_kxk_idconv1": (t, i // g, 1, 1),
        f"weight_{kind}_1x1_kxk_conv2": (o, t // g, 3, 3),
        f"weight_{kind}_gconv_dw": (8 * i, 1, 3, 3),
        f"weight_{kind}_gconv_pw": (o, 8 * i // g, 1, 1),
        "vector": (rows, o),
        "id_tensor": (t, i // g, 1, 1),
        f"weight_{kind}_prior": (o, 3, 3),
        f"weight_{kind}_avg_avg": (3, 3),
    }
    if kind == "orepa":
        shapes["weight_orepa_1x1"] = (o, i // g, 1, 1)
    return {f"{prefix}.{key}": shape for key, shape in shapes.items()}


def rep1x1(prefix: str, i: int, o: int) -> Shapes:
    first, second = ((i, i), (o, i)) if o > i else ((o, i), (o, o))
    shapes = {
        "weight_or1x1_origin": (o, i, 1, 1),
        "weight_or1x1_l2i_conv1": (*first, 1, 1),
        "weight_or1x1_l2i_conv2": (*second, 1, 1),
        "vector": (2, o),
    }
    return {**{f"{prefix}.{key}": shape for key, shape in shapes.items()}, **norm(f"{prefix}.bn", o)}


def resnet_shapes(depth: int, width: int, groups: int, base: int) -> Shapes:
    shapes: Shapes = {}
    for stage in range(3):
        shapes |= dense(f"stage0.conv1.weight{stage}", "orepa", 3 if stage == 0 else width, width)
    shapes |= norm("stage0.conv1.bn", width)
    i, expansion = width, 4 if depth >= 50 else 1
    for stage, blocks in enumerate(DEPTHS[depth], 1):
        planes = width * 2 ** (stage - 1)
        inner, o = planes * base // 64, planes * expansion
        for j in range(blocks):
            at = f"stage{stage}.{j}"
            if expansion == 1:
                convs = [("conv1", i, planes), ("conv2", planes, planes)]
            else:
                shapes |= rep1x1(f"{at}.conv1", i, inner) | rep1x1(f"{at}.conv3", inner, o)
                convs = [("conv2", inner, inner)]
            for name, a, b in convs:
                shapes |= dense(f"{at}.{name}", "orepa", a, b, groups) | norm(f"{at}.{name}.bn", b)
            if j == 0 and i != o:
                if expansion == 1:
                    shapes |= {f"{at}.shortcut.conv.weight": (o, i, 1, 1), **norm(f"{at}.shortcut.bn", o)}
                else:
                    shapes |= rep1x1(f"{at}.shortcut", i, o)
            i = o
    return shapes | {"linear.weight": (1000, i), "linear.bias": (1000,)}


def repvgg_shapes(widths: tuple[int, ...]) -> Shapes:
    shapes, i = {}, 3
    for stage, (o, blocks) in enumerate(zip(widths, (1, 2, 4, 14, 1), strict=True)):
        for j in range(blocks):
            at = "stage0" if stage == 0 else f"stage{stage}.{j}"
            # With an identity, `vector` has a row that is never written.
            shapes |= dense(f"{at}.rbr_dense", "rbr", i, o, rows=6 if j else 5) | norm(f"{at}.rbr_dense.bn", o)
            shapes |= {f"{at}.rbr_1x1.conv.weight": (o, i, 1, 1), **norm(f"{at}.rbr_1x1.bn", o)}
            if j:
                shapes |= norm(f"{at}.rbr_identity", o)
            i = o
    return shapes | {"linear.weight": (1000, i), "linear.bias": (1000,)}


def pair(prefix: str, i: int, o: int, k: int, g: int = 1) -> Shapes:
    return {f"{prefix}.conv.weight": (o, i // g, k, k), **norm(f"{prefix}.bn", o)}


def squeeze_excite(prefix: str, o: int, names: tuple[str, str]) -> Shapes:
    (down, up), low = names, o // 16
    shapes = {
        f"{down}.weight": (low, o, 1, 1),
        f"{down}.bias": (low,),
        f"{up}.weight": (o, low, 1, 1),
        f"{up}.bias": (o,),
    }
    return {f"{prefix}.se.{key}": shape for key, shape in shapes.items()}


def original_repvgg_shapes(depths: tuple[int, ...], widths: tuple[int, ...], groups: int, se: bool) -> Shapes:
    shapes: Shapes = {}
    i, index = 3, 0
    for stage, (o, blocks) in enumerate(zip(widths, (1, *depths), strict=True)):
        for j in range(blocks):
            at, g = "stage0" if stage == 0 else f"stage{stage}.{j}", groups if index and index % 2 == 0 else 1
            shapes |= pair(f"{at}.rbr_dense", i, o, 3, g) | pair(f"{at}.rbr_1x1", i, o, 1, g)
            shapes |= norm(f"{at}.rbr_identity", o) if j and stage else {}
            shapes |= squeeze_excite(at, o, ("down", "up")) if se else {}
            i, index = o, index + 1
    return shapes | {"linear.weight": (1000, i), "linear.bias": (1000,)}


def mobileone_shapes(widths: tuple[int, ...], branches: int, se: bool) -> Shapes:
    shapes = pair("stage0.rbr_conv.0", 3, widths[0], 3) | pair("stage0.rbr_scale", 3, widths[0], 1)
    i = widths[0]
    for stage, (o, blocks) in enumerate(zip(widths[1:], (2, 8, 10, 1), strict=True), 1):
        for j in range(2 * blocks):  # a depthwise block, then a pointwise one
            at, k, g, out = f"stage{stage}.{j}", *((1, 1, o) if j % 2 else (3, i, i))
            for n in range(branches):
                shapes |= pair(f"{at}.rbr_conv.{n}", i, out, k, g)
            shapes |= {} if j % 2 else pair(f"{at}.rbr_scale", i, i, 1, g)
            shapes |= norm(f"{at}.rbr_skip", i) if out == i and j else {}
            if se and j >= {3: 10, 4: 0}.get(stage, 99):
                shapes |= squeeze_excite(at, out, ("reduce", "expand"))
            i = out
    return shapes | {"linear.weight": (1000, i), "linear.bias": (1000,)}


def original_shapes(arch: str) -> Shapes:
    if arch in MOBILEONES:
        return mobileone_shapes(*MOBILEONES[arch])
    return original_repvgg_shapes(*ORIGINAL_REPVGGS[arch], arch.endswith("se"))


def dbb_resnet_shapes(depth: int) -> Shapes:
    """A ResNet whose 3x3 layers are Diverse Branch Blocks; the others are convolutions with their norm."""
    shapes, i, expansion = pair("stage0.conv1", 3, 64, 7), 64, 4 if depth >= 50 else 1
    for stage, blocks in enumerate(DEPTHS[depth], 1):
        planes = 64 * 2 ** (stage - 1)
        o = planes * expansion
        for j in range(blocks):
            at = f"stage{stage}.{j}"
            dense = [("conv1", i, planes), ("conv2", planes, o)] if expansion == 1 else [("conv2", planes, planes)]
            for name, a, b in dense:
                shapes |= pair(f"{at}.{name}.dbb_origin", a, b, 3) | pair(f"{at}.{name}.dbb_1x1", a, b, 1)
                shapes |= {f"{at}.{name}.dbb_avg.conv.weight": (b, a, 1, 1), **norm(f"{at}.{name}.dbb_avg.bn.bn", b)}
                shapes |= {
                    **norm(f"{at}.{name}.dbb_avg.avgbn", b),
                    f"{at}.{name}.dbb_1x1_kxk.idconv1.weight": (a, a, 1, 1),
                }
                shapes |= {f"{at}.{name}.dbb_1x1_kxk.conv2.weight": (b, a, 3, 3)}
                shapes |= norm(f"{at}.{name}.dbb_1x1_kxk.bn1.bn", a) | norm(f"{at}.{name}.dbb_1x1_kxk.bn2", b)
            if expansion == 4:
                shapes |= pair(f"{at}.conv1", i, planes, 1) | pair(f"{at}.conv3", planes, o, 1)
            shapes |= pair(f"{at}.shortcut", i, o, 1) if j == 0 and (i != o or stage > 1) else {}
            i = o
    return shapes | {"linear.weight": (1000, i), "linear.bias": (1000,)}


def shapes_of(arch: str) -> Shapes:
    return resnet_shapes(*RESNETS[arch]) if arch in RESNETS else repvgg_shapes(REPVGGS[arch])


def on_meta(arch: str) -> dict[str, Tensor]:
    return zeros_on_meta(shapes_of(arch))


def zeros_on_meta(shapes: Shapes) -> dict[str, Tensor]:
    return {key: torch.zeros(shape, device="meta") for key, shape in shapes.items()}


def synthetic(arch: str, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    return random_values(shapes_of(arch), dtype)


def random_values(shapes: Shapes, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Random values at which a network of this depth keeps the size of its activations."""
    state = {}
    for key, shape in shapes.items():
        name = key.rpartition(".")[2]
        if name == "num_batches_tracked":
            state[key] = torch.tensor(3)
        elif name in ("running_var", "vector") or (name == "weight" and len(shape) == 1):
            state[key] = torch.rand(shape, dtype=dtype) * 0.8 + 0.4
        elif name in (
            "id_tensor",
            "weight_orepa_prior",
            "weight_rbr_prior",
            "weight_orepa_avg_avg",
            "weight_rbr_avg_avg",
        ):
            state[key] = torch.full(shape, torch.nan, dtype=dtype)  # derived: nobody may read them
        else:
            fan_in = max(1, shape[1] * shape[-1] ** 2 if len(shape) == 4 else shape[-1])
            state[key] = torch.randn(shape, dtype=dtype) * (0.5 / fan_in**0.5)
        if name == "vector" and shape[0] == 6 and "rbr_dense" in key:
            state[key][5] = torch.nan
    return state
