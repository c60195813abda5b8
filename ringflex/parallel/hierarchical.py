"""The steps of a plan that sends each block between two nodes once. Pure.

Ranks are numbered node by node. The rank at place p of a node *relays* what its node reads of the
ranks at place p of other nodes, so that every GPU uses its own way out of the node. Both kinds of
links are busy at once: a step brings each rank what it reads of what its node's relays received one
step before, and beside that what it relays next. In the first step, what a relay has to pass on is
its own.

dK/dV take the same way back: they are added up at the relay, and leave the node once, in the second
exchange after that which brought the K/V; the relay has its node's by then.

What comes between nodes in a step is no more for any rank than it holds, so what it then reads of
its node's relays is no more than the node holds, with any number of nodes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ringflex.parallel.steps import Held, Moved, StepMaker


def add_hierarchical_steps(maker: StepMaker) -> None:
    """All steps but the local one, which is the first. The ranks of a node divide all ranks."""
    here = _Node(maker, maker.reads.costs.node)
    found, nothing = maker.reads.relayed, _Relay([], [])
    sources, readers = found.sources(here.number), found.readers(here.number)
    # By step; in the first, what there is to pass on is each rank's own.
    relays = [_Relay([here.number], []), *map(_Relay, sources, readers)]
    delay = 2 if here.size > 1 else 0  # steps from a relay's K/V to its dK/dV
    last = len(found) + (delay if len(found) else int(here.reads_inside()))
    relays += [nothing] * (last + 1 - len(relays))
    brought: dict[int, list[Moved]] = {}  # to this rank as a relay, by step
    given: dict[int, list[Moved]] = {}  # to those of other nodes
    for number in range(1, last + 1):
        before, relay, home = relays[number - 1], relays[number], number - delay
        comes, leaves = here.passed_here(before, number), here.passed_on(before, number - 1)
        brought[number] = here.relayed_here(relay, number)
        given[number] = here.relayed_there(relay)
        maker.add(
            [*comes, *brought[number]],
            [*leaves, *given[number]],
            [*comes, *brought.get(home, [])],
            [*leaves, *given.get(home, [])],
        )


@dataclass(frozen=True)
class _Relay:
    """An exchange between nodes, for one of them: those it receives from, and sends to."""

    sources: list[int]
    readers: list[int]


class _Node:
    """The node of a rank: what moves in it, out of it and into it."""

    def __init__(self, maker: StepMaker, size: int) -> None:
        self.maker, self.size = maker, size
        self.number, self.place = divmod(maker.rank, size)
        self.first = self.number * size
        self.mates = [maker.reads.by(self.first + place) for place in range(size)]

    def reads_inside(self) -> bool:
        """Whether any rank of any node reads of another of its own."""
        node = np.arange(self.maker.world) // self.size
        return bool(self.maker.reads.blocks[node[:, None] == node].any())

    def passed_here(self, relay: _Relay, step: int) -> list[Moved]:
        """What this rank reads of what the others of its node have from the sources."""
        return [
            Moved(self.first + there, self._read(self.place, there, relay), step)
            for there in self._others()
        ]

    def passed_on(self, relay: _Relay, step: int) -> list[Moved]:
        """What the others read of what this rank has from the sources."""
        return [
            Moved(self.first + there, self._read(there, self.place, relay), step)
            for there in self._others()
        ]

    def relayed_here(self, relay: _Relay, step: int) -> list[Moved]:
        """What comes to this rank, for its node, of its like in the sources."""
        owners = [node * self.size + self.place for node in relay.sources]
        return [
            Moved(o, _union([self.maker.between(seen, o) for seen in self.mates]), step)
            for o in owners
        ]

    def relayed_there(self, relay: _Relay) -> list[Moved]:
        """What leaves for its like in the readers."""
        moved = []
        for node in relay.readers:
            ranks = range(node * self.size, (node + 1) * self.size)
            read = [self.maker.between(self.maker.shown, rank) for rank in ranks]
            moved.append(Moved(ranks[self.place], _union(read)))
        return moved

    def _read(self, reader: int, there: int, relay: _Relay) -> Held:
        owners = [node * self.size + there for node in relay.sources]
        read = [self.maker.between(self.mates[reader], owner) for owner in owners]
        return _union(read or [self.maker.nothing])

    def _others(self) -> list[int]:
        return [place for place in range(self.size) if place != self.place]


def _union(held: list[Held]) -> Held:
    return [np.unique(np.concatenate(parts)) for parts in zip(*held, strict=True)]
