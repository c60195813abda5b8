"""Times the eager kernel beside torch's eager FlexAttention and SDPA's math path, on a CPU.

    python scripts/bench_eager.py                 # table, JSON and plot; about ten minutes
    python scripts/bench_eager.py --lengths 4096  # quicker

First every contender's output and gradients are compared with an fp64 reference (at 1,024 tokens),
then all are timed in turn in one process, forward and forward + backward (torch's FlexAttention has
no backward on a CPU). Peak memory, of forward + backward where there is one, is measured in a
process of its own for each (Linux: VmHWM, reset after the warm-up).
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask as torch_block_mask
from torch.nn.attention.flex_attention import flex_attention as torch_flex

import ringflex as rf
from ringflex.reference import reference_attention_with_gradients

ROOT = Path(__file__).resolve().parent.parent
MASKS = ("causal", "window 1,024", "documents")
CONTENDERS = ("ringflex eager", "torch flex eager", "SDPA math")
NO_BACKWARD = "torch flex eager"  # FlexAttention refuses inputs that require a gradient on a CPU
HEADS, KV_HEADS, HEAD_DIM = 2, 1, 64
Run = Callable[[Tensor, Tensor, Tensor], Tensor]


def mask_of(name: str, seq_len: int) -> rf.MaskMod:
    if name == "causal":
        return rf.causal()
    if name == "window 1,024":
        return rf.causal() & rf.sliding_window(1023)
    generator = torch.Generator().manual_seed(0)
    lengths = torch.empty(seq_len).log_normal_(6.5, 0.8, generator=generator).long() + 1
    ids = torch.repeat_interleave(torch.arange(seq_len), lengths)[:seq_len]
    return rf.causal() & rf.document(ids)


def contender(name: str, mask: rf.MaskMod, seq_len: int) -> Run:
    """`run(q, k, v) -> out`; block masks and dense masks are made here, outside the timing."""
    if name == "ringflex eager":
        ours = rf.create_block_mask(mask, None, None, seq_len, seq_len)
        return lambda q, k, v: rf.flex_attention(
            q, k, v, block_mask=ours, enable_gqa=True, backend="eager"
        )
    if name == "torch flex eager":
        theirs = torch_block_mask(mask, None, None, seq_len, seq_len, device="cpu")
        return lambda q, k, v: torch_flex(q, k, v, block_mask=theirs, enable_gqa=True)
    dense = rf.create_block_mask(mask, None, None, seq_len, seq_len).to_dense()[0, 0]

    def math(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.MATH):
            return torch.nn.functional.scaled_dot_product_attention(
                q, k, v, attn_mask=dense, enable_gqa=True
            )

    return math


def inputs(seq_len: int) -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    shapes = [(1, h, seq_len, HEAD_DIM) for h in (HEADS, KV_HEADS, KV_HEADS)]
    return tuple(torch.randn(s, requires_grad=True) for s in shapes)


def check(seq_len: int = 1024) -> dict[str, float]:
    """Largest error of out, dq, dk, dv against fp64, relative to the largest reference value."""
    q, k, v = inputs(seq_len)
    dout = torch.randn(1, HEADS, seq_len, HEAD_DIM)
    errors: dict[str, float] = {}
    for mask_name in MASKS:
        mask = mask_of(mask_name, seq_len)
        exact = reference_attention_with_gradients(
            *(x.detach().double() for x in (q, k, v)), dout.double(), mask_mod=mask
        )
        for name in CONTENDERS:
            with torch.set_grad_enabled(name != NO_BACKWARD):
                out = contender(name, mask, seq_len)(*_inputs_for(name, (q, k, v)))
            grads = () if name == NO_BACKWARD else torch.autograd.grad(out, (q, k, v), dout)
            wanted = (exact.out, exact.dq, exact.dk, exact.dv)[: 1 + len(grads)]
            for x, want in zip((out, *grads), wanted, strict=True):
                error = ((x.double() - want).abs().max() / want.abs().max()).item()
                errors[name] = max(error, errors.get(name, 0.0))
    for name, error in errors.items():
        if error > 1e-5:
            raise SystemExit(f"{name} is wrong: relative error {error:.1e} in fp32")
    return errors


def _inputs_for(name: str, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(x.detach() for x in tensors) if name == NO_BACKWARD else tensors


def milliseconds(run: Run, tensors: tuple[Tensor, ...], backward: bool) -> float:
    start = time.perf_counter()
    with torch.set_grad_enabled(backward):
        out = run(*tensors)
    if backward:
        torch.autograd.grad(out, tensors, torch.ones_like(out))
    return (time.perf_counter() - start) * 1e3


def times(mask_name: str, seq_len: int, rounds: int) -> list[dict[str, Any]]:
    mask, tensors = mask_of(mask_name, seq_len), inputs(seq_len)
    runs = {name: contender(name, mask, seq_len) for name in CONTENDERS}
    rows = [
        {"mask": mask_name, "seq_len": seq_len, "contender": name, "forward_ms": [], "both_ms": []}
        for name in CONTENDERS
    ]
    for round_ in range(rounds + 1):  # the first is a warm-up
        for row in rows:
            name = row["contender"]
            for key, backward in (("forward_ms", False), ("both_ms", True)):
                if backward and name == NO_BACKWARD:
                    continue
                elapsed = milliseconds(runs[name], _inputs_for(name, tensors), backward)
                if round_:
                    row[key].append(elapsed)
    return rows


def peak_megabytes(mask_name: str, seq_len: int, name: str) -> float:
    """Growth of a fresh process's peak memory over forward + backward, in MiB."""
    command = [sys.executable, __file__, "--peak-of", mask_name, str(seq_len), name]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=1800)
    return float(done.stdout.split()[-1])


def measure_peak(mask_name: str, seq_len: int, name: str) -> None:
    backward = name != NO_BACKWARD
    small = mask_of(mask_name, 256)  # imports, threads, allocator
    milliseconds(contender(name, small, 256), _inputs_for(name, inputs(256)), backward)
    tensors = _inputs_for(name, inputs(seq_len))
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before = _status_kib("VmRSS")
    milliseconds(contender(name, mask_of(mask_name, seq_len), seq_len), tensors, backward)
    print((_status_kib("VmHWM") - before) / 1024)


def _status_kib(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1])


def machine() -> dict[str, Any]:
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        models = [ln for ln in info.read_text().splitlines() if ln.startswith("model name")]
        cpu = models[0].split(":", 1)[1].strip() if models else cpu
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True
    )
    return {
        "cpu": cpu,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": commit.stdout.strip(),
        "command": "python scripts/" + " ".join([Path(__file__).name, *sys.argv[1:]]),
    }


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| mask | tokens | contender | forward | x ours | fwd + bwd | x ours | peak memory |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        ours = next(
            r
            for r in rows
            if (r["mask"], r["seq_len"]) == (row["mask"], row["seq_len"])
            and r["contender"] == CONTENDERS[0]
        )
        cells = [row["mask"], f"{row['seq_len']:,}", row["contender"]]
        for key in ("forward_ms", "both_ms"):
            if not row[key]:
                cells += ["-", "-"]
                continue
            median = statistics.median(row[key])
            cells += [f"{median:,.0f} ms", f"{median / statistics.median(ours[key]):.2f}"]
        lines.append("| " + " | ".join([*cells, f"{row['peak_mib']:,.0f} MiB"]) + " |")
    return "\n".join(lines)


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    from matplotlib.figure import Figure

    lengths = sorted({row["seq_len"] for row in rows})
    figure = Figure(figsize=(9, 2.6 * len(lengths) + 0.6), layout="constrained")
    axes = figure.subplots(len(lengths), 2, squeeze=False)
    colours = ("#0072B2", "#E69F00", "#999999")
    for line, seq_len in zip(axes, lengths, strict=True):
        for axis, (label, value) in zip(
            line,
            (
                ("forward (ms)", lambda r: statistics.median(r["forward_ms"])),
                ("peak memory (MiB)", lambda r: r["peak_mib"]),
            ),
            strict=True,
        ):
            for i, name in enumerate(CONTENDERS):
                mine = [r for r in rows if r["seq_len"] == seq_len and r["contender"] == name]
                at = [m + 0.26 * (i - 1) for m in range(len(mine))]
                axis.bar(at, [value(r) for r in mine], 0.24, label=name, color=colours[i])
            axis.set_xticks(range(len(MASKS)), MASKS)
            axis.set_yscale("log")
            axis.set_title(f"{seq_len:,} tokens: {label}", fontsize=10)
    axes[0][0].legend(fontsize=8)
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 16384])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--peak-of", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    warnings.filterwarnings("ignore", message=".*flex_attention.*")
    if args.peak_of:
        measure_peak(args.peak_of[0], int(args.peak_of[1]), args.peak_of[2])
        return
    errors = check()
    rows = []
    for seq_len in args.lengths:
        for mask_name in MASKS:
            measured = times(mask_name, seq_len, args.rounds)
            for row in measured:
                row["peak_mib"] = peak_megabytes(mask_name, seq_len, row["contender"])
                print(f"{mask_name}, {seq_len:,}, {row['contender']}: measured", flush=True)
            rows += measured
    args.out.mkdir(parents=True, exist_ok=True)
    shape = {"B": 1, "Hq": HEADS, "Hkv": KV_HEADS, "D": HEAD_DIM, "dtype": "float32"}
    record = {"machine": machine(), "shape": shape, "error_fp32": errors, "rows": rows}
    (args.out / "eager.json").write_text(json.dumps(record, indent=1) + "\n")
    plot(rows, args.out / "eager.png")
    print(table(rows))


if __name__ == "__main__":
    main()
