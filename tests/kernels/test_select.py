"""Which kernel is chosen, why, and what is refused."""

import warnings
from typing import Any

import pytest
import torch

import ringflex as rf
from attention_cases import DEVICE
from ringflex.kernels import eager, triton_kernel
from ringflex.kernels import select as module
from ringflex.kernels.select import Selection, select
from ringflex.masks.trace import trace_score
from ringflex.masks.traced_mod import TracedMod


def choose(
    backend: str = "triton",
    dtype: torch.dtype = torch.float32,
    D: int = 32,
    score: TracedMod | None = None,
    block_size: int = 128,
    device: torch.device = DEVICE,
) -> Selection:
    x = torch.zeros(1, 1, 64, D, dtype=dtype, device=device)
    mask = rf.create_block_mask(rf.causal(), None, None, 64, 64, BLOCK_SIZE=block_size)
    return select(backend, x, x, mask, score)


def test_asked_for() -> None:
    assert choose("eager").kernel is eager
    assert choose("triton").kernel is triton_kernel
    assert choose("triton").reason == choose("eager").reason == "asked for"
    with pytest.raises(ValueError, match=r"backend='cuda' is not one of auto, eager, triton"):
        choose("cuda")


def test_automatic() -> None:
    on_cpu = choose("auto", device=torch.device("cpu"))
    assert (on_cpu.kernel, on_cpu.reason) == (eager, "the inputs are on a CPU")
    if DEVICE.type == "cuda":
        chosen = choose("auto")
        assert (chosen.kernel, chosen.reason[:5]) == (triton_kernel, "a GPU")
        hopper = torch.cuda.get_device_capability()[0] == 9
        assert choose("auto", dtype=torch.float16).name == ("hopper" if hopper else "triton")


def no_rule(s, b, h, q_idx, kv_idx):  # type: ignore[no-untyped-def]
    return torch.lgamma(s.abs() + 1)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"dtype": torch.float64}, "the inputs are fp64"),
        ({"D": 320}, "head dims 320 and 320 are larger than 256"),
        ({"block_size": 40}, "blocks of (40, 40) tokens are not multiples of 16"),
        ({"score": no_rule}, "'no_rule' uses aten.lgamma.default"),
    ],
)
def test_obstacles(arguments: dict[str, object], text: str) -> None:
    """What Triton cannot serve is refused if asked for, and else served eagerly, with a warning."""
    if "score" in arguments:
        arguments = {"score": trace_score(no_rule, torch.float32)}
    with pytest.raises(NotImplementedError) as caught:
        choose("triton", **arguments)
    assert text in str(caught.value)
    if DEVICE.type == "cuda":
        with pytest.warns(UserWarning, match="falls back to backend='eager'"):
            chosen = choose("auto", **arguments)
        assert chosen.kernel is eager and text in chosen.reason


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"dtype": torch.float32}, "the inputs are torch.float32"),
        ({"block_size": 64}, "blocks of (64, 64) tokens are not multiples of 128"),
        ({"device": torch.device("cpu")}, "there is no Hopper GPU"),
    ],
)
def test_obstacles_to_hopper(arguments: dict[str, Any], text: str) -> None:
    arguments = {"dtype": torch.float16} | arguments
    if DEVICE.type == "cuda" and "device" in arguments:
        pytest.skip("Triton's interpreter is off")
    with pytest.raises(NotImplementedError) as caught:
        choose("hopper", **arguments)
    assert str(caught.value) == f"backend='hopper': {text}"
    assert choose("triton", **arguments).kernel is triton_kernel
    if DEVICE.type == "cuda":
        chosen = choose("auto", **arguments)
        assert chosen.kernel is triton_kernel and text in chosen.reason


def test_hopper_kernels_know_their_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    import triton

    from ringflex.kernels.hopper_intrinsics import obstacle

    for version, known in (("3.6.0", True), ("3.6.1+git", True), ("3.60.0", False)):
        monkeypatch.setattr(triton, "__version__", version)
        assert (obstacle() is None) == known
    assert obstacle() == "the Hopper kernels know Triton 3.6, not 3.60.0"


def test_no_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    import triton

    module._of_device.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(triton.knobs.runtime, "interpret", False)
        with pytest.raises(NotImplementedError, match=r"interpreter \(TRITON_INTERPRET=1\) is off"):
            choose("triton", device=torch.device("cpu"))
    module._of_device.cache_clear()


def test_a_gpu_never_falls_back_in_silence() -> None:
    """The same reason is told by the result also where the warning is filtered."""
    if DEVICE.type != "cuda":
        pytest.skip("needs a GPU")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert "fp64" in choose("auto", dtype=torch.float64).reason
