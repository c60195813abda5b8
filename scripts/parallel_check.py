"""Small problems over all ranks against one device: bench_parallel.py times nothing wrong."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor

import ringflex as rf
from parallel_measure import Contender, Spec, World, inputs, problem
from ringflex.reference import reference_attention_with_gradients


def check(
    world: World, specs: Iterable[Spec], arguments: argparse.Namespace
) -> list[dict[str, Any]]:
    """Small problems, sharded and by each rank alone, against fp64.

    Args:
        arguments: of bench_parallel.py: layouts, strategies, nodes, backend.

    Raises:
        SystemExit: sharded, something errs more than twice as much as on one device (where that is
            exact, more than a few roundings of fp32).
    """
    found = []
    for spec in specs:
        mask = problem(spec, world.device).mask_mod
        whole = inputs(spec, world.device, Contender(name="whole", run=_unused))
        exact = reference_attention_with_gradients(
            *(x.detach().double() for x in whole), mask_mod=mask
        )
        wanted = (exact.out, exact.lse, exact.dq, exact.dk, exact.dv)
        block_mask = rf.create_block_mask(
            mask, None, None, spec.tokens, spec.tokens, device=world.device
        )
        backend, nodes = arguments.backend, arguments.nodes
        one = world.together(partial(_all_results, whole, block_mask, backend))
        for layout in arguments.layouts:
            for strategy in arguments.strategies:
                plan = rf.plan(mask, spec.tokens, layout=layout, strategy=strategy, machine=nodes)
                local = tuple(plan.shard(x.detach(), 2) for x in whole)
                many = _all_results(local, plan, backend)
                errors = {
                    name: [_error(x[:, :, plan.valid], plan.shard(w, 2)[:, :, plan.valid])
                           for x in (m, plan.shard(o, 2))]
                    for name, m, o, w in zip(("out", "lse", "dq", "dk", "dv"), many, one, wanted)
                }  # fmt: skip
                bad = {n: e for n, e in errors.items() if not e[0] <= 2 * e[1] + 1e-6}
                wrong = [f"rank {r}: {b}" for r, b in enumerate(world.gather(bad)) if b]
                if wrong:
                    raise SystemExit(f"{spec}, {plan.layout.name}, {strategy} is wrong: {wrong}")
                worst = world.gather(max(e[0] for e in errors.values()))
                found.append(
                    {"mask": spec.mask, "tokens": spec.tokens, "layout": layout,
                     "strategy": strategy, "error": max(worst)}
                )  # fmt: skip
    return found


def _unused(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    raise AssertionError("only the inputs are wanted")


def _all_results(tensors: tuple[Tensor, ...], block_mask: Any, backend: str) -> list[Tensor]:
    """out, lse, dq, dk, dv."""
    q, k, v = leaves = [x.detach().requires_grad_() for x in tensors[:3]]
    out, lse = rf.flex_attention(
        q, k, v, block_mask=block_mask, enable_gqa=True, return_lse=True, backend=backend
    )
    return [out.detach(), lse.detach(), *torch.autograd.grad(out, leaves, tensors[3])]


def _error(x: Tensor, wanted: Tensor) -> float:
    """Root mean square error, relative. NaN and infinities on one side make it NaN or infinite."""
    difference = (x.double() - wanted.double()).square().mean()
    return (difference / wanted.double().square().mean()).sqrt().item()
