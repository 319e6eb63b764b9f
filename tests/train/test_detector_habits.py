"""A detector's training script, written as such scripts are: whatever it does to a model, a prepared one takes.

It has the habits of the YOLO family: a graph by attributes of its layers, an optimizer by attributes of the modules, a moving
average over the state dict, ``fuse()`` before validation, checkpoints that hold whole modules in half precision.
"""

from __future__ import annotations

import math
import pickle
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from detectors import fuse_conv_and_bn, optimizer_by_attribute
from torch import Tensor, nn

import orepa
from orepa import OREPAConv

pytestmark = pytest.mark.usefixtures("one_thread")

SIZE, CLASSES = 32, 2

# --- the layers ---------------------------------------------------------------------------------------------------------------


class Conv(nn.Module):
    """Convolution, norm, activation; without the norm once it is fused."""

    def __init__(self, c1: int, c2: int, k: int = 1, s: int = 1, g: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(c1, c2, k, s, k // 2, groups=g, bias=False)
        self.bn = nn.BatchNorm2d(c2)
        self.act = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn(self.conv(x)))

    def forward_fuse(self, x: Tensor) -> Tensor:
        return self.act(self.conv(x))


class Bottleneck(nn.Module):
    def __init__(self, c: int, shortcut: bool = True) -> None:
        super().__init__()
        self.cv1, self.cv2 = Conv(c, c // 2, 1), Conv(c // 2, c, 3)
        self.add = shortcut

    def forward(self, x: Tensor) -> Tensor:
        return x + self.cv2(self.cv1(x)) if self.add else self.cv2(self.cv1(x))


class Concat(nn.Module):
    def forward(self, x: list[Tensor]) -> Tensor:
        return torch.cat(x, 1)


class Detect(nn.Module):
    """Per cell ``(x, y, size, object, classes...)``: raw maps in training, boxes ``[N, cells, 6]`` too in eval mode."""

    stride: Tensor  # set by the model, from a forward

    def __init__(self, channels: tuple[int, ...]) -> None:
        super().__init__()
        self.no = 4 + CLASSES
        self.grid = [torch.empty(0) for _ in channels]  # made when the first image comes
        self.m = nn.ModuleList(nn.Conv2d(c, self.no, 1) for c in channels)

    def forward(self, x: list[Tensor]) -> Any:
        z = []
        for i, m in enumerate(self.m):
            x[i] = m(x[i]).permute(0, 2, 3, 1).contiguous()
            if not self.training:
                n, ny, nx, _ = x[i].shape
                if self.grid[i].shape[:2] != x[i].shape[1:3]:
                    self.grid[i] = self._make_grid(ny, nx).to(x[i].device)
                y = x[i].sigmoid()
                xy = (y[..., :2] + self.grid[i]) * self.stride[i]
                size = (2 * y[..., 2:3]) ** 2 * 2 * self.stride[i]
                z.append(torch.cat((xy, size, y[..., 3:]), -1).view(n, ny * nx, self.no))
        return x if self.training else (torch.cat(z, 1), x)

    @staticmethod
    def _make_grid(ny: int, nx: int) -> Tensor:
        yv, xv = torch.meshgrid(torch.arange(ny), torch.arange(nx), indexing="ij")
        return torch.stack((xv, yv), 2).float()


class Detector(nn.Module):
    """Layers in a list; ``f`` says where a layer's input comes from, ``i`` which it is."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[tuple[int | list[int], nn.Module]] = [
            (-1, Conv(3, 8, 3, 2)),
            (-1, Bottleneck(8)),
            (-1, nn.Conv2d(8, 16, 3, 2, 1, bias=False)),  # plain layers carry attributes as well
            (-1, nn.BatchNorm2d(16)),
            (-1, nn.SiLU()),
            (-1, Conv(16, 16, 3, 2)),
            (-1, nn.Upsample(scale_factor=2)),
            ([-1, 4], Concat()),
            (-1, Conv(32, 16, 3)),
            ([8, 5], Detect((16, 16))),
        ]
        self.save = set()
        for i, (f, module) in enumerate(layers):
            module.i, module.f, module.type = i, f, type(module).__name__
            module.np = sum(p.numel() for p in module.parameters())
            self.save.update(x % i for x in ([f] if isinstance(f, int) else f) if x != -1)
        self.model = nn.Sequential(*(module for _, module in layers))
        for module in self.modules():
            if type(module) is nn.BatchNorm2d:
                module.eps, module.momentum = 1e-3, 0.03
            elif type(module) is nn.SiLU:
                module.inplace = True
        head = self.model[-1]
        assert isinstance(head, Detect)
        head.stride = torch.tensor([SIZE / x.shape[-2] for x in self.forward(torch.zeros(1, 3, SIZE, SIZE))])
        for conv, stride in zip(head.m, head.stride, strict=True):
            conv.bias.data[3] += math.log(2 / (SIZE / stride) ** 2)  # few cells hold an object
        self.stride = head.stride

    def forward(self, x: Tensor) -> Any:
        y: list[Tensor | None] = []
        for m in self.model:
            if m.f != -1:
                x = y[m.f] if isinstance(m.f, int) else [x if j == -1 else y[j] for j in m.f]
            x = m(x)
            y.append(x if m.i in self.save else None)
        return x

    def fuse(self) -> Detector:
        for m in self.modules():
            if type(m) is Conv and hasattr(m, "bn"):
                m.conv = fuse_conv_and_bn(m.conv, m.bn)
                delattr(m, "bn")
                m.forward = m.forward_fuse
        return self


# --- the script ---------------------------------------------------------------------------------------------------------------


def draw(n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return images with one bright square each, and per image its ``(x, y, size, class)``: the class is its colour."""
    generator = torch.Generator().manual_seed(seed)
    images = 0.1 * torch.randn(n, 3, SIZE, SIZE, generator=generator)
    size = torch.randint(6, 15, (n,), generator=generator)
    corner = (torch.rand(n, 2, generator=generator) * (SIZE - size)[:, None]).long()
    label = torch.randint(CLASSES, (n,), generator=generator)
    for image, s, (x, y), c in zip(images, size.tolist(), corner.tolist(), label.tolist(), strict=True):
        image[c, y : y + s, x : x + s] += 1
    return images, torch.cat((corner + size[:, None] / 2, size[:, None], label[:, None]), 1).float()


def compute_loss(maps: list[Tensor], targets: Tensor, strides: Tensor) -> Tensor:
    """Return objectness everywhere, box and class in the cell of the box's centre, for each level."""
    total = torch.zeros(())
    rows = torch.arange(len(targets))
    for x, stride in zip(maps, strides, strict=True):
        x = x.float()
        cell = (targets[:, :2] / stride).long()
        p = x[rows, cell[:, 1], cell[:, 0]]
        truth = torch.zeros_like(x[..., 3])
        truth[rows, cell[:, 1], cell[:, 0]] = 1
        wanted = torch.cat(((targets[:, :2] / stride) % 1, (targets[:, 2:3] / (2 * stride)).sqrt() / 2), 1)
        total = total + F.binary_cross_entropy_with_logits(x[..., 3], truth) * 10
        total = total + F.l1_loss(p[:, :3].sigmoid(), wanted) * 5
        total = total + F.binary_cross_entropy_with_logits(p[:, 4:], F.one_hot(targets[:, 3].long(), CLASSES).float())
    return total


class ModelEMA:
    """A moving average of everything in the state dict."""

    def __init__(self, model: nn.Module, decay: float = 0.99, tau: float = 10, updates: int = 0) -> None:
        self.ema = deepcopy(model).eval()
        self.updates = updates
        self.decay = lambda x: decay * (1 - math.exp(-x / tau))
        for p in self.ema.parameters():
            p.requires_grad_(False)

    def update(self, model: nn.Module) -> None:
        with torch.no_grad():
            self.updates += 1
            d = self.decay(self.updates)
            msd = model.state_dict()
            for k, v in self.ema.state_dict().items():
                if v.dtype.is_floating_point:
                    v *= d
                    v += (1.0 - d) * msd[k].detach()

    def update_attr(self, model: nn.Module) -> None:
        for k, v in model.__dict__.items():
            if not k.startswith("_") and k not in ("process_group", "reducer"):
                setattr(self.ema, k, v)


def make_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    optimizer = optimizer_by_attribute(model, 0.05, weight_decay=5e-4)
    for group in orepa.parameter_groups(model, 0.05, weight_decay=5e-4, exclude=optimizer):  # the added lines
        optimizer.add_param_group(group)
    orepa.check_optimizer(model, optimizer)
    return optimizer


def intersect_dicts(da: dict[str, Tensor], db: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k: v for k, v in da.items() if k in db and v.shape == db[k].shape}


@torch.no_grad()
def validate(model: nn.Module, images: Tensor, targets: Tensor) -> float:
    """Return the share of images whose best box has the right class and overlaps with the truth by half."""
    model.eval()
    pred = model(images)[0]
    best = pred[torch.arange(len(pred)), pred[..., 3].argmax(1)]
    low = torch.maximum(best[:, :2] - best[:, 2:3] / 2, targets[:, :2] - targets[:, 2:3] / 2)
    high = torch.minimum(best[:, :2] + best[:, 2:3] / 2, targets[:, :2] + targets[:, 2:3] / 2)
    overlap = (high - low).clamp_min(0).prod(1)
    iou = overlap / (best[:, 2] ** 2 + targets[:, 2] ** 2 - overlap)
    return float(((iou > 0.5) & (best[:, 4:].argmax(1) == targets[:, 3])).float().mean())


class Run:
    """Training, a step at a time."""

    accumulate, warmup = 2, 8

    def __init__(self, weights: Path | None = None, epochs: int = 8) -> None:
        torch.manual_seed(0)
        self.model = orepa.prepare(Detector())
        self.optimizer = make_optimizer(self.model)
        self.lf = lambda x: ((1 + math.cos(x * math.pi / epochs)) / 2) * 0.8 + 0.2
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lr_lambda=self.lf)
        self.ema = ModelEMA(self.model)
        self.epoch = 0
        self.losses: list[float] = []
        if weights is not None:
            ckpt = torch.load(weights, weights_only=False)
            state = intersect_dicts(ckpt["model"].float().state_dict(), self.model.state_dict())
            self.model.load_state_dict(state, strict=False)
            assert len(state) == len(self.model.state_dict())
            self.optimizer.load_state_dict(ckpt["optimizer"])
            orepa.check_optimizer(self.model, self.optimizer)
            self.ema.ema.load_state_dict(ckpt["ema"].float().state_dict())
            self.ema.updates = ckpt["updates"]
            self.epoch = ckpt["epoch"] + 1
            self.scheduler.last_epoch = self.epoch - 1

    def train_epoch(self) -> None:
        self.model.train()
        self.optimizer.zero_grad()
        batches = 8
        for i in range(batches):
            ni = i + batches * self.epoch
            images, targets = draw(16, seed=ni)
            if ni <= self.warmup:
                for j, x in enumerate(self.optimizer.param_groups):
                    x["lr"] = x["initial_lr"] * self.lf(self.epoch) * max(ni, 1) / self.warmup
                    x["momentum"] = 0.8 + 0.1 * ni / self.warmup
                    assert j < 2 or "weight_decay" in x
            with torch.autocast("cpu", dtype=torch.bfloat16):
                pred = self.model(images)
            loss = compute_loss(pred, targets, self.model.stride)
            (loss / self.accumulate).backward()
            self.losses.append(loss.item())
            if ni % self.accumulate == self.accumulate - 1:
                self.optimizer.step()
                self.optimizer.zero_grad()
                self.ema.update(self.model)
        self.scheduler.step()
        self.ema.update_attr(self.model)
        self.epoch += 1

    def save(self, path: Path, half: bool = True) -> None:
        model, ema = deepcopy(self.model), deepcopy(self.ema.ema)
        ckpt = {
            "epoch": self.epoch - 1,
            "model": model.half() if half else model,
            "ema": ema.half() if half else ema,
            "updates": self.ema.updates,
            "optimizer": self.optimizer.state_dict(),
        }
        torch.save(ckpt, path)


def strip_optimizer(path: Path) -> None:
    x = torch.load(path, weights_only=False)
    x["model"] = x["ema"]
    for k in ("optimizer", "ema", "updates"):
        x[k] = None
    x["epoch"] = -1
    x["model"].half()
    for p in x["model"].parameters():
        p.requires_grad = False
    torch.save(x, path)


def attempt_load(path: Path, fuse: bool = True) -> nn.Module:
    ckpt = torch.load(path, weights_only=False)
    model = (ckpt.get("ema") or ckpt["model"]).float()
    model = model.fuse().eval() if fuse else model.eval()
    for m in model.modules():
        if type(m) in (nn.SiLU, nn.ReLU, Detect):
            m.inplace = True
        elif type(m) is nn.Upsample and not hasattr(m, "recompute_scale_factor"):
            m.recompute_scale_factor = None
    return model


# --- what must hold ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained() -> Run:
    run = Run()
    while run.epoch < 8:
        run.train_epoch()
    return run


@pytest.fixture
def images() -> Tensor:
    return draw(8, seed=1000)[0]


def assert_same_boxes(actual: Any, expected: Any, rtol: float = 1e-4, atol: float = 1e-4) -> None:
    torch.testing.assert_close(actual[0], expected[0], rtol=rtol, atol=atol)


def test_the_graph_by_attributes_survives_prepare() -> None:
    plain = Detector()
    model = orepa.prepare(plain)
    assert isinstance(model.model[2], OREPAConv) and isinstance(model.model[0].conv, OREPAConv)
    for old, new in zip(plain.model, model.model, strict=True):
        assert (new.i, new.f, new.type, new.np) == (old.i, old.f, old.type, old.np)
    assert model(torch.zeros(1, 3, SIZE, SIZE))[0].shape == (1, 8, 8, 4 + CLASSES)


def test_it_trains_and_validates(trained: Run, images: Tensor) -> None:
    assert sum(trained.losses[-8:]) < 0.6 * sum(trained.losses[:8])
    val = draw(64, seed=2000)
    untrained = validate(orepa.prepare(Detector()), *val)
    fused = deepcopy(trained.ema.ema).fuse()
    score = validate(fused, *val)
    assert score > untrained + 0.3, (score, untrained)
    assert score == validate(deepcopy(trained.ema.ema), *val)
    with torch.no_grad():
        assert_same_boxes(fused(images), trained.ema.ema(images))
    assert not any(isinstance(m, OREPAConv) for m in fused.modules() if m is not fused.model[2])


def test_every_parameter_is_trained_and_averaged(trained: Run) -> None:
    torch.manual_seed(0)
    start = dict(orepa.prepare(Detector()).named_parameters())
    averaged = dict(trained.ema.ema.named_parameters())
    for name, parameter in trained.model.named_parameters():
        assert not torch.equal(parameter, start[name]), name
        assert not torch.equal(parameter, averaged[name]) and not torch.equal(averaged[name], start[name]), name


def test_the_average_is_what_eval_mode_computes(trained: Run, images: Tensor) -> None:
    """Updates through the state dict are seen, right after a forward that has cached the kernels."""
    ema = deepcopy(trained.ema)
    with torch.no_grad():
        before = ema.ema(images)[0]
        ema.decay = lambda _: 0.5
        ema.update(orepa.prepare(Detector()))
        after = ema.ema(images)[0]
        fresh = deepcopy(ema.ema)(images)[0]
    assert not torch.equal(before, after)
    assert torch.equal(after, fresh)


def test_a_mean_teacher_that_writes_data(trained: Run, images: Tensor) -> None:
    teacher, student = deepcopy(trained.ema.ema), orepa.prepare(Detector())
    with torch.no_grad():
        teacher(images)  # caches the kernels
        for t, s in zip(teacher.parameters(), student.parameters(), strict=True):
            t.data.mul_(0.5).add_(s.data, alpha=0.5)
        assert torch.equal(teacher(images)[0], deepcopy(teacher)(images)[0])


def test_a_whole_module_in_full_precision_resumes_bit_by_bit(tmp_path: Path) -> None:
    whole = Run()
    whole.train_epoch()
    whole.save(tmp_path / "last.pt", half=False)
    resumed = Run(tmp_path / "last.pt")
    for run in (whole, resumed):
        run.train_epoch()
    assert resumed.losses == whole.losses[8:]
    for averaged in (False, True):
        a, b = ((run.ema.ema if averaged else run.model).state_dict() for run in (whole, resumed))
        for name, value in a.items():
            assert torch.equal(value, b[name]), name


def test_a_whole_module_in_half_precision_resumes_and_deploys(trained: Run, images: Tensor, tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    trained.save(path)
    resumed = Run(path)
    for name, value in trained.model.state_dict().items():
        expected = value.half().float() if value.is_floating_point() else value
        assert torch.equal(resumed.model.state_dict()[name], expected), name
    resumed.train_epoch()
    assert resumed.losses[0] < trained.losses[0] / 2

    strip_optimizer(path)
    unfused, fused = attempt_load(path, fuse=False), attempt_load(path)
    expected = unfused(images)
    assert_same_boxes(fused(images), expected)
    assert_same_boxes(unfused(images), trained.ema.ema(images), rtol=2e-2, atol=0.5)  # pixels; weights have 11 bits


def test_it_converts(trained: Run, images: Tensor) -> None:
    expected = trained.ema.ema.eval()(images)
    plain = orepa.convert(trained.ema.ema.eval(), example_inputs=images)  # update_attr has copied the mode
    assert not any(isinstance(m, OREPAConv) for m in plain.modules())
    assert_same_boxes(plain(images), expected)
    assert [(m.i, m.f, m.type) for m in plain.model] == [(m.i, m.f, m.type) for m in trained.model.model]
    assert_same_boxes(deepcopy(plain).fuse()(images), expected)  # habits die hard
    assert_same_boxes(orepa.convert(deepcopy(trained.ema.ema).fuse().eval(), example_inputs=images)(images), expected)
    assert all(type(g) is Tensor for model in (trained.ema.ema, plain) for g in model.model[-1].grid)
    assert_same_boxes(pickle.loads(pickle.dumps(plain))(images), expected)


def test_frozen_layers(images: Tensor) -> None:
    """``--freeze``: the first layers by the names of their parameters, after prepare; their norms stay in train mode."""
    model = orepa.prepare(Detector())
    for name, p in model.named_parameters():
        p.requires_grad = not any(name.startswith(f"model.{i}.") for i in range(3))
    pg = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(pg, 0.05)
    assert orepa.check_optimizer(model, optimizer) == ([], [])
    before = deepcopy(model.state_dict())
    compute_loss(model(images), draw(8, seed=1000)[1], model.stride).backward()
    optimizer.step()
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k]) and "running" not in k}
    assert not any(k.startswith(("model.0.conv", "model.1.cv1.conv", "model.2.")) for k in changed)
    assert "model.8.conv.origin_weight" in changed
    orepa.convert(model.eval(), example_inputs=images)
