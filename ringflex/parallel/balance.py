"""Deals chunks onto ranks: the slowest rank's work first, then what it receives. Pure: arrays in,
owner array out, and the same numbers on every rank.

Deals to start from are the simple layouts, windows of equal work peeled off the sequence, and
whole pieces (documents) dealt by size; the best of them is improved by swapping equal runs of
chunks between two ranks. Windows of equal length *and* work exist in any sequence: their mean over
the remaining sequence is the target, so one is below, one above, and sliding from one to the other
passes the target (the necklace theorem of Alon, 1987, made greedy). Peeled off a causal triangle
they are zigzag, off a window mask contiguous stretches.

Legend: W ranks, C chunks, K = layers * C columns. A layer is one mask and one of the batch
elements that it distinguishes; column `layer * C + c` is the K/V of chunk `c` in that layer.
"""

from __future__ import annotations

import numpy as np

from ringflex.masks.runs import Array
from ringflex.parallel.swaps import Deal, Problem, improve, prefix

_NODE = 8  # ranks that the first cuts leave together
_WINDOWS = 64  # windows compared when one is peeled off
_HOPELESS = 4  # times the best cost, from which swaps do not lead
STEPS = 200_000_000  # columns looked at in all before the search ends: about half a second


def balance(
    work: Array, need: Array, world_size: int, *, transfer: int, steps: int = STEPS
) -> Array:
    """The owner of each chunk, int64 `[C]`; every rank owns `C / world_size` chunks.

    Args:
        work: of each chunk's queries, int64 `[C]`; C is a multiple of `world_size`.
        need: bool `[C, K]`: which K/V the queries of a chunk see.
        transfer: work beyond the mean that a rank may rather have than one more chunk received,
            while it is within the limit.
        steps: columns to look at in all.
    """
    problem = Problem(work, need, world_size, transfer)
    deals = [min((Deal(problem, owner) for owner in _simple(problem)), key=Deal.cost)]
    deals.append(Deal(problem, _peeled(problem)))
    deals.append(Deal(problem, _halved(problem)))
    if problem.pieces.size:
        deals.append(Deal(problem, _dealt(problem)))
    start = min(deals, key=Deal.cost)
    found = start.cost(), start.owner.copy()
    deals = [deal for deal in deals if deal.cost()[1] <= _HOPELESS * found[0][1]]
    for deal in deals:
        improve(deal, steps // 8)
    best = min(deals, key=Deal.cost)
    improve(best, steps // 2)
    # Swaps follow a smooth measure of the cost, which may lead from an optimum to its like.
    return best.owner if best.cost() < found[0] else found[1]


def _simple(problem: Problem) -> tuple[Array, Array, Array]:
    """The contiguous, the zigzag and the striped layout."""
    C, W, share = problem.C, problem.W, problem.share
    chunk = np.arange(C)
    fold = np.minimum(chunk, C - 1 - chunk) * 2 // share  # where a share is odd, ranks meet
    order = np.argsort(fold, kind="stable")
    fold[order] = chunk // share
    return chunk // share, fold, chunk % W


def _peeled(problem: Problem) -> Array:
    """Windows of one share and equal work, one after the other, each where it is cut cheapest."""
    owner = np.zeros(problem.C, dtype=np.int64)
    left = np.arange(problem.C)  # not owned yet
    for rank in range(problem.W - 1, 0, -1):
        before = prefix(problem.need[left])
        work = _windows(prefix(problem.work[left]), problem.share, np.arange(left.size))
        miss = np.abs(work - int(problem.work[left].sum()) // (rank + 1))
        slack = max((problem.limit - problem.mean) // 2, int(miss.min()))
        starts = np.flatnonzero(miss <= slack)
        starts = starts[:: -(-starts.size // _WINDOWS)]
        inside = (starts[:, None] + np.arange(problem.share)) % left.size  # [windows, share]
        mine = np.zeros((starts.size, problem.C), dtype=bool)
        mine[np.arange(starts.size)[:, None], left[inside]] = True
        mine = np.tile(mine, problem.layers)
        counts = _windows(before, problem.share, starts)
        arrives = np.count_nonzero((counts > 0) & ~mine, axis=1)
        leaves = np.count_nonzero((before[-1] > counts) & mine, axis=1)
        best = int(np.argmin(arrives + leaves))
        owner[left[inside[best]]] = rank
        left = np.delete(left, inside[best])
    return owner


def _halved(problem: Problem) -> Array:
    """Two windows, of half the chunks and half the work each, and each of them cut likewise: the
    first cuts part nodes, where ranks are many, and each rank is left with few stretches."""
    owner = np.zeros(problem.C, dtype=np.int64)
    parts = [(np.arange(problem.C), 0, problem.W)]  # chunks, first rank, ranks
    while parts:
        chunks, rank, ranks = parts.pop()
        if ranks == 1:
            owner[chunks] = rank
            continue
        first = ranks // 2 if ranks <= _NODE else -(-ranks // (2 * _NODE)) * _NODE
        mine, rest = window(problem, chunks, first, ranks)
        parts += [(mine, rank, first), (rest, rank + first, ranks - first)]
    return owner


def window(
    problem: Problem, chunks: Array, first: int, ranks: int, far: float | None = None
) -> tuple[Array, Array]:
    """Of some chunks, a window for `first` of their `ranks`, and the others: where least K/V is
    seen across, of those with their share of the work as nearly as leaves room for further cuts.

    Args:
        far: what a chunk seen across costs each rank of a side; then the work, too, is weighed.
    """
    n, width = chunks.size, problem.share * first
    total = int(problem.work[chunks].sum())
    work = _windows(prefix(problem.work[chunks]), width, np.arange(n))
    # What is seen across a cut; nothing where neighbours are apart already.
    seams = np.where(np.diff(chunks, prepend=-2) == 1, problem.across[chunks], 0)
    seams = seams + np.roll(seams, -width)
    sides = np.maximum(work / first, (total - work) / (ranks - first))
    if far is None:
        miss = np.abs(work - total * first // ranks)
        room = (problem.limit - total / ranks) * min(first, ranks - first) / 2
        starts = np.flatnonzero(miss <= max(room, int(miss.min())))
        starts = starts[np.argsort(seams[starts], kind="stable")[:_WINDOWS]]
    else:
        starts = np.argsort(sides + far * seams, kind="stable")[:_WINDOWS]
    starts = np.sort(starts)
    inside = (starts[:, None] + np.arange(width)) % n
    before = prefix(problem.need[chunks])
    counts = _windows(before, width, starts)
    mine = np.zeros((starts.size, problem.C), dtype=bool)
    mine[np.arange(starts.size)[:, None], chunks[inside]] = True
    here = np.zeros(problem.C, dtype=bool)
    here[chunks] = True
    mine, theirs = (np.tile(x, problem.layers) for x in (mine, here & ~mine))
    into = np.count_nonzero((counts > 0) & ~mine, axis=1)
    out = np.count_nonzero((before[-1] > counts) & ~theirs, axis=1)
    cost = into + out if far is None else sides[starts] + far * np.maximum(into, out)
    chosen = inside[int(np.argmin(cost))]
    return np.sort(chunks[chosen]), np.delete(chunks, chosen)


def _dealt(problem: Problem) -> Array:
    """Whole pieces, the heaviest first, each to the rank with the least work that has room."""
    owner = np.zeros(problem.C, dtype=np.int64)
    edges = np.concatenate([[0], problem.pieces, [problem.C]])
    room, load = np.full(problem.W, problem.share), np.zeros(problem.W, dtype=np.int64)
    weights = np.diff(problem.work_before[edges])
    for i in np.argsort(-weights, kind="stable"):
        start, end = int(edges[i]), int(edges[i + 1])
        while start < end:
            fits = np.flatnonzero(room >= end - start)
            rank = int(fits[np.argmin(load[fits])]) if fits.size else int(np.argmax(room))
            stop = min(end, start + int(room[rank]))
            owner[start:stop] = rank
            room[rank] -= stop - start
            load[rank] += problem.work_before[stop] - problem.work_before[start]
            start = stop
    return owner


def _windows(before: Array, width: int, starts: Array) -> Array:
    """Sums of `width` rows from each start, around the end: from prefix sums `[n + 1, ...]`."""
    n = before.shape[0] - 1
    end = starts + width
    around = np.where(end > n, end - n, 0)
    return before[np.minimum(end, n)] - before[starts] + before[around]
