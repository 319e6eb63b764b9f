"""The CUDA kernels on a CPU: the same sources, run by `tests/kernels/cuda_emulator`, against the reference in float64."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import hypothesis
import pytest
import torch
from cuda_emulator.driver import BF16, FLAGS, FULL, TF32, Emulated, EmulatedModule, compile_emulated, describe
from strategies import blocks as any_block
from torch import Tensor

from orepa_kernels import reference
from orepa_kernels.autograd import Call
from orepa_kernels.backends import cuda as cuda_backend
from orepa_kernels.backends import native
from orepa_kernels.backends.base import Request, Signature, split
from orepa_kernels.nested import program
from orepa_kernels.plan import (
    IMPULSE,
    Average,
    Block,
    Composed,
    Dense,
    Operand,
    PointwiseFilter,
    Separable,
)

#: relative error (norm) allowed against float64
FORWARD = 5e-6
GRADIENT = 5e-6


@pytest.fixture(scope="session")
def tensor_cores(tmp_path_factory: pytest.TempPathFactory) -> Emulated:
    """As from sm_80 on."""
    return Emulated(compile_emulated(tmp_path_factory.mktemp("mma")))


@pytest.fixture(scope="session")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Emulated:
    """As before sm_80."""
    return Emulated(compile_emulated(tmp_path_factory.mktemp("plain"), "-DOREPA_EMULATED_MMA=0"))


@pytest.fixture(params=["tensor_cores", "plain"])
def kernels(request: pytest.FixtureRequest) -> Emulated:
    emulated = request.getfixturevalue(request.param)
    emulated.seed(0)
    return emulated


# --- blocks ---------------------------------------------------------------------------------------------------------------


def orepa_block(
    out: int, channels: int, k: tuple[int, int], groups: int = 1, internal: int = 0, expand: int = 8
) -> Block:
    """Every branch of the OREPA-ResNet block (paper Fig. 6)."""
    per_group, internal = channels // groups, internal or channels
    centre = IMPULSE if k[0] % 2 and k[1] % 2 else Average((2 - k[0] % 2, 2 - k[1] % 2))
    return Block(
        out,
        channels,
        k,
        (
            Dense(Operand("origin", (out, per_group, *k)), 0),
            PointwiseFilter(Operand("avg", (out, per_group, 1, 1)), Average(k), 1),
            PointwiseFilter(Operand("prior", (out, per_group, 1, 1)), Operand("filter", (out, *k)), 2),
            Composed(
                Operand("first", (internal, per_group, 1, 1)),
                Operand("second", (out, internal // groups, *k)),
                identity=(internal // groups) % per_group == 0,
                scale=3,
            ),
            PointwiseFilter(Operand("point", (out, per_group, 1, 1)), centre, 4),
            Separable(Operand("dw", (channels * expand, 1, *k)), Operand("pw", (out, per_group * expand, 1, 1)), 5),
        ),
        groups,
        Operand("scales", (6, out)),
    )


def rep1x1(out: int, channels: int) -> Block:
    middle = min(out, channels)
    return Block(
        out,
        channels,
        (1, 1),
        (
            Dense(Operand("origin", (out, channels, 1, 1)), 0),
            Composed(Operand("first", (middle, channels, 1, 1)), Operand("second", (out, middle, 1, 1)), scale=1),
        ),
        scales=Operand("scales", (2, out)),
    )


def general(out: int, channels: int, first: tuple[int, int], second: tuple[int, int], groups: int = 1) -> Block:
    """Two composed terms without a 1x1 first, the smaller one centred, one not scaled; and an odd assembly of others."""
    size = (first[0] + second[0] - 1, first[1] + second[1] - 1)
    per_group, internal = channels // groups, 3 * groups
    large = (size[0] + 2, size[1] + 2)
    return Block(
        out,
        channels,
        large,
        (
            Composed(Operand("a1", (internal, per_group, *first)), Operand("b1", (out, 3, *second)), scale=0),
            Composed(Operand("a2", (2 * internal, per_group, *large)), Operand("b2", (out, 6, 1, 1))),
            Dense(Operand("small", (out, per_group, *size)), 2),
            PointwiseFilter(Operand("p", (out, per_group, 1, 1)), Operand("shared", (1, *size)), 1),
        ),
        groups,
        Operand("scales", (3, 1)),
    )


def identities(channels: int, groups: int) -> Block:
    """Terms without one of their factors."""
    return Block(
        2 * channels,
        channels,
        (3, 3),
        (
            PointwiseFilter(None, IMPULSE, 0),
            PointwiseFilter(None, Operand("filter", (2 * channels, 3, 3)), 1),
            PointwiseFilter(None, Operand("shared", (1, 1, 3)), 3),
            Separable(Operand("depthwise", (2 * channels, 1, 3, 1)), None, 2),
            Separable(Operand("bare", (2 * channels, 1, 3, 3)), None),
        ),
        groups,
        Operand("scales", (4, 2 * channels)),
    )


def doconv(out: int, channels: int, k: tuple[int, int]) -> Block:
    taps = k[0] * k[1]
    return Block(
        out,
        channels,
        k,
        (Separable(Operand("dw", (channels * taps, 1, *k)), Operand("pw", (out, channels * taps, 1, 1))),),
    )


BLOCKS = {
    "orepa 33x17": orepa_block(33, 17, (3, 3)),
    "orepa 64x64": orepa_block(64, 64, (3, 3)),
    "orepa 8x3": orepa_block(8, 3, (3, 3)),
    "orepa groups 2": orepa_block(20, 24, (3, 3), groups=2),
    "orepa groups 3": orepa_block(9, 12, (3, 3), groups=3, internal=24),
    "orepa 5x5": orepa_block(18, 10, (5, 5)),
    "orepa 7x7": orepa_block(5, 6, (7, 7), expand=9),
    "orepa 1x3": orepa_block(19, 20, (1, 3), internal=40),
    "orepa 2x4": orepa_block(7, 9, (2, 4), expand=3),
    "orepa 9x11": orepa_block(3, 4, (9, 11), expand=2),
    "rep1x1 up": rep1x1(65, 33),
    "rep1x1 down": rep1x1(36, 72),
    "3x3 of 3x3": general(6, 5, (3, 3), (3, 3)),
    "1x3 of 2x2, groups 2": general(8, 6, (1, 3), (2, 2), groups=2),
    "5x5 of 1x1": general(9, 4, (5, 5), (1, 1)),
    "identities": identities(6, 1),
    "identities, groups 3": identities(6, 3),
    "doconv": doconv(10, 7, (3, 3)),
}


@dataclass
class Case:
    """A block with tensors."""

    block: Block
    tensors: dict[str, Tensor]
    upstream: Tensor

    def reference(self) -> Tensor:
        wide = {name: tensor.double() for name, tensor in self.tensors.items()}
        return reference.squeeze_block(self.block, wide)

    def reference_gradients(self) -> dict[str, Tensor]:
        wide = {name: tensor.double().requires_grad_() for name, tensor in self.tensors.items()}
        kernel = reference.squeeze_block(self.block, wide)
        found = torch.autograd.grad(kernel, list(wide.values()), self.upstream.double(), allow_unused=True)
        return dict(zip(wide, found, strict=True))


def channels_last(tensor: Tensor) -> Tensor:
    return tensor.contiguous(memory_format=torch.channels_last) if tensor.dim() == 4 else tensor


def spread(tensor: Tensor) -> Tensor:
    """The same values with gaps between them."""
    wide = torch.full(
        (*tensor.shape[:-2], *tensor.shape[-2:-1], 2 * tensor.shape[-1]), float("nan"), dtype=tensor.dtype
    )
    wide[..., ::2] = tensor
    return wide[..., ::2]


def make(block: Block, layout: Any = None, dtype: torch.dtype = torch.float32) -> Case:
    tensors = {}
    for operand in block.operands:
        tensor = torch.randn(operand.shape).to(dtype)
        tensors[operand.name] = tensor if layout is None else layout(tensor)
    upstream = torch.randn(block.shape).to(dtype)
    return Case(
        block,
        tensors,
        upstream if layout is None else layout(upstream),
    )


def error(found: Tensor, expected: Tensor) -> float:
    return ((found.double() - expected).norm() / expected.norm()).item()


def squeeze(
    kernels: Emulated,
    cases: Sequence[Case],
    dtype: torch.dtype = torch.float32,
    layout: Any = None,
    precision: int = FULL,
) -> list[Tensor]:
    outputs = []
    for case in cases:
        output = torch.full(case.block.shape, float("nan"), dtype=dtype)
        outputs.append(output if layout is None else layout(output))
    described = [describe(c.block, c.tensors, o) for c, o in zip(cases, outputs, strict=True)]
    kernels.run(described, backward=False, precision=precision)
    return outputs


def gradients(
    kernels: Emulated, cases: Sequence[Case], wanted: Sequence[str] | None = None, precision: int = FULL
) -> list[dict[str, Tensor]]:
    found, described = [], []
    for case in cases:
        own = {
            name: torch.full_like(tensor, float("nan"))
            for name, tensor in case.tensors.items()
            if wanted is None or name in wanted
        }
        scales = case.block.scales
        grad_scales = None
        if scales is not None and scales.name in own:
            shape = (scales.shape[0], case.block.out_channels)
            grad_scales = torch.full(shape, float("nan"))
            used = {term.scale for term in case.block.terms}
            grad_scales[[row for row in range(scales.shape[0]) if row not in used]] = 0
        described.append(describe(case.block, case.tensors, case.upstream, own, grad_scales))
        if grad_scales is not None:
            own[scales.name] = grad_scales
        found.append(own)
    kernels.run(described, backward=True, precision=precision)
    for case, own in zip(cases, found, strict=True):
        scales = case.block.scales
        if scales is not None and scales.name in own and scales.shape[1] == 1:
            own[scales.name] = own[scales.name].sum(1, keepdim=True)
    return found


def check_gradients(found: dict[str, Tensor], case: Case, tolerance: float) -> None:
    expected = case.reference_gradients()
    errors = {}
    for name, gradient in found.items():
        want = expected[name]
        errors[name] = error(gradient, torch.zeros_like(gradient).double() + 1 if want is None else want)
    assert max(errors.values()) <= tolerance, errors


# --- against the reference ------------------------------------------------------------------------------------------------

LAYOUTS = {"contiguous": None, "channels_last": channels_last, "spread": spread}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", BLOCKS)
def test_forward(kernels: Emulated, name: str, layout: str) -> None:
    case = make(BLOCKS[name], LAYOUTS[layout])
    (found,) = squeeze(kernels, [case], layout=LAYOUTS[layout])
    assert error(found, case.reference()) <= FORWARD


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", BLOCKS)
def test_backward(kernels: Emulated, name: str, layout: str) -> None:
    case = make(BLOCKS[name], LAYOUTS[layout])
    (found,) = gradients(kernels, [case])
    check_gradients(found, case, GRADIENT)


@pytest.mark.parametrize("name", ["orepa groups 3", "orepa 1x3", "3x3 of 3x3", "identities, groups 3"])
def test_any_subset_of_gradients(kernels: Emulated, name: str) -> None:
    case = make(BLOCKS[name])
    names = list(case.tensors)
    for wanted in [[name] for name in names] + [names[::2], names[1::2]]:
        (found,) = gradients(kernels, [case], wanted)
        assert list(found) == [name for name in names if name in wanted]
        check_gradients(found, case, GRADIENT)


def roundings(found: Tensor, expected: Tensor) -> float:
    """The error (norm) in units of that of rounding once: of the exact result, to the dtype of what was found."""
    rounded = expected.to(found.dtype).double() - expected
    return ((found.double() - expected).norm() / rounded.norm()).item()


HALF = {torch.bfloat16: 1.25, torch.float16: 2.0}  # allowed roundings of a kernel, of which one is unavoidable


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("parameters", "dtype"), [(torch.float32, half) for half in HALF] + [(half, half) for half in HALF], ids=str
)
@pytest.mark.parametrize("name", ["orepa 33x17", "orepa groups 2", "rep1x1 down", "3x3 of 3x3"])
def test_half_precision(kernels: Emulated, name: str, parameters: torch.dtype, dtype: torch.dtype, layout: str) -> None:
    """Kernels of 16 bits, and their gradients, as under autocast or with all of it in 16 bits: one TF32 product."""
    case = make(BLOCKS[name], LAYOUTS[layout], parameters)
    (found,) = squeeze(kernels, [case], dtype, LAYOUTS[layout])
    assert roundings(found, case.reference()) <= HALF[dtype]
    case.upstream = case.upstream.to(dtype)
    (own,) = gradients(kernels, [case])
    if parameters == torch.float32:
        check_gradients(own, case, 2**-10)
    else:
        expected = case.reference_gradients()
        assert max(roundings(gradient, expected[name]) for name, gradient in own.items() if name != "scales") <= 2
        check_gradients({"scales": own["scales"]}, case, 2**-10)


def test_half_precision_starts_out_exact(tensor_cores: Emulated) -> None:
    """A block as initialised, whose only composition is that of the identity: one rounding, nothing else."""
    for dtype in HALF:
        case = make(BLOCKS["orepa 64x64"])
        case.tensors["first"].zero_()
        (found,) = squeeze(tensor_cores, [case], dtype)
        assert roundings(found, case.reference()) <= 1.001


def test_a_list_with_one_float_kernel_is_exact(tensor_cores: Emulated) -> None:
    cases = [make(BLOCKS["rep1x1 down"]), make(BLOCKS["3x3 of 3x3"])]
    outputs = [torch.empty(cases[0].block.shape, dtype=torch.bfloat16), torch.empty(cases[1].block.shape)]
    tensor_cores.run([describe(c.block, c.tensors, o) for c, o in zip(cases, outputs, strict=True)], backward=False)
    assert roundings(outputs[0], cases[0].reference()) <= 1.001
    assert error(outputs[1], cases[1].reference()) <= FORWARD


def test_tf32_is_less_exact_and_an_identity_is_not(tensor_cores: Emulated) -> None:
    case = make(BLOCKS["3x3 of 3x3"])
    for precision in (TF32, BF16):
        (found,) = squeeze(tensor_cores, [case], precision=precision)
        assert 1e-5 < error(found, case.reference()) < 1e-3
        (own,) = gradients(tensor_cores, [case], precision=precision)
        check_gradients(own, case, 1e-3)
    initial = make(BLOCKS["orepa 64x64"])
    initial.tensors["first"].zero_()  # as the block starts out: only the identity
    (found,) = squeeze(tensor_cores, [initial], precision=TF32)
    assert error(found, initial.reference()) <= 2e-7


def test_full_precision_is_that_of_pytorch(tensor_cores: Emulated) -> None:
    """At most twice the error of float32 matrix products, and the noise floor of 2^-20: the rests of products are bfloat16."""
    for name in ("rep1x1 down", "3x3 of 3x3", "5x5 of 1x1"):
        case = make(BLOCKS[name])
        (found,) = squeeze(tensor_cores, [case])
        pytorch = error(reference.squeeze_block(case.block, case.tensors), case.reference())
        assert error(found, case.reference()) <= 2 * pytorch + 2**-20


@pytest.mark.parametrize(("out", "channels", "inner"), [(16, 32, 2048), (16, 2048, 32), (2048, 32, 16)])
def test_long_sums_are_as_exact_as_short_ones(tensor_cores: Emulated, out: int, channels: int, inner: int) -> None:
    """Tensor cores cut sums off, always towards zero: in one chain of 2048 depths that would add up to 1e-5."""
    first, second = Operand("first", (inner, channels, 1, 1)), Operand("second", (out, inner, 1, 1))
    case = make(Block(out, channels, (1, 1), (Composed(first, second, scale=0),), scales=Operand("scales", (1, out))))
    (found,) = squeeze(tensor_cores, [case])
    assert error(found, case.reference()) <= 2**-20
    (own,) = gradients(tensor_cores, [case], ["first", "second"])
    check_gradients(own, case, 2**-20)


# Where lane l has its elements, from the PTX ISA ("Matrix Fragments for mma.m16n8k8" and "... mma.m16n8k16").
# With g = l / 4 and c = l % 4, element i is at (row, column):


def _of_a(bfloat16: bool, g: int, c: int, i: int) -> tuple[int, int]:
    if bfloat16:
        return (g if i < 2 or 4 <= i < 6 else g + 8), (c * 2 + i % 2 if i < 4 else c * 2 + i % 2 + 8)
    return (g if i in (0, 2) else g + 8), (c if i in (0, 1) else c + 4)


def _of_b(bfloat16: bool, g: int, c: int, i: int) -> tuple[int, int]:
    if bfloat16:
        return (c * 2 + i % 2 if i < 2 else c * 2 + i % 2 + 8), g
    return (c if i == 0 else c + 4), g


def _of_c(g: int, c: int, i: int) -> tuple[int, int]:
    return (g if i < 2 else g + 8), c * 2 + i % 2


@pytest.mark.parametrize("bfloat16", [False, True], ids=["m16n8k8 tf32", "m16n8k16 bf16"])
def test_fragments_are_those_of_the_manual(tensor_cores: Emulated, bfloat16: bool) -> None:
    """The emulated instructions, that is; the kernels are right where they are right on these."""
    depth, elements = (16, 2) if bfloat16 else (8, 1)
    a, b, c = (torch.randint(-8, 9, shape).float() for shape in ((16, depth), (depth, 8), (16, 8)))

    def gathered(matrix: Tensor, place: Any, count: int) -> Tensor:
        lanes = [[matrix[place(lane // 4, lane % 4, i)] for i in range(count)] for lane in range(32)]
        return torch.stack([torch.stack(own) for own in lanes])

    dtype = torch.bfloat16 if bfloat16 else torch.float32
    own_a = gathered(a, lambda *at: _of_a(bfloat16, *at), 4 * elements).to(dtype).view(torch.int32).contiguous()
    own_b = gathered(b, lambda *at: _of_b(bfloat16, *at), 2 * elements).to(dtype).view(torch.int32).contiguous()
    found = tensor_cores.mma(own_a, own_b, gathered(c, _of_c, 4).contiguous(), bfloat16)
    assert torch.equal(found, gathered(a @ b + c, _of_c, 4))


def test_many_blocks_in_one_launch(kernels: Emulated) -> None:
    """With one of many taps among them, which puts all of them on large tiles."""
    cases = [make(block) for block in BLOCKS.values()]
    before = kernels.launches()
    found = squeeze(kernels, cases)
    assert kernels.launches() == before + 1
    for case, kernel in zip(cases, found, strict=True):
        assert error(kernel, case.reference()) <= FORWARD
    own = gradients(kernels, cases)
    assert kernels.launches() == before + 2
    for case, gradient in zip(cases, own, strict=True):
        check_gradients(gradient, case, GRADIENT)


def test_as_many_launches_as_parameters_need(plain: Emulated) -> None:
    cases = [make(orepa_block(4, 2, (3, 3), expand=1)) for _ in range(70)]
    before = plain.launches()
    found = squeeze(plain, cases)
    assert plain.launches() == before + 3
    assert max(error(kernel, case.reference()) for case, kernel in zip(cases, found, strict=True)) <= FORWARD


def test_same_bits_whoever_comes_last(kernels: Emulated) -> None:
    cases = [make(BLOCKS[name]) for name in ("orepa 64x64", "identities", "3x3 of 3x3", "doconv")]
    results = []
    for seed in (0, 1, 2):
        kernels.seed(seed)
        tensors = squeeze(kernels, cases)
        for own in gradients(kernels, cases):
            tensors += own.values()
        results.append(tensors)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_order_would_show(plain: Emulated) -> None:
    """Negative control: a sum in order of arrival does change with the seed."""
    sums = {
        plain.unordered_sum(torch.randn(1000, generator=torch.Generator().manual_seed(0)), seed) for seed in range(5)
    }
    assert len(sums) > 1


@pytest.mark.parametrize(
    ("fault", "message"),
    [(0, "never reach"), (1, "different things"), (2, "outside of shared memory"), (3, "misaligned")],
)
def test_emulator_notices(plain: Emulated, fault: int, message: str) -> None:
    if fault == 2 and any("address" in flag for flag in FLAGS):
        pytest.skip("the address sanitizer would end the process there")
    assert message in plain.fault(fault)


def test_unwritten_shared_memory_is_nan(plain: Emulated) -> None:
    assert plain.unwritten() != plain.unwritten()


def test_what_is_not_covered(plain: Emulated) -> None:
    case = make(orepa_block(2, 2, (3, 3)), dtype=torch.float64)
    block = describe(case.block, case.tensors, case.upstream)
    assert "float64" in plain.unsupported_reason(block)
    with pytest.raises(RuntimeError, match="float64"):
        plain.run([block], backward=False)
    large = make(Block(2, 2, (13, 11), (Dense(Operand("w", (2, 2, 13, 11))),)))
    assert "128 taps" in plain.unsupported_reason(describe(large.block, large.tensors, large.upstream))


def test_why_the_kernels_cannot_run(plain: Emulated) -> None:
    assert plain.unusable_reason(-1) == plain.unusable_reason(0) == plain.unusable_reason(0, driver=13020) == ""
    for device in (-1, 0):
        assert "supports CUDA 12.8, and the kernels were built with 13.0" in plain.unusable_reason(device, driver=12080)
    assert plain.unusable_reason(-1, can_load=False) == ""  # which makes no context to find out
    assert "cudaFuncGetAttributes" in plain.unusable_reason(0, can_load=False)


def test_too_little_workspace(plain: Emulated) -> None:
    case = make(BLOCKS["orepa 8x3"])
    grads = {name: torch.empty_like(tensor) for name, tensor in case.tensors.items()}
    block = describe(case.block, case.tensors, case.upstream, grads, torch.empty(6, 8))
    with pytest.raises(RuntimeError, match="of workspace"):
        plain.run([block], backward=True, shorten=4)


@hypothesis.settings(
    max_examples=60,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture, hypothesis.HealthCheck.too_slow],
)
@hypothesis.given(any_block())
def test_any_block(tensor_cores: Emulated, block: Block) -> None:
    """Every plan, nested ones in steps; products may cancel, so the yardstick is what is added up."""
    tensor_cores.seed(0)
    steps = program((block,))
    for step in (*(s for level in steps.inner for s in level), *steps.last):
        case = make(step.block)
        size = squeeze_of_absolutes(case)
        (found,) = squeeze(tensor_cores, [case])
        assert (found.double() - case.reference()).norm() <= FORWARD * size
        (own,) = gradients(tensor_cores, [case])
        for name, expected in case.reference_gradients().items():
            absolute = Case(step.block, {n: t.abs() for n, t in case.tensors.items()}, case.upstream.abs())
            assert (own[name].double() - expected).norm() <= GRADIENT * absolute.reference_gradients()[name].norm()


def squeeze_of_absolutes(case: Case) -> Tensor:
    return (
        Case(case.block, {name: tensor.abs() for name, tensor in case.tensors.items()}, case.upstream)
        .reference()
        .norm()
    )


# --- the backend's Python half ------------------------------------------------------------------------------------------


@pytest.fixture
def backend(tensor_cores: Emulated, monkeypatch: pytest.MonkeyPatch) -> cuda_backend.CudaBackend:
    """The backend with the emulated kernels under it, on CPU tensors."""
    tensor_cores.seed(0)
    monkeypatch.setattr(native, "_C", EmulatedModule(tensor_cores))
    monkeypatch.setattr(cuda_backend, "_where", lambda device: (0, 0, FULL))
    monkeypatch.setattr(cuda_backend, "_index", lambda device: 0)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    return cuda_backend.CudaBackend()


def test_backend(backend: cuda_backend.CudaBackend) -> None:
    cases = [make(BLOCKS[name]) for name in ("orepa 33x17", "3x3 of 3x3", "identities", "doconv")]
    blocks, tensors = [c.block for c in cases], [list(c.tensors.values()) for c in cases]
    operands = [tensor for own in tensors for tensor in own]
    how = torch.float32, torch.channels_last
    prepared = backend.prepare(blocks, Signature.of(operands, *how))
    for found, case in zip(prepared.forward(operands), cases, strict=True):
        assert found.is_contiguous(memory_format=torch.channels_last)
        assert error(found, case.reference()) <= FORWARD
    for block, own in zip(blocks, tensors, strict=True):
        repeated = backend.prepare([block], Signature.of(own, *how))
        for values in (own, [tensor.clone() for tensor in own], [tensor + 1 for tensor in own]):
            (expected,) = backend.prepare([block], Signature.of(values, *how)).forward(values)
            (kernel,) = repeated.forward(values)
            assert torch.equal(kernel, expected) and kernel.stride() == expected.stride()
    for turn in range(2):  # the second has other needs
        needed = [[(index + turn) % 3 > 0 for index in range(len(own))] for own in tensors]
        flat = [need for own in needed for need in own]
        gradients = prepared.backward(operands, [spread(c.upstream) for c in cases], flat)
        for own, case, need in zip(split(blocks, gradients), cases, needed, strict=True):
            assert [gradient is not None for gradient in own] == need
            named = dict(zip(case.tensors, own, strict=True))
            check_gradients({name: g for name, g in named.items() if g is not None}, case, GRADIENT)


@hypothesis.settings(max_examples=25, suppress_health_check=list(hypothesis.HealthCheck))
@hypothesis.given(any_block())
def test_backend_with_nested_blocks(backend: cuda_backend.CudaBackend, block: Block) -> None:
    case = make(block)
    tensors = [tensor.requires_grad_() for tensor in case.tensors.values()]
    (kernel,) = Call(backend, [block], tensors, torch.float32, torch.contiguous_format)(tensors)
    found = torch.autograd.grad(kernel, tensors, case.upstream)
    for tensor in tensors:
        tensor.requires_grad_(False)
    absolute = Case(block, {name: tensor.abs() for name, tensor in case.tensors.items()}, case.upstream.abs())
    assert (kernel.detach().double() - case.reference()).norm() <= 2 * FORWARD * absolute.reference().norm()
    sizes = absolute.reference_gradients()
    for (name, expected), gradient in zip(case.reference_gradients().items(), found, strict=True):
        assert (gradient.double() - expected).norm() <= 2 * GRADIENT * sizes[name].norm(), name


def test_backend_says_why_not(backend: cuda_backend.CudaBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    capability = {"of": (9, 0)}
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability["of"])
    assert backend.available()
    block, gpu, single = BLOCKS["doconv"], torch.device("cuda", 0), torch.float32

    def reason(
        block: Block = block, device: torch.device = gpu, dtype: torch.dtype = single, plain: bool = True
    ) -> str:
        return backend.supports(Request(block, device, dtype, single, plain)).reason

    assert reason() == ""
    assert "float64" in reason(dtype=torch.float64)
    assert "on cpu" in reason(device=torch.device("cpu"))
    assert "subclasses" in reason(plain=False)
    large = Block(2, 2, (13, 11), (Dense(Operand("w", (2, 2, 13, 11))),))
    assert "143 taps" in reason(Block(2, 2, (13, 11), (Dense(large),)))
    for of, covered in (((8, 6), True), ((12, 0), True), ((7, 5), False), ((7, 0), False)):
        capability["of"] = of
        assert (reason() == "") == covered, of
    assert "sm_80, sm_90" in reason()
    capability["of"] = (9, 0)
    for asked, unusable in ((0, "no kernel image"), (-1, "driver supports CUDA 12.8")):
        why = {asked: unusable}
        monkeypatch.setattr(cuda_backend, "_unusable", lambda index, why=why: why.get(index, ""))
        assert (reason() == unusable) == (asked == 0)
        assert (backend.available().reason == unusable) == (asked == -1)
    capability["of"] = (7, 0)
    assert "compute capability 7.0" in backend.available().reason
    # Newer GPUs run what they can compile, if it is there.
    for asked, covered in (
        ("80-real,90-real", False),
        ("90a", False),
        ("90-virtual", True),
        ("80,90-real", True),
        ("all", True),
    ):
        monkeypatch.setattr(native.module(), "cuda_requested_architectures", asked)
        capability["of"] = (12, 0)
        backend.available()
        assert (reason() == "") == covered, asked
