"""Re-parameterised blocks as their users write them, none of them with a class that the package knows."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


def randomize(model: nn.Module) -> nn.Module:
    """Give a model random parameters and statistics, in eval mode and float64."""
    generator = torch.Generator().manual_seed(0)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_floating_point():
            fan_in = max(tensor[0].numel(), 1) if tensor.dim() > 1 else 1
            tensor.data.normal_(0, fan_in**-0.5, generator=generator)
            if name.endswith("running_var"):
                tensor.abs_().add_(0.5)
    return model.eval().double()


def conv_bn(i, o, k, stride=1, groups=1, dilation=1):
    size = (k, k) if isinstance(k, int) else k
    padding = [dilation * (n // 2) for n in size]
    return nn.Sequential(
        nn.Conv2d(i, o, size, stride, padding, dilation, groups, bias=False),
        nn.BatchNorm2d(o),
    )


class RepConv(nn.Module):
    """A detector's, with None for the branch that a stride forbids."""

    def __init__(self, i=4, o=4, stride=1, groups=1):
        super().__init__()
        self.conv1 = conv_bn(i, o, 3, stride, groups)
        self.conv2 = conv_bn(i, o, 1, stride, groups)
        self.bn = nn.BatchNorm2d(i) if i == o and stride == 1 else None
        self.act = nn.SiLU()

    def forward(self, x):
        identity = 0 if self.bn is None else self.bn(x)
        return self.act(self.conv1(x) + self.conv2(x) + identity)


class RepVGGDW(nn.Module):
    def __init__(self, channels=4):
        super().__init__()
        self.conv = conv_bn(channels, channels, 7, groups=channels)
        self.conv1 = conv_bn(channels, channels, 3, groups=channels)
        self.dim = channels
        self.act = nn.SiLU()

    def forward(self, x):
        return self.act(self.conv(x) + self.conv1(x))


class MobileOne(nn.Module):
    """A loop over branches, with 0 in place of one and stochastic depth."""

    def __init__(self, channels=4, stride=1):
        super().__init__()
        self.branches = nn.ModuleList(conv_bn(channels, channels, 3, stride) for _ in range(3))
        self.scale = conv_bn(channels, channels, 1, stride)
        self.skip = nn.BatchNorm2d(channels) if stride == 1 else None
        self.drop = DropPath()
        self.act = nn.ReLU(inplace=True)

    def forward(self, x):
        out = 0
        if self.skip is not None:
            out = self.skip(x)
        for branch in self.branches:
            out += branch(x)
        return self.act(self.drop(out) + self.scale(x))


class DropPath(nn.Module):
    def forward(self, x):
        if not self.training:
            return x
        return x * (torch.rand(len(x), 1, 1, 1) > 0.5)


class RepMixer(nn.Module):
    def __init__(self, channels=4):
        super().__init__()
        self.norm = nn.BatchNorm2d(channels)
        self.mixer = MobileOne(channels)
        self.mixer.act = nn.Identity()
        self.gamma = nn.Parameter(torch.ones(channels))

    def forward(self, x):
        return x + self.gamma.view(1, -1, 1, 1) * (self.mixer(x) - self.norm(x))


class Gated(nn.Module):
    """A gate that is a function of a parameter, row by row."""

    def __init__(self, channels=4):
        super().__init__()
        self.alpha = nn.Parameter(torch.ones(2, channels))
        self.first = conv_bn(channels, channels, 3, groups=channels)
        self.second = conv_bn(channels, channels, 3, groups=channels)

    def forward(self, x):
        alpha = torch.sigmoid(self.alpha).view(2, -1, 1, 1)
        x = torch.relu(x + alpha[0] * (self.first(x) - x))
        return x + alpha[1] * (self.second(x) - x)


class RepLKNet(nn.Module):
    def __init__(self, channels=3):
        super().__init__()
        self.large = conv_bn(channels, channels, 31, groups=channels)
        self.small = conv_bn(channels, channels, 5, groups=channels)

    def forward(self, x):
        return torch.add(self.large(x), self.small(x))


class UniRepLKNet(nn.Module):
    """Dilated branches inside of a large kernel."""

    def __init__(self, channels=4):
        super().__init__()
        self.origin = nn.Conv2d(channels, channels, 13, padding=6, groups=channels, bias=False)
        self.bn = nn.BatchNorm2d(channels)
        for k, r in ((5, 1), (7, 2), (3, 3), (3, 4), (3, 5)):
            self.add_module(f"dil_{k}_{r}", conv_bn(channels, channels, k, groups=channels, dilation=r))

    def forward(self, x):
        out = self.bn(self.origin(x))
        for k, r in ((5, 1), (7, 2), (3, 3), (3, 4), (3, 5)):
            out = out + getattr(self, f"dil_{k}_{r}")(x)
        return out


class Dilated(nn.Module):
    """Branches of one dilation, which the merged kernel keeps."""

    def __init__(self):
        super().__init__()
        self.branches = nn.ModuleList(conv_bn(4, 6, k, stride=2, dilation=3) for k in (3, (3, 1), 1))

    def forward(self, x):
        return torch.stack([branch(x) for branch in self.branches], 0).sum(0)


class ACNet(nn.Module):
    def __init__(self, square=True):
        super().__init__()
        self.square = conv_bn(4, 6, 3) if square else None
        self.vertical, self.horizontal = conv_bn(4, 6, (3, 1)), conv_bn(4, 6, (1, 3))

    def forward(self, x):
        out = self.vertical(x) + self.horizontal(x)
        return out if self.square is None else self.square(x) + out


class QARepVGG(nn.Module):
    """The norm comes after the sum."""

    def __init__(self):
        super().__init__()
        self.dense, self.point = conv_bn(4, 4, 3), nn.Conv2d(4, 4, 1, bias=False)
        self.bn, self.act = nn.BatchNorm2d(4), nn.ReLU()

    def forward(self, x):
        return self.act(self.bn(self.dense(x) + self.point(x) + x))


class Conv3XC(nn.Module):
    """SPAN's: padding in front of a sequence of biased convolutions."""

    def __init__(self, i=3, o=4):
        super().__init__()
        self.conv = nn.Sequential(nn.Conv2d(i, 2 * i, 1), nn.Conv2d(2 * i, 2 * o, 3), nn.Conv2d(2 * o, o, 1))
        self.sk = nn.Conv2d(i, o, 1)

    def forward(self, x):
        return self.conv(F.pad(x, (1, 1, 1, 1), "constant", 0)) + self.sk(x)


class SESR(nn.Module):
    """A collapsible sequence with a shortcut."""

    def __init__(self):
        super().__init__()
        self.expand = nn.Conv2d(4, 32, 5, padding=2, bias=False)
        self.reduce = nn.Conv2d(32, 4, 1)
        self.act = nn.PReLU(4)

    def forward(self, x):
        return self.act(self.reduce(self.expand(x)) + x)


class ECB(nn.Module):
    """Edge filters after 1x1 convolutions without bias."""

    def __init__(self):
        super().__init__()
        self.conv3x3 = nn.Conv2d(4, 4, 3, padding=1)
        self.expand = nn.Sequential(nn.Conv2d(4, 8, 1, bias=False), nn.Conv2d(8, 4, 3, padding=1))
        self.edges = nn.ModuleList(
            nn.Sequential(nn.Conv2d(4, 4, 1, bias=False), nn.Conv2d(4, 4, 3, padding=1, groups=4)) for _ in range(3)
        )

    def forward(self, x):
        return F.relu(self.conv3x3(x) + self.expand(x) + sum(edge(x) for edge in self.edges) + x)


class DBB(nn.Module):
    """The average branch averages without padding after padding in front."""

    def __init__(self):
        super().__init__()
        self.origin, self.point = conv_bn(4, 6, 3), conv_bn(4, 6, 1)
        self.average = nn.Sequential(
            nn.ZeroPad2d(1), nn.Conv2d(4, 6, 1, bias=False), nn.BatchNorm2d(6), nn.AvgPool2d(3, 1), nn.BatchNorm2d(6)
        )

    def forward(self, x):
        return self.origin(x) + self.point(x) + self.average(x)


class Frozen(nn.Module):
    """A frozen norm of one's own."""

    def __init__(self, channels):
        super().__init__()
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.ones(channels))

    def forward(self, x):
        scale = self.weight * (self.running_var + 1e-5).rsqrt()
        return x * scale.reshape(1, -1, 1, 1) + (self.bias - self.running_mean * scale).reshape(1, -1, 1, 1)


class FrozenRepVGG(nn.Module):
    def __init__(self):
        super().__init__()
        self.dense, self.point = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.Conv2d(4, 4, 1)
        self.norms = nn.ModuleList(Frozen(4) for _ in range(3))

    def forward(self, x):
        branches = [self.norms[0](self.dense(x)), self.norms[1](self.point(x)), self.norms[2](x)]
        return 0.5 * sum(branches) / 2 - 1


class Reflected(nn.Module):
    def __init__(self):
        super().__init__()
        self.bn = nn.BatchNorm2d(4)
        self.dense = nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect")
        self.wide = nn.Conv2d(4, 4, (3, 5), padding="same", padding_mode="reflect", groups=2)

    def forward(self, x):
        x = torch.relu(x)
        return self.dense(self.bn(x)) - self.wide(x)


class Even(nn.Module):
    """Kernels of even size, padded on one side."""

    def __init__(self):
        super().__init__()
        self.pad, self.even = nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(4, 4, 2)
        self.odd = nn.Conv2d(4, 4, 3, padding=1)
        self.same = nn.Conv2d(4, 4, 4, padding="same")

    def forward(self, x):
        return self.even(self.pad(x)) + self.odd(x) - self.same(x)


class Grouped(nn.Module):
    """A depthwise branch, an identity and a grouped convolution."""

    def __init__(self):
        super().__init__()
        self.grouped, self.depthwise = conv_bn(8, 8, 3, groups=2), conv_bn(8, 8, 5, groups=8)

    def forward(self, x):
        return self.grouped(x) - (self.depthwise(x) + x)


#: by name a block, the channels of its input, and the convolutions that are left
BLOCKS = {
    "RepConv": (RepConv, 4, 1),
    "RepConv with stride": (lambda: RepConv(4, 6, 2), 4, 1),
    "RepConv with groups": (lambda: RepConv(4, 4, 1, 2), 4, 1),
    "RepVGGDW": (RepVGGDW, 4, 1),
    "MobileOne": (MobileOne, 4, 1),
    "MobileOne with stride": (lambda: MobileOne(4, 2), 4, 1),
    "RepMixer": (RepMixer, 4, 1),
    "Gated": (Gated, 4, 2),
    "RepLKNet": (RepLKNet, 3, 1),
    "UniRepLKNet": (UniRepLKNet, 4, 1),
    "Dilated": (Dilated, 4, 1),
    "ACNet": (ACNet, 4, 1),
    "ACNet without a square": (lambda: ACNet(False), 4, 1),
    "QARepVGG": (QARepVGG, 4, 1),
    "Conv3XC": (Conv3XC, 3, 1),
    "SESR": (SESR, 4, 1),
    "DBB": (DBB, 4, 1),
    "Frozen": (FrozenRepVGG, 4, 1),
    "Reflected": (Reflected, 4, 1),
    "Even": (Even, 4, 1),
    "a strided sequence": (lambda: nn.Sequential(nn.Conv2d(3, 16, 2, 2), nn.Conv2d(16, 2, 3, 2)), 3, 1),
    "a sequence": (
        lambda: nn.Sequential(nn.Conv2d(3, 9, 3, 2), nn.Conv2d(9, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 1)),
        3,
        2,
    ),
}
