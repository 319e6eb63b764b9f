"""Every tile that the Triton backend may choose, compiled ahead of time for GPUs that are not here.

With the versions of Triton that they were chosen with, no main loop spills; with any other, next to none. Of kernels that
are what they were when the committed results were made, those stand in for a compiler, but for a sample.
"""

import os
from dataclasses import replace

import pytest

pytest.importorskip("triton", reason="needs triton, which this torch does not bring")
if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

import triton_aot
from triton.runtime import driver
from triton_aot import (
    KINDS,
    LARGEST_SHARED,
    MEMORY,
    MOST_IN_LOOPS,
    MOST_SPILLED,
    PRECISIONS,
    TARGETS,
    checked,
    compile_and_listen,
    compile_kernel,
    digest_of,
    kernels_of,
    recorded,
    source_of,
    structures,
)

from orepa_kernels.backends.triton import configs
from orepa_kernels.backends.triton import launcher as launch
from orepa_kernels.backends.triton.kernels.backward import squeeze_backward
from orepa_kernels.backends.triton.kernels.forward import squeeze_forward

#: kernels of the committed results, by all that decides what is compiled: a changed one is not among them, and is compiled
KNOWN = recorded()


def check(target, precision, topology, size, known=KNOWN, **options):
    """Compile all kernels and tiles of a block for one GPU, but for those that are known."""
    count = 0
    for forward, backward in structures(topology, size, **options):
        for name, constants, resources in kernels_of(forward, backward, target, precision, known):
            what = f"{topology} {size}x{size} {options}: {name} {constants} for {target}, {precision}: {resources}"
            assert resources.in_loops <= MOST_IN_LOOPS and resources.spills <= MOST_SPILLED, what
            assert resources.shared <= LARGEST_SHARED[target], what
            assert KNOWN.get(resources.digest, resources) == resources, f"{what}, other than the committed results"
            count += 1
    assert count


@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "topology", "size"),
    [("sm_80", "plain", 3), ("sm_80", "orepa", 3), *(("sm_90", *kind) for kind in KINDS)],
)
def test_a_sample_is_always_compiled(target, topology, size):
    """And needs what the committed results say."""
    check(target, "tf32x3", topology, size, known={})


@pytest.mark.slow
@pytest.mark.parametrize(("topology", "size", "memory", "target", "precision"), checked())
def test_tiles(topology, size, memory, target, precision):
    check(target, precision, topology, size, **MEMORY[memory])


def test_only_an_unchanged_kernel_is_known(monkeypatch):
    """Whatever decides what is compiled changes the digest; and a known kernel that spills is no better than a compiled one."""
    forward, backward = next(structures("orepa", 3))
    constants, options = launch.kernel_arguments(configs.FORWARD_SMALL, forward, "tf32x3")
    other = replace(forward, terms=(*forward.terms[1:], replace(forward.terms[0], top=1)))
    kernels = [
        (source_of(squeeze_forward, forward, constants), "sm_80", options),
        (source_of(squeeze_forward, forward, constants), "sm_90", options),
        (source_of(squeeze_forward, forward, constants), "sm_80", {**options, "num_warps": 2}),
        (source_of(squeeze_forward, forward, {**constants, "PRECISION": "rounded"}), "sm_80", options),
        (source_of(squeeze_forward, other, {**constants, "SPEC": other}), "sm_80", options),
        (source_of(squeeze_backward, forward, constants), "sm_80", options),
    ]
    digests = [digest_of(*kernel) for kernel in kernels]
    monkeypatch.setattr(triton_aot, "SOURCES", triton_aot.SOURCES + b" ")
    digests.append(digest_of(*kernels[0]))
    monkeypatch.undo()
    monkeypatch.setattr(triton_aot.triton, "__version__", "3.0.0")
    digests.append(digest_of(*kernels[0]))
    monkeypatch.undo()
    assert len({*digests}) == len(digests) and digest_of(*kernels[0]) == digests[0]
    _, _, first = next(kernels_of(forward, backward, "sm_80", "tf32x3", KNOWN))
    for worse in ({"spills": MOST_SPILLED + 4}, {"in_loops": MOST_IN_LOOPS + 1}):
        ((name, value),) = worse.items()
        with pytest.raises(AssertionError, match=f"{name}={value}"):
            check("sm_80", "tf32x3", "orepa", 3, known={first.digest: replace(first, **worse)})


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
    assert found[0] == found[1] == found[2] and found[0].in_loops <= MOST_IN_LOOPS and found[0].registers > 16
    narrow = compile_kernel(*kernel, {**options, "maxnreg": 32})
    assert narrow.spills > 0 and narrow.in_loops > 0


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
