"""Models that are compiled or wrapped: what is swapped inside them runs, what cannot be is refused with the order of calls."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn
from trained import perturbed

import orepa
from orepa import OREPAConv
from orepa.surgery.replace import check_model


class Block(nn.Module):
    def __init__(self, i, o):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(i, o, 3, padding=1), nn.BatchNorm2d(o)

    def forward(self, x):
        return torch.relu(self.bn(self.conv(x)))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = Block(3, 4), nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))

    def forward(self, x):
        return self.b(self.a(x)).mean((2, 3))


# --- torch.compile ----------------------------------------------------------------------------------------------------------


def compile_call(name):
    def apply(model):
        model.get_submodule(name).compile(backend="eager")
        return model

    return apply


def compile_child(name):
    def apply(model):
        parent, _, child = name.rpartition(".")
        parent = model.get_submodule(parent)
        setattr(parent, child, torch.compile(getattr(parent, child), backend="eager"))
        return model

    return apply


def compile_method(name):
    def apply(model):
        module = model.get_submodule(name)
        module.forward = torch.compile(module.forward, backend="eager")
        return model

    return apply


COMPILED = {
    "call of a block": compile_call("a"),
    "call of a convolution": compile_call("a.conv"),
    "call of a norm": compile_call("a.bn"),
    "call of the model": compile_call(""),
    "block": compile_child("a"),
    "convolution": compile_child("a.conv"),
    "model": lambda model: torch.compile(model, backend="eager"),
    "forward of a block": compile_method("a"),
    "forward of the model": compile_method(""),
}


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("how", COMPILED)
def test_compiled_parts_run_the_new_layers(how, inplace):
    torch.compiler.reset()
    x = torch.randn(4, 3, 8, 8)
    net = COMPILED[how](perturbed(Net()))
    expected = net(x).detach()  # stale code to go on with
    prepared = orepa.prepare(net, preserve=True, inplace=inplace)
    swapped = {layer.name for layer in orepa.report(prepared).swapped}
    assert len(swapped) == (1 if how == "convolution" else 2), "a compiled convolution cannot be traced: it is left"
    result = prepared(x)
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-5)
    (result**2).sum().backward()
    assert all(p.grad is not None for p in prepared.parameters())
    calls = [vars(module).get("_compiled_call_impl") for module in prepared.modules()]
    assert any(calls) is how.startswith("call"), "it stays compiled"

    expected = perturbed(prepared)(x).detach()
    plain = orepa.convert(prepared, inplace=True)
    torch.testing.assert_close(plain(x), expected, rtol=1e-4, atol=1e-5)
    assert not any(isinstance(m, OREPAConv) for m in plain.modules())
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.mul_(0.5)
        assert not torch.allclose(plain(x), expected, rtol=1e-2), "what runs is not what is registered"


@pytest.mark.parametrize("build", [orepa.OfflineConv, orepa.RepVGGBlock])
@pytest.mark.parametrize("wrap", [compile_call, compile_child])
def test_a_compiled_block_runs_its_plain_form(build, wrap):
    torch.compiler.reset()
    x = torch.randn(2, 3, 6, 6)
    model = wrap("0")(perturbed(nn.Sequential(build(3, 3, 3, padding=1), nn.Flatten())))
    expected = model(x).detach()
    plain = orepa.convert(model, inplace=True)
    torch.testing.assert_close(plain(x), expected, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.zero_()
    assert not plain(x).any(), "what runs is not what is registered"


def test_a_wrapper_around_the_model_sees_a_change_in_place():
    torch.compiler.reset()
    x, net = torch.randn(4, 3, 8, 8), perturbed(Net())
    compiled = torch.compile(net, backend="eager")
    compiled(x)
    orepa.prepare(net, preserve=True, inplace=True)
    perturbed(net)
    torch.testing.assert_close(compiled(x), net(x))


# --- TorchScript ---------------------------------------------------------------------------------------------------------


def test_scripted_models_and_blocks_are_refused_and_plain_parts_left():
    x = torch.randn(1, 3, 8, 8)
    for scripted in (torch.jit.script(Net()), torch.jit.trace(Net().eval(), x)):
        with pytest.raises(ValueError, match="prepare: the model is compiled by TorchScript; call prepare before"):
            orepa.prepare(scripted)
    traced = nn.Sequential(torch.jit.trace(nn.Sequential(OREPAConv(3, 4, 3)), x), nn.ReLU())
    with pytest.raises(ValueError, match=r"convert: 0\.0 is compiled by TorchScript; call convert before torch\.jit"):
        check_model(traced, "convert")
    mixed = nn.Sequential(torch.jit.script(Block(3, 3)), Block(3, 3)).train()
    mixed[0].bn.bias.requires_grad_(False)
    mixed(x)
    prepared = orepa.prepare(mixed)
    actions = {layer.name: (layer.action, layer.detail) for layer in orepa.report(prepared).layers}
    assert actions["0.conv"] == ("left", "it is compiled by TorchScript") and actions["1.conv"][0] == "swapped"
    prepared(x).sum().backward()
    assert [name for name, p in prepared.named_parameters() if p.grad is None] == ["0.bn.bias"]
    assert all(p.grad is None for p in mixed.parameters()), "the copy trains the model"


# --- distributed training ---------------------------------------------------------------------------------------------------

ORDER = r"prepare -> wrap -> train -> unwrap \(model\.module\) -> convert"


@pytest.fixture
def one_process(tmp_path):
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def fsdp2(model):
    from torch.distributed.fsdp import fully_shard

    fully_shard(model.b, mesh=dist.init_device_mesh("cpu", (1,)))
    return model


def fsdp1(model):
    from torch.distributed.fsdp import FullyShardedDataParallel

    return FullyShardedDataParallel(model, device_id=torch.device("cpu"))


def replicated(model):
    from torch.distributed._composable.replicate import replicate

    return replicate(model)


def sharded(model):
    from torch.distributed.tensor import distribute_module

    return distribute_module(model, dist.init_device_mesh("cpu", (1,)))


WRAPPED = {
    "ddp": (nn.parallel.DistributedDataParallel, "the model is under DistributedDataParallel"),
    "ddp inside": (lambda net: nn.Sequential(nn.parallel.DistributedDataParallel(net)), "0 is under DistributedDataP"),
    "fsdp1": (fsdp1, "the model is under FullyShardedDataParallel"),
    "fsdp2": (fsdp2, r"b is under FSDPModule"),
    "replicate": (replicated, "the model is under DDP"),
    "dtensor": (sharded, r"a\.conv is under DTensor"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("wrapper", WRAPPED)
def test_wrapped_models_are_refused_with_the_order(wrapper, inplace, one_process):
    wrap, where = WRAPPED[wrapper]
    net = wrap(Net())
    for operation in (orepa.prepare, orepa.prune_branches):
        with pytest.raises(ValueError, match=f"^{operation.__name__}: {where}.*{ORDER}"):
            operation(net, inplace=inplace)
    with pytest.raises(ValueError, match=f"^convert: {where}.*{ORDER}"):
        check_model(net, "convert")
    assert not any(isinstance(m, OREPAConv) for m in net.modules())


def test_the_order_that_the_message_names_works(one_process):
    x = torch.randn(4, 3, 8, 8)
    model = nn.parallel.DistributedDataParallel(orepa.prepare(Net()))
    (model(x) ** 2).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    model.eval()
    plain = orepa.convert(model.module)
    torch.testing.assert_close(plain(x), model(x), rtol=1e-4, atol=1e-5)


def test_data_parallel_replicates_at_each_call():
    """Without GPUs `nn.DataParallel` calls its module; a replica is what it makes for each GPU."""
    x = torch.randn(4, 3, 8, 8)
    model = orepa.prepare(nn.DataParallel(Net()))
    assert {layer.name for layer in orepa.report(model).swapped} == {"module.a.conv", "module.b.0"}
    (model(x) ** 2).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    plain = orepa.convert(model.eval())
    torch.testing.assert_close(plain(x), model(x), rtol=1e-4, atol=1e-5)
    replica = model.module.a.conv._replicate_for_data_parallel()
    assert type(replica) is OREPAConv
