"""Two streams of a GPU for one call, so that no kernel's end leaves the GPU half empty.

The last programs of a kernel end one by one, and the next kernel on the stream, which waits for
all of them, finds room that nothing used: 2 to 6% of a backward with 8k tokens to a GPU. What
others wait for runs *ahead*, on a stream of high priority. What nobody waits for, such as the
backward of the local K/V, is left *behind* on the program's own stream, to run wherever there is
room. Its programs stay to the end, as long as nobody asks them to *make way*: a number is copied to
where they look, by a copy engine, as no multiprocessor may be free to do that.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from ringflex.kernels.contract import Way

_PRIORITY = -1  # above that of the program's own stream; transfers are above this
_MOST = 99  # times that a launch makes way


class Lanes:
    """On a CPU there is one lane, and all runs in the order of the program."""

    def __init__(self, device: torch.device) -> None:
        self._own = torch.cuda.current_stream(device) if device.type == "cuda" else None
        self._left: list[torch.cuda.Event] = []  # ends of what was left behind
        self._ways: list[Way] = []
        self._asked = 0

    @contextmanager
    def ahead(self) -> Iterator[None]:
        """What is launched inside begins after all that the program's stream was given before, and
        ends before what it is given later."""
        if self._own is None:
            yield
            return
        stream = _ahead_of(self._own)
        stream.wait_stream(self._own)
        try:
            with on(stream):
                try:
                    yield
                finally:
                    self.meet()  # what was left behind reads memory that is this stream's to use
        finally:
            self._own.wait_stream(stream)

    def mark(self) -> torch.cuda.Event | None:
        """Inside `ahead`: a point in time; None on a CPU."""
        return None if self._own is None else self._current.record_event()

    @contextmanager
    def behind(self, after: torch.cuda.Event | None, times: int) -> Iterator[Way]:
        """Inside `ahead`: what is launched inside waits for nothing of `ahead` that came later than
        `after`, so it must use nothing of that. Given is the way that it is to make for others,
        some `times`."""
        way, stream = Way(times), self._own
        self._ways.append(way)
        if stream is None:
            yield way
            return
        if len(self._ways) > 1:  # not after the one before
            stream = _aside_of(stream)
        assert after is not None
        stream.wait_event(after)
        try:
            with on(stream):
                yield way
        finally:
            self._left.append(stream.record_event())

    def make_way(self) -> None:
        """Inside `ahead`: what was left behind ends where it is, to go on behind what is launched,
        or transferred, next. Again before what comes after that: others may be faster to take the
        room that it leaves."""
        words = [way.word for way in self._ways if way.word is not None]
        if words and self._asked < _MOST:
            self._asked += 1
            for word in words:
                word.copy_(_numbers()[self._asked], non_blocking=True)

    @property
    def meeting(self) -> bool:
        """Whether something was left behind that `meet` would wait for."""
        return bool(self._left)

    def meet(self) -> None:
        """What was left behind is done for what is launched ahead from now on."""
        for event in self._left:
            self._current.wait_event(event)
        self._left = []

    @property
    def _current(self) -> torch.cuda.Stream:
        assert self._own is not None
        return torch.cuda.current_stream(self._own.device_index)


class on:
    """`with torch.cuda.stream`, of the current device: that looks up which one it is several times,
    which takes as long as to launch several kernels."""

    def __init__(self, stream: torch.cuda.Stream) -> None:
        self._stream = stream

    def __enter__(self) -> None:
        self._before = torch.cuda.current_stream(self._stream.device_index)
        torch.cuda.set_stream(self._stream)

    def __exit__(self, *_: object) -> None:
        torch.cuda.set_stream(self._before)


@functools.cache
def _numbers() -> list[Tensor]:
    numbers = torch.arange(_MOST + 1, dtype=torch.int32, device="cpu")
    return list(numbers.pin_memory().split(1))


@functools.cache
def _aside_of(own: torch.cuda.Stream) -> torch.cuda.Stream:
    return torch.cuda.Stream(own.device_index)


@functools.cache
def _ahead_of(own: torch.cuda.Stream) -> torch.cuda.Stream:
    """One for all calls: memory that it was given stays with it. But for each stream of the
    program one of its own: what is returned out of that memory is read there, and may be given to
    the next call once that has been waited for."""
    return torch.cuda.Stream(own.device_index, priority=_PRIORITY)
