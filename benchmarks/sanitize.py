"""Small squeezes, forward and backward, by every backend that runs here: what compute-sanitizer watches.

    compute-sanitizer --tool memcheck python benchmarks/sanitize.py

Odd channel counts leave partial tiles, where a kernel would reach over the edge. Each result is compared with float64.
"""

from __future__ import annotations

import torch

from orepa import OREPAConv
from orepa_kernels.dispatch import names_on

#: out, in, kernel, groups
SHAPES = [(17, 13, 3, 1), (33, 20, 1, 1), (24, 12, 3, 6), (9, 5, 5, 1), (8, 3, 7, 1)]


def check(backend: str, device: str, out: int, channels: int, size: int, groups: int) -> float:
    """Relative error of kernel and gradients, the larger."""
    torch.manual_seed(0)
    conv = OREPAConv(channels, out, size, groups=groups, bias=False, backend=backend, device=device)
    exact = OREPAConv(channels, out, size, groups=groups, bias=False, backend="reference", device=device).double()
    with torch.no_grad():
        for ours, theirs in zip(conv.parameters(), exact.parameters(), strict=True):
            ours.normal_(std=0.3)
            theirs.copy_(ours)
    upstream = torch.randn(conv.plan.shape, device=device)
    worst = 0.0
    results = []
    for module in (conv, exact):
        kernel = module.squeeze()
        kernel.backward(upstream.to(kernel.dtype))
        results.append([kernel.detach(), *(p.grad for p in module.parameters() if p.grad is not None)])
    for got, truth in zip(*results, strict=True):
        worst = max(worst, float((got.double() - truth.double()).norm() / truth.double().norm().clamp_min(1e-30)))
    return worst


def main() -> int:
    """Run all shapes on all backends; 1 where one is wrong."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_float32_matmul_precision("highest")
    wrong = 0
    for backend in names_on(torch.device(device)):
        for shape in SHAPES:
            error = check(backend, device, *shape)
            wrong += not error < 2e-5
            print(f"{backend} on {device} {shape}: {error:.1e}")
    return int(wrong > 0)


if __name__ == "__main__":
    raise SystemExit(main())
