"""Measures the rates of a machine, for predictions and for `rf.plan(..., machine=)`.

    torchrun --nproc-per-node 8 scripts/calibrate.py                  # on one node
    torchrun --nnodes 2 ... --nproc-per-node 8 scripts/calibrate.py   # links between nodes too
    python scripts/simulate.py --machine machine.json

Kernels: causal attention (or another mask, `--mask`) of `--tokens` tokens, forward and backward, on
every GPU at once, the slowest counting; and of so few that only the launch takes time. Links: every
GPU sends to one other and receives from it, within a node and between nodes, all at once. What is
not measured here (on one node: the links between nodes) stays as `rf.Machine` has it. Writes JSON
that `rf.Machine.load` reads.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shlex
import statistics
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import ringflex as rf
from commit import current_commit
from parallel_measure import (
    MASKS,
    Contender,
    Spec,
    World,
    default_device,
    inputs,
    join,
    measure,
    problem,
)
from ringflex.kernels.contract import KernelOptions
from ringflex.kernels.select import select
from ringflex.parallel.machine import BACKWARD, FORWARD

_FEW = 128  # tokens of one program
_LEAST = 8  # bytes of the shortest transfer
_REPEATS = 20
_CLEAR = 1.2  # times the shortest, from which on a rate is taken from the difference


def kernel_rates(world: World, spec: Spec, seconds: float) -> dict[str, float]:
    """`forward` and `backward` over visible blocks, as predictions count work, and `launch`."""
    launch, _, _ = _kernel(world, dataclasses.replace(spec, tokens=_FEW), seconds)
    forward, backward, blocks = _kernel(world, spec, seconds)
    products = blocks * _FEW**2 * spec.heads * spec.dim
    return {
        "launch": launch,
        "forward": FORWARD * products / beyond(launch, forward, "--tokens"),
        "backward": BACKWARD * products / beyond(launch, backward, "--tokens"),
    }


def one_pass(world: World, spec: Spec) -> bool:
    """Whether the backward kernel computes dQ together with dK and dV."""
    mask = rf.create_block_mask(rf.causal(), None, None, _FEW, _FEW, BLOCK_SIZE=_FEW)
    q = torch.zeros(1, spec.heads, 1, spec.dim, dtype=spec.dtype, device=world.device)
    q = q.expand(-1, -1, spec.tokens, -1)
    chosen = select("auto" if world.on_gpu else "eager", q, q, mask, None)
    apart: bool = chosen.kernel.has_separate_passes(q, q, KernelOptions(), False)
    return not apart


def _kernel(world: World, spec: Spec, seconds: float) -> tuple[float, float, int]:
    """Seconds of the forward and of the backward on one GPU, and visible blocks."""
    mask = rf.create_block_mask(
        problem(spec, world.device).mask_mod, None, None, spec.tokens, spec.tokens,
        device=world.device, BLOCK_SIZE=_FEW,
    )  # fmt: skip
    backend = "auto" if world.on_gpu else "eager"
    run = partial(rf.flex_attention, block_mask=mask, enable_gqa=True, backend=backend)
    contender = Contender(name="one GPU", run=run)
    found = measure(world, contender, inputs(spec, world.device, contender), seconds)
    return found["forward"] / 1e3, (found["both"] - found["forward"]) / 1e3, mask.visible_blocks


def link(world: World, peer: int, nbytes: int) -> tuple[float, float]:
    """Bytes/s each way and latency in seconds, to and from `peer`, while all other ranks do alike;
    of the slowest."""
    sizes = _LEAST, nbytes
    times: dict[int, list[float]] = {size: [] for size in sizes}
    for _ in range(_REPEATS):  # in turn: what disturbs one size disturbs the other
        for size in sizes:
            times[size].append(_exchange(world, peer, size))
    everybody = world.gather(times)
    latency, lasts = (
        statistics.median(max(at) for at in zip(*(rank[size] for rank in everybody), strict=True))
        for size in sizes
    )
    return nbytes / beyond(latency, lasts, "--megabytes"), latency


def _exchange(world: World, peer: int, nbytes: int) -> float:
    """Seconds."""
    out, into = (torch.zeros(nbytes, dtype=torch.uint8, device=world.device) for _ in range(2))
    world.align()
    world.head_start()
    start = world.mark()
    works = dist.batch_isend_irecv(
        [dist.P2POp(dist.isend, out, peer), dist.P2POp(dist.irecv, into, peer)]
    )
    for work in works:
        work.wait()
    end = world.mark()
    world.synchronize()
    return world.milliseconds(start, end) / 1e3


def beyond(least: float, measured: float, option: str) -> float:
    """What work takes beside what no work takes, the same on every rank.

    Raises:
        SystemExit: about nothing; a rate would be noise.
    """
    if measured < _CLEAR * least:
        raise SystemExit(
            f"{measured * 1e3:.3g} ms, and {least * 1e3:.3g} ms with next to nothing to do: no "
            f"rate follows from that; give a larger {option}"
        )
    return measured - least


def link_rates(world: World, per_node: int, nbytes: int) -> dict[str, float]:
    """`near` (two GPUs of a node at least), `far` (an even number of nodes) and `latency`."""
    found: dict[str, float] = {}
    node, local = divmod(world.rank, per_node)
    if per_node % 2 == 0:
        found["near"], found["latency"] = link(world, node * per_node + (local ^ 1), nbytes)
    nodes = world.size // per_node
    if nodes > 1 and nodes % 2 == 0:
        found["far"], _ = link(world, (node ^ 1) * per_node + local, nbytes)
    return found


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--mask", default="causal", choices=MASKS)
    parser.add_argument("--tokens", type=int, help="default: 32,768; on CPUs 1,024")
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--megabytes", type=float, default=64, help="of a transfer")
    parser.add_argument("--seconds", type=float, default=0.5, help="time for each kernel")
    parser.add_argument("--timeout", type=float, default=120, help="seconds; longer than any run")
    parser.add_argument("--device", choices=["cuda", "cpu"], default=default_device())
    parser.add_argument("--output", type=Path, default=Path("machine.json"))
    arguments = parser.parse_args()
    if arguments.tokens is None:
        arguments.tokens = 32768 if arguments.device == "cuda" else 1024
    return arguments


def main() -> None:
    arguments = parse()
    world = join(arguments.device, arguments.timeout)
    spec = Spec(
        mask=arguments.mask, tokens=arguments.tokens, heads=arguments.heads,
        kv_heads=arguments.kv_heads, dim=arguments.dim,
        dtype=torch.bfloat16 if world.on_gpu else torch.float32,
    )  # fmt: skip
    per_node = int(os.environ["LOCAL_WORLD_SIZE"])
    found: dict[str, Any] = {"gpus_per_node": per_node}
    found |= kernel_rates(world, spec, arguments.seconds)
    found["one_pass"] = one_pass(world, spec)
    found |= link_rates(world, per_node, int(arguments.megabytes * 1e6))
    machine = rf.Machine(**found)
    if world.rank == 0:
        record = {
            "machine": dataclasses.asdict(machine),
            "measured": sorted(found),
            "on": torch.cuda.get_device_name() if world.on_gpu else "CPU",
            "torch": torch.__version__,
            "ranks": world.size,
            "commit": current_commit(),
            "command": shlex.join(["scripts/calibrate.py", *sys.argv[1:]]),
        }
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(record, indent=1) + "\n")
        for name, value in record["machine"].items():
            print(f"{name:14} {value:.4g}" + ("" if name in found else " (not measured)"))
    world.gather(None)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
