"""A BlockMask's runs as a kernel walks them: arrays on the device.

A row is one block that stays (of queries in the forward and for dQ, of keys for dK/dV); its lists
say which blocks of the other side to visit: *partial* ones, in which the mask is asked, then *full*
ones.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ringflex.kernels.device_arrays import to_device
from ringflex.kernels.stages import Stage
from ringflex.masks.block_mask import BlockMask
from ringflex.masks.runs import Array, Runs, counting


class BlockLists(NamedTuple):
    """int32, on the device of the kernel's inputs.

    Attributes:
        rows: `[groups * blocks, 4]`: first run and number of partial blocks, then of full ones.
        runs: `[runs + 2, 2]`: first block and end; two more are never visited, but read ahead.
        order: `[groups, blocks]`: rows by falling work, so that the longest start first.
        blocks: rows per group; a group is a batch element and head that the mask distinguishes.
            Lists in stretches have one for each stretch and block, stretch by stretch.
        places: how many of a group in `order` there is something to do for; the first.
        any_partial: whether there is any partial block.
        work: blocks that rows visit, by their place in `order`: float `[places]`, the mean of all
            groups.
        begin_together: whether most rows begin with the same block as the row before.
    """

    rows: Tensor
    runs: Tensor
    order: Tensor
    blocks: int
    places: int
    any_partial: bool
    work: Array
    begin_together: bool
    visited: Array  # blocks of each row, int64 `[groups, blocks]`
    order_here: Array  # `order`, on the host


class Positions(NamedTuple):
    """Global positions of blocks, int32 on the device.

    Attributes:
        q: `[query blocks]`. kv: `[1 or B, K/V blocks]`.
        kv_in_order: K/V block i begins at position i * block size.
    """

    q: Tensor
    kv: Tensor
    kv_in_order: bool


def query_lists(mask: BlockMask, device: torch.device, stage: Stage | None = None) -> BlockLists:
    """For each block of queries, the K/V blocks that it sees. Kept on the mask.

    stage: without places for the queries that it leaves alone.
    """
    key = ("query lists", device)
    if key not in mask.cache:
        mask.cache[key] = lists_of(mask.full, mask.partial, mask.B * mask.H, device)
    lists: BlockLists = mask.cache[key]
    if stage is None:
        return lists
    if key not in stage.cache:
        stage.cache[key] = _without_idle(lists, stage.turns.reshape(-1, lists.blocks) == 0, device)
    return stage.cache[key]


def _without_idle(lists: BlockLists, idle: Array, device: torch.device) -> BlockLists:
    """idle: rows `[groups, blocks]` that come last, and get no place if they can."""
    last = np.take_along_axis(idle, lists.order_here, axis=1)
    order = np.take_along_axis(lists.order_here, np.argsort(last, axis=1, kind="stable"), axis=1)
    places = int((~idle).sum(axis=1).max())
    work = np.take_along_axis(np.where(idle, 0, lists.visited), order, axis=1)
    work = work[:, :places].mean(axis=0)
    return lists._replace(order=_to(order, device), places=places, work=work, order_here=order)


def key_lists(
    mask: BlockMask,
    groups: int,
    device: torch.device,
    *,
    descending: bool = False,
    stretches: int = 1,
) -> BlockLists:
    """For each K/V block, the query blocks that see it. Kept on the mask.

    Args:
        descending: from the last query block to the first: runs count blocks from the end.
        groups: query heads per K/V head; where the mask distinguishes heads, a K/V block's place
            in the order follows from the work of all heads of its group.
        stretches: that many of nearly equal length part the queries, each with lists of its own;
            without places for those that are empty in every group.
    """
    key = ("key lists", groups if mask.H > 1 else 1, device, descending, stretches)
    if key not in mask.cache:
        full, partial = mask.transpose()
        if descending:
            full, partial = (from_the_end(runs, mask.q_blocks) for runs in (full, partial))
        count = mask.B * mask.H
        if stretches > 1:
            length = -(-mask.q_blocks // stretches)
            full, partial = (_parted(runs, count, length, stretches) for runs in (full, partial))
        together = groups if mask.H > 1 else 1
        lists = lists_of(full, partial, count, device, together)
        if stretches > 1:
            places = int(np.count_nonzero(lists.work))
            lists = lists._replace(places=places, work=lists.work[:places])
        mask.cache[key] = lists
    return mask.cache[key]


def positions(mask: BlockMask, device: torch.device) -> Positions:
    """Where the blocks are in the whole sequence. Kept on the mask."""
    key = ("positions", device)
    if key not in mask.cache:
        in_order = np.arange(mask.kv_blocks, dtype=np.int64)[None] * mask.block_size[1]
        mask.cache[key] = Positions(
            _to(mask.q_starts, device),
            _to(mask.kv_starts, device),
            bool((mask.kv_starts == in_order).all()),
        )
    return mask.cache[key]


def lists_of(
    full: Runs, partial: Runs, groups: int, device: torch.device, together: int = 1
) -> BlockLists:
    """Lists of `groups` of rows; `together`: that many share an order, by their work in all."""
    blocks = full.rows // groups
    counts = [blocks_per_row(runs) for runs in (partial, full)]
    first_full = partial.start.size
    rows = np.stack(
        [partial.indptr[:-1], counts[0], first_full + full.indptr[:-1], counts[1]], axis=1
    )
    ends = [np.stack([runs.start, runs.end], axis=1) for runs in (partial, full)]
    runs = np.concatenate([*ends, np.zeros((2, 2), dtype=np.int64)])
    per_row = counts[0] + counts[1]
    work = per_row.reshape(-1, together, blocks).sum(axis=1)
    order = np.argsort(-work, axis=1, kind="stable")
    return BlockLists(
        _to(rows, device), _to(runs, device), _to(order, device), blocks, blocks,
        bool(counts[0].any()), np.take_along_axis(work, order, axis=1).mean(axis=0) / together,
        _begin_together(full, partial), per_row.reshape(groups, blocks), order,
    )  # fmt: skip


def _begin_together(*lists: Runs) -> bool:
    first = np.full(lists[0].rows, np.iinfo(np.int64).max)
    for runs in lists:
        np.minimum.at(first, runs.row, runs.start)
    first = first[first < np.iinfo(np.int64).max]
    return bool(2 * np.count_nonzero(first[1:] == first[:-1]) >= first.size - 1)


def from_the_end(runs: Runs, columns: int) -> Runs:
    """The same blocks, numbered backwards."""
    order = np.lexsort((-runs.start, runs.row))
    return Runs(runs.indptr, columns - runs.end[order], columns - runs.start[order])


def _parted(runs: Runs, groups: int, length: int, stretches: int) -> Runs:
    """The same blocks, columns in stretches of `length`, each with rows of its own: row
    `group * rows + r` becomes rows `(group * stretches + s) * rows + r`."""
    first = runs.start // length
    width = (runs.end - 1) // length - first + 1
    stretch = np.repeat(first, width) + counting(width)
    start, end = (np.repeat(x, width) for x in (runs.start, runs.end))
    group, r = np.divmod(np.repeat(runs.row, width), runs.rows // groups)
    return Runs.from_pieces(
        (group * stretches + stretch) * (runs.rows // groups) + r,
        np.maximum(start, stretch * length),
        np.minimum(end, (stretch + 1) * length),
        runs.rows * stretches,
    )


def blocks_per_row(runs: Runs) -> Array:
    """int64 `[rows]`."""
    ends = np.concatenate([[0], np.cumsum(runs.end - runs.start)])
    return ends[runs.indptr[1:]] - ends[runs.indptr[:-1]]


def _to(x: Array, device: torch.device) -> Tensor:
    return to_device(x.astype(np.int32), device)
