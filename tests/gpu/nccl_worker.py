"""Run by torchrun, one process a GPU: `nccl_worker.py grid random:0 stress`, or `die`, or `stall`.

grid: masks x layouts x strategies x dtypes; random:N: the Nth share of 200 random cases; both
against the fp64 reference. some:N: the same of the first 50. stress: 1,000 steps, each with another
mask, beside other users of NCCL. die, stall: the last rank does, in the middle of a call.
"""

import faulthandler
import itertools
import logging
import os
import random
import sys
import time
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from random_cases import SHARES, random_cases
from torch import Tensor

import ringflex as rf
from attention_cases import LAYOUTS, STRATEGIES, Case, assert_equals_reference, attend
from ringflex.reference import Reference, reference_attention_with_gradients

S, B, HQ, HKV, D, DV = 1000, 2, 4, 2, 64, 32
EVERY_STRATEGY = (*STRATEGIES, "hierarchical", "ulysses")
STRESS_STEPS = 1000
FAILURE_TIMEOUT = timedelta(seconds=10)


def masks(device: torch.device) -> dict[str, Any]:
    ids = torch.sort(torch.randint(0, 6, (B, S), device=device), dim=1)[0]
    return {
        "causal": rf.causal(),
        "window": rf.causal() & rf.sliding_window(100),
        "documents": rf.causal() & rf.document(ids),
        "full": rf.full(),
    }


def nodes(strategy: str) -> rf.Machine:
    """Of which the ranks are said to be: two, but for "ulysses" with two GPUs each."""
    gpus = 2 if strategy == "ulysses" else max(1, dist.get_world_size() // 2)
    return rf.Machine(gpus_per_node=gpus, at_once=0)


def relative_error(x: Tensor, want: Tensor) -> float:
    return ((x.double() - want.double()).abs().max() / want.double().abs().max()).item()


def run_sharded(
    plan: rf.Plan, tensors: list[Tensor], score: Any, shared: list[Tensor], **options: Any
) -> list[Tensor]:
    """out, dq, dk, dv of the whole sequence, and gradients of what all ranks share."""
    local = [plan.shard(x, 2).requires_grad_() for x in tensors[:3]]
    out = rf.flex_attention(*local, score_mod=score, block_mask=plan, enable_gqa=True, **options)
    grads = torch.autograd.grad(out, [*local, *shared], plan.shard(tensors[3], 2))
    for share in grads[3:]:
        dist.all_reduce(share)
    return [plan.unshard(x, 2) for x in (out, *grads[:3])] + list(grads[3:])


def grid(device: torch.device) -> None:
    torch.manual_seed(0)

    def make(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, device=device)

    q, k, v, dout = make(B, HQ, S, D), make(B, HKV, S, D), make(B, HKV, S, DV), make(B, HQ, S, DV)
    slopes = torch.exp2(-torch.arange(1.0, HQ + 1, dtype=torch.float64, device=device))
    slopes, sinks = slopes.requires_grad_(), make(HQ).requires_grad_()
    # bf16 and fp16 round their results once; gradients also inherit out's rounding. Those of
    # slopes and sinks sum up errors, on one GPU as well.
    limits = {torch.float64: 1e-9, torch.bfloat16: 2**-6, torch.float16: 2**-9}
    for (name, mask), dtype in itertools.product(masks(device).items(), limits):
        tensors = [x.to(dtype) for x in (q, k, v, dout)]
        score = None if name == "full" else rf.alibi(slopes)
        exact = reference_attention_with_gradients(
            *(x.double() for x in tensors),
            mask_mod=mask,
            score_mod=score,
            sinks=sinks,
            captures=() if score is None else (slopes,),
        )
        expected = [exact.out, exact.dq, exact.dk, exact.dv, exact.dsinks, *exact.dcaptures]
        shared = [sinks] if score is None else [sinks, slopes]
        leaves = [x.detach().requires_grad_() for x in tensors[:3]]
        block_mask = rf.create_block_mask(mask, B, None, S, S, BLOCK_SIZE=64)
        out = rf.flex_attention(*leaves, score, block_mask, enable_gqa=True, sinks=sinks)
        alone = [out, *torch.autograd.grad(out, [*leaves, *shared], tensors[3])]
        allowed = [max(limits[dtype], 2 * e) for e in map(relative_error, alone, expected)]
        allowed[:4] = [limits[dtype]] * 4
        for layout, strategy in itertools.product(LAYOUTS, EVERY_STRATEGY):
            plan = rf.plan(
                mask,
                S,
                B=B,
                layout=layout,
                strategy=strategy,
                block_size=64,
                machine=nodes(strategy),
            )
            results = run_sharded(plan, tensors, score, shared, sinks=sinks)
            errors = list(map(relative_error, results, expected))
            wrong = [e > most for e, most in zip(errors, allowed, strict=True)]
            assert not any(wrong), (name, dtype, layout, strategy, errors, allowed)
    say(f"grid: {len(masks(device))} masks x 3 dtypes x layouts x strategies agree with fp64")


def randomly(share: int, device: torch.device, count: int | None = None) -> None:
    """A share of the random cases: all of them, then the comparisons, which take longest: each
    rank has its part of them."""
    cases = random_cases()[:count][share::SHARES]
    found = [run_case(case, layout, strategy, device) for case, layout, strategy in cases]
    torch.cuda.synchronize()
    rank, size = dist.get_rank(), dist.get_world_size()
    for (case, layout, strategy), results in list(zip(cases, found, strict=True))[rank::size]:
        assert_equals_reference(case, results, f"{layout} {strategy}")
    dist.barrier()
    say(f"random: {len(found)} cases agree with fp64")


def run_case(case: Case, layout: str, strategy: str, device: torch.device) -> Reference:
    p = case.build(device=device)
    plan = rf.plan(
        p.mask, case.seq_len, B=case.B, H=case.Hq,
        layout=layout, strategy=strategy, block_size=case.block_size,
        machine=rf.Machine(at_once=case.seed % 2 * 65536),
    )  # fmt: skip
    found = attend(p.shard(plan), plan)
    for share in found.dcaptures:
        dist.all_reduce(share)
    return Reference(*(plan.unshard(x, 2) for x in found[:5]), None, found.dcaptures)


def stress(device: torch.device) -> None:
    """No hang, no wrong result, no memory growth."""
    r = random.Random(1)
    groups = [dist.new_group(), dist.new_group()]
    others = dist.new_group()  # the second user of NCCL, beside attention
    gradients = torch.ones(1 << 22, device=device)
    torch.manual_seed(1)
    before = (0, 0)
    started = time.perf_counter()
    for step in range(STRESS_STEPS):
        length, (mask, D) = random_problem(r, device)
        whole = [torch.randn(1, h, length, D, device=device).bfloat16() for h in (4, 2, 2, 4)]
        layout, strategy = r.choice(LAYOUTS), r.choice(EVERY_STRATEGY)
        block_size = r.choice((64, 128))
        plan = rf.plan(
            mask, length, groups[step % 2], layout=layout, strategy=strategy,
            block_size=block_size, machine=nodes(strategy),
        )  # fmt: skip
        busy = dist.all_reduce(gradients, group=others, async_op=True)
        found = run_sharded(plan, whole, None, [])
        busy.wait()
        gradients.fill_(1)
        alone = [x.requires_grad_() for x in whole[:3]]
        block_mask = rf.create_block_mask(mask, None, None, length, length, BLOCK_SIZE=block_size)
        out = rf.flex_attention(*alone, block_mask=block_mask, enable_gqa=True)
        wanted = [out, *torch.autograd.grad(out, alone, whole[3])]
        for name, x, want in zip(("out", "dq", "dk", "dv"), found, wanted, strict=True):
            error = relative_error(x.detach(), want.detach())
            assert error < 2**-6, (step, name, layout, strategy, error)
        if step % 100 == 0:
            say(f"stress: step {step} after {time.perf_counter() - started:.0f} s")
        if step == STRESS_STEPS // 4:
            torch.cuda.synchronize()
            before = (torch.cuda.memory_allocated(), torch.cuda.memory_reserved())
    torch.cuda.synchronize()
    del plan, found, alone, block_mask, out, wanted, whole, mask, x, want
    after = (torch.cuda.memory_allocated(), torch.cuda.memory_reserved())
    assert after[0] <= before[0] + (1 << 22) and after[1] <= 1.5 * before[1], (before, after)
    seconds = time.perf_counter() - started
    say(f"stress: {STRESS_STEPS} steps in {seconds:.0f} s; bytes held {before[0]} -> {after[0]}")


def random_problem(r: random.Random, device: torch.device) -> tuple[int, tuple[Any, int]]:
    """A length, a mask and a head dim; the kernels are those of random_cases.py, but for a window
    that is read from a tensor."""
    length = r.randint(900, 2000)
    kind = r.randrange(3)
    if kind == 0:
        return length, (rf.causal(), 64)
    if kind == 1:
        width = torch.tensor(r.randint(1, 700), device=device)
        return length, (lambda b, h, q, kv: (q >= kv) & (q - kv < width), 64)
    cuts = torch.zeros(length, dtype=torch.int64)
    cuts[[r.randrange(length) for _ in range(r.randint(1, 12))]] = 1
    return length, (rf.causal() & rf.document(cuts.cumsum(0).to(device)), 128)


def fail(how: str, device: torch.device) -> None:
    """The last rank goes astray once all have been through a call; the others must say so."""
    logging.basicConfig()
    length = 4096
    plan = rf.plan(rf.full(), length, layout="contiguous", strategy="ring")
    x = torch.randn(1, 2, length, 64, device=device).bfloat16()
    local = plan.shard(x, 2)
    rf.flex_attention(local, local, local, block_mask=plan)
    torch.cuda.synchronize()
    if dist.get_rank() == dist.get_world_size() - 1:
        if how == "die":
            os._exit(3)
        time.sleep(10 * FAILURE_TIMEOUT.total_seconds())
    rf.flex_attention(local, local, local, block_mask=plan)
    torch.cuda.synchronize()
    say("this must not be reached")


def say(text: str) -> None:
    if dist.get_rank() == 0:
        print(text, flush=True)


def main() -> None:
    what = sys.argv[1:]
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    # Where it hung, if it did.
    faulthandler.dump_traceback_later(float(os.environ.get("DUMP_AFTER", 270)), exit=True)
    failing = [name for name in what if name in ("die", "stall")]
    timeout = FAILURE_TIMEOUT if failing else timedelta(seconds=60)
    dist.init_process_group("nccl", device_id=device, timeout=timeout)
    for name, _, share in (part.partition(":") for part in what):
        if name in failing:
            fail(name, device)
        elif name in ("random", "some"):
            randomly(int(share), device, 50 if name == "some" else None)
        else:
            {"grid": grid, "stress": stress}[name](device)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
