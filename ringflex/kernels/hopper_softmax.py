"""Scores and weights of one tile of the Hopper forward.

The online softmax (Milakov and Gimelshein, 2018) takes weights relative to a running maximum, and
shrinks what was added up whenever that grows. Any number near it would do: weights and sums have
the exponents of fp32, bf16 ones as well. So the maximum is that of the partial tiles that a row
sees, or of the first tile; whole tiles keep it *fixed*, which takes a third fewer instructions.
Weights above 1 are as exact as those below. Should scores be so far from it that sums leave their
range, `out_of_range` tells, and all is computed once more with a running maximum
(`hopper_retries`).
"""

from __future__ import annotations

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from ringflex.kernels.triton_common import LOG2E

# What a maximum begins with that will be fixed; of scores in base 2. A row that sees little or
# nothing of the first tiles, or far ones, as with a bias by distance, may see much more in others.
LEAST_MAXIMUM = gl.constexpr(-40.0)
# Of a row's weights: between these, none that counts is subnormal, and sums of values are finite.
SMALLEST_SUM = gl.constexpr(2.0**-60)
LARGEST_SUM = gl.constexpr(2.0**100)


@gluon.constexpr_function
def fixes_maximum(dtype):
    """Whether weights of a dtype have the exponents for it."""
    return dtype == gl.bfloat16


@gluon.jit
def _scores(
    s, b, h, q_idx, kv_start, kv_limit, scale, mask_tables, score_tables,
    MASKED: gl.constexpr, PADDED: gl.constexpr, mask_mod: gl.constexpr, score_mod: gl.constexpr,
    BLOCK_N: gl.constexpr, S: gl.constexpr,
):  # fmt: skip
    """Scores of a tile of raw products, scaled if there is a score mod, -inf where hidden.

    PADDED: the tile reaches beyond the last key; a mod is asked only about valid positions.
    """
    if MASKED or score_mod is not None:
        kv_idx = (kv_start + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, S)))[None, :]
        at_kv = kv_idx
        if PADDED:
            at_kv = gl.minimum(kv_idx, kv_limit - 1)
    if score_mod is not None:
        s = score_mod(s * scale, b, h, q_idx, at_kv, score_tables)
    if MASKED:
        if mask_mod is not None:
            s = gl.where(mask_mod(b, h, q_idx, at_kv, mask_tables), s, float("-inf"))
        if PADDED:
            s = gl.where(kv_idx < kv_limit, s, float("-inf"))
    return s


@gluon.jit
def softmax(
    s, m, l, b, h, q_idx, kv_start, kv_limit, scale, mask_tables, score_tables,
    MASKED: gl.constexpr, FIXED: gl.constexpr, mask_mod: gl.constexpr, score_mod: gl.constexpr,
    BLOCK_N: gl.constexpr, S: gl.constexpr,
):  # fmt: skip
    """Weights of a tile of raw products, the new maximum and sums, and what to shrink by.

    l: sums `[rows, 4]`, by lane (`in_lanes`). FIXED: the maximum stays what it is, and
    nothing is to shrink.
    """
    if MASKED:
        if kv_start + BLOCK_N > kv_limit:
            s = _scores(
                s, b, h, q_idx, kv_start, kv_limit, scale, mask_tables, score_tables,
                True, True, mask_mod, score_mod, BLOCK_N, S,
            )  # fmt: skip
        else:
            s = _scores(
                s, b, h, q_idx, kv_start, kv_limit, scale, mask_tables, score_tables,
                True, False, mask_mod, score_mod, BLOCK_N, S,
            )  # fmt: skip
    else:
        s = _scores(
            s, b, h, q_idx, kv_start, kv_limit, scale, mask_tables, score_tables,
            False, False, mask_mod, score_mod, BLOCK_N, S,
        )  # fmt: skip
    # A positive factor may be taken out of the maximum: one multiply-add per score.
    factor = scale * LOG2E if score_mod is None else LOG2E
    top = m
    if not FIXED:
        top = gl.maximum(m, gl.max(s, axis=1) * factor)
    p = gl.exp2(s * factor - top[:, None])
    part = in_lanes(p)
    shrink = m
    if not FIXED:
        shrink = gl.exp2(m - top)
        rows: gl.constexpr = gl.SliceLayout(1, part.type.layout)
        l = l * gl.convert_layout(shrink, rows)[:, None]
    return p, top, l + part, shrink


@gluon.jit
def in_lanes(p):
    """What each of the four lanes of a row holds of it, added up: `[rows, 4]`."""
    columns: gl.constexpr = p.shape[1] // 8
    return gl.sum(gl.sum(p.reshape([p.shape[0], columns, 4, 2]), axis=3), axis=1)


@gluon.jit
def out_of_range(acc, l):
    """Whether sums of a warpgroup, of weights (`in_lanes`) or of values, are not finite, or as
    small as if nothing had been seen; the same number, 0 or 1, for all threads."""
    rows: gl.constexpr = gl.SliceLayout(1, acc.type.layout)
    weights = gl.convert_layout(gl.sum(l, axis=1), rows)
    values = gl.reduce(gl.abs(acc), 1, _larger_or_nan)
    fine = (weights > SMALLEST_SUM) & (weights < LARGEST_SUM) & (values < float("inf"))
    return gl.max(gl.where(fine, 0, 1), axis=0)


@gluon.jit
def _larger_or_nan(a, b):
    return gl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)
