"""What a plan moves over the links of a machine, and how long that takes. Pure.

Legend: W ranks, N nodes; `read [W readers, W owners]` counts what ranks read of each other, and
`union [N, W owners]` what each node reads of each owner, its own included.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ringflex.masks.runs import Array
from ringflex.parallel.machine import AttentionShape, Machine


@dataclass(frozen=True, kw_only=True)
class Costs:
    """What moving a K/V block costs, in visible blocks computed.

    Attributes:
        near, far: within a node, and between nodes. hidden: share of that, if a kernel runs beside.
        node: ranks of a node.
    """

    near: float
    far: float
    hidden: float
    node: int

    @classmethod
    def of(cls, machine: Machine, block_size: int, shape: AttentionShape | None = None) -> Costs:
        """Of a shape, by default that of `AttentionShape`: four query heads to a K/V head."""
        block, near, far = (shape or AttentionShape()).block_costs(machine, block_size)
        return cls(
            near=near / block, far=far / block, hidden=machine.hidden, node=machine.gpus_per_node
        )

    def slowest(self, moved: Array) -> float:
        """Of what each rank moves, int64 `[2, W]`, within its node and out of it: both at once."""
        return float(max(self.near * moved[0].max(), self.far * moved[1].max()))


def whole_nodes(world_size: int, node: int) -> bool:
    """Whether there are several nodes, none of them with fewer ranks."""
    return world_size > node and world_size % node == 0


def moved_directly(read: Array, node: int) -> Array:
    """int64 `[2, W]`: what each rank sends or receives, whichever is more, within its node and out
    of it, if each owner sends what each rank reads."""
    rank = np.arange(read.shape[0])
    near = rank[:, None] // node == rank // node
    others = read * (rank[:, None] != rank)
    ways = [others * which for which in (near, ~near)]
    return np.stack([np.maximum(way.sum(axis=1), way.sum(axis=0)) for way in ways])


def moved_by_relays(read: Array, union: Array, node: int) -> Array:
    """The same, if what a node reads of another's comes to the rank at its owner's place, once."""
    W, N = read.shape[0], union.shape[0]
    rank = np.arange(W)
    places = read.reshape(N, node, N, node)  # reader's node and place, owner's node and place
    # Of each rank of the reader's node: its own blocks and those that it relays.
    passed = places.sum(axis=2) * (1 - np.eye(node, dtype=np.int64))  # [N, reader, relay]
    near = np.maximum(passed.sum(axis=2), passed.sum(axis=1)).reshape(W)
    far = union * (np.arange(N)[:, None] != rank // node)
    relayed = far.reshape(N, N, node).sum(axis=1).reshape(W)
    return np.stack([near, np.maximum(relayed, far.sum(axis=0))])
