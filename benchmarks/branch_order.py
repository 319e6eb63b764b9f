"""Measure the orders of a block, and fit the rates by which ``OREPAConv(order="auto")`` chooses among them.

    python benchmarks/branch_order.py [--images 8x64,8x128] [--dtype bfloat16] [--model resnet18] [--out FILE.json]

A case is forward and backward of one block on a batch of images: the stages of ResNet-18 as DBB blocks, and 1x1 blocks of
ResNet-50. Each is measured with its 1x1-kxk branch squeezed, with it on feature maps, in the order that ``auto`` chooses, and
without it (``rest``). What that takes less is what the branch costs. The rates of `orepa.modules.branch_order` are those that
fit these costs best. The goal is that ``auto`` takes at most 1.05 times as long as the better of the two orders. With
``--model``, whole training steps of a timm model follow, by order.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

import orepa
from orepa import OREPAConv
from orepa.bench.machine import OtherWork, environment
from orepa.bench.results import Results, Row
from orepa.bench.variants import in_order, on_3x3
from orepa.modules.branch_order import Rates, branch_work, squeeze_work
from orepa.timing import Task, function, interleaved, nothing
from orepa.topology import Topology

IMAGES = "8x64,8x128,8x224,128x32,2x512"
STAGES = [(64, 4), (128, 8), (256, 16), (512, 32)]  # channels, and how much smaller than the image feature maps are
ORDERS = ("squeeze", "branch", "auto")
REST = "rest"
#: operations per second: their overhead is known, and too small to be fitted
CALLS = 1e5
#: seconds: smaller costs are mostly noise
LEAST_COST = 2e-3


def cases(images: list[tuple[int, int]]) -> list[dict[str, Any]]:
    """Return the blocks of every stage and between the stages, for batches of images and their heights."""
    found = []
    for (batch, image), (channels, reduction) in itertools.product(images, STAGES):
        case = {"topology": "dbb", "out": channels, "in": channels, "k": 3, "stride": 1, "groups": 1, "batch": batch}
        case |= {"image": image, "size": image // reduction}
        found.append(case)
        if channels > 64:
            found.append({**case, "in": channels // 2, "stride": 2, "size": 2 * image // reduction})
        if channels > 128 and image < 128:
            pointwise = {**case, "topology": "rep1x1", "k": 1}
            found += [{**pointwise, "out": 4 * channels}, {**pointwise, "in": 4 * channels}]
    return found


def build(case: Mapping[str, Any]) -> dict[str, OREPAConv]:
    """Return a block in every order, and without the branch that is in question."""
    new = partial(OREPAConv, case["in"], case["out"], case["k"], case["stride"], case["k"] // 2)
    block = new(topology=case["topology"])
    assert block._split is not None
    others = Topology(**{name: branch for name, branch in block._lowered.topology if name != block._split.name})
    return {
        **{order: in_order(copy.deepcopy(block), order) for order in ORDERS},
        REST: new(topology=lambda _spec: others),
    }


def measure(case: dict[str, Any], dtype: torch.dtype, rounds: int, seconds: float) -> list[Row]:
    """Time one case; the orders are compared before they are timed."""
    blocks = build(case)
    x = torch.randn(case["batch"], case["in"], case["size"], case["size"], requires_grad=True)

    def forward(block: OREPAConv) -> torch.Tensor:
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            return block(x)

    y = forward(blocks["squeeze"])
    upstream, tolerance = torch.randn_like(y), 1e-3 if dtype == torch.float32 else 5e-2
    torch.testing.assert_close(forward(blocks["branch"]), y, rtol=tolerance, atol=tolerance)

    def step(block: OREPAConv) -> Task:
        wanted = [x, *block.parameters()]
        return function(lambda: torch.autograd.grad(forward(block), wanted, upstream))

    samples = interleaved({name: step(block) for name, block in blocks.items()}, rounds, seconds)
    rows = [Row(case, name, "both", processes=[values]) for name, values in samples.items()]
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        runs_branch = blocks["auto"]._tensors_to_split(x) is not None
    rows[ORDERS.index("auto")].facts["chosen"] = "branch" if runs_branch else "squeeze"
    return rows


def measure_model(name: str, batch: int, size: int, rounds: int, seconds: float) -> list[Row]:
    """Time training steps of a model: the plain one, DBB's blocks offline, and this package's blocks by order."""
    import timm

    plain = timm.create_model(name, num_classes=1000)
    online, dbb = orepa.prepare(plain), on_3x3("dbb", topology="dbb").build(plain)
    models = {"plain": plain, "dbb-offline": on_3x3("dbb", topology="dbb", offline=True).build(plain)}
    for order in ORDERS:
        models |= {
            f"orepa, {order}": in_order(copy.deepcopy(online), order),
            f"dbb, {order}": in_order(copy.deepcopy(dbb), order),
        }
    x, labels = torch.randn(batch, 3, size, size), torch.randint(0, 1000, (batch,))

    def step(model: Any) -> Task:
        optimizer = torch.optim.SGD(model.train().parameters(), lr=1e-4, momentum=0.9)

        def run(_: object) -> None:
            optimizer.zero_grad()
            F.cross_entropy(model(x), labels).backward()
            optimizer.step()

        return Task(nothing, run)

    samples = interleaved({name: step(model) for name, model in models.items()}, rounds, seconds)
    case = {"model": name, "batch": batch, "size": size}
    return [Row(case, provider, "step", processes=[values]) for provider, values in samples.items()]


def fastest(rows: list[Row]) -> dict[str, float]:
    """Return the least seconds by provider: other programs only ever add to them."""
    return {row.provider: min(row.seconds) for row in rows}


def fit(measured: list[list[Row]], itemsize: int) -> Rates:
    """Return the rates that fit the costs of a branch best: by robust least squares of logarithms."""
    from scipy.optimize import least_squares

    known = []
    for rows in measured:
        case, seconds = rows[0].case, fastest(rows)
        block = build(case)["branch"]
        assert block._split is not None
        shape = (case["batch"], case["in"], case["size"], case["size"])
        squeezed = squeeze_work(block._split)
        convolved = branch_work(block._split, shape, block.stride, block.dilation, block.borders, itemsize)
        for name, work in (("squeeze", squeezed), ("branch", convolved)):
            cost = seconds[name] - seconds[REST]
            if cost > LEAST_COST:
                known.append((name, work, cost))

    def errors(logarithms: Any) -> list[float]:
        rates = Rates(*np.exp(logarithms), CALLS)
        run = {"squeeze": rates.squeeze, "branch": rates.convolve}
        return [float(np.log(run[name](work) / cost)) for name, work, cost in known]

    found = least_squares(errors, np.log([3e10, 3e10, 1e10]), loss="soft_l1", f_scale=0.1)
    return Rates(*(float(f"{rate:.2g}") for rate in np.exp(found.x)), CALLS)


def show(rows: list[Row]) -> None:
    """Print a line: what was measured, and milliseconds by provider."""
    seconds = fastest(rows)
    case = " ".join(f"{name}={value}" for name, value in rows[0].case.items() if name not in ("groups", "image"))
    line = f"{case:62}" + "".join(f"  {name} {1e3 * value:.1f}" for name, value in seconds.items())
    if REST in seconds:
        chosen = rows[ORDERS.index("auto")].facts["chosen"]
        ratio = min(seconds["auto"], seconds[chosen]) / min(seconds["squeeze"], seconds["branch"])
        line += f"  auto is {chosen}, {max(ratio, 1):.2f} of the better"
    print(line)
    sys.stdout.flush()


def main() -> None:
    """Measure every case, print a table and the rates, and write JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", default=IMAGES, help="batches and heights (default: %(default)s)")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"], help="of the convolutions")
    parser.add_argument("--model", help="a timm model; default: blocks only")
    parser.add_argument("--rounds", type=int, default=60, help="samples per order, at most (default: %(default)s)")
    parser.add_argument(
        "--seconds", type=float, default=5, help="per case, 8 times that per model (default: %(default)s)"
    )
    parser.add_argument("--threads", type=int, default=1, help="default: %(default)s")
    parser.add_argument("--out", type=Path, help="write the results here, as JSON")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    images = [(int(batch), int(size)) for batch, size in (text.split("x") for text in arguments.images.split(","))]
    dtype = getattr(torch, arguments.dtype)
    results = Results("branch_order", environment(), {"dtype": arguments.dtype, "seconds": arguments.seconds})
    measured, others = [], OtherWork()
    with others:
        for case in cases(images):
            measured.append(measure(case, dtype, arguments.rounds, arguments.seconds))
            results.rows += measured[-1]
            show(measured[-1])
        results.settings["rates"] = fit(measured, dtype.itemsize)._asdict()
        print(results.settings["rates"])
        for batch, size in images if arguments.model else ():
            results.rows += measure_model(arguments.model, batch, size, arguments.rounds, 8 * arguments.seconds)
            show(results.rows[-2 - 2 * len(ORDERS) :])
    results.environment["busy_cores_of_others"] = others.cores
    results.complete = True
    if arguments.out:
        results.save(arguments.out)


if __name__ == "__main__":
    main()
