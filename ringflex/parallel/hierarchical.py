"""The steps of a plan that sends each block between two nodes once. Pure.

Ranks are numbered node by node. The rank at place p of a node *relays* what its node reads of the
ranks at place p of other nodes, so that every GPU uses its own way out of the node. Blocks of other
nodes arrive in pairs of steps: a relaying step brings each rank what it relays, and steps after it
bring, within the node, what a rank reads of what its neighbours relay. dK/dV take the same way
back: they are added up at the relay, and leave the node once.

A step within the node brings up to what the node's ranks hold together: its kernel is long enough
to hide the next blocks' way from another node. A rank so holds more than with other strategies,
but no more with more nodes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ringflex.masks.runs import Array
from ringflex.parallel.needs import Reads

if TYPE_CHECKING:
    from ringflex.parallel.steps import Held, Step, StepMaker


def hierarchical_steps(maker: StepMaker, per_node: int) -> list[Step]:
    """All steps but the local one, which is the first.

    Args:
        per_node: ranks per node; they divide the ranks.
    """
    return _Hierarchy(maker, per_node).steps()


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
        self.room = self.reads.layout.blocks // W

    def _rank(self, node: int, place: int) -> int:
        return node % self.N * self.G + place % self.G

    def steps(self) -> list[Step]:
        G, N = self.G, self.N
        rank = np.arange(G * N)
        node, place = rank // G, rank % G
        read = _by_owner(self.reads)  # [W readers, W owners]
        union = self.reads.counts(self.reads.needs.shared(G))  # [nodes, W owners]
        near = np.stack([read[rank, node * G + (place - e) % G] for e in range(G)], axis=1)
        steps = [self._near_step(group) for group in grouped(near, G * self.room)]
        relayed = np.stack([union[node, (node - d) % N * G + place] for d in range(N)], axis=1)
        relayed[:, 0] = 0
        for far in grouped(relayed, self.room):
            number = 1 + len(steps)
            relaying, held = self._relaying_step(far)
            passed = np.zeros((G * N, G), dtype=np.int64)
            for e in range(1, G):
                for d in far:
                    passed[:, e] += read[rank, (node - d) % N * G + (place - e) % G]
            steps.append(relaying)
            steps += [
                self._passing_step(far, group, number, held)
                for group in grouped(passed, G * self.room)
            ]
        return steps

    def _near_step(self, distances: list[int]) -> Step:
        owners = [self._rank(self.node, self.place - e) for e in distances]
        readers = [self._rank(self.node, self.place + e) for e in distances]
        maker = self.maker
        comes = {o: maker.between(maker.seen, o) for o in owners}
        leaves = {r: maker.between(maker.shown, r) for r in readers}
        return maker.step(comes, leaves)

    def _relaying_step(self, distances: list[int]) -> tuple[Step, Held]:
        """And what its buffer holds."""
        maker, G = self.maker, self.G
        comes, leaves = {}, {}
        for d in distances:
            owner = self._rank(self.node - d, self.place)
            reader = self._rank(self.node + d, self.place)
            first = reader - self.place
            comes[owner] = _union([maker.between(seen, owner) for seen in self.mates])
            leaves[reader] = _union([maker.between(maker.shown, first + p) for p in range(G)])
        return maker.step(comes, leaves), maker.arriving(comes)

    def _passing_step(
        self, far: list[int], distances: list[int], relaying: int, held: Held
    ) -> Step:
        """What the relaying step of that number brought, `held`, within the node."""
        maker = self.maker
        comes, leaves = {}, {}
        for e in distances:
            relay, reader = (self.place - e) % self.G, (self.place + e) % self.G
            comes[self._rank(self.node, relay)] = self._of_others(self.place, relay, far)
            leaves[self._rank(self.node, reader)] = self._of_others(reader, self.place, far)
        return maker.step(comes, leaves, source=relaying, into=relaying, source_holds=held)

    def _of_others(self, reader: int, relay: int, far: list[int]) -> Held:
        """What the rank at one place reads of what the rank at another relays."""
        owners = [self._rank(self.node - d, relay) for d in far]
        return _union([self.maker.between(self.mates[reader], owner) for owner in owners])


def _by_owner(reads: Reads) -> Array:
    W = reads.layout.world_size
    rank = np.arange(W)
    return reads.at[rank[:, None], (rank[:, None] - rank) % W]


def _union(held: list[Held]) -> Held:
    return [np.unique(np.concatenate(parts)) for parts in zip(*held, strict=True)]
