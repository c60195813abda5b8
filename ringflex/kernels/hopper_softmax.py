"""Scores and weights of one tile of the Hopper forward."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma_wait

from ringflex.kernels.hopper_common import HANDOVER
from ringflex.kernels.hopper_intrinsics import come, come_after
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
    s, m, l, b, h, q_idx, kv_start, kv_limit, scale, mask_tables, score_tables, adding, barriers,
    zeros,
    MASKED: gl.constexpr, mask_mod: gl.constexpr, score_mod: gl.constexpr, BLOCK_N: gl.constexpr,
    S: gl.constexpr, SOON: gl.constexpr,
):  # fmt: skip
    """Weights of a tile of raw products, the new maximum and sum, what to shrink by, and `adding`.

    adding: the product of the weights before with their values, which is under way; waited for when
        the first `SOON` columns have weights (0: it is not). Left to itself, the assembler waits
        wherever it likes, as it takes a wait to be free.
    barriers: to come to just before and after that, by number: keys and values have been read.
    zeros: in shared memory; what is read after a barrier does not move before it.
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
    top = gl.maximum(m, gl.max(s, axis=1) * factor)
    p = gl.exp2(s * factor - top[:, None])
    if SOON > 0:
        soon = gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, S))[None, :] < SOON
        total = gl.sum(gl.where(soon, p, -0.0), axis=1)  # plus -0: nothing, also to the compiler
        total = come_after(total, barriers[0], HANDOVER)
        adding = warpgroup_mma_wait(0, deps=(adding,))
        come(barriers[1], HANDOVER)
        later = top + zeros.load(gl.SliceLayout(1, S))
        p = gl.where(soon, p, gl.exp2(s * factor - later[:, None]))
        total += gl.sum(gl.where(soon, -0.0, p), axis=1)
    else:
        total = gl.sum(p, axis=1)
    shrink = gl.exp2(m - top)
    return p, top, l * shrink + total, shrink, adding
