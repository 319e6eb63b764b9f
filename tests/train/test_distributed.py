"""Two processes on gloo: DDP and FSDP2 train an OREPA network as one process with the whole batch does."""

import os
import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

import orepa

STEPS = 3


def build():
    torch.manual_seed(3)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 7, padding=3), nn.GroupNorm(2, 8), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.GroupNorm(1, 4)
    )
    return orepa.prepare(net).double()


def batches():
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(4, 3, 8, 8, generator=generator, dtype=torch.float64) for _ in range(STEPS)]


def train(model, select):
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    for batch in batches():
        optimizer.zero_grad()
        model(select(batch)).pow(2).mean().backward()
        optimizer.step()


def worker(rank, port, kind, queue):
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    try:
        torch.set_num_threads(1)
        model = build()

        def select(batch):
            return batch[2 * rank : 2 * rank + 2]

        if kind == "ddp":
            train(nn.parallel.DistributedDataParallel(model), select)
            state = dict(model.named_parameters())
        else:
            from torch.distributed.device_mesh import init_device_mesh
            from torch.distributed.fsdp import fully_shard

            mesh = init_device_mesh("cpu", (2,))
            for module in model:
                if isinstance(module, orepa.OREPAConv):
                    fully_shard(module, mesh=mesh)
            fully_shard(model, mesh=mesh)
            train(model, select)
            state = {name: value.full_tensor() for name, value in model.named_parameters()}
        if rank == 0:
            queue.put({name: value.detach().numpy() for name, value in state.items()})
            queue.join()
        dist.barrier()  # a rank that leaves early takes gloo's threads down with it
    finally:
        dist.destroy_process_group()
    # Threads of gloo's that outlive the group abort the interpreter's exit now and then (FSDP2 on a CPU, torch 2.13).
    os._exit(0)


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_two_processes_train_like_one(kind):
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("this torch has no gloo")
    context = mp.get_context("spawn")
    queue = context.JoinableQueue()
    port = free_port()
    processes = [context.Process(target=worker, args=(rank, port, kind, queue)) for rank in range(2)]
    for process in processes:
        process.start()
    try:
        state = queue.get(timeout=120)
        queue.task_done()
    finally:
        for process in processes:
            process.join(timeout=30)
            if process.is_alive():
                process.kill()
    assert [process.exitcode for process in processes] == [0, 0]

    alone, start = build(), dict(build().named_parameters())
    train(alone, lambda batch: batch)
    for name, value in alone.named_parameters():
        got = torch.from_numpy(state[name])
        assert not torch.equal(got, start[name]), f"{name} was not trained"
        torch.testing.assert_close(got, value, rtol=1e-10, atol=1e-12, msg=name)
