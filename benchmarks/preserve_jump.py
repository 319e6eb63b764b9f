"""Measure how far `orepa.prepare(preserve=True)` of trained blocks is from the same function in train mode, and print a table.

    python benchmarks/preserve_jump.py

Nets of five blocks, written as their users write them, learn scikit-learn's digits for 12 epochs. Then each is prepared. In
eval mode the function stays; in train mode one norm stands where each branch had one. The table has the cross-entropy of the
first batch of training, before any step.
"""

from __future__ import annotations

import argparse
import copy

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

import orepa


def _conv_bn(i: int, o: int, k: int, stride: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(i, o, k, stride, k // 2, bias=False), nn.BatchNorm2d(o))


class Branches(nn.Module):
    """Several kxk branches, a 1x1 and an identity, each with a norm; or one norm after the sum."""

    def __init__(self, i: int, o: int, stride: int, dense: int, norm_after: bool = False) -> None:
        super().__init__()
        self.branches = nn.ModuleList([_conv_bn(i, o, 3, stride) for _ in range(dense)] + [_conv_bn(i, o, 1, stride)])
        if i == o and stride == 1:
            self.branches.append(nn.BatchNorm2d(i))
        self.norm = nn.BatchNorm2d(o) if norm_after else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(sum(branch(x) for branch in self.branches)).relu()


FORMS = {
    "RepVGG": {"dense": 1},
    "MobileOne": {"dense": 4},
    "RepViT (a norm after the sum)": {"dense": 1, "norm_after": True},
}


def _net(**form: int) -> nn.Module:
    widths = [(1, 16, 1), (16, 16, 1), (16, 32, 2), (32, 32, 1), (32, 32, 1)]
    blocks = [Branches(*width, **form) for width in widths]
    return nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    seeds = parser.parse_args().seeds
    digits = load_digits()
    images = F.interpolate(torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16, size=16, mode="bilinear")
    labels = torch.tensor(digits.target)
    print("| blocks | seed | eval | train, as it comes | train, estimated | train, example_inputs |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    for name, form in FORMS.items():
        for seed in range(seeds):
            torch.manual_seed(seed)
            order = torch.randperm(len(images))
            x, y, model = images[order], labels[order], _net(**form)
            optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9, weight_decay=1e-4)
            for _ in range(12):
                for first in range(0, 1400, 64):
                    optimizer.zero_grad()
                    F.cross_entropy(model(x[first : first + 64]), y[first : first + 64]).backward()
                    optimizer.step()
            forms = {
                "eval": copy.deepcopy(model).eval(),
                "as it comes": copy.deepcopy(model).train(),
                "estimated": orepa.prepare(model, preserve=True).train(),
                "measured": orepa.prepare(model, preserve=True, example_inputs=x[64:512]).train(),
            }
            with torch.no_grad():
                losses = [float(F.cross_entropy(form(x[:64]), y[:64])) for form in forms.values()]
            print(f"| {name} | {seed} | " + " | ".join(f"{loss:.4f}" for loss in losses) + " |", flush=True)


if __name__ == "__main__":
    main()
