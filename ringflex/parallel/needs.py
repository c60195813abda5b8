"""Which K/V blocks each rank's queries see, as ranges, and what follows from a layout. Pure.

Each rank tells its own, in rows of int64; nothing here grows with ranks times blocks. A *reader* is
the rank whose queries see a block, an *owner* the rank that holds it; their *distance* is how far
the reader comes after the owner, around the ring.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from ringflex.masks.block_mask import BlockMask
from ringflex.masks.runs import Array, counting
from ringflex.parallel.layout import Layout
from ringflex.parallel.links import Costs, Rounds

_AT_ONCE = 1 << 21  # pieces
_Ranges = tuple[Array, Array, Array, Array]  # reader, group, start, end


def need_rows(masks: Sequence[BlockMask], layout: Layout) -> Array:
    """The work and needs of a rank's queries, int64 `[n, 3]`: (mask, -1 - owner, visible blocks of
    that owner's), and (mask, start, end) for each range of blocks needed, batch elements laid end
    to end."""
    records = []
    for m, mask in enumerate(masks):
        for b, (start, end) in enumerate(mask.needed_ranges()):
            at = b * mask.kv_blocks
            records.append(np.stack([np.full(start.size, m), at + start, at + end], axis=1))
        work = _work_by_owner(mask, layout)
        owner = np.flatnonzero(work)
        records.append(np.stack([np.full(owner.size, m), -1 - owner, work[owner]], axis=1))
    return np.concatenate(records).astype(np.int64)


def _work_by_owner(mask: BlockMask, layout: Layout) -> Array:
    """Visible blocks by who holds their keys, int64 `[W]`."""
    if layout.world_size == 1:  # queries and keys may differ in number
        return np.array([mask.visible_blocks])
    change = np.zeros(mask.kv_blocks + 1, dtype=np.int64)
    for runs in (mask.full, mask.partial):
        change += np.bincount(runs.start, minlength=change.size)
        change -= np.bincount(runs.end, minlength=change.size)
    found = np.bincount(layout.owner, np.cumsum(change)[:-1], layout.world_size)
    return found.astype(np.int64)  # below 2**53, so exact


def needs_of(told: Sequence[Array], mask: int, groups: int, blocks: int) -> tuple[Needs, Work]:
    """Of one mask, from all ranks' rows."""
    counts = [rows.shape[0] for rows in told]
    rank = np.repeat(np.arange(len(told)), counts)
    rows = np.concatenate(told)
    mine = rows[:, 0] == mask
    rank, start, end = rank[mine], rows[mine, 1], rows[mine, 2]
    work = start < 0
    found = Work(len(told), rank[work], -1 - start[work], end[work])
    rank, start, end = rank[~work], start[~work], end[~work]
    group = start // blocks
    shift = group * blocks
    needs = Needs(len(told), groups, blocks, rank, group, start - shift, end - shift)
    return needs, found


@dataclass(frozen=True, eq=False)
class Work:
    """What each rank computes: visible blocks by who holds their keys, int64 `[entries]` each."""

    world_size: int
    rank: Array
    owner: Array
    blocks: Array

    def by_rank(self) -> list[int]:
        total = np.zeros(self.world_size, dtype=np.int64)
        np.add.at(total, self.rank, self.blocks)
        return [int(blocks) for blocks in total]

    def of(self, rank: int) -> Array:
        """Of one rank, int64 `[W]` by owner."""
        found = np.zeros(self.world_size, dtype=np.int64)
        mine = self.rank == rank
        found[self.owner[mine]] = self.blocks[mine]
        return found


@dataclass(frozen=True, eq=False)
class Needs:
    """K/V blocks that the queries of each rank see, own ones included.

    Attributes:
        world_size, groups, blocks: ranks, batch elements that the mask distinguishes, and blocks
            of the padded sequence.
        rank, group, start, end: of each range, int64 `[ranges]`.
    """

    world_size: int
    groups: int
    blocks: int
    rank: Array
    group: Array
    start: Array
    end: Array

    def dense(self) -> Array:
        """bool `[W, groups, blocks]`: for tests and pictures."""
        edges = np.zeros((self.world_size, self.groups, self.blocks + 1), dtype=np.int32)
        np.add.at(edges, (self.rank, self.group, self.start), 1)
        np.add.at(edges, (self.rank, self.group, self.end), -1)
        return np.cumsum(edges, axis=2)[:, :, :-1] > 0

    def shared(self, size: int) -> Needs:
        """What ranks see between them, `size` in a row at a time: a rank here is such a row."""
        rank = self.rank // size
        order = np.lexsort((self.start, self.group, rank))
        rank, group = rank[order], self.group[order]
        shift = (rank * self.groups + group) * (self.blocks + 1)  # which never touch each other
        start, end = self.start[order] + shift, self.end[order] + shift
        reach = np.maximum.accumulate(end)
        first = np.flatnonzero(np.concatenate([[True], start[1:] > reach[:-1]])[: start.size])
        end = reach[np.append(first[1:], start.size) - 1] if first.size else end
        shift = shift[first]
        return Needs(
            self.world_size // size, self.groups, self.blocks,
            rank[first], group[first], start[first] - shift, end - shift,
        )  # fmt: skip


class Reads:
    """Needs on a layout: who reads what from whom.

    Args:
        costs: of the links, by which transfers are dealt onto rounds.

    Attributes:
        share: blocks that each rank holds.
        blocks: that each reader reads of each owner, int64 `[W readers, W owners]`; none of itself.
    """

    def __init__(self, layout: Layout, needs: Needs, costs: Costs) -> None:
        self.layout, self.needs = layout, needs
        self.costs = replace(costs, node=min(costs.node, layout.world_size))
        self.share = layout.blocks // layout.world_size
        first = np.flatnonzero(np.diff(layout.owner, prepend=-1))  # where stretches of one owner
        self._first, self._owner = first, layout.owner[first]  # begin, and whose they are
        self.blocks = self.counts(needs)
        np.fill_diagonal(self.blocks, 0)

    def counts(self, needs: Needs) -> Array:
        """int64 `[readers, W]`: blocks that the readers of other needs read of each owner."""
        found = np.zeros((needs.world_size, self.layout.world_size), dtype=np.int64)
        for reader, _, owner, start, end in self._pieces(
            (needs.rank, needs.group, needs.start, needs.end)
        ):
            np.add.at(found, (reader, owner), end - start)
        return found

    def by(self, rank: int) -> list[dict[int, Array]]:
        """Per group: by owner, the blocks that a rank's queries see of others, ascending."""
        mine = self.needs.rank == rank
        return self._sorted(self._pieces(self._some(mine)), of_owner=True, rank=rank)

    def of(self, rank: int) -> list[dict[int, Array]]:
        """Per group: by reader, the blocks that others see of a rank's, ascending."""
        return self._sorted(self._pieces(self._all(), rank), of_owner=False, rank=rank)

    @cached_property
    def direct(self) -> Rounds:
        """When ranks send each other what they read."""
        return self.costs.direct(self.blocks, self.share)

    @cached_property
    def relayed(self) -> Rounds:
        """When nodes, all of as many ranks, send each other what they read."""
        union = self.counts(self.needs.shared(self.costs.node))
        return self.costs.relayed(self.blocks, union, self.share)

    @cached_property
    def furthest(self) -> Array:
        """int64 `[groups, blocks]`: the greatest distance at which a block is read; 0 if none."""
        W, shape = self.layout.world_size, (self.needs.groups, self.needs.blocks)
        found = np.zeros(shape, dtype=np.int64)
        for reader, group, owner, start, end in self._pieces(self._all()):
            # Many ranks may read the same stretch: only the last of them counts.
            distance = (reader - owner) % W
            order = np.lexsort((distance, end, start, group))
            group, start, end = group[order], start[order], end[order]
            last = np.ones(order.size, dtype=bool)
            last[:-1] = (np.diff(group) != 0) | (np.diff(start) != 0) | (np.diff(end) != 0)
            group, start, end = group[last], start[last], end[last]
            width = end - start
            at = np.repeat(group, width), np.repeat(start, width) + counting(width)
            np.maximum.at(found, at, np.repeat(distance[order][last], width))
        return found

    def passed_on(self) -> Array:
        """Blocks of each owner that go a distance or further, where they go from neighbour to
        neighbour, int64 `[W, n]`: at distance d they come to the rank that far after the owner."""
        group, block = np.nonzero(self.furthest)
        distance = self.furthest[group, block]
        shape = self.layout.world_size, int(distance.max(initial=0)) + 1
        ends = np.zeros(shape, dtype=np.int64)
        np.add.at(ends, (self.layout.owner[block], distance), 1)
        further: Array = ends[:, ::-1].cumsum(axis=1)[:, ::-1]
        further[:, 0] = 0  # the owner has them
        return further

    def _all(self) -> _Ranges:
        n = self.needs
        return n.rank, n.group, n.start, n.end

    def _some(self, which: Array) -> _Ranges:
        reader, group, start, end = self._all()
        return reader[which], group[which], start[which], end[which]

    def _pieces(self, ranges: _Ranges, owned_by: int | None = None) -> Iterator[tuple[Array, ...]]:
        """Ranges cut where owners change, many at a time: reader, group, owner, start, end."""
        first, owners = self._first, self._owner
        if owned_by is not None:
            keep = np.flatnonzero(owners == owned_by)
            first, owners = first[keep], owners[keep]
            after = np.append(self._first, self.layout.blocks)[keep + 1]
        else:
            after = np.append(first[1:], self.layout.blocks)
        reader, group, start, end = ranges
        low = np.searchsorted(after, start, side="right")
        high = np.searchsorted(first, end, side="left")
        count = np.maximum(high - low, 0)
        total = np.cumsum(count)
        begin = 0
        while begin < count.size:
            done = int(total[begin - 1]) if begin else 0
            stop = max(begin + 1, int(np.searchsorted(total, done + _AT_ONCE, side="right")))
            some = slice(begin, stop)
            stretch = np.repeat(low[some], count[some]) + counting(count[some])
            which = np.repeat(np.arange(begin, stop), count[some])
            yield (
                reader[which],
                group[which],
                owners[stretch],
                np.maximum(start[which], first[stretch]),
                np.minimum(end[which], after[stretch]),
            )
            begin = stop

    def _sorted(
        self, pieces: Iterator[tuple[Array, ...]], *, of_owner: bool, rank: int
    ) -> list[dict[int, Array]]:
        found: list[dict[int, Array]] = [{} for _ in range(self.needs.groups)]
        parts = [np.stack(piece) for piece in pieces]
        if not parts:
            return found
        reader, group, owner, start, end = np.concatenate(parts, axis=1)
        peer = owner if of_owner else reader
        order = np.lexsort((start, peer, group))
        order = order[peer[order] != rank]
        if not order.size:
            return found
        group, peer, start, end = group[order], peer[order], start[order], end[order]
        width = end - start
        blocks = np.repeat(start, width) + counting(width)
        edges = np.flatnonzero((np.diff(group, prepend=-1) != 0) | (np.diff(peer, prepend=-1) != 0))
        before = np.concatenate([[0], np.cumsum(width)])
        for i, j in zip(edges, np.append(edges[1:], group.size), strict=True):
            found[int(group[i])][int(peer[i])] = blocks[before[i] : before[j]]
        return found
