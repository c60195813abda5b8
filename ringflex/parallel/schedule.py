"""The forward and backward loops over a plan's steps. One loop serves all strategies.

Step i + 1's K/V is under way while step i computes. In the backward, dK/dV go home one step behind
K/V. Partial results are merged, and gradients added, in the order of the steps: the same inputs give
the same bits on every run where the kernel is deterministic.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import ModuleType

import torch
from torch import Tensor

from ringflex.masks.trace import TracedMod
from ringflex.parallel.comm import Communicator, Exchange
from ringflex.parallel.packing import add, new_message, pack, unpack
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
    for step, k_held, v_held in _arrivals(plan, k, v):
        if step.mask is not None:
            kernel.forward(q, k_held, v_held, step.mask, score, scale, acc)


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
    going_home: _Homecoming | None = None
    for step, k_held, v_held in _arrivals(plan, k, v):
        local = step is plan.steps[0]
        dk_held, dv_held = (
            (dk, dv) if local else (torch.zeros_like(x, dtype=lse.dtype) for x in (k_held, v_held))
        )
        if step.mask is not None:
            kernel.backward(
                dout, q, k_held, v_held, lse, delta, step.mask, score, scale,
                dq, dk_held, dv_held, dcaptures,
            )  # fmt: skip
        if going_home is not None:
            going_home.add_into(dk, dv)
        if not local:
            going_home = _Homecoming(plan, step, dk_held, dv_held, (dk, dv))
    if going_home is not None:
        going_home.add_into(dk, dv)
    return dq, dk, dv


def _arrivals(plan: Plan, k: Tensor, v: Tensor) -> Iterator[tuple[Step, Tensor, Tensor]]:
    """Each step with its K/V; the next step's K/V is posted before the step is handed out."""
    held = (k, v)
    incoming: _Incoming | None = None
    for i, step in enumerate(plan.steps):
        if incoming is not None:
            held = incoming.wait()
        if i + 1 < len(plan.steps):
            following = plan.steps[i + 1]
            incoming = _Incoming(plan, following, held if following.passes_on else (k, v), (k, v))
        yield step, *held


def _comm(plan: Plan) -> Communicator:
    assert plan.comm is not None  # validated before the first step
    return plan.comm


class _Incoming:
    """K/V of one step under way."""

    def __init__(
        self, plan: Plan, step: Step, source: tuple[Tensor, Tensor], like: tuple[Tensor, Tensor]
    ) -> None:
        self.step, self.like, self.block_size = step, like, plan.layout.block_size
        self.messages = [new_message(t, *like, self.block_size) for t in step.receives]
        self.exchange: Exchange = _comm(plan).exchange(
            [(t.peer, pack(t, *source, self.block_size)) for t in step.sends],
            [(t.peer, m) for t, m in zip(step.receives, self.messages, strict=True)],
        )

    def wait(self) -> tuple[Tensor, Tensor]:
        self.exchange.wait()
        return unpack(
            self.step.receives, self.messages, self.like, self.step.width, self.block_size
        )


class _Homecoming:
    """dK/dV of one step on their way to the ranks that own the blocks."""

    def __init__(
        self, plan: Plan, step: Step, dk: Tensor, dv: Tensor, like: tuple[Tensor, Tensor]
    ) -> None:
        self.step, self.block_size = step, plan.layout.block_size
        self.messages = [new_message(t, *like, self.block_size) for t in step.collects]
        self.exchange: Exchange = _comm(plan).exchange(
            [(t.peer, pack(t, dk, dv, self.block_size)) for t in step.returns],
            [(t.peer, m) for t, m in zip(step.collects, self.messages, strict=True)],
        )

    def add_into(self, dk: Tensor, dv: Tensor) -> None:
        self.exchange.wait()
        for transfer, message in zip(self.step.collects, self.messages, strict=True):
            add(transfer, message, dk, dv, self.block_size)
