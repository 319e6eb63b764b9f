"""What training minimises: cross entropy, with label smoothing, mixup and cutmix where they are asked for."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from timm.data import Mixup
from torch import Tensor

from .config import Config


class Objective:
    """Mixes images, if asked to, and gives the loss.

    What mixup draws comes from NumPy's global generator, which the loop seeds before every step.

    Args:
        config: of the run.
        classes: their number.
    """

    def __init__(self, config: Config, classes: int) -> None:
        self._smoothing = config.label_smoothing
        self._mixup = None
        if config.mixup > 0 or config.cutmix > 0:
            self._mixup = Mixup(
                mixup_alpha=config.mixup,
                cutmix_alpha=config.cutmix,
                label_smoothing=config.label_smoothing,
                num_classes=classes,
            )

    def mix(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Images and targets of a step: the labels themselves, or, mixed, probabilities ``[N, classes]``."""
        return (images, labels) if self._mixup is None else self._mixup(images, labels)

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """The mean over the images, in float32 at least."""
        smoothing = 0.0 if targets.is_floating_point() else self._smoothing  # mixed targets are smooth already
        return cross_entropy(logits, targets, smoothing)


def cross_entropy(logits: Tensor, targets: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Mean cross entropy, in float32 at least, of labels or of probabilities."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    targets = targets.to(wide.dtype) if targets.is_floating_point() else targets
    return F.cross_entropy(wide, targets, label_smoothing=label_smoothing)
