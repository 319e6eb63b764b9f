"""A model's hook squeezes all blocks at once in every forward, and nobody's loop notices."""

import copy
import gc
import io
import pickle
import sys
import threading
import weakref

import pytest
import torch
from steps import Net, assert_same_gradients, batch, counted, gradients, loss, other_kinds, pair
from torch import nn
from torch.utils.checkpoint import checkpoint

import orepa
from orepa import OREPAConv
from orepa.modules.kernel_store import open_steps
from orepa.modules.step import STEP_HOOKS


@pytest.fixture(autouse=True)
def no_step_stays_open():
    yield
    assert not open_steps.steps


def step(model, x):
    model.zero_grad()
    outputs = model(x)
    loss(outputs).backward()
    return outputs


def has_hooks(model):
    return [hook for hook in (*model._forward_pre_hooks.values(), *model._forward_hooks.values()) if hook in STEP_HOOKS]


# --- one squeeze --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("scaling", ["vector", "none"])
def test_equals_blocks_that_squeeze_alone(backend, scaling):
    together, alone = pair(backend=backend, scaling=scaling)
    for seed in range(3):
        for mine, expected in zip(step(together, batch(seed)), step(alone, batch(seed)), strict=True):
            torch.testing.assert_close(mine, expected, rtol=1e-12, atol=1e-12)
        assert_same_gradients(together, alone)


def test_one_squeeze_each_way(monkeypatch):
    together, alone = (model.float() for model in pair())
    x = batch(dtype=torch.float32)
    with counted(monkeypatch) as seen:
        step(together, x)
        assert seen == {"forward": [5], "backward": [5]}
        step(alone, x)
        assert seen["forward"][1:] == [1] * 5 and seen["backward"][1:] == [1] * 5


def test_dtypes_and_memory_formats_are_learned(monkeypatch):
    """The image is contiguous and in float32 as a rule, feature maps are channels_last, a head leaves autocast."""

    class Mixed(Net):
        def forward(self, x):
            with torch.autocast("cpu", torch.bfloat16):
                x = self.bn1(self.stem(x)).relu().contiguous(memory_format=torch.channels_last)
                x = self.body(x)
            return self.left(x.float()), self.right(x.float())

    together, alone = (model.float() for model in pair(Mixed))
    x = batch(dtype=torch.float32)
    with counted(monkeypatch) as seen:
        step(together, x)
        seen["forward"].clear()
        step(together, x)
        assert sorted(seen["forward"]) == [1, 2, 2]
    step(alone, x)
    assert_same_gradients(together, alone, 1e-6)


def test_a_block_that_is_not_used_gets_no_gradient_and_is_no_longer_squeezed(monkeypatch):
    class Single(Net):
        def forward(self, x):
            return (self.left(self.features(x)),)

    together, alone = (model.float() for model in pair(Single))
    x = batch(dtype=torch.float32)
    with counted(monkeypatch) as seen:
        for _ in range(10):
            step(together, x)
        assert seen["forward"][0] == 5 and seen["forward"][-1] == 4 and len(seen["forward"]) == 10
        together.forward = lambda x: Net.forward(together, x)
        step(together, x)  # asks again: alone now, and with the others the next time
        step(together, x)
        assert seen["forward"][10:] == [4, 1, 5]
        del together.forward
    step(together, x), step(alone, x)
    assert together.right.scales.grad is None
    assert_same_gradients(together, alone, 1e-6)


def test_frozen_blocks_and_operands():
    together, alone = pair()
    for model in (together, alone):
        model.stem.requires_grad_(False)
        model.left.scales.requires_grad_(False)
        next(model.body[0].parameters()).requires_grad_(False)
    for seed in range(2):
        step(together, batch(seed)), step(alone, batch(seed))
        assert_same_gradients(together, alone)
    assert together.stem._cached is not None and together.stem._stored is None


def test_other_kinds_of_blocks():
    together, alone = pair(other_kinds)
    for seed in range(2):
        step(together, batch(seed)), step(alone, batch(seed))
        assert_same_gradients(together, alone)


# --- other people's loops -----------------------------------------------------------------------------------------------------


def test_two_forwards_before_one_backward_pass():
    together, alone = pair()
    for model in (together, alone):
        (loss(model(batch(1))) + loss(model(batch(2)))).backward()
    assert_same_gradients(together, alone)


def test_parts_are_differentiated_one_by_one():
    """The graphs of two heads on detached features have nothing in common, but for the squeeze."""

    class Detached(Net):
        def forward(self, x):
            x = self.features(x).detach()
            return self.left(x), self.right(x)

    for model in pair(Detached):
        left, right = model(batch())
        left.sum().backward()
        assert model.left.scales.grad is not None and model.right.scales.grad is None
        right.sum().backward()
        assert model.right.scales.grad is not None


def test_second_derivatives():
    together, alone = pair()
    norms = []
    for model in (together, alone):
        first = torch.autograd.grad(loss(model(batch())), list(model.parameters()), create_graph=True)
        norm = sum(gradient.square().sum() for gradient in first)
        norm.backward()
        norms.append(norm)
    torch.testing.assert_close(*norms, rtol=1e-12, atol=0)
    assert_same_gradients(together, alone, 1e-10)


@pytest.mark.parametrize("fused", [False, True])
def test_steps_of_an_optimizer(fused):
    together, alone = pair()
    optimizers = [torch.optim.Adam(model.parameters(), 0.01, fused=fused) for model in (together, alone)]
    for seed in range(3):
        for model, optimizer in zip((together, alone), optimizers, strict=True):
            step(model, batch(seed))
            optimizer.step()
    for mine, expected in zip(together.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("whole", [False, True])
def test_checkpoints_find_the_kernels(reentrant, whole, monkeypatch):
    class Checkpointed(Net):
        def forward(self, x):
            if whole:
                return super().forward(x)
            x = checkpoint(lambda x: self.bn1(self.stem(x)).relu(), x, use_reentrant=reentrant)
            x = checkpoint(self.body, x, use_reentrant=reentrant).relu()
            return self.left(x), self.right(x)

    together, alone = (model.float() for model in pair(Checkpointed))
    x = batch(dtype=torch.float32).requires_grad_()
    with counted(monkeypatch) as seen:
        for model in (together, alone):
            model.zero_grad()
            outputs = checkpoint(model, x, use_reentrant=reentrant) if whole else model(x)
            loss(outputs).backward()
            if model is together:
                assert seen["forward"] == [5]
    assert_same_gradients(together, alone, 1e-6)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_after_another_forward_of_the_blocks(reentrant):
    """The kernel in store is then another one, or none: the second forward of the checkpoint still fits the first."""

    class Checkpointed(Net):
        def features(self, x):
            return checkpoint(super().features, x, use_reentrant=reentrant)

    for between in (
        lambda model: model.stem(batch(1)),
        lambda model: model(batch(1)),
        lambda model: model.stem.clear_cache(),
    ):
        together, alone = pair(Checkpointed)
        for model in (together, alone):
            outputs = model(batch().requires_grad_())
            between(model)
            loss(outputs).backward()
        assert_same_gradients(together, alone)


def test_optimizers_within_the_backward_pass():
    """A parameter is updated as soon as it has its gradient, while others still wait for theirs in a checkpoint."""

    class Checkpointed(Net):
        def forward(self, x):
            x = checkpoint(lambda x: self.bn1(self.stem(x)).relu(), x, use_reentrant=True)
            return (checkpoint(self.body, x, use_reentrant=True),)

    models = pair(Checkpointed)
    for model in models:
        for parameter in model.parameters():
            optimizer = torch.optim.SGD([parameter], 0.1, fused=True)
            parameter.register_post_accumulate_grad_hook(lambda _, optimizer=optimizer: optimizer.step())
        for seed in range(2):
            model(batch(seed).requires_grad_())[0].square().mean().backward()
    for mine, expected in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("how", ["compile", "module.compile", "part"])
def test_compiled(how):
    together, alone = pair()
    run = together
    if how == "compile":
        run = torch.compile(together, fullgraph=True, backend="aot_eager")
    elif how == "module.compile":
        together.compile(fullgraph=True, backend="aot_eager")
    else:
        together.body = torch.compile(together.body, fullgraph=True, backend="aot_eager")
        alone.body = nn.Sequential(alone.body)  # for names of equal number
    for seed in range(2):
        together.zero_grad(), alone.zero_grad()
        loss(run(batch(seed))).backward()
        loss(alone(batch(seed))).backward()
    for mine, expected in zip(together.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, expected.grad, rtol=1e-9, atol=1e-11)


def test_replicas_of_data_parallel(monkeypatch):
    together, alone = pair()
    replicate = sys.modules[torch.nn.parallel.replicate.__module__]
    monkeypatch.setattr(
        replicate,
        "_broadcast_coalesced_reshape",
        lambda tensors, devices, detach: [[t.clone() for t in tensors] for _ in devices],
    )
    replicas = replicate.replicate(together, [0, 1])
    outputs = [None, None]

    def run(index):
        outputs[index] = replicas[index](batch(index))

    threads = [threading.Thread(target=run, args=(index,)) for index in range(2)]
    [thread.start() for thread in threads], [thread.join() for thread in threads]
    sum(map(loss, outputs)).backward()
    sum(loss(alone(batch(index))) for index in range(2)).backward()
    assert_same_gradients(together, alone, 1e-10)


def test_threads():
    together, alone = pair()
    errors = []

    def train(seed):
        try:
            for _ in range(10):
                outputs = together(batch(seed))
                found = torch.autograd.grad(loss(outputs), together.stem.scales)[0]
                torch.testing.assert_close(found, expected[seed], rtol=1e-9, atol=1e-12)
        except BaseException as error:
            errors.append(error)

    together.eval(), alone.eval()  # the norms' statistics would depend on the order
    expected = [torch.autograd.grad(loss(alone(batch(seed))), alone.stem.scales)[0] for seed in range(3)]
    threads = [threading.Thread(target=train, args=(seed,)) for seed in range(3)]
    [thread.start() for thread in threads], [thread.join() for thread in threads]
    assert not errors


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), "torch.save"])
def test_copies_of_a_model_in_use(copier, monkeypatch):
    together, alone = pair()
    outputs = together(batch())
    if copier == "torch.save":
        file = io.BytesIO()
        torch.save(together, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    else:
        other = copier(together)
    loss(outputs).backward(), loss(alone(batch())).backward()
    assert_same_gradients(together, alone)
    alone.load_state_dict(other.state_dict())
    with counted(monkeypatch) as seen:
        other.float(), step(other, batch(1, dtype=torch.float32))
        assert seen["forward"] == [5]
    alone.float(), step(alone, batch(1, dtype=torch.float32))
    assert_same_gradients(other, alone, 1e-6)


def test_a_part_is_called_alone(monkeypatch):
    together, alone = pair()
    for model in (together, alone):
        loss(model(batch())).backward()
        model.body(torch.ones(1, 8, 5, 5).double()).sum().backward()
    assert_same_gradients(together, alone)


def test_an_exception_or_an_interrupt_in_the_forward():
    class Failing(Net):
        error = None

        def forward(self, x):
            x = self.features(x)
            if self.error is not None:
                raise self.error
            return self.left(x), self.right(x)

    for error in (ValueError("in the forward"), KeyboardInterrupt()):
        together, alone = pair(Failing)
        together.error = error
        with pytest.raises(type(error)):
            together(batch())
        together.error = None
        with torch.no_grad():
            for model in (together, alone):
                for block in (model.stem, model.left):
                    block.scales.data.mul_(1.5)
        if isinstance(
            error, KeyboardInterrupt
        ):  # hooks are not called: what was squeezed waits, and is not served any more
            torch.optim.SGD(together.parameters(), 0.1, fused=True).step()  # without gradients: changes nothing
            loss((together.left(torch.ones(1, 8, 5, 5).double()),)).backward()
            loss((alone.left(torch.ones(1, 8, 5, 5).double()),)).backward()
            assert_same_gradients(together, alone)
        alone.load_state_dict(together.state_dict())
        step(together, batch()), step(alone, batch())
        assert_same_gradients(together, alone)


def test_a_forward_that_is_a_generator_or_calls_itself():
    class Generator(Net):
        def forward(self, x):
            x = self.features(x)
            yield self.left(x)
            yield self.right(x)

    class Recursive(Net):
        def forward(self, x, depth=1):
            if depth:
                small = self(x[..., ::2, ::2], depth - 1)
                return *small, *super().forward(x)
            return super().forward(x)

    for build in (Generator, Recursive):
        together, alone = pair(build)
        for model in (together, alone):
            loss(list(model(batch()))).backward()
        assert_same_gradients(together, alone)


def test_a_model_within_a_model(monkeypatch):
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = Net()
            self.more = OREPAConv(4, 4, 3, padding=1)

        def forward(self, x):
            left, right = self.net(x)
            return self.more(left), right

    from orepa.modules.step import squeeze_together_in

    together, alone = pair(Outer)
    squeeze_together_in(together.net)
    for seed in range(10):
        step(together, batch(seed)), step(alone, batch(seed))
        assert_same_gradients(together, alone)


# --- writes -------------------------------------------------------------------------------------------------------------------


def test_hooks_of_the_model_write_before_the_squeeze():
    together, alone = pair()

    def perturb(model, _args):
        for parameter in model.parameters():
            parameter.data.mul_(1.01)

    for model in (together, alone):
        model.register_forward_pre_hook(perturb)
    for seed in range(2):
        step(together, batch(seed)), step(alone, batch(seed))
        assert_same_gradients(together, alone)


@pytest.mark.parametrize("writes", ["counted", "its own hook"])
def test_a_write_during_the_forward_is_seen(writes):
    class Writing(Net):
        def forward(self, x):
            x = self.features(x)
            if writes == "counted":
                with torch.no_grad():
                    self.left.scales.mul_(2)
            return self.left(x), self.right(x)

    together, alone = pair(Writing)
    if writes == "its own hook":

        def double(block, _args):
            block.scales.data.mul_(2)

        for model in (together, alone):
            model.left.register_forward_pre_hook(double)
    for mine, expected in zip(together(batch()), alone(batch()), strict=True):
        torch.testing.assert_close(mine, expected)


def test_a_write_before_the_backward_pass_is_an_error():
    together, _ = pair()
    outputs = together(batch())
    with torch.no_grad():
        together.left.scales.mul_(2)
    with pytest.raises(RuntimeError, match="inplace operation"):
        loss(outputs).backward()


# --- where it is off ----------------------------------------------------------------------------------------------------------


def test_transforms():
    together, alone = pair()
    results = []
    for model in (together, alone):
        model.eval()
        parameters = dict(model.named_parameters())

        def value(parameters, x, model=model):
            return loss(torch.func.functional_call(model, parameters, (x,)))

        x = torch.stack([batch(1), batch(2)])
        results.append(
            (
                torch.func.grad(value)(parameters, x[0]),
                torch.vmap(value, in_dims=(None, 0))(parameters, x),
                torch.func.jvp(lambda x, model=model: loss(model(x)), (x[0],), (x[1],)),
            )
        )
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-12)


def test_traced_and_evaluated(monkeypatch):
    together, alone = pair()
    together.eval(), alone.eval()
    traced = torch.jit.trace(together, batch(), check_trace=False)
    with torch.no_grad():
        for run in (together, traced, torch.fx.symbolic_trace(together)):
            for mine, expected in zip(run(batch(1)), alone(batch(1)), strict=True):
                torch.testing.assert_close(mine, expected)
    assert together.stem._cached is not None, "a block that does not train has its own cache"


def test_prepare_and_convert():
    def net():
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))

    model = orepa.prepare(net())
    assert len(has_hooks(model)) == 2 and len(has_hooks(orepa.prepare(model))) == 2
    outer = orepa.prepare(nn.Sequential(model, nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)), inplace=True)
    assert len(has_hooks(outer)) == 2 and not has_hooks(model), "one squeeze for the whole"
    assert not has_hooks(orepa.prepare(net(), together=False))
    converted = orepa.convert(outer.eval())
    assert not any(map(has_hooks, converted.modules()))
    assert not any(module._forward_hooks_always_called for module in converted.modules())
    torch.jit.script(converted)


def test_a_part_is_converted_while_the_model_goes_on():
    together, _ = pair()
    step(together, batch())
    orepa.convert(together.body.eval(), inplace=True)
    step(together.train(), batch())
    assert all(gradient is not None for gradient in gradients(together).values())


def test_nothing_keeps_a_model_alive():
    together, _ = pair()
    together.stem.register_forward_hook(lambda *_, model=together: None)
    step(together, batch())
    gone = weakref.ref(together)
    del together
    gc.collect()
    assert gone() is None


# --- one branch on feature maps -----------------------------------------------------------------------------------------------


def prefer_branch_on_small_images(monkeypatch):
    monkeypatch.setattr(OREPAConv, "prefers_branch", lambda self, x, uses=1: bool(self._split) and x.shape[-1] <= 8)


def sized(size, dtype=torch.float64):
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(size), dtype=dtype)


def test_blocks_in_two_parts_are_squeezed_with_the_others(monkeypatch):
    together, alone = (model.float() for model in pair(order="auto"))
    for block in (together.stem, together.body[0]):
        block.order = "branch"
    x = batch(dtype=torch.float32)
    with counted(monkeypatch) as seen:
        step(together, x)
        assert seen == {"forward": [5], "backward": [5]}
    step(alone, x)
    assert_same_gradients(together, alone, 1e-5)


def test_sizes_of_the_last_forward_decide_what_is_squeezed_and_those_of_this_one_what_runs(monkeypatch):
    prefer_branch_on_small_images(monkeypatch)
    together, alone = (model.float() for model in pair())
    real, ran = OREPAConv._convolve_split, []
    monkeypatch.setattr(OREPAConv, "_convolve_split", lambda self, *args: (ran.append(self), real(self, *args))[1])
    with counted(monkeypatch) as seen:
        for size, branches, squeezed in ((8, 5, [5, 1, 1, 1, 1]), (8, 5, [5]), (16, 0, [5, 1, 1, 1, 1]), (16, 0, [5])):
            ran.clear(), seen["forward"].clear()
            step(together, sized(size, torch.float32))
            assert len(ran) == branches and seen["forward"] == squeezed
            step(alone, sized(size, torch.float32))
            assert all(
                torch.equal(p.grad, q.grad) for p, q in zip(together.parameters(), alone.parameters(), strict=True)
            )


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints_of_changing_sizes(reentrant, monkeypatch):
    class Checkpointed(Net):
        def features(self, x):
            return checkpoint(super().features, x, use_reentrant=reentrant)

    prefer_branch_on_small_images(monkeypatch)
    together, alone = pair(Checkpointed)
    for model in (together, alone):
        for small, large in ((8, 16), (16, 8), (8, 8)):
            (loss(model(sized(small).requires_grad_())) + loss(model(sized(large).requires_grad_()))).backward()
    assert_same_gradients(together, alone)
