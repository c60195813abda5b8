"""What launches of the Hopper kernels are given: descriptors for Gluon, and the queue of tiles."""

from __future__ import annotations

import functools
import itertools
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ringflex.kernels.block_lists import BlockLists
from ringflex.kernels.contract import Way
from ringflex.kernels.device_arrays import to_device

_COUNTERS = 2048  # launches that may be under way at once
_ALL = 1 << 30  # tiles
_DTYPES = {torch.float16: gl.float16, torch.bfloat16: gl.bfloat16, torch.float32: gl.float32}
_LINES = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=32, rank=5)
_FLAT = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=1)


def described(x: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """As `triton_setup.described`: `x [B, H, S, D]` in tiles of `rows` x `columns`."""
    return _descriptor(x, [1, 1, rows, columns], _layout(rows, columns, x.dtype))


def has_lines(x: Tensor) -> bool:
    """Whether `described_in_lines` can describe `x`."""
    (B, H, S, _), (of_batch, of_head, of_row, of_column) = x.shape, x.stride()
    follow = B == 1 or H == 1 or of_batch == H * of_head
    aligned = (of_batch if H == 1 else of_head) % 4 == of_row % 4 == 0 and of_column == 1
    return x.dtype == torch.float32 and S % 8 == 0 and follow and aligned


def described_in_lines(x: Tensor, columns: int) -> TensorDescriptor:
    """fp32 `x [B, H, S, D]` in tiles of 64 rows, which shared memory has in another order: row i of
    8 is line i % 4 * 2 + i // 4 (`hopper_gradients`). Its first dimension is `B * H`."""
    (B, H, S, D), (of_batch, of_head, of_row, _) = x.shape, x.stride()
    descriptor = _descriptor(x, [1, 8, 4, 2, columns], _LINES)
    descriptor.shape = [B * H, S // 8, 4, 2, D]
    descriptor.strides = [of_batch if H == 1 else of_head, 8 * of_row, of_row, 4 * of_row, 1]
    return descriptor


def described_flat(x: Tensor, count: int) -> TensorDescriptor:
    """A contiguous fp32 tensor, flat, `count` numbers at a time."""
    return _descriptor(x.view(-1), [count], _FLAT)


@functools.cache
def _layout(rows: int, columns: int, dtype: torch.dtype) -> gl.NVMMASharedLayout:
    return gl.NVMMASharedLayout.get_default_for([1, 1, rows, columns], _DTYPES[dtype])


def _descriptor(x: Tensor, block: list[int], layout: gl.NVMMASharedLayout) -> TensorDescriptor:
    descriptor = object.__new__(TensorDescriptor)  # its checks cost a launch's time
    descriptor.base, descriptor.shape, descriptor.strides = x, list(x.shape), list(x.stride())
    descriptor.block_shape, descriptor.layout, descriptor.padding = block, layout, "zero"
    return descriptor


class Programs(NamedTuple):
    """Of a launch: how many, and how many tiles each may take: program i, `quota` + i modulo
    `spread`. In how many waves they leave when they are told to (`hopper_common.makes_way`)."""

    number: int
    quota: int = _ALL
    spread: int = 1
    waves: int = 1


def in_sections(
    lists: BlockLists,
    tiles: int,
    heads: int,
    device: torch.device,
    programs: Programs,
    *,
    backwards: bool,
) -> tuple[BlockLists, Tensor]:
    """Lists in the order of the queue, and the places where its sections end (tiles; int32); in
    memory, `quota`, `spread`, `waves` and a number more come before these.

    Most rows come first, in the order of the sequence: neighbours read the same, while it is in
    the L2 cache. Of those that remain, as much work as the longest row is for all multiprocessors,
    the longest come first, so that programs end at about the same time; but rows of nearly the
    same work, within a factor of two, are one section, again in the order of the sequence.

    Args:
        tiles: per block. heads: in all.
        backwards: the sequence from its end; where masks are causal, forward, longest first.
    """
    places = len(lists.work)
    remaining = np.cumsum(lists.work[::-1])[::-1] * tiles * heads
    enough = remaining >= lists.work.max(initial=0) * multiprocessors(device)
    first = int(np.count_nonzero(enough))
    size = np.ceil(np.log2(np.maximum(lists.work[first:], 1)))
    ends = np.r_[first, first + 1 + np.flatnonzero(np.diff(size)), places]
    ends = np.unique(ends[ends > 0])
    order = lists.order_here.copy()
    for begin, end in zip(np.r_[0, ends], ends, strict=False):
        section = np.sort(order[:, begin:end], axis=1)
        order[:, begin:end] = section[:, ::-1] if backwards else section
    aligned = -order.size % 4  # to 16 bytes
    aside = np.zeros(aligned, dtype=np.int64)
    both = np.r_[order.ravel(), aside, programs[1:], 0, ends * tiles]
    moved = to_device(both.astype(np.int32), device)
    lists = lists._replace(order=moved[: order.size].view(order.shape), order_here=order)
    return lists, moved[order.size + aligned + 4 :]


def queue(
    tiles: int,
    flops: float,
    device: torch.device,
    beside: bool,
    life: float,
    way: Way | None = None,
) -> Programs:
    """What programs to launch.

    Args:
        tiles, flops: in all.
        life: FLOP of a program that ends early.
        beside: other kernels may need multiprocessors meanwhile, as transfers do. So programs of a
            long launch end at any time, and others take their place. A short one would take up to
            5% longer by that.
        way: programs end when they are told to, instead.
    """
    at_once = multiprocessors(device)
    if way is not None:
        return Programs((way.times + 1) * at_once, waves=way.times + 1)
    mean = max(1, round(life * tiles / max(flops, 1.0)))
    if not beside or tiles <= 2 * mean * at_once:
        return Programs(min(tiles, at_once))
    if mean == 1:
        return Programs(tiles, quota=1)
    spread = 2 * mean - 1
    # With programs to spare, so that none must take more in the end than others.
    rounds, rest = divmod(tiles + at_once * mean, mean * spread)
    more = int(np.searchsorted(np.cumsum(np.arange(1, spread + 1)), rest)) + 1
    return Programs(rounds * spread + more, quota=1, spread=spread)


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Of a GPU; as many as a Hopper has where there is none, to compile for it."""
    if device.type != "cuda":
        return 132
    count: int = torch.cuda.get_device_properties(device).multi_processor_count
    return count


class _Counters:
    """A ring of zeros, which every launch leaves as it found them."""

    def __init__(self, device: torch.device) -> None:
        pool = torch.zeros(_COUNTERS, 4, dtype=torch.int32, device=device)  # 16 bytes each
        self.slots = list(pool)
        self.numbers = itertools.count()  # threads that launch at once get different ones
        if device.type == "cuda" and not torch.cuda.is_current_stream_capturing():
            torch.cuda.current_stream(device).synchronize()  # another stream may be the next


@functools.cache
def _ring(device: torch.device) -> _Counters:
    return _Counters(device)


def counters(device: torch.device, way: Way | None = None) -> Tensor:
    """Zeros for one launch, int32: the next tile, programs that have left, and how often it was
    told to make way, by whoever comes later; stale, that costs a little time."""
    ring = _ring(device)
    slot = ring.slots[next(ring.numbers) % _COUNTERS]
    if way is not None:
        way.word = slot[2:3]
    return slot


@functools.cache
def l2_cache(device: torch.device) -> int:
    """Bytes of a GPU's L2 cache; as many as a Hopper has where there is none."""
    if device.type != "cuda":
        return 50 << 20
    size: int = torch.cuda.get_device_properties(device).L2_cache_size
    return size
