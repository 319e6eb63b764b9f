"""What a training leaves in a model, without the training."""

import torch
from torch import nn


@torch.no_grad()
def trained(model: nn.Module) -> nn.Module:
    """Give batch norms, frozen ones as well, statistics and scales that change something; return the model in eval mode."""
    for module in model.modules():
        if getattr(module, "running_var", None) is not None:
            module.running_mean.normal_()
            module.running_var.uniform_(0.2, 3.0)
            if module.weight is not None:
                module.weight.uniform_(0.5, 2.0)
                module.bias.normal_()
    return model.eval()


@torch.no_grad()
def perturbed(model: nn.Module) -> nn.Module:
    """Move all parameters and statistics of norms from where they start; return the model in eval mode."""
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter), alpha=0.2)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2.0)
    return model.eval()
