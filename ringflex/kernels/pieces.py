"""The last rows of a backward in pieces, so that all multiprocessors end at about the same time.

Tiles of like work come in rounds, one to each multiprocessor, and the last round may be of a few
only: 4,096 tiles on 132 multiprocessors are 31 rounds and 4 tiles, which take 3% of the time.
Parted along the queries, as in "Stream-K" (Osama et al., 2023), these few keep all busy; what they
find of dK and dV adds up.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from ringflex.kernels.block_lists import BlockLists, blocks_per_row, from_the_end, lists_of
from ringflex.kernels.hopper_launch import multiprocessors
from ringflex.masks.block_mask import BlockMask
from ringflex.masks.runs import Array, Runs, counting

_ALIKE = 0.9  # least work over most, for rows to be of like work
_LEAST = 0.005  # of the time, that is to be won
_MOST = 8  # pieces of a row
_MORE = 0.02  # of a tile's time, for another to begin and to end


class Tail(NamedTuple):
    """How many rows to part, and in how many pieces each."""

    rows: int
    pieces: int


def tail_of(lists: BlockLists, per_row: int, device: torch.device) -> Tail | None:
    """What to part of a launch of `per_row` tiles for each row; None: nothing."""
    visited = np.take_along_axis(lists.visited, lists.order_here, axis=1)[:, : lists.places]
    at_once = multiprocessors(device)
    rounds, rest = divmod(lists.places * per_row, at_once)
    if not rounds or not rest or visited.min() < max(2, _ALIKE * visited.max()):
        return None
    fewest, most = -(-rest // per_row), min(_MOST, int(visited.min()))
    found = [
        (_time(lists.places - rows, rows, pieces, per_row, at_once), rows, pieces)
        for rows in range(fewest, min(fewest + 4, lists.places // 2 + 1))
        for pieces in range(2, most + 1)
    ]
    time, *tail = min(found, default=(np.inf, 0, 0))
    return Tail(*tail) if time < (1 - _LEAST) * (rounds + 1) * (1 + _MORE) else None


def _time(whole: int, rows: int, pieces: int, per_row: int, at_once: int) -> float:
    """Of rows that remain whole, and others in pieces, tile after tile; in a tile's time."""
    rounds, busy = divmod(whole * per_row, at_once)
    each = 1 / pieces + _MORE
    missed = round((1 + _MORE) / each)  # rounds of pieces, by those that have one more whole tile
    waiting, taken = rows * per_row * pieces, 0
    while waiting > 0:
        taken += 1
        waiting -= at_once if taken > missed else at_once - busy
    return rounds * (1 + _MORE) + taken * each


def keys_in_pieces(
    mask: BlockMask, lists: BlockLists, tail: Tail, device: torch.device
) -> BlockLists:
    """Lists of keys, descending, whose last rows are parted: row `r` of a group becomes rows
    `(1 + piece) * rows + r`, the others remain. No piece is larger than one before."""
    groups, count, pieces = mask.B * mask.H, lists.blocks, tail.pieces
    last = lists.order_here[:, lists.places - tail.rows : lists.places]
    chosen: Array = np.zeros(groups * count, dtype=bool)
    np.put_along_axis(chosen.reshape(groups, count), last, True, axis=1)
    full, partial = (from_the_end(runs, mask.q_blocks) for runs in mask.transpose())
    before = blocks_per_row(partial)
    work = before + blocks_per_row(full)
    size, larger = np.divmod(work, pieces)  # the first `larger` pieces have one block more

    def part(runs: Runs, listed: Array) -> Runs:
        row, length = runs.row, runs.end - runs.start
        passed = np.r_[0, np.cumsum(length)]
        at = passed[:-1] - passed[runs.indptr[row]] + listed[row]  # in the whole row's list
        first, last = (_piece_of(i, size[row], larger[row]) for i in (at, at + length - 1))
        width = np.where(chosen[row], last - first + 1, 1)
        piece = np.repeat(first, width) + counting(width)
        row, at, start, end = (np.repeat(x, width) for x in (row, at, runs.start, runs.end))
        begins = [(piece + i) * size[row] + np.minimum(piece + i, larger[row]) for i in (0, 1)]
        parted = chosen[row]
        from_, to = (np.where(parted, start + x - at, y) for x, y in zip(begins, (start, end)))
        group, r = np.divmod(row, count)
        place = np.where(parted, 1 + piece, 0)
        return Runs.from_pieces(
            (group * (1 + pieces) + place) * count + r,
            np.maximum(start, from_),
            np.minimum(end, to),
            runs.rows * (1 + pieces),
        )

    found = lists_of(part(full, before), part(partial, np.zeros_like(before)), groups, device)
    places = int(np.count_nonzero(found.work))
    return found._replace(places=places, work=found.work[:places])


def _piece_of(block: Array, size: Array, larger: Array) -> Array:
    """Which piece has the block with that number in its row's list."""
    bound = larger * (size + 1)
    return np.where(
        block < bound, block // (size + 1), larger + (block - bound) // np.maximum(size, 1)
    )
