"""An optimizer that does not hold the model's parameters is named: by `check_optimizer`, by `orepa train`, by a warning."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from detectors import optimizer_by_attribute
from torch import Tensor, nn

import orepa
from orepa import OREPAConv, check_optimizer, parameter_groups


def plain_net() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.Flatten(),
        nn.Linear(8 * 36, 4),
    )


def backward(model: nn.Module) -> Tensor:
    loss = model(torch.randn(2, 3, 6, 6)).square().mean()
    loss.backward()
    return loss


def sgd(parameters: object) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, 0.1)  # type: ignore[arg-type]


# --- check_optimizer --------------------------------------------------------------------------------------------------------


def test_an_optimizer_made_after_prepare_fits() -> None:
    model = orepa.prepare(plain_net())
    assert check_optimizer(model, sgd(model.parameters())) == ([], [])
    assert check_optimizer(model, sgd(parameter_groups(model, 0.1))) == ([], [])
    shares = sgd(model[0].parameters()), sgd(model[1:].parameters())
    assert check_optimizer(model, shares) == ([], [])
    assert check_optimizer(model, iter(shares)) == ([], [])


@pytest.mark.parametrize("inplace", [False, True])
def test_one_made_before_is_named(inplace: bool) -> None:
    plain = plain_net()
    optimizer = sgd(plain.parameters())
    model = orepa.prepare(plain, inplace=inplace)
    missing, stale = check_optimizer(model, optimizer, strict=False)
    blocks = {name for name, _ in model.named_parameters() if name.startswith(("0.", "3."))}
    everything = {name for name, _ in model.named_parameters()}
    assert set(missing) == (blocks if inplace else everything)
    assert stale[0] == "0.weight" and "3.bias" in stale
    assert set(stale) == ({"0.weight", "3.weight", "3.bias"} if inplace else {n for n, _ in plain.named_parameters()})
    with pytest.raises(ValueError, match=f"misses {len(missing)} trainable .*0.origin_weight, ") as caught:
        check_optimizer(model, optimizer)
    message = str(caught.value)
    assert f"holds {len(stale)} that are not the model's (0.weight, " in message and "after orepa.prepare" in message
    assert "\n" not in message


def test_what_a_loop_misses_is_named_and_returned_as_groups() -> None:
    model = orepa.prepare(plain_net())
    optimizer = sgd([p for name, p in model.named_parameters() if name not in ("0.scales", "3.dws_depthwise")])
    with pytest.raises(ValueError, match=r"misses 2 .*\(0.scales, 3.dws_depthwise\); orepa.parameter_groups"):
        check_optimizer(model, optimizer)
    groups = parameter_groups(model, 0.1, weight_decay=0.5, exclude=optimizer)
    assert [(group["weight_decay"], len(group["params"])) for group in groups] == [(0, 1), (0.5, 1)]
    for group in groups:
        optimizer.add_param_group(group)
    assert check_optimizer(model, optimizer) == ([], [])
    assert parameter_groups(model, 0.1, exclude=[optimizer]) == []


def test_frozen_parameters_are_not_missing() -> None:
    model = orepa.prepare(plain_net())
    model[0].requires_grad_(False)
    assert check_optimizer(model, sgd([p for p in model.parameters() if p.requires_grad])) == ([], [])
    assert check_optimizer(model, sgd(model.parameters())) == ([], []), "nor are they stale"


def test_a_tensor_from_elsewhere_is_named_by_its_place() -> None:
    model, centres = orepa.prepare(plain_net()), nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([{"params": model.parameters()}, {"params": [centres]}], 0.1)
    assert check_optimizer(model, optimizer, strict=False).stale == ["parameter 0 of group 1"]
    assert check_optimizer(nn.ModuleList([model, nn.ParameterList([centres])]), optimizer) == ([], [])


@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.compile, "ddp"])
def test_wrapped_models(wrap: str | Callable[[nn.Module], nn.Module]) -> None:
    plain = plain_net()
    before, model = sgd(plain.parameters()), orepa.prepare(plain)
    after = sgd(model.parameters())
    if wrap == "ddp":
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        wrap = nn.parallel.DistributedDataParallel
    try:
        assert callable(wrap)
        wrapped = wrap(model)
        assert check_optimizer(wrapped, after) == ([], [])
        with pytest.raises(ValueError, match="0.origin_weight"):
            check_optimizer(wrapped, before)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def test_fsdp_replaces_the_parameters() -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = orepa.prepare(plain_net())
    before = sgd(model.parameters())
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        sharded = fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
        assert check_optimizer(sharded, sgd(sharded.parameters())) == ([], [])
        with pytest.raises(ValueError, match="misses .* holds"):
            check_optimizer(sharded, before)
    finally:
        dist.destroy_process_group()


# --- the warning ------------------------------------------------------------------------------------------------------------


def prune(model: nn.Module, inplace: bool) -> nn.Module:
    return orepa.prune_branches(model, 0.5, inplace=inplace)


def convert(model: nn.Module, inplace: bool) -> nn.Module:
    return orepa.convert(model.eval(), inplace=inplace)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("change", [orepa.prepare, prune, convert])
def test_a_step_that_trains_replaced_parameters_warns_once(change: Callable[..., nn.Module], inplace: bool) -> None:
    model = plain_net() if change is orepa.prepare else orepa.prepare(plain_net())
    optimizer = sgd(model.parameters())
    backward(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()
    optimizer.zero_grad()
    changed = change(model, inplace=inplace)
    backward(changed)
    with pytest.warns(UserWarning, match=r"orepa has replaced \(0.\w+.*; make .*orepa.check_optimizer") as caught:
        optimizer.step()
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()
        sgd(changed.parameters()).step()


class ByClosure(torch.optim.SGD):
    """Computes the gradients in the step, as Lightning's do."""

    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:  # type: ignore[override]
        with torch.enable_grad():
            loss = None if closure is None else closure()
        super().step()
        return loss


def test_training_the_old_model_beside_the_new_one_does_not_warn() -> None:
    plain = plain_net()
    optimizer, by_closure = sgd(plain.parameters()), ByClosure(plain.parameters(), 0.1)
    model = orepa.prepare(plain)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        by_closure.step(lambda: backward(plain))
        for trained, its in ((model, sgd(model.parameters())), (plain, optimizer)):
            its.zero_grad()
            backward(trained)
            its.step()


def test_a_frozen_teacher_in_the_optimizer_does_not_warn() -> None:
    teacher = plain_net()
    student = orepa.prepare(teacher)
    teacher.requires_grad_(False)
    backward(student)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sgd([*teacher.parameters(), *student.parameters()]).step()


def test_what_a_later_change_in_place_keeps_is_not_replaced() -> None:
    """The norms got gradients: they must not hide that the convolutions did not."""
    plain = plain_net()
    optimizer = sgd(plain.parameters())
    orepa.prepare(plain)  # a copy
    orepa.prepare(plain, inplace=True)
    backward(plain)
    with pytest.warns(UserWarning, match=r"3 parameter\(s\) that orepa has replaced \(0.weight, 3.weight, 3.bias\)"):
        optimizer.step()


def test_a_compiled_step_is_not_disturbed() -> None:
    model = orepa.prepare(plain_net())
    optimizer = sgd(model.parameters())
    backward(model)
    before = [p.detach().clone() for p in model.parameters()]
    torch.compile(optimizer.step, backend="eager")()
    assert any(not torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))


def test_parameters_are_not_kept_alive() -> None:
    import gc
    import weakref

    plain = plain_net()
    old = weakref.ref(plain[0].weight)
    model = orepa.prepare(plain)
    del plain
    gc.collect()
    assert old() is None and isinstance(model[0], OREPAConv)


# --- the usual collectors ----------------------------------------------------------------------------------------------------


WEIGHT_DECAY = 5e-4


def by_attribute(model: nn.Module) -> torch.optim.Optimizer:
    """Detectors of the YOLOv7 kind: every module's ``weight`` and ``bias``, if it has one."""
    optimizer = optimizer_by_attribute(model, 0.1, WEIGHT_DECAY)
    # The recipe: what such a loop misses.
    for group in parameter_groups(model, 0.1, weight_decay=WEIGHT_DECAY, exclude=optimizer):
        optimizer.add_param_group(group)
    return optimizer


def by_own_parameters(model: nn.Module) -> torch.optim.Optimizer:
    """Detectors of the YOLOv5 kind: the parameters of every module, without those of its children."""
    kernels, norms, biases = [], [], []
    kinds = tuple(kind for name, kind in vars(nn).items() if "Norm" in name)
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if name == "bias":
                biases.append(parameter)
            elif (name == "weight" and isinstance(module, kinds)) or name == "scales":  # the recipe: the last condition
                norms.append(parameter)
            else:
                kernels.append(parameter)
    optimizer = torch.optim.SGD(biases, 0.1, momentum=0.9, nesterov=True)
    optimizer.add_param_group({"params": kernels, "weight_decay": WEIGHT_DECAY})
    optimizer.add_param_group({"params": norms})
    return optimizer


def by_timm(model: nn.Module) -> torch.optim.Optimizer:
    optim = pytest.importorskip("timm.optim", reason="timm is not installed (the [models] extra)")
    scales = [name for name, _ in model.named_parameters() if name.endswith("scales")]
    return sgd(optim.param_groups_weight_decay(model, WEIGHT_DECAY, no_weight_decay_list=scales))


def by_module_type(model: nn.Module, overrides: dict[str, dict[str, float]]) -> torch.optim.Optimizer:
    """detectron2's kind: a group per parameter, norms by their type, overrides by the parameter's own name."""
    groups, memo = [], set()
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.requires_grad or parameter in memo:
                continue
            memo.add(parameter)
            options = {"weight_decay": WEIGHT_DECAY}
            if isinstance(module, nn.BatchNorm2d) or name == "bias":
                options["weight_decay"] = 0.0
            groups.append({"params": [parameter], **options, **overrides.get(name, {})})
    return sgd(groups)


def by_custom_keys(model: nn.Module, custom_keys: dict[str, dict[str, float]]) -> torch.optim.Optimizer:
    """mmengine's kind: a group per parameter, children one by one, overrides by a part of the qualified name."""
    groups = []

    def add(module: nn.Module, prefix: str) -> None:
        for name, parameter in module.named_parameters(recurse=False):
            custom = next((key for key in custom_keys if key in f"{prefix}.{name}"), None)
            factor = 0.0 if isinstance(module, nn.BatchNorm2d) or name == "bias" else 1.0
            factor = factor if custom is None else custom_keys[custom].get("decay_mult", 1.0)
            groups.append({"params": [parameter], "weight_decay": WEIGHT_DECAY * factor})
        for name, child in module.named_children():
            add(child, f"{prefix}.{name}".strip("."))

    add(model, "")
    return sgd(groups)


COLLECTORS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "by attribute": by_attribute,
    "by own parameters": by_own_parameters,
    "timm": by_timm,
    "by module type": lambda model: by_module_type(model, overrides={"scales": {"weight_decay": 0.0}}),
    "by custom keys": lambda model: by_custom_keys(model, custom_keys={".scales": {"decay_mult": 0.0}}),
}


@pytest.mark.parametrize("collect", COLLECTORS.values(), ids=COLLECTORS)
def test_the_recipe_for_a_collector_gives_every_parameter_its_decay(
    collect: Callable[[nn.Module], torch.optim.Optimizer],
) -> None:
    model = orepa.prepare(nn.Sequential(nn.Conv2d(3, 3, 7, padding=3), nn.BatchNorm2d(3), *plain_net()))
    assert any(name.count(".") == 2 for name, _ in model.named_parameters()), "a stem has blocks in a block"
    optimizer = collect(model)
    assert check_optimizer(model, optimizer) == ([], [])
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        spared = parameter.dim() == 1 or name.endswith("scales")
        assert decay[id(parameter)] == (0 if spared else WEIGHT_DECAY), name


def test_a_loop_by_attribute_alone_misses_the_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    model = orepa.prepare(plain_net())
    monkeypatch.setattr("test_optimizer_check.parameter_groups", lambda *_, **__: [])
    missing, stale = check_optimizer(model, by_attribute(model), strict=False)
    assert not stale
    assert set(missing) == {n for n, _ in model.named_parameters() if n.startswith(("0.", "3.")) and n != "3.bias"}
