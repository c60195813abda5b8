"""The visible blocks of a BlockMask, dealt into chunks that one batched operation can compute.

An *item* is one block of queries (of one batch element, and of one head if the mask depends on
heads) against up to `L` K/V blocks that it sees. Items of nearly equal length are put together into
chunks of bounded size; within a chunk no block of queries stands twice, so results can be written
without conflict, and chunks run in a fixed order.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ringflex.kernels.device_arrays import to_device
from ringflex.masks.block_mask import BlockMask
from ringflex.masks.runs import Array, Runs, counting


@dataclass(frozen=True, eq=False, kw_only=True)
class Chunk:
    """`R` items of up to `L` K/V blocks each.

    Attributes:
        b: batch element of each item, int64 `[R]`.
        head: query head of each item, int64 `[R]`; None if items stand for all heads.
        row: query block, int64 `[R]`.
        blocks: K/V blocks, int64 `[R, L]`; the list's end is filled up with block 0.
        counts: true number of blocks, int64 `[R]`; None if all have `L`.
        q_start: global position of each query block, int64 `[R]`.
        kv_start: global position of each K/V block, int64 `[R, L]`.
        partial: whether the mask must be asked.
    """

    b: Tensor
    head: Tensor | None
    row: Tensor
    blocks: Tensor
    counts: Tensor | None
    q_start: Tensor
    kv_start: Tensor
    partial: bool


def chunks_of(
    mask: BlockMask, batch: int, heads: int, *, elements: int, device: torch.device
) -> list[Chunk]:
    """All chunks of a mask, full blocks first; kept on the mask for the next call.

    Args:
        batch, heads: of the query tensor.
        elements: scores in flight per chunk.
    """
    key = ("chunks", batch, heads, elements, device)
    if key not in mask.cache:
        inner_heads = heads if mask.H == 1 else 1
        blocks = max(1, elements // (inner_heads * mask.block_size[0] * mask.block_size[1]))
        mask.cache[key] = [
            chunk
            for runs, partial in ((mask.full, False), (mask.partial, True))
            for chunk in _chunks(mask, runs, partial, batch, blocks, device)
        ]
    return mask.cache[key]


def _chunks(
    mask: BlockMask, runs: Runs, partial: bool, batch: int, at_once: int, device: torch.device
) -> Iterator[Chunk]:
    _, column = runs.pairs()
    per_row = np.zeros(runs.rows, dtype=np.int64)
    np.add.at(per_row, runs.row, runs.end - runs.start)
    first = np.cumsum(per_row) - per_row
    # Cut long rows into segments of `at_once` blocks.
    segments = -(-per_row // at_once)
    row = np.repeat(np.arange(per_row.size), segments)
    segment = counting(segments)
    offset = first[row] + segment * at_once
    count = np.minimum(per_row[row] - segment * at_once, at_once)
    order = np.lexsort((row, -count, segment))
    repeats = batch if mask.B == 1 else 1
    b = np.tile(np.arange(repeats), order.size)
    order = np.repeat(order, repeats)
    row, segment, offset, count = row[order], segment[order], offset[order], count[order]
    group, q_block = row // mask.q_blocks, row % mask.q_blocks
    b = b if mask.B == 1 else group // mask.H
    head = None if mask.H == 1 else group % mask.H

    def tensor(x: Array) -> Tensor:
        return to_device(x, device)

    for begin, end in _cuts(count, segment, at_once):
        width = int(count[begin])
        slot = np.arange(width)
        inside = slot < count[begin:end, None]
        blocks = np.where(inside, column[np.where(inside, offset[begin:end, None] + slot, 0)], 0)
        rows, batch_of = q_block[begin:end], b[begin:end]
        starts = mask.kv_starts[batch_of[:, None] % mask.kv_starts.shape[0], blocks]
        yield Chunk(
            b=tensor(batch_of),
            head=None if head is None else tensor(head[begin:end]),
            row=tensor(rows),
            blocks=tensor(blocks),
            counts=None if inside.all() else tensor(count[begin:end]),
            q_start=tensor(mask.q_starts[rows]),
            kv_start=tensor(starts),
            partial=partial,
        )


def _cuts(count: Array, segment: Array, at_once: int) -> Iterator[tuple[int, int]]:
    """Ranges of items: one segment number, lengths within an eighth, `at_once` blocks."""
    begin = 0
    while begin < count.size:
        width = int(count[begin])
        most = begin + max(1, at_once // width)
        shortest = width - max(1, width // 8)
        alike = (count[begin:most] >= shortest) & (segment[begin:most] == segment[begin])
        end = begin + (int(np.argmin(alike)) if not alike.all() else alike.size)
        yield begin, end
        begin = end
