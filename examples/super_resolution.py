"""Train a small net for 2x super-resolution of ECB blocks, convert it, and export it for pictures of any size.

    python examples/super_resolution.py
    python examples/super_resolution.py --topology sesr --width 16 --steps 1000 --out sr.onnx

The net has no norms, as usual in this field, where re-parameterised blocks are a key method (ECBSR, SESR, SPAN). It adds
details to the bicubic enlargement. It is trained on crops of photographs that come with scikit-image, and tested on others.
"ecb" is registered as norm-free; for any other topology, `orepa.prepare` needs ``norm="any"`` to swap layers without a norm.

Needs: pip install "orepa-kernels[examples,export]"
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import orepa

try:
    from skimage import data
except ImportError as error:
    raise SystemExit(f"this example needs `pip install scikit-image` ({error})") from None

SCALE = 2
TRAINED_ON, TESTED_ON = ("astronaut", "chelsea", "rocket"), ("coffee",)


class Enlarger(nn.Module):
    """``[N, 3, H, W]`` to ``[N, 3, 2H, 2W]``: some convolutions at the small size, and pixels out of channels."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for index in range(depth):
            layers += [nn.Conv2d(width if index else 3, width, 3, padding=1), nn.PReLU(width)]
        self.body = nn.Sequential(*layers)
        self.tail = nn.Conv2d(width, 3 * SCALE**2, 3, padding=1)

    def forward(self, small: Tensor) -> Tensor:
        details = F.pixel_shuffle(self.tail(self.body(small)), SCALE)
        return details + F.interpolate(small, scale_factor=SCALE, mode="bicubic")


def pictures(names: tuple[str, ...]) -> list[Tensor]:
    """Return photographs ``[3, H, W]`` with values from 0 to 1 and even sides."""
    images = [torch.from_numpy(getattr(data, name)()).permute(2, 0, 1).float() / 255 for name in names]
    return [image[:, : image.shape[1] // SCALE * SCALE, : image.shape[2] // SCALE * SCALE] for image in images]


def shrink(images: Tensor) -> Tensor:
    """``[N, 3, 2H, 2W]`` to ``[N, 3, H, W]``, bicubic with antialiasing, as in the field's benchmarks."""
    return F.interpolate(images, scale_factor=1 / SCALE, mode="bicubic", antialias=True)


def crops(images: list[Tensor], count: int, size: int, generator: torch.Generator) -> Tensor:
    """Return random crops ``[N, 3, size, size]``."""
    found = []
    for _ in range(count):
        image = images[int(torch.randint(len(images), (), generator=generator))]
        top, left = (int(torch.randint(side - size, (), generator=generator)) for side in image.shape[1:])
        found.append(image[:, top : top + size, left : left + size])
    return torch.stack(found)


def psnr(output: Tensor, target: Tensor) -> float:
    """Return the peak signal-to-noise ratio in dB, without the outermost pixels."""
    inner = (..., slice(SCALE, -SCALE), slice(SCALE, -SCALE))
    return -10 * math.log10(float(F.mse_loss(output.clamp(0, 1)[inner], target[inner])))


def train(model: nn.Module, images: list[Tensor], args: argparse.Namespace) -> None:
    """Train with Adam and a cosine schedule on random crops."""
    generator = torch.Generator().manual_seed(args.seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=args.lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.steps)
    for step in range(args.steps):
        target = crops(images, args.batch, args.crop, generator)
        loss = F.l1_loss(model(shrink(target)), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if (step + 1) % 100 == 0:
            print(f"step {step + 1:5}  L1 loss {loss.item():.4f}")


def export(model: nn.Module, out: Path, small: Tensor) -> float:
    """Write an ONNX file for pictures of any size; return the largest difference to the model on one of another size."""
    import onnxruntime

    batch, height, width = (torch.export.Dim(name) for name in ("batch", "height", "width"))
    example = small[..., :32, :40].expand(2, -1, -1, -1)
    shapes = ({0: batch, 2: height, 3: width},)
    torch.onnx.export(model, (example,), out, dynamo=True, dynamic_shapes=shapes, input_names=["small"], verbose=False)
    session = onnxruntime.InferenceSession(out, providers=["CPUExecutionProvider"])
    (got,) = session.run(None, {"small": small.numpy()})
    with torch.no_grad():
        return float((torch.from_numpy(got) - model(small)).abs().max())


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Train, convert, compare, export; return the measurements."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--topology", default="ecb", help="of every convolution (default: %(default)s)")
    parser.add_argument("--width", type=int, default=16, help="channels (default: %(default)s)")
    parser.add_argument("--depth", type=int, default=4, help="convolutions before the last one (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--crop", type=int, default=64, help="side of the large crops, in pixels")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="file for the exported net (.onnx)")
    args = parser.parse_args(argv)

    torch.manual_seed(args.seed)
    model = orepa.prepare(Enlarger(args.width, args.depth), args.topology)
    print(orepa.report(model))
    train(model, pictures(TRAINED_ON), args)

    (large,) = (image[None] for image in pictures(TESTED_ON))
    small = shrink(large)
    plain = orepa.convert(model.eval(), example_inputs=small)
    with torch.no_grad():
        before, after = psnr(model(small), large), psnr(plain(small), large)
    bicubic = psnr(F.interpolate(small, scale_factor=SCALE, mode="bicubic"), large)
    print(f"{TESTED_ON[0]}: bicubic {bicubic:.2f} dB, trained {before:.2f} dB, converted {after:.2f} dB")
    results = {"bicubic": bicubic, "before": before, "after": after, "swapped": len(orepa.report(model).swapped)}
    if args.out:
        results["export_difference"] = export(plain, args.out, small)
        print(f"{args.out}: largest difference {results['export_difference']:.1e}")
    return results


if __name__ == "__main__":
    main()
