"""Mask x layout x strategy -> the steps of one rank. Pure.

Strategies differ in which rank a block comes from, and in which step.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import numpy as np

from ringflex.kernels.stages import stages_of
from ringflex.masks.block_mask import BlockMask
from ringflex.parallel.hierarchical import add_hierarchical_steps
from ringflex.parallel.links import NOISE, whole_nodes
from ringflex.parallel.needs import Reads
from ringflex.parallel.steps import Held, Moved, Step, StepMaker

STRATEGIES = ("ring", "direct", "all_gather", "hierarchical")


def build_steps(strategy: str, rank: int, reads: Reads, rows: BlockMask) -> tuple[Step, ...]:
    """The steps of `rank`; the first is the local one.

    Args:
        strategy: one of `STRATEGIES`.
        reads: what every rank reads, per batch element that the mask distinguishes.
        rows: block mask of this rank's queries against the whole sequence.
    """
    maker = StepMaker(rank, reads, rows)
    add_steps(strategy, maker)
    stages = stages_of([step.mask for step in maker.steps])
    return tuple(replace(step, stage=s) for step, s in zip(maker.steps, stages, strict=True))


def add_steps(strategy: str, maker: StepMaker) -> None:
    """All steps but the local one."""
    if strategy == "hierarchical":
        add_hierarchical_steps(maker)
    elif strategy == "direct":
        _add_direct_steps(maker)
    elif strategy == "ring":
        _add_ring_steps(maker)
    else:
        _add_all_gather_step(maker)


def _add_direct_steps(maker: StepMaker) -> None:
    """From each owner what its readers see: of several in a step, as long as nobody is brought more
    than it holds itself, or than a few milliseconds bring. Documents and windows need few blocks of
    many ranks; every step merges anew, and ranks whose work differs from step to step wait for each
    other at every one."""
    rank, found = maker.rank, maker.reads.direct
    rounds = zip(found.sources(rank), found.readers(rank), strict=True)
    for number, (owners, readers) in enumerate(rounds, start=1):
        comes = [Moved(o, maker.between(maker.seen, o), number) for o in owners]
        leaves = [Moved(r, maker.between(maker.shown, r)) for r in readers]
        maker.add(comes, leaves, comes, leaves)


def _add_ring_steps(maker: StepMaker) -> None:
    """From neighbour to neighbour, what some rank further along still reads; dK/dV go straight
    home. What goes far passes through all ranks before."""
    W, rank, reads = maker.world, maker.rank, maker.reads
    reader, owner = np.nonzero(reads.blocks)
    for d in range(1, int(((reader - owner) % W).max(initial=0)) + 1):
        before, after = (rank - 1) % W, (rank + 1) % W
        comes = [Moved(before, _read_from(reads, rank, d), d)]
        leaves = [Moved(after, _read_from(reads, after, d), d - 1)]
        maker.add(comes, leaves, *_gradients(maker, [d], d))


def _add_all_gather_step(maker: StepMaker) -> None:
    """Everything but padding, to everybody; dK/dV only of what was read."""
    W, rank, layout = maker.world, maker.rank, maker.reads.layout

    def all_of(owner: int) -> Held:
        blocks = layout.blocks_of(owner)
        return [blocks[blocks < layout.real_blocks]] * maker.groups

    distances = range(1, W)
    if W > 1:
        comes = [Moved((rank - d) % W, all_of((rank - d) % W), 1) for d in distances]
        leaves = [Moved((rank + d) % W, all_of(rank)) for d in distances]
        maker.add(comes, leaves, *_gradients(maker, distances, 1))


def _read_from(reads: Reads, rank: int, distance: int) -> Held:
    """Of the rank that far before this one: what this one, or one after it, reads."""
    blocks = reads.layout.blocks_of((rank - distance) % reads.layout.world_size)
    return [blocks[far[blocks] >= distance] for far in reads.furthest]


def _gradients(
    maker: StepMaker, distances: Iterable[int], step: int
) -> tuple[list[Moved], list[Moved]]:
    """What is returned to the owners that far before, and collected of the readers after."""
    W, rank = maker.world, maker.rank
    owners, readers = [(rank - d) % W for d in distances], [(rank + d) % W for d in distances]
    return (
        [Moved(o, maker.between(maker.seen, o), step) for o in owners],
        [Moved(r, maker.between(maker.shown, r)) for r in readers],
    )


def fastest_strategy(reads: Reads) -> str:
    """The strategy whose K/V keeps the links busy for the shortest time; of like ones, the
    simplest. Around a ring all wait for the slowest link. "all_gather" holds too much to be
    chosen."""
    W, costs = reads.layout.world_size, reads.costs
    around = costs.far if costs.node < W else costs.near
    passed = reads.passed_on().max(axis=0)[1:]  # in each step
    times = {
        "ring": around * float(passed.sum()) + costs.begin * passed.size,
        "direct": reads.direct.busy,
    }
    if whole_nodes(W, costs.node):
        times["hierarchical"] = reads.relayed.busy
    best = min(times.values()) * (1 + NOISE)
    return next(strategy for strategy, time in times.items() if time <= best)
