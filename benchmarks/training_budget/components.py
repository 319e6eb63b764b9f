"""Branches added one by one, online against offline: the paper's figure on training budgets."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from orepa.bench.step import StepCase
from orepa.bench.variants import PLAIN, Variant, copy_of, on_3x3
from orepa.topology.catalogue import orepa
from orepa.topology.language import Branch, ConvSpec, Declaration, Layer, Norm, Topology

#: in the order in which they are added: DBB's own first, then those of the paper (Table 2)
BRANCHES = ("origin", "avg", "conv1x1_kxk", "conv1x1", "prior", "dws")
STEM = "deep stem"


@dataclass(frozen=True)
class ComponentsCase(StepCase):
    """A case whose blocks have some of their components only."""

    components: str = ""

    def __str__(self) -> str:
        return f"{super().__str__()}, {self.components}"


def sweep(case: StepCase) -> list[tuple[ComponentsCase, list[Variant]]]:
    """Return one case per number of components, each with plain, online and offline; see `orepa.bench.runner.BenchConfig`.

    Args:
        case: what to train.
    """
    cases = []
    for count in range(1, len(BRANCHES) + 2):
        names, stem = BRANCHES[:count], count > len(BRANCHES)
        last = STEM if stem else names[-1]
        on_stem = "deep_stem" if stem else ""
        variants = [
            Variant(PLAIN, copy_of, PLAIN),
            on_3x3("online", on_stem, topology=branches(names)),
            # A stem of nested blocks has no place for norms inside: it runs unsqueezed, as its branches are.
            on_3x3("offline", on_stem, topology=with_norms(branches(names)), offline=True),
        ]
        components = f"{count}: {'+' if count > 1 else ''}{last}"
        cases.append((ComponentsCase(**{**asdict(case), "components": components}), variants))
    return cases


def branches(names: tuple[str, ...]) -> Declaration:
    """Return the OREPA block with some of its branches."""

    def topology(spec: ConvSpec) -> Topology:
        return Topology(**{name: branch for name, branch in orepa(spec) if name in names})

    return topology


def with_norms(declaration: Declaration) -> Declaration:
    """Return the same block as it would be trained offline: a norm after every layer, as in DBB."""

    def topology(spec: ConvSpec) -> Topology:
        def normed(branch: Branch) -> Branch:
            layers: list[Layer] = []
            for layer in branch.layers:
                layers += [layer, Norm()]
            return Branch(*layers, scale=branch.scale)

        return Topology(**{name: normed(branch) for name, branch in declaration(spec)})

    return topology
