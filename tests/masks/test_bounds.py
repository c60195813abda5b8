"""Bounds of masks over rectangles: never wrong, and decided where a mask is simple."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from masks.random_masks import EXTENT, REFUSALS, RandomMask, random_masks
from ringflex.masks import bounds
from ringflex.masks.bounds import ALL, NONE, UNDECIDED, MaskBounds, Rectangles
from ringflex.masks.intervals import Interval
from ringflex.masks.mods import (
    causal,
    chunked,
    document,
    document_from_lengths,
    full,
    prefix_lm,
    sliding_window,
)
from ringflex.masks.trace import trace_mask

B = H = 2
MaskFunction = Callable[..., Tensor]


def visible_elements(mask_mod: MaskFunction, base: int, extent: int) -> np.ndarray[Any, Any]:
    """bool `[B, H, extent, extent]`: the mask itself, element by element."""
    index = torch.arange(base, base + extent)
    seen = trace_mask(mask_mod).evaluate(
        torch.arange(B).view(-1, 1, 1, 1),
        torch.arange(H).view(1, -1, 1, 1),
        index.view(1, 1, -1, 1),
        index.view(1, 1, 1, -1),
    )
    return seen.expand(B, H, extent, extent).numpy()


def share_decided(mask_mod: MaskFunction, *, base: int = 0, seed: int = 0, n: int = 60) -> float:
    """Asserts that random rectangles from `base` on are classified soundly; the share decided."""
    visible = visible_elements(mask_mod, base, EXTENT)
    rng = np.random.default_rng(seed)
    lo = rng.integers(0, EXTENT, (2, n))
    # Mostly small, of one element too: large rectangles are rarely decided.
    size = rng.integers(0, EXTENT, (2, n)) // rng.integers(1, EXTENT, (2, n))
    hi = np.minimum(lo + size, EXTENT - 1)
    b, h = rng.integers(0, B, n), rng.integers(0, H, n)
    (q_lo, kv_lo), (q_hi, kv_hi) = lo + base, hi + base
    codes = MaskBounds(trace_mask(mask_mod)).classify(Rectangles(b, h, q_lo, q_hi, kv_lo, kv_hi))
    assert codes.shape == (n,)
    for i, code in enumerate(codes):
        inside = visible[b[i], h[i], lo[0, i] : hi[0, i] + 1, lo[1, i] : hi[1, i] + 1]
        where = f"b={b[i]} h={h[i]} q={q_lo[i]}..{q_hi[i]} kv={kv_lo[i]}..{kv_hi[i]}"
        assert code != ALL or inside.all(), f"called ALL and is not: {where}"
        assert code != NONE or not inside.any(), f"called NONE and is not: {where}"
    return float((codes != UNDECIDED).mean())


def test_random_masks_are_bounded_soundly() -> None:
    decided: list[float] = []

    @settings(max_examples=250, suppress_health_check=list(HealthCheck))
    @given(random_masks(), st.integers(0, 9))
    def check(mask: RandomMask, seed: int) -> None:
        try:
            decided.append(share_decided(mask.function(), base=mask.base, seed=seed))
        except RuntimeError as error:
            assume(not any(refusal in str(error) for refusal in REFUSALS))
            raise

    check()
    assert len(decided) >= 250
    assert np.mean(decided) > 0.3, "most rectangles were undecided: the test would show little"


nan, inf = float("nan"), float("inf")
i8 = torch.arange(-128, 128, 11, dtype=torch.int8)  # 24 entries
u8 = torch.arange(0, 240, 10, dtype=torch.uint8)
i32 = torch.arange(24, dtype=torch.int32) * 90_000_000
f16 = torch.linspace(0, 65504, 24).half()
f32 = torch.linspace(0, 2.3, 24)
holes = torch.where(torch.arange(24) % 7 == 3, nan, torch.arange(24.0))
peaks = torch.where(torch.arange(24) % 7 == 3, inf, torch.arange(24.0))
table = torch.arange(48).view(2, 24)
long_table = (torch.arange(5000) * 7919) % 97
three, seven = torch.tensor(3), torch.tensor(0.7)
five = torch.tensor(5)
flag = torch.tensor(True)

ATTACKS: dict[str, MaskFunction] = {
    # Rounding at a threshold: 0.1 * k is above, at or below k / 10 as k goes.
    "tenths": lambda b, h, q, k: q * 0.1 <= k / 10,
    "tenths_double": lambda b, h, q, k: q.double() * 0.1 <= 0.3,
    "float32_of_double": lambda b, h, q, k: f32[q % 24] == f32.double()[k % 24],
    "third": lambda b, h, q, k: q / 3 * 3 == q,
    "difference": lambda b, h, q, k: (q * 0.1 - k * 0.1) == (q - k) * 0.1,
    "exponential": lambda b, h, q, k: torch.exp(q * 0.1) <= torch.exp((q + 1 - 1) * 0.1),
    "square_root": lambda b, h, q, k: torch.sqrt(q.float()) ** 2 == q,
    "saturated": lambda b, h, q, k: torch.tanh(q.float()) < 1.0,
    "floor_of_quotient": lambda b, h, q, k: (q * 0.1) // 0.1 == q,
    "remainder_of_tenths": lambda b, h, q, k: (q * 0.1) % 0.1 < 0.05,
    "half": lambda b, h, q, k: (q.half() * 0.1).half() <= 0.1 * k,
    "bfloat16": lambda b, h, q, k: q.bfloat16() == k,
    # Large positions: neighbours become equal in float32.
    "float32_positions": lambda b, h, q, k: q.float() > k.float(),
    "float_constant": lambda b, h, q, k: q <= 16777216.0,
    "float32_distance": lambda b, h, q, k: q.float() - k >= 1,
    "double_positions": lambda b, h, q, k: q.double() == k.double(),
    # Overflow and wrap-around.
    "half_overflow": lambda b, h, q, k: q.half() * 4000 <= k.half() * 4000,
    "half_negative_overflow": lambda b, h, q, k: q.half() * -4000 >= k.half() * -4000,
    "half_infinity": lambda b, h, q, k: f16[q % 24] * 2 - f16[k % 24] * 2 >= 0,
    "int8_wraps": lambda b, h, q, k: i8[q % 24] + i8[k % 24] >= 0,
    "int8_minimum": lambda b, h, q, k: (i8[q % 24].abs() >= 0) & (-i8[q % 24] == -i8[k % 24]),
    "int8_cast": lambda b, h, q, k: (q * 9).to(torch.int8) >= k,
    "uint8_below_zero": lambda b, h, q, k: u8[q % 24] - u8[k % 24] <= 30,
    "uint8_cast": lambda b, h, q, k: (q - k).to(torch.uint8) >= 5,
    "int32_wraps": lambda b, h, q, k: i32[q % 24] * 2 >= i32[k % 24],
    "int64_wraps": lambda b, h, q, k: q * 2**61 >= k,
    "int64_product": lambda b, h, q, k: (q * 2**31) * (k * 2**31) > 0,
    "shift_out": lambda b, h, q, k: (i8[q % 24] << 3) >= (i8[k % 24] >> 2),
    "float_to_int8": lambda b, h, q, k: (q * 7.5).to(torch.int8) > k,
    # A Python number is converted to the tensor's dtype first, where it may wrap.
    "int8_below_200": lambda b, h, q, k: i8[q % 24] < 200,
    "int8_is_200": lambda b, h, q, k: (i8[q % 24] == 200) | (k == 3),
    "int8_over_200": lambda b, h, q, k: i8[q % 24] // 200 >= 0,
    "int8_modulo_200": lambda b, h, q, k: i8[q % 24] % 200 >= 20,
    "int8_plus_200": lambda b, h, q, k: i8[q % 24] + 200 > 0,
    "uint8_above_minus_1": lambda b, h, q, k: u8[q % 24] > -1,
    "uint8_below_300": lambda b, h, q, k: u8[q % 24] < 300,
    "int8_cast_below_1000": lambda b, h, q, k: q.to(torch.int8) < 1000,
    # NaN and infinity in captured tensors.
    "nan": lambda b, h, q, k: holes[q % 24] >= 0,
    "not_nan": lambda b, h, q, k: ~(holes[q % 24] < 100),
    "nan_differs": lambda b, h, q, k: holes[q % 24] != holes[q % 24],
    "nan_minimum": lambda b, h, q, k: torch.minimum(holes[q % 24], k * 1.0) <= k,
    "nan_clamped": lambda b, h, q, k: holes[q % 24].clamp(0, 5) <= 5,
    "nan_times_zero": lambda b, h, q, k: holes[q % 24] * 0 == 0,
    "nan_is_true": lambda b, h, q, k: (holes[q % 24] * 0).bool(),
    "nan_where": lambda b, h, q, k: torch.where(q > k, holes[q % 24], 0.0) <= 100,
    "nan_sign": lambda b, h, q, k: torch.sign(holes[q % 24]) >= 0,
    "nan_cast": lambda b, h, q, k: holes[q % 24].long() >= 0,
    "inf_minus_inf": lambda b, h, q, k: peaks[q % 24] - peaks[k % 24] <= 100,
    "inf_times_zero": lambda b, h, q, k: peaks[q % 24] * (k * 0) == 0,
    "inf_over_inf": lambda b, h, q, k: peaks[q % 24] / peaks[k % 24] >= 0,
    "inf_sine": lambda b, h, q, k: torch.sin(peaks[q % 24]) <= 1.5,
    "inf_difference_clamped": lambda b, h, q, k: (peaks[q % 24] - peaks[k % 24]).clamp(0, 5) <= 5,
    "unknown_clamped": lambda b, h, q, k: torch.rsqrt((q - k) * 1.0).clamp(0, 5) <= 5,
    "unknown_saturated": lambda b, h, q, k: torch.tanh(torch.rsqrt((q - k) * 1.0)) <= 1.5,
    "log_of_negative": lambda b, h, q, k: torch.log((q - k) * 1.0) < 10,
    "root_of_negative": lambda b, h, q, k: torch.sqrt((q - k) * 1.0) >= 0,
    # Division by a range with zero in it.
    "over_zero": lambda b, h, q, k: q / k >= 0,
    "distance_in_denominator": lambda b, h, q, k: (q % 24 + 1) / (q - k) < 30,
    "over_distance": lambda b, h, q, k: 1.0 / (q - k) < 2,
    "float_floor_over_zero": lambda b, h, q, k: (q * 1.0) // (k - 3.0) <= 100,
    "float_modulo_zero": lambda b, h, q, k: (q * 1.0) % (k - 3.0) <= 100,
    # Signs of `//`, `%` and truncation.
    "floor": lambda b, h, q, k: (q - k) // 5 == -1,
    "floor_by_negative": lambda b, h, q, k: (q - k) // -5 == (k - q) // 5,
    "modulo_negative": lambda b, h, q, k: (q - k) % -7 >= -3,
    "modulo": lambda b, h, q, k: (q - k) % 7 < 3,
    "truncated": lambda b, h, q, k: torch.div(q - k, 5, rounding_mode="trunc") == 0,
    "varying_divisor": lambda b, h, q, k: (q - 12) // (k + 1) >= (q - 12) % (k + 1),
    "odd_power": lambda b, h, q, k: (q - k) ** 3 >= (q - k) ** 2,
    "and_bits": lambda b, h, q, k: ((q - 9) & (k - 3)) >= 0,
    "exclusive_or": lambda b, h, q, k: (q ^ k) < 8,
    "complement": lambda b, h, q, k: ~(q - k) < 0,
    "added_masks": lambda b, h, q, k: (q > k) + (q > 10),
    "compared_masks": lambda b, h, q, k: (q > k) == (k > 3),
    "alpha": lambda b, h, q, k: torch.sub(q, k, alpha=2) > torch.rsub(q, k, alpha=3),
    "inverted_clamp": lambda b, h, q, k: q.clamp(15, 5) <= k,
    "clamp_by_tensors": lambda b, h, q, k: q.clamp(k, k + 3) == q,
    # Captured tensors: single numbers, negative and shifted indices, several varying axes.
    "captured_limit": lambda b, h, q, k: q - k < three,
    "captured_float_limit": lambda b, h, q, k: (q - k) * 0.1 < seven,
    "captured_flag": lambda b, h, q, k: flag & (q >= k),
    "captured_place": lambda b, h, q, k: table[b, five] + k >= table[h, q % 24],
    "negative_index": lambda b, h, q, k: table[0][q % 24 - 24] >= table[0][k % 24],
    "index_across_zero": lambda b, h, q, k: table[1][q % 24 - 12] >= 30,
    "index_by_distance": lambda b, h, q, k: table[h, (q - k).clamp(-5, 18)] >= 20,
    "index_by_index": lambda b, h, q, k: table[0][(table[1][q % 24] * 5) % 24] >= k,
    "index_unbounded": lambda b, h, q, k: table[b, torch.fmod(q, 24)] >= table[b, k % 24],
    "two_varying_axes": lambda b, h, q, k: table[q % 2, k % 24] >= 20,
    "granules": lambda b, h, q, k: long_table[q % 24 * 200 + 11] >= long_table[k % 24 * 190],
    "row_first": lambda b, h, q, k: table[:, q % 24][b] >= 30,
    "vector_inside": lambda b, h, q, k: (table[b] == q).any() & (k > 3),
    "rounded_decimals": lambda b, h, q, k: torch.round(q * 0.37, decimals=1) > k * 0.37,
    "sign_of_mask": lambda b, h, q, k: torch.sign(q > k),
    "in_place": lambda b, h, q, k: (q - k).clamp_(min=0) > 4,
}


@pytest.mark.parametrize("base", [0, 2**24 - 8])
@pytest.mark.parametrize("name", ATTACKS)
def test_hostile_masks_are_bounded_soundly(name: str, base: int) -> None:
    share_decided(ATTACKS[name], base=base, n=400)


def test_soundness_is_not_bought_by_deciding_nothing() -> None:
    single = Rectangles(*(np.array([x]) for x in (0, 0, 5, 5, 3, 3)))
    undecided = [
        name
        for name in ("tenths", "floor", "modulo", "truncated", "half", "captured_limit", "alpha")
        if MaskBounds(trace_mask(ATTACKS[name])).classify(single) == UNDECIDED
    ]
    assert undecided == []


S, BLOCK = 256, 16
lengths = [40, 1, 1, 70, 16, 30, 2, 96]  # of documents; their sum is S
ids = torch.repeat_interleave(torch.arange(8), torch.tensor(lengths))
batch_ids = torch.stack([ids, torch.arange(S) // 50])
reach = torch.tensor([16, 90])
packed = document_from_lengths(lengths)

DECIDED: dict[str, MaskFunction] = {
    "full": full(),
    "nothing": ~full(),
    "causal": causal(),
    "strictly_future": ~causal(),
    "window": sliding_window(37, 5),
    "outside_window": ~sliding_window(37, 5),
    "wide_window": sliding_window(100),
    "documents": document(ids),
    "documents_int32": document(ids.int()),
    "documents_of_batch": document(batch_ids),
    "not_the_same_document": ~document(ids),
    "prefix": prefix_lm(70),
    "prefix_of_batch": prefix_lm(torch.tensor([33, 200])),
    "chunked": chunked(50),
    "causal_window": causal() & sliding_window(64, 64),
    "causal_documents": causal() & packed,
    "causal_chunks": causal() & chunked(48),
    "window_in_documents": sliding_window(37, 5) & packed,
    "window_in_chunks": sliding_window(30) & chunked(64),
    "documents_and_chunks": causal() & packed & chunked(32),
    "window_per_head": lambda b, h, q, k: (q - k).abs() <= reach[h],
    "branch_on_head": lambda b, h, q, k: torch.where(h == 0, q >= k, q - k < 50),
    "float_distance": lambda b, h, q, k: (q - k) * 0.5 <= 20.25,
    "decay": lambda b, h, q, k: torch.exp((k - q) * 0.1) > 0.05,
    "clamped": lambda b, h, q, k: (q - k).clamp(min=0) <= 40,
    "shifted": lambda b, h, q, k: k <= q + 33,
    "scaled": lambda b, h, q, k: 2 * k <= q,
    "captured_shift": lambda b, h, q, k: k <= q + reach[1],
}


# Of a union only blocks that one of its sides covers are known to be visible.
UNIONS: dict[str, MaskFunction] = {
    "causal_or_chunks": causal() | chunked(BLOCK),
    "window_or_first": causal() & (sliding_window(40) | (lambda b, h, q, k: k < BLOCK)),
    "prefix_or_documents": prefix_lm(64) | packed,
    "chunks_or_heads": chunked(4 * BLOCK) | (lambda b, h, q, k: (h == 1) & (k <= q)),
}


@pytest.mark.parametrize(
    ("mask_mod", "longest"),
    [pytest.param(mask, S // BLOCK, id=name) for name, mask in DECIDED.items()]
    + [pytest.param(mask, 1, id=name) for name, mask in UNIONS.items()],
)
def test_simple_masks_are_decided(mask_mod: MaskFunction, longest: int) -> None:
    """Rectangles of up to `longest` blocks a side that are all or nothing are known to be."""
    visible = visible_elements(mask_mod, 0, S)
    total = np.zeros((B, H, S + 1, S + 1), dtype=np.int64)
    total[:, :, 1:, 1:] = visible.cumsum(2).cumsum(3)
    blocks = range(S // BLOCK + 1)
    edges = np.array(
        [(i, i + n) for i in blocks for n in blocks[1 : longest + 1] if i + n < len(blocks)]
    )
    q, kv = np.meshgrid(np.arange(len(edges)), np.arange(len(edges)), indexing="ij")
    (q0, q1), (kv0, kv1) = (edges[axis.reshape(-1)].T * BLOCK for axis in (q, kv))
    bounds = MaskBounds(trace_mask(mask_mod))
    for b in range(B):
        for h in range(H):
            at = total[b, h]
            seen = at[q1, kv1] - at[q0, kv1] - at[q1, kv0] + at[q0, kv0]
            area = (q1 - q0) * (kv1 - kv0)
            truth = np.where(seen == area, ALL, np.where(seen == 0, NONE, UNDECIDED))
            here = np.full(q0.shape, b), np.full(q0.shape, h)
            codes = bounds.classify(Rectangles(*here, q0, q1 - 1, kv0, kv1 - 1))
            wrong = np.flatnonzero(codes != truth)
            assert wrong.size == 0, (
                f"{wrong.size} of {truth.size}, e.g. q={q0[wrong[0]]}..{q1[wrong[0]] - 1} "
                f"kv={kv0[wrong[0]]}..{kv1[wrong[0]] - 1}: {codes[wrong[0]]}, is {truth[wrong[0]]}"
            )


def test_long_documents_are_decided_in_granules() -> None:
    """Above 4,096 tokens ranges are kept for 32 tokens at a time: aligned blocks lose nothing."""
    ids = torch.arange(8192) // 256
    block = np.arange(0, 8192, 128)
    q, kv = (axis.reshape(-1) for axis in np.meshgrid(block, block))
    zero = np.zeros_like(q)
    codes = MaskBounds(trace_mask(document(ids))).classify(
        Rectangles(zero, zero, q, q + 127, kv, kv + 127)
    )
    assert (codes == np.where(q // 256 == kv // 256, ALL, NONE)).all()


# Long captured tensors.


@pytest.mark.parametrize("length", [4096, 4097, 4128, (1 << 21) + 1, (1 << 21) + 77])
@pytest.mark.parametrize("dtype", [np.int16, np.uint16, np.uint8, np.float64])
def test_ranges_of_a_long_table_contain_the_true_ones(length: int, dtype: type) -> None:
    """And are the true ones where whole granules are asked for."""
    random = np.random.default_rng(0)
    values = random.integers(-30_000, 30_000, length).astype(dtype)  # unsigned ones wrap around
    table = bounds._RangeTable(values, 0)
    assert table.granule == (1 if length <= 4096 else 32 if length < 1 << 21 else 128)
    first = random.integers(0, length, 300)
    last = np.minimum(first + random.integers(0, 1 << random.integers(1, 22, 300)), length - 1)
    last[:2], first[1] = length - 1, 0  # to the end, which no granule fills
    found = table.query([], Interval(first, last))
    whole_first = first // table.granule * table.granule
    whole_last = np.minimum((last // table.granule + 1) * table.granule, length)
    for i in range(first.size):
        inside = values[first[i] : last[i] + 1]
        assert found.lo[i] <= inside.min()
        assert found.hi[i] >= inside.max()
        granules = values[whole_first[i] : whole_last[i]]
        assert (found.lo[i], found.hi[i]) == (granules.min(), granules.max())
    if dtype != np.float64:
        assert found.lo.dtype == found.hi.dtype == np.int64


def test_the_range_of_a_whole_table_is_not_in_its_storage() -> None:
    table = bounds._RangeTable(np.array([-30_000, 30_000], dtype=np.int16), 0, whole=True)
    found = table.query([], Interval(np.array([0]), np.array([0])))
    assert (found.lo.dtype, found.hi.dtype) == (np.int64, np.int64)
    assert (found.lo[0], found.hi[0]) == (-30_000, 30_000)
