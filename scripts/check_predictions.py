"""Compares predictions with what bench_parallel.py measured.

    python scripts/check_predictions.py             # of benchmarks/results/parallel_hopper.json
    python scripts/check_predictions.py RECORD --two-passes --near 150e9

For every row of ours, `ringflex.parallel.predict.predict` is given the real plans of all ranks, and
a machine whose kernels have the rates that the same run measured on one GPU for that mask and
length. So what is checked is what a prediction adds to those: balance, steps, transfers, waiting.
Prints a table, and writes JSON to `benchmarks/results/predictions.json`.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import ringflex as rf
from commit import current_commit
from parallel_measure import Spec, problem
from ringflex.parallel.machine import BACKWARD, FORWARD, AttentionShape, Machine
from ringflex.parallel.plan import Plan
from ringflex.parallel.predict import predict

RESULTS = Path(__file__).resolve().parent.parent / "benchmarks" / "results"
OURS = "ringflex "


def predictable(row: dict[str, Any]) -> bool:
    return row["contender"].startswith(OURS) and "one_both" in row and "error" not in row


def plans_of(row: dict[str, Any]) -> list[Plan]:
    """Of all ranks, as the row's were made."""
    strategy, _, layout = row["contender"].removeprefix(OURS).partition(", ")
    mod = problem(_spec(row), torch.device("cpu")).mask_mod
    return rf.plan_all(mod, row["tokens"], row["gpus"], layout=layout or "auto", strategy=strategy)


def _spec(row: dict[str, Any]) -> Spec:
    return Spec(
        mask=row["mask"], tokens=row["tokens"], heads=row["heads"], kv_heads=row["kv_heads"],
        dim=row["dim"], dtype=getattr(torch, row["dtype"]),
    )  # fmt: skip


def machine_of(row: dict[str, Any], plans: list[Plan], near: float, one_pass: bool) -> Machine:
    """The kernels' rates over the blocks that they compute, on one GPU."""
    size = plans[0].layout.block_size
    blocks = sum(s.mask.visible_blocks for p in plans for s in p.steps if s.mask is not None)
    products = blocks * size**2 * row["heads"] * row["dim"]
    seconds = row["one_forward"] / 1e3, (row["one_both"] - row["one_forward"]) / 1e3
    return Machine(
        forward=FORWARD * products / seconds[0],
        backward=BACKWARD * products / seconds[1],
        near=near,
        one_pass=one_pass,
    )


def compare(row: dict[str, Any], near: float, one_pass: bool) -> dict[str, Any]:
    plans = plans_of(row)
    machine = machine_of(row, plans, near, one_pass)
    shape = AttentionShape(heads=row["heads"], kv_heads=row["kv_heads"], head_dim=row["dim"])
    found = predict(plans, shape, machine)
    keys = ("mask", "tokens", "gpus", "contender", "heads", "kv_heads", "dim", "forward", "both")
    return {key: row[key] for key in keys} | {
        "predicted_forward": found.forward * 1e3,
        "predicted_both": found.both * 1e3,
        "forward_rate": machine.forward,
        "backward_rate": machine.backward,
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Two numbers are forward and forward + backward."""
    lines = [
        "| mask, tokens | GPUs | contender | measured, ms | predicted, ms | predicted / measured |",
        "|---|---|---|---|---|---|",
    ]
    for r in rows:
        ratios = [r[f"predicted_{way}"] / r[way] for way in ("forward", "both")]
        lines.append(
            f"| {r['mask']}, {r['tokens']:,} | {r['gpus']} | {r['contender']} "
            f"| {r['forward']:,.2f} / {r['both']:,.2f} "
            f"| {r['predicted_forward']:,.2f} / {r['predicted_both']:,.2f} "
            f"| {ratios[0]:.2f} / {ratios[1]:.2f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("record", nargs="?", type=Path, default=RESULTS / "parallel_hopper.json")
    parser.add_argument(
        "--near", type=float, default=Machine.near, help="bytes/s each way of one GPU"
    )
    parser.add_argument(
        "--two-passes", dest="one_pass", action="store_false",
        help="the kernels computed dQ apart, as the portable ones do",
    )  # fmt: skip
    parser.add_argument("--output", type=Path, default=RESULTS / "predictions.json")
    arguments = parser.parse_args()
    record = json.loads(arguments.record.read_text())
    rows = [
        compare(row, arguments.near, arguments.one_pass)
        for row in record["rows"]
        if predictable(row)
    ]
    written = {
        "commit": current_commit(),
        "command": shlex.join(["python", "scripts/check_predictions.py", *sys.argv[1:]]),
        "measured_on": record["machine"],
        "near": arguments.near,
        "rows": rows,
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(written, indent=1) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()
