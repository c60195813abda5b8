"""Times what each rank of several would compute, one after the other, on one GPU.

    python scripts/bench_ranks.py                                  # every mask, 64k over 2, 4, 8
    python scripts/bench_ranks.py --masks window --lengths 16384 65536 --ranks 4

Needs no process group: a copy of noise within the GPU stands for each transfer. So it shows what is
lost where transfers are hidden: to shares that are not even, to the beginnings and ends of kernels,
to merging. What bench_parallel.py measures on several GPUs beyond that is transfers, and the host:
here calls are given far ahead.

Efficiency is the time of the whole problem over W times that of the slowest rank of W, forward, and
forward with backward. All ranks and the whole problem take turns, in shuffled order. Prints a line
for each case, and writes JSON to `benchmarks/results/`. On a CPU it only shows that it works.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import statistics
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import ringflex as rf
from parallel_measure import (
    MASKS,
    Contender,
    Spec,
    World,
    attention,
    default_device,
    inputs,
    measure,
    problem,
    silent,
)
from parallel_report import new_record
from ringflex.parallel.strategies import STRATEGIES

RESULTS = Path(__file__).resolve().parent.parent / "benchmarks" / "results"
WHOLE = "one GPU"
_LEAD = 20_000_000  # cycles
_ROUNDS = 3


class FarAhead(World):
    """One rank, whose host is ahead of its GPU by about 10 ms."""

    def head_start(self) -> None:
        if self.on_gpu:
            torch.cuda._sleep(_LEAD)


def contenders(
    world: World, spec: Spec, ranks: int, strategy: str, backend: str
) -> dict[str, tuple[Contender, tuple[Tensor, ...]]]:
    """The whole problem, and each rank's part of it, with their inputs."""
    p, S = problem(spec, world.device), spec.tokens
    whole = rf.create_block_mask(p.mask_mod, None, None, S, S, device=world.device)
    made = {WHOLE: Contender(name=WHOLE, run=attention(whole, backend))}
    for plan in rf.plan_all(p.mask_mod, S, ranks, strategy=strategy):
        name = f"rank {plan.rank}"
        run = attention(silent(plan, world), backend)
        made[name] = Contender(name=name, run=run, positions=plan.positions)
    return {name: (c, inputs(spec, world.device, c)) for name, c in made.items()}


def bench(
    world: World, spec: Spec, ranks: int, strategy: str, backend: str, seconds: float
) -> dict[str, Any]:
    """Milliseconds of the whole and of each rank, and efficiencies."""
    cases = contenders(world, spec, ranks, strategy, backend)
    times: dict[str, list[dict[str, Any]]] = {name: [] for name in cases}
    order, shuffled = list(cases), random.Random(0)
    for _ in range(_ROUNDS):
        shuffled.shuffle(order)
        for name in order:
            times[name].append(measure(world, *cases[name], seconds / _ROUNDS))
    row: dict[str, Any] = {**asdict(spec), "dtype": str(spec.dtype).removeprefix("torch.")}
    row |= {"ranks": ranks, "strategy": strategy}
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
    parser.add_argument("--seconds", type=float, default=0.5, help="for each rank")
    parser.add_argument("--device", choices=["cuda", "cpu"], default=default_device())
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--commit", help="the commit measured, where git cannot tell")
    parser.add_argument("--output", type=Path, default=RESULTS / "ranks.json")
    parser.add_argument("--merge", action="store_true", help="add to what the output holds")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    world = FarAhead(rank=0, size=1, device=device, control=None)
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
        how = arguments.strategy, arguments.backend, arguments.seconds
        row = bench(world, spec, ranks, *how) | {"command": len(record["commands"]) - 1}
        record["rows"].append(row)
        print(line(row), flush=True)
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
