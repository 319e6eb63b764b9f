"""Copies a model and replaces modules in it, so that nothing goes on with the old ones and nothing else is lost.

A replaced module stays the object that it was and takes over the class and the attributes of its replacement. So whatever
refers to it, a list, a closure, a compiled wrapper or the caller, goes on with the new layer. What this cannot change, methods
and parameters that were taken out of the old layer, `references` looks for.
"""

from __future__ import annotations

import copy
import functools
import inspect
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx, nn

from ..modules.offline_conv import OfflineConv
from ..modules.orepa_conv import OREPAConv
from ..modules.repvgg import RepVGGBlock
from ..modules.step import STEP_HOOKS
from .references import PARAMETER_HOOKS, find_references, reconnect, redirect

#: classes by name, so that none of their packages is imported
_WRAPPERS = {
    "DistributedDataParallel",
    "FullyShardedDataParallel",
    "XlaFullyShardedDataParallel",
    "FSDPModule",
    "DDP",  # what `replicate` makes of a class
    "DeepSpeedEngine",
}
_BLOCKS = (OREPAConv, OfflineConv, RepVGGBlock)
#: arguments that build a layer, to see which attributes are its own
_SIZES: dict[Any, tuple[int, ...]] = {
    **dict.fromkeys((nn.Conv2d, *_BLOCKS), (1, 1, 1)),
    nn.BatchNorm2d: (1,),
    nn.SyncBatchNorm: (1,),
}
_PACKAGE = __name__.partition(".")[0]
_BACKWARD_HOOKS = ("_backward_hooks", "_backward_pre_hooks", "_is_full_backward_hook")
_STATE_HOOKS = (
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)
#: of convolutions and norms, those with an activation included
_REGISTERED = {"weight", "bias", "running_mean", "running_var", "num_batches_tracked", "drop", "act"}


def check_model(model: nn.Module, operation: str) -> None:
    """Refuse a model whose layers cannot be replaced any more.

    Raises:
        ValueError: it is or contains a wrapper that has collected the parameters (DDP, FSDP, DeepSpeed), sharded parameters, or
            a block in TorchScript.
    """
    for name, module in model.named_modules():
        where = name or "the model"
        wrappers = {kind.__name__ for kind in type(module).__mro__} & _WRAPPERS
        sharded = {type(p).__name__ for p in module._parameters.values()} & {"DTensor"}
        if wrappers or sharded:
            raise ValueError(
                f"{operation}: {where} is under {min(wrappers or sharded)}, which would not see the new parameters; the order "
                "is prepare -> wrap -> train -> unwrap (model.module) -> convert"
            )
        if isinstance(module, torch.jit.ScriptModule) and (
            not name or module.original_name in {kind.__name__ for kind in _BLOCKS}
        ):
            raise ValueError(f"{operation}: {where} is compiled by TorchScript; call {operation} before torch.jit")


def copy_model(model: nn.Module) -> nn.Module:
    """Return a deep copy that computes the same and shares nothing with the model.

    Against `copy.deepcopy`, every module keeps its mode, graph modules keep their hooks, attributes and unused children,
    parameters keep their hooks and attributes, compiled modules stay compiled, and closures, weak references and scripted
    modules lead to the copy, not to the model.

    Raises:
        ValueError: a part cannot be copied.
    """
    memo: dict[int, object] = {}
    try:
        with torch.no_grad():  # TorchScript's copies would otherwise pass their gradients on to the model
            copied = copy.deepcopy(model, memo)
        assert isinstance(copied, nn.Module)
        for module in model.modules():
            if isinstance(module, fx.GraphModule):
                _complete(module, memo)
        copies = dict(copied.named_modules(remove_duplicate=False))
        pairs = [(old, copies[name]) for name, old in model.named_modules(remove_duplicate=False)]
        memo.update((id(old), new) for old, new in pairs)
        for old, new in pairs:
            if not isinstance(old, torch.jit.ScriptModule):
                _complete_parameters(old, new, memo)
        reconnect(copied, memo)
    except Exception as error:  # copying runs code of any class
        raise ValueError(f"{_uncopied(model)} cannot be copied ({error}); pass inplace=True") from error
    for old, new in pairs:
        if new.training != old.training:
            new.train(old.training)  # a graph module may have a graph for each mode
    for old, new in pairs:
        new.training = old.training
        if isinstance(old, torch.jit.ScriptModule):
            _detach_script(old, new)
        compiled = vars(old).get("_compiled_call_impl")
        context = compiled and inspect.getclosurevars(compiled).nonlocals.get("self")
        if context is not None:
            new._compiled_call_impl = context(new._call_impl)
    return copied


def exact_copy(module: nn.Module, copied: Callable[[nn.Module], nn.Module] = copy_model) -> nn.Module:
    """Return a copy in float64, whose blocks squeeze on every device."""
    exact = copied(module).double()
    for block in exact.modules():
        if isinstance(block, OREPAConv):
            block.backend = "reference"
    return exact


def _complete(old: fx.GraphModule, memo: dict[int, object]) -> None:
    """Give the copy of a graph module what its constructor leaves out."""
    new = memo[id(old)]
    for name, value in copy.deepcopy(vars(old), memo).items():
        mine = vars(new).setdefault(name, value)
        if isinstance(mine, dict):
            for key, item in value.items():
                mine.setdefault(key, item)


def _complete_parameters(old: nn.Module, new: nn.Module, memo: dict[int, object]) -> None:
    """Give copied parameters the attributes and hooks that `copy.deepcopy` leaves out."""
    for name, parameter in old._parameters.items():
        if parameter is not None:
            vars(copied := new._parameters[name]).update(copy.deepcopy(vars(parameter), memo))
            for hooks in PARAMETER_HOOKS:
                if getattr(parameter, hooks):
                    setattr(copied, hooks, copy.copy(getattr(parameter, hooks)))


def _detach_script(old: nn.Module, new: nn.Module) -> None:
    """Take from a copied script module the methods of the old one, and let its parameters train."""
    for name in [name for name, value in vars(new).items() if isinstance(value, torch.ScriptMethod)]:
        del vars(new)[name]
    for theirs, mine in zip(old.parameters(recurse=False), new.parameters(recurse=False), strict=True):
        mine.requires_grad_(theirs.requires_grad)


def _uncopied(model: nn.Module) -> str:
    """Return the name of the innermost module that cannot be copied."""
    for name, module in reversed(list(model.named_modules())):
        try:
            copy.deepcopy(module)
        except Exception:
            return name or "the model"
    return "the model"


def replace_modules(model: nn.Module, replacements: Mapping[nn.Module, nn.Module]) -> nn.Module:
    """Replace modules, in place, wherever they are referred to; return the model. The same call again undoes it.

    Each module and its replacement exchange their classes and attributes.

    Raises:
        ValueError: something else holds a part of a module (see `find_references`), or an object cannot change its class.
            Nothing is then replaced.
    """
    names = {module: name or "the model" for name, module in model.named_modules()}
    for old, reason in find_references(model, replacements, parameters=False).items():
        raise ValueError(f"{names.get(old, 'a module')} cannot be replaced: {reason}")
    done: list[tuple[nn.Module, nn.Module]] = []
    try:
        for old, new in replacements.items():
            _exchange(old, new)
            done.append((old, new))
        redirect(model, replacements)
    except Exception as error:  # a class with __slots__, or a container that refuses the change
        for pair in done:
            _exchange(*pair)
        redirect(model, replacements)
        raise ValueError(f"{names.get(old, 'a module')} cannot be replaced: {error}") from error
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset_code_caches()  # its guards were made for the old layers
    return model


def _exchange(a: nn.Module, b: nn.Module) -> None:
    kinds, states = (type(b), type(a)), (vars(b), vars(a))
    for module, kind in zip((a, b), kinds, strict=True):
        object.__setattr__(module, "__class__", kind)
    # A compiled call is bound to the object, not to its class: it compiles the new forward.
    calls = [state.pop("_compiled_call_impl", None) for state in reversed(states)]
    for module, state, call in zip((a, b), states, calls, strict=True):
        object.__setattr__(module, "__dict__", state if call is None else {**state, "_compiled_call_impl": call})


def carry_over(old: nn.Module, new: nn.Module) -> None:
    """Give a replacement what others have set on a layer: attributes, backward hooks, the mode, whether the bias is frozen.

    Raises:
        ValueError: an attribute has another meaning on the replacement.
    """
    kind = next((kind for kind in _SIZES if isinstance(old, kind)), None)
    own = vars(new).keys() if kind is None else _own_attributes(kind)
    for name, value in vars(old).items():
        is_own = name in own or (hasattr(kind, name) and not hasattr(nn.Module, name))
        if is_own or name == "_compiled_call_impl":
            continue
        if hasattr(new, name) and not hasattr(nn.Module, name):
            raise ValueError(f"its attribute {name!r} has another meaning on {type(new).__name__}")
        vars(new)[name] = value
    for name in _BACKWARD_HOOKS:  # the same objects, so that handles can remove the hooks
        vars(new)[name] = vars(old)[name]
    biases = [module._parameters.get("bias") for module in (old, new)]
    if biases[0] is not None and biases[1] is not None:
        biases[1].requires_grad_(biases[0].requires_grad)
    new.train(old.training)


@functools.cache
def _own_attributes(kind: Any) -> frozenset[str]:
    """Return the names of the attributes that a class sets itself."""
    return frozenset(vars(kind(*_SIZES[kind], device="meta")))


def customization(module: nn.Module, *, backward_hooks: bool = False) -> str:
    """Return what this one module has or does besides its class, in words, or an empty string.

    A replacement of the module would lose that. ``backward_hooks`` says whether hooks of the backward pass count, too.
    """
    hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    if backward_hooks:
        hooks += [*module._backward_hooks.values(), *module._backward_pre_hooks.values()]
    if not all(hook in STEP_HOOKS for hook in hooks):
        return f"it has {'hooks' if backward_hooks else 'forward hooks'}, which a new module would not have"
    state_hooks = [hook for name in _STATE_HOOKS for hook in vars(module)[name].values()]
    homes = [str(getattr(getattr(hook, "hook", hook), "__module__", "")) for hook in state_hooks]  # torch wraps some
    # Parametrizations bring hooks that only translate older checkpoints.
    if not all(home.startswith((f"{_PACKAGE}.", "torch.nn.utils.parametriz")) for home in homes):
        return "it has hooks of its state_dict, which a new module would not have"
    if "forward" in vars(module) or "_conv_forward" in vars(module):
        return "its forward was replaced on the instance"
    if type(module).__basicsize__ != nn.Module.__basicsize__:
        return "its class has __slots__, so that it cannot become another"
    if isinstance(module, nn.Conv2d | nn.modules.batchnorm._BatchNorm):
        added = {*module._parameters, *module._buffers, *module._modules} - _REGISTERED
        if added:
            return f"{min(added)} was registered on it, which a new module would not have"
    return ""
