"""Which implementation serves these inputs, and why."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ringflex.kernels import eager
from ringflex.kernels.scalars import LARGEST_INDEX
from ringflex.masks.block_mask import BlockMask
from ringflex.masks.traced_mod import TracedMod

BACKENDS = ("eager", "triton", "hopper")
_LARGEST_DIM = 256


class Selection(NamedTuple):
    """A kernel (a module, see `contract`) and the reason for its choice."""

    kernel: ModuleType
    name: str
    reason: str


def select(
    backend: str,
    q: Tensor,
    v: Tensor,
    mask: BlockMask,
    score: TracedMod | None,
    training: bool = True,
) -> Selection:
    """The kernel for these inputs: `backend` is a name, or "auto"; training: with a backward.

    On a GPU, "auto" takes the Hopper kernels where they serve, then the portable Triton kernels,
    and warns, once for each reason, where it must fall back to the eager kernel. On a CPU it takes
    the eager kernel.

    Raises:
        ValueError: unknown name. NotImplementedError: the kernel asked for does not serve these
            inputs; says why.
    """
    if backend not in ("auto", *BACKENDS):
        raise ValueError(f"backend={backend!r} is not one of auto, {', '.join(BACKENDS)}")
    missing = None
    if backend == "eager":
        return Selection(eager, "eager", "asked for")
    if backend == "auto" and q.device.type == "cpu":
        return Selection(eager, "eager", "the inputs are on a CPU")
    obstacle = _obstacle(q, v, mask, score, training)
    if obstacle is None and backend != "triton":
        missing = _hopper_obstacle(q, v, mask)
        if missing is None:
            from ringflex.kernels import hopper_kernel

            reason = "asked for" if backend == "hopper" else "a Hopper GPU"
            return Selection(hopper_kernel, "hopper", reason)
        if backend == "hopper":
            raise NotImplementedError(f"backend='hopper': {missing}")
    if obstacle is None:
        from ringflex.kernels import triton_kernel

        reason = "asked for" if backend == "triton" else f"a GPU; not hopper, as {missing}"
        return Selection(triton_kernel, "triton", reason)
    if backend != "auto":
        raise NotImplementedError(f"backend='{backend}': {obstacle}")
    warnings.warn(
        f"flex_attention falls back to backend='eager', which is slow on a GPU: {obstacle}",
        stacklevel=2,
    )
    return Selection(eager, "eager", obstacle)


def _obstacle(
    q: Tensor, v: Tensor, mask: BlockMask, score: TracedMod | None, training: bool
) -> str | None:
    """Why the Triton kernel cannot serve these inputs; None if it can."""
    if q.dtype == torch.float64:
        return "the inputs are fp64"
    if max(q.shape[3], v.shape[3]) > _LARGEST_DIM:
        return f"head dims {q.shape[3]} and {v.shape[3]} are larger than {_LARGEST_DIM}"
    if any(size % 16 for size in mask.block_size):
        return f"blocks of {mask.block_size} tokens are not multiples of 16"
    if max(mask.q_limit, mask.kv_limit) > LARGEST_INDEX:
        return f"the sequence is longer than {LARGEST_INDEX} tokens"
    found = _of_device(q.device, q.dtype) or _of_mask(mask, q.device)
    return found or _of_score(score, q.device, training)


def _hopper_obstacle(q: Tensor, v: Tensor, mask: BlockMask) -> str | None:
    """Why the Hopper kernels cannot serve these inputs, which the portable ones can."""
    if q.dtype not in (torch.float16, torch.bfloat16):
        return f"the inputs are {q.dtype}"
    if any(size % 128 for size in mask.block_size):
        return f"blocks of {mask.block_size} tokens are not multiples of 128"
    return _no_hopper(q.device)


@functools.cache
def _no_hopper(device: torch.device) -> str | None:
    if device.type != "cuda" or torch.version.hip is not None:
        return "there is no Hopper GPU"
    major, minor = torch.cuda.get_device_capability(device)
    if major != 9:
        return f"the GPU is sm_{major}{minor}, not sm_90"
    try:
        from ringflex.kernels.hopper_intrinsics import obstacle
    except (ImportError, AttributeError) as problem:
        return f"this Triton has another Gluon: {problem}"
    return obstacle()


@functools.cache
def _of_device(device: torch.device, dtype: torch.dtype) -> str | None:
    try:
        import triton
    except ImportError:
        return "triton is not installed"
    interpreted = triton.knobs.runtime.interpret
    if device.type == "cpu" and not interpreted:
        return "the inputs are on a CPU, and Triton's interpreter (TRITON_INTERPRET=1) is off"
    if device.type not in ("cpu", "cuda"):
        return f"the inputs are on {device}"
    if dtype == torch.bfloat16 and interpreted:
        return "Triton's interpreter computes bf16 wrongly"
    if device.type == "cuda" and torch.version.hip is None:
        major, minor = torch.cuda.get_device_capability(device)
        if major < 8:
            return f"the GPU is sm_{major}{minor}, older than sm_80"
    return None


def _of_mask(mask: BlockMask, device: torch.device) -> str | None:
    kept = mask.mask.cache
    if ("obstacle", device) not in kept:
        from ringflex.kernels.triton_mods import mask_mod

        kept["obstacle", device] = _raised(lambda: mask_mod(mask, device))
    obstacle: str | None = kept["obstacle", device]
    return obstacle


def _of_score(score: TracedMod | None, device: torch.device, training: bool) -> str | None:
    if score is None:
        return None
    key = ("obstacle", device, training and tuple(c.requires_grad for c in score.captures))
    if key not in score.cache:
        from ringflex.kernels.triton_mods import ScoreMod

        def lower() -> None:
            mod = ScoreMod(score, device, approximate_tanh=False)
            mod.function()
            if training:
                mod.gradient(mod.wanted([c.requires_grad for c in score.captures]))

        score.cache[key] = _raised(lower)
    obstacle: str | None = score.cache[key]
    return obstacle


def _raised(lower: Callable[[], Any]) -> str | None:
    try:
        lower()
    except NotImplementedError as problem:
        return str(problem)
    return None
