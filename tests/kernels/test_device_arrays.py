"""Arrays that one stream of a GPU copies and another reads, with streams that only write down what
they are told."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from ringflex.kernels import device_arrays
from ringflex.kernels.device_arrays import ready_for_current_stream, to_device

GPU = torch.device("cuda", 0)


class Stream:
    device_index = 0

    def __init__(self, handle: int, log: list[str]) -> None:
        self.cuda_stream, self.log = handle, log

    def wait_event(self, event: "Event") -> None:
        self.log.append(f"{self.cuda_stream} waits for {event.where}")


class Event:
    where = ""

    def record(self, stream: Stream) -> None:
        self.where = f"copy on {stream.cuda_stream}"


class OnGpu(torch.Tensor):
    """Of this process in truth."""

    log: list[str]
    is_cuda = True  # type: ignore[assignment]
    device = GPU  # type: ignore[assignment]

    def record_stream(self, stream: Stream) -> None:  # type: ignore[override]
        self.log.append(f"kept for {stream.cuda_stream}")


class Gpu:
    def __init__(self) -> None:
        self.log: list[str] = []
        self.capturing = False
        self.current = Stream(1, self.log)

    def copy(self, x: np.ndarray) -> SimpleNamespace:
        copied = torch.from_numpy(x).as_subclass(OnGpu)
        copied.log = self.log
        pinned = SimpleNamespace(to=lambda device, non_blocking: copied)
        return SimpleNamespace(pin_memory=lambda: pinned)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    gpu, uploads = Gpu(), dict[int, Event]()
    cuda = SimpleNamespace(
        current_stream=lambda device: gpu.current,
        is_current_stream_capturing=lambda: gpu.capturing,
        Event=Event,
    )
    torch_ = SimpleNamespace(from_numpy=gpu.copy, cuda=cuda)
    monkeypatch.setattr(device_arrays, "torch", torch_)
    monkeypatch.setattr(device_arrays, "_uploads", lambda device: uploads)
    return gpu


def test_another_stream_waits_for_a_copy_and_memory_for_the_other_stream(gpu: Gpu) -> None:
    x = to_device(np.arange(3), GPU)
    assert ready_for_current_stream([1, ("table", x)]) == 1
    assert gpu.log == ["kept for 1"]  # a stream waits for itself anyway
    gpu.log.clear()
    gpu.current = Stream(2, gpu.log)
    assert ready_for_current_stream([[x], None]) == 2
    assert gpu.log == ["2 waits for copy on 1", "kept for 2"]


def test_a_capture_waits_for_nothing_outside(gpu: Gpu) -> None:
    x = to_device(np.arange(3), GPU)
    gpu.current, gpu.capturing = Stream(2, gpu.log), True
    to_device(np.arange(3), GPU)  # what is copied in a capture is not waited for outside, either
    assert ready_for_current_stream([x]) is None
    gpu.current, gpu.capturing = Stream(3, gpu.log), False
    assert ready_for_current_stream([x]) == 3
    assert gpu.log == ["3 waits for copy on 1", "kept for 3"]


def test_arrays_of_a_cpu_are_ready() -> None:
    x = to_device(np.arange(3), torch.device("cpu"))
    assert torch.equal(x, torch.arange(3))
    assert ready_for_current_stream([x, (x, 2)]) is None
