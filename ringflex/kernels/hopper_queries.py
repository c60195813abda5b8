"""dQ of the Hopper backward: a group's part, by both groups' dS, into global memory by TMA."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    tma,
    warpgroup_mma,
)

from ringflex.kernels.hopper_common import read_word
from ringflex.kernels.hopper_intrinsics import tma_add

KEYS = gl.constexpr(64)  # per warpgroup
GROUPS = gl.constexpr(2)
DS_STAGES = gl.constexpr(3)  # of dS: a tile's, the last one's, and what the other group still reads
ITEM_WORDS = gl.constexpr(4)  # of a tile of queries: position, head, start, whether it is masked


@gluon.jit
def begin_dq(
    buffers, number, here, zero,
    FIRST_ROW: gl.constexpr, FIRST_COLUMN: gl.constexpr, D_PAD: gl.constexpr,
):  # fmt: skip
    """Begins a group's part of dQ, transposed, from both groups' dS of a tile."""
    k_buffers, ds_buffers = buffers[2], buffers[6]
    COLUMNS: gl.constexpr = zero.shape[0]
    ROWS: gl.constexpr = zero.shape[1]
    k_first = k_buffers.index(here).reshape([KEYS, D_PAD]).slice(FIRST_COLUMN, COLUMNS, dim=1)
    k_second = k_buffers.index(here + 1).reshape([KEYS, D_PAD]).slice(FIRST_COLUMN, COLUMNS, dim=1)
    first = number % DS_STAGES * GROUPS
    ds_first = ds_buffers.index(first).slice(FIRST_ROW, ROWS, dim=1)
    ds_second = ds_buffers.index(first + 1).slice(FIRST_ROW, ROWS, dim=1)
    part = warpgroup_mma(k_first.permute((1, 0)), ds_first, zero, use_acc=False, is_async=True)
    return warpgroup_mma(k_second.permute((1, 0)), ds_second, part, is_async=True)


@gluon.jit
def stage_dq(staged, part):
    """Transposes that part into shared memory, once what was there has left."""
    tma.store_wait(0)
    staged.reshape([part.shape[1], part.shape[0]]).permute((1, 0)).store(part)
    fence_async_shared()


@gluon.jit
def add_dq(
    dq, staged, items, number, b,
    FIRST_ROW: gl.constexpr, FIRST_COLUMN: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Adds that part to dQ of a tile of queries, by its number."""
    item = number % (2 * STAGES) * ITEM_WORDS
    h, row = read_word(items, item + 1), read_word(items, item + 2)
    tma_add(dq, [b, h, row + FIRST_ROW, FIRST_COLUMN], staged)
