"""The numbers of the distributed path: every rank's part against the dense reference.

One call of the pool runs one case over several layouts and strategies; each rank compares its own
rows with the reference that the test's process computed, and returns what has to be summed over
ranks.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import ringflex as rf
from attention_cases import (
    LAYOUTS,
    MASKS,
    SCORES,
    STRATEGIES,
    Case,
    assert_within,
    attend,
    deviation,
    fp64_tolerance,
    plain_tolerance,
    reference,
    tensors,
)
from rank_pool import RankPool
from ringflex.reference import Reference

Combination = tuple[str, str]  # layout, strategy


def three(turn: int) -> list[Combination]:
    """Each layout and each strategy once; three successive turns make all nine combinations, so
    that 2, 3 and 4 ranks together have run each."""
    return [(layout, STRATEGIES[(i + turn) % 3]) for i, layout in enumerate(LAYOUTS)]


@dataclass(frozen=True, kw_only=True)
class Part:
    """What one rank found. shares: gradients of which every rank has a share, by name."""

    deviations: dict[str, float]
    shares: dict[str, Tensor]


def compare_on_rank(
    group: dist.ProcessGroup,
    case: Case,
    expected: Reference,
    combinations: list[Combination],
    fill: float = 0.0,
) -> list[Part]:
    """This rank's part of `case`, for each layout and strategy. fill: what padding slots hold."""
    problem = case.build()
    parts = []
    for layout, strategy in combinations:
        plan = rf.plan(
            problem.mask,
            case.seq_len,
            group,
            B=case.B,
            H=case.Hq,
            layout=layout,
            strategy=strategy,
            block_size=case.block_size,
            machine=rf.Machine(gpus_per_node=2 if strategy == "hierarchical" else 8, at_once=0),
        )
        found = tensors(attend(problem.shard(plan, fill), plan))
        whole = tensors(expected)
        mine = plan.positions[plan.valid]
        deviations = {}
        for name in ("out", "lse", "dq", "dk", "dv"):
            deviations[name] = deviation(
                found[name][:, :, plan.valid], whole[name].index_select(2, mine)
            )
            padding = found[name][:, :, ~plan.valid]
            empty = 0 if name != "lse" else -torch.inf
            assert case.sinks or bool((padding == empty).all()), f"{name} of padding: {padding}"
        parts.append(
            Part(
                deviations=deviations,
                shares={name: x for name, x in found.items() if name not in deviations},
            )
        )
    return parts


def check(
    pool: RankPool,
    world_size: int,
    case: Case,
    combinations: list[Combination],
    *,
    tolerance: Callable[[Case], dict[str, float]] = fp64_tolerance,
    fill: float = 0.0,
) -> None:
    if world_size == 1:  # nothing to lay out, nothing to send
        combinations = combinations[:1]
    expected = reference(case)
    ranks = pool.run(compare_on_rank, world_size, case, expected, combinations, fill)
    for combination, *parts in zip(combinations, *ranks, strict=True):
        found = {
            name: float(torch.tensor([p.deviations[name] for p in parts]).max())
            for name in parts[0].deviations
        }
        for name in parts[0].shares:
            total = torch.stack([p.shares[name].double() for p in parts]).sum(0)
            found[name] = deviation(total, tensors(expected)[name])
        assert_within(found, tolerance(case), f"{combination} on {world_size} ranks")


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("mask", MASKS)
def test_every_mask(pool: RankPool, mask: str, world_size: int) -> None:
    check(pool, world_size, Case(mask=mask), three(world_size))


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("score", SCORES)
def test_every_score(pool: RankPool, score: str, world_size: int) -> None:
    check(pool, world_size, Case(mask="causal documents", score=score), three(world_size))


@pytest.mark.parametrize("world_size", [1, 3, 8])
@pytest.mark.parametrize(
    "case",
    [
        Case(Hq=4, Hkv=1, D=16, Dv=4),
        Case(Hq=3, Hkv=3, B=1),
        Case(bshd=True),
        Case(bshd=True, mask="document rows", score="relative", sinks=True),
        Case(dlse=True, score="composed", mask="mixed heads"),
        Case(dlse=True, mask="past chunks"),
        Case(sinks=True),
        Case(sinks=True, dlse=True, mask="past chunks", score="alibi", Hkv=1),
        Case(sinks=True, mask="nothing"),
        Case(seq_len=1),
        Case(seq_len=1, dlse=True, sinks=True, mask="full", score="by position"),
        Case(seq_len=17, mask="opposite"),
        Case(seq_len=96, mask="tree", score="composed"),
        Case(block_size=32, mask="tree", score="by position"),
        Case(block_size=1, seq_len=23, mask="causal window"),
        Case(block_size=7, seq_len=100, mask="global tokens", score="relative"),
        Case(block_size=256, mask="causal"),
        Case(B=3, mask="prefix rows", score="by position", Hq=2, Hkv=1),
    ],
    ids=str,
)
def test_shapes_and_features(pool: RankPool, case: Case, world_size: int) -> None:
    check(pool, world_size, case, three(world_size))


@pytest.mark.parametrize("world_size", [3, 8])
@pytest.mark.parametrize("mask", ["causal", "causal documents", "tree", "opposite"])
def test_a_thousand_tokens(pool: RankPool, mask: str, world_size: int) -> None:
    case = Case(mask=mask, score="relative", seq_len=1000, Hq=2, Hkv=1, block_size=32)
    check(pool, world_size, case, three(world_size))


@pytest.mark.parametrize("world_size", [2, 8])
@pytest.mark.parametrize("mask", ["causal documents", "document rows", "opposite", "nothing"])
def test_the_balanced_layout(pool: RankPool, mask: str, world_size: int) -> None:
    case = Case(mask=mask, score="by position", seq_len=300)
    check(pool, world_size, case, [("balanced", strategy) for strategy in STRATEGIES])


@pytest.mark.parametrize("world_size", [2, 4, 8])
@pytest.mark.parametrize("mask", ["causal", "causal documents", "mixed heads", "nothing"])
def test_two_ranks_a_node(pool: RankPool, mask: str, world_size: int) -> None:
    layouts = [*LAYOUTS, "balanced"]
    check(pool, world_size, Case(mask=mask), [(layout, "hierarchical") for layout in layouts])


def test_4099_tokens_on_three_ranks(pool: RankPool) -> None:
    case = Case(mask="causal window", score="alibi", seq_len=4099, B=1, Hq=1, Hkv=1, block_size=64)
    check(pool, 3, case, three(0))


@pytest.mark.parametrize("fill", [1e30, float("nan"), float("inf")])
@pytest.mark.parametrize("mask", ["full", "document rows", "future"])
def test_padding_may_hold_anything(pool: RankPool, mask: str, fill: float) -> None:
    check(pool, 3, Case(mask=mask, score="composed", sinks=True), three(1), fill=fill)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "case",
    [
        Case(),
        Case(mask="full", Hkv=4, D=32, Dv=32),
        Case(mask="causal documents", score="composed", dlse=True),
        Case(mask="tree", score="relative", sinks=True),
        Case(mask="document rows", score="by position", bshd=True),
        Case(mask="opposite", score="alibi"),
        Case(mask="future", score="softcap", seq_len=300),
    ],
    ids=str,
)
def test_errors_no_larger_than_of_the_plain_computation(
    pool: RankPool, case: Case, dtype: torch.dtype
) -> None:
    case = replace(case, dtype=dtype)
    for world_size in (2, 8):
        check(pool, world_size, case, three(world_size), tolerance=plain_tolerance)
