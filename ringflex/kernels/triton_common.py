"""What the Triton kernels share: loading tiles, walking runs of blocks, scores of a tile.

A *tile* is what one iteration computes: `BLOCK_M` queries against `BLOCK_N` keys. A block of the
mask holds one or more tiles either way. Tensors `[B, H, S, D]` reach a kernel as a host-side tensor
descriptor (Hopper's TMA; any strides that it allows) or as `(pointer, *strides)`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ringflex.kernels import stages

BEGINS, ENDS = tl.constexpr(stages.BEGINS), tl.constexpr(stages.ENDS)
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
LOWEST = tl.constexpr(-3.4028234663852886e38)  # a maximum over nothing that is not -inf, so that
# exp2(score - maximum) is 0 and not NaN where nothing was seen


@triton.jit
def load_tile(
    x,
    b,
    h,
    row,
    length,
    ROWS: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    TMA: tl.constexpr,
):
    """Rows `row .. row + ROWS` of `x[b, h]`: `[ROWS, D_PAD]`, zero beyond `length` and `D`."""
    if TMA:
        return x.load([b, h, row, 0]).reshape(ROWS, D_PAD)
    else:
        rows, cols = tl.arange(0, ROWS), tl.arange(0, D_PAD)
        start = x[0] + b.to(tl.int64) * x[1] + h.to(tl.int64) * x[2] + row.to(tl.int64) * x[3]
        inside = (row + rows < length)[:, None]
        if D < D_PAD:
            inside = inside & (cols < D)[None, :]
        return tl.load(start + rows[:, None] * x[3] + cols[None, :] * x[4], mask=inside, other=0.0)


@triton.jit
def store_tile(x, b, h, row, length, value, D: tl.constexpr):
    """Writes `value [ROWS, D_PAD]` to rows of `x[b, h]`, up to `length` and `D`."""
    rows, cols = tl.arange(0, value.shape[0]), tl.arange(0, value.shape[1])
    start = x[0] + b.to(tl.int64) * x[1] + h.to(tl.int64) * x[2] + row.to(tl.int64) * x[3]
    places = start + rows[:, None] * x[3] + cols[None, :] * x[4]
    inside = (row + rows < length)[:, None]
    if value.shape[1] > D:
        inside = inside & (cols < D)[None, :]
    tl.store(places, value.to(x[0].dtype.element_ty), mask=inside)


@triton.jit
def row_places(x, b, h, row):
    """Pointers to entries `row` of `x[b, h]`, for `x [B, H, S]` as (pointer, encoded strides)."""
    stride_b, stride_h, stride = (x[1] - 3) >> 1, (x[2] - 3) >> 1, (x[3] - 3) >> 1
    return x[0] + b.to(tl.int64) * stride_b + h.to(tl.int64) * stride_h + row * stride


@triton.jit
def first_tile(runs, run, TILES: tl.constexpr):
    """Where a walk over a row's runs begins: tile, end of the run, run, next run's bounds.

    TILES: tiles per block. The next run is read ahead, so that a loop need not wait for it.
    """
    tile, end = tl.load(runs + 2 * run) * TILES, tl.load(runs + 2 * run + 1) * TILES
    next_tile, next_end = tl.load(runs + 2 * run + 2) * TILES, tl.load(runs + 2 * run + 3) * TILES
    return tile, end, run, next_tile, next_end


@triton.jit
def following_tile(runs, tile, end, run, next_tile, next_end, TILES: tl.constexpr):
    """One step of that walk."""
    tile += 1
    if tile == end:
        tile = next_tile
        end = next_end
        run += 1
        next_tile = tl.load(runs + 2 * run + 2) * TILES
        next_end = tl.load(runs + 2 * run + 3) * TILES
    return tile, end, run, next_tile, next_end


@triton.jit
def position_of(starts, tile, SIZE: tl.constexpr, TILES: tl.constexpr, IN_ORDER: tl.constexpr):
    """Global position of a tile's first token. SIZE: tokens per tile; TILES: tiles per block."""
    if IN_ORDER:
        return tile * SIZE
    else:
        return tl.load(starts + tile // TILES) + tile % TILES * SIZE


@triton.jit
def visible_in(mask_mod: tl.constexpr, b, h, q_idx, kv_idx, q_limit, kv_limit, tables):
    """What the mask shows of a tile; positions from the limits on are padding."""
    inside = (q_idx < q_limit) & (kv_idx < kv_limit)
    if mask_mod is None:
        return inside
    else:
        q_idx = tl.minimum(q_idx, q_limit - 1)
        kv_idx = tl.minimum(kv_idx, kv_limit - 1)
        return inside & mask_mod(b, h, q_idx, kv_idx, tables)


@triton.jit
def earlier_lse(
    before_lse, first_lse, b, h, row, inside, turn, STAGED: tl.constexpr, MERGE_FIRST: tl.constexpr
):
    """What a forward merges with, in base 2; see `triton_forward.forward_kernel`."""
    if STAGED:
        later, first = turn & BEGINS == 0, turn & BEGINS != 0
        old = tl.load(row_places(before_lse, b, h, row), mask=inside & later, other=float("-inf"))
        if MERGE_FIRST:
            begun = tl.load(
                row_places(first_lse, b, h, row), mask=inside & first, other=float("-inf")
            )
            old = tl.maximum(old, begun.to(old.dtype))  # one of them is -inf
        return old * LOG2E
    else:
        return tl.load(row_places(before_lse, b, h, row), mask=inside, other=0.0) * LOG2E


@triton.jit
def merge_weights(old, new):
    """How two partial results merge, given their lse in base 2: what each counts, and the lse of
    both. Two empty ones stay empty."""
    new = new.to(old.dtype)
    top = tl.maximum(tl.maximum(old, new), LOWEST)
    old_weight = tl.exp2((old - top).to(tl.float32))
    new_weight = tl.exp2((new - top).to(tl.float32))
    total = old_weight + new_weight
    nothing = total == 0
    divisor = 1.0 / tl.where(nothing, 1.0, total)
    merged = tl.where(nothing, float("-inf"), top + tl.log2(tl.where(nothing, 1.0, total)))
    return old_weight * divisor, new_weight * divisor, merged
