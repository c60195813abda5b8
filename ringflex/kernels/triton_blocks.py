"""Copies scattered blocks of tokens into a contiguous message, and back, in Triton."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

_ELEMENTS = 4096  # at a time


@triton.jit(do_not_specialize=["heads", "count"])
def move_kernel(
    blocks, message, index, stride_b, stride_h, stride_token, heads, count,
    BLOCK: tl.constexpr, D: tl.constexpr, INTO: tl.constexpr, ADD: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Grid: `(B * heads * count,)`, one block of `BLOCK * D` elements each.

    blocks: `[B, heads, tokens, D]`, unit stride in D. message: `[B, heads, count, BLOCK, D]`.
    index: which block of `blocks` each of the message's is. INTO: from the message into the blocks
    (ADD: added to what is there) instead of out of them.
    """
    program = tl.program_id(0)
    head = program // count
    b, h = (head // heads).to(tl.int64), (head % heads).to(tl.int64)
    first = tl.load(index + program % count).to(tl.int64) * BLOCK
    blocks += b * stride_b + h * stride_h + first * stride_token
    message += program.to(tl.int64) * (BLOCK * D)
    for start in range(0, BLOCK * D, N):
        at = start + tl.arange(0, N)
        inside = at < BLOCK * D
        place = blocks + (at // D).to(tl.int64) * stride_token + at % D
        if INTO:
            value = tl.load(message + at, mask=inside)
            if ADD:
                value = value.to(blocks.dtype.element_ty)
                value += tl.load(place, mask=inside)
            tl.store(place, value.to(blocks.dtype.element_ty), mask=inside)
        else:
            value = tl.load(place, mask=inside)
            tl.store(message + at, value.to(message.dtype.element_ty), mask=inside)


def move_blocks(x: Tensor, index: Tensor, message: Tensor, *, into: bool, add: bool) -> None:
    """Between chosen blocks of `x` and a message, on the current GPU and stream, in one launch.

    Args:
        x: `[B, H, blocks, block_size, D]`, as `unflatten` makes it of `[B, H, tokens, D]`; unit
            stride in D.
        index: int64 `[n]`, on the GPU, distinct.
        message: `[B, H, n, block_size, D]`, contiguous; it may have another dtype.
        into: from the message into `x`, else out of it. add: to what `x` holds.
    """
    B, H, n, block_size, D = message.shape
    assert x.stride(4) == 1 and x.stride(2) == block_size * x.stride(3)
    elements = min(_ELEMENTS, triton.next_power_of_2(block_size * D))
    move_kernel[(B * H * n,)](
        x, message, index, x.stride(0), x.stride(1), x.stride(3), H, n,
        BLOCK=block_size, D=D, INTO=into, ADD=add, N=elements, num_warps=4,
    )  # fmt: skip
