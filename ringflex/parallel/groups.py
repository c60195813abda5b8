"""What the library uses beside the process group that the program gives.

NCCL moves data by kernels. On a stream of ordinary priority they wait until the attention kernel
that was launched before them has no more programs to start, that is, nearly to its end; of high
priority, they run as soon as one program of it ends. So transfers have a group of high priority.

Ranks agree on plans over gloo: that waits for no GPU, and plans can be made in another thread while
the program uses its groups.
"""

from __future__ import annotations

import os
import weakref
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_process_group_store

from ringflex.parallel.watch import timeout_of

# None: the group itself, which must not hold itself.
_for_transfers: weakref.WeakKeyDictionary[dist.ProcessGroup, dist.ProcessGroup | None] = (
    weakref.WeakKeyDictionary()
)
_for_plans: weakref.WeakKeyDictionary[dist.ProcessGroup, Any] = weakref.WeakKeyDictionary()


def transfer_group(group: dist.ProcessGroup) -> dist.ProcessGroup:
    """A group of the same ranks with a communicator and a stream of high priority of its own, made
    at the first call for `group`, where all its ranks must come; used by nobody else, so that
    transfers wait for no collective of the program's.

    It is `group` itself if that has high priority already, and if it is only a part of the world:
    then making another takes ranks that need not come here. `TORCH_NCCL_HIGH_PRIORITY=1` in the
    environment, or the option of that name, gives a group of the program's high priority.
    """
    if group not in _for_transfers:
        part = len(dist.get_process_group_ranks(group)) < dist.get_world_size()
        _for_transfers[group] = None if part or _has_priority(group) else _with_priority(group)
    return _for_transfers[group] or group


def plan_backend(group: dist.ProcessGroup) -> Any:
    """A gloo backend of the same ranks, made at the first call for `group`, where all its ranks
    must come; used by nobody else.

    It finds its peers by the group's own store. It is no group that torch.distributed knows: the
    names of such are given by how many groups a rank has, which may differ from rank to rank.

    Raises:
        RuntimeError: a rank did not come.
    """
    if group not in _for_plans:
        store = dist.PrefixStore("ringflex plans", _get_process_group_store(group))
        timeout = timedelta(seconds=timeout_of(group))
        rank, size = dist.get_rank(group), dist.get_world_size(group)
        try:
            _for_plans[group] = dist.ProcessGroupGloo(store, rank, size, timeout)
        except RuntimeError as error:
            raise RuntimeError(
                f"rank {rank}: another rank of the group did not come to its first plan: {error}"
            ) from error
    return _for_plans[group]


def _has_priority(group: dist.ProcessGroup) -> bool:
    if os.environ.get("TORCH_NCCL_HIGH_PRIORITY", "0").lower() in ("1", "true", "t", "yes", "y"):
        return True
    options = group._get_backend(torch.device("cuda")).options
    return bool(getattr(options, "is_high_priority_stream", False))


def _with_priority(group: dist.ProcessGroup) -> dist.ProcessGroup | None:
    options = dist.ProcessGroupNCCL.Options(is_high_priority_stream=True)
    options._timeout = timedelta(seconds=timeout_of(group))
    ranks = dist.get_process_group_ranks(group)
    made: dist.ProcessGroup = dist.new_group(
        ranks,
        timeout=options._timeout,
        backend="nccl",
        pg_options=options,
        group_desc="ringflex transfers",
    )
    # Peers are told by their rank in the group.
    return made if dist.get_process_group_ranks(made) == ranks else None
