"""What plans will take on a machine: a time line of every rank. Pure.

The schedule of schedule.py, with times in place of kernels and transfers: a step computes when the
one before is done and its K/V is there; an exchange begins when both ends have come to the step
that it runs beside. Work is that of whole blocks, as kernels compute it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import numpy as np

from ringflex.masks.runs import Array
from ringflex.parallel.machine import BACKWARD, FORWARD, AttentionShape, Machine
from ringflex.parallel.plan import Plan, swapped_bytes
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
    if plans[0].nodes is not None:
        places = plans[:: plans[0].gpus_per_node]
        nodes = [plan.nodes for plan in places if plan.nodes is not None]
        return _with_swaps(plans[0], partial(predict, nodes), shape, machine)
    work = [[s.mask.visible_blocks if s.mask else 0 for s in plan.steps] for plan in plans]
    return _prediction(plans[0], [plan.steps for plan in plans], work, shape, machine)


def predict_all(plan: Plan, shape: AttentionShape | None, machine: Machine | None) -> Prediction:
    """The same from the plan of one rank, which knows what all compute of each other's K/V."""
    if plan.nodes is not None:
        return _with_swaps(plan, partial(predict_all, plan.nodes), shape, machine)
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


def _with_swaps(
    plan: Plan,
    between_nodes: Callable[[AttentionShape, Machine], Prediction],
    shape: AttentionShape | None,
    machine: Machine | None,
) -> Prediction:
    """With the all-to-alls of heads before and after; nothing is computed meanwhile.

    Raises:
        ValueError: heads are not multiples of the GPUs of a node.
    """
    shape, machine = shape or AttentionShape(), machine or Machine()
    gpus = plan.gpus_per_node
    share = shape.share(gpus)
    found = between_nodes(share, replace(machine, gpus_per_node=1))
    D, Dv = shape.dims
    swapped = swapped_bytes(
        shape.batch * plan.local_len * (gpus - 1), share.heads, share.kv_heads, D, Dv, shape.dtype
    )
    there, back = (x / machine.near + machine.latency * (gpus > 1) for x in swapped)
    both = there + back
    spans = []
    swaps = [(0.0, there), (there + found.forward, back)]
    start = both + found.forward
    swaps += [(start, back), (start + back + found.backward, there)]
    for rank in range(plan.world_size):
        spans += [
            Span(rank, "transfer", "heads", 0, begin, begin + takes)
            for begin, takes in swaps
            if takes
        ]
    for s in found.spans:
        shift = there if s.start < found.forward else both + back
        ranks = range(s.rank * gpus, (s.rank + 1) * gpus)
        spans += [s._replace(rank=r, start=s.start + shift, end=s.end + shift) for r in ranks]
    return Prediction(
        forward=found.forward + both,
        backward=found.backward + both,
        exposed=found.exposed + 2 * both,
        flops=found.flops * gpus,
        spans=tuple(spans),
    )


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
            begun, lasts = self._exchange([(following, "receives")], start)
            end = end + self._slowed(number, lasts)
            self._note("compute", "forward", number, start, end)
            arrived = begun + lasts
            self._note("transfer", "K/V", following, begun, arrived)
            waits += np.maximum(arrived - end, 0)
            start = np.maximum(end, arrived)
        return end, waits

    def backward(self) -> tuple[Array, Array]:
        """As `forward`. The local K/V are left behind: they fill the time that a rank would wait,
        and the end (`behind`: what is left of them); in two passes, local dK/dV."""
        machine, last = self.machine, len(self.steps) - 1
        queries = 0.0 if machine.one_pass else _QUERIES  # the share of a kernel for dQ alone

        def seconds(step: int, share: float) -> Array:
            if not share:
                return np.zeros(self.W)
            return self._seconds(step, BACKWARD * share, machine.backward)

        start, waits = np.zeros(self.W), np.zeros(self.W)
        alone = bool(last) and not queries  # the local step has nothing to do ahead
        behind = seconds(0, float(alone))
        if queries:  # beside dQ, whose launch is counted
            behind = self.pairs[0] * BACKWARD * (1 - queries) * self.dim / machine.backward
        done = np.zeros(self.W)  # when nothing is

        def fill(end: Array, gap: Array) -> Array:
            nonlocal behind, done
            filled = np.minimum(gap, behind)
            done = np.where(filled > 0, end + filled, done)
            behind = behind - filled
            return filled

        def wait(end: Array, arrived: Array) -> Array:
            nonlocal waits
            gap = np.maximum(arrived - end, 0)
            waits = waits + gap - fill(end, gap)
            return end + gap

        for number in range(last + 1):
            parts = [(number + 1, "receives")] if number < last else []
            parts += [(number - 1, "collects")] if number > 1 else []
            begun, lasts = self._exchange(parts, start)
            self._note_exchange(parts, begun, begun + lasts)
            slowed = self._slowed(number, lasts)
            if number == 0:
                made, end = start, start + seconds(0, queries or 1.0) + slowed
                if alone:
                    end, behind = start, behind + slowed
            else:
                made = start + seconds(number, 1 - queries) + slowed
                name = "backward dK, dV" if queries else "backward"
                self._note("compute", name, number, start, made)
                if number == last:
                    if number > 1:
                        made = wait(made, begun + lasts)
                    begun, lasts = self._exchange([(last, "collects")], made)
                    self._note_exchange([(last, "collects")], begun, begun + lasts)
                end = made + seconds(number, queries)
            self._note("compute", "backward dQ" if queries else "backward", number, made, end)
            start = end if number == last else wait(end, begun + lasts)
        end = start + fill(start, behind)
        self._note("behind", "backward dK, dV" if queries else "backward", 0, done * 0, done)
        if last:
            end = wait(end, begun + lasts)
        return end, waits

    def _bytes(self, gradients: bool = False) -> float:
        dtype = self.shape.gradient_dtype if gradients else self.shape.dtype
        return self.elements * dtype.itemsize

    def _exchange(self, parts: Sequence[tuple[int, str]], posted: Array) -> tuple[Array, Array]:
        """When an exchange begins on each rank, and how long it lasts; 0 where there is none.

        parts: a step and what comes in: "receives" (K/V) or "collects" (dK/dV).
        """
        m, W = self.machine, self.W
        begins, into, out = posted.copy(), np.zeros((2, W)), np.zeros((2, W))
        pairs: list[tuple[int, int]] = []
        for number, incoming in parts:
            per_block = self._bytes(incoming == "collects")
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

    def _note_exchange(self, parts: Sequence[tuple[int, str]], begun: Array, end: Array) -> None:
        for number, incoming in parts:
            name, outgoing = ("K/V", "sends") if incoming == "receives" else ("dK/dV", "returns")
            steps = self.steps[number]
            takes_part = [bool(getattr(x, incoming) or getattr(x, outgoing)) for x in steps]
            self._note("transfer", name, number, begun, np.where(takes_part, end, begun))

    def _slowed(self, beside: int, lasts: Array) -> Array:
        """What a transfer adds to the kernel of a step."""
        return np.where(self.pairs[beside] > 0, self.machine.hidden * lasts, 0.0)

    def _note(self, track: str, name: str, step: int, start: Array, end: Array) -> None:
        for rank in np.flatnonzero(end > start):
            times = (self.origin + float(start[rank]), self.origin + float(end[rank]))
            self.spans.append(Span(int(rank), track, name, step, *times))
