"""The ranks of scripts/train.py: how they meet, shard the weights and sum gradients."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from model import Transformer
from settings import Config

COLLECTIVE_TIMEOUT = timedelta(minutes=10)


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """Who trains together: `everyone` sums gradients, the ranks of `cp` share each sequence."""

    everyone: dist.ProcessGroup
    cp: dist.ProcessGroup
    dp_rank: int
    dp_size: int
    device: torch.device


def start(config: Config) -> Ranks:
    """Join the ranks that torchrun started, or be the only one: NCCL on GPUs, gloo on CPUs."""
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    if world_size % config.dp:
        raise ValueError(f"dp={config.dp} does not divide the {world_size} ranks of this job")
    if config.check and world_size == 1:
        raise ValueError("--check compares with one rank: run it by torchrun on 2 ranks or more")
    if config.checkpoint_every and not config.resume and config.newest_checkpoint:
        raise ValueError(
            f"{config.newest_checkpoint} is from an earlier run; pass --resume to go on from "
            "it, or another --out"
        )
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    else:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        torch.set_num_threads(max(1, (cores or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))
    no_launcher: dict[str, Any] = {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        timeout=COLLECTIVE_TIMEOUT,
        device_id=device if device.type == "cuda" else None,
        **({} if "RANK" in os.environ else no_launcher),
    )
    shape = (config.dp, world_size // config.dp)
    mesh = init_device_mesh(device.type, shape, mesh_dim_names=("dp", "cp"))
    assert dist.group.WORLD is not None
    return Ranks(
        everyone=dist.group.WORLD,
        cp=mesh["cp"].get_group(),
        dp_rank=mesh.get_local_rank("dp"),
        dp_size=config.dp,
        device=device,
    )


def shard_weights(model: Transformer, config: Config, ranks: Ranks) -> None:
    """Give each rank `1 / N` of every weight, on its device (FSDP2); gather a block at a time.

    Context-parallel ranks hold the same weights as data-parallel ones do, so all N = dp x cp ranks
    share them.
    """
    half = config.dtype == "bf16"
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if half else None,
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,  # positions' cosines and sines stay fp32
    )
    mesh = DeviceMesh.from_group(ranks.everyone, ranks.device.type)
    for block in model.blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    for module in model.modules():
        if isinstance(module, FSDPModule):  # a sum, as in `sum_over_ranks`, of plain ReduceOp.SUM
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def sum_over_ranks(
    loss: Tensor, parameters: Iterable[nn.Parameter], group: dist.ProcessGroup
) -> Tensor:
    """Sum gradients, and the loss with them, over the group in one collective.

    A sum and not DistributedDataParallel's mean: each rank's loss is divided by the global number
    of tokens already, so the sum over data- and context-parallel ranks is the single-process
    gradient itself, with no factor of the world size to put in and take out again. One flat buffer
    fixes the order of addition: a run repeats bit for bit.

    Args:
        parameters: those whose gradients are this rank's share. FSDP's are summed by FSDP.

    Returns:
        The loss of the global batch, `[1]`.
    """
    parameters = list(parameters)
    shares = [p.grad.reshape(-1) for p in parameters if p.grad is not None]
    flat = torch.cat([loss.detach().reshape(1), *shares])
    dist.all_reduce(flat, group=group)
    total, *grads = flat.split([1, *(p.numel() for p in parameters)])
    for parameter, grad in zip(parameters, grads, strict=True):
        parameter.grad = grad.view_as(parameter)
    return total
