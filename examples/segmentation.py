"""Train PSPNet or DeepLabV3+ on an OREPA encoder, convert, and export the encoder.

    python examples/segmentation.py --model pspnet
    python examples/segmentation.py --model deeplabv3plus --encoder orepa_resnet18 --size 64

The networks are those of segmentation_models_pytorch, which takes any timm model as an encoder under the name "tu-...", those
of `orepa.models` included (paper, Table 5, which uses mmsegmentation). The images are generated, bright rectangles on noise
in place of Cityscapes: this shows how the pieces fit together, and that the conversion changes nothing, not how good the
network is.

The encoder is made of OREPA blocks, the decoder is plain, as in the paper. `--everywhere` swaps the decoder's convolutions as
well (`orepa.prepare`): those that a norm follows.

Needs: pip install "orepa-kernels[examples]"
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import orepa
import orepa.models  # registers orepa_resnet50 and the others with timm

try:
    import segmentation_models_pytorch as smp
except ImportError as error:
    raise SystemExit(f"this example needs `pip install segmentation-models-pytorch` ({error})") from None

CLASSES = 3  # background, red and blue rectangles
NETWORKS = {"pspnet": smp.PSPNet, "deeplabv3plus": smp.DeepLabV3Plus}


def build(model: str, encoder: str, weights: str | None = None, everywhere: bool = False) -> nn.Module:
    """Build a segmentation network.

    Args:
        model: ``"pspnet"`` or ``"deeplabv3plus"``.
        encoder: a timm name.
        weights: a checkpoint of the encoder, the authors' included.
        everywhere: make the decoder of OREPA blocks, too.
    """
    pretrained = {} if weights is None else {"pretrained_cfg_overlay": {"file": weights}}
    network = NETWORKS[model](
        f"tu-{encoder}",
        encoder_weights=None if weights is None else True,
        classes=CLASSES,
        **pretrained,
    )
    if everywhere:
        network.decoder = orepa.prepare(network.decoder)
    return network


def make_images(count: int, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw noise with two bright rectangles each: images ``[N, 3, S, S]``, classes ``[N, S, S]``."""
    images = 0.2 * torch.rand(count, 3, size, size, generator=generator)
    classes = torch.zeros(count, size, size, dtype=torch.long)
    for image, target in zip(images, classes, strict=True):
        for label in (1, 2):
            height, width = torch.randint(size // 3, size // 2, (2,), generator=generator).tolist()
            top = int(torch.randint(size - height, (), generator=generator))
            left = int(torch.randint(size - width, (), generator=generator))
            image[2 * (label - 1), top : top + height, left : left + width] += 0.8
            target[top : top + height, left : left + width] = label
    return images, classes


def train(model: nn.Module, images: Tensor, classes: Tensor, args: argparse.Namespace) -> list[float]:
    """Run some steps of SGD on one batch; return the loss of each."""
    groups = orepa.parameter_groups(model, args.lr, stem_lr_scale=args.stem_lr_scale)
    optimizer = torch.optim.SGD(groups, momentum=0.9)
    model.train()
    losses = []
    for step in range(args.steps):
        loss = F.cross_entropy(model(images), classes)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        print(f"step {step + 1:3}  loss {losses[-1]:.4f}")
    return losses


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Train, convert, compare, export; return the measurements."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", choices=tuple(NETWORKS), default="pspnet")
    parser.add_argument("--encoder", default="orepa_resnet50", help="a name of `orepa models` (ResNets)")
    parser.add_argument("--weights", help="checkpoint of the encoder; those of the authors fit")
    parser.add_argument("--everywhere", action="store_true", help="OREPA blocks in the decoder, too")
    parser.add_argument("--size", type=int, default=128, help="side of the images, in pixels")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--lr", type=float, default=0.01)
    parser.add_argument("--stem-lr-scale", type=float, default=1.0, help="of the deep stem; tune it with --weights")
    parser.add_argument("--out", help="file for the exported encoder (.pt2)")
    args = parser.parse_args(argv)

    torch.manual_seed(0)
    images, classes = make_images(args.batch, args.size, torch.Generator().manual_seed(0))
    model = build(args.model, args.encoder, args.weights, args.everywhere)
    losses = train(model, images, classes, args)

    model.eval()
    plain = orepa.convert(model, example_inputs=images)  # checks every layer and the output, folds the norms
    print(orepa.report(plain))
    with torch.no_grad():
        changed = int((plain(images).argmax(1) != model(images).argmax(1)).sum())
    print(f"{changed} of {classes.numel()} pixels changed their class in the conversion")

    exported = torch.export.export(plain.encoder, (images,))
    with torch.no_grad():
        outputs = zip(plain.encoder(images), exported.module()(images), strict=True)
        difference = max(float((new - old).abs().max()) for old, new in outputs)
    print(f"exported encoder: largest difference {difference:.1e}")
    if args.out:
        torch.export.save(exported, args.out)
    return {
        "first": losses[0],
        "last": losses[-1],
        "error": orepa.report(plain).error or 0.0,
        "changed": changed,
        "export_difference": difference,
    }


if __name__ == "__main__":
    main()
