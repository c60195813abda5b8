"""How long what ranks read of each other keeps the links of a machine busy. Pure.

Legend: W ranks, N nodes; `read [W readers, W owners]` counts what ranks read of each other, and
`union [N, W owners]` what each node reads of each owner, its own included.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from ringflex.masks.runs import Array
from ringflex.parallel.machine import AttentionShape, Machine
from ringflex.parallel.rounds import Transfers

NOISE = 1e-9  # of sums in another order


@dataclass(frozen=True, kw_only=True)
class Costs:
    """What moving a K/V block costs, in visible blocks computed.

    Attributes:
        near, far: within a node, and between nodes. hidden: share of that, if a kernel runs beside.
        begin: what a round costs beside its blocks.
        room: blocks that may come to a rank in a round within its node, however few it holds.
        node: ranks of a node.
    """

    near: float
    far: float
    hidden: float
    begin: float
    room: int
    node: int

    @classmethod
    def of(cls, machine: Machine, block_size: int, shape: AttentionShape | None = None) -> Costs:
        """Of a shape, by default that of `AttentionShape`: four query heads to a K/V head."""
        block, near, far = (shape or AttentionShape()).block_costs(machine, block_size)
        begin = 2 * (machine.launch + machine.latency)  # forward and backward
        return cls(
            near=near / block, far=far / block, hidden=machine.hidden, begin=begin / block,
            room=machine.at_once // block_size, node=machine.gpus_per_node,
        )  # fmt: skip

    def _round(self, near: Array, far: Array) -> float:
        """One in which ranks move this much within their nodes and out of them, both at once; the
        slowest counts."""
        return float(max(self.near * near.max(), self.far * far.max())) + self.begin

    def direct(self, read: Array, share: int) -> Rounds:
        """If owners send what each rank reads.

        What a round brings is to be there when the one before is computed: more where links are
        fast, but no less than a rank holds, as it has as many to compute with.

        Args:
            share: blocks that a rank holds.
        """
        across = read.shape[0] > self.node
        room = max(share, int(self.room * (self.near / self.far if across else 1.0)))
        transfers = Transfers.of(read[:, :, None])
        far = transfers.reader // self.node != transfers.source // self.node
        split = replace(transfers, load=transfers.load * np.stack([~far, far], axis=1))

        def busy(number: Array) -> float:
            moved = (np.maximum(came, gone) for came, gone in split.sums(number))
            return sum(self._round(m[:, 0], m[:, 1]) for m in moved)

        return _shortest(transfers, room, 2 * room, busy)

    def relayed(self, read: Array, union: Array, share: int) -> Rounds:
        """Between nodes, if what a node reads of another's comes to the rank at its owner's place,
        once, and goes on from there in the next round."""
        N, G = union.shape[0], self.node
        far = union.reshape(N, N, G).copy()
        far[np.arange(N), np.arange(N)] = 0
        transfers = Transfers.of(far)
        places = read.reshape(N, G, N, G)  # reader's node and place, owner's node and place

        def passed(reader: Array, source: Array) -> Array:
            """Within each node, of what comes of some sources, int64 `[N, G]`."""
            moved = np.zeros((N, G, G), dtype=np.int64)
            np.add.at(moved, reader, places[reader, :, source])
            moved[:, np.arange(G), np.arange(G)] = 0  # a rank does not pass on to itself
            return np.maximum(moved.sum(axis=2), moved.sum(axis=1))

        def busy(number: Array) -> float:
            near, total, nothing = passed(np.arange(N), np.arange(N)), 0.0, np.zeros(1)
            for k, (came, gone) in enumerate(transfers.sums(number), start=1):
                total += self._round(near, np.maximum(came, gone))
                near = passed(transfers.reader[number == k], transfers.source[number == k])
            return total + self._round(near, nothing)

        return _shortest(transfers, share, share, busy)


@dataclass(frozen=True, eq=False)
class Rounds:
    """Transfers, the round of each, from 1 on, and how long the links are busy with all of them: in
    every round ranks wait for each other."""

    transfers: Transfers
    number: Array
    busy: float

    def __len__(self) -> int:
        return int(self.number.max(initial=0))

    def sources(self, reader: int) -> list[list[int]]:
        """Of whom one rank, or node, receives, by round."""
        return self._by_round(self.transfers.reader == reader, self.transfers.source)

    def readers(self, source: int) -> list[list[int]]:
        """To whom one sends, by round."""
        return self._by_round(self.transfers.source == source, self.transfers.reader)

    def _by_round(self, mine: Array, peers: Array) -> list[list[int]]:
        found: list[list[int]] = [[] for _ in range(len(self))]
        for number, peer in zip(self.number[mine].tolist(), peers[mine].tolist(), strict=True):
            found[number - 1].append(peer)
        return found


def _shortest(
    transfers: Transfers, room: int, sends: int, busy: Callable[[Array], float]
) -> Rounds:
    """Of both ways to deal transfers onto rounds, that with which links are busy for less time."""
    regular = transfers.by_distance(room)
    time = busy(regular)
    if regular.max(initial=0) > 1:
        greedy = transfers.one_by_one(room, sends)
        shorter = busy(greedy)
        if shorter < time * (1 - NOISE):
            return Rounds(transfers, greedy, shorter)
    return Rounds(transfers, regular, time)


def whole_nodes(world_size: int, node: int) -> bool:
    """Whether there are several nodes, none of them with fewer ranks."""
    return world_size > node and world_size % node == 0
