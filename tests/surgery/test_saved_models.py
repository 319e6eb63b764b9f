"""A converted model is plain PyTorch: it loads where this package is not installed."""

import subprocess
import sys

import pytest
import torch
from torch import nn

import orepa
from orepa.surgery.report import Report

WITHOUT_OREPA = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("orepa", "orepa_kernels"):
            raise ImportError(name)
sys.meta_path.insert(0, Blocked())
import torch
for path in sys.argv[1:]:
    model, x, y = torch.load(path, weights_only=False)
    with torch.no_grad():
        assert torch.equal(model(x), y), path
assert not [name for name in sys.modules if name.startswith("orepa")]
"""


def models():
    norm = nn.BatchNorm2d(8)
    yield (
        "orepa",
        orepa.prepare(nn.Sequential(nn.Conv2d(3, 8, 3), norm, nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8))),
    )
    yield "repvgg", nn.Sequential(orepa.RepVGGBlock(3, 8, act=nn.PReLU), orepa.RepVGGBlock(8, 8, act=None))
    yield "offline", nn.Sequential(orepa.OfflineConv(3, 8, 3, topology="dbb"))
    policy = {"topology": "dbb", "offline": True}
    yield (
        "prepared offline",
        orepa.prepare(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)), lambda name, conv: policy),
    )


MODELS = dict(models())


@pytest.mark.parametrize("fold", [True, False])
def test_pickles_load_without_this_package(fold, tmp_path):
    x = torch.randn(2, 3, 8, 8)
    for kind, model in MODELS.items():
        with torch.no_grad():
            plain = orepa.convert(model.eval(), fold_bn=fold, example_inputs=x)
            torch.save((plain, x, plain(x)), tmp_path / f"{kind}.pt")
        loaded, *_ = torch.load(tmp_path / f"{kind}.pt", weights_only=False)
        assert orepa.report(loaded) == orepa.report(plain), kind
    command = [sys.executable, "-c", WITHOUT_OREPA, *(str(path) for path in tmp_path.glob("*.pt"))]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert len(command) == 3 + len(MODELS)


def test_reports_of_older_pickles_are_read():
    model = nn.Conv2d(3, 3, 1)
    model.__dict__["_orepa_report"] = old = Report("convert", [], (1, 2), 0.5)
    assert orepa.report(model) is old
