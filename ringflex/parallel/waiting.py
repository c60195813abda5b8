"""Which queries each launch of a forward computes.

Blocks of queries that see K/V which arrives *wait* for it, and see it and the local K/V in one
launch. Such a block would be computed twice, and what it finds at first written and read again in
fp32, which takes as long as some 7 blocks of K/V. So it is left out of the local step; in the step
that it waits for, the local K/V follow those that arrived. Enough is left to compute while K/V is
on its way. Of the forward only: a backward walks the queries of each key.

Blocks that see nothing but local K/V are computed *apart*: nothing waits for them, so they may run
wherever other launches leave room. So are those that the last step computes in one go, if it has to
merge others.
"""

from __future__ import annotations

import math
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
        apart: of the local step, and of the last one, what nothing waits for and merges with
            nothing; if there are other steps.
        merge: whether one of `steps` merges.
    """

    steps: tuple[Launch, ...]
    apart: tuple[Launch, Launch]
    merge: bool

    @classmethod
    def of(
        cls, steps: Iterable[Launch], apart: Launch = _NOTHING, last: Launch = _NOTHING
    ) -> Launches:
        steps = tuple(steps)
        return cls(steps, (apart, last), any(launch.merges for launch in steps))


def launches(plan: Plan, joins: bool, at_once: float = 1.0) -> Launches:
    """Those of a plan. Kept with it, unless they are just its steps: a mask for one GPU would keep
    itself.

    Args:
        joins: a launch may read the K/V of a buffer and the local ones.
        at_once: so many blocks of queries, of every head, are computed at a time.
    """
    first = plan.steps[0]
    if first.mask is None or first.stage is None:
        return Launches.of(Launch(step.mask, step.stage) for step in plan.steps)
    key = "launches", joins, at_once
    if key not in plan.cache:
        plan.cache[key] = _launches(plan, first.mask, first.stage, joins, at_once)
    found: Launches = plan.cache[key]
    return found


def _launches(plan: Plan, first: BlockMask, stage: Stage, joins: bool, at_once: float) -> Launches:
    made = [Launch(step.mask, step.stage) for step in plan.steps]
    waits = np.zeros(stage.turns.size, dtype=np.int64)
    last = _NOTHING
    if joins:
        waits = _waiting(plan, first, stage, at_once * first.B * first.H)
        for number in sorted(set(waits) - {0}):
            made[number] = _with_local(plan.steps[number], first, waits == number)
        mask, ending, more = made[-1]
        if mask is not None and ending is not None and ending.merges:
            whole = _apart(ending)
            last, made[-1] = (
                _without(mask, ending, ~whole, more),
                _without(mask, ending, whole, more),
            )
    apart = _apart(stage)
    made[0] = _without(first, stage, apart | (waits > 0))
    return Launches.of(made, _without(first, stage, ~apart), last)


def _waiting(plan: Plan, first: BlockMask, stage: Stage, at_once: float) -> Array:
    """For each row of the local mask, the step that it may wait for, or 0; int64.

    Rows that see others' K/V may, for the first of it; those with the fewest local blocks before
    others. What is left hides the transfer, with what is apart. If that alone does, none is left;
    if not, as many rows as are computed `at_once`, or twice as many, and so on: fewer would take
    as long.
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
    left = order.size - int(np.count_nonzero(np.cumsum(work[order]) <= total - hides))
    if work[_apart(stage)].sum() < hides:
        left = max(left, int(_FREE * total / _MERGE))
    left = int(math.ceil(left / at_once) * at_once)
    chosen = order[: max(0, order.size - left)]
    kept = np.zeros_like(waits)
    kept[chosen] = waits[chosen]
    return kept


def _apart(stage: Stage) -> Array:
    """Rows that see no K/V but that of one step, bool."""
    both: Array = stage.turns.reshape(-1) & (BEGINS | ENDS) == BEGINS | ENDS
    return both


def _on_its_way(plan: Plan) -> float:
    """How long the exchange takes that brings K/V beside the local step, in visible blocks over all
    heads. It ends when all is sent, too."""
    costs, step, longest = plan.outline.reads.costs, plan.steps[1], 0.0
    for transfers in (step.receives, step.sends):
        near, far = 0, 0
        for transfer in transfers:
            if transfer.peer // costs.node == plan.rank // costs.node:
                near += transfer.count
            else:
                far += transfer.count
        longest = max(longest, costs.near * near, costs.far * far)
    return longest


def _without(mask: BlockMask, stage: Stage, rows: Array, more: bool = False) -> Launch:
    def select(runs: Runs) -> Runs:
        stay = ~rows[runs.row]
        return Runs.from_pieces(runs.row[stay], runs.start[stay], runs.end[stay], runs.rows)

    turns = np.where(rows.reshape(stage.turns.shape), 0, stage.turns).astype(np.int32)
    if not turns.any():
        return _NOTHING
    mask = replace(mask, full=select(mask.full), partial=select(mask.partial), cache={})
    return Launch(mask, replace(stage, turns=turns, cache={}), more)


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
