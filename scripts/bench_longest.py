"""The longest sequence that one attention layer trains on: forward and backward.

    torchrun --nproc-per-node 4 scripts/bench_longest.py
    torchrun --nproc-per-node 2 scripts/bench_longest.py --merge --masks window documents

Memory is measured at two lengths, in plans that transfer nothing, where running out of it harms no
other rank; from these follows the length that fills `--share` of the GPU, which is tried in the
same way, and shorter ones if it does not fit. What fits is then run with all transfers, once, and
timed. Tensors are random, q, k, v, dout and the gradients in bf16. Memory does not depend on the
mask, time does; `--strategies ulysses` and others may be compared.

Prints a table, and writes JSON (after every row) to `benchmarks/results/longest.json`.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import ringflex as rf
from parallel_measure import MASKS, Contender, Spec, World, join, measure, problem, silent
from parallel_report import new_record
from ringflex.parallel.strategies import STRATEGIES

RESULTS = Path(__file__).resolve().parent.parent / "benchmarks" / "results"
_TRIES = 8
_SHRINK = 0.97  # of a length that does not fit


def longest(peak_at: Callable[[int], int | None], start: int, step: int, limit: int) -> int:
    """The largest multiple of `step` at which memory is at most `limit`, as far as it is linear.

    Args:
        peak_at: bytes that a length takes; None: more than there are.
        start: a length that surely fits, twice.

    Raises:
        RuntimeError: nothing fits.
    """
    half, whole = peak_at(start), peak_at(2 * start)
    if half is None or whole is None or whole <= half:
        raise RuntimeError(f"{2 * start:,} tokens do not fit: pass a smaller --start")
    per_token = (whole - half) / start
    tokens = int((limit - half) / per_token) + start
    for _ in range(_TRIES):
        tokens = tokens // step * step
        peak = peak_at(tokens) if tokens > 2 * start else whole
        if peak is not None and peak <= limit:
            return max(tokens, 2 * start)
        tokens = int(tokens * _SHRINK)
    raise RuntimeError(f"nothing fits near {tokens:,} tokens")


class Layer:
    """Attention of one mask over the ranks, by one strategy."""

    def __init__(
        self, world: World, arguments: argparse.Namespace, mask: str, strategy: str
    ) -> None:
        self.world, self.arguments, self.mask, self.strategy = world, arguments, mask, strategy

    def plan(self, tokens: int) -> tuple[rf.Plan, int]:
        """And the visible pairs a head."""
        a = self.arguments
        spec = Spec(
            mask=self.mask, tokens=tokens, heads=a.heads, kv_heads=a.kv_heads, dim=a.dim,
            dtype=torch.bfloat16,
        )  # fmt: skip
        p = problem(spec, torch.device("cpu"))  # the ids of documents are moved when they are used
        return rf.plan(p.mask_mod, tokens, strategy=self.strategy), p.pairs

    def tensors(self, plan: rf.Plan) -> tuple[torch.Tensor, ...]:
        a = self.arguments
        sizes = [(1, heads, plan.local_len, a.dim) for heads in (a.heads, a.kv_heads)]
        make = partial(torch.randn, device=self.world.device, dtype=torch.bfloat16)
        q, k, v = (make(sizes[i]).requires_grad_() for i in (0, 1, 1))
        return q, k, v, make(sizes[0])

    def peak_at(self, tokens: int) -> int | None:
        """Most bytes in use on any rank, inputs included, without transfers."""
        plan = silent(self.plan(tokens)[0], self.world)
        found: int | None = None
        _free()
        torch.cuda.reset_peak_memory_stats()
        try:
            *leaves, dout = self.tensors(plan)
            torch.autograd.grad(self._attend(plan, *leaves), leaves, dout)
            self.world.synchronize()
            found = torch.cuda.max_memory_allocated()
        except torch.OutOfMemoryError:
            pass
        leaves, dout = [], None
        _free()
        ranks = self.world.gather(found)
        return None if None in ranks else max(ranks)

    def run(self, tokens: int) -> dict[str, Any]:
        """With transfers: milliseconds, TFLOP/s per GPU, bytes."""
        plan, pairs = self.plan(tokens)
        contender = Contender(name="", run=partial(self._attend, plan))
        torch.cuda.reset_peak_memory_stats()
        found = measure(self.world, contender, self.tensors(plan), None)
        peak = torch.cuda.max_memory_allocated()
        a = self.arguments
        flops = pairs * a.heads * a.dim / self.world.size
        return {
            "tokens": tokens, "strategy": plan.strategy, "layout": plan.layout.name,
            "forward": found["forward"], "both": found["both"],
            "both_tflops": 14 * flops / found["both"] / 1e9,
            "peak_in_all": max(self.world.gather(peak)),
        }  # fmt: skip

    def _attend(self, plan: rf.Plan, *tensors: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = rf.flex_attention(*tensors, block_mask=plan, enable_gqa=True)
        return out


def _free() -> None:
    gc.collect()
    torch.cuda.empty_cache()


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| mask | GPUs | strategy | longest sequence, tokens | forward / both, s "
        "| TFLOP/s per GPU | memory, GiB |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row['mask']} | {row['gpus']} | {row['layout']}, {row['strategy']} "
            f"| {row['tokens']:,} | {row['forward'] / 1e3:.2f} / {row['both'] / 1e3:.2f} "
            f"| {row['both_tflops']:.0f} | {row['peak_in_all'] / 2**30:.1f} |"
        )
    return "\n".join(lines)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--masks", nargs="+", default=["window"], choices=MASKS)
    parser.add_argument(
        "--strategies", nargs="+", default=["auto"], choices=["auto", *STRATEGIES, "ulysses"]
    )
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--start", type=int, default=131072, help="tokens a GPU, tried first")
    parser.add_argument("--share", type=float, default=0.95, help="of the GPU's free memory")
    parser.add_argument("--timeout", type=float, default=120, help="seconds; longer than any run")
    parser.add_argument("--output", type=Path, default=RESULTS / "longest.json")
    parser.add_argument("--merge", action="store_true", help="add to what the output holds")
    parser.add_argument("--commit", help="the commit measured, where git cannot tell")
    arguments = parser.parse_args()
    arguments.device = "cuda"
    return arguments


def main() -> None:
    arguments = parse()
    world = join("cuda", arguments.timeout)
    record = world.first(lambda: new_record(arguments))
    if isinstance(record, str):
        sys.exit(record)
    free = min(world.gather(torch.cuda.mem_get_info()[0]))
    limit = int(free * arguments.share)
    for mask in arguments.masks:
        for strategy in arguments.strategies:
            layer = Layer(world, arguments, mask, strategy)
            step = 1024 * world.size
            tokens = longest(layer.peak_at, arguments.start * world.size, step, limit)
            row = {"mask": mask, "gpus": world.size, "memory_limit": limit, **layer.run(tokens)}
            _free()
            if world.rank:
                continue
            row["command"] = len(record["commands"]) - 1
            record["rows"].append(row)
            arguments.output.parent.mkdir(parents=True, exist_ok=True)
            arguments.output.write_text(json.dumps(record, indent=1) + "\n")
            print(table([row]).splitlines()[-1], flush=True)
    if world.rank == 0:
        print(table(record["rows"]))
    world.gather(None)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
