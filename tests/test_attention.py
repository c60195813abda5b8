"""flex_attention() in one process: against torch's, against the reference, and its options."""

import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxOutput, AuxRequest
from torch.nn.attention.flex_attention import BlockMask as TorchBlockMask
from torch.nn.attention.flex_attention import create_block_mask as torch_create_block_mask
from torch.nn.attention.flex_attention import flex_attention as torch_flex_attention

import ringflex as rf
from attention_cases import (
    MASKS,
    SCORES,
    Case,
    Problem,
    assert_within,
    attend,
    deviation,
    fp64_tolerance,
    plain_tolerance,
    reference,
    tensors,
)
from ringflex.attention import _of_all_sequences
from ringflex.masks import trace_cache

SAME = {"rtol": 1e-9, "atol": 1e-12}  # of fp64 results that differ by rounding only


@pytest.fixture(autouse=True)
def quiet_torch() -> Iterator[None]:
    """torch warns that it runs without a compiler; here it serves as an oracle."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="flex_attention called without torch.compile")
        yield


def our_mask(case: Case) -> rf.BlockMask:
    return rf.create_block_mask(
        case.mask_mod(), case.B, case.Hq, case.seq_len, case.seq_len, BLOCK_SIZE=case.block_size
    )


def torch_mask(case: Case) -> TorchBlockMask:
    return torch_create_block_mask(
        case.mask_mod(), case.B, case.Hq, case.seq_len, case.seq_len,
        device="cpu", BLOCK_SIZE=case.block_size,
    )  # fmt: skip


def by_torch(p: Problem, mask: TorchBlockMask) -> tuple[Tensor, Tensor]:
    with torch.no_grad():  # on a CPU torch's has no backward
        out, aux = torch_flex_attention(
            p.q, p.k, p.v, p.score, mask, enable_gqa=True, return_aux=AuxRequest(lse=True)
        )
    return out, aux.lse


def assert_same_as_torch(case: Case) -> None:
    """With our block mask and with torch's own."""
    p, theirs = case.build(), torch_mask(case)
    expected_out, expected_lse = by_torch(p, theirs)
    for mask in (our_mask(case), theirs):
        with torch.no_grad():
            out, lse = rf.flex_attention(
                p.q, p.k, p.v, p.score, mask, enable_gqa=True, return_lse=True
            )
        torch.testing.assert_close(out, expected_out, **SAME)
        torch.testing.assert_close(lse, expected_lse, **SAME)
        assert (out[lse == -torch.inf] == 0).all()


@pytest.mark.parametrize("mask", MASKS)
def test_masks_mean_what_they_mean_to_torch(mask: str) -> None:
    assert_same_as_torch(Case(mask=mask))


@pytest.mark.parametrize("score", SCORES)
def test_scores_mean_what_they_mean_to_torch(score: str) -> None:
    assert_same_as_torch(Case(mask="causal documents", score=score))


@pytest.mark.parametrize(
    "case",
    [
        Case(Hq=4, Hkv=4),
        Case(Hq=4, Hkv=1, D=16, Dv=4),
        Case(seq_len=1),
        Case(seq_len=128, block_size=128),
        Case(seq_len=300, block_size=128, mask="tree", score="composed"),
        Case(bshd=True, mask="document rows"),
    ],
    ids=str,
)
def test_shapes_as_torch(case: Case) -> None:
    assert_same_as_torch(case)


WORDS = torch.randn(129, 8)
HALF_WORDS = WORDS.half()
WEIGHT = torch.tensor(1.5)
VECTOR_SCORES: dict[str, Callable[..., Tensor]] = {
    "einsum": lambda s, b, h, q, k: s + torch.einsum("i,i", WORDS[q], WORDS[k]) * 0.1,
    "logsigmoid": lambda s, b, h, q, k: torch.nn.functional.logsigmoid(s * WEIGHT),
    "halves by a constant": lambda s, b, h, q, k: (
        s + (HALF_WORDS[q] @ torch.ones(8, dtype=torch.half)) * 0.1
    ),
    "halves by halves": lambda s, b, h, q, k: (
        s + ((HALF_WORDS[q].float() * 2).half() @ HALF_WORDS[k]) * 0.1
    ),
}


@pytest.mark.parametrize("mask", ["full", "past chunks", "causal"])
@pytest.mark.parametrize("name", VECTOR_SCORES)
def test_scores_of_vectors_as_torch(name: str, mask: str) -> None:
    """Also where a mask has no full blocks, or no partial ones."""
    case = Case(mask=mask, seq_len=128, block_size=32, dtype=torch.float32)
    p = replace(case.build(), score=VECTOR_SCORES[name])
    expected, _ = by_torch(p, torch_mask(case))
    with torch.no_grad():
        out = rf.flex_attention(p.q, p.k, p.v, p.score, our_mask(case), enable_gqa=True)
    torch.testing.assert_close(out, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("place", [2, torch.tensor(2), torch.tensor([0, 2])[1]], ids=repr)
def test_a_captured_index_without_dimensions(place: Any) -> None:
    q, k, v = (torch.randn(1, 2, 20, 8) for _ in range(3))
    bias = torch.randn(6, requires_grad=True)
    out = rf.flex_attention(q, k, v, lambda s, b, h, i, j: s * bias[place])
    expected = rf.flex_attention(q * bias[2].detach(), k, v)
    torch.testing.assert_close(out, expected)
    (grad,) = torch.autograd.grad(out.square().sum(), [bias])
    assert grad[2] != 0 and not grad[[0, 1, 3, 4, 5]].any()


def test_what_inference_mode_makes_serves_training() -> None:
    """A mask, a mod's trace and the constants in it are kept beyond their first use."""
    flag = torch.tensor(True)
    q, k, v = (torch.randn(1, 2, 40, 8, requires_grad=True) for _ in range(3))
    score = lambda s, b, h, i, j: s * torch.tensor([1.0, 2.0, 3.0])[i % 3]
    with torch.inference_mode():
        mask = rf.create_block_mask(lambda b, h, i, j: (i >= j) & flag, None, None, 40, 40)
        evaluated = rf.flex_attention(q, k, v, score, mask)
    out = rf.flex_attention(q, k, v, score, mask)
    assert torch.equal(out, evaluated)
    out.sum().backward()
    assert all(x.grad is not None and x.grad.isfinite().all() for x in (q, k, v))


def test_the_default_device_is_for_the_users_tensors() -> None:
    q, k, v = (torch.randn(1, 2, 40, 8) for _ in range(3))
    bias, ids = torch.randn(2), torch.arange(40) // 16
    score = lambda s, b, h, i, j: s + bias[h]
    attend = lambda: rf.flex_attention(
        q, k, v, score,
        rf.create_block_mask(rf.causal() & rf.document(ids), None, None, 40, 40, BLOCK_SIZE=16),
    )  # fmt: skip
    expected = attend()
    with torch.device("meta"):
        trace_cache._traces.clear()
        assert torch.equal(attend(), expected)
        plan = rf.plan(rf.causal() & rf.document(ids), 40, block_size=16)
        assert torch.equal(plan.unshard(plan.shard(q, 2), 2), q)


def test_it_may_stand_in_compiled_code() -> None:
    """Dynamo leaves it alone: what it would trace is the choice of kernels, anew at every shape."""
    q, k, v = (torch.randn(1, 2, 40, 8) for _ in range(3))
    mask = rf.create_block_mask(rf.causal(), None, None, 40, 40)

    def layer(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor = rf.flex_attention(q.sin(), k, v, rf.softcap(5.0), mask)
        return out.cos()

    torch._dynamo.reset()
    compiled = torch.compile(layer, backend="eager")
    torch.testing.assert_close(compiled(q, k, v), layer(q, k, v))
    assert torch._dynamo.utils.counters["frames"]["total"] < 10


def test_torch_block_mask_without_a_mask_mod() -> None:
    """Lists of blocks alone: what they list is visible, every element of it. (torch's uncompiled
    path would not look at them.)"""
    counts = torch.tensor([[[1, 2, 1]]], dtype=torch.int32)
    indices = torch.tensor([[[[0, 1, 2], [2, 0, 1], [1, 0, 2]]]], dtype=torch.int32)
    mask = TorchBlockMask.from_kv_blocks(counts, indices, BLOCK_SIZE=16)
    seen = torch.tensor([[1, 0, 0], [1, 0, 1], [0, 1, 0]], dtype=torch.bool)
    seen = seen.repeat_interleave(16, 0).repeat_interleave(16, 1)
    q, k, v = (torch.randn(1, 2, 48, 8, dtype=torch.float64) for _ in range(3))
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen)
    torch.testing.assert_close(rf.flex_attention(q, k, v, block_mask=mask), expected, **SAME)


def test_queries_and_keys_of_different_lengths() -> None:
    q = torch.randn(2, 4, 70, 8, dtype=torch.float64)
    k, v = (torch.randn(2, 2, 203, 8, dtype=torch.float64) for _ in range(2))
    mod = lambda b, h, q_idx, kv_idx: kv_idx <= q_idx + 133
    theirs = torch_create_block_mask(mod, None, None, 70, 203, device="cpu", BLOCK_SIZE=32)
    ours = rf.create_block_mask(mod, None, None, 70, 203, BLOCK_SIZE=(16, 32))
    for transposed in (False, True):
        if transposed:  # more queries than keys
            q, k, v = k.repeat(1, 2, 1, 1), q[:, :2], q[:, 2:]
            mod = lambda b, h, q_idx, kv_idx: kv_idx <= q_idx
            theirs = torch_create_block_mask(mod, None, None, 203, 70, device="cpu", BLOCK_SIZE=32)
            ours = rf.create_block_mask(mod, None, None, 203, 70, BLOCK_SIZE=(32, 16))
        expected = torch_flex_attention(q, k, v, block_mask=theirs, enable_gqa=True)
        for mask in (ours, theirs):
            leaves = [x.detach().requires_grad_() for x in (q, k, v)]
            out = rf.flex_attention(*leaves, block_mask=mask, enable_gqa=True)
            torch.testing.assert_close(out, expected, **SAME)
            gradients = torch.autograd.grad(out.square().sum(), leaves)
            assert [g.shape for g in gradients] == [x.shape for x in (q, k, v)]
            assert all(bool(g.isfinite().all()) and bool(g.any()) for g in gradients)


def test_pages_of_keys_and_values() -> None:
    """A cache that sequences share, by torch's page table: blocks in the order of their pages."""
    paging = pytest.importorskip("torch.nn.attention.experimental._paged_attention")
    B, S, page = 3, 150, 32
    lengths = torch.tensor([150, 40, 97])
    table = paging.PagedAttention(24, page, B, device="cpu")
    for tokens in (64, S):  # in turns, so that a sequence's pages are apart
        for b in range(B):
            table.reserve(torch.tensor(b), torch.tensor(tokens))
    q, k, v = (torch.randn(B, h, S, 16, dtype=torch.float64) for h in (4, 2, 2))
    keys, values = (torch.full((1, 2, 24 * page, 16), 1e3).double() for _ in range(2))
    table.assign(torch.arange(B), torch.arange(S).expand(B, S), k, v, keys, values)
    logical = torch_create_block_mask(
        lambda b, h, i, j: i >= j, B, None, S, S, device="cpu", BLOCK_SIZE=page
    )
    physical = table.convert_logical_block_mask(logical, kv_len=lengths)
    distance = lambda s, b, h, i, j: s - 0.1 * (i - j)
    found = rf.flex_attention(
        q, keys, values, table.get_score_mod(distance, kv_len=lengths), physical, enable_gqa=True
    )
    mask = rf.create_block_mask(
        lambda b, h, i, j: (i >= j) & (j < lengths[b]), B, None, S, S, BLOCK_SIZE=page
    )
    expected = rf.flex_attention(q, k, v, distance, mask, enable_gqa=True)
    torch.testing.assert_close(found, expected, **SAME)


def test_sequences_may_share_keys_and_values() -> None:
    q = torch.randn(3, 4, 20, 8, dtype=torch.float64)
    k, v = (torch.randn(1, 4, 30, 8, dtype=torch.float64, requires_grad=True) for _ in range(2))
    shared = rf.flex_attention(q, k, v)
    each = rf.flex_attention(q, *(x.expand(3, -1, -1, -1) for x in (k, v)))
    assert torch.equal(shared, each)
    for found, expected in zip(*(torch.autograd.grad(x.sum(), (k, v)) for x in (shared, each))):
        assert torch.equal(found, expected) and found.shape[0] == 1
    with pytest.raises(ValueError, match="one batch size"):
        rf.flex_attention(q, k, v.expand(3, -1, -1, -1))
    of_one = _of_all_sequences(q[:1], k, v)  # a view would cost each call some microseconds
    assert of_one[0] is k and of_one[1] is v


def test_no_block_mask_is_full_attention() -> None:
    q = torch.randn(2, 4, 45, 8, dtype=torch.float64, requires_grad=True)
    k = torch.randn(2, 4, 77, 8, dtype=torch.float64, requires_grad=True)
    v = torch.randn(2, 4, 77, 12, dtype=torch.float64, requires_grad=True)
    out = rf.flex_attention(q, k, v)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(out, expected, **SAME)
    weight = torch.randn_like(out)
    ours, theirs = (torch.autograd.grad((x * weight).sum(), (q, k, v)) for x in (out, expected))
    for one, other in zip(ours, theirs):
        torch.testing.assert_close(one, other, **SAME)
    scaled = rf.flex_attention(q, k, v, scale=0.5)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=0.5)
    torch.testing.assert_close(scaled, expected, **SAME)


@pytest.mark.parametrize(
    "case",
    [
        Case(),
        Case(mask="mixed heads", score="composed", dlse=True, sinks=True),
        Case(mask="past chunks", dlse=True, Hkv=1),
        Case(mask="future", sinks=True, score="by position"),
        Case(mask="nothing"),
        Case(mask="document rows", score="instead", bshd=True),
        Case(mask="full", seq_len=1, score="temperature"),
    ],
    ids=str,
)
def test_gradients(case: Case) -> None:
    found, expected = tensors(attend(case.build(), our_mask(case))), tensors(reference(case))
    deviations = {name: deviation(found[name], x) for name, x in expected.items()}
    assert_within(deviations, fp64_tolerance(case))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_low_precision(dtype: torch.dtype) -> None:
    case = Case(mask="tree", score="relative", sinks=True, dlse=True, dtype=dtype, seq_len=300)
    result = attend(case.build(), our_mask(case))
    assert result.out.dtype == result.dq.dtype == result.dk.dtype == result.dv.dtype == dtype
    assert result.lse.dtype == torch.float32
    found, expected = tensors(result), tensors(reference(case))
    deviations = {name: deviation(found[name], x) for name, x in expected.items()}
    assert_within(deviations, plain_tolerance(case))


@pytest.mark.parametrize("score", ["relative", "instead", "temperature"])
def test_half_precision_captures_are_summed_in_fp32(score: str) -> None:
    """Their gradient is that of an fp32 parameter of the same values, rounded once."""
    case = Case(mask="causal", score=score, dtype=torch.bfloat16, seq_len=1000, block_size=64)
    problem, mask = case.build(), our_mask(case)
    wide = replace(case.build(torch.float32), **{n: getattr(problem, n) for n in "qkv"})
    wide = replace(wide, dout=problem.dout)
    narrow_gradients, wide_gradients = (attend(p, mask).dcaptures for p in (problem, wide))
    for narrow, exact in zip(narrow_gradients, wide_gradients, strict=True):
        assert (narrow.dtype, exact.dtype) == (torch.bfloat16, torch.float32)
        one_rounding = torch.finfo(torch.bfloat16).eps / 2
        noise = float(exact.abs().max()) * 100 * torch.finfo(torch.float32).eps
        torch.testing.assert_close(narrow.float(), exact, rtol=one_rounding, atol=noise)


def test_lse_and_auxiliary_outputs() -> None:
    case = Case(mask="past chunks")
    p, mask = case.build(), our_mask(case)
    arguments = {"block_mask": mask, "enable_gqa": True}
    out = rf.flex_attention(p.q, p.k, p.v, **arguments)
    same, lse = rf.flex_attention(p.q, p.k, p.v, return_lse=True, **arguments)
    again, aux = rf.flex_attention(p.q, p.k, p.v, return_aux=AuxRequest(lse=True), **arguments)
    _, empty = rf.flex_attention(p.q, p.k, p.v, return_aux=AuxRequest(), **arguments)
    assert isinstance(out, Tensor)
    assert torch.equal(out, same) and torch.equal(out, again)
    assert isinstance(aux, AuxOutput) and aux.lse is not None and torch.equal(aux.lse, lse)
    assert (empty.lse, empty.max_scores) == (None, None)
    assert lse.shape == (2, 4, 129)
    expected = reference(case).lse
    assert (lse[:, :, :40] == -torch.inf).all()  # natural log; a row that sees nothing
    torch.testing.assert_close(lse, expected, **SAME)


def test_lse_through_auxiliary_outputs_has_a_gradient() -> None:
    q, k, v = (torch.randn(1, 2, 50, 8, dtype=torch.float64) for _ in range(3))
    gradients = []
    for aux in (False, True):
        leaf = q.clone().requires_grad_()
        if aux:
            lse = rf.flex_attention(leaf, k, v, return_aux=AuxRequest(lse=True))[1].lse
        else:
            lse = (leaf @ k.mT / 8**0.5).logsumexp(-1)
        gradients += torch.autograd.grad(lse.square().sum(), leaf)
    torch.testing.assert_close(*gradients, **SAME)


def test_sinks_are_a_key_without_a_value() -> None:
    """gpt-oss's: a zero value at a key whose score is the sink."""
    q, k, v = (torch.randn(2, 4, 50, 8, dtype=torch.float64) for _ in range(3))
    sinks = torch.randn(4, dtype=torch.float64)
    out, lse = rf.flex_attention(q, k, v, sinks=sinks, return_lse=True)
    longer = [torch.cat([x, torch.zeros(2, 4, 1, 8, dtype=x.dtype)], dim=2) for x in (k, v)]
    score = lambda s, b, h, q_idx, kv_idx: torch.where(kv_idx == 50, sinks[h], s)
    expected, expected_lse = rf.flex_attention(q, *longer, score, return_lse=True)
    torch.testing.assert_close(out, expected, **SAME)
    torch.testing.assert_close(lse, expected_lse, **SAME)


def test_a_sink_of_minus_infinity_is_none() -> None:
    case = Case(mask="past chunks", sinks=True)
    problem = case.build()
    assert problem.sinks is not None
    found = attend(
        replace(problem, sinks=torch.full_like(problem.sinks, -torch.inf)), our_mask(case)
    )
    without = attend(replace(problem, sinks=None), our_mask(case))
    for name, x in tensors(without).items():
        assert deviation(tensors(found)[name], x) == 0, name
    assert found.dsinks is not None and (found.dsinks == 0).all()


def test_infinite_scores_hide() -> None:
    """A score mod may mask by -inf, as FlexAttention's examples do; also a whole row."""
    q, k, v = (torch.randn(1, 2, 70, 8, dtype=torch.float64) for _ in range(3))
    hide = lambda q_idx, kv_idx: (kv_idx > q_idx) | (q_idx % 7 == 3)
    score = lambda s, b, h, q_idx, kv_idx: torch.where(hide(q_idx, kv_idx), -torch.inf, s)
    mask = rf.create_block_mask(
        lambda b, h, q_idx, kv_idx: ~hide(q_idx, kv_idx), None, None, 70, 70, BLOCK_SIZE=16
    )
    found = []
    for arguments in ({"score_mod": score}, {"block_mask": mask}):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        out, lse = rf.flex_attention(*leaves, return_lse=True, **arguments)
        found.append([out, lse, *torch.autograd.grad(out.square().sum(), leaves)])
    for one, other in zip(*found):
        torch.testing.assert_close(one, other, **SAME)


def test_one_mask_serves_other_batches_and_heads() -> None:
    mask = rf.create_block_mask(rf.causal(), None, None, 50, 50, BLOCK_SIZE=16)
    for B, H in ((1, 1), (3, 2), (2, 5)):
        x = torch.randn(B, H, 50, 8, dtype=torch.float64)
        expected = torch.nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True)
        torch.testing.assert_close(rf.flex_attention(x, x, x, block_mask=mask), expected, **SAME)


def test_inputs_are_left_alone() -> None:
    case = Case(mask="tree", score="composed", sinks=True)
    problem, untouched = case.build(), case.build()
    attend(problem, our_mask(case))
    for name in ("q", "k", "v", "dout", "sinks"):
        assert torch.equal(getattr(problem, name), getattr(untouched, name))
    for one, other in zip(problem.captures, untouched.captures):
        assert torch.equal(one, other) and one.grad is None


def test_a_captured_tensor_changed_before_the_backward_is_noticed() -> None:
    """As torch notices it of every tensor that a backward needs."""
    q, k, v = (torch.randn(1, 2, 50, 8, requires_grad=True) for _ in range(3))
    bias = torch.zeros(2, 9, requires_grad=True)
    out = rf.flex_attention(q, k, v, rf.relative_position(bias))
    with torch.no_grad():
        bias += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()
