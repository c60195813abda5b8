"""Traced mods: the same values, dtypes and gradients as the function itself, or a refusal."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from ringflex.masks.pointwise import pointwise
from ringflex.masks.trace import IndexByTensor, trace_mask, trace_score
from ringflex.masks.traced_mod import TracedMod

B, H, Q, K = 2, 2, 4, 7
Mod = Callable[..., Tensor]
F64 = torch.float64


def draw(*shape: int, dtype: torch.dtype = F64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3), dtype=F64).to(dtype)


row = torch.tensor([3, -1, 4, 1, -5, 9, 2])  # int64 [7]
row32 = row.int()
small = torch.tensor([3, -1, 4, 1, -5, 9, 2], dtype=torch.int8)
grid = torch.arange(14).view(2, 7) * 5 % 11
cube = torch.arange(42).view(2, 3, 7) * 5 % 13
flags = torch.tensor([True, False, True, True, False, False, True])
limit = torch.tensor(2)
ratio = torch.tensor(0.3, dtype=F64)
hundred = torch.tensor(100)
order = torch.tensor([4, 2, 0, 6, 1, 3, 5])
features = torch.arange(28).view(7, 4) % 3 == 0

MASKS: dict[str, Mod] = {
    "constant": lambda b, h, q, k: torch.tensor(True),
    "flag": lambda b, h, q, k: limit > 1,
    "one_index": lambda b, h, q, k: k < 3,
    "captured_number": lambda b, h, q, k: q - k < limit,
    "captured_number_is_wide": lambda b, h, q, k: small[q] * hundred > k * 100,
    "captured_fraction": lambda b, h, q, k: (q - k) * ratio < 0.5,
    "float_constant": lambda b, h, q, k: (q - k) * 0.1 <= 0.2,
    "vector": lambda b, h, q, k: row[q] < row[k],
    "vector_int32": lambda b, h, q, k: row32[q] * row32[k] > 2,
    "vector_int8": lambda b, h, q, k: small[q] - small[k] > 2,
    "vector_bool": lambda b, h, q, k: flags[q] ^ flags[k],
    "nested": lambda b, h, q, k: grid[b][q] <= grid[b][k],
    "together": lambda b, h, q, k: grid[b, q] <= grid[b, k],
    "nested_deep": lambda b, h, q, k: cube[b][h][k] <= cube[b, h][q],
    "fixed_row": lambda b, h, q, k: (grid[0, q] < 5) & (grid[-1, k] > 2),
    "fixed_column": lambda b, h, q, k: (cube[b, 1, q] < 5) | (cube[:, :, 0][b, h] > k),
    "slice_of_rows": lambda b, h, q, k: grid[:, q][b] < grid[:, k][b],
    "slice_last": lambda b, h, q, k: (cube[b, :, k] > q).all(),
    "ellipsis": lambda b, h, q, k: grid[:, ...][b, q] < 6,
    "slice_then_read": lambda b, h, q, k: row[1:][q] < row[:-1][k.clamp(max=5)],
    "transposed": lambda b, h, q, k: grid.T[k, b] < grid.mT[q][b],
    "negative_index": lambda b, h, q, k: row[q - 5] < row[k - 7],
    "index_of_index": lambda b, h, q, k: row[order[q]] < row[order[k]],
    "index_by_expression": lambda b, h, q, k: row[(q - k).clamp(-2, 2) + 2] > 0,
    "rearranged_vector": lambda b, h, q, k: row[order][q] < row[order][k],
    "rearranged_rows": lambda b, h, q, k: (features[order][q] & features[order][k]).any(),
    "rearranged_columns": lambda b, h, q, k: grid[b][order][q] < grid[b, order][k],
    "rearranged_cube": lambda b, h, q, k: cube.permute(2, 1, 0)[order][q, h].sum() > k,
    "selected_by_flag": lambda b, h, q, k: row[flags][q % 4] < row[flags][k % 4],
    "floor_negative": lambda b, h, q, k: (q - k) // 3 == -1,
    "floor_by_negative": lambda b, h, q, k: (q - k) // -2 > 0,
    "modulo_negative": lambda b, h, q, k: (q - k) % 4 == 3,
    "modulo_by_negative": lambda b, h, q, k: (q - k) % -4 == -1,
    "int_divided": lambda b, h, q, k: q / (k + 1) > 0.5,
    "bits": lambda b, h, q, k: (q & k) | (q ^ 3) > 2,
    "shifts": lambda b, h, q, k: (q << 2) >> 1 > k,
    "where": lambda b, h, q, k: torch.where(h == 1, q >= k, k > q),
    "where_numbers": lambda b, h, q, k: torch.where(q > k, 3, -2) * q > 4,
    "mixed_widths": lambda b, h, q, k: small[q] * row[k] + row32[q] * 0.5 > 1,
    "narrow_float": lambda b, h, q, k: small[q] * 0.1 == (q - k).half() * 0.1,
    "new_tensor": lambda b, h, q, k: torch.arange(7)[q] > torch.ones((), dtype=torch.int64) + k,
    "like": lambda b, h, q, k: (torch.zeros_like(q) + torch.full_like(k, 3)) > k,
    "in_place": lambda b, h, q, k: (q - k).clamp_(min=0).mul_(2) > 3,
    "in_place_wider": lambda b, h, q, k: (q * 2).add_(k) > 7,
    "reduction": lambda b, h, q, k: (grid[b] == q).any() & (k > 1),
    "dot": lambda b, h, q, k: (features[q] & features[k]).sum() > 1,
    "stacked": lambda b, h, q, k: torch.stack([q > k, q > 2, k < 6]).all(),
    "maximum": lambda b, h, q, k: torch.maximum(q, k) - torch.minimum(q, k) < 3,
    "logical": lambda b, h, q, k: torch.logical_not(q - k) | torch.logical_and(q, k),
}

slopes = draw(H).requires_grad_()
bias = draw(H, 2 * K + 1).requires_grad_()
gain = draw().abs().requires_grad_()
gain32 = draw().float().requires_grad_()
relative = draw(2 * K).requires_grad_()
plane = draw(Q, K).requires_grad_()
vectors = draw(K, 4).requires_grad_()


def augmented(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    score += slopes[h]
    return score


SCORES: dict[str, Mod] = {
    "identity": lambda s, b, h, q, k: s,
    "constant": lambda s, b, h, q, k: s * 0 + 5,
    "captured_only": lambda s, b, h, q, k: plane[q, k],
    "alibi": lambda s, b, h, q, k: s + slopes[h] * (k - q),
    "softcap": lambda s, b, h, q, k: 3 * torch.tanh(s / 3),
    "number": lambda s, b, h, q, k: s * gain,
    "narrower_number": lambda s, b, h, q, k: s * gain32 + 0.1,
    "relative": lambda s, b, h, q, k: s + relative[q - k + K],
    "negative_index": lambda s, b, h, q, k: s + relative[q - k],
    "clamped": lambda s, b, h, q, k: s + bias[h, (q - k).clamp(-2, 2) + 7] * gain,
    "nested": lambda s, b, h, q, k: s * bias[h][q] - bias[h][k],
    "twice": lambda s, b, h, q, k: s * slopes[h] + slopes[h] ** 2 * s**2,
    "hidden": lambda s, b, h, q, k: torch.where(q >= k, s, -torch.inf),
    "hidden_by_table": lambda s, b, h, q, k: torch.where(flags[k], s * gain, -torch.inf),
    "branch": lambda s, b, h, q, k: torch.where((q - k) // 2 == -1, s * 2, s * s),
    "prepared": lambda s, b, h, q, k: s + torch.softmax(slopes, 0)[h] * torch.exp(gain),
    "dot": lambda s, b, h, q, k: s + (vectors[q] * vectors[k]).sum() * gain,
    "rearranged": lambda s, b, h, q, k: s + plane.T[order][k, q] * 2,
    "in_place": lambda s, b, h, q, k: (s * 1).add_(slopes[h]).mul_(q + k),
    "augmented": augmented,
    "integer_table": lambda s, b, h, q, k: s + row[q] * small[k],
}


def indices() -> list[Tensor]:
    return [
        torch.arange(B).view(-1, 1, 1, 1),
        torch.arange(H).view(1, -1, 1, 1),
        torch.arange(Q).view(1, 1, -1, 1),
        torch.arange(K).view(1, 1, 1, -1),
    ]


def by_element(fn: Mod, scores: Tensor | None = None) -> Tensor:
    """What the mod means: called with 0-dim tensors, for one element after the other."""
    found = []
    with IndexByTensor():
        for i, site in enumerate(itertools.product(*map(range, (B, H, Q, K)))):
            # A copy, so that a mod which works in place cannot change the input.
            score = [] if scores is None else [scores.reshape(-1)[i].clone()]
            found.append(fn(*score, *map(torch.tensor, site)))
    return torch.stack(found).view(B, H, Q, K)


@functools.cache
def mask_truth(name: str) -> Tensor:
    return by_element(MASKS[name])


def by_vmap(fn: Mod, scores: Tensor | None = None) -> Tensor:
    """The mod mapped over all elements at once."""
    flat = [x.expand(B, H, Q, K).reshape(-1) for x in indices()]
    with IndexByTensor():
        mapped = torch.vmap(fn)(*([] if scores is None else [scores.reshape(-1)]), *flat)
    return mapped.view(B, H, Q, K)


@pytest.mark.parametrize("name", MASKS)
def test_masks_evaluate_as_the_function(name: str) -> None:
    fn = MASKS[name]
    found = trace_mask(fn).evaluate(*indices())
    assert found.dtype == torch.bool
    assert torch.equal(found.expand(B, H, Q, K), mask_truth(name))


@pytest.mark.parametrize("name", MASKS)
def test_masks_evaluate_at_any_shape(name: str) -> None:
    """The kernels ask for tiles: some rows of some batch elements, several axes, one element."""
    fn = MASKS[name]
    truth, traced = mask_truth(name), trace_mask(fn)
    b, h = torch.tensor([1, 0, 1]).view(3, 1, 1), torch.tensor([1, 0, 0]).view(3, 1, 1)
    q, k = torch.tensor([[3, 1], [0, 2], [3, 3]]), torch.tensor([[6, 5, 0]])
    found = traced.evaluate(b, h, q[:, :, None], k[:, None, :])
    expected = truth[b, h, q[:, :, None], k[:, None, :]]
    assert torch.equal(found.expand(3, 2, 3), expected)
    single = [torch.tensor([x]) for x in (1, 1, 3, 6)]
    assert traced.evaluate(*single).expand(1).item() == truth[1, 1, 3, 6]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", SCORES)
def test_scores_evaluate_as_the_function(name: str, dtype: torch.dtype) -> None:
    fn, scores = SCORES[name], draw(B, H, Q, K, dtype=dtype)
    with torch.no_grad():
        truth = by_element(fn, scores)
        given = [x.clone() for x in [scores, *indices()]]
        found = trace_score(fn, dtype).evaluate(*given[1:], score=given[0])
    for now, before in zip(given, [scores, *indices()]):
        assert torch.equal(now, before), "the caller's tensors were changed"
    assert found.dtype == truth.dtype
    torch.testing.assert_close(
        found.expand(B, H, Q, K), truth, rtol=8 * torch.finfo(truth.dtype).eps, atol=1e-15
    )


@pytest.mark.parametrize("name", [n for n in SCORES if n not in ("in_place", "augmented")])
def test_gradients_are_those_of_the_function(name: str) -> None:
    """Of the scores and of every captured tensor, against the plain function under vmap."""
    fn = SCORES[name]
    scores, dout = draw(B, H, Q, K).requires_grad_(), torch.randn(B, H, Q, K, dtype=F64)
    traced = trace_score(fn, F64)
    learned = [c for c in traced.captures if c.requires_grad]
    out = traced.evaluate(*indices(), score=scores).expand(B, H, Q, K)
    plain = by_vmap(fn, scores)
    # Everything that requires a gradient, so that a capture the tracer lost is missed.
    wanted = [scores, slopes, bias, gain, gain32, relative, plane, vectors]
    seen = out == out.masked_fill(out.isinf(), torch.nan)  # a hidden score passes nothing back
    found, expected = (
        torch.autograd.grad(y[seen], wanted, dout[seen], allow_unused=True) for y in (out, plain)
    )
    assert sum(g is not None for g in expected[1:]) == len(learned)
    for x, g, e in zip(wanted, found, expected):
        assert (g is None) == (e is None)
        if g is not None and e is not None:
            assert g.dtype == x.dtype and g.shape == x.shape
            eps = torch.finfo(g.dtype).eps
            torch.testing.assert_close(g, e, rtol=100 * eps, atol=100 * eps * float(e.abs().max()))


def test_gradients_reach_stand_ins_for_the_captures() -> None:
    traced = trace_score(SCORES["clamped"], F64)
    assert [c is t for c, t in zip(traced.captures, (bias, gain))] == [True, True]
    stand_ins = [torch.full_like(c, 0.5, requires_grad=True) for c in traced.captures]
    out = traced.evaluate(*indices(), score=torch.zeros(B, H, Q, K, dtype=F64), captures=stand_ins)
    assert (out == 0.25).all()
    found = torch.autograd.grad(out.sum(), [*stand_ins, bias, gain], allow_unused=True)
    assert found[1] is not None and found[1].item() == 0.5 * B * H * Q * K
    assert found[0] is not None and found[0].sum().item() == 0.5 * B * H * Q * K
    assert found[2] is None and found[3] is None


def test_captures_are_the_tensors_themselves() -> None:
    parameter = torch.nn.Parameter(draw(H))

    def mod(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return score * parameter[h] + bias[h, q] + parameter[b] * ratio + bias[0, k]

    captures = trace_score(mod, F64).captures
    assert len(captures) == 3
    for capture, tensor in zip(captures, (parameter, bias, ratio)):
        assert capture is tensor


def test_a_change_of_a_capture_is_seen() -> None:
    table = torch.zeros(K, dtype=torch.int64)
    traced = trace_mask(lambda b, h, q, k: table[q] == k)
    table += 3
    assert traced.evaluate(*indices())[0, 0, :, 3].all()


@pytest.mark.parametrize(
    ("fn", "uses"),
    [
        (lambda b, h, q, k: torch.tensor(True), ""),
        (lambda b, h, q, k: flags[2] & (limit > 0), ""),
        (lambda b, h, q, k: k >= 0, "kv_idx"),
        (lambda b, h, q, k: q >= k, "q_idx kv_idx"),
        (lambda b, h, q, k: grid[b, q] == 3, "b q_idx"),
        (lambda b, h, q, k: grid[b][k] == 3, "b kv_idx"),
        (lambda b, h, q, k: (h == 1) | (k > 3), "h kv_idx"),
        (lambda b, h, q, k: torch.where(b == 0, h, q) > k, "b h q_idx kv_idx"),
        (lambda b, h, q, k: (q + b - h, q > 2)[1], "q_idx"),  # computed and thrown away
        (lambda b, h, q, k: (features[q] & features[h]).any(), "h q_idx"),
    ],
)
def test_uses_names_what_a_mask_depends_on(fn: Mod, uses: str) -> None:
    assert trace_mask(fn).uses == set(uses.split())


def test_uses_of_a_score() -> None:
    assert trace_score(lambda s, b, h, q, k: s + slopes[h], F64).uses == {"score", "h"}
    assert trace_score(lambda s, b, h, q, k: plane[q, k], F64).uses == {"q_idx", "kv_idx"}


def test_scalar_tells_whether_the_graph_broadcasts() -> None:
    assert trace_mask(MASKS["nested_deep"]).scalar
    assert trace_score(SCORES["prepared"], F64).scalar  # the vector depends on no index
    assert not trace_mask(MASKS["dot"]).scalar
    assert not trace_score(SCORES["dot"], F64).scalar


def test_functions_of_every_kind_are_traced() -> None:
    class Window:
        def __init__(self, reach: int) -> None:
            self.reach = reach

        def __call__(self, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
            return q_idx - kv_idx < self.reach

        def method(self, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
            return self(b, h, q_idx, kv_idx)

    def window(reach: int, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return q_idx - kv_idx < reach

    def defaulted(b: Tensor, h: Tensor, q: Tensor, k: Tensor, reach: int = 2) -> Tensor:
        return q - k < reach

    truth = by_element(functools.partial(window, 2))
    names = []
    for fn in (Window(2), Window(2).method, functools.partial(window, 2), defaulted):
        traced = trace_mask(fn)
        assert torch.equal(traced.evaluate(*indices()).expand(B, H, Q, K), truth)
        names.append(traced.name)
    assert names == ["Window", "method", "partial", "defaulted"]


SINGLE: dict[str, Mod] = {  # of one element; over a tile they would mix elements
    "any": lambda b, h, q, k: (q == k).any() | (k == 0),
    "all": lambda b, h, q, k: (q == k).all(),
    "sum": lambda b, h, q, k: (q - k).sum() > 1,
    "max": lambda b, h, q, k: (q - k).max() > 1,
    "norm": lambda b, h, q, k: torch.linalg.vector_norm((q - k) * 1.0) < 2,
    "cumsum": lambda b, h, q, k: torch.cumsum(q - k, 0) > 1,
    "softmax": lambda b, h, q, k: torch.softmax(q * 1.0, -1) > k - 1,
    "view": lambda b, h, q, k: (q >= k).view(()),
    "squeeze": lambda b, h, q, k: (q >= k).squeeze(),
    "there and back": lambda b, h, q, k: (q >= k).unsqueeze(0).squeeze(0),
}


@pytest.mark.parametrize("name", SINGLE)
def test_operations_on_one_element_stay_there(name: str) -> None:
    traced = trace_mask(SINGLE[name])
    assert torch.equal(traced.evaluate(*indices()).expand(B, H, Q, K), by_element(SINGLE[name]))


def test_autocast_does_not_reach_into_a_mod() -> None:
    """Neither when it is traced, nor when its tables are computed, nor at each call."""
    left, right = torch.randn(K, 8), torch.randn(K, 8)
    mods = (
        lambda s, b, h, q, k: s + left[q] @ right[k],
        lambda s, b, h, q, k: s + (left @ right.T)[q, k],
    )
    score = torch.zeros(B, H, Q, K)
    for mod in mods:
        plain = trace_score(mod, torch.float32).evaluate(*indices(), score=score)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            traced = trace_score(mod, torch.float32)
            assert torch.equal(traced.evaluate(*indices(), score=score), plain)
            (table,) = pointwise(trace_score(mods[1], torch.float32)).tables([left, right])
        assert table.dtype == torch.float32


def test_a_frozen_mod_keeps_its_captures() -> None:
    ids = torch.arange(K)
    traced = trace_mask(lambda b, h, q, k: ids[q] == ids[k])
    frozen = traced.frozen()
    before = frozen.evaluate(*indices())
    ids.zero_()
    assert torch.equal(frozen.evaluate(*indices()), before)
    assert traced.evaluate(*indices()).all() and not before.all()


def documents(ids: Tensor, reach: int = 3) -> TracedMod:
    return trace_mask(lambda b, h, q, k: (ids[q] == ids[k]) & (q - k < reach))


def test_digest_is_of_values_and_graph() -> None:
    ids = torch.tensor([0, 0, 1, 1, 2])
    same = documents(ids).digest()
    assert len(same) == 16
    assert documents(ids.clone()).digest() == same
    assert documents(torch.tensor([0, 9, 0, 9, 1, 9, 1, 9, 2, 9])[::2]).digest() == same
    others = [
        documents(torch.tensor([0, 0, 1, 1, 3])),
        documents(ids.int()),
        documents(torch.tensor([0, 0, 1, 1, 2, 2])),
        documents(ids, reach=4),
        trace_mask(lambda b, h, q, k: (ids[q] == ids[k]) & (k - q < 3)),
        trace_mask(lambda b, h, q, k: (ids[q] == ids[k]) | (q - k < 3)),
        trace_mask(lambda b, h, q, k: q - k < 3),
    ]
    assert len({same, *(other.digest() for other in others)}) == len(others) + 1


def test_digest_of_every_dtype_and_shape() -> None:
    tables = [torch.ones(3, dtype=d) for d in (F64, torch.float16, torch.bfloat16, torch.uint8)]
    tables += [torch.ones(3, dtype=torch.bool), torch.ones(1, 3), torch.ones(3, 1), torch.ones(())]
    tables += [torch.nn.Parameter(torch.zeros(3)), torch.full((3,), torch.nan)]
    digests = [
        trace_mask(lambda b, h, q, k, t=t: t.reshape(-1)[0] > q * 1.0).digest()  # type: ignore[misc]
        for t in tables
    ]
    assert len(set(digests)) == len(tables)


def test_to_moves_only_what_is_elsewhere() -> None:
    traced = trace_score(SCORES["clamped"], F64)
    assert traced.to(torch.device("cpu")) is traced
    moved = traced.to(torch.device("meta"))
    assert [c.device.type for c in moved.captures] == ["meta", "meta"]
    assert not any(c.requires_grad for c in moved.captures)
    assert traced.captures[0] is bias


def test_torchs_own_combinators() -> None:
    """`and_masks` and `or_masks` begin with a constant like b, which is no dependence on b."""
    from torch.nn.attention.flex_attention import and_masks, or_masks

    causal = lambda b, h, q_idx, kv_idx: kv_idx <= q_idx
    near = lambda b, h, q_idx, kv_idx: q_idx - kv_idx < 9
    first = lambda b, h, q_idx, kv_idx: kv_idx < 2
    traced = trace_mask(or_masks(and_masks(causal, near), first))
    assert traced.uses == {"q_idx", "kv_idx"}
    b, h, q, k = indices()
    expected = (causal(b, h, q, k) & near(b, h, q, k)) | first(b, h, q, k)
    assert torch.equal(
        traced.evaluate(b, h, q, k), expected.expand(traced.evaluate(b, h, q, k).shape)
    )
