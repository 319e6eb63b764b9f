"""Every tile that the Triton backend may choose, compiled ahead of time for GPUs that are not here: nothing spills."""

import os

import pytest

pytest.importorskip("triton", reason="needs triton, which this torch does not bring")
if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

from triton.runtime import driver
from triton_aot import LARGEST_SHARED, TARGETS, kernels_of, source_of, structures

import orepa
from orepa_kernels.backends.triton import configs, launch
from orepa_kernels.backends.triton.forward import squeeze_forward

PAPER = [("orepa", 3), ("rep1x1", 1)]
CATALOGUE = [(topology, 3) for topology in orepa.topologies() if "stem" not in topology and topology not in dict(PAPER)]


def check(target, precision, topology, size, **options):
    """Compile all kernels and tiles of a block for one GPU."""
    count = 0
    for forward, backward in structures(topology, size, **options):
        for name, constants, resources in kernels_of(forward, backward, target, precision):
            what = f"{topology} {size}x{size} {options}: {name} {constants} for {target}, {precision}: {resources}"
            assert resources.spills == 0, what
            assert resources.shared <= LARGEST_SHARED[target], what
            count += 1
    assert count


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
@pytest.mark.parametrize("precision", ["tf32x3", "tf32"])
@pytest.mark.parametrize(("topology", "size"), PAPER)
def test_the_blocks_of_the_paper(target, precision, topology, size):
    check(target, precision, topology, size)


def test_one_block_for_each_nvidia_generation():
    check("sm_80", "tf32x3", "plain", 3)
    check("sm_90", "tf32x3", "plain", 3)


@pytest.mark.slow
@pytest.mark.parametrize(("topology", "size"), [*CATALOGUE, ("deep_stem", 7), ("plain_stem", 7), ("orepa", 5)])
def test_the_whole_catalogue(topology, size):
    check("sm_80", "tf32x3", topology, size)  # the precision and the generation that leave the fewest registers


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
@pytest.mark.parametrize("options", [{"listed": True}, {"groups": 32}, {"contiguous": True}, {"half": True}])
def test_other_memory_and_many_blocks(target, options):
    check(target, "tf32x3", "orepa", 3, **options)


@pytest.mark.slow
@pytest.mark.parametrize(("topology", "size"), PAPER)
def test_amd_is_not_shut_out(topology, size):
    check("gfx942", "ieee", topology, size)


class _Hopper:
    """As much of a driver as compiling needs."""

    def get_current_device(self):
        return 0

    def get_current_stream(self, device=0):
        return 0

    def get_current_target(self):
        return TARGETS["sm_90"]


@pytest.mark.parametrize("listed", [False, True])
def test_a_launch_asks_for_what_is_compiled_here(listed):
    """Triton's own look at the arguments of a launch must find the signature and the alignment that these tests assume."""
    forward, _ = next(structures("plain", 3, listed=listed))
    constants, options = launch.split(configs.FORWARD_SMALL, SPEC=forward, PRECISION="tf32x3")
    address = 1 << 40
    own = address if listed else tuple(address + 4096 * slot for slot in range(len(forward.views)))
    before = dict(vars(driver))
    driver.set_active(_Hopper())
    try:
        compiled = squeeze_forward.warmup(own, address, address, **constants, **options, grid=(1, 1, 1))
        # what a launcher relies on once it has launched: constants by position find the same kernel
        again = squeeze_forward.warmup(own, address, address, *constants.values(), **options, grid=(1, 1, 1))
    finally:
        vars(driver).clear()  # no `reset_active`, which looks for a GPU
        vars(driver).update(before)
    mine = source_of(squeeze_forward, forward, constants)
    assert again is compiled
    assert compiled.src.signature == mine.signature
    found = {path: attributes for path, attributes in compiled.src.attrs.items() if path[0] < 3}
    assert found == mine.attrs
