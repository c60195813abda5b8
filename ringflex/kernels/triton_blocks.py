"""Copies scattered blocks of K and V into contiguous messages, and back, in Triton."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

_ELEMENTS = 4096  # at a time
UNIT = tl.constexpr(16)  # elements; messages' pieces begin at multiples of it


class Places(NamedTuple):
    """Where the blocks of messages are, int32, on the GPU.

    Attributes:
        of_blocks: a row `[group, block, n, K's place, V's place]` for each block that a message
            holds: which group of batch elements and which of its blocks; and where in the messages
            its first head is, in `UNIT`s. From head to head are n blocks.
        sums: a row `[group, block, first, end]` for each block that is added to, of the rows of
            `of_blocks` that are added.
    """

    of_blocks: Tensor
    sums: Tensor


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
    BLOCK: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, INTO: tl.constexpr, N: tl.constexpr,
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
    count, per_group = places.of_blocks.shape[0], k.shape[0] // groups
    if count:
        move_kernel[(count, per_group * k.shape[1], 2)](
            _strided(k), _strided(v), messages, places.of_blocks, k.shape[1], per_group,
            BLOCK=block_size, D=k.shape[3], DV=v.shape[3], INTO=into, N=_at_once(k, block_size),
            num_warps=4,
        )  # fmt: skip


def sum_blocks(
    k: Tensor, v: Tensor, total_k: Tensor, total_v: Tensor, messages: Tensor, places: Places,
    groups: int, block_size: int,
) -> None:  # fmt: skip
    """`total_k` and `total_v`, perhaps k and v themselves: k and v plus the messages' blocks, at
    the blocks of `places.sums`; otherwise as `move_blocks`."""
    count, per_group = places.sums.shape[0], k.shape[0] // groups
    if count:
        sum_kernel[(count, per_group * k.shape[1], 2)](
            _strided(k), _strided(v), _strided(total_k), _strided(total_v), messages,
            places.of_blocks, places.sums, k.shape[1], per_group,
            BLOCK=block_size, D=k.shape[3], DV=v.shape[3], N=_at_once(k, block_size), num_warps=4,
        )  # fmt: skip


def _at_once(k: Tensor, block_size: int) -> int:
    elements: int = triton.next_power_of_2(block_size * k.shape[3])
    return min(_ELEMENTS, elements)


def _strided(x: Tensor) -> tuple[Tensor, int, int, int]:
    return x, x.stride(0), x.stride(1), x.stride(2)
