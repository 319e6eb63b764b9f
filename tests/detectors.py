"""Functions that every repository of detectors has, in one form or another."""

import torch
from torch import nn


def fuse_conv_and_bn(conv: nn.Conv2d, bn: nn.BatchNorm2d) -> nn.Conv2d:
    """Build a new convolution from one and its norm; the bias of the convolution counts."""
    fused = nn.Conv2d(
        conv.in_channels,
        conv.out_channels,
        kernel_size=conv.kernel_size,
        stride=conv.stride,
        padding=conv.padding,
        groups=conv.groups,
        bias=True,
    )
    fused = fused.requires_grad_(False).to(conv.weight.device)
    w_conv = conv.weight.clone().view(conv.out_channels, -1)
    w_bn = torch.diag(bn.weight.div(torch.sqrt(bn.eps + bn.running_var)))
    fused.weight.copy_(torch.mm(w_bn, w_conv).view(fused.weight.shape))
    b_conv = torch.zeros(conv.weight.size(0), device=conv.weight.device) if conv.bias is None else conv.bias
    b_bn = bn.bias - bn.weight.mul(bn.running_mean).div(torch.sqrt(bn.running_var + bn.eps))
    fused.bias.copy_(torch.mm(w_bn, b_conv.reshape(-1, 1)).reshape(-1) + b_bn)
    return fused


def optimizer_by_attribute(model: nn.Module, lr: float, weight_decay: float) -> torch.optim.Optimizer:
    """Collect every module's ``weight`` and ``bias``, if it has one, as YOLOv7 does."""
    norms, kernels, biases = [], [], []
    for module in model.modules():
        if hasattr(module, "bias") and isinstance(module.bias, nn.Parameter):
            biases.append(module.bias)
        if isinstance(module, nn.BatchNorm2d):
            norms.append(module.weight)
        elif hasattr(module, "weight") and isinstance(module.weight, nn.Parameter):
            kernels.append(module.weight)
    optimizer = torch.optim.SGD(norms, lr, momentum=0.9, nesterov=True)
    optimizer.add_param_group({"params": kernels, "weight_decay": weight_decay})
    optimizer.add_param_group({"params": biases})
    return optimizer
