"""Mask x layout x strategy -> the steps of one rank. Pure: no process group, no tensors.

A step is data: which K/V blocks arrive and from whom, which to send to whom, the block mask of the
local queries against what arrived, and where the gradients of those blocks go home to. The three
strategies differ only in these lists; one loop runs them all.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from ringflex.kernels.stages import Stage, stages_of
from ringflex.masks.block_mask import BlockMask
from ringflex.masks.runs import Array
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
        sends: K/V that leaves; positions in the local K/V, or in the previous step's buffer if
            `passes_on` (ring).
        passes_on: whether `sends` come from the previous step's buffer.
        mask: local queries against this step's buffer; None if no query sees any of it.
        stage: which queries begin and end with this step; None if it is the only one with a mask.
        width: blocks of this step's buffer (per batch element).
        returns: dK/dV that goes home after the backward of this step; positions in the buffer.
        collects: dK/dV that comes home; positions in the local K/V.
    """

    receives: tuple[Transfer, ...] = ()
    sends: tuple[Transfer, ...] = ()
    passes_on: bool = False
    mask: BlockMask | None = None
    stage: Stage | None = None
    width: int = 0
    returns: tuple[Transfer, ...] = ()
    collects: tuple[Transfer, ...] = ()


def build_steps(strategy: str, rank: int, reads: Reads, rows: BlockMask) -> tuple[Step, ...]:
    """The steps of `rank`; the first is the local one.

    Args:
        strategy: "ring", "direct" or "all_gather".
        reads: what every rank reads, per batch element that the mask distinguishes.
        rows: block mask of this rank's queries against the whole sequence.
    """
    return _Planner(rank, reads, rows).steps(strategy)


_Held = list[Array]  # per batch element that the mask distinguishes: global blocks, ascending


class _Planner:
    def __init__(self, rank: int, reads: Reads, rows: BlockMask) -> None:
        self.rank, self.reads, self.rows = rank, reads, rows
        self.layout, self.world, self.groups = (
            reads.layout, reads.layout.world_size, reads.needs.groups,
        )  # fmt: skip
        self.seen, self.shown = reads.by(rank), reads.of(rank)
        self.local: _Held = [self.layout.blocks_of(rank)] * self.groups

    def steps(self, strategy: str) -> tuple[Step, ...]:
        steps = [Step(mask=self.rows_on(self.local), width=self.local[0].size)]
        held = self.local  # what the previous step's buffer holds
        for distances in _schedule(strategy, self.reads):
            step, held = self._step(strategy, distances, held)
            steps.append(step)
        stages = stages_of([step.mask for step in steps])
        return tuple(replace(step, stage=s) for step, s in zip(steps, stages, strict=True))

    def _step(self, strategy: str, distances: list[int], held: _Held) -> tuple[Step, _Held]:
        """The step that serves some distances, and what its buffer holds."""
        W, rank = self.world, self.rank
        ring = strategy == "ring"
        passes_on = ring and distances[0] > 1
        comes = {d: self._arrivals(strategy, rank, d) for d in distances}
        arriving = [np.sort(np.concatenate(parts)) for parts in zip(*comes.values(), strict=True)]
        receives, sends, returns, collects = [], [], [], []
        for d in distances:
            owner, reader = (rank - d) % W, (rank + d) % W  # reader: the rank whose owner we are
            source, target = ((rank - 1) % W, (rank + 1) % W) if ring else (owner, reader)
            receives.append(_transfer(source, comes[d], arriving))
            leaves = self._arrivals(strategy, target, d)
            sends.append(_transfer(target, leaves, held if passes_on else self.local))
            returns.append(_transfer(owner, self._between(self.seen, owner), arriving))
            collects.append(_transfer(reader, self._between(self.shown, reader), self.local))
        step = Step(
            receives=_nonempty(receives),
            sends=_nonempty(sends),
            passes_on=passes_on,
            mask=self.rows_on(arriving),
            width=max(blocks.size for blocks in arriving),
            returns=_nonempty(returns),
            collects=_nonempty(collects),
        )
        return step, arriving

    def rows_on(self, held: _Held) -> BlockMask | None:
        """The local queries against a buffer that holds some blocks; None if they see nothing."""
        mask = self.rows.select_kv(held)
        return mask if mask.visible_blocks else None

    def _between(self, blocks: list[dict[int, Array]], peer: int) -> _Held:
        return [of_group.get(peer, _NOTHING) for of_group in blocks]

    def _arrivals(self, strategy: str, rank: int, distance: int) -> _Held:
        """What comes to `rank`, this one or the one that this one sends to, from the owner at a
        distance: by the ring, what a rank from there on still reads; directly, what it reads
        itself; to all, everything but padding."""
        owner = (rank - distance) % self.world
        if strategy == "direct":
            if rank == self.rank:
                return self._between(self.seen, owner)
            return self._between(self.shown, rank)
        blocks = self.layout.blocks_of(owner)
        if strategy == "all_gather":
            return [blocks[blocks < self.layout.real_blocks]] * self.groups
        return [blocks[far[blocks] >= distance] for far in self.reads.furthest]


_NOTHING = np.zeros(0, dtype=np.int64)
STRATEGIES = ("ring", "direct", "all_gather")


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
    room = reads.layout.blocks // reads.layout.world_size
    steps: list[list[int]] = []
    arriving = np.full(reads.layout.world_size, room + 1)  # no step yet that could be shared
    for d in busy:
        arriving = arriving + reads.at[:, d]
        if arriving.max() <= room:
            steps[-1].append(d)
        else:
            steps.append([d])
            arriving = reads.at[:, d]
    return steps


def _transfer(peer: int, chosen: _Held, buffer: _Held) -> Transfer:
    """`chosen` blocks, by their positions in what a buffer holds."""
    return Transfer(peer, tuple(np.searchsorted(b, c) for c, b in zip(chosen, buffer, strict=True)))


def _nonempty(transfers: list[Transfer]) -> tuple[Transfer, ...]:
    return tuple(t for t in transfers if t.count)
