"""Attention problems that test modules share: the same tensors and mods in every process.

A `Case` is plain data, so it can be sent to a rank, which builds tensors and mods from it:

    problem = Case(mask="causal", score="alibi").build()
    expected = reference(case)                        # dense, fp64
    found = attend(problem, block_mask)               # one device
    found = attend(problem.shard(plan), plan)         # this rank's part

Tolerances: `fp64_tolerance` and `plain_tolerance`, each from the reference, never by hand.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

import ringflex as rf
from ringflex.reference import Reference, reference_attention_with_gradients

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")  # of the kernels' tests
LAYOUTS = ("contiguous", "zigzag", "striped")
STRATEGIES = ("ring", "direct", "all_gather")

FP64_RELATIVE = 1e-9  # of the largest reference value
FP64_ABSOLUTE = 1e-13  # for what is zero but for rounding, as dq where a query sees one key
PLAIN_FACTOR = 3.0  # ours may err by this times the error of the plain computation
PLAIN_DRAWS = 4  # of the random numbers, for the plain error: one draw of few numbers may be lucky


@dataclass(frozen=True, kw_only=True)
class Case:
    """One attention problem.

    mask, score: keys of MASKS and SCORES.
    dlse: whether a gradient comes through lse as well.
    bshd: q, k, v and dout are views of `[B, S, H, D]` storage.
    growth: of the keys, from the first to the last.
    """

    mask: str = "causal"
    score: str | None = None
    seq_len: int = 129
    B: int = 2
    Hq: int = 4
    Hkv: int = 2
    D: int = 8
    Dv: int = 12
    dtype: torch.dtype = torch.float64
    sinks: bool = False
    dlse: bool = False
    bshd: bool = False
    block_size: int = 16
    growth: float = 1.0
    seed: int = 0  # of the tensors, not of the mask

    def __str__(self) -> str:
        """What differs from the default, for the names of tests."""
        changed = {f.name: getattr(self, f.name) for f in fields(self)}
        changed = {f.name: changed[f.name] for f in fields(self) if changed[f.name] != f.default}
        return ", ".join(f"{name}={value}" for name, value in changed.items()) or "default"

    def mask_mod(self) -> Callable[..., Tensor]:
        return MASKS[self.mask](self)

    def build(
        self, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
    ) -> "Problem":
        """The values are those of the case's dtype; `dtype` is what they are stored in."""
        generator = torch.Generator().manual_seed(1234 + self.seed)

        def make(*shape: int, scale: float | Tensor = 1.0, requires_grad: bool = False) -> Tensor:
            x = scale * torch.randn(*shape, generator=generator, dtype=torch.float64)
            x = x.to(self.dtype).to(device, dtype or self.dtype)
            return x.requires_grad_(requires_grad)

        def heads(H: int, D: int, growth: float = 1.0) -> Tensor:
            grown = growth ** torch.linspace(0, 1, self.seq_len, dtype=torch.float64)
            if self.bshd:
                return make(self.B, self.seq_len, H, D, scale=grown[:, None, None]).transpose(1, 2)
            return make(self.B, H, self.seq_len, D, scale=grown[:, None])

        score, captures = None, ()
        if self.score is not None:
            score, captures = SCORES[self.score](self, make)
        return Problem(
            q=heads(self.Hq, self.D),
            k=heads(self.Hkv, self.D, self.growth),
            v=heads(self.Hkv, self.Dv),
            dout=heads(self.Hq, self.Dv),
            dlse=make(self.B, self.Hq, self.seq_len) if self.dlse else None,
            sinks=make(self.Hq) if self.sinks else None,
            mask=self.mask_mod(),
            score=score,
            captures=captures,
        )


@dataclass(frozen=True, kw_only=True)
class Problem:
    """The tensors and mods of a case. captures: those of the score mod that want a gradient."""

    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor
    dlse: Tensor | None
    sinks: Tensor | None
    mask: Callable[..., Tensor]
    score: Callable[..., Tensor] | None
    captures: tuple[Tensor, ...]

    def shard(self, plan: rf.Plan, fill: float = 0) -> "Problem":
        """This rank's part, in the same storage order; padding of q, k and v holds `fill`."""

        return replace(
            self,
            q=shard(plan, self.q, fill),
            k=shard(plan, self.k, fill),
            v=shard(plan, self.v, fill),
            dout=shard(plan, self.dout),
            dlse=None if self.dlse is None else shard(plan, self.dlse),
        )


def shard(plan: rf.Plan, x: Tensor, fill: float = 0) -> Tensor:
    """This rank's tokens of `x [B, H, S, ...]`, in the same storage order."""
    if x.is_contiguous():
        return plan.shard(x, 2, fill)
    return plan.shard(x.transpose(1, 2), 1, fill).transpose(1, 2)


def attend(problem: Problem, block_mask: Any, **options: Any) -> Reference:
    """`rf.flex_attention`, forward and backward."""
    p = problem
    q, k, v = (x.detach().requires_grad_() for x in (p.q, p.k, p.v))
    sinks = None if p.sinks is None else p.sinks.detach().requires_grad_()
    out, lse = rf.flex_attention(
        q, k, v, p.score, block_mask, enable_gqa=True, return_lse=True, sinks=sinks, **options
    )
    wanted = [q, k, v, *p.captures] + ([] if sinks is None else [sinks])
    results, seeds = ([out], [p.dout]) if p.dlse is None else ([out, lse], [p.dout, p.dlse])
    grads = list(torch.autograd.grad(results, wanted, seeds))
    dsinks = None if sinks is None else grads.pop()
    dq, dk, dv, *dcaptures = grads
    return Reference(out.detach(), lse.detach(), dq, dk, dv, dsinks, tuple(dcaptures))


@functools.lru_cache(maxsize=64)
def reference(case: Case, dtype: torch.dtype = torch.float64) -> Reference:
    """The dense computation on the case's values, done in `dtype`."""
    p = case.build(dtype)
    return reference_attention_with_gradients(
        p.q,
        p.k,
        p.v,
        p.dout,
        dlse=p.dlse,
        mask_mod=p.mask,
        score_mod=p.score,
        sinks=p.sinks,
        captures=p.captures,
    )


def tensors(result: Reference) -> dict[str, Tensor]:
    """The results by name; those that do not exist are left out."""
    named = {name: x for name, x in result._asdict().items() if isinstance(x, Tensor)}
    return named | {f"dcapture{i}": x for i, x in enumerate(result.dcaptures)}


def deviation(found: Tensor, expected: Tensor) -> float:
    """Largest difference, in fp64; infinite where one is -inf and the other is not, NaN if NaN."""
    assert found.shape == expected.shape
    found, expected = found.double().cpu(), expected.double()
    same = found == expected  # -inf - -inf would be NaN
    difference = (found - expected).abs().masked_fill(same, 0)
    return float(difference.max()) if difference.numel() else 0.0


def largest(x: Tensor) -> float:
    """Largest finite magnitude."""
    return float(x.double().abs().masked_fill(x.isinf(), 0).max()) if x.numel() else 0.0


def fp64_tolerance(case: Case) -> dict[str, float]:
    return {
        name: FP64_RELATIVE * largest(x) + FP64_ABSOLUTE
        for name, x in tensors(reference(case)).items()
    }


@functools.lru_cache(maxsize=64)
def plain_tolerance(case: Case) -> dict[str, float]:
    """A small factor times the error of the dense computation in the case's dtype (the worst of a
    few draws, relative to the largest value), plus half a unit in the last place of that value:
    the rounding of a result that is exact but for it. What is zero but for rounding, as dq where a
    query sees one key, may be off by as much as fp32 rounds the largest gradient.
    """
    relative: dict[str, float] = {}
    for seed in range(case.seed, case.seed + PLAIN_DRAWS):
        draw = replace(case, seed=seed)
        exact, plain = tensors(reference(draw)), tensors(reference(draw, case.dtype))
        for name, x in exact.items():
            error = deviation(plain[name], x) / max(largest(x), torch.finfo(torch.float64).tiny)
            relative[name] = max(relative.get(name, 0.0), error)
    half_ulp = torch.finfo(case.dtype).eps / 2
    expected = tensors(reference(case))
    steepest = max(largest(x) for name, x in expected.items() if name.startswith("d"))
    floor = PLAIN_FACTOR * torch.finfo(torch.float32).eps * steepest
    return {
        name: (PLAIN_FACTOR * relative[name] + half_ulp) * largest(x) + floor
        for name, x in expected.items()
    }


def assert_equals_reference(
    case: Case, found: Reference, where: str = "", only: Sequence[str] | None = None
) -> None:
    """All results, or only those of some names, are within the plain tolerance."""
    results, expected, tolerance = tensors(found), tensors(reference(case)), plain_tolerance(case)
    names = expected if only is None else only
    deviations = {name: deviation(results[name], expected[name]) for name in names}
    assert_within(deviations, {name: tolerance[name] for name in names}, f"{case} {where}")


def assert_within(found: dict[str, float], tolerance: dict[str, float], where: str = "") -> None:
    """Every deviation is within its tolerance; NaN is not."""
    assert found.keys() == tolerance.keys(), where
    wrong = {n: (x, tolerance[n]) for n, x in found.items() if not x <= tolerance[n]}
    assert not wrong, f"{where}: (deviation, tolerance) of {wrong}"


def assert_same_bits(first: Reference, second: Reference) -> None:
    for (name, x), y in zip(tensors(first).items(), tensors(second).values(), strict=True):
        assert torch.equal(x, y), f"{name} differs between two runs"


def dense_mask(case: Case) -> Tensor:
    """bool `[B, Hq, S, S]`, asked element by element."""
    lengths = (case.B, case.Hq, case.seq_len, case.seq_len)
    grid = torch.meshgrid(*(torch.arange(n) for n in lengths), indexing="ij")
    return case.mask_mod()(*grid)


def random_documents(seq_len: int, seed: int) -> Tensor:
    """Document ids `[seq_len]`: about a dozen tokens each, some of one token."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(seq_len, generator=generator, dtype=torch.float32) < 0.08).cumsum(0)


def _document_rows(case: Case) -> Tensor:
    """Document ids `[B, S]`: every batch element has its own, the last only one."""
    ids = torch.stack([random_documents(case.seq_len, seed) for seed in range(case.B)])
    ids[-1] = 0
    return ids


def _per_head_window(case: Case) -> Callable[..., Tensor]:
    reach = torch.arange(case.Hq) * (case.seq_len // 6) + 1
    return lambda b, h, q_idx, kv_idx: (q_idx - kv_idx).abs() <= reach[h]


def _per_query_limit(case: Case) -> Callable[..., Tensor]:
    generator = torch.Generator().manual_seed(5)
    limit = torch.randint(0, case.seq_len + 1, (case.B, case.seq_len), generator=generator)
    return lambda b, h, q_idx, kv_idx: kv_idx < limit[b, q_idx]


def _global_tokens(case: Case) -> Callable[..., Tensor]:
    """BigBird's: a window, and some tokens that see and are seen by all."""
    generator = torch.Generator().manual_seed(6)
    everywhere = torch.rand(case.seq_len, generator=generator) < 0.02

    def mask(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return ((q_idx - kv_idx).abs() < 9) | everywhere[q_idx] | everywhere[kv_idx]

    return mask


def _near_in_time(case: Case) -> Callable[..., Tensor]:
    """No structure that a block could know: neighbours by a captured coordinate."""
    generator = torch.Generator().manual_seed(7)
    when = torch.rand(case.seq_len, generator=generator)
    return lambda b, h, q_idx, kv_idx: (when[q_idx] - when[kv_idx]).abs() < 0.05


def _table(case: Case) -> Callable[..., Tensor]:
    generator = torch.Generator().manual_seed(8)
    seen = torch.rand(case.seq_len, case.seq_len, generator=generator) < 0.02
    return lambda b, h, q_idx, kv_idx: seen[q_idx, kv_idx]


def _opposite(case: Case) -> Callable[..., Tensor]:
    """Keys half a sequence away: hardly a row is served by the rank that holds it."""
    S = case.seq_len
    return lambda b, h, q_idx, kv_idx: ((kv_idx - q_idx) % S - S // 2).abs() < 5


def _mixed_heads(case: Case) -> Callable[..., Tensor]:
    def mask(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return torch.where(h % 2 == 0, kv_idx <= q_idx, (q_idx - kv_idx).abs() <= 12)

    return mask


def _tree(case: Case) -> Callable[..., Tensor]:
    """Nested on purpose: | of &, with ~ inside and a plain function in the middle."""
    odd = lambda b, h, q_idx, kv_idx: (q_idx + kv_idx) % 2 == 1
    local = rf.causal() & rf.sliding_window(case.seq_len // 5)
    documents = rf.document(random_documents(case.seq_len, 3))
    return (local & ~(documents & odd)) | (rf.prefix_lm(7) & rf.dilated(5) & ~rf.chunked(32))


MASKS: dict[str, Callable[[Case], Callable[..., Tensor]]] = {
    # every factory
    "full": lambda c: rf.full(),
    "causal": lambda c: rf.causal(),
    "window": lambda c: rf.sliding_window(c.seq_len // 4, c.seq_len // 9),
    "causal window": lambda c: rf.causal() & rf.sliding_window(c.seq_len // 5),
    "short window": lambda c: rf.causal() & rf.sliding_window(50),
    "document": lambda c: rf.document(random_documents(c.seq_len, 3)),
    "document rows": lambda c: rf.document(_document_rows(c)),
    "document lengths": lambda c: rf.document_from_lengths(
        [c.seq_len // 2, 0, 1, c.seq_len - c.seq_len // 2 - 1]
    ),
    "prefix": lambda c: rf.prefix_lm(c.seq_len // 3),
    "prefix rows": lambda c: rf.prefix_lm(torch.arange(c.B) * c.seq_len // 2),
    "dilated": lambda c: rf.dilated(7),
    "chunked": lambda c: rf.chunked(24),
    # nested
    "causal documents": lambda c: rf.causal() & rf.document(_document_rows(c)),
    "tree": _tree,
    # by hand, with captured tensors
    "per-head window": _per_head_window,
    "per-query limit": _per_query_limit,
    "global tokens": _global_tokens,
    "near in time": _near_in_time,
    "table": _table,
    "mixed heads": _mixed_heads,
    # rows that see nothing, ranks with no work
    "future": lambda c: ~rf.causal(),
    "past chunks": lambda c: rf.causal() & ~rf.chunked(40),
    "opposite": _opposite,
    "corner": lambda c: lambda b, h, q_idx, kv_idx: (q_idx < 20) & (kv_idx < 20),
    "far corner": lambda c: lambda b, h, q_idx, kv_idx: (q_idx < 20) & (kv_idx > c.seq_len - 20),
    "last batch element": lambda c: lambda b, h, q_idx, kv_idx: b == c.B - 1,
    "nothing": lambda c: lambda b, h, q_idx, kv_idx: q_idx < 0,
}

Make = Callable[..., Tensor]
Score = tuple[Callable[..., Tensor], tuple[Tensor, ...]]


def _alibi(case: Case, make: Make) -> Score:
    slopes = make(case.Hq, scale=0.05, requires_grad=True)
    return rf.alibi(slopes), (slopes,)


def _relative(case: Case, make: Make) -> Score:
    bias = make(case.Hq, 41, requires_grad=True)
    return rf.relative_position(bias), (bias,)


def _composed(case: Case, make: Make) -> Score:
    bias = make(case.Hq, 41, requires_grad=True)
    slopes = make(case.Hq, scale=0.05, requires_grad=True)
    mods = rf.relative_position(bias), rf.softcap(2.0), rf.alibi(slopes), rf.softcap(20.0)
    return rf.compose(*mods), (bias, slopes)


def _by_position(case: Case, make: Make) -> Score:
    """Tables over global positions: an index of the shard would be seen at once."""
    gain = make(case.B, case.seq_len, requires_grad=True)
    shift = make(case.seq_len, requires_grad=True)

    def score_mod(s: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return s * (1 + 0.3 * gain[b, q_idx]) + shift[kv_idx]

    return score_mod, (gain, shift)


def _temperature(case: Case, make: Make) -> Score:
    """A parameter without dimensions."""
    temperature = make(1, requires_grad=True)
    scalar = temperature.detach()[0].requires_grad_()
    return lambda s, b, h, q_idx, kv_idx: s * scalar, (scalar,)


def _instead(case: Case, make: Make) -> Score:
    """The score itself is not used: dq and dk are zero."""
    level = make(case.Hq, case.seq_len, requires_grad=True)
    return lambda s, b, h, q_idx, kv_idx: level[h, kv_idx], (level,)


def _low_rank(case: Case, make: Make) -> Score:
    """Reads rows, not elements: the graph is not one of scalars."""
    left = make(case.seq_len, 3, requires_grad=True)
    right = make(case.seq_len, 3, requires_grad=True)

    def score_mod(s: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return s + (left[q_idx] * right[kv_idx]).sum(-1)

    return score_mod, (left, right)


def _frozen(case: Case, make: Make) -> Score:
    weight = make(case.seq_len)
    return lambda s, b, h, q_idx, kv_idx: s + weight[q_idx] * weight[kv_idx], ()


SCORES: dict[str, Callable[[Case, Make], Score]] = {
    "alibi": _alibi,
    "relative": _relative,
    "softcap": lambda case, make: (rf.softcap(1.5), ()),
    "composed": _composed,
    "by position": _by_position,
    "temperature": _temperature,
    "instead": _instead,
    "low rank": _low_rank,
    "frozen": _frozen,
}
