"""The forward and backward loops over a plan's steps. One loop serves all strategies.

While step i computes, step i + 1's K/V is under way; on a GPU it is packed, on the communicator's
stream, and posted once step i's kernel is launched, beside which it costs least. In the backward,
dK/dV go home one step behind K/V. Partial results are merged, and gradients added, in a fixed
order: the same inputs give the same bits on every run where the kernel is deterministic.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
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
        last = {t.of: number for number, step in enumerate(steps) for t in step.sends}
        kept = {0: self.local}
        for number, step in enumerate(steps):
            if self.incoming is not None:
                held = self.incoming.wait()
                self.incoming = None
            if number in last:
                kept[number] = held
            if number + 1 < len(steps):
                self.incoming = _Incoming(self.plan, number + 1, kept)
                kept = {of: pair for of, pair in kept.items() if last.get(of, 0) > number + 1}
                kept[0] = self.local
            yield number, step, held
            self.post()

    def post(self) -> None:
        """The step's first kernel is launched: the next K/V may be on its way."""
        if self.incoming is not None:
            self.incoming.post()


class _Incoming:
    """K/V of one step: allocated at once; packed and posted, on a GPU, when it is told.

    Args:
        kept: the buffers that it is sent from, by step.
    """

    def __init__(self, plan: Plan, number: int, kept: Mapping[int, Pair]) -> None:
        self.comm, self.number, self.step = _comm(plan), number, plan.steps[number]
        self.like, self.block_size = kept[0], plan.layout.block_size
        self.sources = [kept[t.of] for t in self.step.sends]
        self.messages = [new_message(t, self.like, self.block_size) for t in self.step.receives]
        self.sends = [new_message(t, self.like, self.block_size) for t in self.step.sends]
        self.exchange: Exchange | None = None
        self.ready = self.comm.ready()  # before this the messages' memory may be in other use
        if self.ready is None:
            self.post()

    def post(self) -> None:
        if self.exchange is None:
            with self.comm.aside(self.ready):
                for transfer, source, message in zip(
                    self.step.sends, self.sources, self.sends, strict=True
                ):
                    pack(transfer, source, message, self.block_size)
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
    """dK/dV on their way: what an exchange brings is added where it belongs one step later. Those
    of a relay are kept until all that it collects are added, and leave with a later step's."""

    def __init__(self, plan: Plan, home: Pair, lanes: Lanes) -> None:
        self.plan, self.home, self.lanes = plan, home, lanes
        # Of each step that collects for others, the last one that its dK/dV leave with.
        self.last = {
            t.of: number
            for number, step in enumerate(plan.steps)
            for t in step.returns
            if t.of < number
        }
        self.kept: dict[int, Pair] = {}  # dK/dV of relays
        self.sent: _Return | None = None

    def of(self, number: int, step: Step, held: Pair, options: KernelOptions) -> _Return:
        return _Return(self.plan, number, step, held, options, relays=number in self.last)

    def submit(self, back: _Return) -> None:
        """Its kernel is launched, and what was sent before is added."""
        if back.number in self.last:
            assert back.gradients is not None
            self.kept[back.number] = back.gradients
        if any(t.of < back.number for t in back.step.returns):
            back.seal()  # they were added to since
        back.post(self.kept)
        self.sent = back
        self.kept = {n: pair for n, pair in self.kept.items() if self.last[n] > back.number}

    def settle(self) -> None:
        """Adds what was sent before."""
        if self.sent is not None:
            if any(t.of == 0 for t in self.sent.step.collects):
                self.lanes.meet()
            self.sent.add_to({0: self.home, **self.kept})
            self.sent = None

    def all_added(self, dtype: torch.dtype) -> Pair:
        """Of the local K/V, in `dtype`."""
        if self.sent is None:
            return self.home
        self.lanes.meet()
        return self.sent.added_to(self.home, dtype)


class _Return:
    """An exchange of dK/dV: those of one step, perhaps relayed ones of an earlier step, and those
    that come in.

    Attributes:
        gradients: where the kernel leaves the step's, if there are any. If one message takes all,
            that is the message, but for a relay: others' are added to its gradients.
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
        own = [t for t in step.returns if t.of == number]
        self.packed = (
            not relays and len(step.returns) == len(own) == 1
            and len(own[0].blocks) == 1 and own[0].count == step.width
        )  # fmt: skip
        self.gradients: Pair | None = None
        if self.packed:
            self.gradients = unpack(step.returns, self.sends, held, step.width, self.block_size)
        elif relays or step.mask is not None:
            self.gradients = _new(held, compute_dtype(held.k.dtype))
            if step.mask is None:
                _zero(self.gradients)
        self.messages = [new_message(t, held, self.block_size, dtype) for t in step.collects]
        self.sources: list[Pair] = []
        self.ready: torch.cuda.Event | None = None
        self.exchange: Exchange | None = None

    def seal(self) -> None:
        """The kernel that computes them is launched."""
        self.ready = self.comm.ready()

    def post(self, kept: Mapping[int, Pair]) -> None:
        """Sends them, and those of earlier steps."""
        if not self.packed:
            made = kept if self.gradients is None else {**kept, self.number: self.gradients}
            self.sources = [made[t.of] for t in self.step.returns]  # alive until they are packed
            with self.comm.aside(self.ready):
                for transfer, source, message in zip(
                    self.step.returns, self.sources, self.sends, strict=True
                ):
                    pack(transfer, source, message, self.block_size)
        self.exchange = _exchange(
            self.comm, self.step.returns, self.sends, self.step.collects, self.messages,
            self.ready, "dK/dV", self.number,
        )  # fmt: skip

    def add_to(self, gradients: Mapping[int, Pair]) -> None:
        """Adds what came in, by the step that it is of."""
        assert self.exchange is not None
        self.exchange.wait()
        for transfer, message in zip(self.step.collects, self.messages, strict=True):
            add(transfer, message, gradients[transfer.of], self.block_size)

    def added_to(self, home: Pair, dtype: torch.dtype) -> Pair:
        """`home` and what came home, in `dtype`."""
        assert self.exchange is not None and all(t.of == 0 for t in self.step.collects)
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
