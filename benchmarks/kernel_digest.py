"""Print one hash of kernels and gradients over many seeded blocks, to compare two commits bit by bit.

    python benchmarks/kernel_digest.py [--backend cpu] [--blocks 300]

Run it in both checkouts on one machine, with the same torch and threads. Equal lines mean equal bits.
"""

from __future__ import annotations

import argparse
import hashlib
import random

import torch

import orepa
import orepa_kernels

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def block_and_operands(draw: random.Random) -> tuple[orepa_kernels.Block, list[torch.Tensor]]:
    """A random block of the catalogue, with operands of random values, dtype and memory format."""
    groups = draw.choice([1, 1, 1, 2, 4])
    out, inner = groups * draw.randint(1, 24), groups * draw.randint(1, 24)
    topology = draw.choice(["orepa", "repvgg_dense", "dbb", "acnet", "deep_stem", "rep1x1", "mobileone"])
    size = {"deep_stem": 7, "rep1x1": 1}.get(topology, draw.choice([3, 3, 3, 5]))
    conv = orepa.OREPAConv(inner, out, size, groups=groups, bias=False, topology=topology)
    dtype = draw.choice(DTYPES)
    memory_format = draw.choice([torch.contiguous_format, torch.channels_last])
    operands = []
    for operand in conv.operands():
        values = torch.randn(operand.shape, dtype=torch.float32).to(dtype)
        operands.append(values.to(memory_format=memory_format) if values.dim() == 4 else values)
    return conv.plan, operands


def digest(backend: str, blocks: int) -> str:
    """SHA-256 of the kernels and gradients of ``blocks`` seeded blocks."""
    torch.manual_seed(0)
    draw, result = random.Random(0), hashlib.sha256()
    for _ in range(blocks):
        block, operands = block_and_operands(draw)
        leaves = [operand.requires_grad_() for operand in operands]
        memory_format = draw.choice([torch.contiguous_format, torch.channels_last])
        for _ in range(2):  # the first call prepares, the second runs what is prepared
            (kernel,) = orepa_kernels.squeeze([block], [leaves], memory_format=memory_format, backend=backend)
            upstream = torch.randn(kernel.shape).to(kernel.dtype).contiguous(memory_format=memory_format)
            gradients = torch.autograd.grad(kernel, leaves, upstream)
            for tensor in (kernel.detach(), *gradients):
                result.update(str((tuple(tensor.shape), tensor.stride(), tensor.dtype)).encode())
                result.update(tensor.reshape(-1).clone().view(torch.uint8).numpy().tobytes())
    return result.hexdigest()


def main() -> None:
    """Print the hash."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", default="cpu", help="which computes them (default: %(default)s)")
    parser.add_argument("--blocks", type=int, default=300, help="how many blocks (default: %(default)s)")
    arguments = parser.parse_args()
    print(f"{arguments.backend} {arguments.blocks} blocks {digest(arguments.backend, arguments.blocks)}")


if __name__ == "__main__":
    main()
