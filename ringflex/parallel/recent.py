"""The last plans of each process group: the same masks over the same values are planned once."""

from __future__ import annotations

import weakref
from collections import OrderedDict
from dataclasses import replace
from threading import Lock
from typing import TYPE_CHECKING

import torch.distributed as dist

from ringflex.parallel.plan import Plan

if TYPE_CHECKING:
    from ringflex.parallel.comm import Communicator

_KEPT = 4  # of a group: the device memory of what they capture is held as long
_recent: weakref.WeakKeyDictionary[dist.ProcessGroup, OrderedDict[bytes, dict[str, Plan]]] = (
    weakref.WeakKeyDictionary()
)
_lock = Lock()  # plans may be made in another thread


def recall(comm: Communicator | None, key: bytes) -> dict[str, Plan] | None:
    """What was remembered for a key, as plans of this communicator; None if it is forgotten."""
    if comm is None:
        return None
    with _lock:
        plans = _recent.get(comm.group, OrderedDict()).get(key)
        if plans is None:
            return None
        _recent[comm.group].move_to_end(key)
    return {name: replace(plan, comm=comm) for name, plan in plans.items()}


def remember(comm: Communicator | None, key: bytes, plans: dict[str, Plan]) -> None:
    """Keeps plans, without their communicator, which would keep the group alive.

    Args:
        key: bytes that are equal for equal requests.
    """
    if comm is None:
        return
    with _lock:
        kept = _recent.setdefault(comm.group, OrderedDict())
        kept[key] = {name: replace(plan, comm=None) for name, plan in plans.items()}
        while len(kept) > _KEPT:
            kept.popitem(last=False)
