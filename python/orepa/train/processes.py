"""Lightning Fabric for the devices of a run, and what its processes share besides gradients."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric import Fabric
from lightning.fabric.loggers import TensorBoardLogger
from lightning.fabric.strategies import ModelParallelStrategy
from torch import nn

from ..errors import UserError
from .config import Config
from .sharding import shard

STRATEGIES = ("auto", "ddp", "fsdp2")


def make_fabric(
    config: Config,
    *,
    accelerator: str,
    strategy: str,
    devices: int | None,
    num_nodes: int | None,
    events: Path,
    step: int,
) -> Fabric:
    """Lightning Fabric with TensorBoard, not yet launched. Under torchrun, devices and nodes are torchrun's.

    Args:
        config: of the run.
        accelerator: ``"auto"``, ``"cpu"``, ``"cuda"`` or ``"mps"``.
        strategy: one of `STRATEGIES`.
        devices: processes per node, None for one, or as many as torchrun has started.
        num_nodes: machines, None for one, or as many as torchrun runs on.
        events: folder of the TensorBoard files.
        step: at which they go on.

    Raises:
        UserError: there are no such devices, or what they cannot do is asked of them.
    """
    if accelerator == "auto":
        accelerator = "cuda" if torch.cuda.is_available() else "cpu"
    if accelerator == "cpu" and config.precision == "16-mixed":
        raise UserError("--precision 16-mixed needs a GPU; on a CPU take bf16-mixed")
    devices, num_nodes = _processes(devices, num_nodes)
    if strategy == "fsdp2":
        _check_fsdp2(config)
    processes = devices * num_nodes
    plan: Any = {
        "auto": "ddp" if processes > 1 else "auto",
        "ddp": "ddp",
        "fsdp2": ModelParallelStrategy(shard, data_parallel_size=processes, tensor_parallel_size=1),
    }[strategy]
    logger = TensorBoardLogger(root_dir=events.parent, name=events.name, version="", purge_step=step or None)
    precision: Any = config.precision
    try:
        return Fabric(
            accelerator=accelerator,
            strategy=plan,
            devices=devices,
            num_nodes=num_nodes,
            precision=precision,
            loggers=logger,
        )
    except Exception as error:  # Lightning has its own kinds for each missing device
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"cannot use --accelerator {accelerator} --devices {devices}: {reason}") from error


def world_size(devices: int | None, num_nodes: int | None) -> int:
    """Number of processes that `make_fabric` will have.

    Raises:
        UserError: torchrun runs another number of them.
    """
    devices, num_nodes = _processes(devices, num_nodes)
    return devices * num_nodes


def _processes(devices: int | None, num_nodes: int | None) -> tuple[int, int]:
    if not (dist.is_available() and dist.is_torchelastic_launched()):
        return devices or 1, num_nodes or 1
    local, total = int(os.environ["LOCAL_WORLD_SIZE"]), int(os.environ["WORLD_SIZE"])
    for option, asked, started in (("--devices", devices, local), ("--num-nodes", num_nodes, total // local)):
        if asked not in (None, started):
            raise UserError(
                f"{option} {asked} contradicts torchrun, which has started {started}: leave the option away"
            )
    return local, total // local


def _check_fsdp2(config: Config) -> None:
    if config.ema is not None:
        raise UserError(
            "--ema keeps a whole copy of the model, which --strategy fsdp2 has nowhere: take --strategy ddp"
        )
    if config.precision not in ("32-true", "bf16-mixed"):
        raise UserError(f"--strategy fsdp2 goes with --precision 32-true or bf16-mixed, got {config.precision}")


def share_buffers(*modules: nn.Module) -> None:
    """Give every process the running statistics of the first one, so that they validate the same model."""
    if dist.is_available() and dist.is_initialized():
        for module in modules:
            for buffer in module.buffers():
                dist.broadcast(buffer, 0)
