"""`orepa.squeeze_once`: one squeeze for many forwards, one backward of it, the same gradients."""

import copy
import gc
import threading
import weakref

import pytest
import torch
from steps import Net, assert_same_gradients, batch, counted, gradients, loss, other_kinds, pair
from torch import nn
from torch.utils.checkpoint import checkpoint

import orepa
from orepa import OREPAConv
from orepa.modules import accumulation

SEEDS = range(4)


def accumulate(model, seeds=SEEDS, run=None, dtype=torch.float64):
    for seed in seeds:
        (loss((model if run is None else run)(batch(seed, dtype=dtype))) / len(seeds)).backward()


def assert_accumulates_alike(together, alone, tolerance=1e-12, **options):
    with orepa.squeeze_once(together):
        accumulate(together, **options)
    accumulate(alone, **options)
    assert_same_gradients(together, alone, tolerance)


def is_open(model):
    return any(module._once is not None for module in model.modules() if isinstance(module, OREPAConv))


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_equals_a_squeeze_for_every_forward(backend):
    together, alone = pair(backend=backend)
    for _ in range(2):  # adds to the gradients that are there
        assert_accumulates_alike(together, alone)
    assert not is_open(together)


def test_one_squeeze_each_way_for_all_forwards(monkeypatch):
    model = pair()[0].float()
    with counted(monkeypatch) as seen:
        with orepa.squeeze_once(model):
            accumulate(model, dtype=torch.float32)
            assert seen == {"forward": [5], "backward": []}
        assert seen == {"forward": [5], "backward": [5]}


def test_gradients_are_not_copied(monkeypatch):
    model, made = pair()[0], []

    def recording(*args, **kwargs):
        values = squeeze_gradients(*args, **kwargs)
        made.append([None if value is None else value.data_ptr() for value in values])
        return values

    squeeze_gradients = accumulation.squeeze_gradients
    monkeypatch.setattr(accumulation, "squeeze_gradients", recording)
    with orepa.squeeze_once(model):
        accumulate(model)
    places = [p.grad.data_ptr() for name, p in model.named_parameters() if name.endswith("origin_weight")]
    assert len(places) >= 2 and len(set(places) & set(made[0])) >= len(places) - 1


def test_without_the_hook_of_prepare():
    _, alone = pair()
    assert_accumulates_alike(copy.deepcopy(alone), alone)


# --- exceptions and refusals --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("begun", [False, True])
@pytest.mark.parametrize("error", [ValueError("a bad batch"), KeyboardInterrupt()])
def test_an_exception_leaves_all_as_it_was(begun, error):
    together, alone = pair()
    if begun:
        accumulate(together), accumulate(alone)
    values = copy.deepcopy(together.state_dict())
    before = gradients(together)

    @orepa.squeeze_once(together)
    def fail():
        accumulate(together)
        raise error

    with pytest.raises(type(error)):
        fail()
    assert not is_open(together)
    for name, gradient in gradients(together).items():
        assert gradient is None if before[name] is None else torch.equal(gradient, before[name]), name
    for name, parameter in together.named_parameters():
        assert torch.equal(parameter, values[name])
    together.load_state_dict(values), alone.load_state_dict(values)
    assert_accumulates_alike(together, alone)


@pytest.mark.parametrize("fused", [False, True])
def test_parameters_must_not_change_within(fused):
    model, _ = pair()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, fused=fused)
    accumulate(model)
    before = gradients(model)

    @orepa.squeeze_once(model)
    def train():
        accumulate(model)
        optimizer.step()

    with pytest.raises(RuntimeError, match=r"parameters of OREPAConv\(3, 8.*step the optimizer after the block"):
        train()
    assert all(torch.equal(gradient, before[name]) for name, gradient in gradients(model).items())
    values = [p.clone() for p in model.parameters()]
    with orepa.squeeze_once(model):  # another model may step, as that of a discriminator does
        accumulate(model)
        other = nn.Parameter(torch.ones(1))
        other.grad = torch.ones(1)
        discriminator = torch.optim.SGD([other], 0.1, fused=fused)
        discriminator.step()
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), values, strict=True))


def test_a_change_without_use_is_fine_and_seen_afterwards():
    together, alone = pair()
    with orepa.squeeze_once(together), torch.no_grad():
        together.stem.scales.mul_(2)
    with torch.no_grad():
        alone.stem.scales.mul_(2)
    assert_accumulates_alike(together, alone)


def test_a_backward_pass_afterwards_is_refused():
    """Its gradients would get lost."""
    model, _ = pair()
    with orepa.squeeze_once(model):
        value = loss(model(batch()))
    with pytest.raises(RuntimeError, match=r"came after the block, call backward within"):
        value.backward()


def test_nothing_waits_for_the_garbage_collector():
    model, _ = pair()
    gc.disable()
    try:
        with orepa.squeeze_once(model):
            opened = weakref.ref(model.stem._once)
            accumulate(model)
        assert opened() is None
    finally:
        gc.enable()


def test_another_thread_is_refused():
    model, _ = pair()
    errors = []

    def enter():
        try:
            with orepa.squeeze_once(model):
                pass
        except RuntimeError as error:
            errors.append(str(error))

    with orepa.squeeze_once(model):
        thread = threading.Thread(target=enter)
        thread.start(), thread.join()
        assert errors == ["squeeze_once: another thread has blocks of this model open"] and is_open(model)


# --- what it meets ------------------------------------------------------------------------------------------------------------


def test_nested():
    for outer, inner in (("", ""), ("", "body"), ("body", "")):
        together, alone = pair()
        with orepa.squeeze_once(together.get_submodule(outer)):
            with orepa.squeeze_once(together.get_submodule(inner)):
                accumulate(together, range(2))
            assert is_open(together)
            accumulate(together, range(2, 4))
        for seeds in (range(2), range(2, 4)):
            accumulate(alone, seeds)
        assert_same_gradients(together, alone)


def test_blocks_unused_shared_and_frozen(monkeypatch):
    class Shared(Net):
        def forward(self, x):
            x = self.features(x)
            return self.left(x), self.left(-x)

    together, alone = pair(Shared)
    for model in (together, alone):
        model.stem.requires_grad_(False)
        model.left.scales.requires_grad_(False)
    assert_accumulates_alike(together, alone)
    assert together.right.scales.grad is None and together.left.scales.grad is None


def test_evaluation_within():
    together, alone = pair()
    with orepa.squeeze_once(together):
        accumulate(together, range(2))
        together.eval()
        with torch.no_grad():
            found = together(batch(9))
        assert together.stem._cached is not None
        together.train()
        with torch.no_grad():
            together(batch(8))  # moves statistics only
        accumulate(together, range(2, 4))
    accumulate(alone, range(2))
    with torch.no_grad():
        for mine, expected in zip(found, alone.eval()(batch(9)), strict=True):
            torch.testing.assert_close(mine, expected)
        alone.train()(batch(8))
    accumulate(alone, range(2, 4))
    assert_same_gradients(together, alone)


def test_no_gradients_wanted():
    model, _ = pair()
    with torch.no_grad(), orepa.squeeze_once(model):
        model(batch())
    assert all(gradient is None for gradient in gradients(model).values())
    with orepa.squeeze_once(model):
        pass
    model.requires_grad_(False)
    with orepa.squeeze_once(model):
        model(batch())
    with orepa.squeeze_once(nn.Linear(2, 2)):  # without a block
        pass


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints(reentrant, monkeypatch):
    class Checkpointed(Net):
        def features(self, x):
            return checkpoint(super().features, x, use_reentrant=reentrant)

    together, alone = (model.float() for model in pair(Checkpointed))
    x = batch(dtype=torch.float32).requires_grad_()
    with counted(monkeypatch) as seen, orepa.squeeze_once(together):
        for _ in range(2):
            loss(together(x)).backward()
        assert seen["forward"] == [5]
    for _ in range(2):
        loss(alone(x)).backward()
    assert_same_gradients(together, alone, 1e-6)


@pytest.mark.parametrize("how", ["compile", "functional"])
def test_what_squeezes_for_every_forward(how):
    together, alone = pair()
    if how == "compile":
        run = torch.compile(together, fullgraph=True, backend="aot_eager")
    else:

        def run(x):
            return torch.func.functional_call(together, dict(together.named_parameters()), (x,))

    with orepa.squeeze_once(together):
        accumulate(together, run=run)
    accumulate(alone)
    assert_same_gradients(together, alone, 1e-10)


def test_other_kinds_of_blocks():
    assert_accumulates_alike(*pair(other_kinds))


def test_the_weight_is_part_of_the_loss():
    together, alone = pair()
    with orepa.squeeze_once(together):
        accumulate(together)
        together.stem.weight.square().sum().backward()
    accumulate(alone)
    alone.stem.weight.square().sum().backward()
    assert_same_gradients(together, alone)


def test_hooks_of_parameters_run_once_with_the_sum():
    together, alone = pair()
    sums = []
    together.stem.scales.register_hook(lambda gradient: sums.append(gradient.clone()))
    together.stem.scales.register_post_accumulate_grad_hook(lambda p: sums.append(p.grad.clone()))
    assert_accumulates_alike(together, alone)
    assert len(sums) == 2 and all(torch.equal(s, together.stem.scales.grad) for s in sums)


# --- mixed precision ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_many_batches_in_half_precision_add_up_in_float32(dtype):
    """Gradients of kernels come in half precision: their sum would lose what is small against it."""
    together, alone = (model.float() for model in pair())
    exact = copy.deepcopy(alone)
    seeds = range(32)
    for model in (together, alone):
        with torch.autocast("cpu", dtype):
            if model is together:
                with orepa.squeeze_once(model):
                    accumulate(model, seeds, dtype=torch.float32)
            else:
                accumulate(model, seeds, dtype=torch.float32)
    accumulate(exact, seeds, dtype=torch.float32)
    errors = []
    for model in (together, alone):
        error = sum(
            (p.grad - q.grad).square().sum() for p, q in zip(model.parameters(), exact.parameters(), strict=True)
        )
        errors.append(error.sqrt())
    assert errors[0] <= 1.1 * errors[1]
    assert_same_gradients(together, alone, 1e-2)


def test_precisions_take_turns():
    together, alone = (model.float() for model in pair())

    def run(model):
        for enabled in (True, False, True):
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                accumulate(model, range(2), dtype=torch.float32)

    with orepa.squeeze_once(together):
        run(together)
    run(alone)
    assert_same_gradients(together, alone, 1e-2)


def test_grad_scaler_and_clipping():
    models, scalers, norms = [model.float() for model in pair()], [], []
    for together, model in zip((True, False), models, strict=True):
        scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)

        def run(model=model, scaler=scaler):
            for seed in SEEDS:
                with torch.autocast("cpu", torch.bfloat16):
                    value = loss(model(batch(seed, dtype=torch.float32)))
                scaler.scale(value / len(SEEDS)).backward()

        if together:
            with orepa.squeeze_once(model):
                run()
        else:
            run()
        scaler.unscale_(optimizer)
        norms.append(nn.utils.clip_grad_norm_(model.parameters(), 0.01))
        scaler.step(optimizer)
        scaler.update()
        scalers.append(scaler.get_scale())
    assert scalers[0] == scalers[1]
    torch.testing.assert_close(*norms, rtol=1e-2, atol=0)
    for mine, expected in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-4)


def test_a_scale_that_overflows_skips_the_step():
    model = pair()[0].float()
    scaler, optimizer = torch.amp.GradScaler("cpu", init_scale=2.0**120), torch.optim.SGD(model.parameters(), 0.1)
    before = copy.deepcopy(model.state_dict())
    with orepa.squeeze_once(model):
        scaler.scale(loss(model(batch(dtype=torch.float32))) * 1e30).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**119
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


# --- one branch on feature maps -----------------------------------------------------------------------------------------------


def test_the_forwards_that_share_a_squeeze_decide_the_order(monkeypatch):
    together, alone = pair()
    seen = []
    monkeypatch.setattr(OREPAConv, "prefers_branch", lambda self, x, uses=1: (seen.append(uses), uses < 4)[1])
    for known in (None, 4):
        seen.clear()
        with orepa.squeeze_once(together, micro_batches=known):
            accumulate(together)
        assert set(seen) == {known or 2}
        accumulate(alone)
        assert_same_gradients(together, alone)
    for block in (together.stem, together.body[0]):
        block.order = "branch"
    assert_accumulates_alike(together, alone)
