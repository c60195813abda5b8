"""A prepared kernel is launched as Triton itself would launch it."""

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("triton")
from triton import knobs
from triton.compiler import CompiledKernel

from ringflex.kernels import triton_launch
from ringflex.kernels.contract import Tile
from ringflex.kernels.triton_launch import Prepared

GRID = (5, 3, 1)


class Recorded(CompiledKernel):
    """Triton's compiled kernel without a binary: it writes down how it is run."""

    def __init__(self) -> None:
        self.runs: list[tuple[Any, ...]] = []
        self.function, self.packed_metadata = object(), object()

    @property
    def run(self) -> Any:
        return lambda *arguments: self.runs.append(arguments)

    def _init_handles(self) -> None:
        pass

    def launch_metadata(self, *_: Any) -> str:
        return "metadata"


class Jitted:
    active: Any

    def __init__(self, compiled: Recorded) -> None:
        self.compiled, self.launches = compiled, 0

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        assert grid == GRID
        return self.launch

    def launch(self, *arguments: Any, num_warps: int) -> Recorded:
        self.launches += 1
        return self.compiled


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Jitted:
    active = SimpleNamespace(
        get_current_device=lambda: 2, get_current_stream=lambda device: f"stream of {device}"
    )
    monkeypatch.setattr(triton_launch, "driver", SimpleNamespace(active=active))
    monkeypatch.setattr("triton.compiler.compiler.driver", SimpleNamespace(active=active))
    kernel = Jitted(Recorded())
    kernel.active = active
    return kernel


def test_as_triton_would(kernel: Jitted) -> None:
    ready = Prepared(kernel, GRID, ("fixed",), ("constant",), Tile(64, 64, 4, 2))
    ready("first")
    assert kernel.launches == 1 and not kernel.compiled.runs  # compiled and launched by the JIT
    ready("second")
    kernel.compiled[GRID]("second", "fixed", "constant")
    ours, tritons = kernel.compiled.runs
    grid_to_metadata, hooks = slice(0, 6), slice(6, 9)
    assert ours[grid_to_metadata] == tritons[grid_to_metadata]
    assert tritons[hooks] == (
        "metadata", knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
    )  # fmt: skip
    assert ours[hooks] == (None, None, None)
    assert ours[9:] == tritons[9:] == ("second", "fixed", "constant")
    assert kernel.launches == 1


def test_arguments_are_made_ready_for_each_stream(
    kernel: Jitted, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once, but for launches within a capture, which cannot wait for what is outside."""
    made: list[tuple[Any, ...]] = []
    current: list[int | None] = [7]

    def ready(arrays: tuple[Any, ...]) -> int | None:
        made.append(arrays)
        return current[-1]

    monkeypatch.setattr(triton_launch, "ready_for_current_stream", ready)
    kernel.active.get_current_stream = lambda device: current[-1] or 9
    launch = Prepared(kernel, GRID, ("fixed",), ("constant",), Tile(64, 64, 4, 2))
    launch(), launch(), launch()
    assert made == [("fixed", "constant")]
    current.append(8)
    launch(), launch()
    assert len(made) == 2
    current.append(None)
    launch(), launch()
    assert len(made) == 4
    current.append(7)
    launch()
    assert len(made) == 4


def test_profilers_hear_of_every_launch(kernel: Jitted) -> None:
    ready = Prepared(kernel, GRID, (), (), Tile(64, 64, 4, 2))
    ready(1)
    heard: list[Any] = []
    knobs.runtime.launch_enter_hook.add(heard.append)
    try:
        ready(2)
    finally:
        knobs.runtime.launch_enter_hook.remove(heard.append)
    assert kernel.compiled.runs[0][6:8] == ("metadata", knobs.runtime.launch_enter_hook)
