"""FSDP2: which modules are sharded, and state dicts that do not show it.

Checkpoints hold whole tensors, whatever the strategy: a run may be resumed on another number of devices, and `orepa convert`
needs none of this.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

_LISTS = (nn.Sequential, nn.ModuleList)


def shard(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """Shard the parameters over all processes: the blocks of each stage one by one, what is left as a whole.

    A block is a member of an `nn.Sequential` or `nn.ModuleList` that is no such list itself; blocks in blocks do not count.

    Args:
        model: sharded in place.
        mesh: of Lightning's `ModelParallelStrategy`.
    """
    data_parallel = mesh["data_parallel"]
    for block in _blocks(model):
        fully_shard(block, mesh=data_parallel)
    fully_shard(model, mesh=data_parallel)
    return model


def _blocks(module: nn.Module) -> list[nn.Module]:
    found: list[nn.Module] = []
    for child in module.children():
        nested = isinstance(child, _LISTS)
        if isinstance(module, _LISTS) and not nested:
            found.append(child)
        else:
            found += _blocks(child)
    return [block for block in found if any(True for _ in block.parameters())]


def whole(state: Any) -> Any:
    """A state dict with every sharded tensor in one piece, on the CPU. A collective: all processes have to call it."""
    if isinstance(state, DTensor):
        return state.full_tensor().cpu()
    if isinstance(state, dict):
        result = {key: whole(value) for key, value in state.items()}
        return state if all(result[key] is state[key] for key in state) else result
    if isinstance(state, list):
        return [whole(value) for value in state]
    return state


def shard_like(model: nn.Module, state: dict[str, Any]) -> dict[str, Any]:
    """A whole state dict, sharded where the model's own is."""
    own = model.state_dict()
    return {key: _like(own.get(key), value) for key, value in state.items()}


def load_optimizer(optimizer: Optimizer, state: dict[str, Any]) -> None:
    """Load a whole state dict into an optimizer whose parameters may be sharded."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    slots = {
        index: {
            # State of a parameter's shape is sharded as the parameter is; step counts and the like are not.
            key: _like(parameters[index], value)
            if isinstance(value, Tensor) and value.shape == parameters[index].shape
            else value
            for key, value in slot.items()
        }
        for index, slot in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": slots})


def _like(target: Tensor | None, value: Tensor) -> Tensor:
    if not isinstance(target, DTensor):
        return value
    return distribute_tensor(value.to(target.device), target.device_mesh, target.placements)
