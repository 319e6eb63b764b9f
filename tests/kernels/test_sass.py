"""Reading machine code, and what the committed audit of the kernels says."""

import json
from pathlib import Path

import pytest
import sass
import torch

from orepa_kernels import dispatch

AUDIT = Path(__file__).resolve().parents[2] / "benchmarks" / "results" / "sass_audit.json"

#: a loop around a main loop, of which one part is skipped, and a loop without products
CODE = """
        /*0000*/                   LDG.E.128 R4, desc[UR8][R2.64] ;          /* 0x0 */
                                                                             /* 0x0 */
        /*0010*/                   LDG.E R8, desc[UR8][R2.64+0x10] ;         /* 0x0 */
        /*0020*/                   IADD3 R9, R7, R8, RZ ;                    /* 0x0 */
        /*0030*/                   LDG.E.U16 R10, desc[UR8][R2.64] ;         /* 0x0 */
        /*0040*/                   STL [R1], R10 ;                           /* 0x0 */
        /*0050*/                   LDGSTS.E.BYPASS.128 [R5], desc[UR8][R2.64] ; /* 0x0 */
        /*0060*/              @!P0 BRA 0x80 ;                                /* 0x0 */
        /*0070*/                   LDL.LU R3, [R1] ;                         /* 0x0 */
        /*0080*/                   HMMA.1688.F32.TF32 R32, R48, R50, RZ ;    /* 0x0 */
        /*0090*/                   HMMA.16816.F32.BF16 R32, R48, R50, R32 ;  /* 0x0 */
        /*00a0*/               @P1 HGMMA.64x32x8.F32.TF32 R32, R48, gdesc[UR28], RZ, !UPT ; /* 0x0 */
        /*00b0*/              @!P5 BRA 0x50 ;                                /* 0x0 */
        /*00c0*/               @P5 BRA 0x30 ;                                /* 0x0 */
        /*00d0*/                   FADD R1, R1, R2 ;                         /* 0x0 */
        /*00e0*/               @P5 BRA 0xd0 ;                                /* 0x0 */
        /*00f0*/                   EXIT ;                                    /* 0x0 */
"""


def test_a_main_loop_is_the_innermost_one_with_products():
    kernel = sass.read("own", CODE)
    (loop,) = kernel.loops
    # the correction in bfloat16 is no product that anybody asked for
    assert (loop.slots, loop.tensor, loop.macs) == (7, 3, 16 * 8 * 8 + 64 * 32 * 8 // 4)
    assert loop.loads == {16: 1} and loop.local == 1
    assert kernel.rest.slots == 9 and kernel.rest.local == 1 and kernel.rest.loads == {2: 1, 4: 1, 16: 1}
    assert kernel.rest.in_flight == 2  # the sum waits for both, and the third comes after


def audit():
    return json.loads(AUDIT.read_text(encoding="utf-8"))


def test_no_main_loop_spills():
    loops = [(row, loop) for row in audit()["kernels"] if row["gpu"] in ("sm_80", "sm_90") for loop in row["loops"]]
    assert loops and not [row for row, loop in loops if loop["local"]]


@pytest.mark.parametrize(("gpu", "major"), [("sm_80", 8), ("sm_90", 9)])
def test_the_automatic_choice_has_the_lower_bound_first(gpu, major, monkeypatch):
    """An estimate, of the products of ResNet-18 under autocast. On a GPU, `orepa bench squeeze` says whether it is right."""
    own = [row for row in audit()["bounds"] if (row["gpu"], row["path"], row["what"]) == (gpu, "autocast", "resnet18")]
    triton, cuda = (sum(row[name] for row in own) for name in ("triton", "cuda"))
    assert len(own) == 2 and (major in dispatch.TRITON_FIRST) == (triton < cuda)
    monkeypatch.setattr(dispatch, "_REASONS", {"cuda": "", "triton": ""})
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (major, 0))
    first = "triton" if triton < cuda else "cuda"
    assert dispatch._order(torch.device("cuda", 0))[0] == first
    assert sorted(dispatch._order(torch.device("cuda", 0))) == sorted(dispatch.NAMES)
    assert dispatch._order(torch.device("cpu")) == dispatch.NAMES
    dispatch._REASONS["cuda"] = "not here"
    assert dispatch._order(torch.device("cuda", 0)) == dispatch.NAMES


def test_a_worse_main_loop_is_noticed():
    import sass_audit

    loop = {"macs_per_slot": 100.0, "local": 0}
    row = {"provider": "triton", "gpu": "sm_90", "mode": "forward", "path": "fp32", "block": "b", "tile": "t"}

    def complaints(**changes):
        return sass_audit.worse([row | {"loops": [loop | changes]}], [row | {"loops": [loop]}])

    assert not complaints() and not complaints(macs_per_slot=200.0) and not complaints(macs_per_slot=99.0)
    assert "100.0 products per slot, 0 spills -> 90.0" in complaints(macs_per_slot=90.0)[0]
    assert "1 spills" in complaints(local=1)[0]
    assert "not in sass_audit.json" in sass_audit.worse([row | {"loops": [loop]}], [])[0]
    assert "not in sass_audit.json" in sass_audit.worse([row | {"loops": [loop, loop]}], [row | {"loops": [loop]}])[0]
