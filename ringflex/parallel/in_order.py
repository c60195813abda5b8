"""Plans of a group are finished in the order in which the program began them, on every rank.

Ranks agree on plans over one backend of their group. Were a plan finished in one thread while
another is in a second one, ranks could come to the same collective with different plans.
"""

from __future__ import annotations

import functools
import weakref
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
import torch.distributed as dist

from ringflex.modes import outside_inference_mode
from ringflex.parallel.comm import Communicator

# One thread for each group, from the first plan that is made in the background on.
_workers: weakref.WeakKeyDictionary[dist.ProcessGroup, ThreadPoolExecutor] = (
    weakref.WeakKeyDictionary()
)


def finish_behind(planning: Any, comm: Communicator | None) -> Future[Any]:
    """Finishes a plan under way in the group's thread, after those that were begun before."""
    if comm is None:
        return _alone().submit(_finish, planning)
    if comm.group not in _workers:
        _workers[comm.group] = _worker()
    return _workers[comm.group].submit(_finish, planning)


def finish(planning: Any, comm: Communicator | None) -> Any:
    """Finishes a plan now; if others of the group are made in the background, after these."""
    if comm is None or comm.group not in _workers:
        return _finish(planning)
    return finish_behind(planning, comm).result()


def _worker() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(1, "ringflex plans")


_alone = functools.cache(_worker)  # of plans without a group


@outside_inference_mode
def _finish(planning: Any) -> Any:
    with torch.no_grad():  # which a thread of its own does not inherit
        return planning.finish()
