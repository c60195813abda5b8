"""The record of benchmarks over several GPUs, and the table of bench_parallel.py."""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import sys
from typing import Any

import torch

from commit import current_commit


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: a line per contender. Two numbers are forward and forward + backward."""
    lines = [
        "| mask, tokens | GPUs | contender | ms | TFLOP/s per GPU | efficiency | exposed ms "
        "| host ms | received MiB | skipped | imbalance | peak MiB | layout |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [f"{row['mask']}, {row['tokens']:,}", str(row["gpus"]), row["contender"]]
        if "error" in row:
            cells += [row["error"].replace("|", "/"), *["-"] * 9]
        else:
            cells += [_two(row, "{}", 2), _two(row, "{}_tflops", 0 if row["dim"] >= 64 else 3)]
            cells += [_two(row, "{}_efficiency", 3), _two(row, "exposed_{}", 2)]
            cells += [_two(row, "host_{}", 2)]
            cells += [_number(row.get("bytes_received"), 2**20, 1), _share(row.get("skipped"))]
            cells += [_number(row.get("imbalance"), 1, 2), _number(row.get("peak"), 2**20, 0)]
            cells += [row.get("layout_chosen", "-")]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _two(row: dict[str, Any], key: str, digits: int) -> str:
    return " / ".join(
        _number(row.get(key.format(way)), 1, digits) for way in ("forward", "both")
    )  # fmt: skip


def _number(x: float | None, unit: float, digits: int) -> str:
    return "-" if x is None else f"{x / unit:,.{digits}f}"


def _share(x: float | None) -> str:
    return "-" if x is None else f"{x:.1%}"


def new_record(arguments: argparse.Namespace) -> dict[str, Any] | str:
    """The output's content to be, with what it holds already if asked to merge; or why not."""
    on_gpu = arguments.device == "cuda"
    cpu = platform.processor() or platform.machine()
    versions: dict[str, Any] = {"torch": torch.__version__}
    if on_gpu:
        import triton

        versions |= {
            "triton": triton.__version__,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "nccl": ".".join(map(str, torch.cuda.nccl.version())),
        }
    origin = {
        "machine": f"{torch.cuda.get_device_name()}, {cpu}" if on_gpu else cpu,
        "versions": versions,
    }
    record: dict[str, Any] = {**origin, "commands": [], "checks": [], "rows": []}
    if arguments.merge and arguments.output.exists():
        record = json.loads(arguments.output.read_text())
        if {key: record[key] for key in origin} != origin:
            return f"{arguments.output} was measured elsewhere: it cannot be merged with"
    script = f"scripts/{os.path.basename(sys.argv[0])}"
    ranks = os.environ.get("WORLD_SIZE")
    launcher = f"torchrun --nproc-per-node {ranks}" if ranks else "python"
    command = shlex.join([*launcher.split(), script, *sys.argv[1:]])
    record["commands"].append({"command": command, "commit": arguments.commit or current_commit()})
    return record
