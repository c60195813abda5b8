"""The peers of bench_parallel.py: torch FlexAttention with all-gathered K/V, torch's context
parallelism, ring-flash-attn, and SDPA on one GPU. Each exists in one form for each problem."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import subprocess
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
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask as torch_block_mask
from torch.nn.attention.flex_attention import flex_attention as torch_flex

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import ringflex as rf
from parallel_measure import Contender, Run, Spec, World, problem, silent
from problems import SHORT, Problem

FLEX = "torch flex, all-gather"
_LONGEST = 65536  # tokens of what FlexAttention is compiled for ahead: more take much memory
Peer = tuple[str, Callable[[], Contender]]  # made only when its turn comes, as that may fail


def peers(world: World, spec: Spec, p: Problem) -> Iterator[Peer]:
    """The names of those that can run this mask, and how to make them."""
    yield FLEX, partial(flex, world, spec, p)
    if spec.mask != "causal":
        return
    for method, backend in (
        ("allgather", SDPBackend.CUDNN_ATTENTION),
        ("allgather", SDPBackend.FLASH_ATTENTION),
        ("alltoall", SDPBackend.CUDNN_ATTENTION),
    ):
        short = "cuDNN" if backend == SDPBackend.CUDNN_ATTENTION else "FA2"
        name = f"torch context_parallel, {method}, {short}"
        yield name, partial(context_parallel, name, world, spec, method, backend)
    yield "ring-flash-attn zigzag", partial(ring_flash_attn, world, spec)


def zigzag_positions(world: World, tokens: int) -> Tensor:
    """Head-tail: rank r holds chunks r and 2W - 1 - r of 2W."""
    W = world.size
    if tokens % (2 * W):
        raise ValueError(f"{tokens} tokens are not a multiple of 2 x {W} ranks")
    chunks = torch.arange(tokens).chunk(2 * W)
    return torch.cat([chunks[world.rank], chunks[2 * W - 1 - world.rank]])


class GatherZigzag(torch.autograd.Function):
    """The whole K or V in global order from every rank's two chunks; the gradients of all ranks
    summed on the way back. One collective and one copy, each way."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, size: int) -> Tensor:
        ctx.size = size
        parts = x.new_empty(size * x.shape[0], *x.shape[1:])
        dist.all_gather_into_tensor(parts, x.contiguous())
        halves = [part.chunk(2, 2) for part in parts.chunk(size)]
        return torch.cat([h[0] for h in halves] + [h[1] for h in reversed(halves)], 2)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        W = ctx.size
        chunks = grads[0].chunk(2 * W, 2)
        parts = torch.stack([torch.cat([chunks[r], chunks[2 * W - 1 - r]], 2) for r in range(W)])
        mine = torch.empty_like(parts[0])
        dist.reduce_scatter_tensor(mine, parts.flatten(0, 1))
        return mine, None


def _compiled_flex(spec: Spec, p: Problem, positions: Tensor, device: torch.device) -> Run:
    """Compiled FlexAttention of local queries against the whole K/V in global order."""
    at = positions.to(device)
    block_mask = None
    if spec.mask != "full":
        mod = p.mask_mod
        block_mask = torch_block_mask(
            lambda b, h, q_idx, kv_idx: mod(b, h, at[q_idx], kv_idx),
            None,
            None,
            positions.numel(),
            spec.tokens,
            device=str(device),
            _compile=spec.tokens > 8192,
        )
    compiled = torch.compile(torch_flex, dynamic=False)
    return lambda q, k, v: compiled(q, k, v, block_mask=block_mask, enable_gqa=True)


def flex(world: World, spec: Spec, p: Problem) -> Contender:
    """As torchtitan does it: K/V gathered, then one kernel; head-tail layout for every mask."""
    positions = zigzag_positions(world, spec.tokens)
    kernel = _compiled_flex(spec, p, positions, world.device)
    gather = GatherZigzag.apply

    def warm(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        whole = [x.repeat(1, 1, world.size, 1) for x in (k, v)]
        return kernel(q, *whole)

    return Contender(
        name=FLEX,
        run=lambda q, k, v: kernel(q, gather(k, world.size), gather(v, world.size)),
        positions=positions,
        warm=warm,
    )


def context_parallel(
    name: str, world: World, spec: Spec, method: str, backend: SDPBackend
) -> Contender:
    """torch.distributed.tensor.experimental.context_parallel around SDPA; causal only."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.experimental import context_parallel as enable
    from torch.distributed.tensor.experimental._attention import set_rotate_method

    mesh = init_device_mesh(world.device.type, (world.size,))

    @contextlib.contextmanager
    def context() -> Iterator[None]:
        set_rotate_method(method)
        # It takes the length and the device from a buffer that it shards, and needs one.
        buffer = torch.zeros(spec.tokens, device=world.device)
        with (
            enable(mesh, buffers=[buffer], buffer_seq_dims=[0], no_restore_buffers={buffer}),
            sdpa_kernel(backend),
        ):
            yield

    return Contender(
        name=name,
        run=lambda q, k, v: torch.nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, enable_gqa=True
        ),
        positions=zigzag_positions(world, spec.tokens),
        context=context,
    )


def ring_flash_attn(world: World, spec: Spec) -> Contender:
    from ring_flash_attn import zigzag_ring_flash_attn_func  # type: ignore[import-not-found]

    return Contender(
        name="ring-flash-attn zigzag",
        run=lambda q, k, v: zigzag_ring_flash_attn_func(q, k, v, causal=True),
        positions=zigzag_positions(world, spec.tokens),
        tokens_first=True,
    )


def one_gpu_sdpa(causal: bool) -> Contender:
    """The yardstick: cuDNN on one GPU."""

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return torch.nn.functional.scaled_dot_product_attention(
                q, k, v, is_causal=causal, enable_gqa=True
            )

    return Contender(name="SDPA cuDNN, one GPU", run=run)


def precompile(world: World, specs: list[Spec], with_peers: bool, seconds: float) -> None:
    """Fills the compile caches, on rank 0 for all, in a process for each mask of ours and each
    problem of FlexAttention, as compiling takes longest. What fails here, or takes longer than
    `seconds`, is compiled again when needed."""
    if world.rank:
        return
    short = [dataclasses.replace(s, tokens=min(s.tokens, SHORT)) for s in specs]
    jobs = [("ours", s) for s in {s.mask: s for s in short}.values()]  # serve every length
    jobs += [("flex", s) for s in specs if with_peers and s.tokens <= _LONGEST]
    environment = {**os.environ, "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    children = []
    for i, (whose, s) in enumerate(jobs):
        device = f"cuda:{i % torch.cuda.device_count()}"
        problem = [s.mask, s.tokens, s.heads, s.kv_heads, s.dim]
        settings = json.dumps([device, world.size, whose, *problem])
        children.append(subprocess.Popen([sys.executable, __file__, settings], env=environment))
    end = time.monotonic() + seconds
    for child, (whose, s) in zip(children, jobs, strict=True):
        try:
            child.wait(timeout=max(0.1, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            print(f"compiling {whose}, {s}: not done in {seconds} s", flush=True)
            child.kill()
            child.wait()


def _compile(settings: str) -> None:
    """What one of these processes does: forward and backward of ours (all ranks' rings, which
    transfer nothing) or of FlexAttention, with zeros."""
    name, size, whose, mask, tokens, heads, kv_heads, dim = json.loads(settings)
    started = time.monotonic()
    device = torch.device(name)
    torch.cuda.set_device(device)
    spec = Spec(
        mask=mask, tokens=tokens, heads=heads, kv_heads=kv_heads, dim=dim, dtype=torch.bfloat16
    )
    p = problem(spec, device)

    def both(run: Run, q_len: int, kv_len: int) -> None:
        leaves = [
            torch.zeros(1, h, n, dim, device=device, dtype=spec.dtype).requires_grad_()
            for h, n in ((heads, q_len), (kv_heads, kv_len), (kv_heads, kv_len))
        ]
        out = run(*leaves)
        torch.autograd.grad(out, leaves, torch.zeros_like(out))

    worlds = [World(rank=r, size=size, device=device, control=None) for r in range(size)]
    if whose == "flex":
        positions = zigzag_positions(worlds[0], tokens)
        both(_compiled_flex(spec, p, positions, device), positions.numel(), tokens)
    else:
        block_mask = rf.create_block_mask(p.mask_mod, None, None, tokens, tokens, device=device)
        both(partial(rf.flex_attention, block_mask=block_mask, enable_gqa=True), tokens, tokens)
        for plan, world in zip(
            rf.plan_all(p.mask_mod, tokens, size, strategy="ring"), worlds, strict=True
        ):
            run = partial(rf.flex_attention, block_mask=silent(plan, world), enable_gqa=True)
            both(run, plan.local_len, plan.local_len)
    print(f"compiled {whose}, {spec}: {time.monotonic() - started:.0f} s", flush=True)


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    _compile(sys.argv[1])
