"""Which queries each launch of a forward computes.

Blocks of queries that see K/V which arrives *wait* for it, and see it and the local K/V in one
launch. Such a block would be computed twice, and what it finds at first written and read again in
fp32, which takes as long as some 7 blocks of K/V. So it is left out of the local step; in the step
that it waits for, the local K/V follow those that arrived. Enough is left to compute while K/V is
on its way. Of the forward only: a backward walks the queries of each key.

Blocks that see nothing but local K/V are computed *apart*: nothing waits for them, so they may run
wherever other launches leave room.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from ringflex.kernels.block_lists import blocks_per_row
from ringflex.kernels.stages import ACTIVE, BEGINS, ENDS, Stage
from ringflex.masks.block_mask import BlockMask
from ringflex.masks.runs import Array, Runs
from ringflex.parallel.plan import Plan
from ringflex.parallel.steps import Step

_HIDDEN = 1.3  # times as long as a transfer takes, what is computed beside it
_MERGE = 7  # blocks of K/V that are computed while a block of queries is merged
_FREE = 0.002  # of the local step, which merging may take where nothing need be hidden any more


class Launch(NamedTuple):
    """What the forward computes of a step.

    Attributes:
        mask, stage: as of a `Step`.
        more: its K/V are those of the step's buffer, and behind them the local ones.
    """

    mask: BlockMask | None
    stage: Stage | None
    more: bool = False

    @property
    def merges(self) -> bool:
        """Whether it computes for queries that do not both begin and end with it."""
        return self.stage is not None and self.stage.merges


_NOTHING = Launch(None, None)


class Launches(NamedTuple):
    """What a forward computes.

    Attributes:
        steps: in each step, when its K/V is there.
        apart: of the local step, what nothing waits for; if there are other steps.
        merge: whether one of `steps` merges.
    """

    steps: tuple[Launch, ...]
    apart: Launch
    merge: bool

    @classmethod
    def of(cls, steps: Iterable[Launch], apart: Launch = _NOTHING) -> Launches:
        steps = tuple(steps)
        return cls(steps, apart, any(launch.merges for launch in steps))


def launches(plan: Plan, joins: bool) -> Launches:
    """Those of a plan. Kept with it, unless they are just its steps: a mask for one GPU would keep
    itself.

    joins: a launch may read the K/V of a buffer and the local ones.
    """
    first = plan.steps[0]
    if first.mask is None or first.stage is None:
        return Launches.of(Launch(step.mask, step.stage) for step in plan.steps)
    key = "launches", joins
    if key not in plan.cache:
        plan.cache[key] = _launches(plan, first.mask, first.stage, joins)
    found: Launches = plan.cache[key]
    return found


def _launches(plan: Plan, first: BlockMask, stage: Stage, joins: bool) -> Launches:
    made = [Launch(step.mask, step.stage) for step in plan.steps]
    waits = np.zeros(stage.turns.size, dtype=np.int64)
    if joins:
        waits = _waiting(plan, first, stage)  # for which step; 0: for none
        for number in sorted(set(waits) - {0}):
            made[number] = _with_local(plan.steps[number], first, waits == number)
    apart = _apart(stage)
    made[0] = _without(first, stage, apart | (waits > 0))
    return Launches.of(made, _without(first, stage, ~apart))


def _waiting(plan: Plan, first: BlockMask, stage: Stage) -> Array:
    """For each row of the local mask, the step that it may wait for; int64.

    Rows that see others' K/V may, for the first of it; those with the fewest local blocks before
    others. What is left hides the transfer, with what is apart. If that alone does, none is left.
    """
    sees = np.zeros((len(plan.steps), stage.turns.size), dtype=bool)
    for row, step in zip(sees, plan.steps, strict=True):
        if step.stage is not None:
            row[:] = step.stage.turns.reshape(-1) & ACTIVE != 0
    may = sees[0] & sees[1:].any(axis=0)
    waits = np.where(may, np.argmax(sees[1:], axis=0) + 1, 0)
    work = blocks_per_row(first.full) + blocks_per_row(first.partial)
    order = np.argsort(work, kind="stable")
    order = order[waits[order] > 0]
    total = int(work.sum())
    hides = _HIDDEN * first.H * _on_its_way(plan)
    chosen = order[np.cumsum(work[order]) <= total - hides]
    if work[_apart(stage)].sum() < hides:
        chosen = chosen[: max(0, order.size - int(_FREE * total / _MERGE))]
    kept = np.zeros_like(waits)
    kept[chosen] = waits[chosen]
    return kept


def _apart(stage: Stage) -> Array:
    """Rows of the local step that see no other K/V, bool."""
    both: Array = stage.turns.reshape(-1) & (BEGINS | ENDS) == BEGINS | ENDS
    return both


def _on_its_way(plan: Plan) -> float:
    """How long K/V takes to arrive beside the local step, in visible blocks over all heads."""
    costs, near, far = plan.outline.reads.costs, 0, 0
    for transfer in plan.steps[1].receives:
        if transfer.peer // costs.node == plan.rank // costs.node:
            near += transfer.count
        else:
            far += transfer.count
    return max(costs.near * near, costs.far * far)


def _without(mask: BlockMask, stage: Stage, rows: Array) -> Launch:
    def select(runs: Runs) -> Runs:
        stay = ~rows[runs.row]
        return Runs.from_pieces(runs.row[stay], runs.start[stay], runs.end[stay], runs.rows)

    turns = np.where(rows.reshape(stage.turns.shape), 0, stage.turns).astype(np.int32)
    if not turns.any():
        return _NOTHING
    mask = replace(mask, full=select(mask.full), partial=select(mask.partial), cache={})
    return Launch(mask, replace(stage, turns=turns, cache={}))


def _with_local(step: Step, first: BlockMask, rows: Array) -> Launch:
    mask, stage = step.mask, step.stage
    assert mask is not None and stage is not None

    def join(theirs: Runs, ours: Runs) -> Runs:
        mine = rows[ours.row]
        return Runs.from_pieces(
            np.concatenate([theirs.row, ours.row[mine]]),
            np.concatenate([theirs.start, ours.start[mine] + mask.kv_blocks]),
            np.concatenate([theirs.end, ours.end[mine] + mask.kv_blocks]),
            theirs.rows,
        )

    starts = [np.broadcast_to(x, (first.B, x.shape[1])) for x in (mask.kv_starts, first.kv_starts)]
    joined = replace(
        mask,
        kv_len=mask.kv_len + first.kv_len,
        kv_starts=np.concatenate(starts, axis=1),
        full=join(mask.full, first.full),
        partial=join(mask.partial, first.partial),
        cache={},
    )
    turns = stage.turns | (rows.reshape(stage.turns.shape) * BEGINS).astype(np.int32)
    return Launch(joined, replace(stage, turns=turns, cache={}), more=True)
