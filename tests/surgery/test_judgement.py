"""`convert` accepts what is right, leaves what was guessed wrong, refuses the rest, and says why."""

import pytest
import torch
from torch import nn
from trained import trained

import orepa
from orepa import ConversionError
from orepa.surgery.consumer_graph import Consumer, Evidence, consumers
from orepa.surgery.convert import compare_outputs


class Guessed(nn.Module):
    """By its place the norm follows the convolution; in truth an activation does (see `guess`)."""

    def __init__(self, activation=nn.ReLU):
        super().__init__()
        self.conv, self.bn, self.act = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), activation()

    def forward(self, x):
        return self.bn(self.act(self.conv(x))) if x.sum() < 1e9 else x


@pytest.fixture
def guess(monkeypatch):
    """Whatever is read of its code, the norm of `Guessed` is found by its place only."""

    def guessing(model):
        found = consumers(model)
        for name, module in model.named_modules():
            if isinstance(module, Guessed):
                prefix = f"{name}." if name else ""
                found[f"{prefix}conv"] = Consumer(f"{prefix}bn", direct=True, evidence=Evidence.ORDER)
        return found

    monkeypatch.setattr("orepa.surgery.convert.consumers", guessing)


def layers(model):
    return {layer.name: (layer.action, layer.detail) for layer in orepa.report(model).layers}


@pytest.mark.parametrize("inplace", [False, True])
def test_a_wrong_guess_is_left_and_the_rest_is_converted(inplace, guess):
    proven = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
    prepared = orepa.prepare(nn.Sequential(nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3)))
    model, x = trained(nn.Sequential(Guessed(), proven, prepared)), torch.randn(2, 3, 8, 8)
    expected = model(x)
    plain = orepa.convert(model, example_inputs=x, inplace=inplace)
    action, detail = layers(plain)["0.conv"]
    assert action == "left" and detail.startswith("norm 0.bn left: only its place says that it follows 0.conv")
    assert layers(plain)["1.0"][0] == "folded" and layers(plain)["2.0"] == ("converted", "orepa + 2.1")
    assert type(plain[0].bn) is nn.BatchNorm2d and orepa.report(plain).error < 1e-5
    torch.testing.assert_close(plain(x), expected, rtol=1e-4, atol=1e-5)


def test_a_wrong_guess_about_a_block_leaves_its_norm(guess):
    model = Guessed()
    model.conv = orepa.OREPAConv(3, 3, 3, padding=1)
    model, x = trained(model), torch.randn(2, 3, 8, 8)
    plain = orepa.convert(model, example_inputs=x)
    action, detail = layers(plain)["conv"]
    assert action == "converted" and "(norm bn left: only its place" in detail and type(plain.conv) is nn.Conv2d
    torch.testing.assert_close(plain(x), model(x), rtol=1e-4, atol=1e-5)


class IllConditioned(nn.Module):
    """The difference of two almost equal branches: one rounding of a weight moves the output by 1e-3."""

    def __init__(self, dtype=None):
        super().__init__()
        self.a, self.b = (nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)) for _ in "ab")
        self.b.load_state_dict(self.a.state_dict())
        self.dtype = dtype

    def forward(self, x):
        return self.a(x.to(self.dtype or x.dtype)) - self.b(x.to(self.dtype or x.dtype))


def ill_conditioned(dtype=None):
    model = trained(IllConditioned(dtype))
    model.b.load_state_dict(model.a.state_dict())
    with torch.no_grad():
        model.b[1].weight.mul_(1 + 3e-5)
        model.b[1].running_mean.add_(1e-5)
    return model


def test_rounding_alone_is_judged_in_float64(caplog):
    model, x = ill_conditioned(), torch.randn(2, 3, 9, 9)
    plain = orepa.convert(model, example_inputs=x)
    error = ((plain(x) - model(x)).norm() / model(x).norm()).item()
    assert error > 1e-4, "otherwise this tests nothing"
    assert [action for action, _ in layers(plain).values()] == ["folded", "folded"]
    assert orepa.report(plain).error < 1e-8 and "that is rounding" in caplog.text
    assert all(p.dtype == torch.float32 for p in plain.parameters())


def test_a_given_tolerance_rules():
    model, x = ill_conditioned(), torch.randn(2, 3, 9, 9)
    with pytest.raises(ConversionError, match="allowed is 1.0e-05"):
        orepa.convert(model, example_inputs=x, tolerance=1e-5)
    assert orepa.report(orepa.convert(model, example_inputs=x, tolerance=1.0)).error > 1e-4


def test_a_model_that_does_not_run_in_float64_is_refused_as_before():
    model, x = ill_conditioned(torch.float32), torch.randn(2, 3, 9, 9)
    with pytest.raises(ConversionError, match="output differs by .* allowed is 1.0e-04"):
        orepa.convert(model, example_inputs=x, inplace=True)
    assert type(model.a[1]) is nn.BatchNorm2d


def test_a_wrong_guess_is_no_rounding(guess):
    """Its effect is as small as that of rounding; only float64 tells them apart."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.ill, self.guess = ill_conditioned(), trained(Guessed(nn.Tanh))

        def forward(self, x):
            return self.ill(x) + 1e-6 * self.guess(x)[:, :1, 1:-1, 1:-1]

    model, x = Net().eval(), torch.randn(2, 3, 9, 9)
    plain = orepa.convert(model, example_inputs=x)
    assert layers(plain)["guess.conv"][0] == "left" and layers(plain)["ill.a.0"][0] == "folded"


def test_the_example_inputs_stay():
    class WritesToItsInput(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = orepa.OREPAConv(3, 3, 3)

        def forward(self, x):
            return self.conv(x.sub_(0.5))

    x = torch.randn(2, 3, 8, 8)
    before = x.clone()
    orepa.convert(WritesToItsInput().eval(), example_inputs=x)
    assert torch.equal(x, before)


# --- messages ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("training", "text"),
    [((1,), "1 is in"), ((1, 3), "1 and 1 other module are in"), ((1, 2, 3), "1 and 2 other modules are in")],
)
def test_modules_in_train_mode_are_counted(training, text):
    model = nn.Sequential(*(nn.Conv2d(3, 3, 1) for _ in range(4))).eval()
    for index in training:
        model[index].train()
    with pytest.raises(ConversionError, match=rf": {text} train mode$"):
        orepa.convert(model)


def test_an_overflow_is_called_one():
    model, x = trained(orepa.prepare(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)))), torch.randn(1, 3, 4, 4)
    with torch.no_grad():
        model[1].weight.fill_(1e38)
        model[1].bias.fill_(1e38)
    with pytest.raises(ConversionError, match="not finite before conversion .*overflow"):
        orepa.convert(model, example_inputs=1e3 * x, fold_bn=False)
    with pytest.raises(ConversionError, match="not finite only after conversion"):
        compare_outputs(x, x / 0, None)
    model = trained(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)))
    with torch.no_grad():
        model[1].running_var.fill_(1e-4)
        model[1].weight.fill_(6e4)
    with pytest.raises(ConversionError, match=r"^0: the kernel overflows in torch.float16; .*fold_bn=False"):
        orepa.convert(model.half())
    assert type(orepa.convert(model, fold_bn=False)[1]) is nn.BatchNorm2d
