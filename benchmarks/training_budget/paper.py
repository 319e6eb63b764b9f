"""Training budgets as the paper reports them (Table 4): four V100, batch 256, 224 pixels."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Budget:
    """One row: GPU memory in GB (per GPU, as printed) and seconds per batch."""

    gigabytes: float
    seconds: float


#: by timm's name of the model, then by re-parameterisation; the first is the base of the ratios
TABLE_4: dict[str, dict[str, Budget]] = {
    "resnet18": {"None": Budget(4.2, 0.086), "DBB": Budget(7.5, 0.241), "OREPA": Budget(5.2, 0.120)},
    "resnet34": {"None": Budget(5.2, 0.116), "DBB": Budget(11.1, 0.424), "OREPA": Budget(6.7, 0.182)},
    "resnet50": {"None": Budget(10.3, 0.204), "DBB": Budget(13.7, 0.380), "OREPA": Budget(11.2, 0.252)},
    "resnet101": {"None": Budget(14.5, 0.382), "DBB": Budget(19.7, 0.641), "OREPA": Budget(16.1, 0.445)},
    "repvgg_a0": {"RepVGG": Budget(3.8, 0.100), "OREPA": Budget(4.2, 0.136)},
    "repvgg_a1": {"RepVGG": Budget(4.8, 0.121), "OREPA": Budget(5.5, 0.147)},
    "repvgg_a2": {"RepVGG": Budget(5.8, 0.170), "OREPA": Budget(7.4, 0.210)},
}
