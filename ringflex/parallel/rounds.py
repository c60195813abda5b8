"""In which exchange each two ranks, or nodes, exchange blocks. Pure; the same on every rank."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from ringflex.masks.runs import Array


@dataclass(frozen=True, eq=False)
class Transfers:
    """Who reads how much of whom, in order of the distance around the ring.

    Attributes:
        n: ranks, or nodes.
        reader, source: of each transfer, int64 `[transfers]`.
        load: blocks, int64 `[transfers, parts]`; parts have links and room of their own, such as
            the GPUs of a node.
    """

    n: int
    reader: Array
    source: Array
    load: Array

    @classmethod
    def of(cls, loads: Array) -> Transfers:
        """What is not zero of `[n readers, n sources, parts]`."""
        n = loads.shape[0]
        reader, source = np.nonzero(loads.any(axis=2))
        order = np.argsort((reader - source) % n, kind="stable")
        reader, source = reader[order], source[order]
        return cls(n, reader, source, loads[reader, source])

    def sums(self, number: Array) -> Iterator[tuple[Array, Array]]:
        """Of each round in turn, by the rounds of the transfers: what comes to each reader and what
        leaves each source, int64 `[n, parts]`."""
        for k in range(1, int(number.max(initial=0)) + 1):
            some = number == k
            came, gone = (np.zeros((self.n, self.load.shape[1]), dtype=np.int64) for _ in range(2))
            np.add.at(came, self.reader[some], self.load[some])
            np.add.at(gone, self.source[some], self.load[some])
            yield came, gone

    def by_distance(self, room: int) -> Array:
        """The round of each transfer, int64 from 1 on: all of a distance together, as many in a row
        as leave every reader room. Where ranks read alike, what they compute differs least in a
        round.

        Args:
            room: blocks that come to a part of a reader in a round; one transfer alone may be more.
        """
        found = np.zeros(self.reader.size, dtype=np.int64)
        number, came = 0, np.full((self.n, self.load.shape[1]), room + 1)  # none is under way
        for some in self._distances():
            reader, load = self.reader[some], self.load[some]
            came[reader] += load
            if came[reader].max() > room:
                number += 1
                came[:] = 0
                came[reader] = load
            found[some] = number
        return found

    def one_by_one(self, room: int, sends: int) -> Array:
        """The same, each transfer for itself, nearest first, in the first round in which its reader
        has room, and its source sends no more than `sends` blocks of a part. So ranks that read
        little, or of few others, are done in few rounds, and nobody waits in a round for one that
        gets another's share."""
        found = np.zeros(self.reader.size, dtype=np.int64)
        left = np.bincount(self.reader, minlength=self.n)  # transfers that have no round yet
        # Of each round that a reader with transfers left has room in, and an empty one after them.
        came, gone = (np.zeros((1, self.n, self.load.shape[1]), dtype=np.int64) for _ in range(2))
        before = 0  # rounds that are full
        for some in self._distances():
            r, s, load = self.reader[some], self.source[some], self.load[some]
            fits: Array = (
                np.maximum(came[:, r] + load - room, gone[:, s] + load - sends).max(2) <= 0
            )
            fits[-1] = True
            chosen = np.argmax(fits, axis=0)
            came[chosen, r] += load
            gone[chosen, s] += load
            found[some] = before + chosen + 1
            left[r] -= 1
            open_ = ((came < room).all(axis=2) & (left > 0)).any(axis=1)
            full = int(np.argmax(open_)) if open_.any() else open_.size
            new = int(full == open_.size or came[-1].any())
            if full or new:
                empty = np.zeros((new, *came.shape[1:]), np.int64)
                came, gone = (np.concatenate([x[full:], empty]) for x in (came, gone))
            before += full
        return found

    def _distances(self) -> Iterator[slice]:
        """The transfers of each distance; of them each reader and each source has one."""
        distance = (self.reader - self.source) % self.n
        edges = np.flatnonzero(np.diff(distance, prepend=-1, append=-1))
        return (slice(a, b) for a, b in pairwise(edges.tolist()))
