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
from ringflex.parallel.links import Costs, moved_by_relays, moved_directly, whole_nodes
from ringflex.parallel.needs import Reads
from ringflex.parallel.rounds import rounds
from ringflex.parallel.steps import Held, Moved, Step, StepMaker

STRATEGIES = ("ring", "direct", "all_gather", "hierarchical")
_WORTH_RELAYS = 10 / 9


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
    elif strategy == "direct":
        _add_direct_steps(maker)
    elif strategy == "ring":
        _add_ring_steps(maker)
    else:
        _add_all_gather_step(maker)
    stages = stages_of([step.mask for step in maker.steps])
    return tuple(replace(step, stage=s) for step, s in zip(maker.steps, stages, strict=True))


def _add_direct_steps(maker: StepMaker) -> None:
    """From each owner what its readers see: of several in a step, as long as nobody is brought more
    than it holds itself. Documents and windows need few blocks of many ranks, and ranks whose work
    differs from step to step wait for each other at every one."""
    reads, rank = maker.reads, maker.rank
    found = rounds(reads.blocks[:, :, None], reads.layout.blocks // maker.world)
    for number in range(1, int(found.max()) + 1):
        owners, readers = (
            np.flatnonzero(found[rank] == number),
            np.flatnonzero(found[:, rank] == number),
        )
        comes = [Moved(int(o), maker.between(maker.seen, int(o)), number) for o in owners]
        leaves = [Moved(int(r), maker.between(maker.shown, int(r))) for r in readers]
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


def fastest_strategy(reads: Reads, costs: Costs) -> str:
    """The strategy whose slowest rank has moved all its K/V first; of like ones, the simplest.

    What a rank has to receive counts, and between nodes also what it has to send; around a ring all
    wait for the slowest link. Relays must save a tenth to be worth their steps.
    """
    W, node = reads.layout.world_size, costs.node
    link = costs.far if node < W else costs.near  # the slowest one around a ring
    real = np.bincount(reads.layout.owner[: reads.layout.real_blocks], minlength=W)
    everything = reads.needs.groups * (reads.layout.real_blocks - real)
    if node >= W:
        directly = costs.near * float(reads.blocks.sum(axis=1).max())
    else:
        directly = costs.slowest(moved_directly(reads.blocks, node))
    times = {
        "ring": link * float(reads.passed_on().max()),
        "direct": directly,
        "all_gather": link * float(everything.max()),
    }
    if whole_nodes(W, node):
        union = reads.counts(reads.needs.shared(node))
        moved = moved_by_relays(reads.blocks, union, node)
        times["hierarchical"] = costs.slowest(moved) * _WORTH_RELAYS
    return min(times, key=lambda strategy: times[strategy])
