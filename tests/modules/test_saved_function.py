"""A checkpoint does not load into a block with the same parameters and another function."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

import orepa
from orepa import OfflineConv, OREPAConv, RepVGGBlock
from orepa.topology import AvgPool, Branch, Conv, Filter, Identity, Nested, Norm, Topology
from orepa.topology.filters import laplacian, sobel_x, sobel_y

KEY = "_extra_state"


def block(*branch, cls=OREPAConv, arguments=(4, 6, 3), **options):
    """A block of one kxk convolution and one more branch."""

    def declared(spec):
        return Topology(origin=Branch(Conv(3)), other=Branch(*branch, scale=None))

    return cls(*arguments, topology=declared, **options)


def scaled(factor):
    return lambda channels, size: factor * sobel_x(channels, size)


def nested(values):
    return Nested(lambda spec: Topology(only=Branch(Conv(1), Filter(values, 3))), 3)


PAIRS = {
    "prior": lambda: [OREPAConv(4, 6, 3, prior=prior) for prior in ("paper", "dct2d")],
    "stem": lambda: [OREPAConv(4, 6, 7, prior=prior) for prior in ("paper", "dct2d")],
    "vgg": lambda: [RepVGGBlock(4, 4, prior=prior) for prior in ("paper", "dct2d")],
    "filter": lambda: [block(Conv(1), Filter(values, 3)) for values in (sobel_x, sobel_y)],
    "scaled filter": lambda: [block(Conv(1), Filter(values, 3)) for values in (sobel_x, scaled(1.01))],
    "average": lambda: [block(Conv(1), AvgPool(3)), block(Conv(1), Filter(laplacian, 3))],
    "centre": lambda: [block(Conv(1)), block(Conv(1), AvgPool(3))],
    "plus identity": lambda: [block(Conv(1, 4, identity=identity), Conv(3)) for identity in (False, True)],
    "nested": lambda: [block(nested(values)) for values in (sobel_x, sobel_y)],
    "identity branch": lambda: [OREPAConv(4, 4, 3, s, topology="repvgg", scaling="none") for s in (1, 2)],
    "order": lambda: [
        block(Conv(1), *layers, cls=OfflineConv) for layers in ((Norm(), AvgPool(3)), (AvgPool(3), Norm()))
    ],
    "offline": lambda: [block(Conv(1), Norm(), Filter(v, 3), cls=OfflineConv) for v in (sobel_x, sobel_y)],
    "nothing else": lambda: [block(Identity(), arguments=(4, 4, 3)), block(AvgPool(3), arguments=(4, 4, 3))],
}


def model(conv):
    return nn.Sequential(nn.ReLU(), nn.ModuleDict({"conv": conv}))


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("pair", PAIRS)
def test_another_function_is_refused_by_name(pair, strict):
    one, other = map(model, PAIRS[pair]())
    state = one.state_dict()
    assert {k: v.shape for k, v in state.items()} == {k: v.shape for k, v in other.state_dict().items()}
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(RuntimeError, match=r"1\.conv\..*computes something else.*such as prior=") as error:
        other.load_state_dict(state, strict=strict)
    assert len(str(error.value).splitlines()) == 2, "a headline of torch's, and one line"
    own = [n for n, _ in other.named_parameters() if n.startswith("1.conv.origin")]
    assert all(torch.equal(other.state_dict()[name], before[name]) for name in own)
    model(copy.deepcopy(one[1]["conv"])).load_state_dict(state, strict=strict)


def test_whoever_insists_removes_the_key():
    state = OREPAConv(4, 6, 3).state_dict()
    del state[KEY]
    assert not any(OREPAConv(4, 6, 3, prior="dct2d").load_state_dict(state))


def test_old_checkpoints_load_strictly():
    conv = model(OREPAConv(4, 6, 7))
    old = {name: value for name, value in conv.state_dict().items() if KEY not in name}
    assert not any(model(OREPAConv(4, 6, 7)).load_state_dict(old))
    with pytest.raises(RuntimeError, match="Missing key"):
        model(OREPAConv(4, 6, 7)).load_state_dict({n: v for n, v in old.items() if "scales" not in n})


def through_torch_save(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def through_safetensors(state):
    safetensors = pytest.importorskip("safetensors.torch")
    return safetensors.load(safetensors.save(state))


def averaged(state):
    """As loops of a moving average do it, in the dtype of the values."""
    average = {name: value.clone() for name, value in state.items()}
    for _ in range(50):
        for name, value in average.items():
            if value.dtype.is_floating_point:
                value *= 0.999
                value += 0.001 * state[name].detach()
    return average


WAYS = {
    "torch.save": through_torch_save,
    "safetensors": through_safetensors,
    "parameters": lambda state: {k: nn.Parameter(v.detach().clone()) for k, v in state.items()},
    "half": lambda state: {k: v.half() for k, v in state.items()},
    "bfloat16": lambda state: {k: v.bfloat16() for k, v in state.items()},
    "average": averaged,
    "average in bfloat16": lambda state: averaged({k: v.bfloat16() for k, v in state.items()}),
    "scaled": lambda state: {k: v * 2 for k, v in state.items()},
    "soup": lambda state: {k: (v + v + v) / 3 for k, v in state.items()},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("assign", [False, True])
def test_the_ways_of_a_state_dict(way, assign):
    one, other = OREPAConv(4, 6, 3), OREPAConv(4, 6, 3, prior="dct2d")
    state = WAYS[way](one.state_dict())
    one.load_state_dict(state, assign=assign)
    with pytest.raises(RuntimeError, match="computes something else"):
        other.load_state_dict(state, assign=assign)


@pytest.mark.parametrize(
    "fill", [torch.zeros_like, torch.ones_like, torch.randn_like, lambda v: torch.full_like(v, 0.1)]
)
def test_values_that_identify_nothing_are_ignored(fill):
    conv = OREPAConv(4, 6, 3)
    conv.load_state_dict({name: fill(value) for name, value in conv.state_dict().items()})


def test_the_same_filters_computed_otherwise():
    """On another machine, in float32, to the last bits."""
    exact = block(Conv(1), Filter(scaled(1 / 3), 3))
    for values in (scaled(1 / 3 + 1e-9), lambda c, k: scaled(1 / 3)(c, k).float()):
        block(Conv(1), Filter(values, 3)).load_state_dict(exact.state_dict())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_it_is_a_small_tensor_of_the_dtype_of_the_block(dtype):
    conv = OREPAConv(4, 6, 7, dtype=dtype)
    state = conv.state_dict()[KEY]
    assert state.dtype == dtype and state.numel() < 32
    OREPAConv(4, 6, 7).load_state_dict(conv.state_dict())
    assert not OREPAConv(4, 6, 7, device="meta").state_dict()[KEY].is_meta
    assert state.untyped_storage().data_ptr() != conv.state_dict()[KEY].untyped_storage().data_ptr()


def test_one_fingerprint_for_ever():
    """Checkpoints of this version have to load into later ones."""
    expected = [16, 10, 9, 15, 4, 6, 5, 2, 6, 8, 2, 1, 5, 12, 0, 1, 10, 7, 9, 11, 1, 0, 3, 9, 2]
    assert OREPAConv(4, 6, 3).state_dict()[KEY].tolist() == expected


def test_without_the_norms_an_offline_block_is_the_online_one():
    OfflineConv(4, 4, 3, topology="ecb").load_state_dict(OREPAConv(4, 4, 3, topology="ecb").state_dict())


def test_meta_construction_and_copies():
    source = OREPAConv(4, 6, 3)
    for twin in (copy.deepcopy(source), pickle.loads(pickle.dumps(source)), OREPAConv(4, 6, 3, device="meta")):
        twin.load_state_dict(source.state_dict(), assign=True)
    with pytest.raises(RuntimeError, match="computes something else"):
        OREPAConv(4, 6, 3, device="meta", prior="dct2d").load_state_dict(source.state_dict(), assign=True)


def test_pruned_blocks():
    net = nn.Sequential(OREPAConv(4, 6, 3)).eval()
    with torch.no_grad():
        net[0].scales[1] = 0
    pruned = orepa.prune_branches(net, tolerance=1e-6)
    assert len(pruned[0].scales) < len(net[0].scales)
    copy.deepcopy(pruned).load_state_dict(pruned.state_dict())


def test_distributed_state_dicts():
    api = pytest.importorskip("torch.distributed.checkpoint.state_dict")
    one, other = model(OREPAConv(4, 6, 3)), model(OREPAConv(4, 6, 3, prior="dct2d"))
    state = api.get_model_state_dict(one)
    api.set_model_state_dict(one, state)
    with pytest.raises(RuntimeError, match=r"1\.conv\._extra_state: "):
        api.set_model_state_dict(other, state)


def test_averages_of_timm():
    utils = pytest.importorskip("timm.utils")
    net = model(OREPAConv(4, 6, 3))
    for kind in (utils.ModelEmaV2, utils.ModelEmaV3):
        average = kind(net, decay=0.9)
        average.update(net)
        net.load_state_dict(average.module.state_dict())
