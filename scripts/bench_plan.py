"""Times planning on one core: one rank's part of a plan, beside torch's block masks.

    python scripts/bench_plan.py            # table and JSON; about three minutes
    python scripts/bench_plan.py --quick    # up to 1 Mi tokens

The mask is causal & window of 4,096 & documents (log-normal lengths, mean about 3k). What is timed
is all that one rank computes, from the Python function to its steps: tracing, hashing and copying
what the mask captures, its rows, and the schedule; `auto` also outlines its share of the mask and
chooses the layout. What the other ranks tell is made beforehand, and the exchange of it (a few
kilobytes) is left out. torch's part is the block mask of this rank's queries against all keys, for
which it evaluates every element: by `create_block_mask`, up to 32,768 tokens, and by what its
context parallelism has, which compiles that (a private function; it needs a C++ compiler), up to
131,072.

Times are medians, with one thread; memory is the growth of a fresh process's peak (Linux: VmHWM,
reset after a small plan), copies of what is captured included.
"""

from __future__ import annotations

import argparse
import functools
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.nn.attention.flex_attention import create_block_mask as torch_block_mask

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import ringflex as rf
from commit import current_commit
from ringflex.masks.runs import Array
from ringflex.parallel.draft import Draft, Request

RESULTS = Path(__file__).resolve().parent.parent / "benchmarks" / "results"
WINDOW = 4096
Ki, Mi = 1 << 10, 1 << 20
SIZES = (
    (16 * Ki, 8), (32 * Ki, 8), (128 * Ki, 8), (Mi, 8), (Mi, 64), (16 * Mi, 64), (16 * Mi, 1024),
)  # fmt: skip
CONTENDERS = ("contiguous", "zigzag", "auto", "torch", "torch-cp")
TORCH = {"torch": "torch create_block_mask", "torch-cp": "torch context parallel, compiled"}
_LONGEST = {"torch": 32 * Ki, "torch-cp": 128 * Ki, "auto": Mi}


def doc_ids(tokens: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.empty(tokens // 256).log_normal_(7.5, 1.0, generator=generator).long() + 1
    return torch.repeat_interleave(torch.arange(lengths.numel()), lengths)[:tokens]


class Problem:
    """One rank's part of a plan. `told`: what all ranks tell, for its layout; see `Draft`."""

    def __init__(self, tokens: int, ranks: int, contender: str) -> None:
        self.tokens, self.ranks, self.rank, self.contender = tokens, ranks, ranks // 2, contender
        self.ids = doc_ids(tokens)
        self.surveys: list[Array] = []
        self.told: list[Array] = []

    def draft(self) -> Draft:
        mask = rf.causal() & rf.sliding_window(WINDOW - 1) & rf.document(self.ids)
        request = Request(
            seq_len=self.tokens, world_size=self.ranks, B=None, H=None,
            layout=self.contender, strategy="auto", block_size=128,
        )  # fmt: skip
        return Draft({"": mask}, request)

    def hear(self) -> None:
        """What the other ranks tell."""
        if self.contender in TORCH:
            return
        draft = self.draft()
        if draft.layout is None:
            self.surveys = [draft.survey(rank) for rank in range(self.ranks)]
            draft.choose(self.surveys)
        for rank in range(self.ranks):
            self.told.append(draft.needs(rank))
            draft.rows.clear()

    def run(self) -> Any:
        if self.contender in TORCH:
            return self._torch() if self.contender == "torch" else self._torch_compiled()
        draft = self.draft()
        draft.identity()
        if draft.layout is None:
            draft.survey(self.rank)
            draft.choose(self.surveys)
        draft.needs(self.rank)
        draft.hear(self.told)
        return draft.plans(self.rank, None)[""]

    def _torch(self) -> Any:
        ids, share = self.ids, self.tokens // self.ranks
        first = self.rank * share

        def mask(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
            q_idx = q_idx + first
            near = (q_idx >= kv_idx) & (q_idx - kv_idx < WINDOW)
            return near & (ids[q_idx] == ids[kv_idx])

        return torch_block_mask(mask, None, None, share, self.tokens, device="cpu")

    def _torch_compiled(self) -> Any:
        from torch.distributed.tensor.experimental._context_parallel import _attention

        ids, S = self.ids, self.tokens

        def mask(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
            near = (q_idx >= kv_idx) & (q_idx - kv_idx < WINDOW)
            return near & (ids[q_idx] == ids[kv_idx])

        mesh = _mesh_of_nobody(self.ranks, self.rank)
        return _attention._create_cp_block_mask(mask, 1, 1, S, S, mesh)


@functools.cache
def _mesh_of_nobody(ranks: int, rank: int) -> DeviceMesh:
    """Of this rank alone: nothing is ever sent."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if dist.is_initialized():
        dist.destroy_process_group()
    dist.init_process_group("fake", rank=rank, world_size=ranks, store=FakeStore())
    return init_device_mesh("cpu", (ranks,))


def milliseconds(run: Callable[[], Any]) -> float:
    run()
    times = []
    while len(times) < 5 or (sum(times) < 1.0 and len(times) < 50):
        started = time.perf_counter()
        run()
        times.append(time.perf_counter() - started)
    return statistics.median(times) * 1e3


def peak_megabytes(problem: Problem) -> float:
    """In this process, which should be fresh."""
    small = Problem(4 * Ki, 2, problem.contender)
    small.hear()
    small.run()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before = _status_kib("VmRSS")
    kept = problem.run()
    grown = (_status_kib("VmHWM") - before) / 1024
    del kept
    return grown


def _status_kib(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1])


def measure(tokens: int, ranks: int, contender: str) -> dict[str, Any]:
    torch.set_num_threads(1)
    problem = Problem(tokens, ranks, contender)
    problem.hear()
    megabytes = peak_megabytes(problem)
    row = {"tokens": tokens, "ranks": ranks, "contender": contender, "peak_mib": megabytes}
    if contender not in TORCH:
        plan = problem.run()
        row |= {"layout": plan.layout.name, "steps": len(plan.steps), "strategy": plan.strategy}
        row["told_bytes"] = max(rows.nbytes for rows in (*problem.told, *problem.surveys))
    return {**row, "ms": milliseconds(problem.run)}


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| tokens | ranks | one rank's part of a plan | time | peak memory | told to the others |",
        "|---|---|---|---|---|---|",
    ]
    for r in rows:
        name = TORCH.get(r["contender"], "")
        if not name:
            chosen = f" ({r['layout']})" * (r["contender"] == "auto")
            name = f"ringflex, {r['contender']}{chosen}"
        told = f"{r['told_bytes']:,} bytes" if "told_bytes" in r else "-"
        lines.append(
            f"| {r['tokens']:,} | {r['ranks']:,} | {name} | {r['ms']:,.1f} ms "
            f"| {r['peak_mib']:,.1f} MiB | {told} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="up to 1 Mi tokens")
    parser.add_argument("--output", type=Path, default=RESULTS / "plan.json")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)  # in a process of its own
    arguments = parser.parse_args()
    if arguments.one:
        tokens, ranks, contender = arguments.one
        print(json.dumps(measure(int(tokens), int(ranks), contender)))
        return
    rows = []
    for tokens, ranks in SIZES:
        if arguments.quick and tokens > Mi:
            continue
        for contender in CONTENDERS:
            if tokens > _LONGEST.get(contender, tokens):
                continue
            command = [sys.executable, __file__, "--one", str(tokens), str(ranks), contender]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            rows.append(json.loads(done.stdout.splitlines()[-1]))
            print(table(rows[-1:]).splitlines()[-1], flush=True)
    record = {
        "cpu": _cpu(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": current_commit(),
        "command": "python scripts/" + " ".join([Path(__file__).name, *sys.argv[1:]]),
        "rows": rows,
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(record, indent=1) + "\n")
    print(table(rows))


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    named = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()


if __name__ == "__main__":
    main()
