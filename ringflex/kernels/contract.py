"""What every kernel does, and what it is given: the contract of this package.

A kernel is a module with

    forward(q, k, v, mask, score, scale, before, after, options, stage, running, beside,
            more, behind)
    row_terms(dout, out, lse, dlse, q, mask, score, scale, options, apart) -> terms
    backward(dout, q, k, v, terms, mask, score, scale, gradients, options)
    has_separate_passes(q, v, options, beside) -> bool
    may_overlap: bool
    joins: bool
    blocks_at_once(q, block_size) -> float

- `q [B, Hq, q_len, D]`, `k [B, Hkv, kv_len, D]`, `v [B, Hkv, kv_len, Dv]`: one dtype, any strides.
- `mask`: the BlockMask over `q_len` x `kv_len`; `score`: the traced score mod, or None; `scale`.
- `forward` attends to the K/V in hand. `before` is what was computed over other K/V (None:
  nothing; its `out` None: a result of zeros, as sinks give), `after` where the merged result goes;
  the two may be the same tensors.
- Where K/V arrives in steps, `stage` says which queries begin with this one and merge with
  `before`, and which end with it and go to `after`; in between a result is in `running`: out in the
  compute dtype, lse in fp64, so that its rounding does not add up; None if all that see this one
  begin and end with it. What is in `after` is rounded once.
- `beside`: transfers may be under way meanwhile, which need a few multiprocessors of the GPU.
- `behind`: a `Way` that its programs make, when told to, for other launches; or None.
- `more`: K and V that follow k and v, as the mask counts its blocks; whole blocks of both.
- `joins`: whether `forward` with `more` is cheaper than merging; if not, it copies k and v to join.
- `blocks_at_once`: how many blocks of queries, of one head each, `forward` computes at a time; 1
  where that makes no difference.
- `row_terms` turns the **global** out, lse and their gradients into what `backward` needs of each
  query, once for all steps: among it `delta = dout . out - dlse`, `[B, Hq, q_len or more]`.
  `apart`: what `has_separate_passes` said.
- `backward` adds this K/V's share of the gradients into `gradients`, or overwrites them.
- `may_overlap`: whether calls of `forward` whose stages have different queries, and of `backward`
  for different K/V and without gradients of captures, may run on the GPU at the same time. If not,
  one reads and writes what is another's, though it leaves it as it was.
- `has_separate_passes`: whether it computes dQ and dK/dV apart, so that asking for one, then for
  the other, costs no more than asking for both. `beside`: as of the gradients that are asked for.

A query that sees nothing has out 0, lse -inf and zero gradients; two empty results merge to an
empty one. lse is natural log.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ringflex.kernels.stages import Stage


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of scores, lse and accumulation for inputs of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class Partial(NamedTuple):
    """Attention over some of the keys: out `[B, Hq, q_len, Dv]`, lse `[B, Hq, q_len]`."""

    out: Tensor | None
    lse: Tensor

    def in_between(self) -> Partial:
        """Memory for what runs towards this one, from step to step."""
        assert self.out is not None
        return Partial(
            torch.empty_like(self.out, dtype=compute_dtype(self.out.dtype)),
            torch.empty_like(self.lse, dtype=torch.float64),
        )


@dataclass(eq=False)
class Way:
    """Through a launch, for others that come later: a kernel that can make room leaves a `word`
    here, one int32 on its GPU. Each time that the number in it grows by one, those of its programs
    that run end with the tile in hand, and others take their place, behind what waits.

    times: how often it may be asked to, about; after that it stays.
    """

    times: int
    word: Tensor | None = None


@dataclass(frozen=True, eq=False, kw_only=True)
class Gradients:
    """Where a backward leaves its results.

    Attributes:
        dq, dk, dv: shaped like q, k, v; contiguous. Accumulators in the compute dtype, or tensors
            of another, which are written once. dq, or dk and dv, may be None: not wanted.
        dcaptures: accumulators shaped like the score mod's captured tensors, fp32 or fp64; None
            where no gradient is wanted. They are added to by the call that computes dq.
        stage, running_q: as in `forward`, for dq; running_q is in the compute dtype. running_q
            without a stage, of a kernel without separate passes: dQ is added to it, and dq left.
        beside: as in `forward`.
        behind: as in `forward`.
        make_room: to be called before each kernel that is launched to compute them.
    """

    dq: Tensor | None
    dk: Tensor | None
    dv: Tensor | None
    dcaptures: Sequence[Tensor | None]
    stage: Stage | None = None
    running_q: Tensor | None = None
    beside: bool = False
    behind: Way | None = None
    make_room: Callable[[], None] = lambda: None


class Tile(NamedTuple):
    """How a Triton kernel is compiled: queries and keys per tile, warps, pipeline stages."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True, kw_only=True)
class KernelOptions:
    """`flex_attention(kernel_options=...)`, resolved.

    Attributes:
        deterministic: the same bits on every run, also of the gradients of captured tensors.
            Default: `torch.are_deterministic_algorithms_enabled()`. Without it, the Triton kernel
            adds those gradients (and dQ, in the one-pass form) in whatever order comes.
        backward: "two_pass" (dK/dV and dQ by a kernel each), "one_pass" (dQ added atomically
            beside dK/dV), or "auto": one pass by the Hopper kernel, else two. Triton only.
        approximate_tanh: tanh in a score mod by NVIDIA's instruction, relative error 2^-11 (5e-4);
            elsewhere it has no effect. Triton only.
        tune: measure which tiles are fastest, and keep the findings on disk. Triton only.
        tiles: "forward", "key" (dK/dV) or "query" (dQ) -> a `Tile`, instead of the table's.
        tma: False: never use tensor descriptors. Triton only.
        gradient_dtype: in which dK/dV travel between ranks: torch.float32 or torch.bfloat16.
            Default: that of accumulation.
    """

    deterministic: bool = False
    backward: str = "auto"
    approximate_tanh: bool = False
    tune: bool = False
    tiles: tuple[tuple[str, Tile], ...] = field(default=())
    tma: bool = True
    gradient_dtype: torch.dtype | None = None

    @classmethod
    def of(cls, options: dict[str, Any] | None) -> KernelOptions:
        """Checks what the user passed.

        Raises:
            ValueError: an unknown option or value. TypeError: a value of the wrong type.
        """
        if not options:
            return _DETERMINISTIC if torch.are_deterministic_algorithms_enabled() else _DEFAULT
        given = dict(options)
        known = [f.name for f in fields(cls)]
        unknown = sorted(set(given) - set(known))
        if unknown:
            raise ValueError(f"kernel_options has {unknown}; options are {', '.join(known)}")
        given.setdefault("deterministic", torch.are_deterministic_algorithms_enabled())
        for name in ("deterministic", "approximate_tanh", "tune", "tma"):
            if not isinstance(given.get(name, False), bool):
                raise TypeError(f"kernel_options['{name}'] must be a bool, got {given[name]!r}")
        if given.get("backward", "auto") not in ("auto", "one_pass", "two_pass"):
            raise ValueError(
                "kernel_options['backward'] must be auto, one_pass or two_pass, "
                f"got {given['backward']!r}"
            )
        if given.get("gradient_dtype") not in (None, torch.float32, torch.bfloat16):
            raise ValueError(
                "kernel_options['gradient_dtype'] must be torch.float32 or torch.bfloat16, "
                f"got {given['gradient_dtype']!r}"
            )
        if given["deterministic"] and given.get("backward") == "one_pass":
            raise ValueError("the one_pass backward is not deterministic; ask for two_pass")
        given["tiles"] = tuple(
            (name, _tile(name, tile)) for name, tile in dict(given.get("tiles") or {}).items()
        )
        return cls(**given)


_DEFAULT, _DETERMINISTIC = KernelOptions(), KernelOptions(deterministic=True)


def _tile(name: str, given: Any) -> Tile:
    if name not in ("forward", "key", "query"):
        raise ValueError(f"kernel_options['tiles'] has '{name}'; kernels are forward, key, query")
    powers = isinstance(given, (tuple, list)) and len(given) == 4
    powers = powers and all(isinstance(n, int) and n > 0 for n in given)
    if not powers or any(n & (n - 1) for n in given[:3]) or min(given[:2]) < 16:
        raise ValueError(
            f"kernel_options['tiles']['{name}'] must be (block_m, block_n, num_warps, num_stages): "
            f"powers of two (stages: any), blocks of 16 or more; got {given!r}"
        )
    return Tile(*given)
