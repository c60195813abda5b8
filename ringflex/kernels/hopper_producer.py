"""The producer warp of the Hopper forward: takes tiles of queries from the queue, and loads these
and the keys and values that they see, by TMA."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from ringflex.kernels.hopper_common import (
    FIRST_BARRIER,
    HANDOVER,
    WORDS,
    end,
    head_and_place,
    makes_way,
    quota,
    take,
    write_word,
)
from ringflex.kernels.hopper_intrinsics import tma_load, wait_for
from ringflex.kernels.hopper_retries import (
    ALL,
    EMPTY,
    FAILURES,
    FLUSH,
    RUNNING,
    first_reported,
    forget,
    next_reported,
    remember,
)
from ringflex.kernels.hopper_softmax import fixes_maximum
from ringflex.kernels.triton_common import first_tile, following_tile, position_of

ROWS = gl.constexpr(64)  # queries per warpgroup
GROUPS = gl.constexpr(2)


@gluon.jit
def _load_list(
    loaded, first, previous, k, v, more, buffers, barriers, positions, b, kv_head, run, tiles, runs,
    kv_starts,
    POSITIONS: gl.constexpr, IN_ORDER: gl.constexpr, BLOCK_N: gl.constexpr, TILES: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """Loads the K/V of one list; V one tile later than K, as the consumers want them."""
    k_buffers, v_buffers = buffers[1], buffers[2]
    k_full, v_full = barriers[2], barriers[3]
    tile, end, run, next_tile, next_end = first_tile(runs, run, TILES)
    for _ in range(tiles):
        slot = loaded % STAGES
        if POSITIONS:  # loaded while the slot is not free yet
            position = position_of(kv_starts, tile, BLOCK_N, TILES, IN_ORDER)
        if loaded >= STAGES:
            wait_for(FIRST_BARRIER + slot, HANDOVER)
        if POSITIONS:
            write_word(positions, slot, position)
        mbarrier.expect(k_full.index(slot), k.block_type.nbytes)
        row = tile * BLOCK_N
        _load(k, more[0], more[2], b, kv_head, row, k_full.index(slot), k_buffers.index(slot))
        if loaded > first:
            _load_v(v, more, v_buffers, v_full, b, kv_head, previous, loaded - 1, STAGES)
        previous = row
        loaded += 1
        tile, end, run, next_tile, next_end = following_tile(
            runs, tile, end, run, next_tile, next_end, TILES
        )
    return loaded, previous


@gluon.jit
def _load(x, more, split, b, head, row, full, buffer):
    """A tile, from row `split` on of `more`; None: of which there is nothing."""
    if more is None:  # noqa: SIM114
        tma_load(x, [b, head, row, 0], full, buffer)
    elif row < split:  # not `or`: of None, there is no comparison
        tma_load(x, [b, head, row, 0], full, buffer)
    else:
        tma_load(more, [b, head, row - split, 0], full, buffer)


@gluon.jit
def _load_v(v, more, v_buffers, v_full, b, kv_head, row, number, STAGES: gl.constexpr):
    slot = number % STAGES
    if number >= STAGES:
        wait_for(FIRST_BARRIER + STAGES + slot, HANDOVER)
    mbarrier.expect(v_full.index(slot), v.block_type.nbytes)
    _load(v, more[1], more[2], b, kv_head, row, v_full.index(slot), v_buffers.index(slot))


@gluon.jit
def produce(
    q, k, v, more, shared, lists, shape,
    score_mod: gl.constexpr, PARTIAL: gl.constexpr, IN_ORDER: gl.constexpr,
    IN_PLACE: gl.constexpr, STAGED: gl.constexpr,
    BLOCK_N: gl.constexpr, TILES_M: gl.constexpr, TILES_N: gl.constexpr, STAGES: gl.constexpr,
    AHEAD: gl.constexpr,
):  # fmt: skip
    """All that a program computes."""
    BLOCK_M: gl.constexpr = GROUPS * ROWS
    Q_STAGES: gl.constexpr = 2 if AHEAD else 1
    RETRIES: gl.constexpr = fixes_maximum(q.dtype)
    buffers, barriers, queue, retries, positions = shared
    counters, words, words_full, words_empty = queue
    issued, failed, finished = retries
    q_buffers, v_buffers = buffers[0], buffers[2]
    q_full, q_empty, v_full = barriers[0], barriers[1], barriers[3]
    rows, runs, order, turns, q_starts, kv_starts = lists
    heads, group, blocks, row_stride_b, row_stride_h, kv_stride_b = shape[:6]
    together, total_heads, sections = shape[6:9]
    total = total_heads * blocks * TILES_M
    left = quota(sections)
    work = take(counters)
    upcoming = gl.to_tensor(total)
    entry = gl.to_tensor(-1)  # of what was reported, if that is being computed again
    flushes = gl.to_tensor(0)
    loaded = gl.to_tensor(0)
    given = gl.to_tensor(0)
    with_keys = gl.to_tensor(0)
    previous = gl.to_tensor(0)
    while work < total:
        how = gl.to_tensor(ALL)
        if entry >= 0:
            how = (1 << entry // FAILURES) | RUNNING
            entry += 1
        head, place = head_and_place(work, together, total_heads, sections)
        b, h = head // heads, head % heads
        first_row = b * row_stride_b + h * row_stride_h
        block = gl.load(order + first_row + place // TILES_M)
        within = place % TILES_M * BLOCK_M
        listed = rows + 4 * (first_row + block)
        partial, full = gl.load(listed + 1) * TILES_N, gl.load(listed + 3) * TILES_N
        turn = gl.to_tensor(0)
        wanted = total > 0
        if STAGED:
            turn = gl.load(turns + first_row + block)
            wanted = turn != 0
        elif IN_PLACE:
            wanted = partial + full > 0
        if wanted:
            slot = given % 2
            mbarrier.wait(words_empty.index(slot), (given // 2 & 1) ^ 1)
            start = block * (TILES_M * BLOCK_M) + within
            write_word(words, slot * WORDS, partial + full)
            write_word(words, slot * WORDS + 1, partial)
            write_word(words, slot * WORDS + 2, head)
            write_word(words, slot * WORDS + 3, start)
            write_word(words, slot * WORDS + 4, gl.load(q_starts + block) + within)
            write_word(words, slot * WORDS + 5, turn)
            if RETRIES:
                remember(issued, given, work, how)
            mbarrier.arrive(words_full.index(slot), count=1)
            given += 1
            if partial + full > 0:
                for c in gl.static_range(GROUPS):
                    at = with_keys % Q_STAGES * GROUPS + c
                    mbarrier.wait(q_empty.index(at), (with_keys // Q_STAGES & 1) ^ 1)
                    mbarrier.expect(q_full.index(at), q.block_type.nbytes)
                    tma_load(q, [b, h, start + c * ROWS, 0], q_full.index(at), q_buffers.index(at))
                with_keys += 1
                first, kv_head, starts = loaded, h // group, kv_starts + b * kv_stride_b
                if PARTIAL:
                    loaded, previous = _load_list(
                        loaded, first, previous, k, v, more, buffers, barriers, positions, b,
                        kv_head, gl.load(listed), partial, runs, starts,
                        True, IN_ORDER, BLOCK_N, TILES_N, STAGES,
                    )  # fmt: skip
                loaded, previous = _load_list(
                    loaded, first, previous, k, v, more, buffers, barriers, positions, b, kv_head,
                    gl.load(listed + 2), full, runs, starts,
                    PARTIAL or score_mod is not None, IN_ORDER, BLOCK_N, TILES_N, STAGES,
                )  # fmt: skip
                _load_v(v, more, v_buffers, v_full, b, kv_head, previous, loaded - 1, STAGES)
        if entry < 0:  # asked as late as can be: who takes two may be the last to end
            left -= 1
            upcoming = gl.to_tensor(total)
            if left > 0:
                if not makes_way(counters, sections):
                    upcoming = take(counters)
        work = upcoming
        if RETRIES:
            if entry < 0:
                if upcoming >= total or first_reported(failed, GROUPS) != EMPTY:
                    slot = given % 2
                    mbarrier.wait(words_empty.index(slot), (given // 2 & 1) ^ 1)
                    write_word(words, slot * WORDS, 0)
                    remember(issued, given, 0, FLUSH)
                    mbarrier.arrive(words_full.index(slot), count=1)
                    given += 1
                    mbarrier.wait(finished.index(0), flushes & 1)
                    flushes += 1
                    entry = gl.to_tensor(0)
            if entry >= 0:
                work, entry = next_reported(failed, entry, GROUPS)
                if work == EMPTY:
                    forget(failed, GROUPS)
                    entry = gl.to_tensor(-1)
                    work = upcoming
    end(queue, given)
