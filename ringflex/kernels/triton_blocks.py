"""Copies scattered blocks of K and V into contiguous messages, and back, in Triton."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from ringflex.kernels.contract import Tile
from ringflex.kernels.triton_launch import Prepared
from ringflex.kernels.triton_setup import alignment

_ELEMENTS = 4096  # at a time
_TILE = Tile(0, 0, num_warps=4, num_stages=0)
UNIT = tl.constexpr(16)  # elements; messages' pieces begin at multiples of it


@dataclass(frozen=True, eq=False)
class Places:
    """Where the blocks of messages are, int32, on the GPU.

    Attributes:
        of_blocks: a row `[group, block, n, K's place, V's place]` for each block that a message
            holds: which group of batch elements and which of its blocks; and where in the messages
            its first head is, in `UNIT`s. From head to head are n blocks.
        sums: a row `[group, block, first, end]` for each block that is added to, of the rows of
            `of_blocks` that are added.
        prepared: launches, by what they depend on.
    """

    of_blocks: Tensor
    sums: Tensor
    prepared: dict[Any, Prepared] = field(default_factory=dict, init=False)


@triton.jit
def _move_block(
    x, message, stride_token, BLOCK: tl.constexpr, D: tl.constexpr, INTO: tl.constexpr,
    N: tl.constexpr,
):  # fmt: skip
    for start in range(0, BLOCK * D, N):
        at = start + tl.arange(0, N)
        inside = at < BLOCK * D
        place = x + (at // D).to(tl.int64) * stride_token + at % D
        if INTO:
            value = tl.load(message + at, mask=inside)
            tl.store(place, value.to(x.dtype.element_ty), mask=inside)
        else:
            value = tl.load(place, mask=inside)
            tl.store(message + at, value.to(message.dtype.element_ty), mask=inside)


@triton.jit
def _head_of_block(x, group, block, inner, heads, per_group, BLOCK: tl.constexpr):
    """Where a block of one head begins. x: (pointer, strides)."""
    b = (group * per_group + inner // heads).to(tl.int64)
    h = (inner % heads).to(tl.int64)
    return x[0] + b * x[1] + h * x[2] + block.to(tl.int64) * BLOCK * x[3]


@triton.jit(do_not_specialize=["heads", "per_group"])
def move_kernel(
    k, v, messages, of_blocks, heads, per_group,
    BLOCK: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, N: tl.constexpr, INTO: tl.constexpr,
):  # fmt: skip
    """Grid: `(blocks, per_group * heads, 2)`, for K and for V.

    k, v: (pointer, strides but that of D, which is 1). messages: all, flat. of_blocks: see
    `Places`. per_group: batch elements of a group. INTO: from the messages instead of into them.
    """
    row = of_blocks + 5 * tl.program_id(0)
    inner = tl.program_id(1)
    group, block, n = tl.load(row), tl.load(row + 1), tl.load(row + 2).to(tl.int64)
    if tl.program_id(2) == 0:
        at = tl.load(row + 3).to(tl.int64) * UNIT + inner * n * (BLOCK * D)
        x = _head_of_block(k, group, block, inner, heads, per_group, BLOCK)
        _move_block(x, messages + at, k[3], BLOCK, D, INTO, N)
    else:
        at = tl.load(row + 4).to(tl.int64) * UNIT + inner * n * (BLOCK * DV)
        x = _head_of_block(v, group, block, inner, heads, per_group, BLOCK)
        _move_block(x, messages + at, v[3], BLOCK, DV, INTO, N)


@triton.jit
def _sum_block(
    x, total, messages, of_blocks, stride_token, total_stride_token, inner, first, end,
    BLOCK: tl.constexpr, D: tl.constexpr, V: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    for start in range(0, BLOCK * D, N):
        at = start + tl.arange(0, N)
        inside = at < BLOCK * D
        token = (at // D).to(tl.int64)
        value = tl.load(x + token * stride_token + at % D, mask=inside)
        for number in range(first, end):
            row = of_blocks + 5 * number
            n = tl.load(row + 2).to(tl.int64)
            message = messages + tl.load(row + 3 + V).to(tl.int64) * UNIT
            message += inner * n * (BLOCK * D)
            value += tl.load(message + at, mask=inside).to(value.dtype)
        value = value.to(total.dtype.element_ty)
        tl.store(total + token * total_stride_token + at % D, value, mask=inside)


@triton.jit(do_not_specialize=["heads", "per_group"])
def sum_kernel(
    k, v, total_k, total_v, messages, of_blocks, sums, heads, per_group,
    BLOCK: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Grid: `(sums, per_group * heads, 2)`. total_k, total_v: where k and v go with what the
    messages hold added, in its order; perhaps k and v themselves. The rest as in `move_kernel`."""
    row = sums + 4 * tl.program_id(0)
    inner = tl.program_id(1)
    group, block = tl.load(row), tl.load(row + 1)
    first, end = tl.load(row + 2), tl.load(row + 3)
    if tl.program_id(2) == 0:
        x = _head_of_block(k, group, block, inner, heads, per_group, BLOCK)
        total = _head_of_block(total_k, group, block, inner, heads, per_group, BLOCK)
        _sum_block(
            x, total, messages, of_blocks, k[3], total_k[3], inner, first, end, BLOCK, D, 0, N
        )
    else:
        x = _head_of_block(v, group, block, inner, heads, per_group, BLOCK)
        total = _head_of_block(total_v, group, block, inner, heads, per_group, BLOCK)
        _sum_block(
            x, total, messages, of_blocks, v[3], total_v[3], inner, first, end, BLOCK, DV, 1, N
        )


def move_blocks(
    k: Tensor, v: Tensor, messages: Tensor, places: Places, groups: int, block_size: int,
    *, into: bool,
) -> None:  # fmt: skip
    """Between blocks of k and v and messages, on the current GPU and stream, in one launch.

    Args:
        k, v: `[B, H, tokens, D]`; unit stride in D. messages: flat; of any dtype.
        groups: of batch elements. into: from the messages into k and v, else out of them.
    """
    if places.of_blocks.shape[0] == 0:
        return
    key = into, *_kind(k, v, messages)
    ready = places.prepared.get(key)
    if ready is None:
        grid, shape, constants = _launch(places.of_blocks, k, v, groups, block_size)
        ready = places.prepared[key] = Prepared(
            move_kernel, grid, (places.of_blocks, *shape), (*constants, into), _TILE
        )
    ready(_strided(k), _strided(v), messages)


def sum_blocks(
    k: Tensor, v: Tensor, total_k: Tensor, total_v: Tensor, messages: Tensor, places: Places,
    groups: int, block_size: int,
) -> None:  # fmt: skip
    """`total_k` and `total_v`, perhaps k and v themselves: k and v plus the messages' blocks, at
    the blocks of `places.sums`; otherwise as `move_blocks`."""
    if places.sums.shape[0] == 0:
        return
    key = "sum", *_kind(k, v, total_k, total_v, messages)
    ready = places.prepared.get(key)
    if ready is None:
        grid, shape, constants = _launch(places.sums, k, v, groups, block_size)
        fixed = (places.of_blocks, places.sums, *shape)
        ready = places.prepared[key] = Prepared(sum_kernel, grid, fixed, constants, _TILE)
    ready(_strided(k), _strided(v), _strided(total_k), _strided(total_v), messages)


def _kind(*tensors: Tensor) -> tuple[Any, ...]:
    """What a launch for them depends on."""
    return (alignment(*tensors), *((x.dtype, x.shape, x.stride()) for x in tensors))


def _launch(
    rows: Tensor, k: Tensor, v: Tensor, groups: int, block_size: int
) -> tuple[tuple[int, int, int], tuple[int, int], tuple[int, ...]]:
    """Grid, `heads` and `per_group`, and constants of a kernel with a program for each row, head,
    and of K and V."""
    heads, per_group = k.shape[1], k.shape[0] // groups
    grid = (rows.shape[0], per_group * heads, 2)
    return grid, (heads, per_group), (block_size, k.shape[3], v.shape[3], _at_once(k, block_size))


def _at_once(k: Tensor, block_size: int) -> int:
    elements: int = triton.next_power_of_2(block_size * k.shape[3])
    return min(_ELEMENTS, elements)


def _strided(x: Tensor) -> tuple[Tensor, int, int, int]:
    return x, x.stride(0), x.stride(1), x.stride(2)
