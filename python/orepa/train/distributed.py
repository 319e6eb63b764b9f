"""Lightning Fabric for the devices of a run, FSDP2, and state dicts that do not depend on the number of processes."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric import Fabric
from lightning.fabric.loggers import TensorBoardLogger
from lightning.fabric.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.checkpoint import state_dict as dcp
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.optim import Optimizer

from ..errors import UserError, reason
from .config import Config, Request

SYNC_BN_ACCELERATORS = ("cuda",)
_CONTAINERS = (nn.Sequential, nn.ModuleList)


def make_fabric(config: Config, request: Request, events: Path, step: int) -> Fabric:
    """Return Lightning Fabric, not yet launched, with TensorBoard's curves in ``events`` that continue at ``step``.

    Raises:
        UserError: the devices do not exist, or do not support what is asked of them.
    """
    accelerator, precision = request.accelerator, config.precision
    if accelerator == "auto":
        accelerator = "cuda" if torch.cuda.is_available() else "cpu"
    devices, num_nodes = _processes(request.devices, request.num_nodes)
    processes = devices * num_nodes
    if accelerator == "cpu" and precision == "16-mixed":
        raise UserError("--precision 16-mixed needs a GPU; on a CPU take bf16-mixed")
    if config.sync_bn and processes > 1 and accelerator not in SYNC_BN_ACCELERATORS:
        raise UserError("--sync-bn with several processes needs GPUs: torch.nn.SyncBatchNorm does not run on CPUs")
    strategy: Any = "ddp" if processes > 1 and request.strategy == "auto" else request.strategy
    if strategy == "fsdp2":
        if config.ema is not None:
            raise UserError("--ema keeps a whole copy of the model, but fsdp2 shards it: take --strategy ddp")
        if precision not in ("32-true", "bf16-mixed"):
            raise UserError(f"--strategy fsdp2 goes with --precision 32-true or bf16-mixed, got {precision}")
        strategy = ModelParallelStrategy(shard, data_parallel_size=processes, tensor_parallel_size=1)
    settings: dict[str, Any] = {"accelerator": accelerator, "devices": devices, "num_nodes": num_nodes}
    logger = TensorBoardLogger(root_dir=events.parent, name=events.name, version="", purge_step=step or None)
    try:
        return Fabric(strategy=strategy, precision=precision, loggers=logger, **settings)  # type: ignore[arg-type]
    except Exception as error:  # Lightning raises another type for each kind of missing device
        raise UserError(f"cannot use --accelerator {accelerator} --devices {devices}: {reason(error)}") from error


def world_size(devices: int | None, num_nodes: int | None) -> int:
    """Return the number of processes that `make_fabric` will have; raise a `UserError` if torchrun runs another number."""
    return math.prod(_processes(devices, num_nodes))


def _processes(devices: int | None, num_nodes: int | None) -> tuple[int, int]:
    """Return devices per node and nodes: those of torchrun where it has started this process."""
    if not (dist.is_available() and dist.is_torchelastic_launched()):
        return devices or 1, num_nodes or 1
    local, total = int(os.environ["LOCAL_WORLD_SIZE"]), int(os.environ["WORLD_SIZE"])
    for flag, value, started in (("--devices", devices, local), ("--num-nodes", num_nodes, total // local)):
        if value not in (None, started):
            raise UserError(f"{flag} {value} contradicts torchrun, which has started {started}: leave the option away")
    return local, total // local


def broadcast_buffers(model: nn.Module) -> None:
    """Copy the running statistics of the first process to all others, so that all validate the same model."""
    if dist.is_available() and dist.is_initialized():
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)


def shard(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """Shard the parameters over all processes, in place: every block by itself, then what is left.

    A block is a member of an `nn.Sequential` or `nn.ModuleList` that is no such container itself; nested blocks do not count.
    """
    for module in (*_blocks(model), model):
        fully_shard(module, mesh=mesh["data_parallel"])
    return model


def _blocks(module: nn.Module) -> list[nn.Module]:
    blocks: list[nn.Module] = []
    for child in module.children():
        is_block = isinstance(module, _CONTAINERS) and not isinstance(child, _CONTAINERS)
        blocks += [child] if is_block else _blocks(child)
    return [block for block in blocks if any(True for _ in block.parameters())]


def full_state(model: nn.Module, optimizer: Optimizer) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return whole tensors of model and optimizer on the CPU, in the first process. A collective: all have to call it."""
    options = dcp.StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights = dcp.get_model_state_dict(model, options=options)  # first: it reshards what validation has left unsharded
    # torch would fill an empty optimizer state by a step with zero gradients, which changes the first momentum.
    return weights, dcp.get_optimizer_state_dict(model, optimizer, options=options) if optimizer.state else {}


def load_optimizer(model: nn.Module, optimizer: Optimizer, state: dict[str, Any]) -> None:
    """Load what `full_state` returned; before the weights are loaded, as torch takes a step with zero gradients in between."""
    if state.get("state"):
        names = {p: name for name, p in model.named_parameters()}
        # Older checkpoints have the parameters' positions instead of their names.
        order: dict[Any, str] = dict(enumerate(names[p] for group in optimizer.param_groups for p in group["params"]))
        slots = {order.get(key, key): value for key, value in state["state"].items()}
        groups = [{**g, "params": [order.get(key, key) for key in g["params"]]} for g in state["param_groups"]]
        options = dcp.StateDictOptions(full_state_dict=True, strict=False)  # unused parameters have no state
        dcp.set_optimizer_state_dict(model, optimizer, {"state": slots, "param_groups": groups}, options=options)
        for parameter, name in names.items():
            if name not in slots:
                optimizer.state.pop(parameter, None)  # of torch's step
