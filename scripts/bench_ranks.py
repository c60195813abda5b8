"""Times what each rank of several would compute, one after the other, on one GPU.

    python scripts/bench_ranks.py                                  # every mask, 64k over 2, 4, 8
    python scripts/bench_ranks.py --masks window --lengths 16384 65536 --ranks 4

Needs no process group. For a transfer stands one from the host, of fewer bytes, which takes as long
as at a rate between GPUs (`--rate`, GB/s) and needs no multiprocessor; what should arrive is noise,
and the time to make it does not count. So it shows what is lost where transfers are hidden: to
shares that are not even, to the beginnings and ends of kernels, to packing and merging. What
bench_parallel.py measures on several GPUs beyond that is NCCL, and the host: here calls are given
far ahead.

Efficiency is the time of the whole problem over W times that of the slowest rank of W, forward, and
forward with backward. All ranks and the whole problem take turns, in shuffled order. Prints a line
for each case, and writes JSON to `benchmarks/results/`. On a CPU it only shows that it works.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import random
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import ringflex as rf
from parallel_measure import (
    CYCLES,
    MASKS,
    Arrived,
    Contender,
    SilentCommunicator,
    Spec,
    World,
    attention,
    default_device,
    inputs,
    measure,
    problem,
)
from parallel_report import new_record
from ringflex.parallel.strategies import STRATEGIES

RESULTS = Path(__file__).resolve().parent.parent / "benchmarks" / "results"
WHOLE = "one GPU"
_LEAD = 20_000_000  # cycles
_ROUNDS = 3
_LATENCY = 15e-6  # seconds, of a transfer
_HEAD_START = 15_000  # cycles, as `comm` gives to transfers


class FarAhead(World):
    """One rank, whose host is ahead of its GPU by about 10 ms, or more. Pauses do not count."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(rank=0, size=1, device=device, control=None)
        self.pauses: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self.marked = 0  # of them, up to the last mark

    def head_start(self, more: float = 0.0) -> None:
        if self.on_gpu:
            torch.cuda._sleep(_LEAD + int(CYCLES * more))

    def mark(self) -> Any:
        """And how many pauses there were until then."""
        self.marked = len(self.pauses)
        return super().mark(), self.marked

    def milliseconds(self, start: Any, end: Any) -> float:
        between = self.pauses[start[1] : end[1]]
        paused = sum(begin.elapsed_time(over) for begin, over in between)
        return super().milliseconds(start[0], end[0]) - paused


class Wire(SilentCommunicator):
    """Transfers that take as long as at a rate. The first of a forward or backward arrives before
    it begins, in a pause; K/V of later ones while it is under way; of later dK/dV, nothing."""

    def __init__(self, rank: int, world: FarAhead, size: int, rate: float) -> None:
        super().__init__(rank, size, world.on_gpu)
        self.world, self.rate = world, rate

    def exchange(
        self,
        sends: Sequence[tuple[int, Tensor]],
        receives: Sequence[tuple[int, Tensor]],
        **kwargs: Any,
    ) -> Any:
        if not self.on_gpu:
            return super().exchange(sends, receives, **kwargs)
        side = _side_stream()
        if len(self.world.pauses) == self.world.marked:  # nothing would go on meanwhile
            begin, over = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            super().exchange(sends, receives, **kwargs).wait()
            over.record()
            self.world.pauses.append((begin, over))
        elif "K/V" in kwargs.get("name", ""):
            side.wait_stream(super().exchange([], receives, **kwargs).side)
        side.wait_stream(torch.cuda.current_stream())
        most = max(sum(x.nbytes for _, x in way) for way in (sends, receives))
        with torch.cuda.stream(side):
            _occupy_host_link(_LATENCY + most / self.rate)
        torch.cuda._sleep(_HEAD_START)
        return Arrived(side)


@functools.cache
def _side_stream() -> torch.cuda.Stream:
    return torch.cuda.Stream(priority=-2)


def _occupy_host_link(seconds: float) -> None:
    there, here, rate = _host_link()
    left = int(seconds * rate / there.itemsize)
    while left > 0:
        part = min(left, there.numel())
        here[:part].copy_(there[:part], non_blocking=True)
        left -= part


@functools.cache
def _host_link() -> tuple[Tensor, Tensor, float]:
    """Memory of the host and of the GPU, and bytes per second from one to the other."""
    there = torch.ones(1 << 23).pin_memory()
    here = torch.empty(1 << 23, device="cuda")
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
    for event in events:  # the second copy is timed
        here.copy_(there, non_blocking=True)
        event.record()
    torch.cuda.synchronize()
    return there, here, there.nbytes / events[0].elapsed_time(events[1]) * 1e3


def contenders(
    world: FarAhead, spec: Spec, ranks: int, strategy: str, backend: str, rate: float
) -> dict[str, tuple[Contender, tuple[Tensor, ...]]]:
    """The whole problem, and each rank's part of it, with their inputs."""
    p, S = problem(spec, world.device), spec.tokens
    whole = rf.create_block_mask(p.mask_mod, None, None, S, S, device=world.device)
    made = {WHOLE: Contender(name=WHOLE, run=attention(whole, backend))}
    for plan in rf.plan_all(p.mask_mod, S, ranks, strategy=strategy):
        name = f"rank {plan.rank}"
        run = attention(wired(plan, world, rate), backend)
        made[name] = Contender(name=name, run=run, positions=plan.positions)
    return {name: (c, inputs(spec, world.device, c)) for name, c in made.items()}


def wired(plan: rf.Plan, world: FarAhead, rate: float) -> rf.Plan:
    """The same plan by itself."""
    nodes = None if plan.nodes is None else wired(plan.nodes, world, rate)
    comm = Wire(plan.rank, world, plan.world_size, rate)
    return replace(plan, comm=comm, nodes=nodes)


def bench(
    world: FarAhead,
    spec: Spec,
    ranks: int,
    strategy: str,
    backend: str,
    rate: float,
    seconds: float,
) -> dict[str, Any]:
    """Milliseconds of the whole and of each rank, and efficiencies."""
    cases = contenders(world, spec, ranks, strategy, backend, rate)
    times: dict[str, list[dict[str, Any]]] = {name: [] for name in cases}
    order, shuffled = list(cases), random.Random(0)
    for _ in range(_ROUNDS):
        shuffled.shuffle(order)
        for name in order:
            times[name].append(measure(world, *cases[name], seconds / _ROUNDS))
    row: dict[str, Any] = {**asdict(spec), "dtype": str(spec.dtype).removeprefix("torch.")}
    row |= {"ranks": ranks, "strategy": strategy, "rate": rate}
    for way in ("forward", "both"):
        found = {name: statistics.median(t[way] for t in of) for name, of in times.items()}
        row[f"one_{way}"] = found.pop(WHOLE)
        row[f"{way}_by_rank"] = list(found.values())
        row[f"{way}_efficiency"] = row[f"one_{way}"] / ranks / max(found.values())
    return row


def line(row: dict[str, Any]) -> str:
    even = row["one_forward"] / row["ranks"], row["one_both"] / row["ranks"]
    by_rank = [
        " ".join(f"{t / of:.2f}" for t in row[f"{way}_by_rank"])
        for way, of in zip(("forward", "both"), even, strict=True)
    ]
    return (
        f"{row['mask']}, {row['tokens']:,} over {row['ranks']}: efficiency "
        f"{row['forward_efficiency']:.3f} forward, {row['both_efficiency']:.3f} with the backward; "
        f"by rank, of an even share: {by_rank[0]}; {by_rank[1]}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--masks", nargs="+", default=list(MASKS), choices=MASKS)
    parser.add_argument("--lengths", nargs="+", type=int, default=[65_536])
    parser.add_argument("--ranks", nargs="+", type=int, default=[2, 4, 8])
    parser.add_argument("--strategy", default="direct", choices=["auto", *STRATEGIES])
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--rate", type=float, default=330, help="GB/s of a transfer")
    parser.add_argument("--seconds", type=float, default=0.5, help="for each rank")
    parser.add_argument("--device", choices=["cuda", "cpu"], default=default_device())
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--commit", help="the commit measured, where git cannot tell")
    parser.add_argument("--output", type=Path, default=RESULTS / "ranks.json")
    parser.add_argument("--merge", action="store_true", help="add to what the output holds")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    world = FarAhead(device)
    dtype = torch.bfloat16 if world.on_gpu else torch.float32
    record = new_record(arguments)
    if isinstance(record, str):
        sys.exit(record)
    for mask, tokens, ranks in itertools.product(
        arguments.masks, arguments.lengths, arguments.ranks
    ):
        spec = Spec(
            mask=mask, tokens=tokens, heads=arguments.heads, kv_heads=arguments.kv_heads,
            dim=arguments.dim, dtype=dtype,
        )  # fmt: skip
        how = arguments.strategy, arguments.backend, arguments.rate * 1e9, arguments.seconds
        row = bench(world, spec, ranks, *how) | {"command": len(record["commands"]) - 1}
        record["rows"].append(row)
        print(line(row), flush=True)
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
