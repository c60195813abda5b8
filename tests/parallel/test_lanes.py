"""Which stream waits for what, with streams that only write down what they are told."""

from __future__ import annotations

import pytest
import torch

from ringflex.parallel import lanes
from ringflex.parallel.lanes import Lanes

GPU = torch.device("cuda", 0)


class Stream:
    device_index = 0

    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self.log = name, log

    def record_event(self) -> str:
        event = f"{self.name}@{len(self.log)}"
        self.log.append(f"{event} recorded")
        return event

    def wait_event(self, event: str) -> None:
        self.log.append(f"{self.name} waits for {event}")

    def wait_stream(self, other: Stream) -> None:
        self.log.append(f"{self.name} waits for {other.name}")


class Gpu:
    """`current` stream, and the log of what all were told."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.current = Stream("own", self.log)

    def launch(self, what: str) -> None:
        self.log.append(f"{what} on {self.current.name}")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    gpu = Gpu()
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: gpu.current)
    monkeypatch.setattr(torch.cuda, "set_stream", lambda stream: setattr(gpu, "current", stream))
    made = lambda device, priority=0: Stream("ahead" if priority else "aside", gpu.log)
    monkeypatch.setattr(torch.cuda, "Stream", made)
    for cached in (lanes._ahead_of, lanes._aside_of):
        cached.cache_clear()
    return gpu


def test_what_is_left_behind_runs_beside_what_is_ahead(gpu: Gpu) -> None:
    way = Lanes(GPU)
    with way.ahead():
        start = way.mark()
        gpu.launch("first")
        for what in ("local", "last"):
            with way.behind(start, 1):
                gpu.launch(what)
        gpu.launch("second")
    gpu.launch("next")
    assert gpu.log == [
        "ahead waits for own",
        "ahead@1 recorded",
        "first on ahead",
        "own waits for ahead@1",  # and not for the first
        "local on own",
        "own@5 recorded",
        "aside waits for ahead@1",
        "last on aside",
        "aside@8 recorded",
        "second on ahead",
        "ahead waits for own@5",
        "ahead waits for aside@8",
        "own waits for ahead",
        "next on own",
    ]


def test_each_stream_of_the_program_has_lanes_of_its_own(gpu: Gpu) -> None:
    """What `ahead` returns is memory of that stream, which the next call uses again once it has
    waited for its own."""
    own, other = gpu.current, Stream("other", gpu.log)
    streams = []
    for gpu.current in (own, other, own):
        with Lanes(GPU).ahead():
            streams.append(gpu.current)
    assert streams[0] is streams[2] is not streams[1]


def test_streams_are_as_before_where_something_fails(gpu: Gpu) -> None:
    own = gpu.current

    def fail() -> None:
        way = Lanes(GPU)
        with way.ahead():
            with way.behind(way.mark(), 1):
                gpu.launch("local")
            with way.behind(way.mark(), 1):
                raise RuntimeError("no room")

    with pytest.raises(RuntimeError, match="no room"):
        fail()
    assert gpu.current is own
    assert gpu.log[-3:] == [
        "ahead waits for own@4", "ahead waits for aside@7", "own waits for ahead",
    ]  # fmt: skip
