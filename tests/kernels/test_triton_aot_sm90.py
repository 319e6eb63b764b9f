"""The other half of test_triton_aot.py: the same for Hopper, whose matrix products are others."""

import pytest

pytest.importorskip("triton", reason="needs triton, which this torch does not bring")

from test_triton_aot import SAME_TILES, Everything, check
from triton_aot import MEMORY


class TestHopper(Everything):
    target = "sm_90"

    @pytest.mark.slow
    @pytest.mark.parametrize("memory", SAME_TILES)
    def test_other_memory_of_the_same_tiles(self, memory):
        check(self.target, "tf32x3", "orepa", 3, **MEMORY[memory])
