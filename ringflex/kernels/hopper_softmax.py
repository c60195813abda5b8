"""Scores and weights of one tile of the Hopper forward."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from ringflex.kernels.triton_common import LOG2E


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
    MASKED: gl.constexpr, mask_mod: gl.constexpr, score_mod: gl.constexpr, BLOCK_N: gl.constexpr,
    S: gl.constexpr,
):  # fmt: skip
    """Weights of a tile of raw products, the new maximum and sum, and what to shrink by."""
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
    top = gl.maximum(m, gl.max(s, axis=1) * factor)
    p = gl.exp2(s * factor - top[:, None])
    shrink = gl.exp2(m - top)
    return p, top, l * shrink + gl.sum(p, axis=1), shrink
