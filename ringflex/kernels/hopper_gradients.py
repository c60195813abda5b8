"""What the Hopper backward adds to gradients in global memory, by TMA.

dQ of a tile of queries, from both groups' dS: of every tile, each group computes half, transposed,
so that what a warp writes to shared memory at once is spread over its banks; or groups take turns,
and one computes all of it, which reads a quarter less of shared memory. And dK and dV, where heads
of a group are apart, or the queries parted into stretches.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    tma,
    warpgroup_mma,
)

from ringflex.kernels.hopper_common import read_word
from ringflex.kernels.hopper_intrinsics import shared_as, tma_add

KEYS = gl.constexpr(64)  # per warpgroup
GROUPS = gl.constexpr(2)
ITEM_WORDS = gl.constexpr(4)  # of a tile of queries: position, head, start, whether it is masked


@gluon.constexpr_function
def take_turns(block):
    """Whether dQ of a tile is one group's: then what a group adds at once is described in lines."""
    return len(block.shape) == 5


@gluon.constexpr_function
def slots_of_ds(block):
    """Of dS: a tile's, the last one's and, unless groups take turns, what the other still reads."""
    return 2 if take_turns(block) else 3


@gluon.constexpr_function
def _lines(columns):
    """64 rows of fp32 in shared memory, as `hopper_launch.described_in_lines` tells TMA: in lines
    of 128 bytes, of which it exchanges the 16-byte pieces of line i by i % 8. Of 8 rows that a warp
    writes at once, row i is line i % 4 * 2 + i // 4: four in a row are in different banks."""
    bases = [[0, 1], [0, 2], [0, 4], [0, 8], [0, 16], [4, 4], [1, 8], [2, 16], [8, 0], [16, 0]]
    bases += [[32, 0], [0, 32], [0, 64]]
    return gl.SharedLinearLayout(bases[: 11 + columns // 64], alignment=1024)


@gluon.jit
def add_keys(x, staged, place, row, value):
    """Adds a group's dK or dV to rows of `x`, described in lines, by way of `staged`.

    place: `b * kv_heads + h`."""
    COLUMNS: gl.constexpr = x.block_type.shape[4]
    if value.shape[1] > COLUMNS:
        first, second = gl.split(value.reshape([KEYS, 2, COLUMNS]).permute((0, 2, 1)))
        _add_lines(x, staged, place, row, 0, first)
        _add_lines(x, staged, place, row, COLUMNS, second)
    else:
        _add_lines(x, staged, place, row, 0, value)


@gluon.jit
def _add_lines(x, staged, place, row, column, value):
    tma.store_wait(0)
    _store_lines(staged, value)
    fence_async_shared()
    lines = shared_as(staged, gl.float32, x.block_type.shape, x.layout)
    tma_add(x, [place, row // 8, 0, 0, column], lines)


@gluon.jit
def _store_lines(staged, value):
    shared_as(staged, gl.float32, value.shape, _lines(value.shape[1])).store(value)


@gluon.jit
def begin_dq(
    dq, buffers, number, here, BLOCK_M: gl.constexpr, D_PAD: gl.constexpr, GROUP: gl.constexpr
):  # fmt: skip
    """Begins what a group computes of dQ of a tile: `[rows, columns]` in lines, or transposed."""
    SHAPE: gl.constexpr = dq.block_type.shape
    first = number % slots_of_ds(dq.block_type) * GROUPS
    k_buffers, ds_buffers = buffers[2], buffers[6]
    k_first = k_buffers.index(here).reshape([KEYS, D_PAD])
    k_second = k_buffers.index(here + 1).reshape([KEYS, D_PAD])
    if take_turns(dq.block_type):
        LINES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D_PAD, 16])
        zero = gl.zeros([BLOCK_M, D_PAD], gl.float32, LINES)
        ds_first = ds_buffers.index(first).permute((1, 0))
        ds_second = ds_buffers.index(first + 1).permute((1, 0))
        part = warpgroup_mma(ds_first, k_first, zero, use_acc=False, is_async=True)
        return warpgroup_mma(ds_second, k_second, part, is_async=True)
    else:
        ROWS: gl.constexpr = SHAPE[2]
        COLUMNS: gl.constexpr = SHAPE[3]
        FIRST_ROW: gl.constexpr = GROUP * (BLOCK_M - ROWS)
        FIRST_COLUMN: gl.constexpr = GROUP * (D_PAD - COLUMNS)
        TURNED: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, ROWS, 16])
        zero = gl.zeros([COLUMNS, ROWS], gl.float32, TURNED)
        k_first = k_first.slice(FIRST_COLUMN, COLUMNS, dim=1).permute((1, 0))
        k_second = k_second.slice(FIRST_COLUMN, COLUMNS, dim=1).permute((1, 0))
        ds_first = ds_buffers.index(first).slice(FIRST_ROW, ROWS, dim=1)
        ds_second = ds_buffers.index(first + 1).slice(FIRST_ROW, ROWS, dim=1)
        part = warpgroup_mma(k_first, ds_first, zero, use_acc=False, is_async=True)
        return warpgroup_mma(k_second, ds_second, part, is_async=True)


@gluon.jit
def stage_dq(dq, staged, part):
    """Puts that into shared memory, once what was there has left."""
    tma.store_wait(0)
    if take_turns(dq.block_type):
        _store_lines(staged, part)
    else:
        staged.reshape([part.shape[1], part.shape[0]]).permute((1, 0)).store(part)
    fence_async_shared()


@gluon.jit
def place_of(items, number, STAGES: gl.constexpr):
    """The head and the first row of a tile of queries, by its number."""
    item = number % (2 * STAGES) * ITEM_WORDS
    return read_word(items, item + 1), read_word(items, item + 2)


@gluon.jit
def add_dq(
    dq, staged, b, h, row, heads,
    BLOCK_M: gl.constexpr, D_PAD: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    """Adds it to dQ from a row on, which is the tile's first."""
    SHAPE: gl.constexpr = dq.block_type.shape
    if take_turns(dq.block_type):
        tma_add(dq, [b * heads + h, row // 8, 0, 0, 0], staged)
    else:
        first_row = GROUP * (BLOCK_M - SHAPE[2])
        tma_add(dq, [b, h, row + first_row, GROUP * (D_PAD - SHAPE[3])], staged)
