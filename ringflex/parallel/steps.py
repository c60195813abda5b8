"""Mask x layout x strategy -> the steps of one rank. Pure: no process group, no tensors.

A step is data: which K/V blocks arrive and from whom, which to send to whom, the block mask of the
local queries against what arrived, and where the gradients of those blocks go home to. The
strategies differ only in these lists; one loop runs them all.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from ringflex.kernels.stages import Stage, stages_of
from ringflex.masks.block_mask import BlockMask
from ringflex.masks.runs import Array
from ringflex.parallel.hierarchical import grouped, hierarchical_steps
from ringflex.parallel.needs import Reads


@dataclass(frozen=True, eq=False)
class Transfer:
    """Blocks to or from one peer.

    Attributes:
        peer: rank within the group.
        blocks: for each batch element that the mask distinguishes, the positions of the blocks
            in the buffer they leave (send) or enter (receive), ascending.
        cache: what moving them needs on the device.
    """

    peer: int
    blocks: tuple[Array, ...]
    cache: dict[Any, Any] = field(default_factory=dict, repr=False)

    @property
    def count(self) -> int:
        """Blocks, summed over the batch elements that the mask distinguishes."""
        return sum(b.size for b in self.blocks)


@dataclass(frozen=True, eq=False, kw_only=True)
class Step:
    """One step of one rank.

    Attributes:
        receives: K/V that arrives, by peer; positions in this step's buffer.
        sends: K/V that leaves; positions in the buffer of step `source`.
        source: an earlier step that arrived; None: the local K/V.
        mask: local queries against this step's buffer; None if no query sees any of it.
        stage: which queries begin and end with this step; None if it is the only one with a mask.
        width: blocks of this step's buffer (per batch element).
        returns: dK/dV that goes home after the backward of this step; positions in the buffer.
        collects: dK/dV that comes in; positions in the buffer of step `into`.
        into: an earlier step, to whose dK/dV `collects` are added before those go home; None: the
            local K/V.
    """

    receives: tuple[Transfer, ...] = ()
    sends: tuple[Transfer, ...] = ()
    source: int | None = None
    mask: BlockMask | None = None
    stage: Stage | None = None
    width: int = 0
    returns: tuple[Transfer, ...] = ()
    collects: tuple[Transfer, ...] = ()
    into: int | None = None


def build_steps(
    strategy: str, rank: int, reads: Reads, rows: BlockMask, per_node: int
) -> tuple[Step, ...]:
    """The steps of `rank`; the first is the local one.

    Args:
        strategy: one of `STRATEGIES`.
        reads: what every rank reads, per batch element that the mask distinguishes.
        rows: block mask of this rank's queries against the whole sequence.
        per_node: ranks per node, for "hierarchical".
    """
    maker = StepMaker(rank, reads, rows)
    steps = [Step(mask=maker.rows_on(maker.local), width=maker.local[0].size)]
    if strategy == "hierarchical":
        steps += hierarchical_steps(maker, per_node)
    else:
        steps += _Around(maker, strategy).steps()
    stages = stages_of([step.mask for step in steps])
    return tuple(replace(step, stage=s) for step, s in zip(steps, stages, strict=True))


Held = list[Array]  # per batch element that the mask distinguishes: global blocks, ascending


class StepMaker:
    """Steps of one rank, from blocks by peer.

    Attributes:
        seen, shown: what this rank reads of others, by owner, and others of it, by reader.
        local: what it holds.
    """

    def __init__(self, rank: int, reads: Reads, rows: BlockMask) -> None:
        self.rank, self.reads, self.rows = rank, reads, rows
        self.layout, self.world, self.groups = (
            reads.layout, reads.layout.world_size, reads.needs.groups,
        )  # fmt: skip
        self.seen, self.shown = reads.by(rank), reads.of(rank)
        self.local: Held = [self.layout.blocks_of(rank)] * self.groups

    def step(
        self,
        comes: dict[int, Held],
        leaves: dict[int, Held],
        *,
        returned: dict[int, Held] | None = None,
        collected: dict[int, Held] | None = None,
        source: int | None = None,
        into: int | None = None,
        source_holds: Held | None = None,
    ) -> Step:
        """A step that brings and sends some blocks, and returns and collects gradients.

        Args:
            returned, collected: of which blocks; None: of those that come, and those that leave.
            source, into: as in `Step`. source_holds: the buffer of that step.
        """
        arriving = self.arriving(comes)
        origin = self.local if source_holds is None else source_holds
        target = self.local if into is None else origin
        return Step(
            receives=_transfers(comes, arriving),
            sends=_transfers(leaves, origin),
            source=source,
            mask=self.rows_on(arriving),
            width=max(blocks.size for blocks in arriving),
            returns=_transfers(comes if returned is None else returned, arriving),
            collects=_transfers(leaves if collected is None else collected, target),
            into=into,
        )

    def arriving(self, comes: dict[int, Held]) -> Held:
        """What the buffer of a step holds."""
        return [np.sort(np.concatenate(parts)) for parts in zip(*comes.values(), strict=True)]

    def rows_on(self, held: Held) -> BlockMask | None:
        """The local queries against a buffer that holds some blocks; None if they see nothing."""
        mask = self.rows.select_kv(held)
        return mask if mask.visible_blocks else None

    def between(self, blocks: list[dict[int, Array]], peer: int) -> Held:
        return [of_group.get(peer, _NOTHING) for of_group in blocks]


class _Around:
    """Steps by distance: of each rank, the owner that many ranks before it."""

    def __init__(self, maker: StepMaker, strategy: str) -> None:
        self.maker, self.strategy = maker, strategy

    def steps(self) -> list[Step]:
        steps: list[Step] = []
        held = self.maker.local  # what the previous step's buffer holds
        for distances in _schedule(self.strategy, self.maker.reads):
            step, held = self._step(distances, held, len(steps))
            steps.append(step)
        return steps

    def _step(self, distances: list[int], held: Held, previous: int) -> tuple[Step, Held]:
        """The step that serves some distances, and what its buffer holds."""
        maker = self.maker
        W, rank = maker.world, maker.rank
        ring = self.strategy == "ring"
        passes_on = ring and distances[0] > 1
        comes, leaves, returned, collected = {}, {}, {}, {}
        for d in distances:
            owner, reader = (rank - d) % W, (rank + d) % W  # reader: the rank whose owner we are
            source, target = ((rank - 1) % W, (rank + 1) % W) if ring else (owner, reader)
            comes[source] = self._arrivals(rank, d)
            leaves[target] = self._arrivals(target, d)
            returned[owner] = maker.between(maker.seen, owner)
            collected[reader] = maker.between(maker.shown, reader)
        step = maker.step(
            comes, leaves, returned=returned, collected=collected,
            source=previous if passes_on else None, source_holds=held if passes_on else None,
        )  # fmt: skip
        return step, maker.arriving(comes)

    def _arrivals(self, rank: int, distance: int) -> Held:
        """What comes to `rank`, this one or the one that this one sends to, from the owner at a
        distance: by the ring, what a rank from there on still reads; directly, what it reads
        itself; to all, everything but padding."""
        maker = self.maker
        owner = (rank - distance) % maker.world
        if self.strategy == "direct":
            if rank == maker.rank:
                return maker.between(maker.seen, owner)
            return maker.between(maker.shown, rank)
        blocks = maker.layout.blocks_of(owner)
        if self.strategy == "all_gather":
            return [blocks[blocks < maker.layout.real_blocks]] * maker.groups
        return [blocks[far[blocks] >= distance] for far in maker.reads.furthest]


_NOTHING = np.zeros(0, dtype=np.int64)
STRATEGIES = ("ring", "direct", "all_gather", "hierarchical")
AUTOMATIC = STRATEGIES[:3]  # among which "auto" chooses


def received_blocks(strategy: str, reads: Reads) -> Array:
    """int64 `[W]`: K/V blocks that each rank receives, summed over the mask's batch elements."""
    if strategy == "direct":
        received: Array = reads.at.sum(axis=1)
        return received
    if strategy == "ring":
        return reads.passed_on()
    layout = reads.layout
    real = np.bincount(layout.owner[: layout.real_blocks], minlength=layout.world_size)
    return reads.needs.groups * (layout.real_blocks - real)


def _schedule(strategy: str, reads: Reads) -> list[list[int]]:
    """The distances to owners that each step after the local one serves; idle ones are left out.

    Directly, several distances share a step while what comes to any rank, for all batch elements,
    is at most what a rank holds for one: documents and windows need few blocks of many ranks, and
    ranks whose work differs from step to step wait for each other at every one.
    """
    every = list(range(1, reads.layout.world_size))
    busy = [d for d in every if reads.at[:, d].any()]
    if strategy == "all_gather":
        return [every] if every else []
    if strategy == "ring":  # what goes far passes through all ranks before
        return [[d] for d in every[: max(busy, default=0)]]
    return grouped(reads.at, reads.layout.blocks // reads.layout.world_size)


def _transfers(by_peer: dict[int, Held], buffer: Held) -> tuple[Transfer, ...]:
    """Blocks by peer, by their positions in what a buffer holds; none that are empty."""
    made = [
        Transfer(peer, tuple(np.searchsorted(b, c) for c, b in zip(chosen, buffer, strict=True)))
        for peer, chosen in by_peer.items()
    ]
    return tuple(t for t in made if t.count)
