"""The forward and backward loops over a plan's steps. One loop serves all strategies.

Step i + 1's K/V is under way while step i computes. In the backward, dK/dV go home one step
behind K/V. Partial results are merged, and gradients added, in the order of the steps: the same
inputs give the same bits on every run where the kernel is deterministic.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import ModuleType

import torch
from torch import Tensor

from ringflex.masks.trace import TracedMod
from ringflex.parallel.comm import Exchange
from ringflex.parallel.packing import Pair, add, new_message, pack, unpack
from ringflex.parallel.plan import Plan
from ringflex.parallel.steps import Step


def forward(
    plan: Plan,
    kernel: ModuleType,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    score: TracedMod | None,
    scale: float,
    acc: tuple[Tensor, Tensor],
) -> None:
    """Merges attention over all K/V of the plan into `acc`; see the kernel's `forward`."""
    for step, held in _arrivals(plan, Pair(k, v)):
        if step.mask is not None:
            kernel.forward(q, held.k, held.v, step.mask, score, scale, acc)


def backward(
    plan: Plan,
    kernel: ModuleType,
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    delta: Tensor,
    score: TracedMod | None,
    scale: float,
    dcaptures: Sequence[Tensor | None],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the local q, k, v in the dtype of `lse`; adds into `dcaptures`."""
    dq, dk, dv = (torch.zeros(x.shape, dtype=lse.dtype, device=x.device) for x in (q, k, v))
    home = Pair(dk, dv)
    returning: _Return | None = None
    for step, held in _arrivals(plan, Pair(k, v)):
        local = step is plan.steps[0]
        d_held = home if local else Pair(*(torch.zeros_like(x, dtype=lse.dtype) for x in held))
        if step.mask is not None:
            kernel.backward(
                dout, q, *held, lse, delta, step.mask, score, scale, dq, *d_held, dcaptures
            )
        if returning is not None:
            returning.add_into(home)
        if not local:
            returning = _Return(plan, step, d_held, home)
    if returning is not None:
        returning.add_into(home)
    return dq, dk, dv


def _arrivals(plan: Plan, local: Pair) -> Iterator[tuple[Step, Pair]]:
    """Each step with its K/V; the next step's K/V is posted before the step is handed out."""
    held = local
    incoming: _Incoming | None = None
    for i, step in enumerate(plan.steps):
        if incoming is not None:
            held = incoming.wait()
        if i + 1 < len(plan.steps):
            following = plan.steps[i + 1]
            incoming = _Incoming(plan, following, held if following.passes_on else local, local)
        yield step, held


class _Incoming:
    """K/V of one step under way."""

    def __init__(self, plan: Plan, step: Step, source: Pair, like: Pair) -> None:
        self.step, self.like, self.block_size = step, like, plan.layout.block_size
        self.messages = [new_message(t, like, self.block_size) for t in step.receives]
        self.exchange = _exchange(
            plan,
            [(t.peer, pack(t, source, self.block_size)) for t in step.sends],
            [(t.peer, m) for t, m in zip(step.receives, self.messages, strict=True)],
        )

    def wait(self) -> Pair:
        self.exchange.wait()
        step = self.step
        return unpack(step.receives, self.messages, self.like, step.width, self.block_size)


class _Return:
    """dK/dV of one step on their way to the ranks that own the blocks."""

    def __init__(self, plan: Plan, step: Step, gradients: Pair, like: Pair) -> None:
        self.step, self.block_size = step, plan.layout.block_size
        self.messages = [new_message(t, like, self.block_size) for t in step.collects]
        self.exchange = _exchange(
            plan,
            [(t.peer, pack(t, gradients, self.block_size)) for t in step.returns],
            [(t.peer, m) for t, m in zip(step.collects, self.messages, strict=True)],
        )

    def add_into(self, home: Pair) -> None:
        self.exchange.wait()
        for transfer, message in zip(self.step.collects, self.messages, strict=True):
            add(transfer, message, home, self.block_size)


def _exchange(
    plan: Plan, sends: list[tuple[int, Tensor]], receives: list[tuple[int, Tensor]]
) -> Exchange:
    assert plan.comm is not None  # validated before the first step
    return plan.comm.exchange(sends, receives)
