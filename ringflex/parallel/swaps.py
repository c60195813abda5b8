"""Swaps equal runs of chunks between ranks while that helps the worst of them. Pure.

Legend as in balance.py: W ranks, C chunks, K columns of K/V.
"""

from __future__ import annotations

import numpy as np

from ringflex.masks.runs import Array, counting

_EXCESS = 0.02  # of the mean: work of the slowest rank that is not worth a byte
_PLACES = 96  # runs of a rank, and beginnings and ends of runs of others, proposed for a swap
_SWAPS = 192  # swaps compared for one rank at a time
_STEP_COST = 300_000  # what proposing swaps costs, in columns looked at
_IDLE = 40  # searches for a swap that find none before the last


class Problem:
    """The arrays of a problem and what follows from them.

    Attributes:
        W, C, layers: as in the legend.
        share: chunks of each rank.
        mean: work of a rank where all have the same, rounded up.
        limit: work of a rank that is good enough; some rank has the heaviest chunk.
        before: `before[i]` counts for each column the chunks below `i` that see it, `[C + 1, K]`.
        across: at `i`, columns needed between the chunks `i - 1` and `i`, int64 `[C + 1]`.
        pieces: positions where fewer chunks are needed across than on either side, ascending.
    """

    def __init__(self, work: Array, need: Array, world_size: int, transfer: int) -> None:
        self.transfer = transfer
        self.work, self.need, self.W = work.astype(np.int64), need, world_size
        self.C, self.layers = work.size, need.shape[1] // work.size
        self.share = self.C // world_size
        self.mean = -(-int(work.sum()) // world_size)
        limit = int((1 + _EXCESS) * int(work.sum()) / world_size)
        self.limit = max(limit, self.mean, int(work.max()))
        self.before = prefix(need)
        self.work_before = prefix(self.work)
        self.pieces = self._pieces()

    def load(self, work: Array, moved: Array) -> Array:
        """What a rank has to bear beside the mean work, float64."""
        load: Array = self.transfer * moved + np.maximum(work - self.mean, 0)
        return load.astype(np.float64)

    def _pieces(self) -> Array:
        readers = self.before[-1] > 0
        column = np.tile(np.arange(self.C), self.layers)[readers]
        seen_by = np.ascontiguousarray(self.need.T)  # argmax reads rows far faster than columns
        first = np.argmax(seen_by, axis=1)[readers]
        last = self.C - 1 - np.argmax(seen_by[:, ::-1], axis=1)[readers]
        across = np.zeros(self.C + 1, dtype=np.int64)  # at i: needed between i - 1 and i
        for low, high in ((first + 1, column + 1), (column + 1, last + 1)):
            long = low < high
            across += np.bincount(low[long], minlength=self.C + 1)
            across -= np.bincount(high[long], minlength=self.C + 1)
        self.across = across = np.cumsum(across)
        left, here, right = across[:-2], across[1:-1], across[2:]
        low = (here <= left) & (here <= right) & ((here < left) | (here < right))
        return 1 + np.flatnonzero(low)


class Deal:
    """Who owns what, with all that swaps need to be judged.

    Attributes:
        owner: int64 `[C]`.
        work, moved: int64 `[W]`: of each rank, in units of work and in chunks received.
        counts: chunks of each rank that see a column, int16 `[W, K]`.
        away: bool `[W, K]`: the column is on another rank.
    """

    def __init__(self, problem: Problem, owner: Array) -> None:
        self.problem, self.owner = problem, owner
        ranks = range(problem.W)
        self.work = np.array([problem.work[owner == r].sum() for r in ranks])
        self.counts = np.stack(
            [problem.need[owner == r].sum(axis=0, dtype=np.int16) for r in ranks]
        )
        self.away = np.tile(owner != np.arange(problem.W)[:, None], problem.layers)
        self.moved = ((self.counts > 0) & self.away).sum(axis=1)

    def cost(self) -> tuple[float, float]:
        """Work beyond the limit, then what the slowest rank bears; the mean counts a little."""
        load, most = self.problem.load(self.work, self.moved), int(self.work.max())
        slowest = float(load.max()) + max(0, most - self.problem.mean)
        return max(0, most - self.problem.limit), 8 * slowest + float(load.mean())

    def swap(self, a: int, b: int, length: int) -> None:
        """Chunks `a .. a + length` for those at `b`; each run has one owner."""
        p, runs = self.problem, (slice(a, a + length), slice(b, b + length))
        ranks = self.owner[a], self.owner[b]
        change = p.need[runs[1]].sum(axis=0, dtype=np.int16)
        change -= p.need[runs[0]].sum(axis=0, dtype=np.int16)
        work = p.work[runs[1]].sum() - p.work[runs[0]].sum()
        for rank, run, sign in zip(ranks, runs[::-1], (1, -1), strict=True):
            self.owner[run] = rank
            self.work[rank] += sign * work
            self.counts[rank] += sign * change
        for rank in ranks:
            self.away[rank] = np.tile(self.owner != rank, p.layers)
            self.moved[rank] = np.count_nonzero((self.counts[rank] > 0) & self.away[rank])

    def received_after(self, r: int, s: Array, a: Array, b: Array, length: Array) -> Array:
        """Chunks that rank `r` and ranks `s` receive after each swap, int64 `[2, swaps]`."""
        before, after = self.problem.before, np.empty((2, a.size), dtype=np.int64)
        change = before.take(b + length, axis=0)
        change -= before.take(b, axis=0)
        change -= before.take(a + length, axis=0)
        change += before.take(a, axis=0)
        for i, (sees, away, gone, come) in enumerate(
            (
                (change > -self.counts[r], self.away[r], a, b),
                (change < self.counts.take(s, axis=0), self.away.take(s, axis=0), b, a),
            )
        ):
            after[i] = self._within(sees, gone, length) - self._within(sees, come, length)
            sees &= away
            after[i] += [np.count_nonzero(row) for row in sees]  # over an axis it takes longer
        return after

    def _within(self, sees: Array, start: Array, length: Array) -> Array:
        """True columns of the chunks `start .. start + length` of each row, over all layers."""
        by_layer = sees.reshape(start.size, self.problem.layers, -1)
        row = np.repeat(np.arange(start.size), length)
        found = by_layer[row, :, np.repeat(start, length) + counting(length)]
        total: Array = np.add.reduceat(found.sum(axis=1), np.cumsum(length) - length)
        return total


def improve(deal: Deal, steps: int) -> None:
    """Swaps runs, in place, while that helps the rank that is worst or one of the next.

    Args:
        steps: columns to look at before it ends; a bound on time that is the same on every rank.
    """
    problem, random = deal.problem, np.random.default_rng(0)
    idle = 0
    while steps > 0 and idle < _IDLE:
        excess = np.maximum(deal.work - problem.limit, 0)
        order = np.lexsort((problem.load(deal.work, deal.moved), excess))
        swap, looks = _best_swap(deal, int(order[-1 - idle % problem.W]), random)
        steps -= _STEP_COST + looks * problem.need.shape[1]
        if swap:
            deal.swap(*swap)
        idle = 0 if swap else idle + 1


def _best_swap(
    deal: Deal, r: int, random: np.random.Generator
) -> tuple[tuple[int, int, int] | None, int]:
    """A swap `(a, b, length)` after which rank `r` and the other are better off together, if one
    was found, and how many were looked at."""
    p = deal.problem
    a, b, length = _proposals(deal, r, random)
    s = deal.owner[b]
    gain = p.work_before[b + length] - p.work_before[b]
    gain -= p.work_before[a + length] - p.work_before[a]
    now = np.stack([np.full(s.size, deal.work[r]), deal.work[s]])  # [2, swaps]
    work = now + np.stack([gain, -gain])
    excess_now = np.maximum(now.max(axis=0) - p.limit, 0)
    excess = np.maximum(work.max(axis=0) - p.limit, 0)
    some = np.flatnonzero((excess < excess_now) | (excess == 0))
    if some.size > _SWAPS:
        some = np.sort(random.choice(some, _SWAPS, replace=False))
    if not some.size:
        return None, 0
    a, b, s, length = a[some], b[some], s[some], length[some]
    moved_now = np.stack([np.full(s.size, deal.moved[r]), deal.moved[s]])
    moved = deal.received_after(r, s, a, b, length)
    load, load_now = p.load(work[:, some], moved), p.load(now[:, some], moved_now)
    # The eighth power weighs the rank that bears most, and the rest as well.
    change = (_eighth_power(load) - _eighth_power(load_now)).sum(axis=0)
    excess, excess_now = excess[some], excess_now[some]
    best = int(np.lexsort((change, excess))[0])
    if excess[best] < excess_now[best] or (excess[best] == 0 and change[best] < 0):
        return (int(a[best]), int(b[best]), int(length[best])), some.size
    return None, some.size


def _proposals(deal: Deal, r: int, random: np.random.Generator) -> tuple[Array, Array, Array]:
    """Runs `a` of rank `r`, runs `b` of one other rank each, and their common length.

    Runs begin or end at an edge: where a run of the deal or a piece does, or at a random place.
    They reach to one of the next three edges, or are a power of two long.
    """
    p, owner = deal.problem, deal.owner
    turns = np.flatnonzero(np.diff(owner)) + 1
    run_end = np.append(turns, p.C)[np.searchsorted(turns, np.arange(p.C), "right")]
    edges = np.unique(np.concatenate([[0, p.C], turns, p.pieces, random.integers(0, p.C, 16)]))

    hops = [(edges[:-hop], edges[hop:] - edges[:-hop]) for hop in (1, 2, 3)]
    powers = 1 << np.arange(p.share.bit_length())
    steps = np.repeat(edges, powers.size), np.tile(powers, edges.size)
    a = np.concatenate([*(start for start, _ in hops), steps[0], steps[0] - steps[1]])
    length = np.concatenate([*(size for _, size in hops), steps[1], steps[1]])
    inside = (a >= 0) & (a < p.C)
    a, length = a[inside], length[inside]
    mine = (owner[a] == r) & (a + length <= run_end[a])
    a, length = _some(random, a[mine], length[mine])

    (begins,) = _some(random, edges[:-1][owner[edges[:-1]] != r])
    (ends,) = _some(random, edges[1:][owner[edges[1:] - 1] != r])
    b = np.concatenate(
        [np.broadcast_to(begins, (a.size, begins.size)), ends - length[:, None]], axis=1
    )
    a, length = np.repeat(a, b.shape[1]), np.repeat(length, b.shape[1])
    b = b.reshape(-1)
    fits = (b >= 0) & (owner[b] != r) & (b + length <= run_end[b])
    return a[fits], b[fits], length[fits]


def _eighth_power(x: Array) -> Array:
    """By multiplication, which is rounded alike on all machines."""
    return np.square(np.square(np.square(x)))


def _some(random: np.random.Generator, *arrays: Array) -> tuple[Array, ...]:
    """At most `_PLACES` entries, the same ones of every array."""
    if arrays[0].size <= _PLACES:
        return arrays
    chosen = np.sort(random.choice(arrays[0].size, _PLACES, replace=False))
    return tuple(x[chosen] for x in arrays)


def prefix(x: Array) -> Array:
    """Sums of the rows before each, `[n + 1, ...]`; int16 for bools, of which there are few."""
    out = np.zeros((x.shape[0] + 1, *x.shape[1:]), dtype=np.int16 if x.dtype == bool else np.int64)
    if x.ndim == 1:
        np.cumsum(x, out=out[1:])
        return out
    for i, row in enumerate(x):  # ten times as fast as a cumsum over rows
        np.add(out[i], row, out=out[i + 1])
    return out
