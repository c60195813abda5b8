"""Process groups for transfers that go before kernels.

NCCL moves data by kernels. On a stream of ordinary priority they wait until the attention kernel
that was launched before them has no more programs to start, that is, nearly to its end; of high
priority, they run as soon as one program of it ends.
"""

from __future__ import annotations

import os
import weakref
from datetime import timedelta

import torch
import torch.distributed as dist

from ringflex.parallel.watch import timeout_of

# None: the group itself.
_made: weakref.WeakKeyDictionary[dist.ProcessGroup, dist.ProcessGroup | None] = (
    weakref.WeakKeyDictionary()
)


def transfer_group(group: dist.ProcessGroup) -> dist.ProcessGroup:
    """A group of the same ranks with a communicator and a stream of high priority of its own, made
    at the first call for `group`, where all its ranks must come; used by nobody else, so that
    transfers wait for no collective of the program's.

    It is `group` itself if that has high priority already, and if the program's world is bound to
    devices (`init_process_group(device_id=...)`) and the group is only a part of it: then NCCL
    splits communicators, which takes all ranks of the world.
    """
    if group not in _made:
        ranks = dist.get_process_group_ranks(group)
        bound = dist.group.WORLD.bound_device_id is not None  # type: ignore[union-attr]
        part = len(ranks) < dist.get_world_size()
        itself = _has_priority(group) or (bound and part)
        _made[group] = None if itself else _new(group, ranks)
    return _made[group] or group


def _has_priority(group: dist.ProcessGroup) -> bool:
    if os.environ.get("TORCH_NCCL_HIGH_PRIORITY", "0").lower() in ("1", "true", "t", "yes", "y"):
        return True
    options = group._get_backend(torch.device("cuda")).options
    return bool(getattr(options, "is_high_priority_stream", False))


def _new(group: dist.ProcessGroup, ranks: list[int]) -> dist.ProcessGroup | None:
    timeout = timedelta(seconds=timeout_of(group))
    options = dist.ProcessGroupNCCL.Options(is_high_priority_stream=True)
    options._timeout = timeout
    made = dist.new_group(
        ranks,
        timeout=timeout,
        backend="nccl",
        pg_options=options,
        use_local_synchronization=True,
        group_desc="ringflex transfers",
    )
    # Peers are told by their rank in the group.
    return made if dist.get_process_group_ranks(made) == ranks else None
