"""The backward kernel: the gradient of every factor of every branch, from that of the kernel, ``dW``.

One launch; the tile map gives each of its programs one of four roles: the two factors of a composed term, a separable term, and
all other terms together. No branch's kernel is recomputed, and only operands are read. Sums over several programs (scales,
``first``, ``depthwise``, ``filter``) go to a workspace, one place per program; a second launch (`sums`) adds them in a fixed
order. There are no atomics, so the bits are the same every time.
"""

import triton
import triton.language as tl

from .access import as_pointer, count_terms, needs_scale_gradient, open_tile, term
from .composed import first_gradient, second_gradient
from .elementwise import elementwise_gradients
from .separable import separable_gradients

#: roles that serve one term: these, plus three times its index
SECOND = tl.constexpr(0)
FIRST = tl.constexpr(1)
SEPARABLE = tl.constexpr(2)
#: the role that serves all dense and pointwise terms
ELEMENTWISE = tl.constexpr(-1)


@triton.constexpr_function
def needs_elementwise(spec):
    """Return whether any gradient of a dense or pointwise term is asked for."""
    return any(spec.needs_gradient(branch) for branch in spec.terms if branch.kind in ("dense", "pointwise"))


@triton.jit
def squeeze_backward(
    addresses, table, tiles, workspace, SPEC: tl.constexpr, PRECISION: tl.constexpr, TILES: tl.constexpr
):
    """Compute all gradients of one tile."""
    workspace = as_pointer(workspace, tl.float32)
    task, block = open_tile(addresses, table, tiles, SPEC)
    role = tl.load(task + 1)
    for t in tl.static_range(count_terms(SPEC)):
        if term(SPEC, t, "kind") == "composed":
            if term(SPEC, t, "d_second") >= 0 or needs_scale_gradient(SPEC, t):
                if role == 3 * t + SECOND:
                    second_gradient(task, workspace, block, SPEC, t, PRECISION, TILES)
            if term(SPEC, t, "d_first") >= 0:
                if role == 3 * t + FIRST:
                    first_gradient(task, workspace, block, SPEC, t, PRECISION, TILES)
        if term(SPEC, t, "kind") == "separable":
            if term(SPEC, t, "d_pointwise") >= 0 or term(SPEC, t, "d_depthwise") >= 0 or needs_scale_gradient(SPEC, t):
                if role == 3 * t + SEPARABLE:
                    separable_gradients(task, workspace, block, SPEC, t, TILES)
    if needs_elementwise(SPEC):
        if role == ELEMENTWISE:
            elementwise_gradients(task, workspace, block, SPEC, TILES)
