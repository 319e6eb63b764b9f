"""The trace runs the forward for real, and leaves the model, its code's variables and the random generators as they were."""

import collections
import copy
import dataclasses
import gc
import io
import random
import types
import weakref
from typing import ClassVar

import numpy as np
import pytest
import torch
from torch import nn

import orepa
from orepa.surgery.consumer_graph import consumers
from orepa.surgery.module_state import ModelState

SEEN, COUNTS, LAST = [], {}, None
GENERATOR = np.random.default_rng(0)


@dataclasses.dataclass
class Statistics:
    calls: int = 0
    shapes: list = dataclasses.field(default_factory=list)


@dataclasses.dataclass(slots=True)
class Slotted:
    calls: int = 0
    last: object = None


class Meter:
    history: ClassVar = []

    def __init__(self):
        self.values = {"nested": [[], {}]}

    def update(self, x):
        self.values["nested"][0].append(x)
        self.values["nested"][1][len(self.values)] = x
        self.history.append(x)


class Stateful(nn.Module):
    instances: ClassVar = []
    total = 0

    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.act = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU()
        self.register_buffer("steps", torch.zeros(()))
        self.register_buffer("mean", torch.ones(3))
        self.register_buffer("rebound", torch.zeros(2))
        self.register_buffer("swapped", torch.ones(2))
        self.scale = nn.Parameter(torch.ones(3))
        self.feature, self.calls = None, 0
        self.log, self.queue, self.names = [], collections.deque([1], maxlen=2), {"a"}
        self.by_name, self.counter = collections.defaultdict(list), collections.Counter()
        self.ordered, self.array = collections.OrderedDict(b=1, a=2), np.zeros(2)
        self.space, self.statistics, self.slotted = types.SimpleNamespace(n=0), Statistics(), Slotted()
        self.meter, self.random, self.rng = Meter(), random.Random(1), np.random.RandomState(1)
        self.generator, self.bytes = torch.Generator().manual_seed(3), bytearray(b"ab")
        self.register_forward_hook(self.hook())

    def hook(self):
        features, calls = {}, 0
        self.read_hook = lambda: (dict(features), calls)

        def keep(module, inputs, output):
            nonlocal calls
            calls += 1
            features["out"] = output

        return keep

    def forward(self, x):
        global LAST
        y = self.conv(x)
        self.feature, self.calls, LAST = y, self.calls + 1, y
        self.log.append(y), self.queue.append(y), self.names.add("b"), SEEN.append(y)
        self.by_name["x"].append(y), self.counter.update("x"), self.ordered.move_to_end("b")
        self.ordered.pop("a"), COUNTS.update(a=COUNTS.get("a", 0) + 1)
        self.space.n += 1
        self.statistics.calls += 1
        self.statistics.shapes.append(y)
        self.slotted.calls += 1
        self.slotted.last = y
        self.meter.update(y)
        self.array[0] += 1
        self.bytes += b"c"
        self.steps += 1
        self.mean.mul_(0.9).resize_(5)
        self.rebound = self.rebound + 1
        self.swapped.data = torch.zeros(5)
        for parameter in self.parameters():
            parameter.data.mul_(2.0)
            with torch.no_grad():
                parameter.add_(1.0)
            parameter.requires_grad_(False)
        self.random.random(), self.rng.rand(), torch.rand(1, generator=self.generator), GENERATOR.random()
        random.random(), np.random.rand(), torch.rand(1)
        type(self).total += 1
        type(self).latest = y
        self.instances.append(y)
        self.added = nn.Identity()
        self.conv.register_forward_hook(print)
        self.act.inplace = True
        del self.names
        self.eval()
        return self.bn(y)


class Deterministic(Stateful):
    """Its forward can be traced: it draws nothing in eval mode."""

    def __init__(self):
        super().__init__()
        self.random = self.rng = types.SimpleNamespace(random=int, rand=int)

    def forward(self, x):
        self.steps += 1
        self.feature = self.conv(x)
        self.log.append(self.feature)
        return self.bn(self.feature)


class Raises(Deterministic):
    def forward(self, x):
        y = super().forward(x)
        if y.sum() > 0:  # no symbolic value says so
            return y
        return -y


def state_of(model):
    state = {
        "modules": [(n, type(m), m.training) for n, m in model.named_modules()],
        "tensors": {k: v.tolist() for k, v in model.state_dict().items()},
        "grads": [p.requires_grad for p in model.parameters()],
        "plain": [(k, repr(v)) for k, v in vars(model).items() if not k.startswith("_") and not callable(v)],
        "meter": repr(model.meter.values),
        "generators": (model.generator.get_state().tolist(), str(GENERATOR.bit_generator.state)),
        "own": [str(g.getstate()) for g in [model.random] if isinstance(g, random.Random)],
        "numpy": [g.get_state()[1].tolist() for g in [model.rng] if isinstance(g, np.random.RandomState)],
        "global": (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()),
        "names": (list(SEEN), dict(COUNTS), LAST, list(Meter.history)),
        "class": {k: repr(v) for k, v in vars(Stateful).items() if not callable(v)},
        "hook": model.read_hook(),
        "hooks": len(model.conv._forward_hooks),
    }
    return state


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("build", [Stateful, Deterministic, Raises])
def test_the_trace_leaves_everything_as_it_was(build, training):
    model = build().train(training)
    model.act.training = not training
    before, containers = state_of(model), (model.log, model.by_name, model.meter)
    consumers(model)
    after = state_of(model)
    assert list(before) == list(after)
    for part in before:
        assert before[part] == after[part], part
    assert all(a is b for a, b in zip(containers, (model.log, model.by_name, model.meter), strict=True))


@pytest.mark.parametrize("inplace", [False, True])
def test_models_that_keep_features_can_be_prepared_saved_and_converted(inplace):
    model = Deterministic()
    prepared = orepa.prepare(model, "orepa", inplace=inplace)
    assert prepared.feature is None and prepared.log == [] and prepared.steps == 0
    prepared._forward_hooks.clear()
    del prepared.read_hook
    torch.save(prepared.state_dict(), io.BytesIO())
    copy.deepcopy(prepared)
    converted = orepa.convert(prepared.eval(), inplace=inplace)
    assert converted.feature is None and converted.log == [] and converted.steps == 0


def test_a_forward_that_prints_and_warns_is_silent_while_traced(capsys, recwarn):
    class Loud(Deterministic):
        def forward(self, x):
            print("here")
            import warnings

            warnings.warn("there", stacklevel=1)
            return super().forward(x)

    consumers(Loud())
    assert capsys.readouterr() == ("", "") and not recwarn


def test_tensors_with_a_graph_do_not_hinder():
    model = Deterministic()
    model(torch.randn(1, 3, 4, 4))
    feature = model.feature
    orepa.prepare(model, "orepa", inplace=True)
    assert model.feature is feature
    feature.sum().backward()


@pytest.mark.parametrize("offline", [False, True])
def test_replaced_weights_are_freed_at_once(offline):
    """Not only by the garbage collector, which may come when there is no memory left."""
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    old = weakref.ref(net[0].weight)
    gc.collect()
    gc.disable()
    try:
        model = orepa.prepare(net, {"0": {"topology": "dbb", "offline": offline}}, inplace=True)
        assert orepa.report(model).swapped and old() is None
        old = weakref.ref(next(model[0].parameters()))
        orepa.convert(model.eval(), inplace=True)
        assert old() is None
    finally:
        gc.enable()


def test_calls_of_other_models_are_not_searched():
    """The engine keeps thousands of prepared calls, which would make every trace in a long run slower."""

    def searched():
        return len(ModelState(model)._records)

    model = nn.Sequential(orepa.OREPAConv(4, 4, 3), nn.BatchNorm2d(4))
    before = searched()
    orepa.OREPAConv(3, 5, 3)(torch.randn(1, 3, 4, 4)).sum().backward()
    assert searched() == before
