"""The other half of test_triton_aot.py: the same for Hopper, whose matrix products are others."""

import pytest

pytest.importorskip("triton", reason="needs triton, which this torch does not bring")

from test_triton_aot import OTHER_MEMORY, check
from triton_aot import MEMORY, catalogue


@pytest.mark.slow
@pytest.mark.parametrize(("topology", "size"), catalogue())
def test_the_whole_catalogue(topology, size):
    check("sm_90", "tf32x3", topology, size)


@pytest.mark.slow
@pytest.mark.parametrize(("topology", "size"), catalogue())
def test_the_whole_catalogue_in_tf32(topology, size):
    check("sm_90", "tf32", topology, size)


@pytest.mark.slow
@pytest.mark.parametrize(("topology", "memory"), OTHER_MEMORY)
def test_other_memory_and_many_blocks(topology, memory):
    check("sm_90", "tf32x3", topology, 3, **MEMORY[memory])


@pytest.mark.slow
@pytest.mark.parametrize(("topology", "memory"), OTHER_MEMORY)
def test_other_memory_and_many_blocks_in_tf32(topology, memory):
    check("sm_90", "tf32", topology, 3, **MEMORY[memory])
