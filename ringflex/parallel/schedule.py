"""The forward and backward loops over a plan's steps. One loop serves all strategies.

While step i computes, one exchange is under way: it brings step i + 1's K/V and, in the backward,
takes step i - 1's dK/dV home. It is posted just before step i's kernel is launched. Partial results
are merged, and gradients added, in a fixed order: the same inputs give the same bits on every run
where the kernel is deterministic.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ringflex.kernels.contract import Gradients, KernelOptions, Partial, Way, compute_dtype
from ringflex.masks.traced_mod import TracedMod
from ringflex.parallel.comm import Communicator, Exchange
from ringflex.parallel.lanes import Lanes
from ringflex.parallel.packing import Messages, Pair
from ringflex.parallel.plan import Plan
from ringflex.parallel.steps import Step
from ringflex.parallel.timeline import computing
from ringflex.parallel.waiting import Launch, launches

# How often a launch is prepared to make way, at most: waves of programs that nobody asks for cost
# time.
_MOST_ASKS = 12


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

    On a GPU, queries that see only local K/V are left behind the rest (see `lanes`), and in the
    last step those that merge with nothing; of a kernel whose launches may overlap.
    """
    assert after.out is not None
    at_once = kernel.blocks_at_once(q, plan.layout.block_size) / (q.shape[0] * q.shape[1])
    computes, apart, merge = launches(plan, kernel.joins, at_once)
    home, last = Pair(k, v), len(plan.steps) - 1
    running, lanes = None, Lanes(q.device)
    if not any(step.mask is not None for step in plan.steps):
        after.out.zero_()
        if before is None:
            after.lse.fill_(-torch.inf)
        else:
            after.lse.copy_(before.lse)
    elif merge:
        running = after.in_between()

    def asks(number: int) -> int:
        """How often what is left behind at a step will be asked to make way."""
        later = range(number + 1, last + 1)
        found = sum(_moves(plan, n) + _brings(plan, n + 1) for n in later)
        return found + sum(what.mask is not None for what in computes[number:])

    def launch(number: int, held: Pair, what: Launch, behind: Way | None = None) -> None:
        if what.mask is not None:
            with computing("forward", number, "compute" if behind is None else "behind"):
                kernel.forward(
                    q, *held, what.mask, score, scale, before, after, options, what.stage, running,
                    plan.has_transfers, home if what.more else None, behind,
                )  # fmt: skip

    leaves = kernel.may_overlap and any(what.mask is not None for what in apart)
    with lanes.ahead() if leaves else nullcontext(), _Walk(plan, home, lanes) as walk:
        for number, _, held in walk:
            left = apart[number != 0] if number in (0, last) else None
            if left is not None and left.mask is not None:
                times = min(_MOST_ASKS, asks(number))
                with lanes.behind(lanes.mark(), times) if leaves else nullcontext() as way:
                    launch(number, held, left, way)
            if computes[number].mask is not None:
                lanes.make_way()
            launch(number, held, computes[number])


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

    On a GPU, the local K/V, for whose gradients nothing waits, are left behind the rest (see
    `lanes`); of a kernel that computes dQ and dK/dV apart, local dK/dV. So what others wait for is
    computed as soon as K/V is there, and dK/dV go home while the rest of the local ones is.
    """
    adds = any(t.of == 0 for step in plan.steps for t in step.collects)
    home = _new(Pair(k, v), compute_dtype(k.dtype) if adds else k.dtype)
    apart = kernel.has_separate_passes(q, v, options, plan.has_transfers)
    calls = _Calls(plan, kernel, dout, q, terms, score, scale, dcaptures, options, apart)
    overlaps = not apart and kernel.may_overlap and not any(d is not None for d in dcaptures)
    overlaps = overlaps and plan.has_transfers
    lanes = Lanes(q.device)
    returns = _Returns(plan, home, lanes, options)
    with lanes.ahead(), _Walk(plan, Pair(k, v), lanes, returns) as walk:
        for number, step, held in walk:
            if number == 0:
                if step.mask is None:
                    _zero(home)
                    continue
                start = lanes.mark()
                if not overlaps:
                    calls.run(0, step, held, None if apart else home, queries=True)
                if apart or overlaps:
                    with lanes.behind(start, min(_MOST_ASKS, _asks(plan))) as way:
                        calls.run(0, step, held, home, queries=not apart, behind=way)
                continue
            gradients = returns.of(number, step, held)
            if step.mask is not None:
                calls.run(
                    number, step, held, gradients, queries=not apart, make_room=lanes.make_way
                )
            if apart and step.mask is not None:
                if number == len(plan.steps) - 1:
                    walk.post_last()  # beside dQ
                calls.run(number, step, held, None, queries=True)
        walk.post_last()
        if overlaps:
            lanes.meet()
        calls.round_queries()  # beside the last transfer
        walk.wait()
        home = returns.all_added(k.dtype)
    return calls.dq, *home


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
        self.apart, self.beside = apart, plan.has_transfers
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
        behind: Way | None = None,
        make_room: Callable[[], None] = lambda: None,
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
            beside=self.beside,
            behind=behind,
            make_room=make_room,
        )
        passes = "dQ, dK, dV" if queries and gradients else "dQ" if queries else "dK, dV"
        track = "compute" if behind is None else "behind"
        with computing(f"backward {passes}", number, track):
            self.kernel.backward(
                self.dout, self.q, *held, self.terms, step.mask, self.score, self.scale, wanted,
                self.options,
            )  # fmt: skip

    def round_queries(self) -> None:
        """`dq` is right, when all steps are done."""
        if self.running_q is not None and not self.apart:
            self.dq.copy_(self.running_q)


class _Walk:
    """Each step's number, the step and its K/V; meanwhile, the next exchange is under way.

    Args:
        local: K/V of this rank. lanes: what is left behind makes way for an exchange, and for what
            packs and unpacks. returns: in the backward, where dK/dV go.
    """

    def __init__(
        self, plan: Plan, local: Pair, lanes: Lanes, returns: _Returns | None = None
    ) -> None:
        self.plan, self.local, self.lanes, self.returns = plan, local, lanes, returns
        self.kept = {0: local}  # K/V that is still to be sent, by step
        self.last = {t.of: number for number, step in enumerate(plan.steps) for t in step.sends}
        self.number = 0
        self.arriving: Messages | None = None
        self.exchange: Exchange | None = None

    def __enter__(self) -> _Walk:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Where something failed, NCCL may still fill buffers that go now: their memory is not to
        be used again before."""
        if kind is not None and self.exchange is not None and _comm(self.plan).on_gpu:
            self.wait()

    def __iter__(self) -> Iterator[tuple[int, Step, Pair]]:
        for number, step in enumerate(self.plan.steps):
            held = self.local
            self.wait()
            if number > 0 and _moves(self.plan, number):
                self.lanes.make_way()
            if self.arriving is not None:
                held = self.arriving.unpack(self.local, step.width)
            if number in self.last:
                self.kept[number] = held
            self.number = number
            self._post()
            yield number, step, held

    def wait(self) -> None:
        """What was posted is here."""
        if self.exchange is not None:
            self.exchange.wait()
            self.exchange = None

    def post_last(self) -> None:
        """The last step's dK/dV, if they have not left."""
        if self.returns is not None and self.returns.waiting:
            self.wait()
            self._post()

    def _post(self) -> None:
        """The exchange beside the step that is next, if there is anything to exchange."""
        steps, number = self.plan.steps, self.number
        sends: list[tuple[int, Tensor]] = []
        receives: list[tuple[int, Tensor]] = []
        what: dict[str, int] = {}  # and of which step
        if number + 1 < len(steps):
            step = steps[number + 1]
            what["K/V"] = number + 1
            block_size = self.plan.layout.block_size
            self.arriving = Messages(step.receives, self.local, block_size)
            leaving = Messages(step.sends, self.local, block_size)
            leaving.pack(self.kept)
            sends += leaving.to_peers
            receives += self.arriving.to_peers
            self.kept = {of: x for of, x in self.kept.items() if self.last.get(of, 0) > number + 1}
            self.kept[0] = self.local
        else:
            self.arriving = None
        if self.returns is not None:
            if number > 1 or self.returns.packs:
                self.lanes.make_way()
            self.returns.settle()
        if self.returns is not None and self.returns.waiting:
            leaving, coming = self.returns.leave()
            sends += leaving.to_peers
            receives += coming.to_peers
            what["dK/dV"] = self.returns.number
        if sends or receives:
            self.lanes.make_way()
            self.exchange = _comm(self.plan).exchange(
                sends, receives, name=" and ".join(what), step=next(iter(what.values()))
            )


class _Returns:
    """dK/dV on their way: what an exchange brings is added where it belongs one step later. Those
    of a relay are kept until all that it collects are added, and leave with a later step's.

    Attributes:
        waiting: a step's dK/dV, or what others return meanwhile, are to be exchanged next.
    """

    def __init__(self, plan: Plan, home: Pair, lanes: Lanes, options: KernelOptions) -> None:
        self.plan, self.lanes = plan, lanes
        self.dtype = options.gradient_dtype or compute_dtype(home.k.dtype)
        # Of each step that collects for others, the last one that its dK/dV leave with.
        self.last = {
            t.of: number
            for number, step in enumerate(plan.steps)
            for t in step.returns
            if t.of < number
        }
        self.kept = {0: home}  # the local dK/dV and those of relays, by step
        self.number = 0
        self.own: Messages | None = None
        self.made: Pair | None = None  # to be packed
        self.coming: Messages | None = None
        # What came of the local dK/dV while these are left behind: messages, or their sum.
        self.held: list[Messages] = []
        self.others: Pair | None = None
        self.packed = self.waiting = False

    def of(self, number: int, step: Step, held: Pair) -> Pair | None:
        """Where the kernel leaves a step's dK/dV, if there are any. If one message takes all, that
        is the message, but for a relay: others' are added to its gradients."""
        self.number, self.waiting = number, bool(step.returns or step.collects)
        self.own, self.made = Messages(step.returns, held, self._block_size, self.dtype), None
        relays = number in self.last
        fills = self.own.is_buffer and step.returns[0].of == number
        self.packed = fills and not relays and step.returns[0].count == step.width
        if self.packed:
            made = self.own.unpack(held, step.width)
            if step.mask is None:  # what others of the node see of it, but not this share of heads
                _zero(made)
            return made
        if relays or step.mask is not None or any(t.of == number for t in step.returns):
            self.made = _new(held, compute_dtype(held.k.dtype))
            if step.mask is None:
                _zero(self.made)
            if relays:
                self.kept[number] = self.made
        return self.made

    @property
    def packs(self) -> bool:
        """Whether what is to be exchanged next must be packed."""
        return self.waiting and not self.packed

    def leave(self) -> tuple[Messages, Messages]:
        """What to send and what to receive: the kernel is launched that computes them, and what
        came before is added."""
        own, self.waiting = self.own, False
        assert own is not None
        if not self.packed:
            own.pack(self.kept if self.made is None else {**self.kept, self.number: self.made})
        self.made = self.own = None
        self.kept = {n: x for n, x in self.kept.items() if n == 0 or self.last[n] > self.number}
        home = self.kept[0]
        collects = self.plan.steps[self.number].collects
        self.coming = Messages(collects, home, self._block_size, self.dtype)
        return own, self.coming

    def settle(self) -> None:
        """Adds what came in; what is of the local K/V, while these are left behind, to one another
        as soon as it is more than they are."""
        coming, self.coming = self.coming, None
        if coming is None:
            return
        coming.add_to({n: x for n, x in self.kept.items() if n})
        if not any(t.of == 0 for t in coming.transfers):
            return
        if not self.lanes.meeting:
            coming.add_to({0: self.kept[0]})
            return
        self.held.append(coming)
        blocks = sum(t.count for m in self.held for t in m.transfers if t.of == 0)
        if self.others is not None or blocks > self.plan.steps[0].width * coming.groups:
            if self.others is None:
                self.others = _new(self.kept[0], self.kept[0].k.dtype)
                _zero(self.others)
            self._add_held(self.others)

    def _add_held(self, to: Pair) -> None:
        for messages in self.held:
            messages.add_to({0: to})
        self.held = []

    def all_added(self, dtype: torch.dtype) -> Pair:
        """Of the local K/V, in `dtype`."""
        home, others = self.kept[0], self.others
        if others is not None:
            if self.coming is not None:
                self.held.append(self.coming)
            self._add_held(others)
            self.lanes.meet()
            total = _new(home, dtype)
            for x, y, out in zip(home, others, total, strict=True):
                torch.add(x, y, out=out)
            return total
        self.lanes.meet()
        self._add_held(home)
        if self.coming is None:
            return Pair(*(x.to(dtype) for x in home))
        return self.coming.added_to(home, dtype)

    @property
    def _block_size(self) -> int:
        return self.plan.layout.block_size


def _asks(plan: Plan) -> int:
    """How often a backward asks what it left behind to make way, at most (a launch may ask twice):
    once too many costs little, but what nobody is prepared for waits until all is done."""
    last, found = len(plan.steps) - 1, 0
    for n in range(1, last + 1):
        found += _moves(plan, n) + 2 * (plan.steps[n].mask is not None) + (n > 1)
        found += _brings(plan, n + 1) or _returns(plan, n - 1)
    return found + 2 * _returns(plan, last)  # to pack, and to send


def _moves(plan: Plan, number: int) -> bool:
    """Whether a later step begins with launches, of what unpacks its K/V or packs the next's."""
    step = plan.steps[number]
    is_buffer = len(step.receives) == 1 and len(step.receives[0].blocks) == 1
    packs = number + 1 < len(plan.steps) and bool(plan.steps[number + 1].sends)
    return packs or not is_buffer


def _brings(plan: Plan, number: int) -> bool:
    """Whether there is such a step, and an exchange brings its K/V, or others'."""
    return any(step.sends or step.receives for step in plan.steps[number : number + 1])


def _returns(plan: Plan, number: int) -> bool:
    """Whether an exchange takes dK/dV of a step home, or others'."""
    return any(step.returns or step.collects for step in plan.steps[number : number + 1])


def _comm(plan: Plan) -> Communicator:
    assert plan.comm is not None  # validated before the first step
    return plan.comm


def _new(like: Pair, dtype: torch.dtype) -> Pair:
    return Pair(*(torch.empty(x.shape, dtype=dtype, device=x.device) for x in like))


def _zero(pair: Pair) -> None:
    for x in pair:
        x.zero_()
