"""Named checks of what users pass, with the errors they read."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ringflex.kernels.contract import compute_dtype
from ringflex.masks.block_mask import BlockMask
from ringflex.masks.traced_mod import TracedMod
from ringflex.parallel.plan import Plan

_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def check_tensors(q: Any, k: Any, v: Any, *, enable_gqa: bool) -> None:
    """q `[B, Hq, Sq, D]`, k `[B, Hkv, Skv, D]`, v `[B, Hkv, Skv, Dv]`: one dtype, one device."""
    kind: Any = None
    if isinstance(q, Tensor) and isinstance(k, Tensor) and isinstance(v, Tensor):
        kind = (
            type(q), type(k), type(v), q.shape, k.shape, v.shape, q.dtype, k.dtype, v.dtype,
            q.device, k.device, v.device, enable_gqa,
        )  # fmt: skip
        if kind in _accepted:
            return
    _check_tensors(q, k, v, enable_gqa=enable_gqa)
    if len(_accepted) < 4096:
        _accepted.add(kind)


_accepted: set[Any] = set()


def _check_tensors(q: Any, k: Any, v: Any, *, enable_gqa: bool) -> None:
    for name, x in (("query", q), ("key", k), ("value", v)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
        if type(x) not in (Tensor, torch.nn.Parameter):
            raise TypeError(
                f"{name} must be a plain torch.Tensor, got {type(x).__name__} "
                "(of a DTensor, pass `.to_local()` in the plan's layout)"
            )
        if x.ndim != 4:
            raise ValueError(f"{name} must be [B, H, S, D], got shape {tuple(x.shape)}")
        if 0 in x.shape:
            raise ValueError(f"{name} has an empty dimension: shape {tuple(x.shape)}")
        if x.dtype not in _DTYPES:
            raise TypeError(f"{name} must be bf16, fp16, fp32 or fp64, got {x.dtype}")
    if not q.dtype == k.dtype == v.dtype:
        raise TypeError(
            f"query, key and value must have one dtype, got {q.dtype}, {k.dtype}, {v.dtype}"
        )
    if not q.device == k.device == v.device:
        raise ValueError(
            f"query, key and value must be on one device, got {q.device}, {k.device}, {v.device}"
        )
    shapes = f"query {tuple(q.shape)}, key {tuple(k.shape)}, value {tuple(v.shape)}"
    if not q.shape[0] == k.shape[0] == v.shape[0]:
        raise ValueError(f"query, key and value must have one batch size, got {shapes}")
    if k.shape[1:3] != v.shape[1:3]:
        raise ValueError(f"key and value must have the same heads and length, got {shapes}")
    if q.shape[3] != k.shape[3]:
        raise ValueError(f"query and key must have the same head dim, got {shapes}")
    if q.shape[1] % k.shape[1]:
        raise ValueError(f"query heads must be a multiple of key heads, got {shapes}")
    if q.shape[1] != k.shape[1] and not enable_gqa:
        raise ValueError(
            f"query has {q.shape[1]} heads, key {k.shape[1]}: pass enable_gqa=True for "
            "grouped-query attention"
        )


def check_mask_fits(mask: BlockMask, q: Tensor, k: Tensor) -> None:
    """A one-device block mask against the tensors it is used with."""
    if (q.shape[2], k.shape[2]) != (mask.q_len, mask.kv_len):
        raise ValueError(
            f"block_mask was made for Q_LEN={mask.q_len}, KV_LEN={mask.kv_len}; query and key have "
            f"{q.shape[2]} and {k.shape[2]} tokens: make one for these lengths"
        )
    _check_axes(mask, q)


def check_plan_fits(plan: Plan, q: Tensor, k: Tensor) -> None:
    """A plan against this rank's shards."""
    if not q.shape[2] == k.shape[2] == plan.local_len:
        raise ValueError(
            f"the plan holds {plan.local_len} slots of {plan.seq_len} tokens on each of "
            f"{plan.world_size} ranks; query and key have {q.shape[2]} and {k.shape[2]} tokens: "
            "pass this rank's shard, e.g. plan.shard(x, dim=2)"
        )
    if plan.world_size > 1 and plan.comm is None:
        raise ValueError(
            f"this plan of {plan.world_size} ranks was made without a process group (plan_all); "
            "make it with rf.plan(..., group=...) on every rank"
        )
    if plan.comm is not None and plan.world_size > 1 and plan.comm.device.type != q.device.type:
        where = "GPU" if plan.comm.on_gpu else "CPU"
        raise ValueError(
            f"the plan's process group moves {where} tensors, query is on {q.device}: "
            "make the group with the backend of the tensors (NCCL for GPUs, gloo for CPUs)"
        )
    gpus = plan.gpus_per_node
    if q.shape[1] % gpus or k.shape[1] % gpus:
        raise ValueError(
            f"strategy='ulysses' deals heads to the {gpus} GPUs of a node; query has {q.shape[1]}, "
            f"key {k.shape[1]}: both must be multiples of {gpus}"
        )
    _check_axes(plan.rows, q, gpus)


def _check_axes(mask: BlockMask, q: Tensor, gpus: int = 1) -> None:
    """gpus: among which heads are dealt; the mask is for one of them."""
    heads = mask.H * gpus if mask.H > 1 or "h" in mask.mask.uses else 1
    for axis, name, made_for, given in (
        ("B", "b", mask.B, q.shape[0]),
        ("H", "h", heads, q.shape[1]),
    ):
        depends = made_for > 1 or name in mask.mask.uses
        if depends and made_for != given:
            raise ValueError(
                f"mask '{mask.mask.name}' depends on {name} and was made for {axis}={made_for}; "
                f"query has shape {tuple(q.shape)}: make it with {axis}={given}"
            )


def check_score(score: TracedMod, q: Tensor) -> None:
    """The captured tensors of a score mod are used where they are."""
    for capture in score.captures:
        if capture.device != q.device and capture.ndim > 0:
            raise ValueError(
                f"score_mod '{score.name}' captures a tensor of shape {tuple(capture.shape)} on "
                f"{capture.device}, query is on {q.device}: move it there"
            )


def check_score_reads(score: TracedMod, plan: Plan, q: Tensor) -> None:
    """Asks the score mod at the corners of every run of blocks that the local queries see.

    A captured tensor that is too short for one rank alone would stop it amid the transfers.
    (On a GPU, where looking would stall the stream, the Triton kernels read the nearest element.)
    """
    rows = plan.rows
    if q.device.type != "cpu" or not score.captures:
        return
    bq, bk = rows.block_size
    for runs in (rows.full, rows.partial):
        if not runs.row.size:
            continue
        group, block = np.divmod(runs.row, rows.q_blocks)
        b = group // rows.H % rows.kv_starts.shape[0]
        q_end = np.minimum(rows.q_starts[block] + bq, rows.q_limit) - 1
        kv_end = np.minimum(rows.kv_starts[b, runs.end - 1] + bk, rows.kv_limit) - 1
        q_idx = np.stack([rows.q_starts[block], q_end])[None, None, :, None]
        kv_idx = np.stack([rows.kv_starts[b, runs.start], kv_end])[None, None, None]
        ends = [torch.tensor([0, n - 1], device="cpu") for n in q.shape[:2]]
        try:
            score.evaluate(
                ends[0].view(-1, 1, 1, 1, 1),
                ends[1].view(1, -1, 1, 1, 1),
                torch.from_numpy(q_idx),
                torch.from_numpy(kv_idx),
                torch.zeros(1, 1, 1, 1, 1, dtype=compute_dtype(q.dtype), device="cpu"),
                [c.detach() for c in score.captures],
            )
        except IndexError as error:
            shapes = ", ".join(str(tuple(c.shape)) for c in score.captures)
            raise ValueError(
                f"score_mod '{score.name}' reads beyond a captured tensor of shape {shapes}: "
                f"{error}"
            ) from None


def check_sinks(sinks: Any, q: Tensor) -> None:
    """One logit per query head, on the query's device."""
    if not isinstance(sinks, Tensor) or not sinks.is_floating_point():
        raise TypeError("sinks must be a floating-point tensor [Hq]")
    if sinks.shape != q.shape[1:2]:
        raise ValueError(f"sinks must be [Hq] = [{q.shape[1]}], got shape {tuple(sinks.shape)}")
    if sinks.device != q.device:
        raise ValueError(f"sinks are on {sinks.device}, query is on {q.device}")


def resolve_scale(scale: Any, head_dim: int) -> float:
    """1 / sqrt(D) by default."""
    if scale is None:
        return 1 / math.sqrt(head_dim)
    if not isinstance(scale, (int, float)) or not math.isfinite(scale):
        raise ValueError(f"scale must be a finite number or None, got {scale!r}")
    return float(scale)
