"""Every tile that the Triton backend may choose, compiled ahead of time for GPUs that are not here.

With the versions of Triton that they were chosen with, nothing spills; with any other, next to nothing.
"""

import os

import pytest

pytest.importorskip("triton", reason="needs triton, which this torch does not bring")
if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

from triton.runtime import driver
from triton_aot import (
    LARGEST_SHARED,
    MEMORY,
    MOST_SPILLED,
    PRECISIONS,
    TARGETS,
    catalogue,
    compile_and_listen,
    compile_kernel,
    kernels_of,
    source_of,
    structures,
)

from orepa_kernels.backends.triton import configs
from orepa_kernels.backends.triton import launcher as launch
from orepa_kernels.backends.triton.kernels.forward import squeeze_forward

#: where tiles have rules of their own: the paper's block, and those that spilled with larger tiles
OTHER_MEMORY = [
    *(("orepa", "contiguous"), ("acnet", "contiguous"), ("ecb", "contiguous"), ("expandnet", "contiguous")),
    *(("orepa", "bfloat16"), ("repvgg_dense", "bfloat16")),
]
#: where the tiles are the same and only addresses and conversions differ: once, for the generation with the larger tiles
SAME_TILES = ["many blocks", "32 groups", "autocast"]
#: one for each kind of tile that has products: several taps at once, one tap, a composition after another
OTHER_PRECISION = [("orepa", 3), ("rep1x1", 1), ("expandnet", 3)]


def check(target, precision, topology, size, **options):
    """Compile all kernels and tiles of a block for one GPU."""
    count = 0
    for forward, backward in structures(topology, size, **options):
        for name, constants, resources in kernels_of(forward, backward, target, precision):
            what = f"{topology} {size}x{size} {options}: {name} {constants} for {target}, {precision}: {resources}"
            assert resources.spills <= MOST_SPILLED, what
            assert resources.shared <= LARGEST_SHARED[target], what
            count += 1
    assert count


def test_one_block_for_each_nvidia_generation():
    check("sm_80", "tf32x3", "plain", 3)
    check("sm_90", "tf32x3", "plain", 3)


class Everything:
    """All tiles for one generation of GPUs; a test file for each, so that two processes can share the work."""

    target: str

    @pytest.mark.slow
    @pytest.mark.parametrize(("topology", "size"), catalogue())
    def test_the_whole_catalogue(self, topology, size):
        check(self.target, "tf32x3", topology, size)

    @pytest.mark.slow
    @pytest.mark.parametrize(("topology", "size"), OTHER_PRECISION)
    def test_each_kind_of_tile_in_tf32(self, topology, size):
        """With fewer registers than above; of the whole catalogue: benchmarks/triton_resources.py."""
        check(self.target, "tf32", topology, size)

    @pytest.mark.slow
    @pytest.mark.parametrize(("topology", "memory"), OTHER_MEMORY)
    def test_other_memory(self, topology, memory):
        """At the precision that needs the most registers; the other, and all other blocks: benchmarks/triton_resources.py."""
        check(self.target, "tf32x3", topology, 3, **MEMORY[memory])


class TestAmpere(Everything):
    target = "sm_80"


@pytest.mark.slow
@pytest.mark.parametrize(("topology", "size"), [("orepa", 3), ("rep1x1", 1)])
def test_amd_is_not_shut_out(topology, size):
    check("gfx942", "ieee", topology, size)


def test_without_products_there_is_no_precision():
    """Where `kernels_of` compiles one kernel for all precisions, they have one."""
    forward, _ = next(structures("plain", 3))
    split = [launch.kernel_arguments(configs.FORWARD_SMALL, forward, precision) for precision in PRECISIONS]
    one, other = (
        compile_and_listen(source_of(squeeze_forward, forward, constants), "sm_80", options)[0].asm["ptx"]
        for constants, options in split
    )
    assert one == other


def test_resources_are_those_of_the_kernel_wherever_it_comes_from(monkeypatch, tmp_path):
    """Compiled now, asked for again, and out of a cache that another program has filled; and spills would be seen."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    forward, _ = next(structures("orepa", 3))
    constants, options = launch.kernel_arguments(configs.FORWARD_SMALL, forward, "tf32x3")
    kernel = squeeze_forward, "sm_80", forward, constants
    found = [compile_kernel(*kernel, options) for _ in range(2)]
    (kept,) = tmp_path.rglob("ptxas.log")
    kept.unlink()
    found.append(compile_kernel(*kernel, options))
    assert found[0] == found[1] == found[2] and found[0].spills <= MOST_SPILLED and found[0].registers > 16
    assert compile_kernel(*kernel, {**options, "maxnreg": 32}).spills > 0


class _Hopper:
    """As much of a driver as compiling needs."""

    def get_current_device(self):
        return 0

    def get_current_stream(self, device=0):
        return 0

    def get_current_target(self):
        return TARGETS["sm_90"]


@pytest.mark.parametrize("batched", [False, True])
def test_a_launch_asks_for_what_is_compiled_here(batched):
    """Triton's own look at the arguments of a launch must find the signature and the alignment that these tests assume."""
    forward, _ = next(structures("plain", 3, batched=batched))
    constants, options = launch.kernel_arguments(configs.FORWARD_SMALL, forward, "tf32x3")
    address = 1 << 40
    own = address if batched else tuple(address + 4096 * slot for slot in range(len(forward.views)))
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
