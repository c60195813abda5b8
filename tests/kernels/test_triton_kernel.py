"""What only the Triton kernel promises: of launches that are prepared, tuning, determinism."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import ringflex as rf
from attention_cases import DEVICE, Case
from ringflex.kernels import triton_kernel, triton_tuning
from ringflex.kernels.block_lists import key_lists, query_lists
from ringflex.kernels.contract import KernelOptions, Partial
from ringflex.kernels.triton_mods import ScoreMod
from ringflex.kernels.triton_setup import Setup
from ringflex.masks.trace import trace_score

SMALL = Case(dtype=torch.float32, seq_len=97, block_size=32, D=16, Dv=16)
S = SMALL.seq_len


def make(fn: Any) -> rf.BlockMask:
    return rf.create_block_mask(fn, None, None, S, S, BLOCK_SIZE=32)


def test_tables_of_another_dtype_are_another_launch() -> None:
    """The generated code may be the same: it converts what it reads. The launch is not."""
    mask, p = make(rf.causal()), SMALL.build(device=DEVICE)

    def launches() -> int:
        return sum(len(s.prepared) for s in mask.cache.values() if isinstance(s, Setup))

    counts = []
    for dtype in (torch.float16, torch.bfloat16, torch.int8, torch.uint8, torch.int32, torch.int64):
        table = torch.arange(S, device=DEVICE).to(dtype)
        mod = lambda s, b, h, q, k, table=table: s + table[k] * 0.01
        rf.flex_attention(p.q, p.k, p.v, mod, mask, enable_gqa=True, backend="triton")
        counts.append(launches())
    assert counts == sorted(set(counts))


def test_launches_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ringflex.kernels.triton_setup._KEPT", 3)
    mask, p = make(rf.causal()), SMALL.build(device=DEVICE)
    for cap in range(1, 6):
        mod = rf.softcap(float(cap))
        rf.flex_attention(p.q, p.k, p.v, mod, mask, enable_gqa=True, backend="triton")
    (setup,) = (s for s in mask.cache.values() if isinstance(s, Setup))
    assert len(setup.prepared) == 3


@pytest.mark.parametrize("last", [torch.float32, torch.float16], ids=str)
def test_tuning_merges_once(last: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Measuring launches a kernel many times; a step that merges in place must run but once."""
    measured = []

    def fastest(kernel: str, run: Any, tile: Any, *_: Any) -> Any:
        for _ in range(3):
            run(tile)
        measured.append(kernel)
        return tile

    monkeypatch.setattr(triton_tuning, "fastest_tile", fastest)
    p, found = SMALL.build(device=DEVICE), []
    for tune in (False, True):
        low, high = make(lambda b, h, q, k: k < 41), make(lambda b, h, q, k: k >= 41)
        out = torch.empty(*p.q.shape[:3], SMALL.Dv, device=DEVICE)
        running = Partial(out, torch.empty(p.q.shape[:3], device=DEVICE))
        final = Partial(
            out if last == out.dtype else torch.empty_like(out, dtype=last), running.lse
        )
        for mask, before, after in ((low, None, running), (high, running, final)):
            options = KernelOptions(tune=tune)
            triton_kernel.forward(p.q, p.k, p.v, mask, None, 0.25, before, after, options)
        found.append(final)
    assert measured == ["forward"]
    assert torch.equal(found[0].out, found[1].out) and torch.equal(found[0].lse, found[1].lse)


def test_weights_of_row_terms_have_their_factor() -> None:
    """exp2(score - lse_log2) is so many times the weight; what sees nothing has none still."""
    mask, factor = make(rf.causal()), 0.3
    dout, out = (torch.randn(1, 2, S, 16, device=DEVICE) for _ in range(2))
    lse = torch.randn(1, 2, S, device=DEVICE)
    lse[:, :, 5] = -torch.inf
    rest = dout, out, lse, None, dout, mask, None, 0.25, KernelOptions(), True
    plain, scaled = triton_kernel.row_terms(*rest), triton_kernel.row_terms(*rest, factor)
    assert (plain.factor, scaled.factor) == (1, factor)
    assert torch.equal(plain.delta, scaled.delta)
    assert (scaled.lse_log2[:, :, 5] == torch.inf).all()
    wanted = torch.exp2(-plain.lse_log2) * factor
    torch.testing.assert_close(torch.exp2(-scaled.lse_log2), wanted)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's
@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
def test_deterministic_gradients_show_what_is_not_finite(bad: float) -> None:
    p = replace(SMALL, score="alibi").build(device=DEVICE)
    out = rf.flex_attention(
        p.q, p.k, p.v, p.score, make(rf.causal()), enable_gqa=True, backend="triton",
        kernel_options={"deterministic": True},
    )  # fmt: skip
    dout = p.dout.clone()
    dout[0, 0, 50, 0] = bad
    (grad,) = torch.autograd.grad(out, p.captures, dout)
    assert not grad.isfinite().all()


def test_what_cannot_be_differentiated_is_refused_before_it_runs() -> None:
    """Whatever ran before without gradients; and only if a gradient is wanted."""
    p = SMALL.build(device=DEVICE)
    table = torch.rand(S, 2, device=DEVICE, requires_grad=True)

    def mod(s: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return s + (table * 2.0)[k].prod()

    attend = lambda q, mod: rf.flex_attention(
        q, p.k.detach(), p.v.detach(), mod, make(rf.causal()), enable_gqa=True, backend="triton"
    )
    attention = lambda: attend(p.q, mod)
    with torch.no_grad():
        assert attention().isfinite().all()
    with pytest.raises(NotImplementedError, match="backend='eager' can"):
        attention()
    table.requires_grad_(False)
    assert attention().isfinite().all()
    q = p.q.detach()
    floored = lambda s, b, h, q, k: s + (s // 1.0) * 0.1
    assert attend(q, floored).isfinite().all()  # no input wants any
    with pytest.raises(NotImplementedError, match="floor_divide"):
        attend(q.requires_grad_(), floored)


def test_only_tables_of_wanted_captures_get_gradients() -> None:
    """`b` wants none, and its product over a row could not be differentiated."""
    p = SMALL.build(device=DEVICE)
    a, b = torch.rand(SMALL.Hq, device=DEVICE, requires_grad=True), torch.rand(S, 2, device=DEVICE)
    mod = lambda s, b_, h, q, k: s + (a * 2)[h] + b[k].prod()
    grads = []
    for backend in ("eager", "triton"):
        out, lse = rf.flex_attention(
            p.q, p.k, p.v, mod, make(rf.causal()), enable_gqa=True, return_lse=True,
            backend=backend,
        )  # fmt: skip
        grads += torch.autograd.grad(lse.sum(), [a])
    torch.testing.assert_close(grads[0], grads[1])


def test_small_gradients_of_half_precision_captures_are_not_rounded_away() -> None:
    """Each is below half precision's smallest normal number, their sum is not."""
    p = SMALL.build(device=DEVICE)
    bias = torch.zeros(SMALL.Hq, 7, device=DEVICE, dtype=torch.float16, requires_grad=True)
    grads = []
    for backend in ("eager", "triton"):
        out = rf.flex_attention(
            p.q, p.k, p.v, rf.relative_position(bias), make(rf.causal()), enable_gqa=True,
            backend=backend,
        )  # fmt: skip
        grads += torch.autograd.grad(out, [bias], p.dout * 3e-4)
    torch.testing.assert_close(grads[0], grads[1], rtol=2e-3, atol=6e-8)


def test_gradients_of_half_precision_captures_are_added_in_fp32() -> None:
    bias = torch.zeros(SMALL.Hq, 7, device=DEVICE, dtype=torch.float16, requires_grad=True)
    traced = trace_score(rf.relative_position(bias), torch.float32)
    mod = ScoreMod(traced, DEVICE, approximate_tanh=False)
    total, step = torch.zeros(bias.shape, device=DEVICE), torch.full(bias.shape, 1 / 3)
    mod.add_to_captures([step.to(DEVICE)], [total])
    assert torch.equal(total.cpu(), step)


def test_strides_beyond_32_bits() -> None:
    """Rows of a tensor whose head dim is its outermost dimension, far apart."""
    far, D = 2**27, 32
    try:
        whole = torch.empty(far * D, device=DEVICE, dtype=torch.float16)
    except RuntimeError:
        pytest.skip("no room for 8 GiB, of which a few pages are touched")
    apart = whole.as_strided((1, 1, 16, D), (16, 16, 1, far))
    near = torch.randn(1, 1, 16, D, device=DEVICE).half()
    apart.copy_(near)
    results = [
        rf.flex_attention(near, k, near, backend="triton", kernel_options={"tma": False})
        for k in (near, apart)
    ]
    assert torch.equal(*results)


def test_what_is_read_ahead_is_there() -> None:
    """A walk over a list reads up to two runs beyond its end."""
    mask = make(rf.causal())
    for lists, sides in (
        (query_lists(mask, DEVICE), (mask.partial, mask.full)),
        (key_lists(mask, 2, DEVICE), mask.transpose()),
    ):
        assert lists.runs.shape == (sum(runs.start.size for runs in sides) + 2, 2)
