"""timm's training tools on registered models: optimizers, averaged weights, checkpoints, `reparameterize_model`."""

from __future__ import annotations

import copy
import json
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from narrow_models import images, narrow, settled
from torch import nn

import orepa

timm = pytest.importorskip("timm", reason="timm is not installed (the [models] extra)")
from timm.models import group_parameters, load_checkpoint, load_state_dict, resume_checkpoint, save_for_hf  # noqa: E402
from timm.optim import create_optimizer_v2  # noqa: E402
from timm.utils import CheckpointSaver, ModelEmaV3, reparameterize_model  # noqa: E402

from orepa import models  # noqa: E402  # after the check for timm

every_registered_model = pytest.mark.parametrize("name", models.MODELS)
one_of_each = pytest.mark.parametrize("name", ["orepa_resnet18", "orepa_resnet50", "orepa_repvgg_a0"])


@cache
def shared(name: str) -> nn.Module:
    """Build a model to be looked at only."""
    return narrow(name)


def train_one_step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    nn.functional.cross_entropy(model.train()(images()), torch.tensor([0, 999])).backward()
    optimizer.step()


def same_function(one: nn.Module, other: nn.Module, tolerance: float = 0.0) -> bool:
    with torch.no_grad():
        got, expected = one.eval()(images()), other.eval()(images())
    return bool((got - expected).norm() <= tolerance * expected.norm())


# --- optimizers -------------------------------------------------------------------------------------------------------------


@every_registered_model
@pytest.mark.parametrize("layer_decay", [None, 0.5])
def test_an_optimizer_holds_every_parameter_once(name: str, layer_decay: float | None) -> None:
    model = shared(name)
    groups = create_optimizer_v2(model, "sgd", lr=0.1, weight_decay=1e-4, layer_decay=layer_decay).param_groups
    held = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(held) == sorted(id(parameter) for parameter in model.parameters())
    decayed = {id(parameter) for group in groups if group["weight_decay"] > 0 for parameter in group["params"]}
    assert decayed and not [key for key, p in model.named_parameters() if p.dim() < 2 and id(p) in decayed]


@every_registered_model
def test_the_papers_groups_in_timms_optimizer(name: str) -> None:
    model = shared(name)
    groups = create_optimizer_v2(
        model, "sgd", lr=0.1, param_group_fn=partial(orepa.parameter_groups, lr=0.1)
    ).param_groups
    decayed = {id(parameter) for group in groups if group["weight_decay"] > 0 for parameter in group["params"]}
    undecayed = {key for key, parameter in model.named_parameters() if id(parameter) not in decayed}
    assert {key for key, parameter in model.named_parameters() if parameter.dim() < 2 or "scales" in key} == undecayed


@every_registered_model
def test_layers_are_grouped_as_in_the_plain_model(name: str) -> None:
    """All parameters of a block are as deep as the weight of the plain convolution in its place."""
    model, plain = shared(name), shared(models.MODELS[name].plain)
    for coarse in (False, True):
        ours, theirs = (group_parameters(m, m.group_matcher(coarse=coarse), reverse=True) for m in (model, plain))
        assert ours.keys() == dict(model.named_parameters()).keys()
        assert set(ours.values()) == set(theirs.values())
        assert all(ours[key] == depth for key, depth in theirs.items() if key in ours)
        for path, block in model.named_modules():
            if isinstance(block, orepa.OREPAConv | orepa.RepVGGBlock):
                depths = [
                    {level for key, level in each.items() if key.startswith(f"{path}.")} for each in (ours, theirs)
                ]
                assert len(depths[0]) == 1 and (depths[0] == depths[1] or not depths[1]), path


def test_layer_decay_reaches_the_parameters_of_blocks() -> None:
    model = shared("orepa_resnet18")
    optimizer = create_optimizer_v2(model, "sgd", lr=1.0, weight_decay=1e-4, layer_decay=0.5)
    scale = {id(p): group["lr_scale"] for group in optimizer.param_groups for p in group["params"]}
    stem, first, last, head = (
        {scale[id(p)] for p in model.get_submodule(path).parameters()}
        for path in ("conv1", "layer1.0", "layer4.0", "fc")
    )
    assert [len(each) for each in (stem, first, last, head)] == [1, 1, 1, 1]
    assert max(stem) < max(first) < max(last) < max(head) == 1.0


@one_of_each
def test_frozen_stages_stay(name: str) -> None:
    model = narrow(name)
    frozen = ["stem"] if "repvgg" in name else ["conv1", "bn1"]
    timm.utils.freeze(model, frozen, include_bn_running_stats=True)
    before = copy.deepcopy(model.state_dict())
    train_one_step(model, create_optimizer_v2(model, "sgd", lr=0.1))
    after = model.state_dict()
    changed = {key for key, value in before.items() if not torch.equal(value, after[key])}
    assert changed and not [key for key in changed if key.split(".")[0] in frozen]


# --- averaged weights -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "foreach"), [("orepa_resnet18", False), ("orepa_resnet50", True), ("orepa_repvgg_a0", False)]
)
def test_averaged_weights_are_evaluated_after_each_update(name: str, foreach: bool) -> None:
    model = narrow(name)
    optimizer = create_optimizer_v2(model, "sgd", lr=0.1)
    average = ModelEmaV3(model, decay=0.5, foreach=foreach)
    for step in range(3):
        train_one_step(model, optimizer)
        average.update(model, step)
        fresh = narrow(name)
        fresh.load_state_dict(average.module.state_dict())
        assert same_function(average, fresh, 1e-6)  # a stale kernel would show here
    assert not same_function(average, model, 1e-3)
    plain = orepa.convert(average.module, example_inputs=images())
    assert same_function(plain, average, 1e-4)


# --- checkpoints ------------------------------------------------------------------------------------------------------------


@one_of_each
def test_a_run_is_saved_and_resumed(name: str, tmp_path: Path) -> None:
    model = narrow(name)
    optimizer = create_optimizer_v2(model, "momentum", lr=0.1)
    average = ModelEmaV3(model, decay=0.5)
    train_one_step(model, optimizer)
    average.update(model)
    saver = CheckpointSaver(
        model, optimizer, model_ema=average, checkpoint_dir=str(tmp_path), recovery_dir=str(tmp_path)
    )
    saver.save_checkpoint(epoch=3, metric=0.5)
    path = str(tmp_path / "last.pth.tar")

    resumed = narrow(name)
    its_optimizer = create_optimizer_v2(resumed, "momentum", lr=0.1)
    assert resume_checkpoint(resumed, path, its_optimizer) == 4
    for _ in range(2):
        train_one_step(model, optimizer)
        train_one_step(resumed, its_optimizer)
    assert same_function(resumed, model, 1e-5)

    averaged = narrow(name).eval()
    averaged(images())  # caches the kernels of other weights
    load_checkpoint(averaged, path, use_ema=True)
    assert same_function(averaged, average.module)


@pytest.mark.parametrize(
    ("name", "few"), [("orepa_resnet18", {"channels": (16, 16, 32, 32)}), ("orepa_repvgg_a0", {"width_factor": 0.25})]
)
def test_a_folder_for_the_hub(name: str, few: dict[str, Any], tmp_path: Path) -> None:
    model = settled(timm.create_model(name, **few))
    save_for_hf(model, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architecture"] == name and config["pretrained_cfg"]["first_conv"] == []
    assert same_function(timm.create_model(f"local-dir:{tmp_path}", pretrained=True), model)
    with pytest.raises(ValueError, match="Use in_chans=3"):
        timm.create_model(f"local-dir:{tmp_path}", pretrained=True, in_chans=1)


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
def test_prefixes_of_wrappers(prefix: str, tmp_path: Path) -> None:
    model = narrow("orepa_resnet18")
    torch.save({"state_dict": {prefix + key: value for key, value in model.state_dict().items()}}, tmp_path / "run.pt")
    path = str(tmp_path / "run.pt")
    assert load_state_dict(path).keys() == model.state_dict().keys()
    assert same_function(narrow("orepa_resnet18", checkpoint_path=path), model)


def test_another_models_checkpoint_is_refused(tmp_path: Path) -> None:
    torch.save(narrow("resnet18").state_dict(), tmp_path / "plain.pt")
    with pytest.raises(RuntimeError, match='Missing key.*"layer1.0.conv1.origin_weight"'):
        load_checkpoint(narrow("orepa_resnet18"), str(tmp_path / "plain.pt"))
    converted = orepa.convert(narrow("orepa_resnet18").eval(), fold_bn=False)
    load_checkpoint(converted, str(tmp_path / "plain.pt"))


# --- reparameterize_model ---------------------------------------------------------------------------------------------------


@one_of_each
def test_reparameterize_model_computes_the_same(name: str) -> None:
    model = narrow(name)
    expected = copy.deepcopy(settled(model))
    assert same_function(reparameterize_model(model), expected, 1e-5)
    plain = orepa.convert(model, example_inputs=images())
    assert same_function(reparameterize_model(plain), expected, 1e-5)
