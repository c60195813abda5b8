"""Says which transfer hangs or fails before its process group gives up.

NCCL's own watchdog ends the process once a transfer fails or is not done within the group's
timeout, and knows it by a sequence number. The program may by then be stuck anywhere that waits for
the GPU, so a thread looks after the transfers and logs what they are and whom they are with.
"""

from __future__ import annotations

import logging
import threading
import time
import weakref
from collections import deque
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

log = logging.getLogger("ringflex")

_SHARE = 0.8  # of the timeout, after which to speak
_DEFAULT_TIMEOUT = 600.0  # seconds
_INTERVAL = 0.2


class _Watched(NamedTuple):
    works: Sequence[Any]
    done: Any  # torch.cuda.Event
    name: str
    deadline: float
    timeout: float


_pending: deque[_Watched] = deque()
_thread: threading.Thread | None = None
_timeouts: weakref.WeakKeyDictionary[dist.ProcessGroup, float] = weakref.WeakKeyDictionary()


def watch(
    works: Sequence[Any], done: torch.cuda.Event, name: str, group: dist.ProcessGroup
) -> None:
    """Looks after transfers that were just started.

    Args:
        works: of torch.distributed. done: recorded after them. name: what they are.
        group: whose timeout counts.
    """
    global _thread
    timeout = timeout_of(group)
    _pending.append(_Watched(works, done, name, time.monotonic() + _SHARE * timeout, timeout))
    if _thread is None or not _thread.is_alive():
        _thread = threading.Thread(target=_look, name="ringflex transfers", daemon=True)
        _thread.start()


def _look() -> None:
    while True:
        while _pending and _is_over(_pending[0]):
            _pending.popleft()
        if _pending and time.monotonic() > _pending[0].deadline:
            late = _pending.popleft()
            log.error(
                "%s: not done after %.0f s; the group's timeout is %.0f s. A rank that it waits "
                "for is dead, stalled, or took another way through the program.",
                late.name, _SHARE * late.timeout, late.timeout,
            )  # fmt: skip
        time.sleep(_INTERVAL)


def _is_over(watched: _Watched) -> bool:
    """Whether it is done, or failed: then NCCL calls it completed before the GPU is."""
    if not all(work.is_completed() for work in watched.works):
        return False
    if not watched.done.query():
        time.sleep(_INTERVAL)  # the event comes just after
        if not watched.done.query():
            log.error("%s failed, says NCCL; a rank that it is with may be dead.", watched.name)
    return True


def has_nccl(group: dist.ProcessGroup) -> bool:
    """Whether NCCL moves the group's tensors; also of a group made without naming a backend, as
    `init_device_mesh` makes the world's. torch calls its backend "undefined"; what it chose stands
    in the configuration, but maybe not in that of a part of such a world."""
    config = dist.get_backend_config(group)
    return "nccl" in config or (config == "undefined" and torch.cuda.is_available())


def timeout_of(group: dist.ProcessGroup) -> float:
    """Seconds after which a transfer of the group fails."""
    if group not in _timeouts:
        device = torch.device("cuda" if has_nccl(group) else "cpu")
        try:
            options = group._get_backend(device).options
            _timeouts[group] = options._timeout.total_seconds()
        except (AttributeError, RuntimeError):
            _timeouts[group] = _DEFAULT_TIMEOUT
    return _timeouts[group]
