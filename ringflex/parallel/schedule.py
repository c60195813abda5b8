"""The forward and backward loops over a plan's steps. One loop serves all strategies.

Step i + 1's K/V is under way while step i computes. In the backward, dK/dV go home one step
behind K/V. Partial results are merged, and gradients added, in the order of the steps: the same
inputs give the same bits on every run where the kernel is deterministic.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ringflex.kernels.contract import Gradients, KernelOptions, Partial, compute_dtype
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
    before: Partial | None,
    after: Partial,
    options: KernelOptions,
) -> None:
    """Attention over all K/V of the plan, merged with `before`, to `after`; see the contract.

    Between steps the running result is in the compute dtype; the last step rounds it.
    """
    assert after.out is not None
    left = sum(step.mask is not None for step in plan.steps)
    if not left:
        after.out.zero_()
        if before is None:
            after.lse.fill_(-torch.inf)
        else:
            after.lse.copy_(before.lse)
    running = after
    dtype = compute_dtype(q.dtype)
    if left > 1 and after.out.dtype != dtype:
        running = Partial(torch.empty_like(after.out, dtype=dtype), after.lse)
    for step, held in _arrivals(plan, Pair(k, v)):
        if step.mask is not None:
            left -= 1
            target = running if left else after
            kernel.forward(q, held.k, held.v, step.mask, score, scale, before, target, options)
            before = target


def backward(
    plan: Plan,
    kernel: ModuleType,
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    terms: Any,
    score: TracedMod | None,
    scale: float,
    dcaptures: Sequence[Tensor | None],
    options: KernelOptions,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the local q, k, v; adds into `dcaptures`.

    With one step they have the dtype of q, otherwise that of accumulation.
    """
    several = len(plan.steps) > 1
    dtype = compute_dtype(q.dtype) if several else q.dtype

    def new(x: Tensor, computed: bool) -> Tensor:
        make = torch.empty if computed else torch.zeros
        return make(x.shape, dtype=dtype, device=x.device)

    started = False
    dq = new(q, any(step.mask is not None for step in plan.steps))
    home: Pair | None = None
    returning: _Return | None = None
    for step, held in _arrivals(plan, Pair(k, v)):
        d_held = Pair(*(new(x, step.mask is not None) for x in held))
        if step.mask is not None:
            gradients = Gradients(
                dq=dq, dk=d_held.k, dv=d_held.v, dcaptures=dcaptures, add_q=started, add_kv=False
            )
            kernel.backward(dout, q, *held, terms, step.mask, score, scale, gradients, options)
            started = True
        if home is None:  # the local step
            home = d_held
            continue
        if returning is not None:
            returning.add_into(home)
        returning = _Return(plan, step, d_held, home)
    assert home is not None
    if returning is not None:
        returning.add_into(home)
    return dq, *home


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
