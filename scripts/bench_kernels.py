"""Times the kernels for GPUs beside torch's FlexAttention, SDPA and FlashAttention-4, on one GPU.

    python scripts/bench_kernels.py                             # everything: half an hour
    python scripts/bench_kernels.py --dims 128 --lengths 16384  # a part
    python scripts/bench_kernels.py --tiles                     # which tiles are fastest

Contenders: ringflex (on a Hopper GPU its Hopper kernels, and beside them the portable ones),
torch's FlexAttention (compiled, Triton backend; its FA4 backend where `flash-attn-4` is installed),
SDPA's FlashAttention-2 and cuDNN, and FA4 itself, where they can run the mask. All are timed in one
process, in turn, so only ratios between them count. First their errors against an fp64
reference are compared: ringflex may not err more than 1.05 times as much as FlexAttention.

Prints a table, and writes JSON and a plot to `benchmarks/results/`. TFLOP/s count visible pairs:
4 D a pair and head in the forward, 10 D in the backward.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask as torch_block_mask
from torch.nn.attention.flex_attention import flex_attention as torch_flex

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import problems
import ringflex as rf
from commit import current_commit
from kernels_report import FLEX, FLEX_FA4, MASKS, OURS, PORTABLE, case_of, plot, table
from problems import WINDOW, Problem
from ringflex.kernels.triton_tiles import CANDIDATES
from ringflex.reference import reference_attention_with_gradients

RESULTS = Path(__file__).resolve().parent.parent / "benchmarks" / "results"
TILED_MASKS = ("causal", "softcap", "full")
WITHOUT: list[str] = []  # contenders that take long to compile
_CYCLES = 2e9  # of a GPU, a second
_LONGEST_CALL = 0.005  # seconds of the host, that the GPU waits for
_ROUNDS = 4
Run = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class Spec:
    """One row of the benchmark: batch 1, bf16."""

    mask: str
    tokens: int
    heads: int
    kv_heads: int
    dim: int

    def __str__(self) -> str:
        return f"{self.mask} {self.tokens} H{self.heads}/{self.kv_heads} D{self.dim}"


def problem(spec: Spec) -> Problem:
    return problems.problem(spec.mask, spec.tokens, torch.device("cuda"), spec.heads)


def inputs(spec: Spec) -> tuple[Tensor, ...]:
    """q, k, v, dout."""
    torch.manual_seed(0)
    heads = (spec.heads, spec.kv_heads, spec.kv_heads, spec.heads)
    made = [
        torch.randn(1, h, spec.tokens, spec.dim, device="cuda", dtype=torch.bfloat16) for h in heads
    ]
    return *(x.requires_grad_() for x in made[:3]), made[3]


def contenders(spec: Spec, p: Problem, peers: bool = True) -> Iterator[tuple[str, Run]]:
    """Each contender's name and forward, made when it is asked for."""
    S = spec.tokens
    ours = None
    if p.mask_mod is not None:
        ours = rf.create_block_mask(p.mask_mod, None, None, S, S)

    def ringflex(backend: str = "auto", **options: Any) -> Run:
        return lambda q, k, v: rf.flex_attention(
            q, k, v, p.score_mod, ours, enable_gqa=True, kernel_options=options, backend=backend
        )

    yield OURS, ringflex()
    if torch.cuda.get_device_capability()[0] == 9:
        yield PORTABLE, ringflex("triton")
    if spec.mask == "softcap":
        yield f"{OURS}, approximate tanh", ringflex(approximate_tanh=True)
    theirs = None
    if p.mask_mod is not None and FLEX not in WITHOUT:
        theirs = torch_block_mask(p.mask_mod, None, None, S, S, device="cuda", _compile=S > 20_000)

    def flex(**options: Any) -> Run:
        compiled = torch.compile(torch_flex, dynamic=False)
        return lambda q, k, v: compiled(
            q, k, v, p.score_mod, theirs, enable_gqa=True, kernel_options=options or None
        )

    if FLEX not in WITHOUT:
        yield FLEX, flex()
    if not peers:
        return
    if _importable("flash_attn.cute"):
        if FLEX not in WITHOUT:
            yield FLEX_FA4, flex(BACKEND="FLASH")
        if spec.mask in ("full", "causal", "window"):
            yield "FA4", _fa4(spec.mask)
    if spec.mask in ("full", "causal"):
        for name, backend in (
            ("SDPA FA2", SDPBackend.FLASH_ATTENTION),
            ("SDPA cuDNN", SDPBackend.CUDNN_ATTENTION),
        ):
            yield name, _sdpa(backend, spec.mask == "causal")


def _sdpa(backend: SDPBackend, causal: bool) -> Run:
    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return torch.nn.functional.scaled_dot_product_attention(
                q, k, v, is_causal=causal, enable_gqa=True
            )

    return run


def _fa4(mask: str) -> Run:
    from flash_attn.cute import flash_attn_func

    window = (WINDOW - 1, 0) if mask == "window" else (None, None)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        tokens_first = [x.transpose(1, 2) for x in (q, k, v)]
        out = flash_attn_func(*tokens_first, causal=mask == "causal", window_size=window)
        return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)

    return run


def _importable(name: str) -> bool:
    try:
        __import__(name)
    except ImportError:
        return False
    return True


def time_in_turn(
    runs: dict[str, Run], tensors: tuple[Tensor, ...], seconds: float = 0.25
) -> dict[str, dict[str, Any]]:
    """Of each, the median forward and backward in milliseconds, and the peak memory of both beyond
    inputs, in bytes; or its error. They take turns, as GPUs get slower while they get hotter.

    Args:
        seconds: for each.
    """
    *leaves, dout = tensors

    def once(run: Run) -> list[torch.cuda.Event]:
        events = [torch.cuda.Event(enable_timing=True) for _ in range(3)]
        events[0].record()
        out = run(*leaves)
        events[1].record()
        torch.autograd.grad(out, leaves, dout)
        events[2].record()
        return events

    def first(run: Run) -> dict[str, Any]:
        once(run)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        start = time.perf_counter()
        events = once(run)
        host = min(time.perf_counter() - start, _LONGEST_CALL)
        peak = torch.cuda.max_memory_allocated() - before
        torch.cuda.synchronize()
        repeats = int(1e3 * seconds / _ROUNDS / events[0].elapsed_time(events[2]))
        return {"peak": peak, "host": host, "repeats": min(10, max(2, repeats)), "events": []}

    found: dict[str, dict[str, Any]] = {}
    for name, run in runs.items():
        try:
            found[name] = first(run)
        except Exception as error:
            found[name] = {"error": f"{type(error).__name__}: {error}".splitlines()[0][:200]}
            torch.cuda.empty_cache()  # of what did not fit, for those that follow
    names = [name for name, of in found.items() if "error" not in of]
    for shift in range(_ROUNDS):
        for name in names[shift:] + names[:shift]:
            of = found[name]
            # All are queued before the first begins, so that the host's time is in none of them.
            torch.cuda._sleep(int(_CYCLES * of["host"] * (of["repeats"] + 1)))
            of["events"] += [once(runs[name]) for _ in range(of["repeats"])][1:]
            torch.cuda.synchronize()
    for name in names:
        of = found[name]
        found[name] = {
            "forward": statistics.median(e[0].elapsed_time(e[1]) for e in of["events"]),
            "backward": statistics.median(e[1].elapsed_time(e[2]) for e in of["events"]),
            "peak": of["peak"],
        }
    return found


def bench(spec: Spec, peers: bool) -> list[dict[str, Any]]:
    p, tensors = problem(spec), inputs(spec)
    flops = p.pairs * spec.heads * spec.dim
    rows = []
    for name, found in time_in_turn(dict(contenders(spec, p, peers)), tensors).items():
        row = {**asdict(spec), "contender": name, **found}
        if "error" not in found:
            row["forward_tflops"] = 4 * flops / row["forward"] / 1e9
            row["backward_tflops"] = 10 * flops / row["backward"] / 1e9
        rows.append(row)
    torch.cuda.empty_cache()
    torch.compiler.reset()
    return rows


def check(spec: Spec) -> dict[str, Any]:
    """Root mean square errors against fp64, ours and FlexAttention's, and their worst ratio."""
    p, tensors = problem(spec), inputs(spec)
    *leaves, dout = tensors
    exact = reference_attention_with_gradients(
        *(x.detach().double() for x in (*leaves, dout)),
        mask_mod=p.mask_mod,
        score_mod=p.score_mod,
    )
    errors: dict[str, list[float]] = {}
    for name, run in contenders(spec, p, peers=False):
        out = run(*leaves)
        found = [out, *torch.autograd.grad(out, leaves, dout)]
        wanted = (exact.out, exact.dq, exact.dk, exact.dv)
        errors[name] = [
            ((x.double() - w).square().mean() / w.square().mean()).sqrt().item()
            for x, w in zip(found, wanted, strict=True)
        ]
    torch.compiler.reset()
    worst = max(a / b for a, b in zip(errors[OURS], errors[FLEX], strict=True))
    return {**asdict(spec), "errors": errors, "worst_ratio": worst}


def host_overhead() -> dict[str, float]:
    """Microseconds that one call takes on the host, at 128 tokens, after the first."""
    found = {}
    for mask in ("causal", "softcap"):
        spec = Spec(mask=mask, tokens=128, heads=8, kv_heads=2, dim=128)
        leaves = inputs(spec)[:3]
        for name, run in contenders(spec, problem(spec), peers=False):
            for grad in (False, True):
                with torch.set_grad_enabled(grad):
                    for _ in range(20):
                        run(*leaves)
                    torch.cuda.synchronize()
                    times = []
                    for _ in range(300):
                        start = time.perf_counter()
                        run(*leaves)
                        times.append(time.perf_counter() - start)
                        if len(times) % 20 == 0:
                            torch.cuda.synchronize()
                key = f"{mask}, {name}{', with autograd' if grad else ''}"
                found[key] = statistics.median(times) * 1e6
    torch.compiler.reset()
    return found


def sweep_tiles(dims: list[int], tokens: int) -> None:
    """Times every candidate tile of every kernel: milliseconds of the forward or the backward."""
    for dim, mask, kernel in itertools.product(dims, TILED_MASKS, CANDIDATES):
        spec = Spec(mask=mask, tokens=tokens, heads=32, kv_heads=8, dim=dim)
        found = []
        for tile, run in tiled(spec, kernel):
            took = time_in_turn({"": run}, inputs(spec))[""]
            what = "forward" if kernel == "forward" else "backward"
            found.append((took.get(what, math.inf), tile, took.get("error", "").split(":")[0]))
        line = ", ".join(
            f"{t[0]}x{t[1]} w{t[2]} s{t[3]}: {ms:.2f}{error}" for ms, t, error in sorted(found)
        )
        print(f"D{dim} {mask} {kernel}: {line}", flush=True)


def tiled(spec: Spec, kernel: str) -> Iterator[tuple[Any, Run]]:
    """ringflex with each candidate tile of a kernel."""
    p, S = problem(spec), spec.tokens
    ours = p.mask_mod and rf.create_block_mask(p.mask_mod, None, None, S, S)
    for tile in CANDIDATES[kernel]:
        options = {"tiles": {kernel: tile}}
        yield (
            tile,
            lambda q, k, v, options=options: rf.flex_attention(
                q, k, v, p.score_mod, ours, enable_gqa=True, kernel_options=options
            ),
        )


def in_processes(what: str, specs: list[Spec], processes: int) -> list[dict[str, Any]]:
    """Compiles or checks in many processes, as compiling takes longest; what they found."""
    children = []
    for i in range(min(processes, len(specs))):
        part = json.dumps([asdict(s) for s in specs[i::processes]])
        command = [sys.executable, __file__, "--work", what, "--specs", part]
        command += ["--without-flex"] if WITHOUT else []
        children.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
    lines = [line for child in children for line in child.communicate()[0].splitlines()]
    failed = [child.returncode for child in children if child.returncode]
    assert not failed, f"{what}: processes ended with {failed}"
    return [json.loads(line) for line in lines]


def work(what: str, specs: list[Spec]) -> None:
    """What one of these processes does."""
    for spec in specs:
        if what == "check":
            print(json.dumps(check(spec)), flush=True)
            continue
        *leaves, dout = inputs(spec)
        runs = (run for _, run in contenders(spec, problem(spec)))
        if what == "compile tiles":
            runs = (run for kernel in CANDIDATES for _, run in tiled(spec, kernel))
        for run in runs:
            try:
                torch.autograd.grad(run(*leaves), leaves, dout)
            except Exception as error:
                print(f"compiling {spec}: {error}"[:300], file=sys.stderr, flush=True)
        torch.compiler.reset()
        torch.cuda.empty_cache()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--masks", nargs="+", default=list(MASKS), choices=MASKS)
    parser.add_argument("--lengths", nargs="+", type=int, default=[8192, 16384, 65536])
    parser.add_argument("--dims", nargs="+", type=int, default=[64, 128, 256])
    parser.add_argument("--kv-heads", nargs="+", type=int, default=[8, 32])
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--tiles", action="store_true", help="only find the fastest tiles")
    parser.add_argument("--no-peers", action="store_true", help="only ringflex and FlexAttention")
    parser.add_argument("--without-flex", action="store_true", help="nor FlexAttention; no check")
    parser.add_argument("--no-check", action="store_true")
    parser.add_argument("--output", type=Path, default=RESULTS / "kernels.json")
    parser.add_argument("--merge", action="store_true", help="add to what the output holds")
    parser.add_argument("--commit", help="the commit measured, where git cannot tell")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    parser.add_argument("--specs", type=json.loads, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    if arguments.without_flex:
        WITHOUT.append(FLEX)
        arguments.no_check = True
    if not torch.cuda.is_available():
        sys.exit("bench_kernels.py needs a GPU")
    if arguments.work:
        work(arguments.work, [Spec(**s) for s in arguments.specs])
        return
    started = time.time()
    processes = max(1, min(14, (os.cpu_count() or 2) - 2))
    if arguments.tiles:
        kinds = itertools.product(arguments.dims, TILED_MASKS)
        specs = [Spec(mask=m, tokens=1024, heads=32, kv_heads=8, dim=d) for d, m in kinds]
        in_processes("compile tiles", specs, processes)
        print(f"compiled after {time.time() - started:.0f} s", flush=True)
        sweep_tiles(arguments.dims, arguments.lengths[0])
        return
    record = _record(arguments)
    if not arguments.no_check:
        kinds = itertools.product(arguments.dims, arguments.masks)
        small = [Spec(mask=m, tokens=2048, heads=8, kv_heads=2, dim=d) for d, m in kinds]
        for found in in_processes("check", small, processes):
            print(f"errors, {case_of(found)}: {found['worst_ratio']:.3f} of torch flex's")
            record["errors"].append(found)
            assert found["worst_ratio"] <= 1.05, found
        print(f"checked after {time.time() - started:.0f} s", flush=True)
    specs = [
        Spec(mask=m, tokens=s, heads=arguments.heads, kv_heads=k, dim=d)
        for d, s, k, m in itertools.product(
            arguments.dims, arguments.lengths, arguments.kv_heads, arguments.masks
        )
    ]
    in_processes("compile", [s for s in specs if s.tokens <= 20_000], processes)
    in_processes("compile", [s for s in specs if s.tokens > 20_000], min(5, processes))
    print(f"compiled after {time.time() - started:.0f} s", flush=True)
    if not record["host_overhead_us"] and not WITHOUT:
        record["host_overhead_us"] = host_overhead()
        for name, value in record["host_overhead_us"].items():
            print(f"host overhead, {name}: {value:.0f} us", flush=True)
    for spec in specs:
        rows = bench(spec, not arguments.no_peers)
        measured = [asdict(spec) | {"contender": row["contender"]} for row in rows]
        before = [r for r in record["rows"] if {k: r[k] for k in measured[0]} not in measured]
        record["rows"] = [
            *before,
            *(row | {"command": len(record["commands"]) - 1} for row in rows),
        ]
        print(table(rows).splitlines()[-1], flush=True)
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(record, indent=1) + "\n")
    if not WITHOUT:
        plot(record["rows"], arguments.output.with_suffix(".png"))
    print(table(record["rows"]))
    print(f"done after {time.time() - started:.0f} s")


def _record(arguments: argparse.Namespace) -> dict[str, Any]:
    """The output's content to be: with what it holds already if that is to be merged."""
    import triton

    origin = {
        "machine": f"{torch.cuda.get_device_name()}, {platform.processor() or platform.machine()}",
        "versions": {
            "torch": torch.__version__,
            "triton": triton.__version__,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
        },
    }
    record: dict[str, Any] = {
        **origin, "commands": [], "errors": [], "host_overhead_us": {}, "rows": []
    }  # fmt: skip
    if arguments.merge and arguments.output.exists():
        record = json.loads(arguments.output.read_text())
        if {key: record[key] for key in origin} != origin:
            sys.exit(f"{arguments.output} was measured elsewhere: it cannot be merged with")
    command = " ".join(["python", "scripts/bench_kernels.py", *sys.argv[1:]])
    record["commands"].append({"command": command, "commit": arguments.commit or current_commit()})
    return record


if __name__ == "__main__":
    main()
