"""The steps of a plan that sends each block between two nodes once. Pure.

Ranks are numbered node by node. The rank at place p of a node *relays* what its node reads of the
ranks at place p of other nodes, so that every GPU uses its own way out of the node. Both levels are
under way at once: a step brings what the ranks of a node read of each other, or of what its relays
received one step before, and beside that what this rank relays next.

dK/dV take the same way back: they are added up at the relay, and leave the node once, in the second
exchange after the step that brought the K/V; the relay has its node's by then.
"""

from __future__ import annotations

import numpy as np

from ringflex.masks.runs import Array
from ringflex.parallel.needs import Reads

from ringflex.parallel.steps import Held, Moved, StepMaker


def add_hierarchical_steps(maker: StepMaker, per_node: int) -> None:
    """All steps but the local one, which is the first.

    Args:
        per_node: ranks per node; they divide the ranks.
    """
    _Hierarchy(maker, per_node).add_steps()


def grouped(arriving: Array, room: int) -> list[list[int]]:
    """Which columns of `arriving [W, n]` share a step: those in a row while what comes to any rank
    is at most `room`; idle ones are left out."""
    groups: list[list[int]] = []
    total = np.full(arriving.shape[0], room + 1)  # no step yet that could be shared
    for column in np.flatnonzero(arriving.any(axis=0)):
        total = total + arriving[:, column]
        if total.max() <= room:
            groups[-1].append(int(column))
        else:
            groups.append([int(column)])
            total = arriving[:, column]
    return groups


class _Hierarchy:
    def __init__(self, maker: StepMaker, per_node: int) -> None:
        self.maker, self.reads = maker, maker.reads
        W = maker.world
        self.G = min(per_node, W)
        self.N = W // self.G
        self.node, self.place = divmod(maker.rank, self.G)
        self.mates = [self.reads.by(self._rank(self.node, p)) for p in range(self.G)]

    def add_steps(self) -> None:
        """Step k passes on piece k - 1 and relays piece k: distances, in nodes, of what its owners
        hold. Piece 0 is the node's own."""
        pieces = [[0], *self._far_pieces()]
        if len(pieces) == 1 and not self._anything_near():
            return
        delay = 2 if self.G > 1 else 0  # steps from a relay's K/V to its dK/dV
        last = len(pieces) - 1 + delay if len(pieces) > 1 else 1
        for number in range(1, last + 1):
            source, home = number - 1, number - delay
            passed, relayed, returned = (
                pieces[k] if least <= k < len(pieces) else []
                for k, least in ((source, 0), (number, 1), (home, 1))
            )
            comes = self._passed_here(passed, number)
            leaves = self._passed_on(passed, source)
            self.maker.add(
                [*comes, *self._relayed_here(relayed, number)],
                [*leaves, *self._relayed_there(relayed)],
                [*comes, *self._relayed_here(returned, home)],
                [*leaves, *self._relayed_there(returned)],
            )

    def _far_pieces(self) -> list[list[int]]:
        """Distances that share a step; idle ones are left out."""
        W, G, N = self.maker.world, self.G, self.N
        node, place = np.divmod(np.arange(W), G)
        union = self.reads.counts(self.reads.needs.shared(G))  # [nodes, W owners]
        relayed = np.stack([union[node, (node - d) % N * G + place] for d in range(N)], axis=1)
        relayed[:, 0] = 0
        return grouped(relayed, self.reads.layout.blocks // W)

    def _anything_near(self) -> bool:
        rank = np.arange(self.maker.world)
        owner = (rank[:, None] - rank) % rank.size  # at each distance
        near = owner // self.G == rank[:, None] // self.G
        return bool(self.reads.at[near].any())

    def _passed_here(self, piece: list[int], step: int) -> list[Moved]:
        """What comes of the relays of this node."""
        return [
            Moved(self._rank(self.node, relay), self._read(self.place, relay, piece), step)
            for relay in self._others(-1)
        ] if piece else []

    def _passed_on(self, piece: list[int], step: int) -> list[Moved]:
        """What leaves for the readers of this node."""
        return [
            Moved(self._rank(self.node, reader), self._read(reader, self.place, piece), step)
            for reader in self._others(1)
        ] if piece else []

    def _relayed_here(self, piece: list[int], step: int) -> list[Moved]:
        """What comes to this rank, for its node, of its like in others."""
        owners = [self._rank(self.node - d, self.place) for d in piece]
        return [
            Moved(o, _union([self.maker.between(seen, o) for seen in self.mates]), step)
            for o in owners
        ]

    def _relayed_there(self, piece: list[int]) -> list[Moved]:
        """What leaves for its like in other nodes."""
        moved = []
        for d in piece:
            first = self._rank(self.node + d, 0)
            read = [self.maker.between(self.maker.shown, first + p) for p in range(self.G)]
            moved.append(Moved(first + self.place, _union(read)))
        return moved

    def _read(self, reader: int, relay: int, piece: list[int]) -> Held:
        """What the rank at one place reads of what the one at another relays, or has."""
        owners = [self._rank(self.node - d, relay) for d in piece]
        return _union([self.maker.between(self.mates[reader], owner) for owner in owners])

    def _others(self, way: int) -> list[int]:
        """The other places of the node, nearest first."""
        return [(self.place + way * e) % self.G for e in range(1, self.G)]

    def _rank(self, node: int, place: int) -> int:
        return node % self.N * self.G + place


def _union(held: list[Held]) -> Held:
    return [np.unique(np.concatenate(parts)) for parts in zip(*held, strict=True)]
