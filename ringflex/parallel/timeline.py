"""When each step computed and transferred: `with Timeline() as timeline:` around a call.

    >>> with Timeline() as timeline:
    ...     rf.flex_attention(q, k, v, block_mask=plan).backward(dout)
    >>> timeline.spans()
    [Span(track='compute', name='forward', step=0, start=0.0, end=0.0012), ...]

On a GPU, spans lie between events on the streams where the work was launched; on a CPU they are
wall-clock time of the program.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True, kw_only=True)
class Span:
    """What ran from `start` to `end`, in seconds since the timeline began.

    Attributes:
        track: "compute", "behind" (see `lanes`) or "transfer".
        name: what it was. step: of the plan.
    """

    track: str
    name: str
    step: int
    start: float
    end: float


class Open:
    """A span that has begun."""

    def __init__(self, track: str, name: str, step: int) -> None:
        self.track, self.name, self.step = track, name, step
        self.start: Any = _now()
        self.finish: Any = None

    def end(self) -> None:
        """It ends with what the current stream has been given so far."""
        self.finish = _now()


class Timeline:
    """Records the calls inside its `with` block, on this thread's and autograd's threads."""

    def __init__(self) -> None:
        self._open: list[Open] = []
        self._start: Any = None

    def __enter__(self) -> Timeline:
        global _active
        if _active is not None:
            raise RuntimeError("another Timeline is recording")
        self._start, _active = _now(), self
        return self

    def __exit__(self, *_: object) -> None:
        global _active
        _active = None

    def spans(self) -> list[Span]:
        """All that was recorded, by start; waits for the GPU."""
        if isinstance(self._start, torch.cuda.Event):
            torch.cuda.synchronize()
        made = [
            Span(
                track=o.track,
                name=o.name,
                step=o.step,
                start=_between(self._start, o.start),
                end=_between(self._start, o.finish),
            )
            for o in self._open
            if o.finish is not None
        ]
        return sorted(made, key=lambda span: span.start)


_active: Timeline | None = None


def begin(track: str, name: str, step: int) -> Open | None:
    """A span that begins now on the current stream; None if no timeline is recording."""
    if _active is None:
        return None
    span = Open(track, name, step)
    _active._open.append(span)
    return span


@contextmanager
def computing(name: str, step: int, track: str = "compute") -> Iterator[None]:
    """What is computed inside is a span of the timeline that is recording, if one is."""
    span = begin(track, name, step)
    yield
    if span is not None:
        span.end()


def _now() -> Any:
    if torch.cuda.is_available():
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
    return time.perf_counter()


def _between(start: Any, end: Any) -> float:
    if isinstance(start, torch.cuda.Event):
        return float(start.elapsed_time(end)) / 1e3
    return float(end - start)
