"""Lower bounds: the bare matrix products of a block, and the bare movement of its bytes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..timing import Task, nothing
from . import work as W
from .providers import Built, Provider
from .workload import Workload


class Gemms(Provider):
    """The matrix products alone, by the vendor's library, into memory that lies ready.

    Forward: one product per pair of composed layers, in the layout in which it is one. Backward: the two products of its
    gradients. float32, at the precision that ``torch.set_float32_matmul_precision`` allows.
    """

    name, floor = "gemms", True

    def why_not(self, work: Workload) -> str:
        return "" if W.products(work.plan) else "the block composes no layers, so it has no matrix product"

    def amount(self, work: Workload, mode: str) -> dict[str, int]:
        return {"flops": W.PASSES[mode] * sum(product.flops for product in W.products(work.plan))}

    def build(self, work: Workload) -> Built:
        forward: list[Callable[[], Any]] = []
        backward: list[Callable[[], Any]] = []
        for product in W.products(work.plan):
            a, b, c = (
                torch.randn(shape, device=work.case.device)
                for shape in (
                    (product.batch, product.m, product.k),
                    (product.batch, product.k, product.n),
                    (product.batch, product.m, product.n),
                )
            )
            if product.batch == 1:  # the plain product has less overhead than a batch of one
                a, b, c = a[0], b[0], c[0]
            da, db = torch.zeros_like(a), torch.zeros_like(b)
            forward.append(_product(a, b, c))
            backward += [_product(c, b.mT, da), _product(a.mT, c, db)]
        calls = {"forward": forward, "backward": backward, "both": forward + backward}
        return Built({mode: _task(calls[mode]) for mode in W.MODES})


class Copy(Provider):
    """A copy that moves as many bytes as the squeeze has to: half of them read, half of them written."""

    name, floor = "copy", True

    def amount(self, work: Workload, mode: str) -> dict[str, int]:
        return {"bytes": work.bytes(mode)}

    def build(self, work: Workload) -> Built:
        def copies(mode: str) -> list[Callable[[], Any]]:
            parts = ("forward", "backward") if mode == "both" else (mode,)
            return [_copy(work.bytes(part) // 2, work.case.device) for part in parts]

        return Built({mode: _task(copies(mode)) for mode in W.MODES})


def _product(a: Tensor, b: Tensor, out: Tensor) -> Callable[[], Any]:
    function = torch.mm if a.dim() == 2 else torch.bmm
    return lambda: function(a, b, out=out)


def _copy(size: int, device: str) -> Callable[[], Any]:
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    return lambda: target.copy_(source)


def _task(calls: list[Callable[[], Any]]) -> Task:
    def run(_: object) -> None:
        for call in calls:
            call()

    return Task(nothing, run)
