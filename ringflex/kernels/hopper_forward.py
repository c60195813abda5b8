"""The forward kernel for Hopper (sm_90), in Gluon.

The same online softmax as `triton_forward`, arranged as in Shah et al., "FlashAttention-3" (2024):
one warp loads tiles by TMA; two warpgroups of 64 queries each multiply asynchronously, with the
weights in registers. While a group computes the softmax of one tile, its product of the weights
before with their values is under way, and so is the other group's work.

In bf16, weights of whole tiles are relative to a maximum that stays as it is (`hopper_softmax`);
tiles for which that was too far off are computed once more (`hopper_retries`).

Programs take tiles from a queue (`hopper_common`): the next tile's queries and first keys arrive
while the last one's values are still added up and written.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from ringflex.kernels.hopper_common import (
    FIRST_BARRIER,
    FOUR_WARPS,
    HANDOVER,
    WORDS,
    read_word,
)
from ringflex.kernels.hopper_intrinsics import come, hold_until, packed, unpacked, wait_for
from ringflex.kernels.hopper_producer import GROUPS, ROWS, produce
from ringflex.kernels.hopper_retries import (
    EMPTY,
    FAILURES,
    FLUSH,
    ISSUED,
    RUNNING,
    how_computed,
    report,
)
from ringflex.kernels.hopper_softmax import (
    LEAST_MAXIMUM,
    fixes_maximum,
    in_lanes,
    out_of_range,
    softmax,
)
from ringflex.kernels.triton_common import (
    BEGINS,
    ENDS,
    LN2,
    LOWEST,
    earlier_lse,
    merge_weights,
    row_places,
)


@gluon.jit
def _step(
    number, q_at, carry, buffers, barriers, positions, zero, b, h, q_idx, kv_limit, scale,
    mask_tables, score_tables,
    MASKED: gl.constexpr, FIXED: gl.constexpr, mask_mod: gl.constexpr, score_mod: gl.constexpr,
    BLOCK_N: gl.constexpr, STAGES: gl.constexpr, S: gl.constexpr, O: gl.constexpr, P: gl.constexpr,
    D_PAD: gl.constexpr, DV_PAD: gl.constexpr, ANEW: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    """Scores and weights of tile `number`, while the weights before it meet their values.

    q_at: which buffer of queries. FIXED: with the maximum as it is; see `softmax`. ANEW: the
    address of queries is made in every step, instead of kept in registers.
    """
    ALTERNATE: gl.constexpr = FIXED and _alternate(score_mod, D_PAD, DV_PAD)
    MINE: gl.constexpr = FIRST_BARRIER + 2 * STAGES + GROUP
    THEIRS: gl.constexpr = FIRST_BARRIER + 2 * STAGES + 1 - GROUP
    acc, p, m, l = carry
    q_tiles, k_tiles, v_tiles = buffers
    k_full, v_full = barriers[2], barriers[3]
    slot, turn = number % STAGES, number // STAGES & 1
    v_slot, v_turn = (number - 1) % STAGES, (number - 1) // STAGES & 1
    mbarrier.wait(k_full.index(slot), turn)
    if ANEW:
        q_at += number >> 30  # plus 0, unknown to the compiler
    q_tile = q_tiles.index(q_at).reshape([ROWS, D_PAD])
    k_tile = k_tiles.index(slot).reshape([BLOCK_N, D_PAD])
    if ALTERNATE:
        wait_for(MINE, "256")
    s = warpgroup_mma(q_tile, k_tile.permute((1, 0)), zero, use_acc=False, is_async=True)
    mbarrier.wait(v_full.index(v_slot), v_turn)
    v_tile = v_tiles.index(v_slot).reshape([BLOCK_N, DV_PAD])
    adding = warpgroup_mma(unpacked(p, k_tiles.dtype, P), v_tile, acc, is_async=True)
    if ALTERNATE:
        come(THEIRS, "256")
    kv_start = gl.to_tensor(0)
    if MASKED or score_mod is not None:
        kv_start = read_word(positions, slot)
    s = warpgroup_mma_wait(1, deps=(s,))
    come(FIRST_BARRIER + slot, HANDOVER)
    p, m, l, shrink = softmax(
        s, m, l, b, h, q_idx, kv_start, kv_limit, scale, mask_tables, score_tables,
        MASKED, FIXED, mask_mod, score_mod, BLOCK_N, S,
    )  # fmt: skip
    if FIXED:
        hold_until(l)
    acc = warpgroup_mma_wait(0, deps=(adding,))
    come(FIRST_BARRIER + STAGES + v_slot, HANDOVER)
    if not FIXED:
        acc = acc * gl.convert_layout(shrink, gl.SliceLayout(1, O))[:, None]
    return acc, packed(p, k_tiles.dtype), m, l


@gluon.constexpr_function
def _alternate(score_mod, d_pad, dv_pad):
    """Whether groups begin their products one after the other, so that one's exponentials meet the
    other's products; by measurement."""
    return score_mod is None and max(d_pad, dv_pad) <= 64


@gluon.jit
def _consume(
    q, results, shared, lengths, heads, score_tables, mask_tables, scale,
    mask_mod: gl.constexpr, score_mod: gl.constexpr, PARTIAL: gl.constexpr,
    MERGE_OUT: gl.constexpr, MERGE_LSE: gl.constexpr, STAGED: gl.constexpr,
    MERGE_FIRST: gl.constexpr, BLOCK_N: gl.constexpr,
    D_PAD: gl.constexpr, DV: gl.constexpr, DV_PAD: gl.constexpr, STAGES: gl.constexpr,
    AHEAD: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    """A warpgroup of consumers: rows `GROUP * ROWS` and on of each tile."""
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    O: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DV_PAD, 16])
    P: gl.constexpr = gl.DotOperandLayout(0, O, 2)
    # Where it was measured to be faster.
    ANEW: gl.constexpr = score_mod is not None or (not PARTIAL and D_PAD <= 64)
    Q_STAGES: gl.constexpr = 2 if AHEAD else 1
    dtype: gl.constexpr = q.dtype
    FIXES: gl.constexpr = fixes_maximum(dtype)
    buffers, barriers, queue, retries, positions = shared
    issued, failed, finished = retries
    words, words_full, words_empty = queue[1], queue[2], queue[3]
    q_buffers, k_buffers, v_buffers = buffers
    q_full, q_empty, k_full, v_full = barriers
    q_len, q_limit, kv_limit = lengths
    zero = gl.zeros([ROWS, BLOCK_N], gl.float32, S)
    taken = gl.to_tensor(0)
    with_keys = gl.to_tensor(0)
    done = gl.to_tensor(0)
    failures = gl.to_tensor(0)
    if GROUP == 1 and FIXES and _alternate(score_mod, D_PAD, DV_PAD):
        come(FIRST_BARRIER + 2 * STAGES, "256")  # the other one begins
    mbarrier.wait(words_full.index(0), 0)
    count = read_word(words, 0)
    while count >= 0:
        slot = taken % 2
        partial = read_word(words, slot * WORDS + 1)
        head = read_word(words, slot * WORDS + 2)
        start = read_word(words, slot * WORDS + 3) + GROUP * ROWS
        q_start = read_word(words, slot * WORDS + 4) + GROUP * ROWS
        turn = read_word(words, slot * WORDS + 5)
        mbarrier.arrive(words_empty.index(slot), count=1)
        taken += 1
        b, h = head // heads, head % heads
        acc = gl.zeros([ROWS, DV_PAD], gl.float32, O)
        m = gl.full([ROWS], LOWEST, gl.float32, gl.SliceLayout(1, S))
        l = in_lanes(zero)
        writes = gl.to_tensor(1)
        if count > 0:
            end = done + gl.maximum(partial, 1)
            if FIXES:
                if how_computed(issued, taken - 1) & RUNNING != 0:
                    end = done + count
                if end < done + count:
                    m = gl.full([ROWS], LEAST_MAXIMUM, gl.float32, gl.SliceLayout(1, S))
            q_idx = q_start + gl.arange(0, ROWS, layout=gl.SliceLayout(1, S))
            q_idx = gl.minimum(q_idx, q_limit - 1)[:, None]
            slot, kv_turn = done % STAGES, done // STAGES & 1
            q_at = with_keys % Q_STAGES * GROUPS + GROUP
            q_tile = q_buffers.index(q_at).reshape([ROWS, D_PAD])
            mbarrier.wait(q_full.index(q_at), with_keys // Q_STAGES & 1)
            mbarrier.wait(k_full.index(slot), kv_turn)
            k_tile = k_buffers.index(slot).reshape([BLOCK_N, D_PAD])
            s = warpgroup_mma(q_tile, k_tile.permute((1, 0)), zero, use_acc=False, is_async=True)
            kv_start = gl.to_tensor(0)
            if PARTIAL or score_mod is not None:
                kv_start = read_word(positions, slot)
            s = warpgroup_mma_wait(0, deps=(s,))
            come(FIRST_BARRIER + slot, HANDOVER)
            p, m, l, shrink = softmax(
                s, m, l, b, h, q_idx, kv_start, kv_limit, scale, mask_tables, score_tables,
                PARTIAL, False, mask_mod, score_mod, BLOCK_N, S,
            )  # fmt: skip
            carry = acc, packed(p, dtype), m, l
            for number in range(done + 1, end):
                carry = _step(
                    number, q_at, carry, buffers, barriers, positions, zero, b, h, q_idx,
                    kv_limit, scale, mask_tables, score_tables,
                    PARTIAL, False, mask_mod, score_mod, BLOCK_N, STAGES, S, O, P,
                    D_PAD, DV_PAD, ANEW, GROUP,
                )  # fmt: skip
            acc, p16, m, l = carry
            if score_mod is None:
                # Plus 0, unknown to the assembler, which would copy weights in every step of both
                # loops to have them in the same registers.
                p16 += count >> 30
            carry = acc, p16, m, l
            for number in range(end, done + count):
                carry = _step(
                    number, q_at, carry, buffers, barriers, positions, zero, b, h, q_idx,
                    kv_limit, scale, mask_tables, score_tables,
                    False, FIXES, mask_mod, score_mod, BLOCK_N, STAGES, S, O, P,
                    D_PAD, DV_PAD, ANEW, GROUP,
                )  # fmt: skip
            acc, p16, m, l = carry
            mbarrier.arrive(q_empty.index(q_at), count=1)
            with_keys += 1
            done += count
            v_slot, v_turn = (done - 1) % STAGES, (done - 1) // STAGES & 1
            mbarrier.wait(v_full.index(v_slot), v_turn)
            v_tile = v_buffers.index(v_slot).reshape([BLOCK_N, DV_PAD])
            acc = warpgroup_mma(unpacked(p16, dtype, P), v_tile, acc, is_async=True)
            acc = warpgroup_mma_wait(0, deps=(acc,))
            come(FIRST_BARRIER + STAGES + v_slot, HANDOVER)
            if FIXES:
                if end < done:
                    if out_of_range(acc, l) != 0:
                        report(failed, issued, taken - 1, failures, GROUP)
                        failures += 1
                        writes = gl.to_tensor(0)
        if FIXES:
            how = how_computed(issued, taken - 1)
            writes &= how >> GROUP
            if how == FLUSH:
                failures = gl.to_tensor(0)
                mbarrier.arrive(finished.index(0), count=1)
        if writes != 0:
            q_position = q_start + gl.arange(0, ROWS, layout=gl.SliceLayout(1, O))
            sums = gl.convert_layout(gl.sum(l, axis=1), gl.SliceLayout(1, O))
            sums = gl.where(q_position < q_limit, sums, 0.0)  # padding sees nothing
            _write(
                results, acc, gl.convert_layout(m, gl.SliceLayout(1, O)), sums, b, h, start, turn,
                q_len, MERGE_OUT, MERGE_LSE, STAGED, MERGE_FIRST, DV, DV_PAD, O, AHEAD,
            )  # fmt: skip
        slot = taken % 2
        mbarrier.wait(words_full.index(slot), taken // 2 & 1)
        count = read_word(words, slot * WORDS)


@gluon.jit
def _places(x, b, h, start, DV_PAD: gl.constexpr, O: gl.constexpr):
    """Pointers to a warpgroup's rows of `x[b, h]`."""
    rows = gl.arange(0, ROWS, layout=gl.SliceLayout(1, O))
    cols = gl.arange(0, DV_PAD, layout=gl.SliceLayout(0, O))
    base = x[0] + b.to(gl.int64) * x[1] + h.to(gl.int64) * x[2] + start.to(gl.int64) * x[3]
    return base + rows[:, None] * x[3] + cols[None, :] * x[4]


@gluon.jit
def _store(
    x, value, b, h, start, q_len, DV: gl.constexpr, DV_PAD: gl.constexpr, O: gl.constexpr,
    WHOLE: gl.constexpr,
):  # fmt: skip
    """A warpgroup's rows of `x[b, h]`, up to `q_len` and `DV`.

    WHOLE: halves are arranged in shared memory, so that a warp writes whole rows.
    """
    LANES: gl.constexpr = DV_PAD // 8
    IN_ROWS: gl.constexpr = gl.BlockedLayout([LANES // 2, 8], [32 // LANES, LANES], [4, 1], [1, 0])
    WIDE: gl.constexpr = WHOLE and value.dtype.primitive_bitwidth == 16
    LAYOUT: gl.constexpr = IN_ROWS if WIDE else O
    if WIDE:
        value = gl.convert_layout(value, LAYOUT)
    inside = (start + gl.arange(0, ROWS, layout=gl.SliceLayout(1, LAYOUT)) < q_len)[:, None]
    if DV < DV_PAD:
        inside = inside & (gl.arange(0, DV_PAD, layout=gl.SliceLayout(0, LAYOUT)) < DV)[None, :]
    gl.store(_places(x, b, h, start, DV_PAD, LAYOUT), value, mask=inside)


@gluon.jit
def _write(
    results, acc, m, l, b, h, start, turn, q_len,
    MERGE_OUT: gl.constexpr, MERGE_LSE: gl.constexpr, STAGED: gl.constexpr,
    MERGE_FIRST: gl.constexpr, DV: gl.constexpr, DV_PAD: gl.constexpr, O: gl.constexpr,
    WHOLE: gl.constexpr,
):  # fmt: skip
    """Merges with what was computed before, and writes; see `triton_forward.forward_kernel`."""
    out, lse, before_out, before_lse, first_lse = results
    row = start + gl.arange(0, ROWS, layout=gl.SliceLayout(1, O))
    rows_inside = row < q_len
    inside = rows_inside[:, None]
    if DV < DV_PAD:
        inside = inside & (gl.arange(0, DV_PAD, layout=gl.SliceLayout(0, O)) < DV)[None, :]
    empty = l == 0
    part_lse = gl.where(empty, float("-inf"), m + gl.log2(gl.where(empty, 1.0, l)))  # base 2
    weight = gl.where(empty, 0.0, 1.0 / gl.where(empty, 1.0, l))
    if MERGE_LSE:
        ALONE: gl.constexpr = STAGED and not MERGE_FIRST  # queries that begin merge with nothing
        merges = turn & BEGINS == 0 if ALONE else True
        new_lse = part_lse.to(before_lse[0].dtype.element_ty)
        if merges:
            old = earlier_lse(
                before_lse, first_lse, b, h, row, rows_inside, turn, STAGED, MERGE_FIRST
            )
            old_weight, new_weight, new_lse = merge_weights(old, part_lse)
            acc = acc * (weight * new_weight)[:, None]
            if MERGE_OUT:
                if turn & BEGINS == 0:
                    places = _places(before_out, b, h, start, DV_PAD, O)
                    acc += gl.load(places, mask=inside, other=0) * old_weight[:, None]
        else:
            acc = acc * weight[:, None]
    else:
        acc = acc * weight[:, None]
        new_lse = part_lse
    if STAGED:
        if turn & ENDS == 0:
            gl.store(_places(before_out, b, h, start, DV_PAD, O), acc, mask=inside)
            gl.store(row_places(before_lse, b, h, row), new_lse * LN2, mask=rows_inside)
        else:
            result = acc.to(out[0].dtype.element_ty)
            _store(out, result, b, h, start, q_len, DV, DV_PAD, O, WHOLE)
            gl.store(row_places(lse, b, h, row), new_lse * LN2, mask=rows_inside)
    else:
        result = acc.to(out[0].dtype.element_ty)
        _store(out, result, b, h, start, q_len, DV, DV_PAD, O, WHOLE)
        gl.store(row_places(lse, b, h, row), new_lse * LN2, mask=rows_inside)


@gluon.jit(
    do_not_specialize=[
        "q_len", "q_limit", "kv_limit", "heads", "group", "blocks",
        "row_stride_b", "row_stride_h", "kv_stride_b", "together", "total_heads",
        "split",
    ]
)  # fmt: skip
def hopper_forward_kernel(
    q, k, v, more_k, more_v, out, lse, before_out, before_lse, first_lse, counters, score_tables,
    scale, rows, runs, order, turns, q_starts, kv_starts, mask_tables,
    q_len, q_limit, kv_limit, heads, group, blocks,
    row_stride_b, row_stride_h, kv_stride_b, together, total_heads, sections, split,
    mask_mod: gl.constexpr, score_mod: gl.constexpr, PARTIAL: gl.constexpr, IN_ORDER: gl.constexpr,
    MERGE_OUT: gl.constexpr, MERGE_LSE: gl.constexpr, IN_PLACE: gl.constexpr,
    STAGED: gl.constexpr, MERGE_FIRST: gl.constexpr,
    BLOCK_N: gl.constexpr, TILES_M: gl.constexpr, TILES_N: gl.constexpr,
    D_PAD: gl.constexpr, DV: gl.constexpr, DV_PAD: gl.constexpr, STAGES: gl.constexpr,
    AHEAD: gl.constexpr, REGISTERS: gl.constexpr, PRODUCER_REGISTERS: gl.constexpr,
):  # fmt: skip
    """Grid: `(programs,)`.

    q, k, v: descriptors of `[1, 1, 64 or BLOCK_N, padded dim]`. counters: int32 `[3]`, zeros
    before and after. more_k, more_v: as k, v, what follows their `split` rows, or all three None.
    together, total_heads, sections: see `head_and_place`, and `hopper_launch.Programs`. AHEAD:
    shared memory is left to load the next tile's queries while a tile is computed, and to write
    whole rows. The rest as in `triton_forward.forward_kernel`.
    """
    Q_STAGES: gl.constexpr = 2 if AHEAD else 1
    QUERIES: gl.constexpr = Q_STAGES * GROUPS
    q_buffers = gl.allocate_shared_memory(q.dtype, [QUERIES] + q.block_type.shape, q.layout)
    k_buffers = gl.allocate_shared_memory(k.dtype, [STAGES] + k.block_type.shape, k.layout)
    v_buffers = gl.allocate_shared_memory(v.dtype, [STAGES] + v.block_type.shape, v.layout)
    barrier: gl.constexpr = mbarrier.MBarrierLayout()
    q_full = gl.allocate_shared_memory(gl.int64, [QUERIES, 1], barrier)
    q_empty = gl.allocate_shared_memory(gl.int64, [QUERIES, 1], barrier)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier)
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier)
    words_full = gl.allocate_shared_memory(gl.int64, [2, 1], barrier)
    words_empty = gl.allocate_shared_memory(gl.int64, [2, 1], barrier)
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    words = gl.allocate_shared_memory(gl.int32, [2 * WORDS, 1], plain)
    positions = gl.allocate_shared_memory(gl.int32, [STAGES, 1], plain)
    for i in gl.static_range(QUERIES):
        mbarrier.init(q_full.index(i), count=1)
        mbarrier.init(q_empty.index(i), count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(v_full.index(i), count=1)
    for i in gl.static_range(2):
        mbarrier.init(words_full.index(i), count=1)
        mbarrier.init(words_empty.index(i), count=GROUPS)
    issued = gl.allocate_shared_memory(gl.int32, [2 * ISSUED, 1], plain)
    failed = gl.allocate_shared_memory(gl.int32, [GROUPS * FAILURES, 1], plain)
    finished = gl.allocate_shared_memory(gl.int64, [1, 1], barrier)
    mbarrier.init(finished.index(0), count=GROUPS)
    # Not by a function: with it, the assembler spills 4 bytes more of masks with tables.
    for i in gl.static_range(GROUPS * FAILURES):
        failed.index(i).store(gl.full([1], EMPTY, gl.int32, FOUR_WARPS))
    shared = (
        (q_buffers, k_buffers, v_buffers), (q_full, q_empty, k_full, v_full),
        (counters, words, words_full, words_empty), (issued, failed, finished), positions,
    )  # fmt: skip
    lists = (rows, runs, order, turns, q_starts, kv_starts)
    lengths = (q_len, q_limit, kv_limit)
    shape = (
        heads, group, blocks, row_stride_b, row_stride_h, kv_stride_b, together, total_heads,
        sections,
    )  # fmt: skip
    # Both times anew: in a variable, constants of a tuple would become run-time values.
    gl.warp_specialize(
        [
            (_consume, (
                q, (out, lse, before_out, before_lse, first_lse), shared, lengths, heads,
                score_tables, mask_tables, scale,
                mask_mod, score_mod, PARTIAL, MERGE_OUT, MERGE_LSE, STAGED, MERGE_FIRST,
                BLOCK_N, D_PAD, DV, DV_PAD, STAGES, AHEAD, 0,
            )),
            (_consume, (
                q, (out, lse, before_out, before_lse, first_lse), shared, lengths, heads,
                score_tables, mask_tables, scale,
                mask_mod, score_mod, PARTIAL, MERGE_OUT, MERGE_LSE, STAGED, MERGE_FIRST,
                BLOCK_N, D_PAD, DV, DV_PAD, STAGES, AHEAD, 1,
            )),
            (produce, (
                q, k, v, (more_k, more_v, split), shared, lists, shape,
                score_mod, PARTIAL, IN_ORDER, IN_PLACE, STAGED, BLOCK_N, TILES_M, TILES_N, STAGES,
                AHEAD,
            )),
        ],
        [4, 1],
        [REGISTERS, PRODUCER_REGISTERS],
    )  # fmt: skip
