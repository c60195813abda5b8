"""Predicts attention over a cluster that need not be there: time, efficiency, bytes, balance.

    python scripts/simulate.py                                        # 2 to 64 GPUs, five masks
    python scripts/simulate.py --masks mixed --gpus 8 16 32 64 128
    python scripts/simulate.py --masks causal --tokens 1048576 --strategies ring direct all_gather
    python scripts/simulate.py --masks documents --gpus 8 --far 25e9 --trace trace.json

The plans are the real ones, of all ranks; kernels and transfers are replaced by their times on an
`rf.Machine`, whose rates are options here (`--help`), or what calibrate.py wrote (`--machine`).
What is predicted is one attention layer, forward and forward + backward. TFLOP/s count visible
pairs, 4 D and 10 D each; efficiency is against the kernels' rate. Prints a table, and writes JSON
and a plot to `benchmarks/results/`. The time line of `--trace` is for Perfetto, with a picture
beside it.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shlex
import sys
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import ringflex as rf
from commit import current_commit
from parallel_measure import MASKS, Spec, problem
from parallel_plots import ORDER, TITLES, pyplot
from parallel_trace import write_trace
from ringflex.parallel.layout import LAYOUTS
from ringflex.parallel.machine import AttentionShape, Machine
from ringflex.parallel.predict import Prediction, predict
from ringflex.parallel.strategies import STRATEGIES

RESULTS = Path(__file__).resolve().parent.parent / "benchmarks" / "results"


def simulate(
    spec: Spec, gpus: int, layout: str, strategy: str, machine: Machine
) -> tuple[dict[str, Any], Prediction]:
    """A row of the table."""
    p = problem(spec, torch.device("cpu"))
    shape = AttentionShape(heads=spec.heads, kv_heads=spec.kv_heads, head_dim=spec.dim)
    started = time.perf_counter()
    plans = rf.plan_all(
        p.mask_mod, spec.tokens, gpus, layout=layout, strategy=strategy, machine=machine,
        shape=shape,
    )  # fmt: skip
    planned = time.perf_counter() - started
    found = predict(plans, shape, machine)
    traffic = {
        "batch": 1, "heads": spec.heads, "kv_heads": spec.kv_heads, "head_dim": spec.dim,
        "v_head_dim": spec.dim, "dtype": spec.dtype, "backward": True,
    }  # fmt: skip
    flops = p.pairs * spec.heads * spec.dim
    ideal = (4 / machine.forward + 10 / machine.backward) * flops / gpus
    row = {
        "mask": spec.mask, "tokens": spec.tokens, "gpus": gpus, "heads": spec.heads,
        "kv_heads": spec.kv_heads, "dim": spec.dim, "layout": plans[0].layout.name,
        "strategy": plans[0].strategy, "steps": len(plans[0].steps),
        "forward_ms": found.forward * 1e3, "both_ms": found.both * 1e3,
        "exposed_ms": found.exposed * 1e3,
        "forward_tflops": 4 * flops / gpus / found.forward / 1e12,
        "both_tflops": 14 * flops / gpus / found.both / 1e12,
        "efficiency": ideal / found.both,
        "bytes_received": max(plan.stats.bytes_received(**traffic) for plan in plans),
        "imbalance": plans[0].stats.imbalance,
        "plan_all_seconds": planned,
    }  # fmt: skip
    return row, found


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| mask | GPUs | tokens | layout, strategy | steps | forward / both, ms "
        "| TFLOP/s per GPU | efficiency | exposed, ms | received, MiB | imbalance |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        lines.append(
            f"| {r['mask']} | {r['gpus']:,} | {r['tokens']:,} | {r['layout']}, {r['strategy']} "
            f"| {r['steps']} | {r['forward_ms']:,.2f} / {r['both_ms']:,.2f} "
            f"| {r['forward_tflops']:,.0f} / {r['both_tflops']:,.0f} | {r['efficiency']:.3f} "
            f"| {r['exposed_ms']:,.2f} | {r['bytes_received'] / 2**20:,.1f} "
            f"| {r['imbalance']:.3f} |"
        )
    return "\n".join(lines)


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Predicted TFLOP/s per GPU, and MiB received, over the number of GPUs; a line per mask, of its
    fastest layout and strategy."""
    plt = pyplot()
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.4), layout="constrained")
    colours = dict(zip(ORDER, ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00"), strict=True))
    markers = dict(zip(ORDER, "osD^v", strict=True))
    fastest: dict[tuple[str, int], dict[str, Any]] = {}
    for row in rows:
        at = row["mask"], row["gpus"]
        if at not in fastest or row["both_ms"] < fastest[at]["both_ms"]:
            fastest[at] = row
    for mask in [m for m in ORDER if any(at[0] == m for at in fastest)]:
        mine = sorted((r for (m, _), r in fastest.items() if m == mask), key=lambda r: r["gpus"])
        gpus = [r["gpus"] for r in mine]
        style = {"color": colours[mask], "marker": markers[mask], "label": TITLES[mask]}
        axes[0].plot(gpus, [r["both_tflops"] for r in mine], **style)
        axes[1].plot(gpus, [r["bytes_received"] / 2**20 for r in mine], **style)
    for axis, label in zip(
        axes,
        ("forward + backward, TFLOP/s per GPU", "received per GPU and layer, MiB"),
        strict=True,
    ):
        counts = sorted({r["gpus"] for r in rows})
        axis.set_xscale("log", base=2)
        axis.set_xticks(counts, [f"{n:,}" for n in counts])
        axis.minorticks_off()
        axis.set_ylim(bottom=0)
        axis.set_xlabel("GPUs")
        axis.set_ylabel(label)
        axis.grid(axis="y", color="#dddddd", linewidth=0.6)
    axes[0].legend(frameon=False)
    per_gpu = {r["tokens"] // r["gpus"] for r in rows}
    tokens = f"{per_gpu.pop():,} tokens per GPU" if len(per_gpu) == 1 else "one sequence"
    figure.suptitle(f"Predicted, not measured: one attention layer, {tokens}")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--masks", nargs="+", default=list(MASKS), choices=MASKS)
    parser.add_argument("--gpus", nargs="+", type=int, default=[2, 4, 8, 16, 32, 64])
    parser.add_argument("--tokens-per-gpu", type=int, default=8192)
    parser.add_argument("--tokens", type=int, help="of the whole sequence, for all numbers of GPUs")
    parser.add_argument("--layouts", nargs="+", default=["auto"],
                        choices=["auto", *LAYOUTS, "balanced", "nested"])  # fmt: skip
    parser.add_argument("--strategies", nargs="+", default=["auto"],
                        choices=["auto", *STRATEGIES, "ulysses"])  # fmt: skip
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--dim", type=int, default=128)
    for field in dataclasses.fields(Machine):
        flag = f"--{field.name.replace('_', '-')}"
        kind = int if isinstance(field.default, int) else float  # a bool: 0 or 1
        parser.add_argument(flag, type=kind, help=f"default {field.default:g}")
    parser.add_argument("--machine", type=Path, help="rates that calibrate.py measured")
    parser.add_argument("--trace", type=Path, help="the last prediction's time line")
    parser.add_argument("--output", type=Path, default=RESULTS / "simulated.json")
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    machine = Machine() if arguments.machine is None else Machine.load(arguments.machine)
    given = {field.name: getattr(arguments, field.name) for field in dataclasses.fields(Machine)}
    machine = dataclasses.replace(machine, **{k: v for k, v in given.items() if v is not None})
    shape = {name: getattr(arguments, name) for name in ("heads", "kv_heads", "dim")}
    rows: list[dict[str, Any]] = []
    print("\n".join(table([]).splitlines()))
    for mask in arguments.masks:
        for gpus in arguments.gpus:
            tokens = arguments.tokens or arguments.tokens_per_gpu * gpus
            spec = Spec(mask=mask, tokens=tokens, dtype=torch.bfloat16, **shape)
            for layout in arguments.layouts:
                for strategy in arguments.strategies:
                    whole = gpus % min(gpus, machine.gpus_per_node) == 0
                    if strategy == "hierarchical" and not whole:
                        continue  # it wants whole nodes
                    row, found = simulate(spec, gpus, layout, strategy, machine)
                    rows.append(row)
                    print(table([row]).splitlines()[-1], flush=True)
    record = {
        "commit": current_commit(),
        "command": shlex.join(["python", "scripts/simulate.py", *sys.argv[1:]]),
        "machine": dataclasses.asdict(machine),
        "rows": rows,
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(record, indent=1) + "\n")
    plot(rows, arguments.output.with_suffix(".png"))
    if arguments.trace is not None:
        ranks = [[] for _ in range(rows[-1]["gpus"])]  # type: list[list[dict[str, Any]]]
        for span in found.spans:
            ranks[span.rank].append({k: v for k, v in span._asdict().items() if k != "rank"})
        last = f"{rows[-1]['mask']}, {rows[-1]['tokens']:,} tokens, {rows[-1]['gpus']} GPUs"
        write_trace(ranks, f"predicted: {last}", arguments.trace)


if __name__ == "__main__":
    main()
