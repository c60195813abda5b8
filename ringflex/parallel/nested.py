"""Deals chunks onto nodes, and within each node onto its ranks. Pure.

Links between nodes are slow. What is read across is least where stretches of the sequence go to
nodes (`by_windows`), or where whole pieces do, documents say, and only those with more work than a
node's share are parted (`by_pieces`).

Legend as in balance.py: W ranks, C chunks, K = layers * C columns.
"""

from __future__ import annotations

import numpy as np

from ringflex.masks.runs import Array
from ringflex.parallel.balance import STEPS, balance, window
from ringflex.parallel.swaps import Problem


def by_windows(problem: Problem, node: int, far: float) -> Array:
    """The owner of each chunk, int64 `[C]`: windows of the sequence go to nodes where work and what
    is seen across weigh least together, and each node balances its own.

    Args:
        node: ranks of a node.
        far: work as long as one chunk takes to come from another node.
    """
    owner = np.zeros(problem.C, dtype=np.int64)
    parts = [(np.arange(problem.C), 0, problem.W)]  # chunks, first rank, ranks
    while parts:
        chunks, rank, ranks = parts.pop()
        if ranks <= node:
            owner[chunks] = rank + _balanced(problem, chunks, ranks)
            continue
        first = -(-ranks // (2 * node)) * node
        here, rest = window(problem, chunks, first, ranks, far)
        parts += [(here, rank, first), (rest, rank + first, ranks - first)]
    return owner


def by_pieces(problem: Problem, node: int) -> Array:
    """The owner of each chunk, int64 `[C]`: whole pieces go to nodes, the heaviest first, each to
    the node with the least work that has room; one with more work than a node's share is parted
    evenly among as few nodes as it takes, and evenly among all ranks of those, as each GPU's way
    out of the node carries what the other nodes read of it. The rest of a node is balanced.

    Args:
        node: ranks of a node; they divide W.
    """
    deal = _PieceDeal(problem, node)
    edges = np.concatenate([[0], problem.pieces, [problem.C]])
    weights = np.diff(problem.work_before[edges])
    for i in np.argsort(-weights, kind="stable"):
        deal.add(np.arange(edges[i], edges[i + 1]))
    return deal.owner()


class _PieceDeal:
    """Attributes:
    room, load: of each node: chunks, and work so far.
    parted, whole: of each node, chunks of parted pieces, row by row of one for each rank, and
        chunks that it deals onto ranks as is best.
    """

    def __init__(self, problem: Problem, node: int) -> None:
        self.problem, self.node = problem, node
        nodes = problem.W // node
        self.room = np.full(nodes, problem.share * node)
        self.load = np.zeros(nodes, dtype=np.int64)
        self.parted: list[list[Array]] = [[] for _ in range(nodes)]
        self.whole: list[list[Array]] = [[] for _ in range(nodes)]

    def add(self, chunks: Array) -> None:
        """A piece."""
        work = self.problem.work[chunks]
        parts = -(-int(work.sum()) // (self.problem.mean * self.node))
        if parts > 1:
            chunks = self._part(chunks[np.argsort(-work, kind="stable")], parts)
        while chunks.size:
            fits = np.flatnonzero(self.room >= chunks.size)
            here = int(fits[np.argmin(self.load[fits])] if fits.size else np.argmax(self.room))
            some, chunks = np.split(chunks, [self.room[here]])
            self._take(here, some, self.whole)

    def _part(self, chunks: Array, parts: int) -> Array:
        """Deals chunks, the heaviest first, in rows of one for each rank of a node; returns what
        found no room."""
        rows = chunks[: chunks.size // self.node * self.node].reshape(-1, self.node)
        order = np.argsort(self.load, kind="stable")
        takers = [n for n in order if self.room[n] >= -(-len(rows) // parts) * self.node][:parts]
        if not takers:
            return chunks
        done = 0
        for number, row in enumerate(rows):
            here = int(takers[_to_and_fro(number, len(takers))])
            if self.room[here] < self.node:
                break
            self._take(here, row, self.parted)
            done += self.node
        rest = np.sort(chunks[done:])
        roomy = [n for n in takers if self.room[n] >= rest.size]
        if rest.size and roomy:
            self._take(int(min(roomy, key=lambda n: self.load[n])), rest, self.whole)
            rest = rest[:0]
        return rest

    def _take(self, here: int, chunks: Array, kind: list[list[Array]]) -> None:
        kind[here].append(chunks)
        self.room[here] -= chunks.size
        self.load[here] += self.problem.work[chunks].sum()

    def owner(self) -> Array:
        problem, owner = self.problem, np.zeros(self.problem.C, dtype=np.int64)
        for here, (parted, whole) in enumerate(zip(self.parted, self.whole, strict=True)):
            first = here * self.node
            for number, row in enumerate(parted):
                owner[row] = first + np.arange(self.node)[:: 1 if number % 2 == 0 else -1]
            if whole:
                chunks = np.sort(np.concatenate(whole))
                owner[chunks] = first + _balanced(problem, chunks, self.node)
        return owner


def _balanced(problem: Problem, chunks: Array, ranks: int) -> Array:
    """The owners of some chunks among some ranks, as if they saw nothing of others."""
    here = np.zeros(problem.C, dtype=bool)
    here[chunks] = True
    inside = problem.need[chunks][:, np.tile(here, problem.layers)]
    steps = STEPS * ranks // problem.W
    return balance(problem.work[chunks], inside, ranks, transfer=problem.transfer, steps=steps)


def _to_and_fro(number: int, count: int) -> int:
    """0, 1, ..., count - 1, count - 1, ..., 1, 0, 0, 1, ..."""
    turn, place = divmod(number, count)
    return place if turn % 2 == 0 else count - 1 - place
