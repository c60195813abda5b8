"""Times ringflex over several GPUs: ring against direct against all-gather, beside its peers.

    torchrun --nproc-per-node 2 scripts/bench_parallel.py               # everything: some minutes
    torchrun --nproc-per-node 2 scripts/bench_parallel.py --masks causal --lengths 65536 --no-peers
    torchrun --nproc-per-node 2 scripts/bench_parallel.py --without alltoall FA2 --merge
    torchrun --nproc-per-node 2 scripts/bench_parallel.py --trace trace.json  # and a picture of it

Peers are those of parallel_peers.py. All are timed in one run, in turn, so only ratios between them
count; before each turn the ranks wait for each other, and the slowest rank's time counts.
Efficiency is the time of our own one-GPU kernel on the same problem, on every GPU at once (also
there the slowest counts), over W times the time on W GPUs. Both take turns of several calls in a
row, as a model has several layers: GPUs slow down when they get hot, and speed up when they pause.
(Peers': of its last turns with one of ours.) Before each turn the GPUs are kept busy for about 2
ms, or as long as the host would fall behind, so that it is ahead of them, as in a training step;
what the host takes is measured apart: where it takes longer than the GPUs, it is what counts.
Exposed communication is the time with transfers less the time of the same plan without any. Every
contender's out, dq, dk and dv are compared, at some tokens, with those of one GPU; `--check` first
compares small problems in full, with an fp64 reference. Where ranks compile at different speeds,
they wait for each other over gloo; a transfer that takes longer than `--timeout` ends the run.

Prints a table, and writes JSON (after every case) and plots to `benchmarks/results/`. TFLOP/s count
visible pairs: 4 D a pair and head in the forward, 10 D in the backward. On CPUs (gloo, eager
kernel, no peers, small lengths) it only shows that it works.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import re
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import ringflex as rf
from parallel_check import check
from parallel_measure import (
    MASKS,
    Case,
    Contender,
    Run,
    Sample,
    Spec,
    World,
    attention,
    default_device,
    describe,
    inputs,
    join,
    measure,
    measure_in_turn,
    problem,
    silent,
)
from parallel_peers import Peer, one_gpu_sdpa, peers, precompile
from parallel_plots import plot_all
from parallel_report import new_record, table
from parallel_trace import trace
from problems import SHORT, Problem
from ringflex.masks.runs import Runs
from ringflex.parallel.layout import LAYOUTS
from ringflex.parallel.strategies import STRATEGIES

RESULTS = Path(__file__).resolve().parent.parent / "benchmarks" / "results"
OURS = "ringflex"
_WAYS = ("forward", "both", "forward_by_rank", "both_by_rank")
# Between two results that were each rounded, by dtype of the inputs.
LARGEST_DIFFERENCE = {torch.bfloat16: 2**-6, torch.float32: 1e-5}


def ours(world: World, arguments: argparse.Namespace, spec: Spec, p: Problem) -> Iterator[Peer]:
    """ringflex by layout and strategy."""
    for layout in arguments.layouts:
        for strategy in arguments.strategies:
            name = f"{OURS} {strategy}" + f", {layout}" * (layout != "auto")
            yield name, partial(_ours, name, world, p, spec, layout, strategy, arguments)


def _ours(
    name: str,
    world: World,
    p: Problem,
    spec: Spec,
    layout: str,
    strategy: str,
    arguments: argparse.Namespace,
) -> Contender:
    nodes, backend = arguments.nodes, arguments.backend
    plan = rf.plan(p.mask_mod, spec.tokens, layout=layout, strategy=strategy, machine=nodes)
    return Contender(
        name=name,
        run=attention(plan, backend),
        positions=plan.positions,
        plan=plan,
        warm=attention(silent(plan, world), backend),
    )


def one_gpu(
    world: World, arguments: argparse.Namespace, spec: Spec, p: Problem
) -> dict[str, Any] | None:
    """Our kernel with the whole problem on every GPU alone: a sample of the results, and the case
    to measure in turn with others; None where it does not fit. With `--once`, what is measured."""
    samples: list[Sample] = []
    keep = lambda results: samples.append(Sample.of(results))

    def make() -> Case:
        S = spec.tokens
        mask = rf.create_block_mask(p.mask_mod, None, None, S, S, device=world.device)
        contender = Contender(name="one GPU", run=attention(mask, arguments.backend))
        *leaves, dout = tensors = inputs(spec, world.device, contender)
        if arguments.once:  # so that the run that is timed does not compile
            _both(attention(_an_eighth(mask), arguments.backend), leaves, dout)
        else:
            out = contender.run(*leaves)
            keep([out.detach(), *torch.autograd.grad(out, leaves, dout)])
        return contender, tensors

    try:
        case = world.together(make)
        found = measure(world, *case, None, keep) if arguments.once else {"case": case}
    except Exception as problem_:
        if "OutOfMemoryError" not in describe(problem_):
            raise
        return None
    finally:
        _free()
    return {**found, "sample": samples[0]}


def _an_eighth(mask: rf.BlockMask) -> rf.BlockMask:
    """Of every eighth block of queries, which the same kernels compute."""

    def select(runs: Runs) -> Runs:
        some = runs.row % 8 == 0
        return Runs.from_pieces(runs.row[some], runs.start[some], runs.end[some], runs.rows)

    return dataclasses.replace(mask, full=select(mask.full), partial=select(mask.partial), cache={})


def bench(
    world: World,
    arguments: argparse.Namespace,
    spec: Spec,
    p: Problem,
    one: dict[str, Any] | None,
    make: Callable[[], Contender],
) -> dict[str, Any]:
    """What one contender measures: milliseconds, bytes, rates.

    Raises:
        SystemExit: ours is wrong, or did not receive the bytes that its plan tells.
    """
    started = time.perf_counter()
    contender = world.together(make)
    found: dict[str, Any] = {}
    plan, seconds = contender.plan, None if arguments.once else arguments.seconds
    if plan is not None:
        found["plan_ms"] = (time.perf_counter() - started) * 1e3
        found["strategy"], found["layout_chosen"] = plan.strategy, plan.layout.name
    tensors = world.together(partial(inputs, spec, world.device, contender))
    *leaves, dout = tensors
    received = plan.comm.bytes_received if plan is not None and plan.comm is not None else 0

    def inspect(results: list[Any]) -> None:
        if one is not None:
            found["difference"] = one["sample"].difference(world, contender, results)
            if not found["difference"] <= LARGEST_DIFFERENCE[spec.dtype]:
                text = f"{contender.name}, {spec}: differs from one GPU by {found['difference']}"
                if plan is not None:
                    raise SystemExit(text)
                raise ValueError(text)
        if plan is not None and plan.comm is not None:
            found.update(_traffic(world, spec, plan, plan.comm.bytes_received - received))

    with contender.context():
        if contender.warm is not None:
            world.together(partial(_both, contender.warm, leaves, dout))
        cases = {"contender": (contender, tensors)}
        if plan is not None and world.size > 1 and seconds is not None:
            mute = Contender(name="", run=attention(silent(plan, world), arguments.backend))
            cases["without"] = (mute, tensors)
        if one is not None and "case" in one and (plan is not None or "both" not in one):
            cases["one"] = one["case"]
        times = dict(
            zip(cases, measure_in_turn(world, [*cases.values()], seconds, inspect), strict=True)
        )
    found |= times["contender"]
    if "without" in times:
        without = times["without"]
        found |= {f"exposed_{way}": found[way] - without[way] for way in ("forward", "both")}
    if one is not None:
        one |= times.get("one", {})
        found |= {f"one_{way}": one[way] for way in _WAYS}
    flops = p.pairs * spec.heads * spec.dim
    for way, factor in (("forward", 4), ("both", 14)):
        found[f"{way}_tflops"] = factor * flops / world.size / found[way] / 1e9
        if one is not None:
            found[f"{way}_efficiency"] = one[way] / (world.size * found[way])
    return found


def _rehearse(world: World, arguments: argparse.Namespace, spec: Spec) -> None:
    """A short sequence by every way of ours: ranks know each other."""
    short = dataclasses.replace(spec, tokens=min(spec.tokens, SHORT))
    for _, make in ours(world, arguments, short, problem(short, world.device)):
        contender = world.together(make)
        *leaves, dout = world.together(partial(inputs, short, world.device, contender))
        world.together(partial(_both, contender.run, leaves, dout))


def _both(run: Run, leaves: list[Tensor], dout: Tensor) -> None:
    torch.autograd.grad(run(*leaves), leaves, dout)


def _traffic(world: World, spec: Spec, plan: rf.Plan, received: int) -> dict[str, Any]:
    """Bytes of one forward + backward, as counted and as planned."""
    s = plan.stats
    planned = s.bytes_received(
        batch=1,
        heads=spec.heads,
        kv_heads=spec.kv_heads,
        head_dim=spec.dim,
        v_head_dim=spec.dim,
        dtype=spec.dtype,
        backward=True,
    )
    ranks = world.gather((received, planned, s.skipped))
    if any(counted != promised for counted, promised, _ in ranks):
        raise SystemExit(f"{spec}, {plan.strategy}: (bytes received, planned, ...) = {ranks}")
    return {
        "bytes_received": max(r[0] for r in ranks),
        "bytes_received_by_rank": [r[0] for r in ranks],
        "skipped": sum(r[2] for r in ranks) / len(ranks),
        "imbalance": s.imbalance,
    }


def bench_case(world: World, arguments: argparse.Namespace, spec: Spec) -> Iterator[dict[str, Any]]:
    """The rows of one problem, one by one."""
    p = problem(spec, world.device)
    if arguments.once:
        _rehearse(world, arguments, spec)
    one = one_gpu(world, arguments, spec, p) if arguments.baseline else None
    kinds = list(ours(world, arguments, spec, p))
    if arguments.peers and world.on_gpu:
        kinds += peers(world, spec, p)
    unwanted = set(arguments.without)
    kinds = [(name, make) for name, make in kinds if unwanted.isdisjoint(re.findall(r"\w+", name))]
    common = {
        "mask": spec.mask, "tokens": spec.tokens, "heads": spec.heads, "kv_heads": spec.kv_heads,
        "dim": spec.dim, "dtype": str(spec.dtype).removeprefix("torch."), "pairs": p.pairs,
    }  # fmt: skip
    for name, make in kinds:
        row = {**common, "gpus": world.size, "contender": name}
        error = None
        try:
            row |= bench(world, arguments, spec, p, one, make)
        except Exception as problem_:
            error = describe(problem_)
        errors = [e for e in world.gather(error) if e]
        if errors:
            row["error"] = errors[0]
        yield row
        _free()
    if arguments.peers and world.on_gpu and spec.mask in ("causal", "full"):

        def alone() -> dict[str, Any]:
            make = lambda: one_gpu_sdpa(spec.mask == "causal")
            try:
                return bench(world.alone(), arguments, spec, p, None, make)
            except Exception as problem_:
                return {"error": describe(problem_)}

        row = {**common, "gpus": 1, "contender": "SDPA cuDNN, one GPU"}
        yield row | world.first(alone)
        _free()
    torch.compiler.reset()


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--masks", nargs="+", default=list(MASKS), choices=MASKS)
    parser.add_argument("--lengths", nargs="+", type=int, help="tokens of the whole sequence")
    parser.add_argument(
        "--strategies", nargs="+", default=["ring", "direct", "all_gather"],
        choices=["auto", *STRATEGIES, "ulysses"],
    )  # fmt: skip
    parser.add_argument(
        "--gpus-per-node", type=int, default=rf.Machine().gpus_per_node,
        help="for hierarchical; fewer than there are: as if in several nodes",
    )  # fmt: skip
    parser.add_argument(
        "--layouts", nargs="+", default=["auto"], choices=["auto", *LAYOUTS, "balanced"]
    )
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--peers", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument(
        "--without", nargs="+", default=[], help="words in the names of contenders to leave out"
    )
    parser.add_argument(
        "--baseline", action=argparse.BooleanOptionalAction, default=True,
        help="our kernel on one GPU: for efficiencies, and to compare results with",
    )  # fmt: skip
    parser.add_argument("--check", action="store_true", help="small problems against fp64, first")
    parser.add_argument("--trace", type=Path, help="one run of the first case; a PNG beside it")
    parser.add_argument("--seconds", type=float, default=0.5, help="time for each measurement")
    parser.add_argument(
        "--once", action="store_true",
        help="time the first runs, for very long sequences",
    )  # fmt: skip
    parser.add_argument("--timeout", type=float, default=60, help="seconds; longer than any run")
    parser.add_argument("--device", choices=["cuda", "cpu"], default=default_device())
    parser.add_argument("--output", type=Path, default=RESULTS / "parallel.json")
    parser.add_argument("--merge", action="store_true", help="add to what the output holds")
    parser.add_argument("--commit", help="the commit measured, where git cannot tell")
    arguments = parser.parse_args()
    on_gpu = arguments.device == "cuda"
    arguments.backend = "auto" if on_gpu else "eager"
    arguments.nodes = rf.Machine(gpus_per_node=arguments.gpus_per_node)
    if arguments.lengths is None:
        arguments.lengths = [16384, 65536, 262144] if on_gpu else [1024]
    return arguments


def main() -> None:
    arguments = parse()
    warnings.filterwarnings("ignore")
    started = time.time()
    world = join(arguments.device, arguments.timeout)

    def say(text: str) -> None:
        if world.rank == 0:
            print(text, flush=True)

    shape = {name: getattr(arguments, name) for name in ("heads", "kv_heads", "dim")}
    dtype = torch.bfloat16 if world.on_gpu else torch.float32
    record = world.first(lambda: new_record(arguments))
    if isinstance(record, str):
        sys.exit(record)
    specs = [
        Spec(mask=m, tokens=s, dtype=dtype, **shape)
        for s in arguments.lengths
        for m in arguments.masks
    ]
    if world.on_gpu:
        precompile(world, specs, arguments.peers, seconds=120)
        world.gather(None)
        say(f"compiled after {time.time() - started:.0f} s")
    if arguments.check:
        small = {"heads": 8, "kv_heads": 2, "dim": arguments.dim, "dtype": dtype}
        # Not a multiple of anything: padding too.
        some = [Spec(mask=m, tokens=world.size * 400 - 37, **small) for m in arguments.masks]
        found = check(world, some, arguments)
        record["checks"] += [{**f, "gpus": world.size} for f in found]
        worst = max(f["error"] for f in found)
        say(f"checked after {time.time() - started:.0f} s: largest relative error {worst:.1e}")
    if arguments.trace is not None:
        name, make = next(ours(world, arguments, specs[0], problem(specs[0], world.device)))
        title = f"{name}: {specs[0]} tokens, {world.size} ranks"
        trace(world, specs[0], make(), title, arguments.trace)
        _free()
    keys = ("mask", "tokens", "heads", "kv_heads", "dim", "gpus", "contender")
    for spec in specs:
        for row in bench_case(world, arguments, spec):
            if world.rank:
                continue
            row["command"] = len(record["commands"]) - 1
            same = lambda other, row=row: all(other[k] == row[k] for k in keys)
            record["rows"] = [*(r for r in record["rows"] if not same(r)), row]
            arguments.output.parent.mkdir(parents=True, exist_ok=True)
            arguments.output.write_text(json.dumps(record, indent=1) + "\n")
            say(table([row]).splitlines()[-1])
    if world.rank == 0:
        plot_all(record["rows"], arguments.output)  # again: python scripts/parallel_plots.py JSON
    say(f"done after {time.time() - started:.0f} s\n{table(record['rows'])}")
    world.gather(None)
    dist.destroy_process_group()
    failed = [r for r in record["rows"] if r["contender"].startswith(OURS) and "error" in r]
    if any("OutOfMemoryError" not in r["error"] for r in failed):
        sys.exit("ringflex failed: see the rows")


if __name__ == "__main__":
    main()
