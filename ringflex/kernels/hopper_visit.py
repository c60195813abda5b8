"""The Hopper backward of one tile of queries, by a warpgroup that keeps 64 keys.

See `hopper_backward`, which walks the tiles.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from ringflex.kernels.hopper_common import FIRST_BARRIER, HANDOVER, read_word
from ringflex.kernels.hopper_gradients import (
    GROUPS,
    ITEM_WORDS,
    KEYS,
    add_dq,
    begin_dq,
    place_of,
    slots_of_ds,
    stage_dq,
    take_turns,
)
from ringflex.kernels.hopper_intrinsics import come, wait_for
from ringflex.kernels.triton_common import LOG2E


@gluon.jit
def _hidden(
    p, b, h, q_start, kv_idx, q_limit, kv_limit, mask_tables,
    mask_mod: gl.constexpr, BLOCK_M: gl.constexpr, S: gl.constexpr,
):  # fmt: skip
    """Weights of a tile, `[keys, queries]`, zero where the mask hides them.

    Queries beyond the limit have none already, as their lse is infinite."""
    q_idx = q_start + gl.arange(0, BLOCK_M, layout=gl.SliceLayout(0, S))
    q_idx = gl.minimum(q_idx, q_limit - 1)[None, :]
    if mask_mod is not None:
        at_kv = gl.minimum(kv_idx, kv_limit - 1)
        p = gl.where(mask_mod(b, h, q_idx, at_kv, mask_tables), p, 0.0)
    return gl.where(kv_idx < kv_limit, p, 0.0)


@gluon.jit
def begin_scores(k_tile, buffers, q_full, number, zero, STAGES: gl.constexpr):
    """Begins the scores of a tile of queries, by its number, once it is there."""
    slot = number % STAGES
    mbarrier.wait(q_full.index(slot), number // STAGES & 1)
    q_tile = buffers[0].index(slot).reshape([zero.shape[1], k_tile.shape[1]])
    return warpgroup_mma(k_tile, q_tile.permute((1, 0)), zero, use_acc=False, is_async=True)


@gluon.jit
def visit(
    number, dk, dv, s, masked, done, count, fixed,
    mask_mod: gl.constexpr, score_mod: gl.constexpr, score_grad: gl.constexpr, HOW: gl.constexpr,
    PARTIAL: gl.constexpr, SCALED: gl.constexpr, BLOCK_M: gl.constexpr, D_PAD: gl.constexpr,
    DV_PAD: gl.constexpr, STAGES: gl.constexpr, GROUP: gl.constexpr, WITH_DQ: gl.constexpr,
):  # fmt: skip
    """Adds to dk and dv what a tile of queries gives, and to dQ what the one before it does.

    number: the tile's; of the keys' `count` tiles, the first is `done`. s, masked: its raw scores,
    transposed, and whether the mask is to be asked. fixed: what is the same for all tiles.
    WITH_DQ: where groups take turns, whether it is this one's.

    Returns:
        dk, dv, and s and masked of the next tile.
    """
    dq, shared, b, kv_idx, heads, limits, score_tables, mask_tables, into, scale = fixed
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_M, 16])
    DK: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D_PAD, 16])
    DV_: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DV_PAD, 16])
    FOR_DK: gl.constexpr = gl.DotOperandLayout(0, DK, 2)
    FOR_DV: gl.constexpr = gl.DotOperandLayout(0, DV_, 2)
    IN_TURN: gl.constexpr = take_turns(dq.block_type)
    SLOTS: gl.constexpr = slots_of_ds(dq.block_type)
    EARLY: gl.constexpr = score_mod is None and BLOCK_M == 64  # dV before dS: registers suffice
    AHEAD: gl.constexpr = BLOCK_M == 128  # the next scores before dQ is stored, by measurement
    FROM_DELTA: gl.constexpr = PARTIAL and score_mod is None  # dP less delta, by measurement
    WRITTEN: gl.constexpr = FIRST_BARRIER + 2 * STAGES + 2 * GROUP  # dS of this group, by parity
    THEIRS: gl.constexpr = FIRST_BARRIER + 2 * STAGES + 2 * (1 - GROUP)  # and of the other
    buffers, barriers, items = shared[0], shared[1], shared[3]
    q_buffers, dout_buffers, k_buffers, v_buffers = buffers[:4]
    lse_rows, delta_rows, ds_buffers = buffers[4], buffers[5], buffers[6]
    q_full, dout_full = barriers[0], barriers[1]
    dq_staged = buffers[7].index(GROUP)
    dtype: gl.constexpr = q_buffers.dtype
    q_limit, kv_limit = limits
    zero = gl.zeros([KEYS, BLOCK_M], gl.float32, S)
    slot, turn = number % STAGES, number // STAGES & 1
    # Always 0; unknown to the compiler, which would keep 48 registers of addresses.
    here = number >> 30
    k_tile = k_buffers.index(here + GROUP).reshape([KEYS, D_PAD])
    v_tile = v_buffers.index(here + GROUP).reshape([KEYS, DV_PAD])
    q_tile = q_buffers.index(slot).reshape([BLOCK_M, D_PAD])
    mbarrier.wait(dout_full.index(slot), turn)
    dout_tile = dout_buffers.index(slot).reshape([BLOCK_M, DV_PAD])
    if FROM_DELTA:
        delta_row = delta_rows.index(slot).load(gl.SliceLayout(0, S))[None, :]
        dp = warpgroup_mma(v_tile, dout_tile.permute((1, 0)), zero - delta_row, is_async=True)
    else:
        dp = warpgroup_mma(v_tile, dout_tile.permute((1, 0)), zero, use_acc=False, is_async=True)
    item = number % (2 * STAGES) * ITEM_WORDS
    h = read_word(items, item + 1)
    lse_row = lse_rows.index(slot).load(gl.SliceLayout(0, S))[None, :]
    if score_mod is None:
        p = gl.exp2(s * (scale * LOG2E) - lse_row)
    else:
        s_raw = s * scale
        q_start = read_word(items, item)
        q_idx = q_start + gl.arange(0, BLOCK_M, layout=gl.SliceLayout(0, S))
        q_idx = gl.minimum(q_idx, q_limit - 1)[None, :]
        at_kv = gl.minimum(kv_idx, kv_limit - 1)
        p = gl.exp2(score_mod(s_raw, b, h, q_idx, at_kv, score_tables) * LOG2E - lse_row)
    if PARTIAL:
        if AHEAD:
            masked = read_word(items, item + 3)
        if masked != 0:
            p = _hidden(
                p, b, h, read_word(items, item), kv_idx, q_limit,
                kv_limit, mask_tables, mask_mod, BLOCK_M, S,
            )  # fmt: skip
    if EARLY:
        adding_dv = warpgroup_mma(
            gl.convert_layout(p.to(dtype), FOR_DV), dout_tile, dv, is_async=True
        )
        dp = warpgroup_mma_wait(1, deps=(dp,))
    else:
        dp = warpgroup_mma_wait(0, deps=(dp,))
    if not FROM_DELTA:
        dp -= delta_rows.index(slot).load(gl.SliceLayout(0, S))[None, :]
    ds = p * dp
    if score_grad is not None:
        ds = score_grad(s_raw, ds, b, h, q_idx, at_kv, score_tables, into, HOW, 1)
        ds = gl.where(p == 0, 0.0, ds)  # whatever the derivative is where it is hidden
    ds = ds.to(dtype)
    # Then their dQ of what is overwritten now is done: of three tiles before, or of two.
    if number > done:
        wait_for(THEIRS + (number - 1) % 2, "256")
    ds_buffers.index(number % SLOTS * GROUPS + GROUP).store(ds)
    if not EARLY:
        adding_dv = warpgroup_mma(
            gl.convert_layout(p.to(dtype), FOR_DV), dout_tile, dv, is_async=True
        )
    fence_async_shared()
    before = number + SLOTS - 1
    # The next scores; after the last tile, its own once more, for nothing.
    following = gl.minimum(number + 1, done + count - 1)
    if IN_TURN:
        if not WITH_DQ:
            come(WRITTEN + number % 2, "256")
        adding_dk = warpgroup_mma(gl.convert_layout(ds, FOR_DK), q_tile, dk, is_async=True)
        dv = warpgroup_mma_wait(1, deps=(adding_dv,))
        come(FIRST_BARRIER + STAGES + slot, HANDOVER)
        if WITH_DQ:
            dq_part = begin_dq(dq, buffers, before, here, BLOCK_M, D_PAD, GROUP)
            dq_part = warpgroup_mma_wait(0, deps=(dq_part,))
            come(WRITTEN + number % 2, "256")
            h, row = place_of(items, number - 1, STAGES)
            stage_dq(dq, dq_staged, dq_part if SCALED else dq_part * scale)
            add_dq(dq, dq_staged, b, h, row, heads, BLOCK_M, D_PAD, GROUP)
        scores = begin_scores(k_tile, buffers, q_full, following, zero, STAGES)
        masked = read_word(items, following % (2 * STAGES) * ITEM_WORDS + 3)
    else:
        come(WRITTEN + number % 2, "256")
        # At the first, dQ of no tile, for nothing.
        dq_part = begin_dq(dq, buffers, before, here, BLOCK_M, D_PAD, GROUP)
        adding_dk = warpgroup_mma(gl.convert_layout(ds, FOR_DK), q_tile, dk, is_async=True)
        dv = warpgroup_mma_wait(3, deps=(adding_dv,))
        come(FIRST_BARRIER + STAGES + slot, HANDOVER)
        if AHEAD:
            scores = begin_scores(k_tile, buffers, q_full, following, zero, STAGES)
            dq_part = warpgroup_mma_wait(2, deps=(dq_part,))
        else:
            dq_part = warpgroup_mma_wait(1, deps=(dq_part,))
        stage_dq(dq, dq_staged, dq_part if SCALED else dq_part * scale)
        if number > done:
            h, row = place_of(items, number - 1, STAGES)
            add_dq(dq, dq_staged, b, h, row, heads, BLOCK_M, D_PAD, GROUP)
        if not AHEAD:
            scores = begin_scores(k_tile, buffers, q_full, following, zero, STAGES)
            # While they are under way, as a branch on it would wait.
            masked = read_word(items, following % (2 * STAGES) * ITEM_WORDS + 3)
    dk = warpgroup_mma_wait(1, deps=(adding_dk,))
    s = warpgroup_mma_wait(0, deps=(scores,))
    come(FIRST_BARRIER + slot, HANDOVER)
    return dk, dv, s, masked
