"""The forward and backward loops over a plan's steps. One loop serves all strategies.

While step i computes, step i + 1's K/V is under way; on a GPU it is packed, on the communicator's
stream, and posted once step i's kernel is launched, beside which it costs least. In the backward,
dK/dV go home one step behind K/V. Partial results are merged, and gradients added, in a fixed
order: the same inputs give the same bits on every run where the kernel is deterministic.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ringflex.kernels.contract import Gradients, KernelOptions, Partial, compute_dtype
from ringflex.masks.trace import TracedMod
from ringflex.parallel.comm import Communicator, Exchange
from ringflex.parallel.lanes import Lanes
from ringflex.parallel.packing import Pair, add, add_all, new_message, pack, unpack
from ringflex.parallel.plan import Plan
from ringflex.parallel.steps import Step, Transfer
from ringflex.parallel.timeline import computing


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
    """Attention over all K/V of the plan, merged with `before`, to `after`; see the contract."""
    assert after.out is not None
    computed = sum(step.mask is not None for step in plan.steps)
    running = None
    if not computed:
        after.out.zero_()
        if before is None:
            after.lse.fill_(-torch.inf)
        else:
            after.lse.copy_(before.lse)
    elif computed > 1:
        running = Partial(
            torch.empty_like(after.out, dtype=compute_dtype(q.dtype)),
            torch.empty_like(after.lse, dtype=torch.float64),
        )
    for number, step, held in _Arrivals(plan, Pair(k, v)):
        if step.mask is not None:
            with computing("forward", number):
                kernel.forward(
                    q, *held, step.mask, score, scale, before, after, options, step.stage, running
                )


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
    """Gradients of the local q, k, v, in their dtypes; adds into `dcaptures`.

    A kernel that computes dQ and dK/dV apart leaves the local dK/dV, for which nothing waits,
    behind all the rest: on a GPU they fill what room there is beside it (see `lanes`).
    """
    several = len(plan.steps) > 1
    home = _new(Pair(k, v), compute_dtype(q.dtype) if several else k.dtype)
    apart = kernel.has_separate_passes(q, v, options)
    calls = _Calls(plan, kernel, dout, q, terms, score, scale, dcaptures, options, apart)
    lanes = Lanes(q.device)
    with lanes.ahead():
        arrivals = _Arrivals(plan, Pair(k, v))
        returns = _Returns(plan, home, lanes)
        for number, step, held in arrivals:
            if number == 0:
                if step.mask is None:
                    _zero(home)
                    continue
                calls.run(0, step, held, None if apart else home, queries=True)
                if apart:
                    with lanes.behind():
                        calls.run(0, step, held, home, queries=False, track="behind")
                continue
            back = returns.of(number, step, held, options)
            if step.mask is not None:
                calls.run(number, step, held, back.gradients, queries=not apart)
            back.seal()
            arrivals.post()
            if apart and step.mask is not None:
                calls.run(number, step, held, None, queries=True)
            returns.settle()
            returns.submit(back)
        home = returns.all_added(k.dtype)
        dq = calls.all_added()
    return dq, *home


class _Calls:
    """The kernel's calls of one backward, and its dQ, which adds up from one to the next."""

    def __init__(
        self,
        plan: Plan,
        kernel: ModuleType,
        dout: Tensor,
        q: Tensor,
        terms: Any,
        score: TracedMod | None,
        scale: float,
        dcaptures: Sequence[Tensor | None],
        options: KernelOptions,
        apart: bool,
    ) -> None:
        self.kernel, self.dout, self.q, self.terms = kernel, dout, q, terms
        self.score, self.scale, self.dcaptures, self.options = score, scale, dcaptures, options
        self.apart = apart
        computed = sum(step.mask is not None for step in plan.steps)
        make = torch.empty if computed else torch.zeros
        self.dq = make(q.shape, dtype=q.dtype, device=q.device)
        self.running_q: Tensor | None = None
        if computed > 1:
            make = torch.empty if apart else torch.zeros
            self.running_q = make(q.shape, dtype=compute_dtype(q.dtype), device=q.device)

    def run(
        self,
        number: int,
        step: Step,
        held: Pair,
        gradients: Pair | None,
        *,
        queries: bool,
        track: str = "compute",
    ) -> None:
        """One launch: dK/dV into `gradients` (or nothing of the kind), dQ if `queries`."""
        assert step.mask is not None
        wanted = Gradients(
            dq=self.dq if queries else None,
            dk=None if gradients is None else gradients.k,
            dv=None if gradients is None else gradients.v,
            dcaptures=self.dcaptures,
            stage=step.stage if self.apart else None,
            running_q=self.running_q,
        )
        passes = "dQ, dK, dV" if queries and gradients else "dQ" if queries else "dK, dV"
        with computing(f"backward {passes}", number, track):
            self.kernel.backward(
                self.dout, self.q, *held, self.terms, step.mask, self.score, self.scale, wanted,
                self.options,
            )  # fmt: skip

    def all_added(self) -> Tensor:
        """dQ, when all steps are done."""
        if self.running_q is not None and not self.apart:
            self.dq.copy_(self.running_q)
        return self.dq


class _Arrivals:
    """Each step's number, the step and its K/V. The next step's K/V comes meanwhile."""

    def __init__(self, plan: Plan, local: Pair) -> None:
        self.plan, self.local = plan, local
        self.incoming: _Incoming | None = None

    def __iter__(self) -> Iterator[tuple[int, Step, Pair]]:
        held, steps = self.local, self.plan.steps
        last = {step.source: number for number, step in enumerate(steps)}  # that sends from each
        kept: dict[int | None, Pair] = {None: self.local}
        for number, step in enumerate(steps):
            if self.incoming is not None:
                held = self.incoming.wait()
                self.incoming = None
            if number in last:
                kept[number] = held
            if number + 1 < len(steps):
                source = steps[number + 1].source
                self.incoming = _Incoming(self.plan, number + 1, kept[source], self.local)
                if source is not None and last[source] == number + 1:
                    del kept[source]
            yield number, step, held
            self.post()

    def post(self) -> None:
        """The step's first kernel is launched: the next K/V may be on its way."""
        if self.incoming is not None:
            self.incoming.post()


class _Incoming:
    """K/V of one step: allocated at once; packed and posted, on a GPU, when it is told."""

    def __init__(self, plan: Plan, number: int, source: Pair, like: Pair) -> None:
        self.comm, self.number, self.step = _comm(plan), number, plan.steps[number]
        self.source, self.like, self.block_size = source, like, plan.layout.block_size
        self.messages = [new_message(t, like, self.block_size) for t in self.step.receives]
        self.sends = [new_message(t, like, self.block_size) for t in self.step.sends]
        self.exchange: Exchange | None = None
        self.ready = self.comm.ready()  # before this the messages' memory may be in other use
        if self.ready is None:
            self.post()

    def post(self) -> None:
        if self.exchange is None:
            with self.comm.aside(self.ready):
                for transfer, message in zip(self.step.sends, self.sends, strict=True):
                    pack(transfer, self.source, message, self.block_size)
            self.exchange = _exchange(
                self.comm, self.step.sends, self.sends, self.step.receives, self.messages,
                self.ready, "K/V", self.number,
            )  # fmt: skip

    def wait(self) -> Pair:
        assert self.exchange is not None
        self.exchange.wait()
        step = self.step
        return unpack(step.receives, self.messages, self.like, step.width, self.block_size)


class _Returns:
    """dK/dV on their way: what a step sends is added where it belongs one step later. Those of a
    relaying step go on when all that it collects are added."""

    def __init__(self, plan: Plan, home: Pair, lanes: Lanes) -> None:
        self.plan, self.home, self.lanes = plan, home, lanes
        # Of each relaying step, the last one whose dK/dV it collects.
        self.last = {s.into: n for n, s in enumerate(plan.steps) if s.into is not None}
        self.relaying: dict[int, _Return] = {}
        self.sent: list[_Return] = []

    def of(self, number: int, step: Step, held: Pair, options: KernelOptions) -> _Return:
        return _Return(self.plan, number, step, held, options, relays=number in self.last)

    def submit(self, back: _Return) -> None:
        """Its kernel is launched."""
        if back.number in self.last:
            self.relaying[back.number] = back
        else:
            self._send(back)

    def settle(self) -> None:
        """Adds what was sent before."""
        sent, self.sent = self.sent, []
        for back in sent:
            into = back.step.into
            if into is None:
                self.lanes.meet()
                back.add_into(self.home)
                continue
            relay = self.relaying[into]
            assert relay.gradients is not None
            back.add_into(relay.gradients)
            if self.last[into] == back.number:
                del self.relaying[into]
                relay.seal()
                self._send(relay)

    def _send(self, back: _Return) -> None:
        back.post()
        self.sent.append(back)

    def all_added(self, dtype: torch.dtype) -> Pair:
        """Of the local K/V, in `dtype`."""
        while self.relaying:
            self.settle()
        if not self.sent:
            return self.home
        *sent, last = self.sent
        self.lanes.meet()
        for back in sent:
            back.add_into(self.home)
        return last.added_to(self.home, dtype)


class _Return:
    """dK/dV of one step, then their way to the ranks that own the blocks.

    Attributes:
        gradients: where the kernel leaves them, if there are any. If one message takes all, that
            is the message, but for a step that relays: others' are added to its gradients.
    """

    def __init__(
        self,
        plan: Plan,
        number: int,
        step: Step,
        held: Pair,
        options: KernelOptions,
        *,
        relays: bool,
    ) -> None:
        self.comm, self.number, self.step = _comm(plan), number, step
        self.block_size = plan.layout.block_size
        dtype = options.gradient_dtype or compute_dtype(held.k.dtype)
        self.sends = [new_message(t, held, self.block_size, dtype) for t in step.returns]
        whole = [t for t in step.returns if len(t.blocks) == 1 and t.count == step.width]
        self.packed = len(whole) == 1 and not relays
        self.gradients: Pair | None = None
        if self.packed:
            self.gradients = unpack(step.returns, self.sends, held, step.width, self.block_size)
        elif relays or step.mask is not None:
            self.gradients = _new(held, compute_dtype(held.k.dtype))
            if step.mask is None:
                _zero(self.gradients)
        self.messages = [new_message(t, held, self.block_size, dtype) for t in step.collects]
        self.ready: torch.cuda.Event | None = None
        self.exchange: Exchange | None = None

    def seal(self) -> None:
        """The kernel that computes them is launched."""
        self.ready = self.comm.ready()

    def post(self) -> None:
        if self.gradients is not None and not self.packed:
            with self.comm.aside(self.ready):
                for transfer, message in zip(self.step.returns, self.sends, strict=True):
                    pack(transfer, self.gradients, message, self.block_size)
        self.exchange = _exchange(
            self.comm, self.step.returns, self.sends, self.step.collects, self.messages,
            self.ready, "dK/dV", self.number,
        )  # fmt: skip

    def add_into(self, home: Pair) -> None:
        """Adds what came home."""
        assert self.exchange is not None
        self.exchange.wait()
        for transfer, message in zip(self.step.collects, self.messages, strict=True):
            add(transfer, message, home, self.block_size)

    def added_to(self, home: Pair, dtype: torch.dtype) -> Pair:
        """`home` and what came home, in `dtype`."""
        assert self.exchange is not None
        self.exchange.wait()
        return add_all(self.step.collects, self.messages, home, self.block_size, dtype)


def _exchange(
    comm: Communicator,
    to: Sequence[Transfer],
    sends: Sequence[Tensor],
    of: Sequence[Transfer],
    receives: Sequence[Tensor],
    ready: torch.cuda.Event | None,
    name: str,
    step: int,
) -> Exchange:
    return comm.exchange(
        [(t.peer, x) for t, x in zip(to, sends, strict=True)],
        [(t.peer, x) for t, x in zip(of, receives, strict=True)],
        ready, name=name, step=step,
    )  # fmt: skip


def _comm(plan: Plan) -> Communicator:
    assert plan.comm is not None  # validated before the first step
    return plan.comm


def _new(like: Pair, dtype: torch.dtype) -> Pair:
    return Pair(*(torch.empty(x.shape, dtype=dtype, device=x.device) for x in like))


def _zero(pair: Pair) -> None:
    for x in pair:
        x.zero_()
