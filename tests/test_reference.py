"""The oracle itself, against torch's flex_attention, formulas by hand and finite differences."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, create_block_mask, flex_attention

from mask_zoo import MASKS, MaskCase
from ringflex.masks.mods import alibi, causal, compose, document, relative_position, softcap
from ringflex.reference import reference_attention, reference_attention_with_gradients

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")

F64 = torch.float64
B, HQ, HKV, S, D, DV = 2, 4, 2, 33, 8, 6
Mod = Callable[..., Tensor]


def draw(*shape: int, dtype: torch.dtype = F64) -> Tensor:
    return torch.randn(shape, dtype=F64).to(dtype)


def inputs(
    q_len: int = S, kv_len: int = S, dtype: torch.dtype = F64
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        draw(B, HQ, q_len, D, dtype=dtype),
        draw(B, HKV, kv_len, D, dtype=dtype),
        draw(B, HKV, kv_len, DV, dtype=dtype),
    )


slopes = torch.tensor([0.5, 0.25, 0.1, -0.3], dtype=F64)
bias = torch.linspace(-2, 2, 4 * 11, dtype=F64).view(4, 11)
table = torch.linspace(-1, 1, B * S, dtype=F64).view(B, S)

SCORES: dict[str, Mod | None] = {
    "none": None,
    "alibi": alibi(slopes),
    "softcap": softcap(1.5),
    "relative": relative_position(bias),
    "composed": compose(softcap(2.0), alibi(slopes)),
    "per_batch": lambda s, b, h, q, k: s * table[b, q] + table[b][k],
    "hiding": lambda s, b, h, q, k: torch.where((q + k) % 3 == 0, -torch.inf, s),
}


def assert_near(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("case", MASKS, ids=lambda case: case.name)
def test_masks_as_torch(case: MaskCase) -> None:
    """Out and lse for every mask, rows that see nothing among them."""
    q, k, v = inputs(S, 50)
    mask_mod = case.make(50, B, HQ)
    out, lse = reference_attention(q, k, v, mask_mod=mask_mod)
    block_mask = create_block_mask(mask_mod, B, HQ, S, 50, device="cpu", BLOCK_SIZE=16)
    expected, aux = flex_attention(
        q, k, v, block_mask=block_mask, enable_gqa=True, return_aux=AuxRequest(lse=True)
    )
    assert_near(out, expected)
    assert_near(lse, aux.lse)


@pytest.mark.parametrize("scale", [None, 0.7])
@pytest.mark.parametrize("name", SCORES)
def test_scores_as_torch(name: str, scale: float | None) -> None:
    q, k, v = inputs()
    out, lse = reference_attention(q, k, v, mask_mod=causal(), score_mod=SCORES[name], scale=scale)
    expected, aux = flex_attention(
        q,
        k,
        v,
        score_mod=SCORES[name],
        block_mask=create_block_mask(causal(), None, None, S, S, device="cpu"),
        scale=scale,
        enable_gqa=True,
        return_aux=AuxRequest(lse=True),
    )
    assert_near(out, expected)
    assert_near(lse, aux.lse)


def test_gradients_as_scaled_dot_product_attention() -> None:
    """Of q, k, v and a captured bias; torch's flex_attention has no backward on a CPU."""
    leaves = [x.requires_grad_() for x in inputs()]
    learned = bias.clone().requires_grad_()
    unused = torch.ones(3, dtype=F64, requires_grad=True)
    ids, dout = torch.arange(S) // 7, draw(B, HQ, S, DV)
    distance = torch.arange(S)[:, None] - torch.arange(S)
    added = learned[:, distance.clamp(-5, 5) + 5].masked_fill(ids[:, None] != ids, -torch.inf)
    out = torch.nn.functional.scaled_dot_product_attention(
        *leaves, attn_mask=added.expand(B, -1, -1, -1), enable_gqa=True
    )
    expected = torch.autograd.grad(out, [*leaves, learned], dout)
    found = reference_attention_with_gradients(
        *leaves,
        dout,
        mask_mod=document(ids),
        score_mod=relative_position(learned),
        captures=(learned, unused),
    )
    assert_near(found.out, out.detach())
    for x, y in zip((found.dq, found.dk, found.dv, found.dcaptures[0]), expected):
        assert_near(x, y)
    assert torch.equal(found.dcaptures[1], torch.zeros(3, dtype=F64))
    assert found.dsinks is None
    assert not any(x.requires_grad for x in (found.out, found.lse))


def test_by_hand() -> None:
    """Three keys of one head: the formula with math.exp."""
    q, k = torch.tensor([[[[2.0]]]]), torch.tensor([[[[1.0], [0.5], [-1.0]]]])
    v = torch.tensor([[[[10.0], [20.0], [30.0]]]])
    weights = [math.exp(0.5 * 2 * x) for x in (1.0, 0.5)]
    out, lse = reference_attention(q, k, v, scale=0.5, mask_mod=lambda b, h, q, k: k < 2)
    assert out.item() == pytest.approx((weights[0] * 10 + weights[1] * 20) / sum(weights))
    assert lse.item() == pytest.approx(math.log(sum(weights)))


def test_rows_that_see_nothing() -> None:
    """Out 0, lse -inf, gradients 0 and nowhere NaN, whoever hides them."""
    q, k, v = inputs()
    dout, dlse = draw(B, HQ, S, DV), draw(B, HQ, S)
    empty = torch.arange(S) % 5 == 2

    def hide(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return torch.where(q_idx % 5 == 2, -torch.inf, score)

    added = torch.where(empty, -torch.inf, 0.0).double()
    mods: list[dict[str, Any]] = [
        {"mask_mod": lambda b, h, q, k: q % 5 != 2},
        {"score_mod": hide},
        {"score_mod": lambda s, b, h, q, k: s + added[q]},
        {"mask_mod": lambda b, h, q, k: k <= q + 2, "score_mod": hide},
    ]
    results = [reference_attention_with_gradients(q, k, v, dout, dlse=dlse, **m) for m in mods]
    for found in results:
        assert (found.lse[:, :, empty] == -torch.inf).all()
        assert found.lse[:, :, ~empty].isfinite().all()
        assert (found.out[:, :, empty] == 0).all() and (found.dq[:, :, empty] == 0).all()
        assert all(g.isfinite().all() for g in (found.out, found.dq, found.dk, found.dv))
    for other in results[1:3]:
        for x, y in zip(results[0][:5], other[:5]):
            assert_near(x, y)
    kept = ~empty  # the rows left are those of attention without the empty ones
    alone = reference_attention_with_gradients(
        q[:, :, kept], k, v, dout[:, :, kept], dlse=dlse[:, :, kept]
    )
    assert_near(results[0].out[:, :, kept], alone.out)
    assert_near(results[0].dq[:, :, kept], alone.dq)
    assert_near(results[0].dk, alone.dk)
    assert_near(results[0].dv, alone.dv)


def test_nothing_at_all_is_visible() -> None:
    q, k, v = inputs()
    found = reference_attention_with_gradients(
        q, k, v, draw(B, HQ, S, DV), dlse=draw(B, HQ, S), mask_mod=lambda b, h, q, k: k < 0
    )
    assert (found.lse == -torch.inf).all()
    for zero in (found.out, found.dq, found.dk, found.dv):
        assert (zero == 0).all()


@pytest.mark.parametrize("hidden", [False, True])
def test_sinks_are_a_key_with_a_logit_and_no_value(hidden: bool) -> None:
    """The same as a key more, whose score is the sink and whose value is 0."""
    q, k, v = inputs()
    sinks, dout, dlse = draw(HQ), draw(B, HQ, S, DV), draw(B, HQ, S)

    def mask_mod(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return (kv_idx <= q_idx) & (q_idx % 4 != 1) if hidden else kv_idx >= 0

    found = reference_attention_with_gradients(
        q, k, v, dout, dlse=dlse, mask_mod=mask_mod, score_mod=softcap(2.0), sinks=sinks
    )
    learned = sinks.clone().requires_grad_()
    cap = softcap(2.0)

    def score_mod(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return torch.where(kv_idx == S, learned[h], cap(score, b, h, q_idx, kv_idx))

    expected = reference_attention_with_gradients(
        q,
        torch.cat([k, draw(B, HKV, 1, D)], 2),
        torch.cat([v, torch.zeros(B, HKV, 1, DV, dtype=F64)], 2),
        dout,
        dlse=dlse,
        mask_mod=lambda b, h, q, k: (k == S) | mask_mod(b, h, q, k),
        score_mod=score_mod,
        captures=(learned,),
    )
    assert found.dsinks is not None
    for x, y in (
        (found.out, expected.out),
        (found.lse, expected.lse),
        (found.dq, expected.dq),
        (found.dk, expected.dk[:, :, :S]),
        (found.dv, expected.dv[:, :, :S]),
        (found.dsinks, expected.dcaptures[0]),
    ):
        assert_near(x, y)
    if hidden:  # only the sink is left in such a row
        rows = torch.arange(S) % 4 == 1
        assert (found.out[:, :, rows] == 0).all()
        assert_near(found.lse[:, :, rows], sinks[None, :, None].expand(B, HQ, int(rows.sum())))


def test_a_sink_of_minus_infinity_is_none() -> None:
    q, k, v = inputs()
    mask_mod = causal() & (lambda b, h, q, k: q != 4)
    plain = reference_attention(q, k, v, mask_mod=mask_mod)
    sinks = torch.full((HQ,), -torch.inf, dtype=F64)
    for x, y in zip(plain, reference_attention(q, k, v, mask_mod=mask_mod, sinks=sinks)):
        assert_near(x, y)


@pytest.mark.parametrize("with_sinks", [False, True])
def test_gradients_by_finite_differences(with_sinks: bool) -> None:
    """fp64 gradcheck of out and lse by q, k, v, a captured bias and slopes, and sinks."""
    q, k, v = draw(1, 2, 4, 2), draw(1, 1, 4, 2), draw(1, 1, 4, 3)
    learned, rates, sinks = draw(2, 5), draw(2), draw(2)

    def attention(
        q: Tensor, k: Tensor, v: Tensor, learned: Tensor, rates: Tensor, sinks: Tensor
    ) -> tuple[Tensor, Tensor]:
        out, lse = reference_attention(
            q,
            k,
            v,
            mask_mod=lambda b, h, q, k: (k <= q) & (q != 2),
            score_mod=compose(relative_position(learned), softcap(3.0), alibi(rates)),
            sinks=sinks if with_sinks else None,
        )
        return out, lse.masked_fill(lse == -torch.inf, 0) + 0 * sinks.sum()

    leaves = [x.requires_grad_() for x in (q, k, v, learned, rates, sinks)]
    assert torch.autograd.gradcheck(attention, leaves)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_dtypes_and_strides(dtype: torch.dtype) -> None:
    """Results have the dtype of the inputs, which need not be contiguous."""
    wide = inputs()
    q, k, v = (x.to(dtype).transpose(1, 2).contiguous().transpose(1, 2) for x in wide)
    found = reference_attention_with_gradients(q, k, v, draw(B, HQ, S, DV, dtype=dtype))
    exact = reference_attention_with_gradients(*(x.double() for x in (q, k, v)), draw(B, HQ, S, DV))
    for x in (found.out, found.lse, found.dq, found.dk, found.dv):
        assert x.dtype == dtype
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(found.out.double(), exact.out, rtol=8 * eps, atol=8 * eps)
