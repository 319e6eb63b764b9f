"""How exactly matrix products in float32 are to be computed, whichever of PyTorch's two ways it was told by."""

from __future__ import annotations

import torch


def float32_precision() -> str:
    """``"highest"``, ``"high"`` or ``"medium"``.

    `torch.get_float32_matmul_precision` raises where somebody has said TF32 the newer way, through
    ``torch.backends.fp32_precision`` or ``torch.backends.cuda.matmul.fp32_precision`` (torch 2.9 and later).
    """
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:
        return "high" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "highest"
