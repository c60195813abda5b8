"""The forward kernel in portable Triton.

Online softmax (Milakov and Gimelshein, 2018; Dao et al., "FlashAttention", 2022) over the tiles of
K/V that a tile of queries sees, in base 2:

    s_ij = log2(e) score_mod(scale q_i . k_j),  out_i = sum_j 2^(s_ij - lse_i) v_j

One program per tile of queries, head and batch element, longest rows first. What was computed
before, over other K/V, is merged in the epilogue: a ring needs no further kernel.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ringflex.kernels.triton_common import (
    BEGINS,
    ENDS,
    LN2,
    LOG2E,
    LOWEST,
    earlier_lse,
    first_tile,
    following_tile,
    load_tile,
    merge_weights,
    position_of,
    row_places,
    store_tile,
    visible_in,
)


@triton.jit
def _attend(
    carry, q, k, v, b, h, kv_head, q_idx, run, tiles, runs, kv_starts, q_limit, kv_limit, kv_len,
    scale, mask_tables, score_tables,
    MASKED: tl.constexpr, mask_mod: tl.constexpr, score_mod: tl.constexpr, IN_ORDER: tl.constexpr,
    BLOCK_N: tl.constexpr, TILES: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr,
    DV: tl.constexpr, DV_PAD: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Visits one list of a row. carry: weighted values, maximum and sum of each query."""
    acc, m, l = carry
    tile, end, run, next_tile, next_end = first_tile(runs, run, TILES)
    for _ in tl.range(0, tiles, num_stages=STAGES):
        k_tile = load_tile(k, b, kv_head, tile * BLOCK_N, kv_len, BLOCK_N, D, D_PAD, TMA)
        s = tl.dot(q, k_tile.T, input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]
        if MASKED or score_mod is not None:
            start = position_of(kv_starts, tile, BLOCK_N, TILES, IN_ORDER)
            kv_idx = (start + tl.arange(0, BLOCK_N))[None, :]
        if score_mod is not None:
            if MASKED:  # a mod is asked only about valid positions, also where it is hidden
                at_q, at_kv = tl.minimum(q_idx, q_limit - 1), tl.minimum(kv_idx, kv_limit - 1)
                s = score_mod(s * scale, b, h, at_q, at_kv, score_tables) * LOG2E
            else:
                s = score_mod(s * scale, b, h, q_idx, kv_idx, score_tables) * LOG2E
        if MASKED:
            seen = visible_in(mask_mod, b, h, q_idx, kv_idx, q_limit, kv_limit, mask_tables)
            s = tl.where(seen, s, float("-inf"))
        if score_mod is not None:
            top = tl.maximum(m, tl.max(s, axis=1))
            p = tl.exp2(s - top[:, None])
        else:  # scale > 0, so it may be taken out of the maximum; one multiply-add per score
            top = tl.maximum(m, tl.max(s, axis=1) * (scale * LOG2E))
            p = tl.exp2(s * (scale * LOG2E) - top[:, None])
        shrink = tl.exp2(m - top)
        l = l * shrink + tl.sum(p, axis=1)
        acc = acc * shrink[:, None]
        v_tile = load_tile(v, b, kv_head, tile * BLOCK_N, kv_len, BLOCK_N, DV, DV_PAD, TMA)
        acc = tl.dot(p.to(v_tile.dtype), v_tile, acc, input_precision=PRECISION)
        m = top
        tile, end, run, next_tile, next_end = following_tile(
            runs, tile, end, run, next_tile, next_end, TILES
        )
    return acc, m, l


@triton.jit(
    do_not_specialize=[
        "q_len", "kv_len", "q_limit", "kv_limit", "heads", "group", "blocks",
        "row_stride_b", "row_stride_h", "kv_stride_b",
    ]
)  # fmt: skip
def forward_kernel(
    q, k, v, out, lse, before_out, before_lse, first_lse, score_tables, scale,
    rows, runs, order, turns, q_starts, kv_starts, mask_tables,
    q_len, kv_len, q_limit, kv_limit, heads, group, blocks,
    row_stride_b, row_stride_h, kv_stride_b,
    mask_mod: tl.constexpr, score_mod: tl.constexpr, PARTIAL: tl.constexpr, IN_ORDER: tl.constexpr,
    MERGE_OUT: tl.constexpr, MERGE_LSE: tl.constexpr, IN_PLACE: tl.constexpr,
    STAGED: tl.constexpr, MERGE_FIRST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TILES_M: tl.constexpr, TILES_N: tl.constexpr,
    D: tl.constexpr, D_PAD: tl.constexpr, DV: tl.constexpr, DV_PAD: tl.constexpr,
    TMA: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Grid: `(B * heads * blocks * TILES_M,)`; `blocks` of queries, `TILES_M` tiles in each.

    q, k, v: descriptors or (pointer, strides). out, before_out (fp32): (pointer, strides).
    lse, before_lse: (pointer, encoded strides), natural log, fp32, or fp64 between merges.
    rows, runs, order: `BlockLists`; a mask that distinguishes batch elements or heads has its rows
    `row_stride_b`, `row_stride_h` apart. q_starts, kv_starts: `Positions`.

    MERGE_OUT, MERGE_LSE: merge with before_out and before_lse; IN_PLACE: which are out and lse.
    STAGED: they are running results, which are written as well, and turns tells where each block
    begins (there it merges with first_lse, if MERGE_FIRST) and ends (there it is written to out and
    lse); see `stages`.
    """
    program = tl.program_id(0)
    per_head = blocks * TILES_M
    head = program // per_head
    b, h = head // heads, head % heads
    kv_head = h // group
    first_row = b * row_stride_b + h * row_stride_h
    block = tl.load(order + first_row + program % per_head // TILES_M)
    turn = 0
    if STAGED:
        turn = tl.load(turns + first_row + block)
        if turn == 0:
            return
    within = program % per_head % TILES_M * BLOCK_M
    start = block * TILES_M * BLOCK_M + within
    listed = rows + 4 * (first_row + block)
    partial_blocks, full_blocks = tl.load(listed + 1), tl.load(listed + 3)
    if IN_PLACE and partial_blocks + full_blocks == 0:
        return
    q_idx = (tl.load(q_starts + block) + within + tl.arange(0, BLOCK_M))[:, None]
    q_tile = load_tile(q, b, h, start, q_len, BLOCK_M, D, D_PAD, TMA)
    acc = tl.zeros([BLOCK_M, DV_PAD], tl.float32)
    carry = acc, tl.full([BLOCK_M], LOWEST, tl.float32), tl.zeros([BLOCK_M], tl.float32)
    kv_starts += b * kv_stride_b
    if PARTIAL:
        carry = _attend(
            carry, q_tile, k, v, b, h, kv_head, q_idx, tl.load(listed), partial_blocks * TILES_N,
            runs, kv_starts, q_limit, kv_limit, kv_len, scale, mask_tables, score_tables,
            True, mask_mod, score_mod, IN_ORDER, BLOCK_N, TILES_N, D, D_PAD, DV, DV_PAD,
            TMA, PRECISION, STAGES,
        )  # fmt: skip
    acc, m, l = _attend(
        carry, q_tile, k, v, b, h, kv_head, q_idx, tl.load(listed + 2), full_blocks * TILES_N,
        runs, kv_starts, q_limit, kv_limit, kv_len, scale, mask_tables, score_tables,
        False, mask_mod, score_mod, IN_ORDER, BLOCK_N, TILES_N, D, D_PAD, DV, DV_PAD,
        TMA, PRECISION, STAGES,
    )  # fmt: skip

    row = start + tl.arange(0, BLOCK_M)
    inside = row < q_len
    empty = l == 0
    part_lse = tl.where(empty, float("-inf"), m + tl.log2(tl.where(empty, 1.0, l)))  # base 2
    weight = 1.0 / tl.where(empty, 1.0, l)
    result = acc * weight[:, None]
    if MERGE_LSE:
        old = earlier_lse(before_lse, first_lse, b, h, row, inside, turn, STAGED, MERGE_FIRST)
        old_weight, weight, part_lse = merge_weights(old, part_lse)
        result = result * weight[:, None]
        if MERGE_OUT:
            if turn & BEGINS == 0:
                before = load_tile(before_out, b, h, start, q_len, BLOCK_M, DV, DV_PAD, False)
                result += before * old_weight[:, None]
    if STAGED:
        if turn & ENDS == 0:
            store_tile(before_out, b, h, start, q_len, result, DV)
            tl.store(row_places(before_lse, b, h, row), part_lse * LN2, mask=inside)
        else:
            store_tile(out, b, h, start, q_len, result, DV)
            tl.store(row_places(lse, b, h, row), part_lse * LN2, mask=inside)
    else:
        store_tile(out, b, h, start, q_len, result, DV)
        tl.store(row_places(lse, b, h, row), part_lse * LN2, mask=inside)
