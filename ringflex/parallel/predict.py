"""What plans will take on a machine: a time line of every rank. Pure.

The schedule of schedule.py, with times in place of kernels and transfers: a step computes when the
one before is done and its K/V is there; its transfer begins when both ends have launched the step
before. Work is that of whole blocks, as kernels compute it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ringflex.masks.runs import Array
from ringflex.parallel.machine import BACKWARD, FORWARD, AttentionShape, Machine
from ringflex.parallel.plan import Plan
from ringflex.parallel.steps import Step, StepMaker, Transfer
from ringflex.parallel.strategies import add_steps

_QUERIES = 3 / 7  # of the backward's matrix products, as two passes compute it: dQ; then dK and dV


class Span(NamedTuple):
    """Something that a rank does, from `start` to `end` (seconds)."""

    rank: int
    track: str  # "compute", "behind" (see lanes.py) or "transfer"
    name: str
    step: int
    start: float
    end: float


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """Of one attention layer over all ranks.

    Attributes:
        forward, backward: seconds, of the slowest rank.
        exposed: of these, forward and backward together, seconds that the slowest rank's kernels
            wait for transfers.
        flops: of all ranks, forward and backward, counted by visible blocks.
        spans: of every rank; all begin the backward when the slowest has done the forward.
    """

    forward: float
    backward: float
    exposed: float
    flops: float
    spans: tuple[Span, ...]

    @property
    def both(self) -> float:
        return self.forward + self.backward


def predict(
    plans: Sequence[Plan], shape: AttentionShape | None = None, machine: Machine | None = None
) -> Prediction:
    """Time lines of the forward and the backward of one layer.

    Args:
        plans: of all ranks, as `plan_all` makes them.
    """
    if [p.rank for p in plans] != list(range(plans[0].world_size)):
        raise ValueError("predict() wants the plans of all ranks, in order: see plan_all()")
    work = [[s.mask.visible_blocks if s.mask else 0 for s in plan.steps] for plan in plans]
    return _prediction(plans[0], [plan.steps for plan in plans], work, shape, machine)


def predict_all(plan: Plan, shape: AttentionShape | None, machine: Machine | None) -> Prediction:
    """The same from the plan of one rank, which knows what all compute of each other's K/V."""
    (reads, work), W = plan.outline, plan.world_size
    steps, blocks = [], []
    for rank in range(W):
        maker, by_owner = StepMaker(rank, reads, None), work.of(rank)
        add_steps(plan.strategy, maker)
        steps.append(maker.steps)
        # What a rank sees of an owner comes in one step.
        owners = [np.unique(plan.layout.owner[np.concatenate(held)]) for held in maker.held]
        blocks.append([int(by_owner[some].sum()) for some in owners])
    return _prediction(plan, steps, blocks, shape, machine)


def _prediction(
    plan: Plan,
    steps: Sequence[Sequence[Step]],
    work: Sequence[Sequence[int]],
    shape: AttentionShape | None,
    machine: Machine | None,
) -> Prediction:
    """Args:
    plan: of any rank.
    steps, work: of all ranks: their steps, and the visible blocks of each.
    """
    line = _Line(plan, steps, work, shape or AttentionShape(), machine or Machine())
    forward, forward_waits = line.forward()
    line.origin = float(forward.max())
    backward, backward_waits = line.backward()
    slowest = int(np.argmax(forward + backward))
    D, Dv = line.shape.dims
    per_pair = (FORWARD + BACKWARD) * (D + Dv) / 2
    return Prediction(
        forward=float(forward.max()),
        backward=float(backward.max()),
        exposed=float((forward_waits + backward_waits)[slowest]),
        flops=float(line.pairs.sum()) * per_pair,
        spans=tuple(line.spans),
    )


class _Line:
    """Arrays are by rank, `[W]`, or by step and rank."""

    def __init__(
        self,
        plan: Plan,
        steps: Sequence[Sequence[Step]],
        work: Sequence[Sequence[int]],
        shape: AttentionShape,
        machine: Machine,
    ) -> None:
        self.shape, self.machine, self.W = shape, machine, plan.world_size
        self.steps = list(zip(*steps, strict=True))
        size, rows = plan.layout.block_size, plan.rows
        D, Dv = shape.dims
        self.elements = size * shape.kv_heads * (D + Dv) * shape.batch / rows.B  # of a block
        copies = shape.batch / rows.B * shape.heads / rows.H
        self.pairs = np.array(work).T * size * size * copies
        self.dim = (D + Dv) / 2
        self.spans: list[Span] = []
        self.origin = 0.0  # of spans

    def _seconds(self, step: int, flops: float, rate: float) -> Array:
        """A kernel's time on each rank; none where it has nothing to do."""
        pairs: Array = self.pairs[step]
        return pairs * flops * self.dim / rate + np.where(pairs > 0, self.machine.launch, 0.0)

    def forward(self) -> tuple[Array, Array]:
        """When each rank is done, and how long it has waited."""
        start, waits = np.zeros(self.W), np.zeros(self.W)
        for number in range(len(self.steps)):
            end = start + self._seconds(number, FORWARD, self.machine.forward)
            following = number + 1
            if following == len(self.steps):
                self._note("compute", "forward", number, start, end)
                break
            begun, lasts = self._transfer(following, "receives", self._bytes(), start)
            end = end + self._slowed(number, lasts)
            self._note("compute", "forward", number, start, end)
            arrived = begun + lasts
            self._note("transfer", "K/V", following, begun, arrived)
            waits += np.maximum(arrived - end, 0)
            start = np.maximum(end, arrived)
        return end, waits

    def backward(self) -> tuple[Array, Array]:
        """As `forward`. In two passes: dQ of the local step, and every other step's dK/dV and dQ;
        the local dK/dV beside them, wherever a rank would wait, and at the end (`behind`: what is
        left of it). In one pass each step is one kernel. What returns is waited for one step later.
        """
        queries = 0.0 if self.machine.one_pass else _QUERIES  # the share of a kernel for dQ alone

        def seconds(step: int, share: float) -> Array:
            if not share:
                return np.zeros(self.W)
            return self._seconds(step, BACKWARD * share, self.machine.backward)

        start, waits = np.zeros(self.W), np.zeros(self.W)
        end = seconds(0, queries or 1.0)
        behind = self.pairs[0] * BACKWARD * (1 - queries) * self.dim / self.machine.backward
        if self.machine.one_pass:
            behind = np.zeros(self.W)
        last_kernel = "backward dQ" if queries else "backward"
        done = np.zeros(self.W)  # when nothing is
        since, until = start, end  # the last dQ
        sent: tuple[int, Array] | None = None  # the step whose exchange of dK/dV is under way

        def wait(end: Array, arrived: Array) -> Array:
            nonlocal waits
            gap = np.maximum(arrived - end, 0)
            filled = fill(end, gap)
            waits = waits + gap - filled
            return end + gap

        def fill(end: Array, gap: Array) -> Array:
            nonlocal behind, done
            filled = np.minimum(gap, behind)
            done = np.where(filled > 0, end + filled, done)
            behind = behind - filled
            return filled

        def settle(end: Array) -> Array:
            if sent is None:
                return end
            number, arrived = sent
            end = wait(end, arrived)
            if any(t.of == 0 for step in self.steps[number] for t in step.collects):
                end = end + fill(end, behind)  # they are added to the local dK/dV
            return end

        for number in range(1, len(self.steps)):
            begun, lasts = self._transfer(number, "receives", self._bytes(), start)
            slowed = self._slowed(number - 1, lasts)
            self._note("compute", last_kernel, number - 1, since, until + slowed)
            end, arrived = end + slowed, begun + lasts
            self._note("transfer", "K/V", number, begun, arrived)
            start = wait(end, arrived)
            made = start + seconds(number, 1 - queries)
            end = made + seconds(number, queries)
            since, until = start, end
            if queries:
                self._note("compute", "backward dK, dV", number, start, made)
                since = made
            end = settle(end)
            relayed = any(t.of < number for step in self.steps[number] for t in step.returns)
            posted = end if relayed else made
            begun, lasts = self._transfer(number, "collects", self._bytes(True), posted)
            self._note("transfer", "dK/dV", number, begun, begun + lasts)
            sent = number, begun + lasts
        self._note("compute", last_kernel, len(self.steps) - 1, since, until)
        end = end + fill(end, behind)
        self._note("behind", "backward dK, dV", 0, np.zeros(self.W), done)
        if sent is not None:
            end = wait(end, sent[1])
        return end, waits

    def _bytes(self, gradients: bool = False) -> float:
        dtype = self.shape.gradient_dtype if gradients else self.shape.dtype
        return self.elements * dtype.itemsize

    def _transfer(
        self, number: int, incoming: str, per_block: float, posted: Array
    ) -> tuple[Array, Array]:
        """When a step's transfers begin on each rank, and how long they last; 0 where none are."""
        m, W = self.machine, self.W
        begins, into, out = posted.copy(), np.zeros((2, W)), np.zeros((2, W))
        pairs: list[tuple[int, int]] = []
        for rank, step in enumerate(self.steps[number]):
            transfers: Sequence[Transfer] = getattr(step, incoming)
            for t in transfers:
                far = rank // m.gpus_per_node != t.peer // m.gpus_per_node
                takes = t.count * per_block / (m.far if far else m.near)
                into[int(far), rank] += takes
                out[int(far), t.peer] += takes
                pairs.append((rank, t.peer))
        if not pairs:
            return begins, np.zeros(W)
        here, there = np.array(pairs).T
        both = np.maximum(posted[here], posted[there])
        for side in (here, there):
            np.maximum.at(begins, side, both)
        own = np.maximum(into, out).max(axis=0)  # both ways and both links at once
        lasts = own.copy()
        np.maximum.at(lasts, here, own[there])
        return begins, np.where(own > 0, lasts + m.latency, 0.0)

    def _slowed(self, beside: int, lasts: Array) -> Array:
        """What a transfer adds to the kernel of a step."""
        return np.where(self.pairs[beside] > 0, self.machine.hidden * lasts, 0.0)

    def _note(self, track: str, name: str, step: int, start: Array, end: Array) -> None:
        for rank in np.flatnonzero(end > start):
            times = (self.origin + float(start[rank]), self.origin + float(end[rank]))
            self.spans.append(Span(int(rank), track, name, step, *times))
