"""Train Faster R-CNN or RetinaNet on an OREPA backbone, convert, and export the backbone.

    python examples/detection.py --model fasterrcnn
    python examples/detection.py --model retinanet --backbone orepa_resnet18 --size 64

The backbone is a timm model of `orepa.models` with a feature pyramid, the detector torchvision's own (paper, Table 5, which
uses mmdetection). The images are generated, bright rectangles on noise in place of COCO: this shows how the pieces fit
together, and that the conversion changes nothing, not how good the detector is.

OREPA needs the batch norms of the backbone. They are trained here, on a few small images at a time. With pre-trained weights
and two large images per GPU, put the norms into eval mode for the training, or use `torch.nn.SyncBatchNorm`: `orepa.convert`
folds either.

Needs: pip install "orepa-kernels[examples]"
"""

from __future__ import annotations

import argparse
from collections import OrderedDict

import timm
import torch
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN, RetinaNet
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool, LastLevelP6P7

import orepa
import orepa.models  # registers orepa_resnet50 and the others with timm

CLASSES = 2  # red and blue rectangles


class PyramidBackbone(nn.Module):
    """A timm model that returns feature maps, with a feature pyramid on top, as torchvision's detectors need it.

    Args:
        body: made with ``features_only=True``.
        extra: what adds the coarsest levels.
        out_channels: of every level.
    """

    def __init__(self, body: nn.Module, extra: nn.Module, out_channels: int = 256) -> None:
        super().__init__()
        self.body = body
        self.fpn = FeaturePyramidNetwork(body.feature_info.channels(), out_channels, extra_blocks=extra)
        self.out_channels = out_channels

    def forward(self, images: Tensor) -> OrderedDict[str, Tensor]:
        """``[N, 3, H, W]`` to one ``[N, C, H / stride, W / stride]`` per level."""
        return self.fpn(OrderedDict((str(level), features) for level, features in enumerate(self.body(images))))


def build(model: str, backbone: str, size: int, weights: str | None = None) -> nn.Module:
    """Build a detector for images of ``size`` pixels.

    Args:
        model: ``"fasterrcnn"`` or ``"retinanet"``.
        backbone: a timm name.
        size: torchvision scales images to 800 pixels otherwise.
        weights: a checkpoint of the backbone, the authors' included.
    """
    levels = {"fasterrcnn": (1, 2, 3, 4), "retinanet": (2, 3, 4)}[model]
    pretrained = {} if weights is None else {"pretrained": True, "pretrained_cfg_overlay": {"file": weights}}
    body = timm.create_model(backbone, features_only=True, out_indices=levels, **pretrained)
    options = {"num_classes": 1 + CLASSES, "min_size": size, "max_size": size}
    # A few steps make no confident detector: without a threshold there is something to compare.
    if model == "retinanet":
        options |= {"score_thresh": 0.0, "detections_per_img": 10}
        return RetinaNet(PyramidBackbone(body, LastLevelP6P7(256, 256)), **options)
    options |= {"box_score_thresh": 0.0, "box_detections_per_img": 10}
    # Small images with few objects need fewer boxes than COCO's, for which the default is 512.
    return FasterRCNN(PyramidBackbone(body, LastLevelMaxPool()), box_batch_size_per_image=64, **options)


def make_images(count: int, size: int, generator: torch.Generator) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """Draw noise with two bright rectangles each; targets are boxes ``[2, 4]`` in pixels and labels ``[2]`` from 1."""
    images, targets = [], []
    for _ in range(count):
        image = 0.2 * torch.rand(3, size, size, generator=generator)
        sides = torch.randint(size // 3, size // 2, (2, 2), generator=generator)
        corners = (torch.rand(2, 2, generator=generator) * (size - sides)).long()
        boxes = torch.cat([corners, corners + sides], 1)
        labels = torch.randint(1, 1 + CLASSES, (2,), generator=generator)
        for (left, top, right, bottom), label in zip(boxes.tolist(), labels.tolist(), strict=True):
            image[:, top:bottom, left:right] *= 0.5
            image[2 * (label - 1), top:bottom, left:right] += 0.8
        images.append(image)
        targets.append({"boxes": boxes.float(), "labels": labels})
    return images, targets


def train(
    model: nn.Module, images: list[Tensor], targets: list[dict[str, Tensor]], args: argparse.Namespace
) -> list[float]:
    """Run some steps of SGD on one batch; return the loss of each."""
    groups = orepa.parameter_groups(model, args.lr, stem_lr_scale=args.stem_lr_scale)
    optimizer = torch.optim.SGD(groups, momentum=0.9)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.5  # the usual 0.1 would leave the running averages behind after so few steps
    model.train()
    losses = []
    for step in range(args.steps):
        parts = model(images, targets)
        loss = sum(parts.values())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 10)
        optimizer.step()
        losses.append(loss.item())
        print(f"step {step + 1:3}  loss {losses[-1]:.4f}  " + "  ".join(f"{k} {v:.4f}" for k, v in parts.items()))
    return losses


def count_equal(expected: list[dict[str, Tensor]], got: list[dict[str, Tensor]]) -> tuple[int, int]:
    """Count the detections that have an equal in the other list, and all detections.

    Scores are equal to 0.001, boxes to 0.01 pixels. Their order may differ: rounding decides between equal scores.
    """
    equal = 0
    for a, b in zip(expected, got, strict=True):
        same = (a["labels"][:, None] == b["labels"]) & ((a["scores"][:, None] - b["scores"]).abs() < 1e-3)
        same &= torch.cdist(a["boxes"], b["boxes"], p=torch.inf) < 1e-2
        equal += int(same.any(1).sum())
    return equal, max(sum(len(d["labels"]) for d in detections) for detections in (expected, got))


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Train, convert, compare, export; return the measurements."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", choices=("fasterrcnn", "retinanet"), default="fasterrcnn")
    parser.add_argument("--backbone", default="orepa_resnet50", help="a name of `orepa models` (ResNets)")
    parser.add_argument("--weights", help="checkpoint of the backbone; those of the authors fit")
    parser.add_argument("--size", type=int, default=128, help="side of the images, in pixels")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--lr", type=float, default=0.01)
    parser.add_argument("--stem-lr-scale", type=float, default=1.0, help="of the deep stem; tune it with --weights")
    parser.add_argument("--out", help="file for the exported backbone (.pt2)")
    args = parser.parse_args(argv)

    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    images, targets = make_images(args.batch, args.size, generator)
    model = build(args.model, args.backbone, args.size, args.weights)
    losses = train(model, images, targets, args)

    model.eval()
    plain = orepa.convert(model)  # every layer is checked; the norms of the backbone are folded
    print(orepa.report(plain))
    x = torch.stack(images)
    with torch.no_grad():
        before, after = model.backbone(x), plain.backbone(x)
        error = max(float((after[level] - before[level]).norm() / before[level].norm()) for level in before)
        equal, total = count_equal(model(images), plain(images))
    print(f"feature pyramid: relative error {error:.1e} after the conversion; {equal} of {total} detections are equal")

    exported = torch.export.export(plain.backbone, (x,))
    with torch.no_grad():
        loaded = exported.module()(x)
        difference = max(float((loaded[level] - after[level]).abs().max()) for level in after)
    print(f"exported backbone: largest difference {difference:.1e}")
    if args.out:
        torch.export.save(exported, args.out)
    return {
        "first": losses[0],
        "last": losses[-1],
        "error": error,
        "equal": equal,
        "total": total,
        "export_difference": difference,
    }


if __name__ == "__main__":
    main()
