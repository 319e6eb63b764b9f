"""One training step, in parts that can be measured apart."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

#: small enough for any block to stay finite on the one batch that it sees again and again
LEARNING_RATE = 1e-4


class TrainingStep:
    """Forward, loss, backward and SGD with momentum, on one fixed batch.

    Args:
        model: in train mode, on its device.
        images: ``[N, C, H, W]``.
        labels: ``[N]``.
        autocast: dtype of autocast, or None. Gradients of float16 are not scaled, as that is no matter of the model.
        compiler: turns the model into what is called, such as `torch.compile`.
    """

    def __init__(
        self,
        model: nn.Module,
        images: Tensor,
        labels: Tensor,
        autocast: torch.dtype | None = None,
        compiler: Callable[[nn.Module], Callable[[Tensor], Tensor]] | None = None,
    ) -> None:
        self.model, self.images, self.labels, self.autocast = model, images, labels, autocast
        self._call = compiler(model) if compiler else model
        self.optimizer = torch.optim.SGD(model.parameters(), LEARNING_RATE, momentum=0.9)

    def __call__(self) -> Tensor:
        """A whole step.

        Returns:
            The loss before it, a scalar without a graph.
        """
        self.clear()
        loss = self.loss(self.logits())
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def logits(self) -> Tensor:
        """``[N, classes]``."""
        with self.casting():
            return self._call(self.images)

    def loss(self, logits: Tensor) -> Tensor:
        return F.cross_entropy(logits.float(), self.labels)

    def clear(self) -> None:
        """Free the gradients."""
        self.optimizer.zero_grad(set_to_none=True)

    def casting(self) -> torch.autocast:
        """The context of its forward pass."""
        return torch.autocast(self.images.device.type, dtype=self.autocast, enabled=self.autocast is not None)

    def standing(self) -> dict[str, dict[int, int]]:
        """What lies in memory between two steps: by part, bytes of each storage by its address."""
        state = [v for s in self.optimizer.state.values() for v in s.values() if isinstance(v, Tensor)]
        return {
            "parameters": storages(self.model.parameters()),
            "optimizer": storages(state),
            "buffers": storages([*self.model.buffers(), self.images, self.labels]),
        }

    def gradients(self) -> list[Tensor]:
        return [p.grad for p in self.model.parameters() if p.grad is not None]


def storages(tensors: object) -> dict[int, int]:
    """Bytes by address, each storage once."""
    found: dict[int, int] = {}
    for tensor in tensors:  # type: ignore[attr-defined]
        storage = tensor.untyped_storage()
        found[storage.data_ptr()] = storage.nbytes()
    return found
