"""The comparison with the authors' code: it is imported from a checkout, and checked like everything else."""

from __future__ import annotations

import sys

import authors
import pytest
from authors import Authors
from test_bench import FakeWatch, config

from orepa.bench import squeeze as bench
from orepa.bench.problem import Shape
from orepa.errors import UserError

THEIRS = """
import torch
from helper import scaled

class OREPA_1x1(torch.nn.Module):
    def __init__(self, i, o, k, padding=0, groups=1):
        super().__init__()
        first, second = ((i, i), (o, i)) if o > i else ((o, i), (o, o))
        self.weight_or1x1_origin = torch.nn.Parameter(torch.zeros(o, i, 1, 1))
        self.weight_or1x1_l2i_conv1 = torch.nn.Parameter(torch.zeros(*first, 1, 1))
        self.weight_or1x1_l2i_conv2 = torch.nn.Parameter(torch.zeros(*second, 1, 1))
        self.vector = torch.nn.Parameter(torch.zeros(2, o))

    def weight_gen(self):
        sequence = torch.einsum("tihw,othw->oihw", self.weight_or1x1_l2i_conv1, self.weight_or1x1_l2i_conv2)
        return scaled(self.weight_or1x1_origin, self.vector[0]) + scaled(sequence, self.vector[1])

class OREPA(torch.nn.Module):
    pass
"""


def test_code_of_a_checkout_is_imported_and_held_against_the_reference(tmp_path) -> None:
    (tmp_path / "blocks.py").write_text(THEIRS)
    (tmp_path / "helper.py").write_text("def scaled(k, s):\n    return k * s.view(-1, 1, 1, 1)\n")
    paths = list(sys.path)
    provider = Authors(tmp_path)
    assert sys.path == paths and not {"blocks", "helper"} & sys.modules.keys()
    shapes = [Shape(6, 4, 1), Shape(4, 6, 1), Shape(4, 6, 1, 2), Shape(4, 3, 7), Shape(4, 4, 5)]
    results = bench.run(config(shapes=shapes, modes=["both"]), {"authors": provider}, stopwatch=FakeWatch())
    assert [row.status for row in results.rows] == ["ok", "ok", "skipped", "skipped", "skipped"], results.rows


@pytest.mark.parametrize("blocks", [None, "import nowhere_to_be_found", "x = 1"])
def test_a_folder_without_their_code(tmp_path, blocks: str | None) -> None:
    if blocks is not None:
        (tmp_path / "blocks.py").write_text(blocks)
    with pytest.raises(UserError, match="blocks.py|importing it failed"):
        Authors(tmp_path)


def test_the_script_refuses_a_folder_without_their_code(capsys: pytest.CaptureFixture[str]) -> None:
    assert authors.main(["nowhere"]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and "no blocks.py" in captured.err
