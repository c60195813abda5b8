"""What every kernel must compute: one set of test functions for all of them.

On a GPU they run there; elsewhere Triton's interpreter executes the Triton kernels.
"""

import gc
import weakref
from dataclasses import replace
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import strategies as st

import ringflex as rf
from attention_cases import (
    DEVICE,
    MASKS,
    SCORES,
    Case,
    assert_equals_reference,
    assert_same_bits,
    attend,
    deviation,
    reference,
    tensors,
)
from ringflex.kernels import eager, triton_kernel
from ringflex.kernels.contract import KernelOptions, Partial
from ringflex.reference import Reference

ON_GPU = DEVICE.type == "cuda"
BACKENDS = ("eager", "triton")
HALF = (torch.float16, torch.bfloat16) if ON_GPU else (torch.float16,)
SMALL = Case(dtype=torch.float32, seq_len=97, block_size=32, D=16, Dv=16)


def block_mask(case: Case) -> rf.BlockMask:
    return rf.create_block_mask(
        case.mask_mod(), case.B, case.Hq, case.seq_len, case.seq_len, BLOCK_SIZE=case.block_size
    )


def run(case: Case, backend: str, **options: Any) -> Reference:
    return attend(
        case.build(device=DEVICE), block_mask(case), backend=backend, kernel_options=options
    )


def check(case: Case, backend: str, **options: Any) -> None:
    assert_equals_reference(case, run(case, backend, **options), f"{backend} {options}")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mask", MASKS)
def test_masks(mask: str, backend: str) -> None:
    check(replace(SMALL, mask=mask), backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("score", SCORES)
def test_scores(score: str, backend: str) -> None:
    check(replace(SMALL, mask="causal documents", score=score, dlse=True), backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_half_precision(dtype: torch.dtype, backend: str) -> None:
    case = replace(SMALL, mask="tree", score="relative", sinks=True, dlse=True, dtype=dtype)
    result = run(case, backend)
    assert result.out.dtype == result.dq.dtype == result.dk.dtype == result.dv.dtype == dtype
    assert result.lse.dtype == torch.float32
    assert_equals_reference(case, result)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "case",
    [
        replace(SMALL, seq_len=1),
        replace(SMALL, seq_len=128),
        replace(SMALL, Hkv=4),
        replace(SMALL, Hkv=1, mask="past chunks", dlse=True),
        replace(SMALL, bshd=True, mask="document rows", sinks=True, score="alibi"),
        replace(SMALL, mask="nothing", sinks=True),
        replace(SMALL, block_size=48, mask="tree"),
        replace(SMALL, block_size=128, seq_len=150),
    ],
    ids=str,
)
def test_shapes(case: Case, backend: str) -> None:
    check(case, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("D", "Dv"),
    [(16, 32), (20, 12), (80, 80), (96, 96), (112, 112), (128, 64), (192, 128), (256, 256)],
)
def test_head_dims(D: int, Dv: int, backend: str) -> None:
    check(replace(SMALL, seq_len=50, B=1, Hq=2, Hkv=1, D=D, Dv=Dv), backend)


@hypothesis.settings(max_examples=40 if ON_GPU else 12)
@hypothesis.given(
    seq_len=st.integers(1, 120),
    heads=st.sampled_from([(1, 1), (2, 1), (2, 2), (3, 1), (4, 2)]),
    dims=st.sampled_from([(8, 8), (16, 24), (32, 16), (40, 40)]),
    mask=st.sampled_from(sorted(MASKS)),
    score=st.sampled_from([None, *sorted(SCORES)]),
    bshd=st.booleans(),
    sinks=st.booleans(),
    dtype=st.sampled_from([torch.float32, *HALF]),
    block_size=st.sampled_from([16, 32, 64]),
    tma=st.booleans(),
    backward=st.sampled_from(["two_pass", "one_pass"]),
)
def test_any_case(heads: Any, dims: Any, tma: bool, backward: str, **fields: Any) -> None:
    """Random problems against the reference, by descriptors and by pointers, both backwards."""
    case = Case(Hq=heads[0], Hkv=heads[1], D=dims[0], Dv=dims[1], **fields)
    check(case, "triton", tma=tma, backward=backward)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", [SMALL, replace(SMALL, score="softcap")], ids=str)
@pytest.mark.parametrize("scale", [-0.3, 0.0, 1.7])
def test_any_scale(scale: float, case: Case, backend: str) -> None:
    p = case.build(device=DEVICE)
    out, lse = rf.flex_attention(
        p.q, p.k, p.v, p.score, block_mask(case),
        scale=scale, enable_gqa=True, return_lse=True, backend=backend,
    )  # fmt: skip
    q = p.q * (scale * case.D**0.5)
    expected, expected_lse = rf.flex_attention(
        q, p.k, p.v, p.score, block_mask(case), enable_gqa=True, return_lse=True, backend="eager"
    )
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("score", [None, "softcap"])
def test_infinite_scores_hide(score: str | None) -> None:
    """A score mod may mask by -inf, also a whole row."""
    case = replace(SMALL, seq_len=70)
    p, plain = case.build(device=DEVICE), SCORES["softcap"](case, lambda *_: None)[0]

    def hidden(q_idx: Any, kv_idx: Any) -> Any:
        return (kv_idx > q_idx) | (q_idx % 7 == 3)

    def masking(s: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        s = s if score is None else plain(s, b, h, q_idx, kv_idx)
        return torch.where(hidden(q_idx, kv_idx), -torch.inf, s)

    mask = rf.create_block_mask(
        lambda b, h, q_idx, kv_idx: ~hidden(q_idx, kv_idx), None, None, 70, 70, BLOCK_SIZE=32
    )
    found = []
    for mod, shown in ((masking, None), (None if score is None else plain, mask)):
        leaves = [x.clone().requires_grad_() for x in (p.q, p.k, p.v)]
        out, lse = rf.flex_attention(
            *leaves, mod, shown, enable_gqa=True, return_lse=True, backend="triton"
        )
        found.append([out, lse, *torch.autograd.grad(out.square().sum(), leaves)])
    for one, other in zip(*found):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_garbage_beyond_the_keys_is_not_read() -> None:
    """Tensors are views of longer ones whose rest is NaN."""
    case = replace(SMALL, mask="full", seq_len=75)
    p = case.build(device=DEVICE)

    def embedded(x: torch.Tensor) -> torch.Tensor:
        whole = torch.full((x.shape[0], x.shape[1], 128, x.shape[3]), torch.nan, device=DEVICE)
        whole[:, :, : x.shape[2]] = x
        return whole[:, :, : x.shape[2]]

    views = replace(p, q=embedded(p.q), k=embedded(p.k), v=embedded(p.v), dout=embedded(p.dout))
    for tma in (True, False):
        found = attend(views, block_mask(case), backend="triton", kernel_options={"tma": tma})
        assert_equals_reference(case, found, f"tma={tma}")


# Triton's interpreter takes long for fixed point.
FIXED_POINT = (
    ["relative", "alibi", "by position", "low rank", "composed"] if ON_GPU else ["composed"]
)


@pytest.mark.parametrize("score", FIXED_POINT)
def test_deterministic(score: str) -> None:
    """The same bits every run, and right."""
    case = replace(SMALL, mask="causal", score=score, dlse=True)
    first = run(case, "triton", deterministic=True)
    assert_equals_reference(case, first)
    for _ in range(3 if ON_GPU else 1):
        assert_same_bits(first, run(case, "triton", deterministic=True))


@pytest.mark.parametrize("mask", ["tree", "mixed heads", "document rows"])
def test_one_pass(mask: str) -> None:
    check(replace(SMALL, mask=mask, score="composed", dlse=True), "triton", backward="one_pass")


@pytest.mark.parametrize("kernel", [eager, triton_kernel], ids=["eager", "triton"])
@pytest.mark.parametrize("score", [None, "alibi"])
def test_merges_into_a_running_result(kernel: Any, score: str | None) -> None:
    """Keys seen in two halves, the second merged into the first, are keys seen at once."""
    from ringflex.masks.trace import trace_score

    case = replace(SMALL, mask="full", score=score, dtype=torch.float32)
    p = case.build(device=DEVICE)
    mod = None if p.score is None else trace_score(p.score, torch.float32)
    S, options = case.seq_len, KernelOptions()
    make = lambda fn: rf.create_block_mask(rf.MaskMod(fn), None, None, S, S, BLOCK_SIZE=32)
    low = make(lambda b, h, q_idx, kv_idx: (kv_idx < 41) & (q_idx > 20))
    high = make(lambda b, h, q_idx, kv_idx: (kv_idx >= 41) & (q_idx > 20))
    none = make(lambda b, h, q_idx, kv_idx: kv_idx < 0)
    both = make(lambda b, h, q_idx, kv_idx: q_idx > 20)
    shape = (*p.q.shape[:3], case.Dv)

    def new(dtype: torch.dtype = torch.float32) -> Partial:
        out = torch.full(shape, torch.nan, device=DEVICE, dtype=dtype)
        return Partial(out, torch.full(shape[:3], torch.nan, device=DEVICE))

    def step(mask: rf.BlockMask, before: Partial | None, after: Partial) -> None:
        kernel.forward(p.q, p.k, p.v, mask, mod, 0.25, before, after, options)

    running, expected, final = new(), new(), new(torch.float16)
    step(none, None, running)
    assert (running.lse == -torch.inf).all() and (running.out == 0).all()
    step(none, running, running)  # two empty results stay empty
    assert (running.lse == -torch.inf).all() and (running.out == 0).all()
    step(low, running, running)
    step(none, running, running)
    step(high, running, final)
    step(both, None, expected)
    torch.testing.assert_close(final.lse, expected.lse, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(final.out, expected.out.half(), rtol=1e-3, atol=1e-3)
    start = torch.linspace(-1, 1, case.Hq, device=DEVICE)[None, :, None].expand(shape[:3])
    step(both, Partial(None, start), running)  # as sinks enter
    torch.testing.assert_close(running.lse, torch.logaddexp(start, expected.lse))
    assert deviation((running.lse - start)[:, :, :21], torch.zeros(shape[0], shape[1], 21)) < 1e-6


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_does_not_reach_inside(backend: str) -> None:
    case = replace(SMALL, seq_len=40, mask="causal documents", score="low rank", dlse=True)
    plain = run(case, backend, deterministic=True)
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        assert_same_bits(plain, run(case, backend, deterministic=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_default_dtype_does_not_reach_inside(backend: str) -> None:
    case = replace(SMALL, mask="causal documents", dlse=True)
    plain = run(case, backend)
    torch.set_default_dtype(torch.float16)
    try:
        assert_same_bits(plain, run(case, backend))
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_of_lse_where_nothing_is_seen(backend: str) -> None:
    """They may be NaN, as `torch.where(isfinite, lse * lse, 0)` gives, and change nothing."""
    p = replace(SMALL, mask="tree").build(device=DEVICE)
    mask = rf.create_block_mask(
        lambda b, h, q, k: (q >= k) & (q % 5 != 2), None, None, 97, 97, BLOCK_SIZE=32
    )
    leaves = [x.detach().requires_grad_() for x in (p.q, p.k, p.v)]
    out, lse = rf.flex_attention(
        *leaves, block_mask=mask, enable_gqa=True, return_lse=True, backend=backend
    )
    assert (lse == -torch.inf).any()
    loss = out.square().sum() + torch.where(lse.isfinite(), lse * lse, 0).sum()
    for grad in torch.autograd.grad(loss, leaves):
        assert grad.isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_later_changes_of_a_masks_captures_do_not_reach_it(backend: str) -> None:
    case = replace(SMALL, seq_len=50, mask="full")
    ids = torch.arange(case.seq_len, device=DEVICE) // 9
    weights = torch.linspace(0, 1, case.seq_len, device=DEVICE)
    mod = lambda b, h, q, k: (ids[q] == ids[k]) & (weights[k] <= 0.9)
    found = []
    for _ in range(2):  # the second mask sees the changes
        mask = rf.create_block_mask(mod, None, None, 50, 50, BLOCK_SIZE=32)
        before = attend(case.build(device=DEVICE), mask, backend=backend)
        ids.zero_()
        weights.mul_(0.5)
        assert_same_bits(before, attend(case.build(device=DEVICE), mask, backend=backend))
        found.append(before)
    assert not torch.equal(found[0].out, found[1].out)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_mask_is_freed_with_its_last_reference(backend: str) -> None:
    """Not only by the garbage collector, which many training loops stop."""
    case = replace(SMALL, mask="causal documents", score="alibi")
    mask = block_mask(case)
    attend(case.build(device=DEVICE), mask, backend=backend)
    gone = weakref.ref(mask)
    gc.disable()
    try:
        del mask
        assert gone() is None
    finally:
        gc.enable()


@pytest.mark.gpu(2)
def test_tensors_on_another_device_than_the_current_one() -> None:
    case = replace(SMALL, mask="causal documents", score="composed", dlse=True)
    with torch.cuda.device(0):
        found = attend(case.build(device=torch.device("cuda:1")), block_mask(case))
    assert found.out.device == torch.device("cuda:1")
    assert_equals_reference(case, found)


def test_eager_and_triton_agree_in_the_schedule() -> None:
    """The plan of one device with a score function and sinks, by both."""
    case = replace(SMALL, mask="causal documents", score="composed", sinks=True, dlse=True)
    one, other = (tensors(run(case, backend)) for backend in BACKENDS)
    for name, x in tensors(reference(case)).items():
        assert deviation(one[name], other[name].double().cpu()) <= 1e-4 * max(1.0, x.abs().max())
