"""The backward kernel for Hopper (sm_90), in Gluon.

The gradients of `triton_backward` in one pass of five products, after Shah et al.,
"FlashAttention-3" (2024), section 3 and appendix B: a program keeps 128 keys, 64 to each of two
warpgroups, and walks the queries that see them, of all heads of a group or of some. Scores are
transposed, so that weights and their gradients are left operands of dV and dK out of registers; for
dQ they go through shared memory. Without a score function, at head dim 128, groups take turns: one
computes dQ of a tile from both halves of the keys, the other that of the next. Elsewhere each
computes half of every tile's: half the columns, or, where there are only 64, half the rows. dQ is
added into fp32 in global memory by TMA, in whatever order programs come to it. So are dK and dV,
where heads of a group are apart, or the queries parted into stretches (`hopper_gradients`).

The groups need not keep step: dQ of a tile of queries is computed one tile later, when the other
group has long written its part, so that one group's exponentials meet the other's products. The
scores of the next tile are under way while the last products of one are. Programs take tiles of
keys from a queue (`hopper_common`).
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    tma,
    warpgroup_mma_wait,
)

from ringflex.kernels.hopper_common import (
    FIRST_BARRIER,
    HANDOVER,
    WORDS,
    end,
    head_and_place,
    makes_way,
    quota,
    read_word,
    take,
    write_word,
)
from ringflex.kernels.hopper_gradients import (
    GROUPS,
    ITEM_WORDS,
    KEYS,
    add_dq,
    add_keys,
    begin_dq,
    place_of,
    slots_of_ds,
    stage_dq,
    take_turns,
)
from ringflex.kernels.hopper_intrinsics import tma_load, wait_for
from ringflex.kernels.hopper_visit import begin_scores, visit
from ringflex.kernels.triton_common import (
    first_tile,
    following_tile,
    position_of,
)


@gluon.jit
def _load_list(
    loaded, q, dout, lse, delta, buffers, barriers, items, b, h, terms, run, tiles, runs,
    q_starts, padded_len,
    MASKED: gl.constexpr, BLOCK_M: gl.constexpr, TILES: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Loads the queries of one list, and what belongs to them.

    terms: where those of the head begin."""
    q_buffers, dout_buffers, lse_rows, delta_rows = buffers[0], buffers[1], buffers[4], buffers[5]
    q_full, dout_full = barriers[0], barriers[1]
    tile, end, run, next_tile, next_end = first_tile(runs, run, TILES)
    for _ in range(tiles):
        at = padded_len // BLOCK_M - 1 - tile
        row = at * BLOCK_M
        slot = loaded % STAGES
        position = position_of(q_starts, at, BLOCK_M, TILES, False)
        if loaded >= STAGES:
            wait_for(FIRST_BARRIER + slot, HANDOVER)
        item = loaded % (2 * STAGES) * ITEM_WORDS
        write_word(items, item, position)
        write_word(items, item + 1, h)
        write_word(items, item + 2, row)
        write_word(items, item + 3, 1 if MASKED else 0)
        mbarrier.expect(q_full.index(slot), q.block_type.nbytes + lse.block_type.nbytes)
        tma_load(lse, [terms + row], q_full.index(slot), lse_rows.index(slot))
        tma_load(q, [b, h, row, 0], q_full.index(slot), q_buffers.index(slot))
        if loaded >= STAGES:
            wait_for(FIRST_BARRIER + STAGES + slot, HANDOVER)
        mbarrier.expect(dout_full.index(slot), dout.block_type.nbytes + delta.block_type.nbytes)
        tma_load(delta, [terms + row], dout_full.index(slot), delta_rows.index(slot))
        tma_load(dout, [b, h, row, 0], dout_full.index(slot), dout_buffers.index(slot))
        loaded += 1
        tile, end, run, next_tile, next_end = following_tile(
            runs, tile, end, run, next_tile, next_end, TILES
        )
    return loaded


@gluon.jit
def _produce(
    q, k, v, dout, lse, delta, shared, lists, padded_len, shape,
    PARTIAL: gl.constexpr, IN_ORDER: gl.constexpr, APART: gl.constexpr,
    BLOCK_M: gl.constexpr, TILES_M: gl.constexpr, TILES_N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The producer warp."""
    BLOCK_N: gl.constexpr = GROUPS * KEYS
    buffers, barriers, queue, items = shared
    counters, words, words_full, words_empty = queue
    k_buffers, v_buffers = buffers[2], buffers[3]
    kv_full, kv_empty = barriers[2], barriers[3]
    rows, runs, order, q_starts, kv_starts = lists
    heads, group, members, places, row_stride_b, row_stride_h = shape[:6]
    order_stride_b, order_stride_h, blocks, kv_stride_b, together, units, sections = shape[6:13]
    total = units * places * TILES_N
    left = quota(sections)
    work = take(counters)
    loaded = gl.to_tensor(0)
    given = gl.to_tensor(0)
    while work < total:
        unit, place = head_and_place(work, together, units, sections)
        first = unit * members
        b, first_h = first // heads, first % heads
        in_order = b * order_stride_b + first_h // members * order_stride_h
        row = gl.load(order + in_order + place // TILES_N)
        block = row % blocks
        within = place % TILES_N * BLOCK_N
        listed = rows + 4 * (b * row_stride_b + first_h * row_stride_h + row)
        count = gl.to_tensor(0)
        for member in range(members):
            of_head = listed + 4 * member * row_stride_h
            count += gl.load(of_head + 1) + gl.load(of_head + 3)
        wanted = total > 0
        if APART:
            wanted = count > 0
        if wanted:
            slot = given % 2
            mbarrier.wait(words_empty.index(slot), (given // 2 & 1) ^ 1)
            start = block * (TILES_N * BLOCK_N) + within
            starts = kv_starts + b * kv_stride_b
            kv_start = position_of(starts, block, BLOCK_N * TILES_N, 1, IN_ORDER)
            write_word(words, slot * WORDS, count * TILES_M)
            write_word(words, slot * WORDS + 1, first)
            write_word(words, slot * WORDS + 2, start)
            write_word(words, slot * WORDS + 3, kv_start + within)
            mbarrier.arrive(words_full.index(slot), count=1)
            # K and V: one buffer, which the tile before must have left.
            mbarrier.wait(kv_empty.index(0), (given & 1) ^ 1)
            nbytes: gl.constexpr = GROUPS * (k.block_type.nbytes + v.block_type.nbytes)
            mbarrier.expect(kv_full.index(0), nbytes)
            kv_head = first_h // group
            for c in gl.static_range(GROUPS):
                at = start + c * KEYS
                tma_load(k, [b, kv_head, at, 0], kv_full.index(0), k_buffers.index(c))
                tma_load(v, [b, kv_head, at, 0], kv_full.index(0), v_buffers.index(c))
            given += 1
            for member in range(members):
                of_head, h = listed + 4 * member * row_stride_h, first_h + member
                terms = (first + member) * padded_len
                if PARTIAL:
                    loaded = _load_list(
                        loaded, q, dout, lse, delta, buffers, barriers, items, b, h, terms,
                        gl.load(of_head), gl.load(of_head + 1) * TILES_M, runs, q_starts,
                        padded_len, True, BLOCK_M, TILES_M, STAGES,
                    )  # fmt: skip
                loaded = _load_list(
                    loaded, q, dout, lse, delta, buffers, barriers, items, b, h, terms,
                    gl.load(of_head + 2), gl.load(of_head + 3) * TILES_M, runs, q_starts,
                    padded_len, False, BLOCK_M, TILES_M, STAGES,
                )  # fmt: skip
        left -= 1
        work = gl.to_tensor(total)
        if left > 0:
            if not makes_way(counters, sections):  # asked as late as can be: tiles are long
                work = take(counters)
    end(queue, given)


@gluon.jit
def _consume(
    q, dq, results, shared, lengths, heads, group, score_tables, mask_tables, into, scale,
    mask_mod: gl.constexpr, score_mod: gl.constexpr, score_grad: gl.constexpr, HOW: gl.constexpr,
    PARTIAL: gl.constexpr, APART: gl.constexpr, BY_TMA: gl.constexpr, SCALED: gl.constexpr,
    BLOCK_M: gl.constexpr, D: gl.constexpr, D_PAD: gl.constexpr, DV: gl.constexpr,
    DV_PAD: gl.constexpr, STAGES: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    """A warpgroup of consumers: keys `GROUP * KEYS` and on of each tile."""
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_M, 16])
    DK: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D_PAD, 16])
    DV_: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DV_PAD, 16])
    IN_TURN: gl.constexpr = take_turns(dq.block_type)
    THEIRS: gl.constexpr = FIRST_BARRIER + 2 * STAGES + 2 * (1 - GROUP)  # the other group's dS
    buffers, barriers, queue, items = shared
    words, words_full, words_empty = queue[1], queue[2], queue[3]
    k_buffers, dq_staged = buffers[2], buffers[7].index(GROUP)
    q_full, kv_full, kv_empty = barriers[0], barriers[2], barriers[3]
    dk_out, dv_out = results
    kv_len, q_limit, kv_limit = lengths
    limits = (q_limit, kv_limit)
    zero = gl.zeros([KEYS, BLOCK_M], gl.float32, S)
    taken = gl.to_tensor(0)
    done = gl.to_tensor(0)
    mbarrier.wait(words_full.index(0), 0)
    count = read_word(words, 0)
    while count >= 0:
        slot = taken % 2
        b = read_word(words, slot * WORDS + 1) // heads
        kv_start = read_word(words, slot * WORDS + 3) + GROUP * KEYS
        kv_idx = (kv_start + gl.arange(0, KEYS, layout=gl.SliceLayout(1, S)))[:, None]
        dk = gl.zeros([KEYS, D_PAD], gl.float32, DK)
        dv = gl.zeros([KEYS, DV_PAD], gl.float32, DV_)
        mbarrier.wait(kv_full.index(0), taken & 1)
        if count > 0:
            k_tile = k_buffers.index(GROUP).reshape([KEYS, D_PAD])
            scores = begin_scores(k_tile, buffers, q_full, done, zero, STAGES)
            masked = read_word(items, done % (2 * STAGES) * ITEM_WORDS + 3)
            s = warpgroup_mma_wait(0, deps=(scores,))
            fixed = (
                dq, shared, b, kv_idx, heads, limits, score_tables, mask_tables, into, scale,
            )  # fmt: skip
            if IN_TURN:  # two bodies: a branch on whose turn it is was slower, by measurement
                dk, dv, s, masked = visit(
                    done, dk, dv, s, masked, done, count, fixed,
                    mask_mod, score_mod, score_grad, HOW, PARTIAL, SCALED, BLOCK_M,
                    D_PAD, DV_PAD, STAGES, GROUP, False,
                )  # fmt: skip
                for number in range(done + 1, done + count, 2):
                    dk, dv, s, masked = visit(
                        number, dk, dv, s, masked, done, count, fixed,
                        mask_mod, score_mod, score_grad, HOW, PARTIAL, SCALED, BLOCK_M,
                        D_PAD, DV_PAD, STAGES, GROUP, GROUP == 0,
                    )  # fmt: skip
                    if number + 1 < done + count:
                        dk, dv, s, masked = visit(
                            number + 1, dk, dv, s, masked, done, count, fixed,
                            mask_mod, score_mod, score_grad, HOW, PARTIAL, SCALED, BLOCK_M,
                            D_PAD, DV_PAD, STAGES, GROUP, GROUP == 1,
                        )  # fmt: skip
            else:
                for number in range(done, done + count):
                    dk, dv, s, masked = visit(
                        number, dk, dv, s, masked, done, count, fixed,
                        mask_mod, score_mod, score_grad, HOW, PARTIAL, SCALED, BLOCK_M,
                        D_PAD, DV_PAD, STAGES, GROUP, True,
                    )  # fmt: skip
            last = done + count - 1
            wait_for(THEIRS + last % 2, "256")
            mine = True
            if IN_TURN:
                mine = count % 2 != GROUP
            if mine:
                dq_part = begin_dq(dq, buffers, last, 0, BLOCK_M, D_PAD, GROUP)
                dq_part = warpgroup_mma_wait(0, deps=(dq_part,))
                h, row = place_of(items, last, STAGES)
                stage_dq(dq, dq_staged, dq_part if SCALED else dq_part * scale)
                add_dq(dq, dq_staged, b, h, row, heads, BLOCK_M, D_PAD, GROUP)
            done += count
        mbarrier.arrive(kv_empty.index(0), count=1)
        # Read only now: through the loop, it would take registers.
        slot = taken % 2
        head = read_word(words, slot * WORDS + 1)
        start = read_word(words, slot * WORDS + 2) + GROUP * KEYS
        mbarrier.arrive(words_empty.index(slot), count=1)
        taken += 1
        b, kv_head = head // heads, head % heads // group
        if SCALED:
            dv = dv * (1 / scale)
        else:
            dk = dk * scale
        if BY_TMA:
            place = b * (heads // group) + kv_head
            add_keys(dk_out, dq_staged, place, start, dk)
            add_keys(dv_out, dq_staged, place, start, dv)
        else:
            _write(dk_out, dk, b, kv_head, start, kv_len, APART, D, D_PAD, DK)
            _write(dv_out, dv, b, kv_head, start, kv_len, APART, DV, DV_PAD, DV_)
        slot = taken % 2
        mbarrier.wait(words_full.index(slot), taken // 2 & 1)
        count = read_word(words, slot * WORDS)
    tma.store_wait(0)


@gluon.jit
def _write(
    x, value, b, h, start, length,
    APART: gl.constexpr, D: gl.constexpr, D_PAD: gl.constexpr, LAYOUT: gl.constexpr,
):  # fmt: skip
    """A warpgroup's rows of `x[b, h]`, up to `length` and `D`; or adds them there."""
    rows = gl.arange(0, KEYS, layout=gl.SliceLayout(1, LAYOUT))
    cols = gl.arange(0, D_PAD, layout=gl.SliceLayout(0, LAYOUT))
    base = x[0] + b.to(gl.int64) * x[1] + h.to(gl.int64) * x[2] + start.to(gl.int64) * x[3]
    inside = (start + rows < length)[:, None]
    if D < D_PAD:
        inside = inside & (cols < D)[None, :]
    if APART:
        places = base + (rows[:, None] * D + cols[None, :])
        gl.atomic_add(places, value, mask=inside, sem="relaxed")
    else:
        places = base + rows[:, None] * x[3] + cols[None, :] * x[4]
        gl.store(places, value.to(x[0].dtype.element_ty), mask=inside)


@gluon.jit(
    do_not_specialize=[
        "kv_len", "q_limit", "kv_limit", "padded_len", "heads", "group", "members", "places",
        "row_stride_b", "row_stride_h", "order_stride_b", "order_stride_h", "blocks", "kv_stride_b",
        "together", "units",
    ]
)  # fmt: skip
def hopper_backward_kernel(
    q, k, v, dout, lse, delta, dq, dk, dv, counters, score_tables, into, scale,
    rows, runs, order, q_starts, kv_starts, mask_tables,
    kv_len, q_limit, kv_limit, padded_len, heads, group, members, places,
    row_stride_b, row_stride_h, order_stride_b, order_stride_h, blocks, kv_stride_b, together,
    units, sections,
    mask_mod: gl.constexpr, score_mod: gl.constexpr, score_grad: gl.constexpr, HOW: gl.constexpr,
    PARTIAL: gl.constexpr, IN_ORDER: gl.constexpr, APART: gl.constexpr, BY_TMA: gl.constexpr,
    SCALED: gl.constexpr, BLOCK_M: gl.constexpr, TILES_M: gl.constexpr, TILES_N: gl.constexpr,
    D: gl.constexpr, D_PAD: gl.constexpr, DV: gl.constexpr, DV_PAD: gl.constexpr,
    STAGES: gl.constexpr, REGISTERS: gl.constexpr, PRODUCER_REGISTERS: gl.constexpr,
):  # fmt: skip
    """Grid: `(programs,)`.

    q, dout: descriptors of `[1, 1, BLOCK_M, padded dim]`. k, v: of `[1, 1, 64, padded dim]`.
    lse, delta: the row terms, flat, by descriptors of `[BLOCK_M]`. dq: fp32, contiguous, zeros at
    first, by a descriptor of a group's half of a tile. dk, dv: (pointer, strides).
    members: query heads that a tile serves, one after the other; APART: fewer than a group has, or
    a stretch of their queries, so that dk, dv are fp32, and zeros at first. SCALED: weights of
    these row terms are `scale` times p. places: in `order`; blocks: of keys. counters, together,
    units (heads / members, of all batch elements), sections: as in `hopper_forward_kernel`. The
    rest as in `triton_backward.key_kernel`.
    """
    DS_LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([KEYS, BLOCK_M], q.dtype)
    q_buffers = gl.allocate_shared_memory(q.dtype, [STAGES] + q.block_type.shape, q.layout)
    dout_buffers = gl.allocate_shared_memory(q.dtype, [STAGES] + dout.block_type.shape, dout.layout)
    k_buffers = gl.allocate_shared_memory(q.dtype, [GROUPS] + k.block_type.shape, k.layout)
    v_buffers = gl.allocate_shared_memory(q.dtype, [GROUPS] + v.block_type.shape, v.layout)
    lse_rows = gl.allocate_shared_memory(gl.float32, [STAGES] + lse.block_type.shape, lse.layout)
    delta_rows = gl.allocate_shared_memory(gl.float32, [STAGES] + lse.block_type.shape, lse.layout)
    SLOTS: gl.constexpr = slots_of_ds(dq.block_type)
    ds_buffers = gl.allocate_shared_memory(q.dtype, [SLOTS * GROUPS, KEYS, BLOCK_M], DS_LAYOUT)
    dq_buffers = gl.allocate_shared_memory(gl.float32, [GROUPS] + dq.block_type.shape, dq.layout)
    barrier: gl.constexpr = mbarrier.MBarrierLayout()
    q_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier)
    dout_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier)
    kv_full = gl.allocate_shared_memory(gl.int64, [1, 1], barrier)
    kv_empty = gl.allocate_shared_memory(gl.int64, [1, 1], barrier)
    words_full = gl.allocate_shared_memory(gl.int64, [2, 1], barrier)
    words_empty = gl.allocate_shared_memory(gl.int64, [2, 1], barrier)
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    words = gl.allocate_shared_memory(gl.int32, [2 * WORDS, 1], plain)
    # Of tiles that are loaded, and the last ones, whose dQ is yet to be added.
    items = gl.allocate_shared_memory(gl.int32, [2 * STAGES * ITEM_WORDS, 1], plain)
    for i in gl.static_range(STAGES):
        mbarrier.init(q_full.index(i), count=1)
        mbarrier.init(dout_full.index(i), count=1)
    mbarrier.init(kv_full.index(0), count=1)
    mbarrier.init(kv_empty.index(0), count=GROUPS)
    for i in gl.static_range(2):
        mbarrier.init(words_full.index(i), count=1)
        mbarrier.init(words_empty.index(i), count=GROUPS)
    shared = (
        (q_buffers, dout_buffers, k_buffers, v_buffers, lse_rows, delta_rows, ds_buffers,
         dq_buffers),
        (q_full, dout_full, kv_full, kv_empty),
        (counters, words, words_full, words_empty), items,
    )  # fmt: skip
    lists = (rows, runs, order, q_starts, kv_starts)
    lengths = (kv_len, q_limit, kv_limit)
    shape = (
        heads, group, members, places, row_stride_b, row_stride_h, order_stride_b,
        order_stride_h, blocks, kv_stride_b, together, units, sections,
    )  # fmt: skip
    # Both times anew: in a variable, constants of a tuple would become run-time values.
    gl.warp_specialize(
        [
            (_consume, (
                q, dq, (dk, dv), shared, lengths, heads, group, score_tables, mask_tables, into,
                scale, mask_mod, score_mod, score_grad, HOW, PARTIAL, APART, BY_TMA, SCALED,
                BLOCK_M, D, D_PAD, DV, DV_PAD, STAGES, 0,
            )),
            (_consume, (
                q, dq, (dk, dv), shared, lengths, heads, group, score_tables, mask_tables, into,
                scale, mask_mod, score_mod, score_grad, HOW, PARTIAL, APART, BY_TMA, SCALED,
                BLOCK_M, D, D_PAD, DV, DV_PAD, STAGES, 1,
            )),
            (_produce, (
                q, k, v, dout, lse, delta, shared, lists, padded_len, shape,
                PARTIAL, IN_ORDER, APART, BLOCK_M, TILES_M, TILES_N, STAGES,
            )),
        ],
        [4, 1],
        [REGISTERS, PRODUCER_REGISTERS],
    )  # fmt: skip
