"""The backward kernels in portable Triton.

With the global lse and delta (Dao et al., "FlashAttention-2", 2023, algorithm 2), in base 2:

    p_ij = 2^(s_ij - lse_i),  ds_ij = p_ij (dout_i . v_j - delta_i),  then back through score_mod
    dv_j = sum_i p_ij dout_i,  dk_j = scale sum_i ds_ij q_i,  dq_i = scale sum_j ds_ij k_j

`key_kernel` keeps a tile of keys and walks the queries that see it, for dK and dV; a group's query
heads follow one another in one program, so nothing is added atomically. `query_kernel` keeps a
tile of queries, for dQ and the gradients of captured tensors. Together they are the two-pass form:
the same bits every run. In the one-pass form `key_kernel` adds dQ atomically as well: five matrix
products for seven, but no fixed order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ringflex.kernels.triton_common import (
    BEGINS,
    ENDS,
    LOG2E,
    first_tile,
    following_tile,
    load_tile,
    position_of,
    row_places,
    store_tile,
    visible_in,
)
from ringflex.kernels.triton_math import LARGEST


@triton.jit(do_not_specialize=["q_len", "padded_len", "heads"])
def row_terms_kernel(
    out, dout, lse, dlse, lse_log2, delta, factor_log2, q_len, padded_len, heads,
    WITH_DLSE: tl.constexpr, ROWS: tl.constexpr, DV: tl.constexpr, DV_PAD: tl.constexpr,
):  # fmt: skip
    """What the backward needs of each query: lse in base 2, less that of a factor that weights are
    to have, and delta = dout . out - dlse.

    Grid: `(B * heads * ceil(padded_len / ROWS),)`. Queries that see nothing, and the padding up to
    `padded_len`, get lse_log2 = inf, so that p = 0, and delta = 0, whatever dlse is there.
    lse_log2, delta: `[B * heads, padded_len]`.
    """
    per_head = tl.cdiv(padded_len, ROWS)
    head = tl.program_id(0) // per_head
    b, h = head // heads, head % heads
    start = tl.program_id(0) % per_head * ROWS
    row = start + tl.arange(0, ROWS)
    inside = row < q_len
    value = tl.load(row_places(lse, b, h, row), mask=inside, other=float("-inf"))
    value = tl.where(value == float("-inf"), float("inf"), value * LOG2E - factor_log2)
    o = load_tile(out, b, h, start, q_len, ROWS, DV, DV_PAD, False).to(tl.float32)
    d = load_tile(dout, b, h, start, q_len, ROWS, DV, DV_PAD, False).to(tl.float32)
    total = tl.sum(o * d, axis=1)
    if WITH_DLSE:
        total -= tl.load(row_places(dlse, b, h, row), mask=inside, other=0.0)
    total = tl.where(value == float("inf"), 0.0, total)
    kept = head.to(tl.int64) * padded_len + row
    tl.store(lse_log2 + kept, value, mask=row < padded_len)
    tl.store(delta + kept, total, mask=row < padded_len)


@triton.jit
def load_rows(x, head, start, padded_len, BLOCK_M: tl.constexpr, TMA: tl.constexpr):
    """`BLOCK_M` entries of one head's row terms."""
    if TMA:
        return x.load([head, start]).reshape(BLOCK_M)
    else:
        return tl.load(x + head.to(tl.int64) * padded_len + start + tl.arange(0, BLOCK_M))


@triton.jit
def _weights(
    s, lse, b, h, q_idx, kv_idx, q_limit, kv_limit, scale, mask_tables, score_tables,
    MASKED: tl.constexpr, mask_mod: tl.constexpr, score_mod: tl.constexpr,
):  # fmt: skip
    """p of a tile of raw products `s`; the scaled scores and the indices that the mods were given;
    what is visible, if MASKED. Queries and keys may be either way round."""
    seen = q_idx
    if MASKED:
        seen = visible_in(mask_mod, b, h, q_idx, kv_idx, q_limit, kv_limit, mask_tables)
        q_idx, kv_idx = tl.minimum(q_idx, q_limit - 1), tl.minimum(kv_idx, kv_limit - 1)
    if score_mod is None:
        p = tl.exp2(s * (scale * LOG2E) - lse)
    else:
        s = s * scale
        p = tl.exp2(score_mod(s, b, h, q_idx, kv_idx, score_tables) * LOG2E - lse)
    if MASKED:
        p = tl.where(seen, p, 0.0)
    return p, s, q_idx, kv_idx, seen


@triton.jit
def _through_score(
    s, ds, b, h, q_idx, kv_idx, seen, score_tables, into,
    MASKED: tl.constexpr, score_grad: tl.constexpr, HOW: tl.constexpr, Q_AXIS: tl.constexpr,
):  # fmt: skip
    """Back through the score mod; adds into the gradients of its tables."""
    if score_grad is not None:
        if MASKED:
            ds = tl.where(seen, ds, 0.0)
        ds = score_grad(s, ds, b, h, q_idx, kv_idx, score_tables, into, HOW, Q_AXIS)
        if MASKED:  # whatever the derivative is where nothing is seen
            ds = tl.where(seen, ds, 0.0)
    return ds


@triton.jit
def _walk_queries(
    carry, k, v, q, dout, lse, delta, dq, b, h, heads, kv_idx, run, tiles, runs, q_starts,
    q_limit, kv_limit, q_len, padded_len, scale, mask_tables, score_tables, into,
    MASKED: tl.constexpr, mask_mod: tl.constexpr, score_mod: tl.constexpr,
    score_grad: tl.constexpr, HOW: tl.constexpr, ONE_PASS: tl.constexpr,
    BLOCK_M: tl.constexpr, TILES: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr,
    DV: tl.constexpr, DV_PAD: tl.constexpr, TMA: tl.constexpr, ROWS_TMA: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One list of a row of keys, one head. carry: dk (not yet scaled) and dv, `[BLOCK_N, D]`."""
    dk, dv = carry
    head = b * heads + h
    tile, end, run, next_tile, next_end = first_tile(runs, run, TILES)
    for _ in tl.range(0, tiles, num_stages=STAGES):
        start = tile * BLOCK_M
        q_tile = load_tile(q, b, h, start, q_len, BLOCK_M, D, D_PAD, TMA)
        s = tl.dot(k, q_tile.T, input_precision=PRECISION)  # [BLOCK_N, BLOCK_M]
        q_idx = position_of(q_starts, tile, BLOCK_M, TILES, False)
        q_idx = (q_idx + tl.arange(0, BLOCK_M))[None, :]
        lse_rows = load_rows(lse, head, start, padded_len, BLOCK_M, ROWS_TMA)[None, :]
        p, s, at_q, at_kv, seen = _weights(
            s, lse_rows, b, h, q_idx, kv_idx, q_limit, kv_limit, scale,
            mask_tables, score_tables, MASKED, mask_mod, score_mod,
        )  # fmt: skip
        dout_tile = load_tile(dout, b, h, start, q_len, BLOCK_M, DV, DV_PAD, TMA)
        dv = tl.dot(p.to(dout_tile.dtype), dout_tile, dv, input_precision=PRECISION)
        dp = tl.dot(v, dout_tile.T, input_precision=PRECISION)
        delta_rows = load_rows(delta, head, start, padded_len, BLOCK_M, ROWS_TMA)[None, :]
        ds = p * (dp - delta_rows)
        ds = _through_score(
            s, ds, b, h, at_q, at_kv, seen, score_tables, into, MASKED, score_grad, HOW, 1
        )
        ds = ds.to(q_tile.dtype)
        dk = tl.dot(ds, q_tile, dk, input_precision=PRECISION)
        if ONE_PASS:
            dq_tile = tl.dot(ds.T, k, input_precision=PRECISION) * scale  # [BLOCK_M, D_PAD]
            rows, cols = tl.arange(0, BLOCK_M), tl.arange(0, D_PAD)
            base = dq[0] + b.to(tl.int64) * dq[1] + h.to(tl.int64) * dq[2]
            places = base + start.to(tl.int64) * dq[3] + rows[:, None] * dq[3] + cols[None, :]
            inside = (start + rows < q_len)[:, None] & (cols < D)[None, :]
            tl.atomic_add(places, dq_tile, mask=inside, sem="relaxed")
        tile, end, run, next_tile, next_end = following_tile(
            runs, tile, end, run, next_tile, next_end, TILES
        )
    return dk, dv


@triton.jit(
    do_not_specialize=[
        "q_len", "kv_len", "q_limit", "kv_limit", "padded_len", "kv_heads", "group", "blocks",
        "row_stride_b", "row_stride_h", "order_stride_b", "order_stride_h", "kv_stride_b",
    ]
)  # fmt: skip
def key_kernel(
    q, k, v, dout, lse, delta, dq, dk, dv, score_tables, into, scale,
    rows, runs, order, q_starts, kv_starts, mask_tables,
    q_len, kv_len, q_limit, kv_limit, padded_len, kv_heads, group, blocks,
    row_stride_b, row_stride_h, order_stride_b, order_stride_h, kv_stride_b,
    mask_mod: tl.constexpr, score_mod: tl.constexpr, score_grad: tl.constexpr, HOW: tl.constexpr,
    PARTIAL: tl.constexpr, IN_ORDER: tl.constexpr, ONE_PASS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TILES_M: tl.constexpr, TILES_N: tl.constexpr,
    D: tl.constexpr, D_PAD: tl.constexpr, DV: tl.constexpr, DV_PAD: tl.constexpr,
    TMA: tl.constexpr, ROWS_TMA: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dK and dV. Grid: `(B * kv_heads * blocks * TILES_N,)`; `blocks` of keys.

    lse, delta: row terms, descriptors (if ROWS_TMA) or pointers. dq: fp32, contiguous, of the
    one-pass form; `into`, the gradients of tables, too. dk, dv: (pointer, strides).
    The others as in `forward_kernel`, but for rows of keys; `order` has strides of its own.
    """
    program = tl.program_id(0)
    per_head = blocks * TILES_N
    head = program // per_head
    b, kv_head = head // kv_heads, head % kv_heads
    order += b * order_stride_b + kv_head * order_stride_h
    block = tl.load(order + program % per_head // TILES_N)
    within = program % per_head % TILES_N * BLOCK_N
    start = block * TILES_N * BLOCK_N + within
    kv_idx = position_of(kv_starts + b * kv_stride_b, block, BLOCK_N * TILES_N, 1, IN_ORDER)
    kv_idx = (kv_idx + within + tl.arange(0, BLOCK_N))[:, None]
    k_tile = load_tile(k, b, kv_head, start, kv_len, BLOCK_N, D, D_PAD, TMA)
    v_tile = load_tile(v, b, kv_head, start, kv_len, BLOCK_N, DV, DV_PAD, TMA)
    carry = tl.zeros([BLOCK_N, D_PAD], tl.float32), tl.zeros([BLOCK_N, DV_PAD], tl.float32)
    for member in range(group):
        h = kv_head * group + member
        listed = rows + 4 * (b * row_stride_b + h * row_stride_h + block)
        if PARTIAL:
            carry = _walk_queries(
                carry, k_tile, v_tile, q, dout, lse, delta, dq, b, h, kv_heads * group, kv_idx,
                tl.load(listed), tl.load(listed + 1) * TILES_M, runs, q_starts,
                q_limit, kv_limit, q_len, padded_len, scale, mask_tables, score_tables, into,
                True, mask_mod, score_mod, score_grad, HOW, ONE_PASS,
                BLOCK_M, TILES_M, D, D_PAD, DV, DV_PAD, TMA, ROWS_TMA, PRECISION, STAGES,
            )  # fmt: skip
        carry = _walk_queries(
            carry, k_tile, v_tile, q, dout, lse, delta, dq, b, h, kv_heads * group, kv_idx,
            tl.load(listed + 2), tl.load(listed + 3) * TILES_M, runs, q_starts,
            q_limit, kv_limit, q_len, padded_len, scale, mask_tables, score_tables, into,
            False, mask_mod, score_mod, score_grad, HOW, ONE_PASS,
            BLOCK_M, TILES_M, D, D_PAD, DV, DV_PAD, TMA, ROWS_TMA, PRECISION, STAGES,
        )  # fmt: skip
    dk_tile, dv_tile = carry
    store_tile(dk, b, kv_head, start, kv_len, dk_tile * scale, D)
    store_tile(dv, b, kv_head, start, kv_len, dv_tile, DV)


@triton.jit
def _walk_keys(
    dq, q, dout, lse, delta, k, v, b, h, kv_head, q_idx, run, tiles, runs, kv_starts,
    q_limit, kv_limit, kv_len, scale, mask_tables, score_tables, into,
    MASKED: tl.constexpr, mask_mod: tl.constexpr, score_mod: tl.constexpr,
    score_grad: tl.constexpr, HOW: tl.constexpr, IN_ORDER: tl.constexpr,
    BLOCK_N: tl.constexpr, TILES: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr,
    DV: tl.constexpr, DV_PAD: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """One list of a row of queries: dq, not yet scaled, `[BLOCK_M, D_PAD]`."""
    tile, end, run, next_tile, next_end = first_tile(runs, run, TILES)
    for _ in tl.range(0, tiles, num_stages=STAGES):
        start = tile * BLOCK_N
        k_tile = load_tile(k, b, kv_head, start, kv_len, BLOCK_N, D, D_PAD, TMA)
        s = tl.dot(q, k_tile.T, input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]
        kv_idx = position_of(kv_starts, tile, BLOCK_N, TILES, IN_ORDER)
        kv_idx = (kv_idx + tl.arange(0, BLOCK_N))[None, :]
        p, s, at_q, at_kv, seen = _weights(
            s, lse, b, h, q_idx, kv_idx, q_limit, kv_limit, scale,
            mask_tables, score_tables, MASKED, mask_mod, score_mod,
        )  # fmt: skip
        v_tile = load_tile(v, b, kv_head, start, kv_len, BLOCK_N, DV, DV_PAD, TMA)
        dp = tl.dot(dout, v_tile.T, input_precision=PRECISION)
        ds = p * (dp - delta)
        ds = _through_score(
            s, ds, b, h, at_q, at_kv, seen, score_tables, into, MASKED, score_grad, HOW, 0
        )
        dq = tl.dot(ds.to(k_tile.dtype), k_tile, dq, input_precision=PRECISION)
        tile, end, run, next_tile, next_end = following_tile(
            runs, tile, end, run, next_tile, next_end, TILES
        )
    return dq


@triton.jit(
    do_not_specialize=[
        "q_len", "kv_len", "q_limit", "kv_limit", "padded_len", "heads", "group", "blocks",
        "row_stride_b", "row_stride_h", "kv_stride_b",
    ]
)  # fmt: skip
def query_kernel(
    q, k, v, dout, lse, delta, dq, running, score_tables, into, scale,
    rows, runs, order, turns, q_starts, kv_starts, mask_tables,
    q_len, kv_len, q_limit, kv_limit, padded_len, heads, group, blocks,
    row_stride_b, row_stride_h, kv_stride_b,
    mask_mod: tl.constexpr, score_mod: tl.constexpr, score_grad: tl.constexpr, HOW: tl.constexpr,
    PARTIAL: tl.constexpr, IN_ORDER: tl.constexpr, STAGED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TILES_M: tl.constexpr, TILES_N: tl.constexpr,
    D: tl.constexpr, D_PAD: tl.constexpr, DV: tl.constexpr, DV_PAD: tl.constexpr,
    TMA: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dQ, and the gradients of the score mod's tables. Grid and arguments as `forward_kernel`'s.

    lse, delta: row terms, pointers. dq: (pointer, strides). STAGED: turns tells where each block
    begins and ends; in between, dQ is in `running`, fp32. HOW: see `triton_math`; LARGEST writes
    no dQ.
    """
    program = tl.program_id(0)
    per_head = blocks * TILES_M
    head = program // per_head
    b, h = head // heads, head % heads
    kv_head = h // group
    first_row = b * row_stride_b + h * row_stride_h
    block = tl.load(order + first_row + program % per_head // TILES_M)
    if STAGED:
        turn = tl.load(turns + first_row + block)
        if turn == 0:
            return
    within = program % per_head % TILES_M * BLOCK_M
    start = block * TILES_M * BLOCK_M + within
    listed = rows + 4 * (first_row + block)
    q_idx = (tl.load(q_starts + block) + within + tl.arange(0, BLOCK_M))[:, None]
    q_tile = load_tile(q, b, h, start, q_len, BLOCK_M, D, D_PAD, TMA)
    dout_tile = load_tile(dout, b, h, start, q_len, BLOCK_M, DV, DV_PAD, TMA)
    lse_rows = load_rows(lse, head, start, padded_len, BLOCK_M, False)[:, None]
    delta_rows = load_rows(delta, head, start, padded_len, BLOCK_M, False)[:, None]
    kv_starts += b * kv_stride_b
    dq_tile = tl.zeros([BLOCK_M, D_PAD], tl.float32)
    if PARTIAL:
        dq_tile = _walk_keys(
            dq_tile, q_tile, dout_tile, lse_rows, delta_rows, k, v, b, h, kv_head, q_idx,
            tl.load(listed), tl.load(listed + 1) * TILES_N, runs, kv_starts,
            q_limit, kv_limit, kv_len, scale, mask_tables, score_tables, into,
            True, mask_mod, score_mod, score_grad, HOW, IN_ORDER,
            BLOCK_N, TILES_N, D, D_PAD, DV, DV_PAD, TMA, PRECISION, STAGES,
        )  # fmt: skip
    dq_tile = _walk_keys(
        dq_tile, q_tile, dout_tile, lse_rows, delta_rows, k, v, b, h, kv_head, q_idx,
        tl.load(listed + 2), tl.load(listed + 3) * TILES_N, runs, kv_starts,
        q_limit, kv_limit, kv_len, scale, mask_tables, score_tables, into,
        False, mask_mod, score_mod, score_grad, HOW, IN_ORDER,
        BLOCK_N, TILES_N, D, D_PAD, DV, DV_PAD, TMA, PRECISION, STAGES,
    )  # fmt: skip
    dq_tile *= scale
    if HOW != LARGEST:
        if STAGED:
            if turn & BEGINS == 0:
                dq_tile += load_tile(running, b, h, start, q_len, BLOCK_M, D, D_PAD, False)
            if turn & ENDS == 0:
                store_tile(running, b, h, start, q_len, dq_tile, D)
            else:
                store_tile(dq, b, h, start, q_len, dq_tile, D)
        else:
            store_tile(dq, b, h, start, q_len, dq_tile, D)
