"""Mask x layout x strategy -> the steps of one rank. Pure.

Strategies differ in which rank a block comes from, and in which step.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from ringflex.kernels.stages import stages_of
from ringflex.masks.block_mask import BlockMask
from ringflex.masks.runs import Array
from ringflex.parallel.hierarchical import add_hierarchical_steps, grouped
from ringflex.parallel.needs import Reads
from ringflex.parallel.steps import Held, Moved, Step, StepMaker

STRATEGIES = ("ring", "direct", "all_gather", "hierarchical")
AUTOMATIC = STRATEGIES[:3]  # among which "auto" chooses


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
    if strategy == "hierarchical":
        add_hierarchical_steps(maker, per_node)
    else:
        _Around(maker, strategy).add_steps()
    stages = stages_of([step.mask for step in maker.steps])
    return tuple(replace(step, stage=s) for step, s in zip(maker.steps, stages, strict=True))


class _Around:
    """Steps by distance: of each rank, the owner that many ranks before it."""

    def __init__(self, maker: StepMaker, strategy: str) -> None:
        self.maker, self.strategy = maker, strategy

    def add_steps(self) -> None:
        for distances in _schedule(self.strategy, self.maker.reads):
            self._add_step(distances)

    def _add_step(self, distances: list[int]) -> None:
        """The step that serves some distances."""
        maker = self.maker
        W, rank, number = maker.world, maker.rank, maker.following
        ring = self.strategy == "ring"
        source = number - 1 if ring else 0  # a ring passes on what came last
        comes, leaves, returned, collected = [], [], [], []
        for d in distances:
            owner, reader = (rank - d) % W, (rank + d) % W  # reader: the rank whose owner we are
            before, after = ((rank - 1) % W, (rank + 1) % W) if ring else (owner, reader)
            comes.append(Moved(before, self._arrivals(rank, d), number))
            leaves.append(Moved(after, self._arrivals(after, d), source))
            returned.append(Moved(owner, maker.between(maker.seen, owner), number))
            collected.append(Moved(reader, maker.between(maker.shown, reader)))
        maker.add(comes, leaves, returned, collected)

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
