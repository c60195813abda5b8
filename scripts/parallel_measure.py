"""What bench_parallel.py measures, and how: the problems, the ranks, the clock."""

from __future__ import annotations

import dataclasses
import datetime
import functools
import itertools
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

import problems
import ringflex as rf
from problems import Problem
from ringflex.parallel.comm import Communicator

MASKS = ("causal", "window", "documents", "mixed", "full")
CYCLES = 1_750_000  # of a GPU, in a millisecond
_TURNS, _CALLS = 5, 40  # the most of each contender, and of each turn
_CONTROL_TIMEOUT = datetime.timedelta(minutes=20)  # while one rank compiles or computes alone
Run = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class Spec:
    """One problem: batch 1."""

    mask: str
    tokens: int
    heads: int
    kv_heads: int
    dim: int
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"{self.mask}, {self.tokens:,}"


def problem(spec: Spec, device: torch.device) -> Problem:
    """That of `problems`, with a mask in any case, as plans are made of. Below 16,384 tokens
    windows and documents shrink in proportion."""
    found = problems.problem(spec.mask, spec.tokens, device, shrink=True)
    return dataclasses.replace(found, mask_mod=found.mask_mod or rf.full())


@dataclass(frozen=True, kw_only=True)
class World:
    """The ranks, as one of them sees them.

    Attributes:
        control: a gloo group with a long timeout, for what ranks tell each other and for waiting
            while one of them works; None: this rank by itself.
    """

    rank: int
    size: int
    device: torch.device
    control: Any

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def alone(self) -> World:
        return World(rank=0, size=1, device=self.device, control=None)

    def gather(self, x: Any) -> list[Any]:
        """Every rank's object; they wait for each other."""
        if self.control is None:
            return [x]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, x, group=self.control)
        return found

    def first(self, make: Callable[[], Any]) -> Any:
        """What rank 0 makes while the others wait."""
        made = [make() if self.rank == 0 else None]
        if self.control is not None:
            dist.broadcast_object_list(made, src=0, group=self.control)
        return made[0]

    def together(self, make: Callable[[], Any]) -> Any:
        """What this rank makes; raises on every rank if it fails on one. Ranks that compile at
        different speeds wait here, as NCCL would not wait for long."""
        made, error = None, None
        try:
            made = make()
        except Exception as raised:
            error = raised
        errors = self.gather(None if error is None else describe(error))
        if error is not None:
            raise error
        for rank, text in enumerate(errors):
            if text is not None:
                raise RuntimeError(f"rank {rank}: {text}")
        return made

    def align(self) -> None:
        """All ranks have finished and start together; not to be timed."""
        if self.control is not None:
            dist.barrier(device_ids=[self.device.index] if self.on_gpu else None)
        self.synchronize()

    def head_start(self, more: float = 0.0) -> None:
        """The host runs ahead of the GPU by about 2 ms, as it does in a training step, or more."""
        if self.on_gpu:
            torch.cuda._sleep(int(CYCLES * (2 + more)))

    def synchronize(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()

    def mark(self) -> Any:
        """A point in time: on a GPU, in its stream."""
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def milliseconds(self, start: Any, end: Any) -> float:
        return start.elapsed_time(end) if self.on_gpu else (end - start) * 1e3


def default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def join(device: str, timeout: float) -> World:
    """The ranks that torchrun started: NCCL on GPUs, gloo on CPUs.

    timeout: seconds; longer than any collective.
    """
    if "WORLD_SIZE" not in os.environ:
        sys.exit(f"start it with torchrun --nproc-per-node N {sys.argv[0]}")
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    limit = datetime.timedelta(seconds=timeout)
    where = torch.device("cpu")
    if device == "cuda":
        where = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(where)
        dist.init_process_group("nccl", timeout=limit, device_id=where)
    else:
        torch.set_num_threads(1)
        dist.init_process_group("gloo", timeout=limit)
    control = dist.new_group(backend="gloo", timeout=_CONTROL_TIMEOUT)
    return World(rank=rank, size=size, device=where, control=control)


def describe(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]


@dataclass(frozen=True, kw_only=True)
class Contender:
    """Something to time.

    Attributes:
        run: `(q, k, v) -> out` of this rank.
        positions: global position of each local slot; None: the whole sequence.
        tokens_first: tensors are `[B, S, H, D]`.
        plan: ours.
        warm: compiles for these q, k, v, with no collective.
        context: what to run in.
    """

    name: str
    run: Run
    positions: Tensor | None = None
    tokens_first: bool = False
    plan: rf.Plan | None = None
    warm: Run | None = None
    context: Callable[[], AbstractContextManager[Any]] = nullcontext


def attention(block_mask: Any, backend: str) -> Run:
    """Ours, by a plan, or on one device by a block mask."""
    return functools.partial(
        rf.flex_attention, block_mask=block_mask, enable_gqa=True, backend=backend
    )


def inputs(spec: Spec, device: torch.device, contender: Contender) -> tuple[Tensor, ...]:
    """This rank's q, k, v, dout of one and the same global problem."""
    made = []
    heads = (spec.heads, spec.kv_heads, spec.kv_heads, spec.heads)
    for seed, h in enumerate(heads):
        generator = torch.Generator(device).manual_seed(seed)
        x = torch.randn(
            1, h, spec.tokens, spec.dim, generator=generator, device=device, dtype=spec.dtype
        )
        if contender.positions is not None:
            x = x.index_select(2, contender.positions.to(device).clamp(max=spec.tokens - 1))
        made.append(x.transpose(1, 2).contiguous() if contender.tokens_first else x)
    return *(x.requires_grad_() for x in made[:3]), made[3]


Case = tuple[Contender, tuple[Tensor, ...]]


def measure(
    world: World,
    contender: Contender,
    tensors: tuple[Tensor, ...],
    seconds: float | None,
    inspect: Callable[[list[Tensor]], None] | None = None,
) -> dict[str, Any]:
    """`measure_in_turn` of one."""
    return measure_in_turn(world, [(contender, tensors)], seconds, inspect)[0]


def measure_in_turn(
    world: World,
    cases: Sequence[Case],
    seconds: float | None,
    inspect: Callable[[list[Tensor]], None] | None = None,
) -> list[dict[str, Any]]:
    """Of each contender with its tensors, medians over turns: milliseconds of a forward and of
    forward + backward on the slowest rank, and on every rank; milliseconds that the host takes to
    issue them; the largest rank's peak memory beyond what it had before, bytes.

    Contenders take turns, there and back, of several calls in a row: GPUs slow down when they get
    hot, and speed up when they pause.

    Args:
        seconds: how long to repeat the first, in five turns, but in fewer where a call takes long.
            None: only the first run, which is not timed otherwise.
        inspect: is given the first contender's out, dq, dk, dv, of its first run.
    """
    runs = [_Runs(world, *case) for case in cases]
    for run in runs:
        run.first(inspect if run is runs[0] else None)
    if seconds is not None:
        for run in runs:
            run.first()
        slowest = max(world.gather(runs[0].times[0].both)) / 1e3  # seconds
        turns = min(_TURNS, max(1 if slowest > 1.5 else _TURNS, int(seconds / slowest)))
        for run in runs:
            run.prepare(min(_CALLS, max(1, int(seconds / turns / slowest))))
        for i in range(turns):
            for run in runs[:: -1 if i % 2 else 1]:
                run.times.append(run.turn()[0])
    return [run.found() for run in runs]


class _Times(NamedTuple):
    """Milliseconds of a call: forward and both, passed in the stream, then on the host."""

    forward: float
    both: float
    host_forward: float
    host_both: float


class _Runs:
    """Of one contender: what `measure_in_turn` tells."""

    def __init__(self, world: World, contender: Contender, tensors: tuple[Tensor, ...]) -> None:
        self.world, self.contender, self.tensors = world, contender, tensors
        self.times: list[_Times] = []
        self.peak: int | None = None
        self.calls, self.late = 1, 0.0

    def first(self, inspect: Callable[[list[Tensor]], None] | None = None) -> None:
        """A call that counts, unless others follow; also its memory."""
        peak = _Peak(self.world)
        times, results = self.turn()
        self.times, self.peak = [times], peak.bytes()
        if inspect is not None:
            inspect(results)

    def prepare(self, calls: int) -> None:
        """For turns of so many calls, which count: the host is ahead of all of them."""
        late = max(0.0, self.times[0].host_both - self.times[0].both)
        self.calls, self.late, self.times = calls, max(self.world.gather(late)), []

    def turn(self) -> tuple[_Times, list[Tensor]]:
        """Of its calls the means, and the results of the last."""
        world, (*leaves, dout) = self.world, self.tensors
        world.align()
        world.head_start(self.calls * self.late)
        marks, clock = [world.mark()], [time.perf_counter()]
        for _ in range(self.calls):
            out = self.contender.run(*leaves)
            marks.append(world.mark())
            clock.append(time.perf_counter())
            grads = torch.autograd.grad(out, leaves, dout)
            marks.append(world.mark())
            clock.append(time.perf_counter())
        world.synchronize()
        passed = [world.milliseconds(*pair) for pair in itertools.pairwise(marks)]
        taken = [(end - start) * 1e3 for start, end in itertools.pairwise(clock)]
        forward, both, host_forward, host_both = (
            sum(times) / self.calls for times in (passed[::2], passed, taken[::2], taken)
        )
        return _Times(forward, both, host_forward, host_both), [out.detach(), *grads]

    def found(self) -> dict[str, Any]:
        everybody = self.world.gather((self.times, self.peak))
        turns = list(zip(*(times for times, _ in everybody), strict=True))  # each of all ranks
        of_slowest = {
            name: statistics.median(max(getattr(rank, name) for rank in turn) for turn in turns)
            for name in _Times._fields
        }
        by_rank = {
            f"{way}_by_rank": [
                statistics.median(getattr(t, way) for t in times) for times, _ in everybody
            ]
            for way in ("forward", "both")
        }
        return {
            **of_slowest,
            **by_rank,
            "turns": len(turns),
            "calls": self.calls,
            "peak": max((p for _, p in everybody if p is not None), default=None),
        }


class _Peak:
    """The most memory in use from now on, beyond what is in use now."""

    def __init__(self, world: World) -> None:
        self.world, self.before = world, 0
        world.synchronize()
        if world.on_gpu:
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()

    def bytes(self) -> int | None:
        return torch.cuda.max_memory_allocated() - self.before if self.world.on_gpu else None


@dataclass(frozen=True)
class Sample:
    """Some tokens' out, dq, dk, dv of one device, to compare with."""

    positions: Tensor
    rows: list[Tensor]  # [1, heads, sample, D], on the CPU

    @staticmethod
    def positions_of(tokens: int) -> Tensor:
        return torch.linspace(0, tokens - 1, min(tokens, 512), dtype=torch.float64).long().unique()

    @classmethod
    def of(cls, results: list[Tensor]) -> Sample:
        at = cls.positions_of(results[0].shape[2])
        return cls(at, [x.index_select(2, at.to(x.device)).cpu() for x in results])

    def difference(self, world: World, contender: Contender, results: list[Tensor]) -> float:
        """Root mean square of the difference, relative; the worst of out, dq, dk, dv."""
        assert contender.positions is not None
        slots = torch.isin(contender.positions, self.positions).nonzero()[:, 0]
        among = torch.searchsorted(self.positions, contender.positions[slots])
        sums = []
        for x, rows in zip(results, self.rows, strict=True):
            x = x.transpose(1, 2) if contender.tokens_first else x
            found = x.index_select(2, slots.to(x.device)).cpu().double()
            wanted = rows[:, :, among].double()
            sums.append([((found - wanted) ** 2).sum().item(), (wanted**2).sum().item()])
        total = torch.tensor(world.gather(sums), dtype=torch.float64).sum(0)
        return (total[:, 0] / total[:, 1]).sqrt().max().item()


class SilentCommunicator(Communicator):
    """Transfers nothing; needs no process group. What should arrive is noise, copied at the same
    time within the device: zeros or NaN would let a GPU run faster, as it has power to spare."""

    def __init__(self, rank: int, size: int, on_gpu: bool) -> None:
        self.rank, self.size, self.on_gpu = rank, size, on_gpu
        self.bytes_sent = self.bytes_received = 0

    def agree(
        self, what: str, digest: bytes, error: BaseException | None = None, count: int = 0
    ) -> list[int]:
        if error is not None:
            raise error
        return [count] * self.size

    def exchange(
        self,
        sends: Sequence[tuple[int, Tensor]],
        receives: Sequence[tuple[int, Tensor]],
        **kwargs: Any,
    ) -> Any:
        side = _side_stream() if self.on_gpu else None
        if side is not None:
            side.wait_stream(torch.cuda.current_stream())
        with nullcontext() if side is None else torch.cuda.stream(side):
            for _, x in receives:
                noise = _noise(x.dtype, x.device)
                for part in x.view(-1).split(noise.numel()):
                    part.copy_(noise[: part.numel()])
        return Arrived(side)


class Arrived(NamedTuple):
    side: torch.cuda.Stream | None

    def wait(self) -> None:
        if self.side is not None:
            torch.cuda.current_stream().wait_stream(self.side)


@functools.cache
def _side_stream() -> torch.cuda.Stream:
    return torch.cuda.Stream(priority=-2)


@functools.cache
def _noise(dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.randn(1 << 24, dtype=dtype, device=device)


def silent(plan: rf.Plan, world: World) -> rf.Plan:
    """The same plan, computing the same steps without any transfer between ranks."""
    comm = SilentCommunicator(plan.rank, plan.world_size, world.on_gpu)
    nodes = None if plan.nodes is None else silent(plan.nodes, world)
    return dataclasses.replace(plan, comm=comm, nodes=nodes)
