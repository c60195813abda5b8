"""Generated functions against the mods as they are written, and against autograd."""

import itertools
import linecache
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import hypothesis
import pytest
import torch
import triton
import triton.language as tl
from hypothesis import assume, given
from torch import Tensor

import ringflex as rf
from attention_cases import DEVICE, MASKS, SCORES, Case
from kernels.arithmetic import arithmetic, half_scores
from kernels.random_scores import EXTENT, HEADS, RandomScore, random_scores
from masks.random_masks import REFUSALS, RandomMask, random_masks
from ringflex.kernels import lowering
from ringflex.kernels.lowering import lower_gradient, lower_mask, lower_score
from ringflex.kernels.mod_tables import TableSpec, gradient_arguments, table_arguments
from ringflex.kernels.triton_math import ADD
from ringflex.kernels.triton_mods import ScoreMod, accumulators, in_32_bits
from ringflex.masks.pointwise import pointwise
from ringflex.masks.trace import trace_mask, trace_score

SIZE = 32  # of the tile; positions from EXTENT on repeat the last
EXAMPLES = hypothesis.settings(max_examples=100, suppress_health_check=list(hypothesis.HealthCheck))


@triton.jit
def apply_mask(result, tables, mask_mod: tl.constexpr, LAST: tl.constexpr, SIZE: tl.constexpr):
    b, h = tl.program_id(0), tl.program_id(1)
    at = tl.arange(0, SIZE)
    place = tl.minimum(at, LAST)
    seen = mask_mod(b, h, place[:, None], place[None, :], tables)
    seen = tl.where(seen, 1, tl.zeros([SIZE, SIZE], tl.int32))
    start = (b * tl.num_programs(1) + h) * SIZE * SIZE
    tl.store(result + start + at[:, None] * SIZE + at[None, :], seen)


@triton.jit
def apply_score(
    scores, upstream, result, dscores, tables, into,
    score_mod: tl.constexpr, score_grad: tl.constexpr, LAST: tl.constexpr, SIZE: tl.constexpr,
    Q_AXIS: tl.constexpr,
):  # fmt: skip
    b, h = tl.program_id(0), tl.program_id(1)
    at = tl.arange(0, SIZE)
    place = tl.minimum(at, LAST)
    offsets = (b * tl.num_programs(1) + h) * SIZE * SIZE
    if Q_AXIS == 0:
        offsets += at[:, None] * SIZE + at[None, :]
        q_idx, kv_idx = place[:, None], place[None, :]
    else:
        offsets += at[None, :] * SIZE + at[:, None]
        q_idx, kv_idx = place[None, :], place[:, None]
    s = tl.load(scores + offsets)
    inside = (q_idx == q_idx) & (at[:, None] <= LAST) & (at[None, :] <= LAST)
    grad = tl.where(inside, tl.load(upstream + offsets), 0.0)
    tl.store(result + offsets, score_mod(s, b, h, q_idx, kv_idx, tables))
    ds = score_grad(s, grad, b, h, q_idx, kv_idx, tables, into, 0, Q_AXIS)
    tl.store(dscores + offsets, ds)


def lowered_mask(mask_mod: Callable[..., Tensor], B: int = 2, H: int = HEADS) -> Tensor:
    traced = trace_mask(mask_mod).to(DEVICE)
    body = pointwise(traced)
    tables = [in_32_bits(t) for t in body.tables(traced.captures)]
    specs = [TableSpec.of(t) for t in tables]
    result = torch.full((B, H, SIZE, SIZE), -1, dtype=torch.int32, device=DEVICE)
    apply_mask[(B, H)](
        result, table_arguments(tables, specs), lower_mask(body, specs).function, EXTENT - 1, SIZE
    )
    return result[:, :, :EXTENT, :EXTENT] != 0


def grid(B: int = 2, H: int = HEADS) -> tuple[Tensor, ...]:
    return torch.meshgrid(*(torch.arange(n) for n in (B, H, EXTENT, EXTENT)), indexing="ij")


def check_score(score_mod: Callable[..., Tensor], q_axis: int, tolerance: float = 3e-5) -> None:
    """Values and gradients against the traced graph, evaluated under autograd."""
    B, H, generator = 2, HEADS, torch.Generator().manual_seed(3)
    shape = (B, H, SIZE, SIZE)
    scores, upstream = (torch.randn(shape, generator=generator).to(DEVICE) for _ in range(2))
    traced = trace_score(score_mod, torch.float32)
    mod = ScoreMod(traced, DEVICE, approximate_tanh=False)
    wanted = [t.requires_grad for t in mod.body.tables(traced.captures)]
    pairs = accumulators(mod, wanted)
    result, dscores = torch.full_like(scores, torch.nan), torch.full_like(scores, torch.nan)
    apply_score[(B, H)](
        scores, upstream, result, dscores, mod.arguments, gradient_arguments(pairs),
        mod.function(), mod.gradient(wanted), EXTENT - 1, SIZE, q_axis,
    )  # fmt: skip
    dcaptures = [
        torch.zeros(c.shape, device=c.device) if c.requires_grad else None for c in traced.captures
    ]
    remaining = iter(total for total, _ in pairs)
    dtables = [next(remaining) if want else None for want in wanted]
    mod.add_to_captures(dtables, dcaptures)

    inside = slice(0, EXTENT)
    leaf = scores[:, :, inside, inside].cpu().requires_grad_()
    captures = [c.detach().cpu().requires_grad_(c.requires_grad) for c in traced.captures]
    expected = traced.evaluate(*grid(), score=leaf, captures=captures).expand_as(leaf)
    leaves = [leaf, *(c for c in captures if c.requires_grad)]
    grads = torch.autograd.grad(
        expected, leaves, upstream[:, :, inside, inside].cpu(), allow_unused=True
    )
    found = [result[:, :, inside, inside], dscores[:, :, inside, inside]]
    found += [d for d in dcaptures if d is not None]
    wanted_values = [expected.detach(), *grads]
    for x, want, leaf_ in zip(found, wanted_values, [leaf, *leaves], strict=True):
        want = torch.zeros_like(leaf_) if want is None else want
        scale = max(1.0, float(want.abs().max()))
        torch.testing.assert_close(x.cpu() / scale, want / scale, rtol=0, atol=tolerance)


@pytest.mark.parametrize("name", MASKS)
def test_masks(name: str) -> None:
    case = Case(mask=name, seq_len=EXTENT, Hq=HEADS)
    assert torch.equal(
        lowered_mask(case.mask_mod()).cpu(), case.mask_mod()(*grid()).expand(2, 3, 24, 24)
    )


@pytest.mark.parametrize("q_axis", [0, 1])
@pytest.mark.parametrize("name", SCORES)
def test_scores(name: str, q_axis: int) -> None:
    case = Case(score=name, seq_len=EXTENT, Hq=HEADS, dtype=torch.float32)
    problem = case.build(device=DEVICE)
    assert problem.score is not None
    check_score(problem.score, q_axis)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's, of extreme values
@EXAMPLES
@given(random_masks())
def test_random_masks(mask: RandomMask) -> None:
    """Integers exactly; masks of floating point may differ where a comparison is a close call."""
    assume(mask.base == 0 and "1e+30" not in mask.text)  # beyond any remainder's precision
    fn = mask.function()
    try:
        expected = trace_mask(fn).evaluate(*grid(2, 2)).expand(2, 2, EXTENT, EXTENT)
    except RuntimeError as error:
        assume(not any(refusal in str(error) for refusal in REFUSALS))
        raise
    try:
        found = lowered_mask(fn, 2, 2).cpu()
    except NotImplementedError as error:
        assume("(in fp64)" not in str(error))  # quotients in fp64 are refused
        raise
    different = (found != expected).float().mean()
    exact = not any(x.is_floating_point() for x in mask.captured.values())
    exact &= not any(sign in mask.text for sign in (".", "torch.", "/"))
    assert different <= (0 if exact else 0.02), mask.text


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@EXAMPLES
@given(random_scores())
def test_random_scores(score: RandomScore) -> None:
    check_score(score.function(DEVICE), 0)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("name", arithmetic())
def test_arithmetic_is_torchs(name: str) -> None:
    """As on the CPU: on a GPU, torch multiplies by the reciprocal of a number."""
    sizes = (1, 2, EXTENT, EXTENT)
    elements = itertools.product(*(torch.arange(n) for n in sizes))
    written = arithmetic(torch.device("cpu"))[name]
    expected = torch.stack([written(*element) for element in elements]).view(sizes)
    fn = arithmetic()[name]
    assert torch.equal(lowered_mask(fn, *sizes[:2]).cpu(), expected)
    traced = trace_mask(fn).evaluate(*(x.to(DEVICE) for x in grid(*sizes[:2])))
    assert torch.equal(traced.expand(sizes).cpu(), expected)


def test_booleans_are_not_added() -> None:
    """In one bit True + True is False; only the interpreter's is True."""
    body = pointwise(trace_mask(lambda b, h, q, k: (q >= k) + (k < 4)))
    source = lower_mask(body, []).source
    assert "|" in source and "+" not in source


@pytest.mark.parametrize("name", half_scores())
def test_half_precision_is_torchs(name: str) -> None:
    check_score(half_scores()[name], 0, tolerance=1e-3 if "once" in name else 3e-5)


def test_what_fp64_cannot_be_divided_exactly_is_refused() -> None:
    double = torch.arange(EXTENT, dtype=torch.float64)
    for mod in (lambda b, h, q, k: double[q] // 2.0 < k, lambda b, h, q, k: double[q] % 3.0 < 1):
        traced = trace_mask(mod)
        body = pointwise(traced)
        with pytest.raises(NotImplementedError, match="in fp64"):
            lower_mask(body, [TableSpec.of(t) for t in body.tables(traced.captures)])


def score_source(mod: Callable[..., Tensor], tanh: str = "accurate_tanh") -> str:
    traced = trace_score(mod, torch.float32)
    body = pointwise(traced)
    specs = [TableSpec.of(t) for t in body.tables(traced.captures)]
    return lower_score(body, specs, tanh=tanh).source


def test_the_gpus_tanh_is_of_single_precision() -> None:
    slopes = torch.arange(EXTENT, dtype=torch.float64)
    single = score_source(lambda s, b, h, q, k: torch.tanh(s / 30.0), "fast_tanh")
    double = score_source(lambda s, b, h, q, k: torch.tanh(s * slopes[q]), "fast_tanh")
    assert "fast_tanh" in single and "accurate_tanh" not in single
    assert "accurate_tanh" in double and "fast_tanh" not in double


@pytest.mark.parametrize("dtype", [torch.uint16, torch.complex64, torch.uint32])
def test_other_dtypes_are_refused_by_name(dtype: torch.dtype) -> None:
    with pytest.raises(NotImplementedError, match=f"it computes in {dtype}.*backend='eager' can"):
        score_source(lambda s, b, h, q, k: s + q.to(dtype).real.float())


def test_erfc_keeps_its_digits() -> None:
    x = torch.linspace(-5, 9, EXTENT, device=DEVICE)
    check_score(lambda s, b, h, q, k: torch.erfc(x[q]) * torch.exp(x[q] * x[q]) + s, 0, 3e-5)


def test_tables_of_every_kind() -> None:
    """Rank, strides, dtype, negative places, scalars, and what does not depend on the indices."""
    table = torch.randn(6, 5, 24, 2)[1:, :, :, 1].permute(1, 0, 2)  # [5, 5, 24], no unit stride
    flags = torch.arange(24) % 3 == 0
    small = torch.arange(24, dtype=torch.uint8)
    number = torch.tensor(0.7)

    def mask(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        doubled = (table * 2).abs()  # once, not at every score
        return (doubled[-1 - h, b + 1, q] > number + 0.3) ^ flags[k - 24] ^ (small[q] > small[k])

    table, flags, small, number = (x.to(DEVICE) for x in (table, flags, small, number))
    expected = trace_mask(mask).to(torch.device("cpu")).evaluate(*grid())
    assert torch.equal(lowered_mask(mask).cpu(), expected)


def test_unknown_operations_are_refused_by_name_and_line() -> None:
    def score_mod(s: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        y = s.abs() + 1
        return torch.lgamma(y)

    body = pointwise(trace_score(score_mod, torch.float32))
    with pytest.raises(NotImplementedError) as caught:
        lower_score(body, [])
    text = str(caught.value)
    assert "score_mod 'score_mod' uses aten.lgamma.default" in text
    assert "test_lowering.py" in text and "return torch.lgamma(y)" in text
    assert "backend='eager' can" in text


def test_long_vectors_are_refused() -> None:
    left = torch.randn(EXTENT, 300)
    mod = lambda s, b, h, q, k: s + (left[q] * left[k]).sum(-1)
    traced = trace_score(mod, torch.float32)
    body = pointwise(traced)
    specs = [TableSpec.of(t) for t in body.tables(traced.captures)]
    with pytest.raises(NotImplementedError, match="300 elements per score, more than 256"):
        lower_score(body, specs)


def test_the_same_code_is_one_function() -> None:
    """Other captured values and sizes make no other function; another unit stride does."""

    def function(ids: Tensor) -> Any:
        traced = trace_mask(rf.causal() & rf.document(ids))
        body = pointwise(traced)
        tables = body.tables(traced.captures)
        return lower_mask(body, [TableSpec.of(t) for t in tables]).function

    first = function(torch.arange(100) // 9)
    assert first is function(torch.arange(999) // 50)
    assert first is not function((torch.arange(200) // 9)[::2])


def test_gradients_that_are_not_wanted_are_not_computed() -> None:
    bias = torch.randn(HEADS, 9, requires_grad=True)
    mod = ScoreMod(
        trace_score(rf.relative_position(bias), torch.float32), DEVICE, approximate_tanh=False
    )
    assert mod.gradient([False]) is not mod.gradient([True])
    body = mod.body
    from ringflex.masks.pointwise import derivative

    sources = [
        lower_gradient(derivative(body, [wanted]), mod.specs).source for wanted in (False, True)
    ]
    assert ["scatter_add" in source for source in sources] == [False, True]


def test_mode_of_addition() -> None:
    assert ADD.value == 0  # as apply_score passes it


def test_functions_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """A number that anneals is another function every step."""
    monkeypatch.setattr(lowering, "_KEPT", 3)
    monkeypatch.setattr(lowering, "_functions", OrderedDict())

    def function(cap: float) -> Any:
        return lower_score(pointwise(trace_score(rf.softcap(cap), torch.float32)), []).function

    made = [function(cap) for cap in (1.0, 2.0, 3.0, 4.0)]
    assert len(lowering._functions) == 3
    assert function(4.0) is made[3] and function(1.0) is not made[0]
    assert f"<ringflex {made[1].__name__}>" not in linecache.cache


def test_offsets_into_the_gradient_of_an_expanded_table() -> None:
    """It is contiguous, so it may need 64 bits where the table does not."""
    table = torch.empty(1, 1).expand(2**16, 2**16)
    assert TableSpec.of(table).wide and not TableSpec.of(table[: 2**14]).wide
