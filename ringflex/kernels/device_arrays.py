"""numpy arrays on a device, and what orders streams that use the same ones.

Copies to a GPU are made on the stream that needs an array first, and the program does not wait.
Kept arrays may be read on another stream next, by a kernel that would not wait for them either.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ringflex.masks.runs import Array


def to_device(x: Array, device: torch.device) -> Tensor:
    """A copy on `device`. To a GPU it goes through pinned memory, and the program does not wait."""
    tensor = torch.from_numpy(np.ascontiguousarray(x))
    if device.type != "cuda":
        return tensor.to(device)
    copy = tensor.pin_memory().to(device, non_blocking=True)
    if not torch.cuda.is_current_stream_capturing():
        stream = torch.cuda.current_stream(device)
        event = _uploads(stream.device_index).setdefault(stream.cuda_stream, torch.cuda.Event())
        event.record(stream)
    return copy


def ready_for_current_stream(arrays: Iterable[Any]) -> int | None:
    """The current stream waits for all copies that other streams have been given; and `arrays`, as
    far as they are tensors on a GPU, are not freed before it has used them.

    Returns:
        The stream's handle; None where there is no GPU, and within a capture, which must not wait
        for what is not part of it.
    """
    tensors = [x for x in _flat(arrays) if isinstance(x, Tensor) and x.is_cuda]
    if not tensors or torch.cuda.is_current_stream_capturing():
        return None
    stream = torch.cuda.current_stream(tensors[0].device)
    handle: int = stream.cuda_stream
    for other, event in list(_uploads(stream.device_index).items()):
        if other != handle:
            stream.wait_event(event)
    for x in tensors:
        x.record_stream(stream)
    return handle


def _flat(arrays: Iterable[Any]) -> Iterator[Any]:
    for x in arrays:
        if isinstance(x, (tuple, list)):
            yield from _flat(x)
        else:
            yield x


@functools.cache
def _uploads(device: int) -> dict[int, torch.cuda.Event]:
    """Behind the last copy on each stream of a GPU, by its handle."""
    return {}
