"""`squeeze_once` with a process group: the mean of the kernels' gradients, as good as DDP's of the parameters'."""

import copy
import datetime
import hashlib
import os
import signal
import time
import weakref
from contextlib import nullcontext

import pytest
import torch
import torch.distributed as dist
from steps import Net, batch, gradients, loss, pair
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint
from two_processes import run_in_two

import orepa
from orepa import OREPAConv
from orepa.modules import reduction, step
from orepa.modules.kernel_store import in_backward

pytestmark = pytest.mark.skipif(
    not (hasattr(os, "fork") and dist.is_available() and dist.is_gloo_available()), reason="needs fork and gloo"
)

PARTS = 3


def accumulate(model, rank, parts=PARTS, dtype=torch.float64):
    """Gradients of some micro-batches, other ones in each process; DDP reduces its own in the last."""
    for part in range(parts):
        with model.no_sync() if isinstance(model, DistributedDataParallel) and part < parts - 1 else nullcontext():
            (loss(model(batch(10 * rank + part, dtype=dtype))) / parts).backward()


def reduced(model, rank, wrap=True, micro_batches=None, **options):
    """Accumulate by `squeeze_once`, with the blocks excluded from DDP."""
    orepa.exclude_from_ddp(model)
    run = DistributedDataParallel(model) if wrap else model
    with orepa.squeeze_once(run, dist.group.WORLD, micro_batches):
        accumulate(run, rank, **options)
    return model


def by_ddp(model, rank, **options):
    accumulate(DistributedDataParallel(model, **options), rank)
    return model


def bits(model):
    """What is the same in two processes only if all gradients are, bit by bit."""
    found = [(name, None if g is None else g.numpy().tobytes()) for name, g in gradients(model).items()]
    return hashlib.sha256(repr(found).encode()).hexdigest()


def difference(model, other):
    """The largest difference of two gradients of one parameter, relative to their norm."""
    pairs = zip(gradients(model).values(), gradients(other).values(), strict=True)
    assert [(a is None) == (b is None) for a, b in pairs]
    pairs = zip(gradients(model).values(), gradients(other).values(), strict=True)
    return max(float((a - b).norm() / b.norm().clamp_min(1e-30)) for a, b in pairs if b is not None)


def message(function):
    """The one line of an error."""
    try:
        function()
    except RuntimeError as error:
        return str(error)
    return None


# --- what the two processes do ------------------------------------------------------------------------------------------------


def equals_ddp(rank):
    together, alone = pair()
    by_ddp(alone, rank)
    found = []
    for micro_batches in (None, PARTS):
        model = reduced(copy.deepcopy(together), rank, micro_batches=micro_batches)
        found.append((difference(model, alone), bits(model)))
        run = DistributedDataParallel(model)  # a second step, on gradients that are zero or there
        model.zero_grad(set_to_none=False)
        with orepa.squeeze_once(model, dist.group.WORLD, micro_batches):
            accumulate(run, rank)
        with orepa.squeeze_once(run, dist.group.WORLD, micro_batches):
            accumulate(run, rank)
        for parameter in model.parameters():
            parameter.grad /= 2
        found.append((difference(model, alone), bits(model)))
    return found


def every_kind_of_block(rank):
    """Parametrized, hooked, frozen in part, compiled, in checkpoints of both kinds."""

    class Checkpointed(Net):
        def forward(self, x):
            x = checkpoint(lambda x: self.bn1(self.stem(x)).relu(), x, use_reentrant=True)
            x = checkpoint(self.body, x, use_reentrant=False).relu()
            return self.left(x), self.right(x)

    def build(**options):
        model = Checkpointed(**options)
        parametrizations.weight_norm(
            model.body[0], next(n for n, p in model.body[0].named_parameters() if p.dim() == 4)
        )
        return model

    together, alone = pair(build)
    together.right.compile(backend="eager", fullgraph=True)
    for model in (together, alone):
        model.left.register_forward_pre_hook(lambda *_: None)
        model.right.scales.requires_grad_(False)
        model.forward = lambda x, model=model: Checkpointed.forward(model, x.requires_grad_())
    found = reduced(together, rank, micro_batches=PARTS)
    return [(difference(found, by_ddp(alone, rank)), bits(found))]


def unused_blocks(rank):
    """The right head is used in one process only, the left one in none."""

    class Heads(Net):
        right_too = False

        def forward(self, x):
            x = self.features(x)
            return (x, self.right(x)) if self.right_too else (x,)

    together, alone = pair(Heads)
    together.right_too, mean, other = rank == 0, copy.deepcopy(alone), alone
    mean.right_too = True
    accumulate(mean, 0), accumulate(other, 1)
    for p, q in zip(mean.parameters(), other.parameters(), strict=True):
        if p.grad is not None:
            p.grad = (p.grad + (0 if q.grad is None else q.grad)) / 2
    results = []
    for micro_batches in (None, PARTS):
        found = reduced(copy.deepcopy(together), rank, micro_batches=micro_batches)
        results.append((difference(found, mean), bits(found)))
    return results, found.left.scales.grad is None, found.right.scales.grad is not None


def in_half_precision(rank):
    together, alone = (model.float() for model in pair())
    with torch.autocast("cpu", torch.bfloat16):
        found = reduced(together, rank, dtype=torch.float32)
        accumulate(DistributedDataParallel(alone), rank, dtype=torch.float32)
    return [(difference(found, alone), bits(found))]


def sends_early(rank):
    """By micro-batch and pass, how many buckets go: in the backward pass of the last one, if it is known to be."""
    together, _ = pair()
    orepa.exclude_from_ddp(together)
    run, found = DistributedDataParallel(together), []
    send = reduction._Bucket.send
    try:
        reduction.BUCKET = 4096
        for micro_batches in (None, PARTS):
            sent = []

            def log(bucket, value, group, sent=sent):
                sent.append((len(bucket.entries), in_backward()))
                send(bucket, value, group)

            reduction._Bucket.send = log
            with orepa.squeeze_once(run, dist.group.WORLD, micro_batches):
                accumulate(run, rank, parts=PARTS - 1)
                assert not sent
                with run.no_sync():
                    loss(run(batch())).backward()
                early, step = len(sent), weakref.ref(together.stem._once)
            assert step() is None, "its gradients would wait for the garbage collector"
            found.append((early, len(sent), [inside for _, inside in sent]))
    finally:
        reduction._Bucket.send, reduction.BUCKET = send, 25 * 2**20
    return found


def bytes_per_step(rank):
    """Of all reductions, DDP's too: with kernels, and with the plain network."""
    counts, all_reduce = [], dist.all_reduce

    def counting(tensor, *args, **kwargs):
        counts[-1] += tensor.nbytes
        return all_reduce(tensor, *args, **kwargs)

    def build(conv):
        channels = ((3, 16), (16, 32), (32, 32))
        return nn.Sequential(*(nn.Sequential(conv(i, o, 3, bias=False), nn.BatchNorm2d(o)) for i, o in channels))

    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

    dist.all_reduce = counting
    try:
        for conv in (OREPAConv, nn.Conv2d):
            torch.manual_seed(0)
            model = build(conv)
            orepa.exclude_from_ddp(model)
            run = DistributedDataParallel(model)
            run.register_comm_hook(None, allreduce_hook)
            for _ in range(2):
                counts.append(0)
                with orepa.squeeze_once(run, dist.group.WORLD, 1) if conv is OREPAConv else nullcontext():
                    run(torch.randn(2, 3, 8, 8)).square().mean().backward()
    finally:
        dist.all_reduce = all_reduce
    return counts, sum(p.nbytes for p in build(OREPAConv).parameters())


def hooks_under_plain_ddp(rank):
    """Nobody's loop changed, and nothing excluded: one squeeze for what DDP reduces at once."""
    found = []
    for bucket in (4096, 25 * 2**20):
        step.BUCKET = bucket
        together, alone = pair()
        made = step.ForwardStep._chunks
        parts = []
        step.ForwardStep._chunks = lambda self, made=made, parts=parts: parts.append(len(made(self))) or made(self)
        try:
            found.append((difference(by_ddp(together, rank), by_ddp(alone, rank)), bits(together), parts[0]))
        finally:
            step.ForwardStep._chunks, step.BUCKET = made, reduction.BUCKET

    class Single(Net):
        def forward(self, x):
            return (self.left(self.features(x)),)

    together, alone = pair(Single)
    options = {"find_unused_parameters": True}
    by_ddp(together, rank, **options), by_ddp(alone, rank, **options)
    found.append((difference(together, alone), bits(together), 0))
    return found


def refusals(rank):
    """The messages, by what was wrong."""
    world, found = dist.group.WORLD, {}

    def excluded(build=Net, **options):
        model = pair(build)[0]
        orepa.exclude_from_ddp(model)
        return model, DistributedDataParallel(model, **options)

    def train(model, run, micro_batches=None, parts=PARTS):
        with orepa.squeeze_once(model, world, micro_batches):
            accumulate(run, rank, parts)

    model, run = excluded(find_unused_parameters=True)
    found["find_unused_parameters"] = [message(lambda m=m: train(m, run)) for m in (run, model)]
    model = pair()[0]
    run = DistributedDataParallel(model)
    found["averages the gradients of the blocks already"] = [message(lambda m=m: train(m, run)) for m in (run, model)]
    found["call it before"] = [message(lambda: orepa.exclude_from_ddp(run))]
    model, run = excluded()
    found["nobody averages its gradients here"] = [
        message(lambda: loss(run(batch()))),
        message(lambda: model.body(torch.ones(1, 8, 4, 4).double())),
        message(lambda: copy.deepcopy(model)(batch())),
    ]
    with torch.no_grad():
        run(batch())
        model.stem(batch())
    compiled = torch.compile(model.stem, backend="eager")
    found["nobody averages its gradients here"].append(message(lambda: compiled(batch())))

    def plain():
        with orepa.squeeze_once(run):
            pass

    found["need process_group="] = [message(plain)]

    def nested():
        with orepa.squeeze_once(run, world), orepa.squeeze_once(run, world):
            pass

    found["for the outermost"] = [message(nested)]
    single = pair()[0]
    found["but the model ran 3 forwards"] = [message(lambda: train(run, run, micro_batches=PARTS + 1))]
    found["micro_batches, are not the same"] = [message(lambda: train(single, single, micro_batches=PARTS - rank))]

    model = pair()[0]

    def backward_twice():
        with orepa.squeeze_once(model, world, 1):
            left, right = model(batch())
            left.sum().backward(retain_graph=True)
            right.sum().backward()

    found["came after it was sent"] = [message(backward_twice)]
    if rank == 0:
        model.stem.requires_grad_(False)
    found["different blocks are frozen"] = [message(lambda: train(model, model, micro_batches=PARTS))]
    model = pair()[0]
    with torch.no_grad():
        model.stem.scales[0, 0] += rank
    found["parameters of blocks differ among the processes"] = [
        message(lambda: train(model, model, micro_batches=PARTS)),
        message(lambda: train(model, model)),
    ]
    model.load_state_dict(pair()[0].state_dict())
    found[None] = [message(lambda: train(model, model))]

    model = pair()[0]
    dist.fsdp.fully_shard(model.stem, mesh=dist.init_device_mesh("cpu", (2,)))
    found["is sharded"] = [message(lambda: train(model, model))]
    return found


def an_exception_in_one_process(rank):
    """The other one hears of it by the timeout, and both have the gradients that they had."""
    group = dist.new_group(timeout=datetime.timedelta(seconds=2))
    model = pair()[0]
    accumulate(model, 0, parts=1)
    before, began = bits(model), time.monotonic()

    def fail():
        with orepa.squeeze_once(model, group, 2):
            accumulate(model, rank, parts=1)
            if rank == 1:
                raise RuntimeError("a bad batch")
            accumulate(model, rank, parts=1)

    with pytest.raises(RuntimeError) as caught:
        fail()
    return "a bad batch" in str(caught.value), bits(model) == before, time.monotonic() - began < 15


def killed_in_a_step(rank):
    """This has to be the last one."""
    model = pair()[0]
    began = time.monotonic()

    @orepa.squeeze_once(model, dist.group.WORLD, 2)
    def fail():
        accumulate(model, rank, parts=1)
        if rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        accumulate(model, rank, parts=1)

    with pytest.raises(RuntimeError):
        fail()
    return all(g is None for g in gradients(model).values()), time.monotonic() - began < 15


SCENARIOS = (
    equals_ddp,
    every_kind_of_block,
    unused_blocks,
    in_half_precision,
    sends_early,
    bytes_per_step,
    hooks_under_plain_ddp,
    refusals,
    an_exception_in_one_process,
    killed_in_a_step,
)


@pytest.fixture(scope="module")
def results():
    """Of all of the above, in one pair of processes. What they import is imported before."""
    from torch.distributed import fsdp  # noqa: F401
    from torch.distributed.algorithms.ddp_comm_hooks import default_hooks  # noqa: F401

    return run_in_two(SCENARIOS)


@pytest.fixture
def of(results):
    def get(scenario):
        found = results[scenario.__name__]
        for result in found:
            assert not isinstance(result, str), result
        return found

    return get


# --- what is promised ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scenario", [equals_ddp, every_kind_of_block])
def test_equals_ddp_and_is_the_same_in_all_processes(scenario, of):
    mine, other = of(scenario)
    assert all(error < 1e-12 for error, _ in (*mine, *other))
    assert [text for _, text in mine] == [text for _, text in other]


def test_a_block_without_a_gradient_in_one_process_counts_as_zeros(of):
    for found, left_is_none, right_is_there in (both := of(unused_blocks)):
        assert all(error < 1e-12 for error, _ in found)
        assert left_is_none and right_is_there
    assert [text for _, text in both[0][0]] == [text for _, text in both[1][0]]


def test_half_precision(of):
    mine, other = of(in_half_precision)
    assert mine[0][0] < 2e-2 and other[0][0] < 2e-2 and mine[0][1] == other[0][1]


def test_buckets_go_during_the_last_backward_pass(of):
    mine, other = of(sends_early)
    assert mine == other
    (early, _, inside), (early_if_known, count, inside_if_known) = mine
    assert early == 0 and not any(inside)
    assert early_if_known >= 2 and sum(inside_if_known) == early_if_known and count > early_if_known


def test_as_many_bytes_as_the_plain_network(of):
    for counts, parameters in of(bytes_per_step):
        (first, second, plain, plain_again) = counts
        assert first == second and plain == plain_again
        assert first <= 1.02 * plain < parameters / 2


def test_one_squeeze_per_forward_under_plain_ddp(of):
    mine, other = of(hooks_under_plain_ddp)
    assert all(error < 1e-12 for error, *_ in (*mine, *other))
    assert [text for _, text, _ in mine] == [text for _, text, _ in other]
    assert mine[0][2] > 1 and mine[1][2] == 1


def test_what_it_cannot_do_is_refused_in_one_line(of):
    for found in of(refusals):
        for part, messages in found.items():
            assert messages
            for text in messages:
                assert text is None if part is None else part in str(text) and "\n" not in text, (part, text)


def test_an_exception_in_one_process_ends_the_step_of_both(of):
    mine, other = of(an_exception_in_one_process)
    assert mine == (False, True, True) and other == (True, True, True)


def test_a_killed_process_is_an_error_in_the_other(of):
    mine, other = of(killed_in_a_step)
    assert mine == (True, True) and other is None


# --- in this process ----------------------------------------------------------------------------------------------------------


def test_a_single_process_needs_no_group():
    model, alone = pair()
    orepa.exclude_from_ddp(model)
    with orepa.squeeze_once(model, dist.group.WORLD, micro_batches=2):
        accumulate(model, 0)
    accumulate(alone, 0)
    assert difference(model, alone) < 1e-12


def test_names_of_what_ddp_ignores():
    model = nn.Sequential(OREPAConv(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(2, 2))
    model._ddp_params_and_buffers_to_ignore = ["2.bias", "0.bias"]
    orepa.exclude_from_ddp(model)
    orepa.exclude_from_ddp(model)
    ignored = set(model._ddp_params_and_buffers_to_ignore)
    assert {name for name, _ in model.named_parameters()} - ignored == {"1.weight", "1.bias", "2.weight"}
    filters = {name for name, _ in model[0].named_buffers(prefix="0")}
    assert filters and filters <= ignored and "1.running_mean" not in ignored
    converted = orepa.convert(model.eval())
    assert converted._ddp_params_and_buffers_to_ignore == ["0.bias", "2.bias"]
    assert model[0].excluded
    block = OREPAConv(3, 8, 3)
    orepa.exclude_from_ddp(block)
    assert set(block._ddp_params_and_buffers_to_ignore) == {
        name for name, _ in (*block.named_parameters(), *block.named_buffers())
    }
